"""What changes over a run besides weights, optimiser and centroids."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
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
    also: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """of each set that is scored and selects nothing: its score ``before`` training and ``after`` the best step, and
    the 95 % interval (``low``, ``high``) of the difference"""
    also_cosines_before: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """cosines of the pairs of each of these sets before training"""
    evaluations_without_gain: int = 0
    """in a row, without a new ``best_trained_score``: a run whose first steps cost it some score may still gain"""
    clustering_started_at: int | None = None
    seconds: float = 0.0
    """spent in steps and evaluations, over all resumptions"""
    precision: str = "fp32"
    """of matrix products; what ``train.precision: auto`` was when the run began"""
    reduction: str = ""
    """of gradients; what ``train.reduction: auto`` was when the run began"""
    checkpoint_seconds: float = 0.0
    """spent waiting for checkpoints and for their last copies, over all resumptions; the checkpoint from which a run is
    resumed does not include its own"""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for each in fields(self):
            setattr(self, each.name, state.get(each.name, getattr(self, each.name)))
