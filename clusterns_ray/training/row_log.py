"""Which rows of the corpus each worker took: the proof that none is seen twice or left out, whatever happens."""

from __future__ import annotations

import time
from pathlib import Path

from clusterns_ray import distributed
from clusterns_ray.io.files import json_text
from clusterns_ray.training.batch_layout import BatchLayout


class NoRowLog:
    def append(self, step: int, layout: BatchLayout) -> None:
        pass


class RowLog(NoRowLog):
    """``rows/ATTEMPT-RANK.jsonl``: one object a step, ``step, attempt, rank, world_size, rows``.

    A step that was done again after a failure is there once more, under a later attempt.
    """

    def __init__(self, directory: Path) -> None:
        self.attempt = distributed.broadcast_object(time.time_ns() // 1_000_000)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{self.attempt}-{distributed.rank()}.jsonl"

    def append(self, step: int, layout: BatchLayout) -> None:
        rows = [row for shard in layout.shards_by_rank[layout.rank] for row in layout.shard_rows(shard).tolist()]
        who = {"attempt": self.attempt, "rank": layout.rank, "world_size": len(layout.shards_by_rank)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_text({"step": step, **who, "rows": rows}, indent=None))
