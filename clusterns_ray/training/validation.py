"""The dev set, encoded by all workers together: what chooses the best step, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clusterns_ray import distributed
from clusterns_ray.evaluation.geometry import geometry
from clusterns_ray.evaluation.sts import read_pairs, score_pairs
from clusterns_ray.models.encoder import Encoder, length_batches
from clusterns_ray.training.batch_layout import to_device


class DevSet:
    """Graded pairs, tokenised once."""

    def __init__(self, directory: str | Path, name: str, encoder: Encoder) -> None:
        self.name = name
        self.pairs = read_pairs(directory, name)
        self.ids = encoder.tokenize(self.pairs.sentences())

    def encode(self, encoder: Encoder) -> np.ndarray:
        """Embeddings of every different sentence, in the order of ``self.pairs.sentences()``: float32 (n, D)."""
        return encode_together(encoder, self.ids)

    def score(self, z_ND: np.ndarray) -> float:
        """Spearman x 100, the same number on every worker."""
        return distributed.broadcast_object(score_pairs(self.pairs, lambda _: z_ND))

    def geometry(self, z_ND: np.ndarray) -> dict[str, Any]:
        """How the embeddings lie: alignment, uniformity, effective rank and mean cosine."""
        values = geometry(self.pairs, lambda _: z_ND)
        names = ("alignment", "uniformity", "effective_rank")
        return {**{name: values[name] for name in names}, "embedding_cosine": values["mean_cosine"]}


def encode_together(encoder: Encoder, ids: list[list[int]], *, project: bool = False) -> np.ndarray:
    """:func:`embed_together` on the host: float32 (n, D)."""
    return embed_together(encoder, ids, project=project).cpu().numpy()


def embed_together(encoder: Encoder, ids: list[list[int]], *, project: bool = False) -> Tensor:
    """Embeddings of tokenised sentences, each batch on one of the workers; all of them on every worker.

    The batches do not depend on the number of workers. Without dropout; through the training head if ``project``.

    Returns:
        float32 (n, D) on the encoder's device, for which the host does not wait.
    """
    embeddings_ND = torch.zeros(len(ids), encoder.width, device=encoder.device)
    batches = list(length_batches([len(row) for row in ids], 64))
    with encoder.same_weights(encoder.autocast_dtype, frozen=True):
        for rows in batches[distributed.rank() :: distributed.world_size()]:
            z_BD = encoder.encode_ids([ids[int(row)] for row in rows])
            with torch.inference_mode():
                z_BD = encoder.project(z_BD) if project else z_BD
            embeddings_ND[to_device(rows, encoder.device)] = z_BD.clone()
    # Each row is not zero on one worker alone, so the sum is exact.
    return distributed.all_reduce_sum(embeddings_ND)
