"""The two views of a step, and the way back through them: at once, or chunk by chunk with the gradient cached.

Cached (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021): the
embeddings of all shards are computed without keeping activations; the loss gives their gradient; then each chunk is
computed once more, with the same dropout, and takes its part of that gradient back. Memory is that of one chunk and of
the embeddings, for one more forward pass.

Shape suffixes: b rows of this worker, c rows of a chunk, D width.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from clusterns_ray.training.collate import Shard


class Views:
    """``z1_bD, z2_bD, mlm`` as :class:`TwoViews` gives them."""

    def __init__(self, model: nn.Module, shards: list[Shard]) -> None:
        self.z1_bD, self.z2_bD, self.mlm = model(shards)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` to the parameters'; averaged over the workers where there are several."""
        loss.backward()


class CachedViews(Views):
    """The same values and gradients, with the activations of one chunk at a time."""

    def __init__(self, model: nn.Module, chunks: Sequence[list[Shard]]) -> None:
        self.model, self.chunks = model, chunks
        with torch.no_grad():
            parts = [model(chunk) for chunk in chunks]
        self.sizes = [len(z1_cD) for z1_cD, _, _ in parts]
        self.z1_bD = torch.cat([z1_cD for z1_cD, _, _ in parts]).requires_grad_()
        self.z2_bD = torch.cat([z2_cD for _, z2_cD, _ in parts]).requires_grad_()
        self.mlm = torch.stack([mlm for _, _, mlm in parts]).sum(dim=0).requires_grad_()

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        gradients = zip(torch.split(_gradient(self.z1_bD), self.sizes), torch.split(_gradient(self.z2_bD), self.sizes))
        for number, (chunk, (d1_cD, d2_cD)) in enumerate(zip(self.chunks, gradients), start=1):
            # DDP sums over workers once, with the last chunk, what all chunks have left in `.grad`.
            waits = number < len(self.chunks) and hasattr(self.model, "no_sync")
            with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                z1_cD, z2_cD, mlm = self.model(chunk)
                outputs, gradient = [z1_cD, z2_cD], [d1_cD, d2_cD]
                if mlm.requires_grad:
                    outputs, gradient = [*outputs, mlm], [*gradient, _gradient(self.mlm)]
                torch.autograd.backward(outputs, gradient)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def chunked(shards: list[Shard], rows: int) -> list[list[Shard]]:
    """Shards one after the other, in lists of at most ``rows`` rows, of one shard at least."""
    chunks: list[list[Shard]] = []
    room = 0
    for shard in shards:
        size = len(shard.input_ids_BT)
        if not chunks or size > room:
            chunks.append([])
            room = rows
        chunks[-1].append(shard)
        room -= size
    return chunks
