"""The K-means of ClusterNS as pure functions: tensors in, tensors out.

Shape suffixes: B rows (of a batch, or a worker's share of it), D embedding width, K clusters.
Source: Deng et al., "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation",
Findings of ACL 2023, section 3.2, and the authors' implementation where the text is silent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterns_ray.errors import ConfigError

UpdateRule = Literal["mean", "sum", "replace_sum"]
COSINE_EPS = 1e-8


def cosine_matrix(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Cosines of every row of ``a`` with every row of ``b`` (N x M), each norm floored at 1e-8."""
    return F.normalize(a_ND, dim=-1, eps=COSINE_EPS) @ F.normalize(b_MD, dim=-1, eps=COSINE_EPS).T


def mean_of_cosines(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """The mean of :func:`cosine_matrix`, a scalar, which the sums of the rows' directions determine."""
    sums_D = [F.normalize(z_ND, dim=-1, eps=COSINE_EPS).sum(dim=0) for z_ND in (a_ND, b_MD)]
    return sums_D[0] @ sums_D[1] / (len(a_ND) * len(b_MD))


def farthest_chain(cos_BB: Tensor, k: int, first: int) -> Tensor:
    """Choose ``k`` rows, each the not-yet-chosen column with the smallest cosine to the *last* chosen row.

    Args:
        cos_BB: ``cos(z1_i, z2_j)``, row i against column j.
        k: how many rows, at most B.
        first: row number to begin with.

    Returns:
        ``order_K``: int64 row numbers, in the order chosen.
    """
    return farthest_chain_by_row(lambda row: cos_BB[row], len(cos_BB), k, first)


def farthest_chain_by_row(cosine_row: Callable[[Tensor], Tensor], n: int, k: int, first: int) -> Tensor:
    """:func:`farthest_chain` where ``cosine_row(i)`` makes row i (n) when it is needed, so that no
    B x B matrix has to exist. ``i`` is a 0-d int64 tensor: nothing leaves the device."""
    if not 0 < k <= n:
        raise ConfigError(
            f"farthest_chain: {k} centroids asked from a batch of {n} rows, and each is a row of its own. "
            f"Set clustering.num_clusters to at most {n} or raise train.global_batch_size."
        )
    last = torch.as_tensor(first, dtype=torch.int64)
    row = cosine_row(last)
    order_K = torch.empty(k, dtype=torch.int64, device=row.device)
    taken_B = torch.zeros(n, dtype=torch.bool, device=row.device)
    last = last.to(row.device)
    for position in range(k):
        order_K[position] = last
        taken_B[last] = True
        if position + 1 < k:
            last = cosine_row(last).masked_fill(taken_B, torch.inf).argmin()
    return order_K


def assign(z_BD: Tensor, centroids_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest and second nearest centroid of each row by cosine.

    Returns:
        ``(nearest_B, second_B)``, int64. With a single centroid there is no second one: ConfigError.
    """
    return nearest_two(cosine_matrix(z_BD, centroids_KD))


def nearest_two(cos_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Columns with the largest and second largest cosine in each row; of equal ones the first."""
    if cos_BK.shape[1] < 2:
        raise ConfigError(
            f"assign: {cos_BK.shape[1]} centroid has no second nearest, which is the hard negative. "
            "Set clustering.num_clusters to 2 or more, or to 0 for no clustering."
        )
    nearest_B = cos_BK.argmax(dim=1)
    second_B = cos_BK.scatter(1, nearest_B[:, None], -torch.inf).argmax(dim=1)
    return nearest_B, second_B


def cluster_sizes(assigned_B: Tensor, k: int) -> Tensor:
    """How many rows are assigned to each of ``k`` centroids: int64 (K). Unlike ``bincount``, never waits for a GPU."""
    return assigned_B.new_zeros(k).scatter_add_(0, assigned_B, torch.ones_like(assigned_B))


def member_statistics(z_BD: Tensor, nearest_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum and number of the rows of each cluster: ``(sums_KD, counts_K)``, both in the dtype of ``z``.

    ``z`` is float32 or float64: a narrower type cannot count. Sums are a product with the one-hot matrix of the
    assignment, as a GPU adds at an index in any order, and each order rounds differently.
    """
    members_KB = (nearest_B == torch.arange(k, device=nearest_B.device)[:, None]).to(z_BD.dtype)
    return members_KB @ z_BD, members_KB.sum(dim=1)


def update_centroids(centroids_KD: Tensor, sums_KD: Tensor, counts_K: Tensor, rate: float, rule: UpdateRule) -> Tensor:
    """Centroids after one batch; an empty cluster keeps its own.

    ``mean``: ``c <- (1 - rate) c + rate * mean(members)``, whose pull does not depend on the batch size.
    ``sum``: the same with the sum in place of the mean (the authors' code and published settings).
    ``replace_sum``: ``c <- sum(members)``.
    """
    if rule == "mean":
        moved_KD = (1 - rate) * centroids_KD + rate * sums_KD / counts_K.clamp(min=1)[:, None]
    elif rule == "sum":
        moved_KD = (1 - rate) * centroids_KD + rate * sums_KD
    elif rule == "replace_sum":
        moved_KD = sums_KD
    else:
        raise ConfigError(f"clustering.update is {rule!r}; it must be mean, sum or replace_sum.")
    return torch.where((counts_K > 0)[:, None], moved_KD, centroids_KD)
