"""Events that long work reports to its caller while it goes on, each a dataclass.

``train``, ``tune``, ``encode`` and ``SemanticIndex.build`` pass them to their argument ``on_event``; those of sweeps
alone are in ``clusterns_ray.tuning.events``. A caller looks at an event's class, and ignores those it does not know.
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
"""Called with each text that a person should read."""


@dataclass(frozen=True)
class Note(Event):
    """A text for a person: what is being done, or a warning."""

    text: str
    """may hold any character, so a terminal should see it only through ``clusterns_ray.io.terminal.printable``"""


def notes_to(on_event: OnEvent) -> OnNote:
    """A function that passes texts on to ``on_event`` as notes."""
    return lambda text: on_event(Note(text))


@dataclass(frozen=True)
class RowsDone(Event):
    """How far a corpus has been worked through."""

    what: Literal["tokenised", "encoded", "indexed"]
    rows: int
    """sentences that are done"""
    total: int | None = None
    """sentences there are; None where that is not known"""
    sentences_per_second: float | None = None
    """speed so far; None where it is not measured"""
    seconds_left: float | None = None
    """time to the end at that speed; None where it is not known"""


@dataclass(frozen=True)
class RunStarted(Event):
    """Training begins, or resumes from a checkpoint."""

    step: int
    """steps that are done: 0, or those of the checkpoint"""
    total_steps: int
    rows: int
    """sentences of the corpus"""
    num_clusters: int
    """centroids; 0 without clustering"""
    score_before: float | None = None
    """dev score of the untrained encoder (Spearman x 100); None where it has not been measured yet"""


@dataclass(frozen=True)
class StepLogged(Event):
    """A training step was recorded."""

    step: int
    """steps that are done"""
    loss: float
    """of the whole global batch"""
    sentences_per_second: float
    """mean speed since the last recorded step, without evaluations"""
    record: Mapping[str, Any]
    """the line of ``metrics.jsonl``"""


@dataclass(frozen=True)
class Evaluated(Event):
    """The encoder was scored on the dev set."""

    step: int
    """steps that are done; 0 for the untrained encoder"""
    score: float
    """Spearman x 100"""
    record: Mapping[str, Any]
    """the line of ``metrics.jsonl``; keys that begin with ``also`` are scores on further sets"""
    best: bool = False
    """whether no earlier score was as good"""
    best_score: float | None = None
    """best score of this and earlier steps; None for the untrained encoder"""


@dataclass(frozen=True)
class RunDone(Event):
    """Training has ended, and the model is exported."""

    result: Mapping[str, Any]
    """the content of ``result.json``"""
