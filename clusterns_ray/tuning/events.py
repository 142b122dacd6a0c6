"""Events of a sweep, besides those of ``clusterns_ray.io.events``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from clusterns_ray.io.events import Event

if TYPE_CHECKING:
    import optuna

    from clusterns_ray.tuning.space import Overrides


@dataclass(frozen=True)
class TrialEvent(Event):
    """Something happened to the run in the directory ``name``: ``0003`` is a trial, ``0003-seed1`` confirms it."""

    name: str


@dataclass(frozen=True)
class TrialBegan(TrialEvent):
    """It begins, or resumes, with these values of the study's parameters."""

    overrides: Overrides


@dataclass(frozen=True)
class TrialScored(TrialEvent):
    """It was evaluated and goes on, or ended with that score: of its last evaluation, or its best if it finished."""

    state: Literal["evaluated", "pruned", "finished"]
    step: int
    score: float


@dataclass(frozen=True)
class TrialFailed(TrialEvent):
    """It ended without a score."""

    reason: str


@dataclass(frozen=True)
class StudyChecked(Event):
    """The sweep looked at its trials, as it does a few times a second; ``study`` holds how far each has come."""

    study: optuna.Study
