"""A configuration to a finished run: in this process, or on Ray workers."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clusterns_ray.config import Config, dump_config, make_config
from clusterns_ray.data.prepare import Prepared, describe, prepare
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.files import write_atomic
from clusterns_ray.launch.cluster import connect
from clusterns_ray.launch.places import read_run_file, run_directory, run_store, run_url, stage, unstage, write_run_file
from clusterns_ray.launch.preflight import check_request, warn_of_faiss

Watch = Callable[[dict[str, Any]], None]


def train(config: Config, watch: Watch = lambda event: None) -> dict[str, Any]:
    """Train, or resume, the run that ``config`` names.

    A finished run is left as it is. An unfinished one goes on from its newest checkpoint.

    Args:
        watch: told of what happens, in this process (see ``clusterns_ray.training.loop.Watch``).

    Returns:
        What ``result.json`` holds.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        ClusterNSError: the run failed; its checkpoints are kept.
    """

    def note(text: str) -> None:
        watch({"event": "note", "text": text})

    check_request(config)
    run_dir = run_directory(config)
    finished = read_run_file(config, "result.json")
    if finished is not None:
        note(f"{config.runtime.name!r} is finished, and left as it is. Choose another runtime.name to train anew.")
        return json.loads(finished)
    warn_of_faiss(note)
    if config.runtime.use_gpu and config.runtime.num_workers == 0:
        _wants_gpu(config)
    prepared = prepare(config, note, lambda rows: watch({"event": "tokenised", "rows": rows}))
    note(("Corpus, as prepared before: " if prepared.reused else "Corpus: ") + describe(prepared.manifest))
    # Before anything else, as it is what makes a name taken.
    write_run_file(config, "config.yaml", dump_config(config))
    if config.runtime.num_workers == 0:
        return _train_here(config, prepared, run_dir, watch)
    return _train_on_ray(config, prepared, run_dir, watch)


def save_config(config: Config, run_dir: Path) -> None:
    """Write ``config.yaml`` before anything else, as it is what makes a name taken."""
    write_atomic(run_dir / "config.yaml", dump_config(config))


def command_line() -> list[str]:
    """The command of this process, without the directory of its program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _train_here(config: Config, prepared: Prepared, run_dir: Path, watch: Watch) -> dict[str, Any]:
    import torch

    from clusterns_ray.training.loop import train_worker
    from clusterns_ray.training.mirror import mirror_of

    device = torch.device("cuda" if _wants_gpu(config) else "cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return train_worker(
            config,
            tokens_dir=prepared.tokens_dir,
            sts_dir=prepared.sts_dir,
            run_dir=run_dir,
            device=device,
            watch=watch,
            command=command_line(),
            mirror=mirror_of(run_url(config), run_dir),
        )


def _wants_gpu(config: Config) -> bool:
    """Whether to train on this machine's GPU; ConfigError where one is asked for and none is there."""
    import torch

    if config.runtime.use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.use_gpu is true, but torch sees no GPU here. Set it to false, or install a torch with CUDA and "
            "the GPU's driver."
        )
    return torch.cuda.is_available() if config.runtime.use_gpu is None else config.runtime.use_gpu


def _train_on_ray(config: Config, prepared: Prepared, run_dir: Path, watch: Watch) -> dict[str, Any]:
    # Train waits this long between looks at its workers, and each report waits for a look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    needed = config.runtime.worker_counts()[-1] * config.runtime.cpus_per_worker
    with connect(needed, lambda text: watch({"event": "note", "text": text})):
        return _fit(config, prepared, run_dir, watch)


def _fit(config: Config, prepared: Prepared, run_dir: Path, watch: Watch) -> dict[str, Any]:
    """Run ``fit`` in a thread, and meanwhile show here what worker 0 tells; a deadline for the start."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = config.runtime.use_gpu
    if use_gpu is None:
        use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
    workers = config.runtime.num_workers
    store = run_store(config)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={
            "config": config.resolved(),
            "staged": stage(config, prepared),
            # A worker's working directory is not the driver's; with a store each machine has a place of its own.
            "run_dir": None if store else str(run_dir),
            "mailbox": mailbox,
            "command": command_line(),
        },
        torch_config=TorchConfig(timeout_s=int(config.runtime.step_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.runtime.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        # What Ray keeps of an attempt is apart from the run: our checkpoints are what a run resumes from.
        run_config=RunConfig(
            name=f"{config.runtime.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=(store / "ray").url if store else str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=config.runtime.max_failures),
        ),
    )
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, daemon=True, name="fit")
    thread.start()
    deadline = time.monotonic() + config.runtime.start_timeout_s
    waiting = True
    while True:
        alive = thread.is_alive()
        for event in _take(mailbox):
            waiting = False
            watch(event)
        if not alive:
            break
        if waiting and time.monotonic() > deadline:
            raise ClusterNSError(
                f"No worker started within runtime.start_timeout_s ({config.runtime.start_timeout_s:.0f} s). Asked for "
                f"{workers} workers with {config.runtime.cpus_per_worker} CPU{' and 1 GPU' if use_gpu else ''} each; "
                f"the cluster has {_resources()}. Ask for less, add nodes, or raise the time-out."
            )
        time.sleep(0.2)
    return _outcome(outcome, run_dir)


def _outcome(outcome: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    if "error" in outcome:
        raise ClusterNSError(
            f"The workers failed: {_innermost(outcome['error'])} The run resumes from its newest checkpoint in "
            f"{str(run_dir / 'checkpoints')!r} when the same command is given again."
        ) from outcome["error"]
    value = outcome["result"].return_value
    if value is None:
        raise ClusterNSError(f"The run ended without a result: {outcome['result'].error or 'no reason given'}.")
    if "error" in value:
        raise ClusterNSError(value["error"])
    return value["result"]


def _innermost(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    text = str(error).strip().splitlines() or [type(error).__name__]
    return f"{text[-1]}" + ("" if text[-1].endswith(".") else ".")


def _resources() -> str:
    import ray

    found = ray.cluster_resources()
    return f"{found.get('CPU', 0):.0f} CPUs and {found.get('GPU', 0):.0f} GPUs"


class _Mailbox:
    """An actor between worker 0 and the driver, so that progress is shown where the command was given."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events


def _take(mailbox: Any) -> list[dict[str, Any]]:
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        return ray.get(mailbox.take.remote(), timeout=30)
    except GetTimeoutError:
        return []


def _ray_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each Ray worker runs. Errors that a restart would meet again are returned, not raised."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    from clusterns_ray.training.loop import train_worker
    from clusterns_ray.training.mirror import mirror_of

    config = make_config(settings["config"])
    device = get_device()
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        torch.set_num_threads(config.runtime.cpus_per_worker)
    try:
        tokens_dir, sts_dir = unstage(config, settings["staged"])
        run_dir = Path(settings["run_dir"] or run_directory(config))
        result = train_worker(
            config,
            tokens_dir=tokens_dir,
            sts_dir=sts_dir,
            run_dir=run_dir,
            device=device,
            watch=settings["mailbox"].put.remote,
            report=ray.train.report,
            command=settings["command"],
            mirror=mirror_of(run_url(config), run_dir),
        )
    except ClusterNSError as error:
        return {"error": str(error)}
    return {"result": result}
