"""``metrics.jsonl``: one object a logged step or evaluation, and how they are made from device tensors."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from clusterns_ray import distributed
from clusterns_ray.files import json_text, write_atomic
from clusterns_ray.training.objective import SHARE_NAMES, StepLoss


class MetricsLog:
    """Appends to ``metrics.jsonl``, what is not finite as null.

    On resume it forgets what came after the checkpoint, as that will come again.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_atomic(path, "".join(line + "\n" for line in kept))

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_text(record, indent=None))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a ``metrics.jsonl``; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) < 2**62]


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 2**62


def step_metrics(step_loss: StepLoss, batch_size: int, unused: Collection[str] = ()) -> dict[str, float]:
    """The values of one step over all workers, but for those of terms that are ``unused``. One small all-reduce; waits
    for the device."""
    shares = distributed.all_reduce_sum(step_loss.shares.clone())
    values: dict[str, float] = dict(zip(SHARE_NAMES, shares.tolist(), strict=True))
    for name in unused:
        del values[name]
    if step_loss.counts_K is None:
        del values["hard_negative_cosine"]
        return values
    counts_K = step_loss.counts_K
    values["clusters_used"] = int((counts_K > 0).sum())
    values["largest_cluster"] = int(counts_K.max())
    if step_loss.false_negatives is None:
        pairs = (counts_K * (counts_K - 1)).sum()
    else:
        pairs = distributed.all_reduce_sum(step_loss.false_negatives.clone())
    values["false_negative_rate"] = float(pairs / (batch_size * (batch_size - 1)))
    return values
