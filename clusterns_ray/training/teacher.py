"""The finished encoder whose ranking of a batch is learnt, where ``loss.teacher`` names one.

Shape suffixes: b rows of this worker, D the teacher's width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clusterns_ray.models.encoder import Encoder, TokenBatch, autocast
from clusterns_ray.training.collate import Shard


class Teacher:
    """Embeds the rows of a batch as a finished encoder does: without dropout, without a training head."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.encoder = Encoder.load(name).to(device).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, shards: list[Shard], dtype: torch.dtype) -> Tensor:
        """float32 (b, D), the shards' rows one after the other; products in ``dtype``."""
        with autocast(shards[0].input_ids_BT.device, dtype):
            embeddings = self.encoder.embed(
                [
                    TokenBatch(
                        shard.input_ids_BT, shard.attention_mask_BT, lengths_B=shard.lengths and shard.lengths[0]
                    )
                    for shard in shards
                ]
            )
        return torch.cat(embeddings).float()
