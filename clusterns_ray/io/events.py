"""Events that long work reports to its caller while it goes on, each a dataclass.

``train``, ``tune``, ``encode`` and ``SemanticIndex.build`` pass them to their argument ``on_event``; those of sweeps
alone are in ``clusterns_ray.tuning.events``. A caller looks at an event's class, and ignores those it does not know.
Rows are sentences, ``step`` is how many training steps are done, scores are of the dev set (Spearman x 100), and a
``record`` is a line of ``metrics.jsonl``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """The base of all events."""


OnEvent = Callable[[Event], None]
"""Called with each event as it happens."""

OnNote = Callable[[str], None]
"""Called with each text for a person."""


@dataclass(frozen=True)
class Note(Event):
    """A text for a person: what is being done, or a warning."""

    text: str


def notes_to(on_event: OnEvent) -> OnNote:
    """A function that passes texts on to ``on_event`` as notes."""
    return lambda text: on_event(Note(text))


@dataclass(frozen=True)
class RowsDone(Event):
    """How far a corpus has been worked through; what is not known or not measured is None."""

    what: Literal["tokenised", "encoded", "indexed"]
    rows: int
    total: int | None = None
    sentences_per_second: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class RunStarted(Event):
    """Training begins, or resumes from the checkpoint of ``step``."""

    step: int
    total_steps: int
    rows: int
    num_clusters: int
    score_before: float | None = None
    """score of the untrained encoder; None where it is still to be measured"""


@dataclass(frozen=True)
class StepLogged(Event):
    """A training step was recorded, with its loss over the global batch and the mean speed since the last record."""

    step: int
    loss: float
    sentences_per_second: float
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated(Event):
    """The encoder was scored; at step 0 before training."""

    step: int
    score: float
    record: Mapping[str, Any]
    best: bool = False
    """whether it is better than before, the untrained encoder included"""
    best_score: float | None = None
    """best score in training so far; None at step 0"""


@dataclass(frozen=True)
class RunDone(Event):
    """Training has ended, and the model is exported; ``result`` is the content of ``result.json``."""

    result: Mapping[str, Any]
