"""Whether one model is better than another, or only luckier with the test: the paired bootstrap.

Both models are scored on the same resampled test, many times; the interval holds the middle 95 % of the differences
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993: the percentile interval). Paired, as what is hard for one
model is mostly hard for the other, and cancels. The interval is about the test's items, not about training anew.

Shape suffixes: N items of a test, R resamples, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clusterns_ray.evaluation.sts import StsTests

RESAMPLES = 2000
LEVEL = 0.95
BLOCK = 1 << 20
"""Counts that are in memory at a time, about."""

Difference = Callable[[np.ndarray], np.ndarray]
"""Counts (R, N) of how often each item was drawn -> differences of the two models' scores (R)."""


def paired_bootstrap(
    difference: Difference, sizes: Sequence[int], *, seed: int, resamples: int = RESAMPLES
) -> np.ndarray:
    """Differences on resampled tests: float64 (R).

    Args:
        difference: of two models' scores; given the same counts, so that both see the same items.
        sizes: items of each subset of the test, which are drawn within their subset; they are N together.
        seed: the result is a function of it.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK // sum(sizes))
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([difference(_draw(rng, sizes, block)) for block in blocks])


def _draw(rng: np.random.Generator, sizes: Sequence[int], resamples: int) -> np.ndarray:
    """Counts of each item in each resample: float64 (R, N), rows of each subset summing to its size."""
    parts = []
    for size in sizes:
        drawn = rng.integers(0, size, (resamples, size)) + size * np.arange(resamples)[:, None]
        parts.append(np.bincount(drawn.ravel(), minlength=resamples * size).reshape(resamples, size))
    return np.concatenate(parts, axis=1).astype(np.float64)


def interval(difference: float, differences_R: np.ndarray) -> dict[str, Any]:
    """``difference`` with the ``low`` and ``high`` end of its 95 % interval; ``inside_noise`` where that holds 0."""
    low, high = np.quantile(differences_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {
        "difference": float(difference),
        "low": float(low),
        "high": float(high),
        "inside_noise": bool(low <= 0 <= high),
    }


def fall_text(name: str, also: dict[str, float], when: str, dev: str) -> str:
    """A warning that a set which selects nothing fell, and by how much."""
    return (
        f"{name} fell from {also['before']:.2f} to {also['after']:.2f} {when} (95 % interval of the difference "
        f"{also['low']:.2f} to {also['high']:.2f}), whatever {dev} says: what is learnt may be good for {dev} alone. "
        "Try another data.positives, a loss.teacher or a lower train.learning_rate, or judge by your own task."
    )


class CountedRanks:
    """Average ranks of values, each of which may count several times or not at all."""

    def __init__(self, values_N: np.ndarray) -> None:
        _, self.group_N = np.unique(values_N, return_inverse=True)
        self.order_N = np.argsort(self.group_N, kind="stable")
        self.starts = np.flatnonzero(np.diff(self.group_N[self.order_N], prepend=-1))

    def __call__(self, counts_RN: np.ndarray) -> np.ndarray:
        """Ranks (R, N) in each resample, minus their mean; exact, ties and repeated items included.

        Equal values share the mean of the ranks that they take up: those before them, and half of their own.
        """
        total_RG = np.add.reduceat(counts_RN[:, self.order_N], self.starts, axis=1)
        ranks_RG = np.cumsum(total_RG, axis=1) - (total_RG - 1) / 2
        return ranks_RG[:, self.group_N] - (counts_RN.sum(axis=1, keepdims=True) + 1) / 2


def spearman_difference(a_N: np.ndarray, b_N: np.ndarray, gold_N: np.ndarray) -> Difference:
    """Spearman x 100 of ``a`` with ``gold``, minus that of ``b``, in each resample."""
    ranks_a, ranks_b, ranks_gold = CountedRanks(a_N), CountedRanks(b_N), CountedRanks(gold_N)

    def difference(counts_RN: np.ndarray) -> np.ndarray:
        weighted = counts_RN * (gold := ranks_gold(counts_RN))
        own = np.einsum("rn,rn->r", weighted, gold)

        def spearman(ranks: np.ndarray) -> np.ndarray:
            norm = np.sqrt(np.einsum("rn,rn,rn->r", counts_RN, ranks, ranks) * own)
            # A resample may happen to hold one grade only, or equal cosines only: no correlation
            return np.einsum("rn,rn->r", weighted, ranks) / np.where(norm > 0, norm, 1)

        return 100 * (spearman(ranks_a(counts_RN)) - spearman(ranks_b(counts_RN)))

    return difference


def compare_sts(
    tests: StsTests,
    a: dict[str, np.ndarray] | Sequence[dict[str, np.ndarray]],
    b: dict[str, np.ndarray] | Sequence[dict[str, np.ndarray]],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Spearman "all" of model a minus that of model b, over pairs drawn within their subsets.

    Args:
        a, b: cosines of the two models by subset, as ``cosines_of`` gives them; of several models (one configuration
            trained with several seeds) the mean of their scores is compared.

    Returns:
        :func:`interval` of each task and further subset, and ``average`` where all seven are there.
    """
    intervals: dict[str, Any] = {}
    point, spread = [], []
    sides = [[side] if isinstance(side, dict) else list(side) for side in (a, b)]
    named = {**tests.tasks, **{pairs.name: [pairs] for pairs in tests.extra}}
    for number, (name, parts) in enumerate(named.items()):
        gold = np.concatenate([pairs.scores for pairs in parts])
        first, second = (
            [np.concatenate([cosines[pairs.name] for pairs in parts]) for cosines in models] for models in sides
        )
        difference = _mean_of([spearman_difference(x, y, gold) for x in first for y in second])
        sizes = [len(pairs) for pairs in parts]
        differences_R = paired_bootstrap(difference, sizes, seed=seed + number, resamples=resamples)
        whole = float(difference(np.ones((1, len(gold))))[0])
        intervals[name] = interval(whole, differences_R)
        if name in tests.tasks:
            point.append(whole)
            spread.append(differences_R)
    if not tests.missing:  # tasks are drawn apart, so their differences average resample by resample
        intervals["average"] = interval(float(np.mean(point)), np.mean(spread, axis=0))
    return intervals


