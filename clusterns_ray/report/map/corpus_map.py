"""A corpus as a map: a sample of its sentences, and all that is known of each. Needs no torch.

Shape suffixes: N sentences, S similar sentences, M hard negatives of a sentence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from clusterns_ray.errors import DataError

MOST = 20_000
"""Sentences that a map shows."""
FEWEST = 10


class Sample(NamedTuple):
    """Sentences of a corpus in its order."""

    texts: list[str]
    rows_N: np.ndarray
    """int64, their numbers among the sentences of the corpus"""
    total: int
    """sentences of the corpus"""


@dataclass(frozen=True)
class CorpusMap:
    """All that a page shows of the map."""

    texts: list[str]
    rows_N: np.ndarray
    xy_N2: np.ndarray
    """float32"""
    before_N2: np.ndarray | None
    """float32, by the untrained encoder; None where that is not known"""
    cluster_N: np.ndarray
    """int64, the nearest centroid"""
    cosine_N: np.ndarray
    """float32, cosine to it"""
    second_N: np.ndarray
    """int64, the second nearest centroid"""
    similar_NS: np.ndarray
    """int64, the most similar false negatives of each sentence by their places in the map; -1 where there are fewer"""
    similar_cosine_NS: np.ndarray
    """float32"""
    hard_NM: np.ndarray | None
    """int64, sentences drawn as hard negatives, -1 where there are none; None where centroids are the hard negatives"""
    terms: dict[int, list[str]]
    """distinguishing terms of each cluster that holds a sentence"""
    facts: dict[str, Any] = field(default_factory=dict)
    """``total``, ``trustworthiness``, ``trustworthiness_before``, ``layout``, ``seed``, and what the caller adds"""


def draw_sample(texts: Iterator[str], seed: int, most: int = MOST) -> Sample:
    """``most`` sentences drawn at random in one pass, or all: Algorithm R of Vitter, "Random sampling with a
    reservoir", ACM TOMS 1985.

    Raises:
        DataError: there are fewer than :data:`FEWEST`.
    """
    draw, kept, total = random.Random(seed), [], 0
    for total, text in enumerate(texts, start=1):
        if len(kept) < most:
            kept.append((total - 1, text))
        elif (place := draw.randrange(total)) < most:
            kept[place] = (total - 1, text)
    if total < FEWEST:
        raise DataError(
            f"The corpus has {total} sentence{'' if total == 1 else 's'}; a map needs at least {FEWEST}.",
            "Give more text.",
        )
    kept.sort()
    return Sample([text for _, text in kept], np.array([row for row, _ in kept]), total)
