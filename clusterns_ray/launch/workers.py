"""A group of Ray Train workers, from its start to what they return; begun anew where a machine is taken away."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train.collective
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from clusterns_ray.config import Config, RuntimeConfig
from clusterns_ray.errors import ClusterNSError, Drained, GpuError
from clusterns_ray.launch.capacity import worker_resources
from clusterns_ray.launch.ray_cluster import head_answers

DRAIN_POLL_S = 1.0
"""Seconds between looks at whether a machine is about to be taken away; clouds say so 30 s (GCP) or 120 s ahead."""


class WorkersFailed(ClusterNSError):
    """Workers died or sent nothing; the same command resumes a run from its newest checkpoint."""


def run_workers(
    work: Callable[[dict[str, Any]], dict[str, Any]],
    settings: dict[str, Any],
    runtime: RuntimeConfig,
    *,
    use_gpu: bool,
    name: str,
    storage_path: str,
    listen: Callable[[], bool],
) -> dict[str, Any]:
    """Run ``work(settings)`` on every worker, and meanwhile listen to them in this thread.

    Ray restarts workers that die, ``runtime.max_failures`` times. Those that stop because a machine is about to be
    taken away are started anew without limit, as each time they have made progress.

    Args:
        work: returns ``{"result": ...}``, ``{"error": message, "kind": class}`` or ``{"drained": message}`` (see
            :func:`worker_result`), the same on every worker.
        storage_path: where Ray keeps what is its own; a run's checkpoints are elsewhere.
        listen: takes what the workers sent, and returns whether there was anything. Called several times a second.

    Returns:
        The ``result``.

    Raises:
        WorkersFailed: they died too often, or sent nothing for too long.
        ClusterNSError: they failed; the kind of error and the message are theirs.
    """
    # Train looks this often at its workers, and each report waits for a look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", str(DRAIN_POLL_S))
    while True:
        trainer = _Trainer(
            work,
            train_loop_config=settings,
            torch_config=CheckedTorchConfig(timeout_s=int(runtime.step_timeout_s)),
            scaling_config=ScalingConfig(
                num_workers=runtime.num_workers,
                use_gpu=use_gpu,
                resources_per_worker=worker_resources(runtime.cpus_per_worker, use_gpu),
                label_selector=runtime.label_selector or None,
                elastic_resize_monitor_interval_s=runtime.resize_every_s,
            ),
            run_config=RunConfig(
                name=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(4).hex()}",
                storage_path=storage_path,
                failure_config=FailureConfig(max_failures=runtime.max_failures),
            ),
        )
        value = _watched(trainer, runtime, use_gpu, listen)
        if "drained" not in value:
            break
    if "error" in value:
        raise value["kind"](value["error"])
    return value["result"]


def _watched(
    trainer: TorchTrainer, runtime: RuntimeConfig, use_gpu: bool, listen: Callable[[], bool]
) -> dict[str, Any]:
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, daemon=True, name="fit")
    thread.start()
    heard, started = time.monotonic(), False
    while True:
        alive = thread.is_alive()
        if _listen(listen):
            heard, started = time.monotonic(), True
        if not alive:
            break
        # Workers that Ray starts anew may wait for a machine, after the others waited for them.
        patience = runtime.start_timeout_s + (runtime.step_timeout_s if started else 0)
        if time.monotonic() - heard > patience:
            raise WorkersFailed(_silence(runtime, use_gpu, patience, started))
        time.sleep(0.2)
    if "error" in outcome:
        _check_head(outcome["error"])
        raise WorkersFailed(f"The workers failed: {_innermost(outcome['error'])}") from outcome["error"]
    value = outcome["result"].return_value
    if value is None:
        raise WorkersFailed(f"The workers ended without a result: {outcome['result'].error or 'no reason given'}.")
    return value


def _listen(listen: Callable[[], bool]) -> bool:
    try:
        return listen()
    except RayError as error:
        _check_head(error)
        return False  # It may come back; silence has a deadline of its own.


def _check_head(error: BaseException) -> None:
    """Raise WorkersFailed where the head of the cluster is gone."""
    if not head_answers():
        raise WorkersFailed(
            f"The head of the cluster at {os.environ['RAY_ADDRESS']} does not answer any more. Start it again, or "
            "another."
        ) from error


def _silence(runtime: RuntimeConfig, use_gpu: bool, waited_s: float, started: bool) -> str:
    resources = ray.cluster_resources()
    what = (
        f"Nothing was heard from the workers for {waited_s:.0f} s (runtime.start_timeout_s + runtime.step_timeout_s)."
        if started
        else f"No worker started within runtime.start_timeout_s ({waited_s:.0f} s)."
    )
    return (
        f"{what} Asked for {runtime.num_workers} workers with {runtime.cpus_per_worker} "
        f"CPU{' and 1 GPU' if use_gpu else ''} each; the cluster has {resources.get('CPU', 0):.0f} CPUs and "
        f"{resources.get('GPU', 0):.0f} GPUs. Ask for less, add nodes, or raise the time-out."
    )


def _innermost(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    text = str(error).strip().splitlines() or [type(error).__name__]
    return f"{text[-1]}" + ("" if text[-1].endswith(".") else ".")


class _Trainer(TorchTrainer):
    """Ray's trainer without its process for Ray datasets: there are none, and it takes seconds to start."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ != "DatasetsCallback"]


