"""``metrics.jsonl``: one object a logged step or evaluation, and how they are made from device tensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from clusterns_ray.io.files import json_text, write_atomic
from clusterns_ray.training.objective import VALUE_NAMES, StepLoss

NO_STEP = 2**62
"""The step of a line that is no record: later than any."""


class MetricsLog:
    """Appends records to ``metrics.jsonl``, in which numbers that are not finite are null.

    On resume it removes the records after the checkpoint's step, as these steps are done again.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        lines = _lines(path)
        self.damaged = sum(_step_of(line) == NO_STEP for line in lines[:-1])
        """lines that are no records, but for a last one that a crash may have cut off"""
        if path.exists():
            write_atomic(path, "".join(line + "\n" for line in lines if _step_of(line) <= step))

    def append(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json_text(record, indent=None))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a ``metrics.jsonl``; a line cut off by a crash is left out."""
    return [json.loads(line) for line in _lines(path) if _step_of(line) < NO_STEP]


def _lines(path: Path) -> list[str]:
    """The lines of a file. Bytes that are not UTF-8 become U+FFFD, which marks a line as damaged: no record has it."""
    if not path.exists():
        return []
    return path.read_bytes().decode("utf-8", errors="replace").split("\n")


def _step_of(line: str) -> int:
    if "\ufffd" in line:
        return NO_STEP
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return NO_STEP


def step_metrics(step_loss: StepLoss, batch_size: int, unused: Collection[str] = ()) -> dict[str, float]:
    """The values of one step, but for those of terms that are ``unused``. Waits for the device."""
    values: dict[str, float] = dict(zip(VALUE_NAMES, map(float, step_loss.values.cpu().numpy()), strict=True))
    for name in unused:
        del values[name]
    if step_loss.counts_K is None:
        del values["hard_negative_cosine"]
        return values
    counts_K = step_loss.counts_K
    values["clusters_used"] = int((counts_K > 0).sum())
    values["largest_cluster"] = int(counts_K.max())
    pairs = step_loss.false_negatives
    if pairs is None:
        pairs = (counts_K * (counts_K - 1)).sum()
    values["false_negative_rate"] = float(pairs / (batch_size * (batch_size - 1)))
    return values
