"""The losses of ClusterNS: tensors in, tensors out; no config, no module, no process group.

Shape suffixes: B rows of the global batch, b rows of a block of it, D embedding width, K clusters.
Every term is written for *a block's rows x all columns* (b x B, b x K) as the block's share of the
mean over the batch, so the shares of all blocks add up to the loss of the whole batch. The
functions at the end are the case b = B.

Source: Deng et al., "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation",
Findings of ACL 2023, equations 2 to 6, and the authors' implementation where the text is silent.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix, nearest_two
from clusterns_ray.errors import ConfigError

HardNegativeColumns = Literal["batch", "own", "not_own_cluster"]
BMLReduction = Literal["all_pairs", "false_negatives"]


BLOCK = 2**22
"""Scores of a batch that are held at a time, 16 MiB of each matrix: more rows go through the loss in blocks."""


class ClusterNSLoss(NamedTuple):
    """``loss = info_nce + bml_weight * bml``; all are scalars with gradients."""

    loss: Tensor
    info_nce: Tensor
    """InfoNCE, with the hard negatives in its denominator where they are on."""
    bml: Tensor
    """Bidirectional Margin Loss before its weight; 0 where the weight is 0."""


class Clusters(NamedTuple):
    """Which clusters the rows of a batch belong to."""

    nearest_b: Tensor
    """int64, cluster of each row of the block"""
    second_b: Tensor
    """int64, second nearest centroid of each row of the block: its hard negative"""
    nearest_B: Tensor
    """int64, cluster of every row of the global batch"""
    hard_counts_K: Tensor
    """how many rows of the global batch have each centroid as their hard negative"""


class BankNegatives(NamedTuple):
    """Sentences of the corpus drawn as hard negatives: n of them, M for each row of the global batch."""

    nearest_b: Tensor
    """int64, cluster of each row of the block"""
    nearest_B: Tensor
    """int64, cluster of every row of the global batch"""
    own_b: Tensor
    """int64, place of each row of the block in the bank, -1 where it has none"""
    z_nD: Tensor
    """their stored embeddings, without gradient"""
    slot_n: Tensor
    """int64, their places in the bank; -1 where there is none after all"""
    row_n: Tensor
    """int64, the row of the global batch that each was drawn for"""
    cluster_n: Tensor
    """int64, the cluster of each"""


def row_blocks(batch: int) -> list[slice]:
    """The rows of a batch in blocks of at most ``BLOCK`` scores, one row at least; a function of its size alone."""
    size = max(BLOCK // batch, 1)
    return [slice(first, min(first + size, batch)) for first in range(0, batch, size)]


def info_nce_share(
    cos_bB: Tensor, positive_b: Tensor, temperature: float, hard_logits_bK: Tensor | None = None
) -> Tensor:
    """A block's share of InfoNCE: the sum of its rows' losses over the number of global rows.

    Args:
        cos_bB: ``cos(z1_i, z2_j)``, a block's rows against all columns.
        positive_b: int64 column of each row's positive.
        hard_logits_bK: further logits for the denominator, already divided by the temperature.
    """
    logits_bB = cos_bB / temperature
    positive_logit_b = logits_bB.gather(1, positive_b[:, None]).squeeze(1)
    if hard_logits_bK is None:
        denominator_b = torch.logsumexp(logits_bB, dim=1)
    else:
        denominator_b = torch.logsumexp(torch.cat([logits_bB, hard_logits_bK], dim=1), dim=1)
    return (denominator_b - positive_logit_b).sum() / cos_bB.shape[1]


def hard_negative_logits(
    cos_bK: Tensor, clusters: Clusters, temperature: float, columns: HardNegativeColumns, weight: float
) -> Tensor:
    """Logits (b x K) of the hard negatives in the denominator of each row.

    The authors' denominator holds the hard negative of *every* row j, ``sum_j exp(cos(z1_i, c_hn(j)) / t)``.
    Those are only K different vectors, so it equals ``sum_k n_k exp(cos(z1_i, c_k) / t)`` with n_k the number of
    rows whose hard negative is k: ``log n_k`` is added to the logit of centroid k, exactly.
    ``weight`` is a logit added to row i's own hard negative alone.
    """
    own_bK = torch.zeros_like(cos_bK).scatter_(1, clusters.second_b[:, None], 1.0)
    if columns == "own":
        copies_bK = torch.zeros_like(cos_bK)
        others = 0.0
    else:
        copies_bK = clusters.hard_counts_K.to(cos_bK.dtype).expand_as(cos_bK)
        others = 1.0
        if columns == "not_own_cluster":
            copies_bK = copies_bK.scatter(1, clusters.nearest_b[:, None], 0.0)
        elif columns != "batch":
            raise ConfigError(f"loss.hard_negative_columns is {columns!r}; it must be batch, own or not_own_cluster.")
    # Of the n_k copies of row i's own hard negative, one is its own and carries e^weight.
    copies_bK = (copies_bK - others * own_bK) + math.exp(weight) * own_bK
    return cos_bK / temperature + copies_bK.log()


def bank_negative_logits(
    cos_bn: Tensor,
    positive_b: Tensor,
    negatives: BankNegatives,
    temperature: float,
    columns: HardNegativeColumns,
    weight: float,
) -> Tensor:
    """Logits (b x n) of sentences of the bank in the denominator of each row: ``cos(z1_i, bank_n) / t``, plus
    ``weight`` where n was drawn for row i; -inf for those that row i does not see.

    ``batch``: a row sees those of every row. ``own``: its own. ``not_own_cluster``: all but the sentences of its own
    cluster. It never sees its own sentence, whoever drew it.
    """
    own_bn = negatives.row_n == positive_b[:, None]
    seen_bn = (negatives.slot_n >= 0) & (negatives.slot_n != negatives.own_b[:, None])
    if columns == "own":
        seen_bn = seen_bn & own_bn
    elif columns == "not_own_cluster":
        seen_bn = seen_bn & (negatives.cluster_n != negatives.nearest_b[:, None])
    elif columns != "batch":
        raise ConfigError(f"loss.hard_negative_columns is {columns!r}; it must be batch, own or not_own_cluster.")
    return (cos_bn / temperature + weight * own_bn).masked_fill(~seen_bn, -torch.inf)


def bidirectional_margin_terms(
    cos_bB: Tensor, positive_b: Tensor, mask_bB: Tensor, alpha: float, beta: float
) -> Tensor:
    """``relu(d m + alpha) + relu(-d m - beta)`` with ``d_ij = cos_ij - cos_i,positive``, of each pair (b x B)."""
    gap_bB = (cos_bB - cos_bB.gather(1, positive_b[:, None])) * mask_bB
    return torch.relu(gap_bB + alpha) + torch.relu(-gap_bB - beta)


def bidirectional_margin_share(
    cos_bB: Tensor,
    positive_b: Tensor,
    mask_bB: Tensor,
    pairs: Tensor | float,
    alpha: float,
    beta: float,
    reduction: BMLReduction,
) -> Tensor:
    """A block's share of the Bidirectional Margin Loss.

    Args:
        mask_bB: bool, true where row i and column j are different rows of one cluster.
        pairs: number of true entries in the *global* mask; used by ``false_negatives`` alone.
        reduction: ``all_pairs``, the authors': mean over all B x B entries of ``d m``, so each unmasked entry adds
            the constant ``relu(alpha)``; ``false_negatives``: mean over the masked entries, 0 without any.
    """
    terms_bB = bidirectional_margin_terms(cos_bB, positive_b, mask_bB, alpha, beta)
    if reduction == "all_pairs":
        return terms_bB.sum() / cos_bB.shape[1] ** 2
    if reduction == "false_negatives":
        return (terms_bB * mask_bB).sum() / torch.as_tensor(pairs, device=cos_bB.device).clamp(min=1)
    raise ConfigError(f"loss.bml_reduction is {reduction!r}; it must be all_pairs or false_negatives.")


def false_negative_mask(nearest_b: Tensor, nearest_B: Tensor, positive_b: Tensor) -> Tensor:
    """``m_ij`` (b x B, bool): different rows that share a cluster, and so may mean the same."""
    return (nearest_b[:, None] == nearest_B[None, :]).scatter(1, positive_b[:, None], False)


def clusterns_loss_share(
    cos_bB: Tensor,
    hard_logits_bH: Tensor | None,
    positive_b: Tensor,
    mask_bB: Tensor | None,
    pairs: Tensor | float,
    *,
    temperature: float,
    bml_weight: float,
    bml_alpha: float,
    bml_beta: float,
    bml_reduction: BMLReduction = "all_pairs",
) -> ClusterNSLoss:
    """A block's share of the ClusterNS loss, whatever clusters its terms are of; the shares of all blocks add up
    to the global loss.

    Args:
        cos_bB: ``cos(z1_i, z2_j)``, a block's rows against all columns.
        positive_b: int64 column of each row's positive.
        hard_logits_bH: further logits of the denominator, of centroids or of sentences; None without hard negatives.
        mask_bB: false negatives; see :func:`bidirectional_margin_share`. Not read where ``bml_weight`` is 0.
        pairs: how many false negatives there are in the global batch.
    """
    info_nce = info_nce_share(cos_bB, positive_b, temperature, hard_logits_bH)
    if bml_weight == 0 or mask_bB is None:
        return ClusterNSLoss(info_nce, info_nce, torch.zeros_like(info_nce))
    bml = bidirectional_margin_share(cos_bB, positive_b, mask_bB, pairs, bml_alpha, bml_beta, bml_reduction)
    return ClusterNSLoss(info_nce + bml_weight * bml, info_nce, bml)


def similar_mask(cos_bB: Tensor, nearest_b: Tensor, nearest_B: Tensor, positive_b: Tensor, cosine: float) -> Tensor:
    """``m_ij`` (b x B, bool): different rows that share a cluster, and ``cos(z1_i, z2_j) > cosine``."""
    return false_negative_mask(nearest_b, nearest_B, positive_b) & (cos_bB.detach() > cosine)


def rank_distillation_share(
    cos_bB: Tensor, teacher_cos_bB: Tensor, positive_b: Tensor, temperature: float, teacher_temperature: float
) -> Tensor:
    """A block's share of the distance between two rankings of the batch: for each row the Kullback-Leibler
    divergence of ``softmax_j(cos(z1_i, z2_j) / t)`` from the teacher's ``softmax_j(cos(u_i, u_j) / t_T)``, both over
    the other rows j != i; mean over all rows. 0 where both agree.

    ListNet (Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007), less a constant,
    as distilled in Liu et al., "RankCSE: Unsupervised Sentence Representations Learning via Learning to Rank", ACL
    2023.

    Args:
        teacher_cos_bB: ``cos(u_i, u_j)`` of the teacher's embeddings, without gradient.
    """
    # Finite, as 0 times infinity is no number.
    out, column_b1 = torch.finfo(cos_bB.dtype).min / 2, positive_b[:, None]
    student_bB = (cos_bB / temperature).scatter(1, column_b1, out).log_softmax(dim=1)
    teacher_bB = (teacher_cos_bB / teacher_temperature).scatter(1, column_b1, out).log_softmax(dim=1)
    return F.kl_div(student_bB, teacher_bB, reduction="sum", log_target=True) / cos_bB.shape[1]


# ---- whole batches --------------------------------------------


def info_nce(z1_BD: Tensor, z2_BD: Tensor, temperature: float) -> Tensor:
    """InfoNCE in one direction, z1 -> z2: logits ``cos(z1_i, z2_j) / temperature``, label i, mean over rows."""
    return info_nce_share(cosine_matrix(z1_BD, z2_BD), _diagonal(z1_BD), temperature)


def bidirectional_margin(cos_BB: Tensor, mask_BB: Tensor, alpha: float, beta: float, reduction: BMLReduction) -> Tensor:
    """Bidirectional Margin Loss of a whole batch; see :func:`bidirectional_margin_share`."""
    return bidirectional_margin_share(cos_BB, _diagonal(cos_BB), mask_BB, mask_BB.sum(), alpha, beta, reduction)


def clusterns_loss(
    z1_BD: Tensor,
    z2_BD: Tensor,
    centroids_KD: Tensor,
    *,
    temperature: float,
    hard_negatives: bool = True,
    hard_negative_columns: HardNegativeColumns = "batch",
    hard_negative_weight: float = 0.0,
    bml_weight: float,
    bml_alpha: float,
    bml_beta: float,
    bml_reduction: BMLReduction = "all_pairs",
) -> ClusterNSLoss:
    """The ClusterNS loss of a whole batch against centroids that were already updated with it.

    Gradients reach ``z1`` and ``z2``, never the centroids. float32 or float64.
    """
    cos_BK = cosine_matrix(z1_BD, centroids_KD.detach())
    nearest_B, second_B = nearest_two(cos_BK.detach())
    counts_K = cluster_sizes(second_B, len(centroids_KD))
    clusters = Clusters(nearest_B, second_B, nearest_B, counts_K)
    logits_BK = None
    if hard_negatives:
        logits_BK = hard_negative_logits(cos_BK, clusters, temperature, hard_negative_columns, hard_negative_weight)
    mask_BB = false_negative_mask(nearest_B, nearest_B, _diagonal(z1_BD)) if bml_weight else None
    return clusterns_loss_share(
        cosine_matrix(z1_BD, z2_BD),
        logits_BK,
        _diagonal(z1_BD),
        mask_BB,
        0.0 if mask_BB is None else mask_BB.sum(),
        temperature=temperature,
        bml_weight=bml_weight,
        bml_alpha=bml_alpha,
        bml_beta=bml_beta,
        bml_reduction=bml_reduction,
    )


def _diagonal(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)
