"""Clusters for people: size, tightness, and the sentences that stand for each.

Shape suffixes: N sentences, D width, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from clusterns_ray.clustering.kmeans import cosine_matrix

LONGEST_EXAMPLE = 300
"""Characters of an example."""


def describe_clusters(
    z_ND: np.ndarray, centroids_KD: np.ndarray, texts_of: Callable[[np.ndarray], Sequence[str]], examples: int = 5
) -> list[dict[str, Any]]:
    """The clusters that hold any of the N sentences, the largest first.

    Args:
        texts_of: sentences of the given rows of ``z_ND``.

    Returns:
        For each ``cluster`` (its number), ``size`` (of the N), ``tightness`` (mean cosine of its sentences to the
        centroid) and ``examples`` (sentences, the nearest to the centroid first).
    """
    cos_NK = cosine_matrix(torch.as_tensor(z_ND).float(), torch.as_tensor(centroids_KD).float()).numpy()
    nearest_N = cos_NK.argmax(axis=1)
    cos_N = cos_NK[np.arange(len(cos_NK)), nearest_N]
    clusters: list[dict[str, Any]] = []
    for cluster in np.unique(nearest_N):
        members = np.flatnonzero(nearest_N == cluster)
        typical = members[np.argsort(-cos_N[members], kind="stable")[:examples]]
        clusters.append(
            {
                "cluster": int(cluster),
                "size": len(members),
                "tightness": round(float(cos_N[members].mean()), 4),
                "examples": [text[:LONGEST_EXAMPLE] for text in texts_of(typical)],
            }
        )
    return sorted(clusters, key=lambda c: (-c["size"], c["cluster"]))
