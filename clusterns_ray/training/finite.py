"""Whether a run is still finite: its gradients, its weights, and what it embeds. Nothing that is not is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from clusterns_ray.errors import NonFiniteError
from clusterns_ray.training.kmeans_init import sample_rows, token_ids
from clusterns_ray.training.parts import TrainingParts
from clusterns_ray.training.state import TrainState
from clusterns_ray.training.validation import encode_together

MAX_SKIPPED_IN_A_ROW = 10
"""Steps in a row whose gradients may be NaN or infinite before a run fails."""

SAMPLED_SENTENCES = 64
"""Sentences of the corpus whose embeddings have to be finite before a model is exported without a dev set."""


class FiniteChecks:
    """The checks of a run, which raise NonFiniteError on every worker alike, with what to change."""

    def __init__(self, parts: TrainingParts, state: TrainState) -> None:
        self.parts, self.state = parts, state

    def gradients(self, most: int = MAX_SKIPPED_IN_A_ROW) -> int:
        """How many steps were skipped as their gradients were not finite. Waits for the device.

        Raises:
            NonFiniteError: the last ``most`` of them were, in a row.
        """
        skipped, in_a_row = map(int, self.parts.optimizer.skipped.cpu().numpy())
        if in_a_row >= most:
            raise NonFiniteError(
                f"The last {in_a_row} gradients before step {self.state.step} were NaN or infinite, so the weights "
                f"no longer change. {self.remedies()} The checkpoints before it are whole."
            )
        return skipped

    def gradients_at_the_end(self) -> None:
        """Check gradients as :meth:`gradients` does, in a run that may be too short for ten bad ones in a row."""
        self.gradients(min(MAX_SKIPPED_IN_A_ROW, max(1, math.ceil(self.state.step / 2))))

    def weights(self) -> None:
        """Raise NonFiniteError where a weight or a centroid is NaN or infinite. Waits for the device."""
        tensors: list[tuple[str, Tensor]] = list(self.parts.views.named_parameters())
        if self.parts.clustering.centroids_KD is not None:
            tensors.append(("centroids", self.parts.clustering.centroids_KD))
        damaged = first_not_finite(tensors)
        if damaged:
            raise NonFiniteError(
                f"After step {self.state.step} weights are NaN or infinite ({damaged}), so they are not kept. "
                f"{self.remedies()} Exported models and checkpoints from before are whole."
            )

    def embeddings(self) -> None:
        """Raise NonFiniteError where the encoder embeds a sample of the corpus as NaN or infinity."""
        parts = self.parts
        rows = sample_rows(parts.tokens, SAMPLED_SENTENCES, "try", parts.config.seed)
        if not np.isfinite(encode_together(parts.encoder, token_ids(parts.tokens, rows))).all():
            raise NonFiniteError(
                f"After step {self.state.step} embeddings are NaN or infinite, so no model is exported. "
                f"{self.remedies()} The checkpoints before it are whole."
            )

    def remedies(self) -> str:
        train, loss = self.parts.config.train, self.parts.config.loss
        return (
            f"Lower train.learning_rate ({train.learning_rate}), raise loss.temperature ({loss.temperature}), or set "
            "train.precision to fp32."
        )


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where none does.

    Sums are looked at first, as they read each value once; their device is waited for once.
    """
    named = [(name, tensor.detach()) for name, tensor in tensors]
    if not named or bool(torch.stack([tensor.sum().isfinite() for _, tensor in named]).all()):
        return None
    # A sum of large finite values may overflow.
    return next((name for name, tensor in named if not bool(tensor.isfinite().all())), None)
