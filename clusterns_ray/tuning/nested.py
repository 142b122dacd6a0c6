"""A trial on Ray Train workers of its own, which hear after every evaluation whether to go on."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from clusterns_ray.config import Config, make_config
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.tuning.trial import Job, Listener, Result, Stopped

DESK_TIMEOUT_S = 60.0


class Desk:
    """An actor between the first worker and the trial: results one way, verdicts the other, in order."""

    def __init__(self) -> None:
        self.results: asyncio.Queue[Result] = asyncio.Queue()
        self.verdicts: asyncio.Queue[bool] = asyncio.Queue()

    async def tell(self, result: Result) -> bool:
        await self.results.put(result)
        return await self.verdicts.get()

    async def take(self, timeout_s: float) -> Result | None:
        try:
            return await asyncio.wait_for(self.results.get(), timeout_s)
        except asyncio.TimeoutError:
            return None

    async def answer(self, go_on: bool) -> None:
        await self.verdicts.put(go_on)


def fit(job: Job, config: Config, tell: Callable[[Result], None]) -> dict[str, Any]:
    """Train on ``config.runtime.num_workers`` workers; restarted from their checkpoint when one dies."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    desk: Any = ray.remote(Desk).options(num_cpus=0).remote()
    runtime = config.runtime
    trainer = TorchTrainer(
        worker,
        train_loop_config={"job": job, "desk": desk},
        torch_config=TorchConfig(timeout_s=int(runtime.step_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=runtime.num_workers,
            use_gpu=job["use_gpu"],
            resources_per_worker={"CPU": runtime.cpus_per_worker, **({"GPU": 1} if job["use_gpu"] else {})},
        ),
        run_config=RunConfig(
            name=f"{job['id']}-{os.urandom(4).hex()}",
            storage_path=os.path.join(job["run_dir"], "ray"),
            failure_config=FailureConfig(max_failures=runtime.max_failures),
        ),
    )
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = trainer.fit().return_value
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True, name="fit")
    thread.start()
    stopped = False
    while thread.is_alive():
        result: Any = ray.get(desk.take.remote(0.5), timeout=DESK_TIMEOUT_S)
        if result is None:
            continue
        try:
            tell(result)
        except Stopped:
            stopped = True
        ray.get(desk.answer.remote(not stopped), timeout=DESK_TIMEOUT_S)
    if stopped:
        raise Stopped
    if "error" in outcome:
        raise ClusterNSError(f"its workers failed: {_last_line(outcome['error'])}") from outcome["error"]
    value = outcome["value"]
    if value is None or "error" in value:
        raise ClusterNSError((value or {}).get("error", "its workers ended without a result."))
    return value["result"]


def worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs. Errors that a restart would meet again are returned, not raised."""
    import torch
    from ray.train.torch import get_device

    from clusterns_ray import distributed
    from clusterns_ray.training.loop import train_worker

    job, desk = settings["job"], settings["desk"]
    config = make_config(job["config"])
    device = get_device()
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        torch.set_num_threads(config.runtime.cpus_per_worker)
    # Only reports are answered: there all workers stop together.
    listener = Listener(lambda result: ray.get(desk.tell.remote(result)))

    def report(metrics: dict[str, Any]) -> None:
        go_on = True
        if distributed.rank() == 0:
            last = metrics["step"] >= listener.total_steps
            go_on = ray.get(desk.tell.remote({"step": metrics["step"], "score": metrics["sts_dev"], "last": last}))
        if not distributed.broadcast_object(go_on):
            raise Stopped

    try:
        result = train_worker(
            config,
            tokens_dir=job["tokens_dir"],
            sts_dir=job["sts_dir"],
            run_dir=job["run_dir"],
            device=device,
            watch=listener.watch,
            report=report,
            score_before=job["score_before"],
        )
    except Stopped:
        return {"error": "it was stopped."}
    except ClusterNSError as error:
        return {"error": str(error)}
    return {"result": result}


def _last_line(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
