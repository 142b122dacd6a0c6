"""The centroids of a run and the gate that starts them; equal on every worker, whole in a checkpoint.

Shape suffixes: B rows of the global batch, D width, K clusters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterns_ray import distributed
from clusterns_ray.clustering.kmeans import (
    COSINE_EPS,
    UpdateRule,
    assign,
    farthest_chain_by_row,
    member_statistics,
    update_centroids,
)


class Clustering:
    """``centroids_KD`` in float32, or None until the gate opens."""

    def __init__(
        self,
        num_clusters: int,
        start_cosine: float,
        rate: float,
        update: UpdateRule,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            device: where the centroids of a checkpoint are loaded to; new ones are on the device of the embeddings.
        """
        self.num_clusters = num_clusters
        self.start_cosine = start_cosine
        self.rate = rate
        self.rule: UpdateRule = update
        self.device = device
        self.centroids_KD: Tensor | None = None

    @property
    def started(self) -> bool:
        return self.centroids_KD is not None

    def should_start(self, mean_cosine: Tensor, rows: int) -> bool:
        """Whether this step creates the centroids. Reads one number from the device, until clustering has started."""
        if self.started or not 0 < self.num_clusters <= rows:
            return False
        return bool(mean_cosine <= self.start_cosine)

    @torch.no_grad()
    def create_from_batch(self, z1_BD: Tensor, z2_BD: Tensor, first: int) -> None:
        """First centroids: a chain of far rows of one global batch (see ``farthest_chain``), raw z1."""
        n1_BD = F.normalize(z1_BD.float(), dim=-1, eps=COSINE_EPS)
        n2_BD = F.normalize(z2_BD.float(), dim=-1, eps=COSINE_EPS)
        order_K = farthest_chain_by_row(
            lambda row: n2_BD @ n1_BD[row], len(z1_BD), self.num_clusters, first % len(z1_BD)
        )
        self.set_centroids(z1_BD[order_K.to(z1_BD.device)])

    def set_centroids(self, centroids_KD: Tensor) -> None:
        """Worker 0's centroids become everybody's: a near tie may be seen otherwise by another machine."""
        self.centroids_KD = distributed.broadcast(centroids_KD.detach().float().clone().contiguous())

    @torch.no_grad()
    def update(self, z1_BD: Tensor) -> Tensor:
        """Move the centroids by the whole batch, which every worker has. A batch that is not finite moves nothing.

        Worker 0's centroids become everybody's, K x D float32 numbers, so that they are equal on unequal machines too.

        Returns:
            ``counts_K``: float32, rows of the global batch in each cluster.
        """
        assert self.centroids_KD is not None
        nearest_B, _ = assign(z1_BD.float(), self.centroids_KD)
        sums_KD, counts_K = member_statistics(z1_BD.float(), nearest_B, self.num_clusters)
        moved_KD = update_centroids(self.centroids_KD, sums_KD, counts_K, self.rate, self.rule)
        self.centroids_KD = distributed.broadcast(
            torch.where(sums_KD.isfinite().all(), moved_KD, self.centroids_KD).contiguous()
        )
        return counts_K

    def state_dict(self) -> dict[str, Any]:
        return {"centroids_KD": self.centroids_KD}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        centroids_KD = state["centroids_KD"]
        self.centroids_KD = None if centroids_KD is None else centroids_KD.to(self.device)
