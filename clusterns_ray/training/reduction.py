"""How gradients are added up over the shards and workers of a step.

``tree``: each shard has a gradient of its own, and these are added in a binary tree that depends on the number of
shards alone. The sum has the same bits on any number of workers, where they compute a shard's gradient to the same
bits: with the same versions, kind of processor and number of threads. ``all_reduce``: autograd adds up what a worker
has, and DDP averages over the workers while the backward pass goes on; how a sum rounds then depends on their number.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from clusterns_ray import distributed
from clusterns_ray.data.shard_tree import ShardTree, assign_shards, nodes_by_rank, tree_order
from clusterns_ray.training.batch_layout import BatchLayout, to_device
from clusterns_ray.training.collate import Shard
from clusterns_ray.training.objective import TwoViews


class AllReduce:
    """One pass for all shards of a worker, and DDP's mean over the workers."""

    def __init__(self, views: TwoViews) -> None:
        self.model = distributed.data_parallel(views)

    def pieces(self, shards: list[Shard], rows: int | None) -> list[list[Shard]]:
        """The shards that go through the model at once: of at most ``rows`` rows, or all; one at least."""
        return [shards] if rows is None else chunked(shards, rows)

    def same_weights(self) -> AbstractContextManager[object]:
        """Inside, all pieces multiply by the same casts of the weights, where they can."""
        return nullcontext()  # DDP has to see each pass begin with the weights.

    def gather_sums(self, local_N2: Tensor, layout: BatchLayout) -> tuple[Tensor, list[int]]:
        """The sums of all workers, and which of them each of this worker's pieces is a part of."""
        return distributed.all_gather_rows(local_N2.sum(dim=0)[None]), [layout.rank] * len(local_N2)

    def recomputation(self, *, last: bool) -> AbstractContextManager[object]:
        """The context in which a piece is computed once more, forward and backward."""
        # DDP averages over workers once, with the last piece, what all pieces have left in `.grad`.
        waits = not last and hasattr(self.model, "no_sync")
        return self.model.no_sync() if waits else nullcontext()  # type: ignore[operator]

    def backward(self, outputs: list[Tensor], gradients: list[Tensor], shards: list[int]) -> None:
        """Back-propagate the gradients of a piece's outputs to the parameters.

        Args:
            shards: the numbers of the piece's shards.
        """
        torch.autograd.backward(outputs, [gradient * distributed.world_size() for gradient in gradients])

    def finish(self) -> None:
        """Leave the gradient of the global batch in the parameters' ``.grad``, on every worker."""


