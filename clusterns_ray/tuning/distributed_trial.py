"""A trial on Ray Train workers of its own, which hear after every evaluation whether to go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray

from clusterns_ray import distributed
from clusterns_ray.config import Config, make_config
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.launch.ray_cluster import on_this_node
from clusterns_ray.launch.staging import run_place
from clusterns_ray.launch.workers import PreemptionWatcher, answer, run_workers, worker_device
from clusterns_ray.training.loop import train_worker
from clusterns_ray.tuning.job import Job, Listener, Result, Stopped, run_context

DESK_TIMEOUT_S = 60.0


class Desk:
    """An actor between the first worker and the trial: results one way, verdicts the other, in order."""

    def __init__(self) -> None:
        self.results: asyncio.Queue[Result] = asyncio.Queue()
        self.verdicts: asyncio.Queue[bool] = asyncio.Queue()

    async def tell(self, result: Result) -> bool:
        await self.results.put(result)
        return await self.verdicts.get()

    async def alive(self) -> None:
        await self.results.put({})

    async def take(self, timeout_s: float) -> Result | None:
        try:
            return await asyncio.wait_for(self.results.get(), timeout_s)
        except TimeoutError:
            return None

    async def answer(self, go_on: bool) -> None:
        await self.verdicts.put(go_on)


def fit(job: Job, config: Config, tell: Callable[[Result], None]) -> dict[str, Any]:
    """Train on ``config.runtime.num_workers`` workers; restarted from their checkpoint when one dies."""
    desk: Any = ray.remote(Desk).options(**on_this_node()).remote()
    stopped = False

    def listen() -> bool:
        nonlocal stopped
        result: Any = ray.get(desk.take.remote(0.3), timeout=DESK_TIMEOUT_S)
        if result is None:
            return False
        if "score" in result:
            try:
                tell(result)
            except Stopped:
                stopped = True
            ray.get(desk.answer.remote(not stopped), timeout=DESK_TIMEOUT_S)
        return True

    try:
        return run_workers(
            _work,
            {"job": job, "desk": desk},
            config.runtime,
            use_gpu=job["use_gpu"],
            name=job["id"],
            storage_path=(run_place(config) / "ray").path,
            listen=listen,
        )
    except ClusterNSError:
        if stopped:
            raise Stopped from None
        raise


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs."""
    job, desk = settings["job"], settings["desk"]
    config = make_config(job["config"])
    # Only reports are answered: there all workers stop together.
    listener = Listener(lambda result: ray.get(desk.tell.remote(result)), config, job["heard"])

    def report(metrics: dict[str, Any]) -> None:
        go_on = True
        if distributed.rank() == 0:
            last = metrics["step"] >= listener.total_steps
            go_on = ray.get(desk.tell.remote({"step": metrics["step"], "score": metrics["sts_dev"], "last": last}))
        if not distributed.broadcast_object(go_on):
            raise Stopped

    def train() -> dict[str, Any]:
        try:
            with run_context(job, config) as context:
                return train_worker(
                    context,
                    worker_device(config),
                    listener.on_event,
                    on_evaluation=report,
                    should_stop=PreemptionWatcher(lambda: desk.alive.remote() if distributed.rank() == 0 else None),
                    score_before=job["score_before"],
                )
        except Stopped:
            raise ClusterNSError("it was stopped.") from None

    return answer(train)
