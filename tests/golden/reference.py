"""The formulas of ClusterNS in float64, written to be read and not to be fast.

Deng et al., "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation",
Findings of ACL 2023.

Everything the package computes with matrices is written here as loops over rows, and nothing here is shared
with the package, so that the two can only agree by both being right. The one exception is `torch_loss`: the
same loss through torch.float64, with the authors' B x B columns of hard negatives spelled out, so that
autograd gives the gradients. It is checked against finite differences of the loops (`finite_differences`).

B rows of the global batch, D width, K clusters. z1, z2: [B, D]; centroids: [K, D].
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

EPS = 1e-8
RULES = ("mean", "sum", "replace_sum")
COLUMNS = ("batch", "own", "not_own_cluster")
REDUCTIONS = ("all_pairs", "false_negatives")


@dataclass(frozen=True)
class LossSettings:
    temperature: float
    hard_negatives: bool = True
    hard_negative_columns: str = "batch"
    hard_negative_weight: float = 0.0
    bml_weight: float = 0.0
    bml_alpha: float = 0.0
    bml_beta: float = 0.0
    bml_reduction: str = "all_pairs"


@dataclass(frozen=True)
class Losses:
    loss: float
    info_nce: float
    bml: float


@dataclass(frozen=True)
class Step:
    """One training step after the clustering has started."""

    centroids: np.ndarray
    nearest: list[int]  # of each row, among the updated centroids
    second: list[int]
    losses: Losses
    grad_z1: np.ndarray
    grad_z2: np.ndarray


# --- cosines ------------------------------------------------------------------------------------------------


def cos(a, b) -> float:
    norm_a = max(math.sqrt(sum(x * x for x in a)), EPS)
    norm_b = max(math.sqrt(sum(x * x for x in b)), EPS)
    return sum((x / norm_a) * (y / norm_b) for x, y in zip(a, b, strict=True))


def cosines(rows, columns) -> np.ndarray:
    return np.array([[cos(a, b) for b in columns] for a in rows], dtype=np.float64)


def relu(x: float) -> float:
    return x if x > 0 else 0.0


# --- clustering ---------------------------------------------------------------------------------------------


def farthest_chain(cos_BB, k: int, first: int) -> list[int]:
    """Each next row is the not yet chosen column that is smallest in the row of the last chosen one."""
    order = [first]
    while len(order) < k:
        last = order[-1]
        best = None
        for column in range(len(cos_BB)):
            if column in order:
                continue
            if best is None or cos_BB[last][column] < cos_BB[last][best]:
                best = column
        if best is None:
            raise ValueError(f"{k} centroids from {len(cos_BB)} rows")
        order.append(best)
    return order


def assign(z, centroids) -> tuple[list[int], list[int]]:
    nearest, second = [], []
    for row in z:
        by_cosine = sorted(range(len(centroids)), key=lambda k: -cos(row, centroids[k]))
        nearest.append(by_cosine[0])
        second.append(by_cosine[1])
    return nearest, second


def member_statistics(z, nearest, k: int) -> tuple[np.ndarray, np.ndarray]:
    sums, counts = np.zeros((k, len(z[0]))), np.zeros(k)
    for i, cluster in enumerate(nearest):
        for d in range(len(z[i])):
            sums[cluster, d] += z[i][d]
        counts[cluster] += 1
    return sums, counts


def update_centroids(centroids, sums, counts, rate: float, rule: str) -> np.ndarray:
    updated = np.array(centroids, dtype=np.float64)
    for k in range(len(centroids)):
        if counts[k] == 0:
            continue
        for d in range(len(centroids[k])):
            if rule == "mean":
                updated[k, d] = (1 - rate) * centroids[k][d] + rate * sums[k][d] / counts[k]
            elif rule == "sum":
                updated[k, d] = (1 - rate) * centroids[k][d] + rate * sums[k][d]
            elif rule == "replace_sum":
                updated[k, d] = sums[k][d]
            else:
                raise ValueError(rule)
    return updated


# --- losses -------------------------------------------------------------------------------------------------


def info_nce(z1, z2, temperature: float) -> float:
    total = 0.0
    for i in range(len(z1)):
        positive = math.exp(cos(z1[i], z2[i]) / temperature)
        denominator = 0.0
        for j in range(len(z2)):
            denominator += math.exp(cos(z1[i], z2[j]) / temperature)
        total += -math.log(positive / denominator)
    return total / len(z1)


def info_nce_with_hard_negatives(z1, z2, centroids, temperature: float, columns: str, weight: float) -> float:
    nearest, second = assign(z1, centroids)
    total = 0.0
    for i in range(len(z1)):
        positive = math.exp(cos(z1[i], z2[i]) / temperature)
        denominator = 0.0
        for j in range(len(z2)):
            denominator += math.exp(cos(z1[i], z2[j]) / temperature)
        for j in range(len(z1)):  # the hard negative of every row j, as row i sees it
            if columns == "own" and j != i:
                continue
            if columns == "not_own_cluster" and second[j] == nearest[i]:
                continue
            logit = cos(z1[i], centroids[second[j]]) / temperature
            if j == i:
                logit += weight
            denominator += math.exp(logit)
        total += -math.log(positive / denominator)
    return total / len(z1)


def same_cluster_mask(nearest) -> np.ndarray:
    B = len(nearest)
    return np.array([[i != j and nearest[i] == nearest[j] for j in range(B)] for i in range(B)], dtype=bool)


def bidirectional_margin(cos_BB, mask_BB, alpha: float, beta: float, reduction: str) -> float:
    B = len(cos_BB)
    total, pairs = 0.0, 0
    for i in range(B):
        for j in range(B):
            delta = cos_BB[i][j] - cos_BB[i][i]
            if reduction == "all_pairs":  # the authors': delta is multiplied by the mask, the mean is over everything
                delta = delta * (1.0 if mask_BB[i][j] else 0.0)
            elif reduction != "false_negatives":
                raise ValueError(reduction)
            elif not mask_BB[i][j]:
                continue
            total += relu(delta + alpha) + relu(-delta - beta)
            pairs += 1
    return total / pairs if pairs else 0.0


def clusterns_loss(z1, z2, centroids, settings: LossSettings) -> Losses:
    if settings.hard_negatives:
        contrastive = info_nce_with_hard_negatives(
            z1,
            z2,
            centroids,
            settings.temperature,
            settings.hard_negative_columns,
            settings.hard_negative_weight,
        )
    else:
        contrastive = info_nce(z1, z2, settings.temperature)
    nearest, _ = assign(z1, centroids)
    bml = bidirectional_margin(
        cosines(z1, z2),
        same_cluster_mask(nearest),
        settings.bml_alpha,
        settings.bml_beta,
        settings.bml_reduction,
    )
    return Losses(contrastive + settings.bml_weight * bml, contrastive, bml)


# --- gradients ----------------------------------------------------------------------------------------------


def torch_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dots = (a[:, None, :] * b[None, :, :]).sum(-1)
    norm_a = a.square().sum(-1).sqrt().clamp_min(EPS)
    norm_b = b.square().sum(-1).sqrt().clamp_min(EPS)
    return dots / (norm_a[:, None] * norm_b[None, :])


def torch_bidirectional_margin(cos_BB, mask_BB, alpha: float, beta: float, reduction: str) -> torch.Tensor:
    delta = cos_BB - cos_BB.diagonal()[:, None]
    if reduction == "all_pairs":
        delta = delta * mask_BB
        return ((delta + alpha).clamp_min(0) + (-delta - beta).clamp_min(0)).mean()
    if not mask_BB.any():
        return (cos_BB * 0).sum()
    delta = delta[mask_BB]
    return ((delta + alpha).clamp_min(0) + (-delta - beta).clamp_min(0)).mean()


def torch_loss(z1: torch.Tensor, z2: torch.Tensor, centroids: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    centroids = centroids.detach()
    B = len(z1)
    nearest, second = (torch.tensor(rows) for rows in assign(z1.detach().numpy(), centroids.numpy()))
    scores = torch_cosines(z1, z2)
    logits = scores / settings.temperature
    positives = logits.diagonal()
    if settings.hard_negatives:
        hard_BB = torch_cosines(z1, centroids[second]) / settings.temperature  # column j: the hard negative of row j
        hard_BB = hard_BB + settings.hard_negative_weight * torch.eye(B, dtype=torch.float64)
        if settings.hard_negative_columns == "own":
            hard_BB = hard_BB.diagonal()[:, None]
        elif settings.hard_negative_columns == "not_own_cluster":
            hard_BB = hard_BB.masked_fill(second[None, :] == nearest[:, None], -math.inf)
        logits = torch.cat([logits, hard_BB], dim=1)
    contrastive = (logits.logsumexp(dim=1) - positives).mean()
    mask_BB = (nearest[:, None] == nearest[None, :]) & ~torch.eye(B, dtype=torch.bool)
    bml = torch_bidirectional_margin(scores, mask_BB, settings.bml_alpha, settings.bml_beta, settings.bml_reduction)
    return contrastive + settings.bml_weight * bml


def gradients(z1, z2, centroids, settings: LossSettings) -> tuple[np.ndarray, np.ndarray]:
    leaf1 = torch.tensor(np.asarray(z1), dtype=torch.float64, requires_grad=True)
    leaf2 = torch.tensor(np.asarray(z2), dtype=torch.float64, requires_grad=True)
    fixed = torch.tensor(np.asarray(centroids), dtype=torch.float64)
    grad1, grad2 = torch.autograd.grad(torch_loss(leaf1, leaf2, fixed, settings), (leaf1, leaf2))
    return grad1.numpy(), grad2.numpy()


def finite_differences(function, x, h: float = 1e-4) -> np.ndarray:
    """Gradient of `function` at x by central differences of fourth order."""
    x = np.array(x, dtype=np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        values = []
        for step in (-2, -1, 1, 2):
            shifted = x.copy()
            shifted[index] += step * h
            values.append(function(shifted))
        gradient[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
    return gradient


def smallest_gap(z1, z2, centroids, settings: LossSettings) -> float:
    """How far the example is from a tie or a kink, where rounding could change a choice: the nearest, second
    and third centroid of each row must be told apart, and no masked pair may sit on a margin."""
    gaps = [1.0]
    for row in z1:
        scores = sorted((cos(row, c) for c in centroids), reverse=True)
        gaps += [scores[k] - scores[k + 1] for k in range(min(2, len(scores) - 1))]
    mask = same_cluster_mask(assign(z1, centroids)[0])
    for i, j in np.argwhere(mask):
        delta = cos(z1[i], z2[j]) - cos(z1[i], z2[i])
        gaps += [abs(delta + settings.bml_alpha), abs(-delta - settings.bml_beta)]
    return min(gaps)


# --- a step -------------------------------------------------------------------------------------------------


def reference_step(z1, z2, centroids, rate: float, rule: str, settings: LossSettings) -> Step:
    """Move the centroids with this batch's z1, then take hard negatives, mask and loss from those."""
    before, _ = assign(z1, centroids)
    sums, counts = member_statistics(z1, before, len(centroids))
    updated = update_centroids(centroids, sums, counts, rate, rule)
    nearest, second = assign(z1, updated)
    grad_z1, grad_z2 = gradients(z1, z2, updated, settings)
    return Step(updated, nearest, second, clusterns_loss(z1, z2, updated, settings), grad_z1, grad_z2)
