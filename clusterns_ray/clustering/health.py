"""How the clusters fare over a run: what the loss has no use for, and a person wants to see.

Shape suffixes: D width, K clusters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterns_ray.clustering.kmeans import COSINE_EPS

EMPTY_AFTER = 50
"""A cluster without a sentence for this many steps counts as empty."""


class ClusterHealth:
    """Sizes, idleness and drift of the clusters, equal on every worker; begins when clustering does."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """
        Args:
            device: that of the centroids.
        """
        self.device = device
        self.steps = 0
        """observed since clustering started"""
        self.idle_K: Tensor | None = None
        """int64, steps since each cluster last had a sentence, or since clustering started"""
        self.sizes_K: Tensor | None = None
        """int64, sentences in each cluster since the last :meth:`take`"""
        self.before_KD: Tensor | None = None
        """centroids at the last :meth:`take`"""

    def observe(self, centroids_KD: Tensor | None, counts_K: Tensor | None) -> None:
        """See one step: the centroids (None before they are there) and the rows that each cluster got, if any.

        Does not wait for the device.
        """
        if centroids_KD is None:
            return
        if self.before_KD is None:
            self.before_KD = centroids_KD.clone()
            self.idle_K = torch.zeros(len(centroids_KD), dtype=torch.int64, device=centroids_KD.device)
            self.sizes_K = torch.zeros_like(self.idle_K)
        if counts_K is None:
            return
        assert self.idle_K is not None and self.sizes_K is not None
        self.steps += 1
        counts_K = counts_K.to(torch.int64)
        self.idle_K = torch.where(counts_K > 0, 0, self.idle_K + 1)
        self.sizes_K += counts_K

    def empty(self) -> int:
        """Clusters without a sentence for ``EMPTY_AFTER`` steps (or ever, while fewer have passed)."""
        if self.idle_K is None or not self.steps:
            return 0
        return int((self.idle_K >= min(EMPTY_AFTER, self.steps)).sum())

    def take(self, centroids_KD: Tensor) -> dict[str, Any]:
        """``cluster_sizes``, sentences in each cluster since the last call, and ``centroid_drift``, the mean over
        centroids of 1 - cos(now, at the last call); begins anew."""
        assert self.sizes_K is not None and self.before_KD is not None
        drift_K = 1 - F.cosine_similarity(centroids_KD, self.before_KD, dim=1, eps=COSINE_EPS)
        sizes = self.sizes_K.cpu().numpy().tolist()
        seen = {"cluster_sizes": sizes, "centroid_drift": max(float(drift_K.mean()), 0.0)}
        self.sizes_K, self.before_KD = torch.zeros_like(self.sizes_K), centroids_KD.clone()
        return seen

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "idle_K": self.idle_K, "sizes_K": self.sizes_K, "before_KD": self.before_KD}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name in ("idle_K", "sizes_K", "before_KD"):
            setattr(self, name, None if state[name] is None else state[name].to(self.device))
