"""What a trial is told and what it tells, wherever it trains: in its own process or on workers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clusterns_ray import distributed
from clusterns_ray.config import Config
from clusterns_ray.io.uploader import uploader_for
from clusterns_ray.launch.staging import run_directory, run_url, unstage
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.metrics import read_metrics

Job = dict[str, Any]
"""Plain values: `id, config, staged, score_before, heard, use_gpu`."""

Result = dict[str, Any]
"""Of an evaluation: `step, score, last, seconds`, the untrained encoder's at step 0. At the end: `outcome`, either
``finished`` (with `score, steps, curve`), ``failed`` (with `reason`) or ``storage`` (with `reason`: what it did could
not be kept, which is no fault of its values), and `seconds`."""


class Stopped(Exception):
    """The trial was told to stop."""


@contextmanager
def run_context(job: Job, config: Config) -> Iterator[RunContext]:
    """Where a trial's files are on this machine. In the end a copy of what is in an object store is removed: a sweep
    has many runs."""
    tokens_dir, sts_dir = unstage(config, job["staged"])
    run_dir, url = run_directory(config), run_url(config)
    try:
        yield RunContext(config, tokens_dir, sts_dir, run_dir, uploader_for(url, run_dir))
    finally:
        if url and distributed.rank() == 0:
            shutil.rmtree(run_dir, ignore_errors=True)


class Listener:
    """The hooks of a training loop on its first worker, turned into results.

    Args:
        heard: the newest step whose score the study knows. Those that a resumed run has behind it are told again, in
            order: the study may be a snapshot from before them. None if they do not matter.
    """

    def __init__(self, tell: Callable[[Result], Any], config: Config | None = None, heard: int | None = None):
        self.tell, self.total_steps = tell, 0
        self.config, self.heard = config, heard

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self.total_steps = event["total_steps"]
            for metrics in self._missed(event["step"]):
                self.report(metrics)
        if event["event"] == "evaluation" and event["step"] == 0:
            self.report(event)

    def report(self, metrics: dict[str, Any]) -> None:
        last = metrics["step"] >= self.total_steps
        self.tell({"step": metrics["step"], "score": metrics["sts_dev"], "last": last})

    def _missed(self, step: int) -> list[dict[str, Any]]:
        if self.config is None or self.heard is None or self.heard >= step:
            return []
        records = read_metrics(run_directory(self.config) / "metrics.jsonl")
        return [r for r in records if r.get("sts_dev") is not None and self.heard < r["step"] <= step]