class CheckedTorchConfig(TorchConfig):
    """Ray's process group, set up once torch sees the GPUs that Ray has given to the workers."""

    @property
    def backend_cls(self) -> type:
        return _CheckedBackend


class _CheckedBackend(TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        problems = [problem for problem in worker_group.execute(gpu_problem) if problem]
        if problems:
            # The workers return it as an error: what is raised here, Ray tries again.
            worker_group.execute(_keep_problem, problems[0])
        else:
            super().on_start(worker_group, backend_config)


# ---- on a worker ----------------------------------------------------------------------------------------------------

_problem: str | None = None
"""Why the GPUs that Ray has given to this worker's group cannot be used."""


def _keep_problem(problem: str) -> None:
    global _problem
    _problem = problem


def gpu_problem() -> str | None:
    """Why the GPU that Ray has given to this process cannot be used; None where it can, or there is none."""
    import torch

    if not ray.get_gpu_ids() or torch.cuda.is_available():
        return None
    return (
        f"Ray gave a GPU to a worker on {ray.util.get_node_ip_address()}, but torch {torch.__version__} sees none "
        "there. Install a torch with CUDA and the GPU's driver on every node (`nvidia-smi` shows the driver), or set "
        "runtime.use_gpu to false."
    )


def check_gpu() -> None:
    """Raise GpuError where the GPU that Ray has given to this process cannot be used."""
    problem = gpu_problem()
    if problem:
        raise GpuError(problem)


def worker_result(train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` of :func:`run_workers` returns. An error that a restart would meet again is returned: Ray restarts
    workers that raise."""
    try:
        return {"result": train()}
    except Drained as error:
        return {"drained": str(error)}
    except ClusterNSError as error:
        # Its class in errors.py, which takes a message; one defined elsewhere may take other arguments.
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == ClusterNSError.__module__)
        return {"error": str(error), "kind": kind}


def worker_device(config: Config) -> Any:
    """This worker's device; on a CPU it computes with as many threads as were reserved.

    Raises:
        GpuError: torch does not see the GPUs that Ray has given to the workers.
    """
    import torch

    if _problem is not None:
        raise GpuError(_problem)
    device = get_device()
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        torch.set_num_threads(config.runtime.cpus_per_worker)
    return device


class PreemptionWatcher:
    """Whether a machine of the group is about to be taken away; every worker calls it after every step.

    Ray knows the nodes that are being drained (by ``launch/preemption.py``, by an operator, by Kubernetes' preStop
    hook). Its answer is an exchange between all workers, so they ask for it at the same steps, about once a second, at
    a pace that worker 0 sets.
    """

    def __init__(self, alive: Callable[[], Any]) -> None:
        """
        Args:
            alive: called by every worker each time that it asks Ray.
        """
        self.alive = alive
        self.next_step, self.asked_step, self.asked_at = 0, 0, 0.0

    def __call__(self, step: int) -> bool:
        if step < self.next_step:
            return False
        leaving = ray.train.get_preemption_info() is not None
        now = time.monotonic()
        seconds_a_step = (now - self.asked_at) / max(step - self.asked_step, 1) if self.asked_at else DRAIN_POLL_S
        pace = max(1, int(DRAIN_POLL_S / max(seconds_a_step, 1e-3)))
        self.next_step = step + ray.train.collective.broadcast_from_rank_zero(pace)
        self.asked_step, self.asked_at = step, now
        self.alive()
        return leaving