class TreeReduction:
    """A pass for each shard, and the tree. Methods as those of :class:`AllReduce`.

    The gradient of looked-up embeddings is kept as the rows that were looked up, not as a table of mostly zeros. All
    workers gather these rows, and add them in the order of the shards.
    """

    def __init__(self, views: TwoViews, shards: int) -> None:
        self.model = views
        self.parameters = [parameter for parameter in views.parameters() if parameter.requires_grad]
        self.num_shards = shards
        self.dense: list[nn.Parameter] = []
        self.looked_up: list[nn.Parameter] = []
        self._begin()

    def _begin(self) -> None:
        self.tree = ShardTree[list[Tensor]](self.num_shards, _add)
        self.lookups: list[list[Tensor]] = []
        """the sparse gradients of each of this worker's shards"""

    def pieces(self, shards: list[Shard], rows: int | None) -> list[list[Shard]]:
        return [[shard] for shard in shards]

    def same_weights(self) -> AbstractContextManager[object]:
        return self.model.same_weights()

    def gather_sums(self, local_N2: Tensor, layout: BatchLayout) -> tuple[Tensor, list[int]]:
        by_rank = np.concatenate(layout.shards_by_rank)
        gathered = distributed.all_gather_rows(local_N2)
        return gathered[to_device(np.argsort(by_rank), gathered.device)], layout.shards_by_rank[layout.rank]

    def recomputation(self, *, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, outputs: list[Tensor], gradients: list[Tensor], shards: list[int]) -> None:
        (shard,) = shards
        computed = torch.autograd.grad(outputs, self.parameters, gradients, allow_unused=True)
        of_all: list[tuple[nn.Parameter, Tensor | None]] = list(zip(self.parameters, computed, strict=True))
        pairs = [(p, gradient) for p, gradient in of_all if gradient is not None]
        self.dense = [p for p, gradient in pairs if not gradient.is_sparse]
        self.looked_up = [p for p, gradient in pairs if gradient.is_sparse]
        self.lookups.append([gradient.coalesce() for _, gradient in pairs if gradient.is_sparse])
        self.tree.put(0, tree_order(self.num_shards).index(shard), [g for _, g in pairs if not g.is_sparse])

    @torch.no_grad()
    def finish(self) -> None:
        for parameter, gradient in zip(self.dense, self._root(), strict=True):
            parameter.grad = gradient
        for number, parameter in enumerate(self.looked_up):
            parameter.grad = self._table(parameter, [lookups[number] for lookups in self.lookups])
        self._begin()

    def _root(self) -> list[Tensor]:
        """The sum over all shards, of each parameter. Each worker adds up its slice of all numbers."""
        nodes = self.tree.nodes
        workers = distributed.world_size()
        if workers == 1:
            (root,) = nodes.values()
            return root
        flat_NP = torch.stack([torch.cat([tensor.flatten() for tensor in nodes[node]]) for node in sorted(nodes)])
        nodes.clear()
        size = flat_NP.shape[1]
        flat_NP = nn.functional.pad(flat_NP, (0, -size % workers))
        own = nodes_by_rank(self.num_shards, workers)
        tree = ShardTree[list[Tensor]](self.num_shards, _add)
        for its_nodes, part in zip(own, distributed.exchange_slices(flat_NP, [len(its) for its in own]), strict=True):
            for (level, place), slice_P in zip(its_nodes, part, strict=True):
                tree.put(level, place, [slice_P])
        ((slice_P,),) = tree.nodes.values()
        sums = torch.split(distributed.all_gather_rows(slice_P)[:size], [p.numel() for p in self.dense])
        return [total.view_as(parameter) for total, parameter in zip(sums, self.dense, strict=True)]

    def _table(self, parameter: nn.Parameter, lookups: list[Tensor]) -> Tensor:
        """The sum of sparse gradients over all shards, shard by shard."""
        rows_ND = torch.cat([gradient.values() for gradient in lookups])
        ids_N = torch.cat([gradient.indices()[0] for gradient in lookups])
        if distributed.world_size() > 1:
            rows_ND, ids_N = self._gather_lookups(rows_ND, ids_N, [len(gradient.values()) for gradient in lookups])
        return torch.ops.aten.embedding_dense_backward(rows_ND, ids_N, len(parameter), -1, False)

    def _gather_lookups(self, rows_ND: Tensor, ids_N: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """The rows and ids of all shards, in the order of the shards, from those of this worker's shards."""
        workers = distributed.world_size()
        counts_WS = distributed.all_gather_rows(torch.tensor([counts], device=ids_N.device)).cpu().numpy()
        longest = int(counts_WS.sum(axis=1).max())
        more = longest - len(ids_N)
        rows_ND = distributed.all_gather_rows(nn.functional.pad(rows_ND, (0, 0, 0, more)))
        ids_N = distributed.all_gather_rows(nn.functional.pad(ids_N, (0, more)))
        places: list[np.ndarray] = [np.array([])] * self.num_shards
        for rank, shards in enumerate(assign_shards(self.num_shards, workers)):
            first = rank * longest
            for shard, count in zip(shards, counts_WS[rank], strict=True):
                places[shard] = np.arange(first, first + count)
                first += count
        index_N = to_device(np.concatenate(places), ids_N.device)
        return rows_ND[index_N], ids_N[index_N]


def make_reduction(name: str, views: TwoViews, shards: int) -> AllReduce | TreeReduction:
    """The reduction of this name, of a step that has ``shards``."""
    table = views.encoder.backbone.get_input_embeddings()
    if isinstance(table, nn.Embedding):
        table.sparse = name == "tree"
    return TreeReduction(views, shards) if name == "tree" else AllReduce(views)


def _add(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    # Not in place: autograd may return one tensor for two parameters.
    return list(torch._foreach_add(a, b))  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


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
