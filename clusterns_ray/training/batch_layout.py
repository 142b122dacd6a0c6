"""Where the rows of a global batch are computed, and how they come back into one order.

A batch is sorted by length and cut into shards; shards are dealt to workers. Rows are numbered by shard, which
does not depend on the number of workers: that numbering is the *canonical* order of a batch, in which every worker
computes its loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clusterns_ray import distributed
from clusterns_ray.data.sampler import cut_shards
from clusterns_ray.data.shard_tree import assign_shards
from clusterns_ray.kernels.transfer import to_device as to_device


@dataclass(frozen=True)
class BatchLayout:
    """One global batch on one worker."""

    rows_B: np.ndarray
    """int64 row numbers of the corpus, in canonical order"""
    starts: np.ndarray
    """canonical number of each shard's first row, and B at the end"""
    shards_by_rank: list[list[int]]
    """the shards of each worker"""
    rank: int

    @property
    def size(self) -> int:
        """B, rows of the global batch."""
        return len(self.rows_B)

    def shard_rows(self, shard: int) -> np.ndarray:
        return self.rows_B[self.starts[shard] : self.starts[shard + 1]]

    def canonical(self, rank: int) -> np.ndarray:
        """Canonical numbers of the rows of one worker, in the order in which it computes them."""
        parts: list[np.ndarray] = [
            np.arange(self.starts[shard], self.starts[shard + 1]) for shard in self.shards_by_rank[rank]
        ]
        return np.concatenate(parts)

    def gather(self, local: Tensor) -> Tensor:
        """The rows of all workers in canonical order: ``(b, ...) -> (B, ...)``; no gradient."""
        if len(self.shards_by_rank) == 1:
            return local  # One worker computes its shards in canonical order.
        counts = [len(self.canonical(rank)) for rank in range(len(self.shards_by_rank))]
        longest = max(counts)
        if len(local) < longest:  # Workers' shares of an epoch's last, odd batch may differ by a few rows.
            local = torch.cat([local, local.new_zeros(longest - len(local), *local.shape[1:])])
        source = np.empty(self.size, dtype=np.int64)
        for rank, count in enumerate(counts):
            source[self.canonical(rank)] = rank * longest + np.arange(count)
        gathered = distributed.all_gather_rows(local)
        return gathered.index_select(0, to_device(source, local.device))


def build_batch_layout(
    rows: np.ndarray, lengths: np.ndarray, shards: int, *, rank: int | None = None, workers: int | None = None
) -> BatchLayout:
    """Cut a global batch into shards and deal them to the workers.

    Args:
        rows: int64 row numbers of the corpus (B).
        lengths: tokens of each of these rows (B).
        rank, workers: this process's, unless given.
    """
    pieces = cut_shards(lengths, shards)
    sizes = [len(piece) for piece in pieces]
    workers = distributed.world_size() if workers is None else workers
    return BatchLayout(
        rows_B=np.asarray(rows)[np.concatenate(pieces)],
        starts=np.concatenate([[0], np.cumsum(sizes)]),
        shards_by_rank=assign_shards(shards, workers),
        rank=distributed.rank() if rank is None else rank,
    )
