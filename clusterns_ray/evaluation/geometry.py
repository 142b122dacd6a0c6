"""How embeddings lie on the sphere: alignment, uniformity, mean cosine, effective rank.

Every function normalises the rows that it is given, as cosines are what compares sentences, and counts in float64.
What is not defined (no pair, an embedding that is not finite) is NaN.

Shape suffixes: N embeddings, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clusterns_ray.evaluation.sts import Embed, Pairs

BLOCK = 1024
"""Rows of the N x N matrix of cosines that are in memory at a time."""


def alignment(z1_ND: np.ndarray, z2_ND: np.ndarray) -> float:
    """Mean squared distance of unit embeddings of positive pairs, in [0, 4]; small is good.

    Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere, ICML 2020, with exponent 2.
    """
    if not len(z1_ND):
        return float("nan")
    return float(((unit_rows(z1_ND) - unit_rows(z2_ND)) ** 2).sum(axis=1).mean())


def uniformity(z_ND: np.ndarray, t: float = 2) -> float:
    """log of the mean over different rows i < j of exp(-t |z_i - z_j|^2), at most 0; small is good.

    Wang and Isola 2020. Exact; time grows with N squared (3,000 rows of width 384: a quarter of a second), memory
    with N.
    """
    n_ND = unit_rows(z_ND)
    rows = len(n_ND)
    if rows < 2:
        return float("nan")
    total = 0.0
    for start in range(0, rows, BLOCK):
        squared = 2 - 2 * n_ND[start : start + BLOCK] @ n_ND[start:].T
        potential = np.exp(-t * np.maximum(squared, 0))
        total += float(np.triu(potential, 1).sum())  # right of the diagonal: every pair once, none with itself
    return float(np.log(total / (rows * (rows - 1) / 2)))


def mean_cosine(z_ND: np.ndarray) -> float:
    """Mean cosine of different rows, in [-1, 1]; near 1 where all embeddings have collapsed into one direction.

    By the norm of the sum, so in time N x D: |sum z_i|^2 = sum |z_i|^2 + the cosines of all ordered pairs.
    """
    n_ND = unit_rows(z_ND)
    rows = len(n_ND)
    if rows < 2:
        return float("nan")
    return float((np.square(n_ND.sum(axis=0)).sum() - np.square(n_ND).sum()) / (rows * (rows - 1)))


def effective_rank(z_ND: np.ndarray) -> float:
    """exp of the entropy of the singular values, divided by their sum; in [1, min(N, D)].

    Roy and Vetterli, The Effective Rank, EUSIPCO 2007. The rows are not centred, as in that paper: one direction
    common to all embeddings counts, and pulls the figure towards 1.
    """
    n_ND = unit_rows(z_ND)
    if not n_ND.size or not np.isfinite(n_ND).all() or not n_ND.any():
        return float("nan")
    values = np.linalg.svd(n_ND, compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def geometry(pairs: Pairs, embed: Embed) -> dict[str, Any]:
    """All four of one set of graded pairs: alignment over its positive pairs, the rest over its different sentences.

    Positive are pairs graded at 80 % of the highest grade or more (4 of 5, as Gao et al., SimCSE, EMNLP 2021, take
    on STS-B; a sentence with itself counts as a pair like any other).

    Returns:
        ``alignment`` (None without a positive pair), ``alignment_pairs``, ``uniformity``, ``mean_cosine``,
        ``effective_rank``, ``sentences``.
    """
    sentences = pairs.sentences()
    z_ND = embed(sentences)
    row = {sentence: number for number, sentence in enumerate(sentences)}
    positive = np.flatnonzero(pairs.scores >= 0.8 * pairs.scores.max())
    first, second = ([row[side[number]] for number in positive] for side in (pairs.sentences1, pairs.sentences2))
    return {
        "alignment": alignment(z_ND[first], z_ND[second]) if len(positive) else None,
        "alignment_pairs": len(positive),
        "uniformity": uniformity(z_ND),
        "mean_cosine": mean_cosine(z_ND),
        "effective_rank": effective_rank(z_ND),
        "sentences": len(sentences),
    }


def unit_rows(z_ND: np.ndarray) -> np.ndarray:
    """Rows divided by their length (float64), with the same eps as every cosine here; a row of zeros stays."""
    z_ND = np.asarray(z_ND, dtype=np.float64)
    return z_ND / np.maximum(np.linalg.norm(z_ND, axis=1, keepdims=True), 1e-8)
