"""Embeddings in the plane: t-SNE by openTSNE where it is installed, else by scikit-learn; and how far to trust it.

Shape suffixes: N sentences, D width.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import numpy as np

from clusterns_ray.io.events import OnNote

PERPLEXITY = 30
COMPONENTS = 50
"""Principal components that scikit-learn's t-SNE reads."""
JUDGED = 5000
"""Sentences by which trustworthiness is measured: its matrices are quadratic."""
NEIGHBOURS = 10
"""Neighbours in the plane that have to be neighbours among the embeddings too."""
SHOWN_EVERY_S = 5.0
EARLY, LATER = 250, 500
"""Iterations with early exaggeration and without, as both libraries have them by default."""


def has_opentsne() -> bool:
    """Whether openTSNE is installed; it is not imported."""
    return importlib.util.find_spec("openTSNE") is not None


def lay_out(
    unit_ND: np.ndarray, seed: int, initial_N2: np.ndarray | None = None, note: OnNote = lambda text: None
) -> np.ndarray:
    """Coordinates in which similar sentences are close together.

    Args:
        unit_ND: float32, rows of length 1: then Euclidean distances rank as cosines do.
        seed: the result is a function of it, of the library and of the machine's arithmetic.
        initial_N2: where to begin, so that two maps of the same sentences can be compared; the first two principal
            components if not given.
        note: called with the progress every few seconds.

    Returns:
        float32 (N, 2).
    """
    from sklearn.decomposition import PCA

    perplexity = min(PERPLEXITY, (len(unit_ND) - 1) / 3)
    components_NC = PCA(min(COMPONENTS, *unit_ND.shape), svd_solver="covariance_eigh").fit_transform(unit_ND)
    begin_N2 = components_NC[:, :2] if initial_N2 is None else initial_N2
    begin_N2 = 1e-4 * begin_N2 / np.maximum(begin_N2[:, 0].std(), 1e-12)
    if has_opentsne():
        return _by_opentsne(unit_ND, begin_N2.astype(np.float64), perplexity, seed, note)
    from sklearn.manifold import TSNE

    tsne = TSNE(2, perplexity=perplexity, init=begin_N2.astype(np.float32), max_iter=EARLY + LATER, random_state=seed)
    return tsne.fit_transform(components_NC).astype(np.float32)


def _by_opentsne(unit_ND: np.ndarray, begin_N2: np.ndarray, perplexity: float, seed: int, note: OnNote) -> np.ndarray:
    from openTSNE import TSNEEmbedding  # pyright: ignore[reportMissingImports]
    from openTSNE.affinity import PerplexityBasedNN  # pyright: ignore[reportMissingImports]
    from openTSNE.nearest_neighbors import PrecomputedNeighbors  # pyright: ignore[reportMissingImports]
    from sklearn.neighbors import NearestNeighbors

    # Exact neighbours, so that no approximation's own randomness is in the layout.
    exact = NearestNeighbors(n_neighbors=int(3 * perplexity), algorithm="brute").fit(unit_ND)
    distances_Nk, rows_Nk = exact.kneighbors()
    neighbors = PrecomputedNeighbors(rows_Nk, distances_Nk)
    graph: dict[str, Any] = {"perplexity": perplexity, "knn_index": neighbors}
    affinities = PerplexityBasedNN(**graph)
    # The threads of many points would only wait for one another over few.
    large = len(unit_ND) > JUDGED
    options = {"negative_gradient_method": "fft" if large else "bh", "n_jobs": -1 if large else 1, "random_state": seed}
    embedding = TSNEEmbedding(begin_N2, affinities, **options)
    shown = time.monotonic()

    def progress(done: int) -> dict[str, Any]:
        def show(iteration: int, error: float, embedding_N2: np.ndarray) -> None:
            nonlocal shown
            if time.monotonic() - shown > SHOWN_EVERY_S:
                shown = time.monotonic()
                note(f"  {done + iteration} of {EARLY + LATER} iterations")

        return {"callbacks": show, "callbacks_every_iters": 10}

    embedding = embedding.optimize(EARLY, exaggeration=12, momentum=0.5, **progress(0))
    embedding = embedding.optimize(LATER, momentum=0.8, **progress(EARLY))
    return np.asarray(embedding, dtype=np.float32)


def trustworthiness(unit_ND: np.ndarray, xy_N2: np.ndarray, seed: int) -> float:
    """How far neighbours in the plane are neighbours among the embeddings, from 0 to 1: scikit-learn's measure with
    cosines, over ``JUDGED`` sentences drawn at random, or all.

    Source: Venna and Kaski, "Neighborhood preservation in nonlinear projection methods", ICANN 2001.
    """
    from sklearn.manifold import trustworthiness as measure

    rows = np.sort(np.random.default_rng(seed).permutation(len(unit_ND))[:JUDGED])
    neighbours = min(NEIGHBOURS, (len(rows) - 1) // 2)
    return float(measure(unit_ND[rows], xy_N2[rows], n_neighbors=neighbours, metric="cosine"))
