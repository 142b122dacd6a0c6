"""Random rows of the corpus, and first centroids from them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clusterns_ray import distributed
from clusterns_ray.clustering.backend import spherical_kmeans
from clusterns_ray.clustering.kmeans import cosine_matrix, member_statistics, update_centroids
from clusterns_ray.config import Config
from clusterns_ray.data.sampler import permute, stream_key
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.training.validation import encode_together


def sample_rows(tokens: TokenStore, n: int, stream: str, seed: int) -> np.ndarray:
    """``n`` random rows of the corpus, or all: row numbers (int64) in ascending order."""
    n = min(n, len(tokens))
    return np.sort(permute(np.arange(n), len(tokens), stream_key(stream, seed)))


def token_ids(tokens: TokenStore, rows: np.ndarray) -> list[list[int]]:
    """The token ids of each of these rows."""
    input_ids, mask = tokens.tokens(rows, 0)
    return [row[: int(length)].tolist() for row, length in zip(input_ids, mask.sum(axis=1), strict=True)]


def sample_centroids(config: Config, tokens: TokenStore, encoder: Encoder) -> Tensor:
    """First centroids by spherical K-means over a seeded sample of the corpus, at the scale of the embeddings; by all
    workers together."""
    k = config.clustering.num_clusters
    rows = sample_rows(tokens, max(256 * k, 4096), "kmeans", config.seed)
    z_ND = encode_together(encoder, token_ids(tokens, rows), project=True)
    directions_KD = np.zeros((k, z_ND.shape[1]), dtype=np.float32)
    if distributed.rank() == 0:
        seed = stream_key("kmeans_init", config.seed)
        directions_KD = spherical_kmeans(z_ND, k, seed=seed, device=encoder.device)
    z, centroids_KD = torch.as_tensor(z_ND), torch.as_tensor(directions_KD)
    sums_KD, counts_K = member_statistics(z, cosine_matrix(z, centroids_KD).argmax(dim=1), k)
    return update_centroids(centroids_KD, sums_KD, counts_K, rate=1.0, rule="mean").to(encoder.device)
