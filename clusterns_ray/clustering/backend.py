"""Spherical K-means over many embeddings: torch on a GPU; on a CPU faiss where it is installed, else torch.

The only importer of faiss here.

Shape suffixes: N embeddings, D width, K clusters.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np
import torch

from clusterns_ray.clustering.kmeans import member_statistics
from clusterns_ray.errors import DataError

AT_ONCE = 8192
"""Rows whose cosines with all centroids are held at a time."""


def spherical_kmeans(
    z_ND: np.ndarray,
    k: int,
    *,
    seed: int,
    iterations: int = 25,
    initial_KD: np.ndarray | None = None,
    device: torch.device | None = None,
) -> np.ndarray:
    """Cluster directions: unit centroids that (locally) maximise the summed cosine of each row with its centroid.

    Args:
        z_ND: float32 embeddings of any length; rows are normalised here.
        seed: the result is a function of it (and of the backend).
        initial_KD: directions to begin with; rows of the embeddings if not given.
        device: where to compute; the CPU if not given.

    Returns:
        float32 (K, D), unit rows.

    Raises:
        DataError: fewer rows than clusters.
    """
    if len(z_ND) < k:
        raise DataError(f"K-means: {k} clusters asked from {len(z_ND)} embeddings. Use at most {len(z_ND)} clusters.")
    n_ND = np.ascontiguousarray(z_ND, dtype=np.float32)
    n_ND = n_ND / np.maximum(np.linalg.norm(n_ND, axis=1, keepdims=True), 1e-8)
    device = device or torch.device("cpu")
    if device.type == "cpu" and importlib.util.find_spec("faiss") is not None:
        return _faiss_kmeans(n_ND, k, seed, iterations, initial_KD)
    return _torch_kmeans(n_ND, k, seed, iterations, initial_KD, device)


def _faiss_kmeans(n_ND: np.ndarray, k: int, seed: int, iterations: int, initial_KD: np.ndarray | None) -> np.ndarray:
    import faiss

    # By itself faiss would train on a sample of 256 rows a centroid.
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(n_ND)}
    kmeans = faiss.Kmeans(n_ND.shape[1], k, niter=iterations, spherical=True, seed=seed % 2**31, **limits)
    kmeans.train(n_ND, init_centroids=initial_KD)
    return np.asarray(kmeans.centroids)


def _torch_kmeans(
    n_ND: np.ndarray, k: int, seed: int, iterations: int, initial_KD: np.ndarray | None, device: torch.device
) -> np.ndarray:
    """Lloyd's iterations on the sphere; an empty cluster restarts at the row farthest from its centroid."""
    rows_ND = torch.as_tensor(n_ND).to(device)
    if initial_KD is None:
        first_K = torch.randperm(len(rows_ND), generator=torch.Generator().manual_seed(seed))[:k]
        centroids_KD = rows_ND[first_K.to(device)]
    else:
        centroids_KD = torch.as_tensor(initial_KD).to(device)
    for _ in range(iterations):
        # In parts, as the cosines of all rows with all centroids may be larger than the rows.
        parts = [(part_ND @ centroids_KD.T).max(dim=1) for part_ND in torch.split(rows_ND, AT_ONCE)]
        cosine_N, nearest_N = torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
        sums_KD, counts_K = member_statistics(rows_ND, nearest_N, k)
        empty = (counts_K == 0).nonzero().squeeze(1)
        sums_KD[empty] = rows_ND[cosine_N.argsort()[: len(empty)]]
        centroids_KD = torch.nn.functional.normalize(sums_KD, dim=1)
    return centroids_KD.cpu().numpy()


def faiss_conflict() -> str | None:
    """A warning where both faiss wheels are installed, which overwrite one another; None where they are not."""
    wheels: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith("faiss-"):
            wheels.add(f"{name} {distribution.version}")
    if len(wheels) < 2:
        return None
    return (
        f"{' and '.join(sorted(wheels))} are both installed and write the same module `faiss`, so one is broken. "
        "Uninstall both, then install one: pip install faiss-cpu."
    )