def _mean_of(differences: Sequence[Difference]) -> Difference:
    return lambda counts_RN: np.mean([difference(counts_RN) for difference in differences], axis=0)


def compare_right(
    a: dict[str, np.ndarray], b: dict[str, np.ndarray], *, seed: int, average: bool = False
) -> dict[str, Any]:
    """Accuracy x 100 of model a minus that of model b on each test, over test rows and over seeds.

    Rows are drawn in pairs. Seeds of K-means mean nothing across models, so each model's are drawn on their own; the
    matching of clusters with labels stays as it is.

    Args:
        a, b: by test, which rows were right: bool (N), or (S, N) of several seeds.
        average: also of the mean over all tests.

    Returns:
        :func:`interval` of each test.
    """
    intervals: dict[str, Any] = {}
    point, spread = [], []
    for number, name in enumerate(a):
        first_SN, second_SN = (np.atleast_2d(side[name]).astype(np.float64) for side in (a, b))
        difference = _right_difference(first_SN, second_SN, np.random.default_rng([seed + number, 1]))
        spread.append(paired_bootstrap(difference, [first_SN.shape[1]], seed=seed + number))
        point.append(100 * (first_SN.mean() - second_SN.mean()))
        intervals[name] = interval(point[-1], spread[-1])
    if average:
        intervals["average"] = interval(float(np.mean(point)), np.mean(spread, axis=0))
    return intervals


def _right_difference(first_SN: np.ndarray, second_SN: np.ndarray, rng: np.random.Generator) -> Difference:
    def accuracy(right_SN: np.ndarray, counts_RN: np.ndarray) -> np.ndarray:
        seeds_RS = _draw(rng, [len(right_SN)], len(counts_RN))
        return 100 * (counts_RN @ right_SN.T * seeds_RS).sum(axis=1) / right_SN.size

    return lambda counts_RN: accuracy(first_SN, counts_RN) - accuracy(second_SN, counts_RN)
