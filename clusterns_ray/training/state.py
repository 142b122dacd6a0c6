"""What changes over a run besides weights, optimiser and centroids."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class TrainState:
    """Step, scores and times of a run; in its checkpoints under ``progress``."""

    step: int = 0
    """steps done"""
    best_step: int = 0
    """that of the exported model; 0 is the untrained encoder"""
    best_score: float | None = None
    """the exported model's dev score, never below ``score_before``"""
    best_trained_score: float | None = None
    """the best dev score after a step, which may be below ``score_before``"""
    score_before: float | None = None
    """the dev score of the untrained encoder"""
    last_score: float | None = None
    """the dev score of the newest evaluation"""
    evaluations_without_gain: int = 0
    """in a row, without a new ``best_trained_score``: a run whose first steps cost it some score may still gain"""
    clustering_started_at: int | None = None
    seconds: float = 0.0
    """spent in steps and evaluations, over all resumptions"""
    precision: str = "fp32"
    """of matrix products; what ``train.precision: auto`` was when the run began"""
    checkpoint_seconds: float = 0.0
    """that the loop waited for checkpoints and for their last copies, over all resumptions but for the checkpoints that
    these began with"""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for field in fields(self):
            setattr(self, field.name, state.get(field.name, getattr(self, field.name)))
