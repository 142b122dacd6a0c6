"""What clusters add to the loss of a batch: hard negatives, and which batch mates may be false negatives.

:class:`CentroidNegatives` follows the batches, as in the paper; ``training/corpus_clusters.py`` draws sentences of the
corpus. The objective sees only :class:`HardNegatives`.

Shape suffixes: B rows of the global batch, b rows of this worker, D width, K clusters, H hard negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix, nearest_two
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import LossConfig
from clusterns_ray.losses import Clusters, false_negative_mask, hard_negative_logits
from clusterns_ray.training.batch_layout import BatchLayout


class StepNegatives(NamedTuple):
    """Terms for the loss of this worker's rows, and figures for the log."""

    hard_logits_bH: Tensor | None
    """logits of the hard negatives in the denominator of each row; None where the loss has none"""
    mask_bB: Tensor | None
    """bool, which columns are false negatives of each row; None where the loss has no use for them"""
    pairs: Tensor | float
    """how many false negatives the global batch has; read by ``bml_reduction: false_negatives`` alone"""
    counts_K: Tensor
    """rows of the global batch in each cluster"""
    hard_negative_cosine: Tensor
    """this worker's share of the mean cosine between rows and their hard negatives"""
    false_negatives: Tensor | None = None
    """this worker's share of the number of false negatives, where the clusters alone do not determine it"""


class HardNegatives(Protocol):
    """A source of hard negatives, equal on every worker; all workers call it together."""

    clustering: Clustering

    def start_if_due(self, mean_cosine: Tensor, z1_bD: Tensor, z2_BD: Tensor, layout: BatchLayout) -> None:
        """Create the centroids in the first step whose mean cosine is low enough.

        Args:
            mean_cosine: of both views of the global batch, the same on every worker.
        """
        ...

    def of_batch(self, z1_bD: Tensor, cos_bB: Tensor, positive_b: Tensor, layout: BatchLayout) -> StepNegatives:
        """The terms of one batch, once clustering has started.

        Args:
            z1_bD: first view of this worker's rows; gradients flow through the logits.
            cos_bB: ``cos(z1_i, z2_j)``, local rows against all columns.
            positive_b: int64 column of each row's positive.
        """
        ...


class CentroidNegatives:
    """Centroids that follow the batches (``scope: batch``): a row's hard negative is the second nearest one."""

    def __init__(
        self,
        loss: LossConfig,
        clustering: Clustering,
        first_centroid: int,
        initial_centroids: Callable[[], Tensor] | None = None,
    ) -> None:
        """
        Args:
            first_centroid: where the chain of first centroids begins, a number taken modulo the batch's rows.
            initial_centroids: makes them otherwise, on all workers together, in place of the chain.
        """
        self.loss, self.clustering = loss, clustering
        self.first_centroid, self.initial_centroids = first_centroid, initial_centroids

    def start_if_due(self, mean_cosine: Tensor, z1_bD: Tensor, z2_BD: Tensor, layout: BatchLayout) -> None:
        if not self.clustering.should_start(mean_cosine, layout.size):
            return
        if self.initial_centroids is not None:
            self.clustering.set_centroids(self.initial_centroids())
        else:
            z1_BD = layout.gather(z1_bD.detach())
            self.clustering.create_from_batch(z1_BD, z2_BD.detach(), self.first_centroid)

    def of_batch(self, z1_bD: Tensor, cos_bB: Tensor, positive_b: Tensor, layout: BatchLayout) -> StepNegatives:
        """The centroids move first; all terms are taken from the moved ones."""
        counts_K = self.clustering.update(z1_bD.detach())
        assert self.clustering.centroids_KD is not None
        cos_bK = cosine_matrix(z1_bD, self.clustering.centroids_KD)
        nearest_b, second_b = nearest_two(cos_bK.detach())
        nearest_B, second_B = layout.gather(torch.stack([nearest_b, second_b], dim=1)).unbind(dim=1)
        clusters = Clusters(nearest_b, second_b, nearest_B, cluster_sizes(second_B, cos_bK.shape[1]))
        logits_bK = mask_bB = None
        pairs = torch.zeros_like(counts_K[0])
        if self.loss.hard_negatives:
            columns, weight = self.loss.hard_negative_columns, self.loss.hard_negative_weight
            logits_bK = hard_negative_logits(cos_bK, clusters, self.loss.temperature, columns, weight)
        if self.loss.bml_weight:
            mask_bB = false_negative_mask(nearest_b, nearest_B, positive_b)
            sizes_K = cluster_sizes(nearest_B, cos_bK.shape[1])
            pairs = (sizes_K * (sizes_K - 1)).sum()
        own_b = cos_bK.detach().gather(1, second_b[:, None])
        return StepNegatives(logits_bK, mask_bB, pairs, counts_K, own_b.sum() / layout.size)
