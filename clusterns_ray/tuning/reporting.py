"""What connects a training loop to its trial: the run's files on this machine, and evaluations on their way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clusterns_ray import distributed
from clusterns_ray.io.events import Evaluated, Event, RunStarted
from clusterns_ray.io.uploader import uploader_for
from clusterns_ray.launch.staging import run_directory, run_url, unstage
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.metrics import read_metrics
from clusterns_ray.tuning.job import Evaluation, Job


@contextmanager
def run_context(job: Job) -> Iterator[RunContext]:
    """Where a job's files are on this machine.

    Afterwards the local copy of a run in an object store is removed, since a sweep has many runs.
    """
    tokens_dir, sts_dir = unstage(job.config, job.staged)
    run_dir, url = run_directory(job.config), run_url(job.config)
    try:
        yield RunContext(job.config, tokens_dir, sts_dir, run_dir, uploader_for(url, run_dir))
    finally:
        if url and distributed.rank() == 0:
            shutil.rmtree(run_dir, ignore_errors=True)


class Reporter:
    """The hooks of a training loop on its first worker: each dev score is sent on as an :class:`Evaluation`.

    Evaluations that a resumed run has behind it and the study does not know yet come first.
    """

    def __init__(self, job: Job, send: Callable[[Evaluation], Any]) -> None:
        self.job, self.send, self.total_steps = job, send, 0

    def evaluation(self, step: int, score: float) -> Evaluation:
        return Evaluation(step, score, last=step >= self.total_steps)

    def on_event(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.total_steps = event.total_steps
                for record in self._unknown(event.step):
                    self.send(self.evaluation(record["step"], record["sts_dev"]))
            case Evaluated(step=0):
                self.on_evaluation(event)

    def on_evaluation(self, event: Evaluated) -> None:
        self.send(self.evaluation(event.step, event.score))

    def _unknown(self, reached: int) -> list[dict[str, Any]]:
        known = self.job.known_step
        if known is None or known >= reached:
            return []
        records = read_metrics(run_directory(self.job.config) / "metrics.jsonl")
        return [r for r in records if r.get("sts_dev") is not None and known < r["step"] <= reached]
