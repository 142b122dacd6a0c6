"""The jobs of a sweep and their results. Nothing heavy is imported here: Ray's queue actors read these classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from clusterns_ray.config import Config
    from clusterns_ray.tuning.space import Overrides


@dataclass(frozen=True)
class GpuShare:
    """What of a GPU a trial has."""

    use_gpu: bool = False
    trials: int = 1
    """How many share one."""


@dataclass(frozen=True)
class Job:
    """One run of a study, as the process that trains it receives it."""

    name: str
    """The name of the run's directory: ``0003`` for a trial, ``0003-seed1`` for a run that confirms it."""
    number: int | None
    """The number of the trial; None for a run that confirms."""
    overrides: Overrides
    config: Config
    staged: dict[str, Any]
    """Where the tokens and the STS pairs are (see ``clusterns_ray.launch.staging``)."""
    use_gpu: bool = False
    trials_per_gpu: int = 1
    """How many processes share that GPU."""
    score_before: float | None = None
    """The dev score of the untrained encoder; None if this job is to measure it."""
    known_step: int | None = None
    """The newest step whose score the study holds. A resumed trial repeats later ones in order, because the study may
    be a snapshot from before them. None if the study does not keep this job's evaluations."""


@dataclass(frozen=True)
class Evaluation:
    """A dev score during a job, which waits for the verdict whether to go on."""

    step: int
    """0 for the untrained encoder."""
    score: float
    last: bool
    """Whether the job has no further step."""
    seconds: float = 0.0
    """How long this attempt of the job has taken so far."""


@dataclass(frozen=True)
class Finished:
    """A job reached its last step."""

    score: float
    steps: int
    curve: tuple[tuple[int, float], ...]
    """All (step, dev score) pairs, those of earlier attempts included."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """A job ended without a score."""

    reason: str
    seconds: float = 0.0
    fault: Literal["storage", "gpu"] | None = None
    """What failed where it was not the job: its files could not be kept, or its GPU could not be used."""


Result = Evaluation | Finished | Failed


class Stopped(Exception):
    """The verdict on an evaluation was that the job does not go on."""
