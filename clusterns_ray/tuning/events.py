"""What a sweep reports to its caller while it runs, besides the events of ``clusterns_ray.io.events``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from clusterns_ray.io.events import Event

if TYPE_CHECKING:
    import optuna

    from clusterns_ray.tuning.space import Overrides


@dataclass(frozen=True)
class TrialEvent(Event):
    """Something happened to a trial, or to a run that confirms one."""

    name: str
    """the name of the run's directory: ``0003`` for a trial, ``0003-seed1`` for a run that confirms it"""


@dataclass(frozen=True)
class TrialBegan(TrialEvent):
    """It begins, or resumes from its newest checkpoint."""

    overrides: Overrides
    """its values of the study's parameters"""


@dataclass(frozen=True)
class TrialScored(TrialEvent):
    """It was evaluated and goes on, or ended with that score."""

    state: Literal["evaluated", "pruned", "finished"]
    step: int
    """steps that are done"""
    score: float
    """dev score (Spearman x 100): of that step, or the best where it is finished"""


@dataclass(frozen=True)
class TrialFailed(TrialEvent):
    """It ended without a score."""

    reason: str
    """one line"""


@dataclass(frozen=True)
class StudyChecked(Event):
    """The sweep looked at its trials, as it does a few times a second."""

    study: optuna.Study
    """the study as it is now; its trials show how far each has come"""
