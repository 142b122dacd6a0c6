"""What clusters add to the loss of a batch: hard negatives, and which batch mates may be false negatives.

:class:`CentroidNegatives` follows the batches, as in the paper; ``training/corpus_clusters.py`` draws sentences of the
corpus. The objective sees only :class:`HardNegatives`.

Shape suffixes: B rows of the global batch, b rows of a block of it, D width, K clusters, H hard negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix, nearest_two
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import LossConfig
from clusterns_ray.losses import Clusters, false_negative_mask, hard_negative_logits

OfRows = Callable[[slice, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


class BatchNegatives(NamedTuple):
    """Terms for the loss of a batch, and figures for the log; the same on every worker."""

    of_rows: OfRows
    """of a block of rows, their ``cos(z1_i, z2_j)`` (b x B) and the columns of their positives (b): the logits of the
    hard negatives in the denominator of each row (b x H), with gradients, and which columns are its false negatives (b
    x B, bool); None where the loss has no use for them"""
    pairs: Tensor | float
    """how many false negatives the batch has; read by ``bml_reduction: false_negatives`` alone"""
    counts_K: Tensor
    """rows of the batch in each cluster"""
    hard_negative_cosine: Tensor
    """the mean cosine between rows and their hard negatives"""
    false_negatives: Tensor | None = None
    """the number of false negatives, where the clusters alone do not determine it"""


class HardNegatives(Protocol):
    """A source of hard negatives, equal on every worker; all workers call it together."""

    clustering: Clustering

    def start_if_due(self, mean_cosine: Tensor, z1_BD: Tensor, z2_BD: Tensor) -> None:
        """Create the centroids in the first step whose mean cosine is low enough.

        Args:
            mean_cosine: of both views of the global batch, the same on every worker.
            z1_BD, z2_BD: without gradient.
        """
        ...

    def of_batch(self, z1_BD: Tensor, z2_BD: Tensor, rows_B: np.ndarray) -> BatchNegatives:
        """The terms of one batch, once clustering has started.

        Args:
            z1_BD: first view; gradients flow through the logits.
            rows_B: the numbers of the rows in the corpus.
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

    def start_if_due(self, mean_cosine: Tensor, z1_BD: Tensor, z2_BD: Tensor) -> None:
        if not self.clustering.should_start(mean_cosine, len(z1_BD)):
            return
        if self.initial_centroids is not None:
            self.clustering.set_centroids(self.initial_centroids())
        else:
            self.clustering.create_from_batch(z1_BD, z2_BD, self.first_centroid)

    def of_batch(self, z1_BD: Tensor, z2_BD: Tensor, rows_B: np.ndarray) -> BatchNegatives:
        """The centroids move first; all terms are taken from the moved ones."""
        loss = self.loss
        counts_K = self.clustering.update(z1_BD.detach())
        assert self.clustering.centroids_KD is not None
        cos_BK = cosine_matrix(z1_BD, self.clustering.centroids_KD)
        nearest_B, second_B = nearest_two(cos_BK.detach())
        hard_counts_K, sizes_K = (cluster_sizes(each_B, cos_BK.shape[1]) for each_B in (second_B, nearest_B))

        def of_rows(rows: slice, cos_bB: Tensor, positive_b: Tensor) -> tuple[Tensor | None, Tensor | None]:
            logits_bK = mask_bB = None
            if loss.hard_negatives:
                clusters = Clusters(nearest_B[rows], second_B[rows], nearest_B, hard_counts_K)
                columns, weight = loss.hard_negative_columns, loss.hard_negative_weight
                logits_bK = hard_negative_logits(cos_BK[rows], clusters, loss.temperature, columns, weight)
            if loss.bml_weight:
                mask_bB = false_negative_mask(nearest_B[rows], nearest_B, positive_b)
            return logits_bK, mask_bB

        pairs = (sizes_K * (sizes_K - 1)).sum()
        own_B = cos_BK.detach().gather(1, second_B[:, None])
        return BatchNegatives(of_rows, pairs, counts_K, own_B.mean())
