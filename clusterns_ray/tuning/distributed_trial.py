"""A trial on Ray Train workers of its own, which wait after every evaluation for the verdict whether to go on."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from ray.util.queue import Empty, Queue

from clusterns_ray import distributed
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.io.events import Evaluated
from clusterns_ray.launch.ray_cluster import on_this_node
from clusterns_ray.launch.staging import run_place
from clusterns_ray.launch.workers import PreemptionWatcher, run_workers, worker_device, worker_result
from clusterns_ray.training.loop import train_worker
from clusterns_ray.tuning.job import Evaluation, Job, Stopped
from clusterns_ray.tuning.reporting import Reporter, run_context


class Channel:
    """Evaluations from the first worker to the trial's process, and verdicts back, in two of Ray's queues."""

    def __init__(self) -> None:
        options = on_this_node()
        self.evaluations, self.verdicts = Queue(actor_options=options), Queue(actor_options=options)

    def ask(self, evaluation: Evaluation) -> bool:
        """Called on the worker: send an evaluation, and wait for whether to go on."""
        question = uuid.uuid4().hex
        self.evaluations.put((question, evaluation))
        while True:
            # A worker that died may have left an answer unread.
            answered, go_on = self.verdicts.get()
            if answered == question:
                return go_on

    def heartbeat(self) -> None:
        """Called on the worker, to say that it is training."""
        self.evaluations.put(None)

    def listen(self, verdict: Callable[[Evaluation], bool]) -> bool:
        """Called in the trial's process: answer one evaluation. Returns whether there was any message."""
        try:
            message = self.evaluations.get(timeout=0.3)
        except Empty:
            return False
        if message is not None:
            question, evaluation = message
            self.verdicts.put((question, verdict(evaluation)))
        return True


def train_on_workers(job: Job, report: Callable[[Evaluation], None]) -> dict[str, Any]:
    """Train on ``runtime.num_workers`` workers, which are begun again from their checkpoint when one dies.

    Args:
        report: Raises :class:`Stopped` when the job is not to go on.
    """
    channel, stopped = Channel(), False

    def verdict(evaluation: Evaluation) -> bool:
        nonlocal stopped
        try:
            if not stopped:
                report(evaluation)
        except Stopped:
            stopped = True
        return not stopped

    try:
        return run_workers(
            _work,
            {"job": job, "channel": channel},
            job.config.runtime,
            use_gpu=job.use_gpu,
            name=job.name,
            storage_path=(run_place(job.config) / "ray").path,
            listen=lambda: channel.listen(verdict),
        )
    except ClusterNSError:
        if stopped:
            raise Stopped from None
        raise


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """Train on one worker; ``settings`` holds the job and the channel."""
    job, channel = settings["job"], settings["channel"]
    # Only reports are obeyed: there all workers stop together.
    reporter = Reporter(job, channel.ask)

    def report(event: Evaluated) -> None:
        go_on = channel.ask(reporter.evaluation(event.step, event.score)) if distributed.rank() == 0 else True
        if not distributed.broadcast_object(go_on):
            raise Stopped

    def train() -> dict[str, Any]:
        try:
            with run_context(job) as context:
                return train_worker(
                    context,
                    worker_device(job.config),
                    reporter.on_event,
                    on_evaluation=report,
                    should_stop=PreemptionWatcher(lambda: channel.heartbeat() if distributed.rank() == 0 else None),
                    score_before=job.score_before,
                )
        except Stopped:
            raise ClusterNSError("it was stopped.") from None

    return worker_result(train)
