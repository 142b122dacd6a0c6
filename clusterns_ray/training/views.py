"""The two views of a step, and the way back through them: at once, or piece by piece with the gradient cached.

The loss reads the embeddings of the whole batch, which every worker has, and gives their gradient; then each worker
back-propagates the gradient of its own rows, piece by piece. Cached (Gao et al., "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup", RepL4NLP 2021): no activations are kept; each piece is computed once more, with
the same dropout, before it takes its part of the gradient. Memory is that of one piece and of the embeddings, for one
more forward pass.

Shape suffixes: B rows of the global batch, b rows of this worker, D width.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from clusterns_ray.training.batch_layout import BatchLayout, to_device
from clusterns_ray.training.collate import Shard
from clusterns_ray.training.reduction import AllReduce, TreeReduction


class Views:
    """Both views of the global batch, as leaves of the loss: ``z1_BD, z2_BD`` in float32; and of masked language
    modelling ``mlm_N2``, sums of losses and numbers of tokens that add up to those of the batch."""

    def __init__(
        self,
        reduction: AllReduce | TreeReduction,
        shards: list[Shard],
        layout: BatchLayout,
        cache_chunk: int | None = None,
    ) -> None:
        """
        Args:
            shards: this worker's.
            cache_chunk: as ``train.cache_chunk``; None keeps all activations.
        """
        self.reduction, self.layout, self.cached = reduction, layout, cache_chunk is not None
        self.pieces = reduction.pieces(shards, cache_chunk)
        with torch.set_grad_enabled(not self.cached), reduction.same_weights():
            self.outputs = [reduction.model(piece) for piece in self.pieces]
        local_b2D = torch.cat([torch.stack([z1_bD, z2_bD], dim=1).detach() for z1_bD, z2_bD, _ in self.outputs])
        z_B2D = layout.gather(local_b2D)
        self.z1_BD, self.z2_BD = (z_BD.contiguous().requires_grad_() for z_BD in z_B2D.unbind(dim=1))
        self.mlm_N2: Tensor | None = None
        if any(shard.masked is not None for shard in shards):
            local_N2 = torch.stack([mlm.detach() for _, _, mlm in self.outputs])
            mlm_N2, self._own = reduction.gather_sums(local_N2, layout)
            self.mlm_N2 = mlm_N2.requires_grad_()

    def backward(self, loss: Tensor) -> None:
        """Leave the gradient of ``loss`` in the parameters' ``.grad``: that of the global batch, on every worker."""
        torch.autograd.backward(loss)
        own_b = to_device(self.layout.canonical(self.layout.rank), loss.device)
        sizes = [sum(len(shard.input_ids_BT) for shard in piece) for piece in self.pieces]
        d1, d2 = (torch.split(_gradient(z_BD)[own_b], sizes) for z_BD in (self.z1_BD, self.z2_BD))
        shards = iter(self.layout.shards_by_rank[self.layout.rank])
        with self.reduction.same_weights() if self.cached else nullcontext():
            for number, piece in enumerate(self.pieces):
                with self.reduction.recomputation(last=number + 1 == len(self.pieces)):
                    z1_bD, z2_bD, mlm = self.reduction.model(piece) if self.cached else self.outputs.pop(0)
                    outputs, gradients = [z1_bD, z2_bD], [d1[number], d2[number]]
                    if self.mlm_N2 is not None:
                        outputs, gradients = [*outputs, mlm], [*gradients, _gradient(self.mlm_N2)[self._own[number]]]
                    self.reduction.backward(outputs, gradients, [next(shards) for _ in piece])
        self.reduction.finish()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
