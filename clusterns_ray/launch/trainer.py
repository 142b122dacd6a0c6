"""A configuration to a finished run: in this process, or on Ray workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from clusterns_ray.config import Config, make_config
from clusterns_ray.data.prepare import Prepared, check_batch, describe, most_rows, prepare
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.io.events import Evaluated, Event, OnEvent, OnNote, notes_to
from clusterns_ray.io.uploader import uploader_for
from clusterns_ray.launch.gauges import with_gauges
from clusterns_ray.launch.preflight import check_request, warn_of_faiss
from clusterns_ray.launch.ray_cluster import check_workers, connect, on_this_node
from clusterns_ray.launch.staging import read_run_file, run_directory, run_place, run_url, stage, unstage
from clusterns_ray.training.result import RunResult
from clusterns_ray.training.run_files import model_damage, read_result


def train(config: Config, on_event: OnEvent = lambda event: None) -> RunResult:
    """Train, or resume, the run that ``config`` names.

    A finished run is left as it is. An unfinished one goes on from its newest checkpoint.

    Args:
        config: as of :func:`~clusterns_ray.load_config` or :func:`~clusterns_ray.make_config`.
        on_event: called in this process with each event as it happens (see ``clusterns_ray.io.events``).

    Returns:
        What ``result.json`` holds, with the exported encoder as ``result.model``.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        ClusterNSError: the run failed; its checkpoints are kept.
    """
    note = notes_to(on_event)
    config = check_request(config, note)
    run_dir = run_directory(config)
    finished = finished_result(config, note)
    if finished is not None:
        note(f"{config.runtime.name!r} is finished, and left as it is. Choose another runtime.name to train anew.")
        return RunResult(finished)
    warn_of_faiss(note)
    if config.runtime.use_gpu and config.runtime.num_workers == 0:
        _wants_gpu(config)

    check_batch(config, most_rows(config))

    def prepare_data() -> Prepared:
        prepared = prepare(config, on_event)
        note(("Corpus, as prepared before: " if prepared.reused else "Corpus: ") + describe(prepared.manifest))
        check_batch(config, prepared.manifest["rows"])
        return prepared

    runtime = config.runtime
    if runtime.num_workers == 0:
        return RunResult(_train_here(config, prepare_data(), run_dir, on_event))
    fewest, most = runtime.worker_counts()[0], runtime.worker_counts()[-1]
    with connect(most * runtime.cpus_per_worker, note):
        # Before the corpus is read, which may take long.
        begun = read_run_file(config, "config.yaml") is not None
        use_gpu = check_workers(runtime, fewest, "run", begun=begun, note=note)
        return RunResult(_fit(config, prepare_data(), run_dir, with_gauges(on_event, runtime.name), use_gpu))


def finished_result(config: Config, note: OnNote) -> dict[str, Any] | None:
    """What ``result.json`` says of a finished run whose model is whole; None where there is still something to do.

    Raises:
        ConfigError: the result is that of another configuration.
    """
    place = run_place(config)
    text = place.read("result.json")
    result = text and read_result(text, config, place.path, note)
    if not result:
        return None
    if place.store is not None:  # what it holds is verified whenever it is copied
        damage = None if place.store.manifest("model") is not None else "model/ is missing"
    else:
        damage = model_damage(place.local / "model", config.fingerprint(), result["best_step"], result["steps"])
    if damage:
        note(f"{config.runtime.name!r} was finished, but {damage}.")
        return None
    # Not where it was when it was trained: a directory may have been moved since.
    return {**result, "model": f"{place.store.address if place.store else place.local.resolve()}/model"}


def command_line() -> list[str]:
    """The command of this process, without the directory of its program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _train_here(config: Config, prepared: Prepared, run_dir: Path, on_event: OnEvent) -> dict[str, Any]:
    import torch

    from clusterns_ray.training.context import RunContext
    from clusterns_ray.training.loop import train_worker

    device = torch.device("cuda" if _wants_gpu(config) else "cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        uploader = uploader_for(run_url(config), run_dir)
        command = tuple(command_line())
        context = RunContext(config, prepared.tokens_dir, prepared.sts_dir, run_dir, uploader, command)
        return train_worker(context, device, on_event)


def _wants_gpu(config: Config) -> bool:
    """Whether to train on this machine's GPU; ConfigError where one is asked for and none is there."""
    import torch

    if config.runtime.use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.use_gpu is true, but torch sees no GPU here. Set it to false, or install a torch with CUDA and "
            "the GPU's driver."
        )
    return torch.cuda.is_available() if config.runtime.use_gpu is None else config.runtime.use_gpu


def _fit(config: Config, prepared: Prepared, run_dir: Path, on_event: OnEvent, use_gpu: bool) -> dict[str, Any]:
    """Train on Ray workers, and pass the events of worker 0 on to ``on_event`` in this process."""
    import ray

    from clusterns_ray.launch.workers import WorkersFailed, run_workers

    mailbox = ray.remote(**on_this_node())(_Mailbox).remote()
    place = run_place(config)

    def listen() -> bool:
        events = _take(mailbox)
        for event in events:
            if event is not None:
                on_event(event)
        return bool(events)

    settings = {
        "config": config.resolved(),
        "staged": stage(config, prepared),
        # A worker's working directory is not the driver's; with a store each machine has a place of its own.
        "run_dir": None if place.store else str(run_dir),
        "mailbox": mailbox,
        "command": command_line(),
    }
    try:
        return run_workers(
            _work,
            settings,
            config.runtime,
            use_gpu=use_gpu,
            name=config.runtime.name,
            # What Ray keeps of an attempt is apart from the run: our checkpoints are what a run resumes from.
            storage_path=(place / "ray").path,
            listen=listen,
        )
    except WorkersFailed as error:
        raise ClusterNSError(
            f"{error} The run resumes from its newest checkpoint in {(place / 'checkpoints').address!r} when the same "
            "command is given again."
        ) from error


class _Mailbox:
    """An actor between worker 0 and the driver, so that progress is shown where the command was given.

    In contrast to ``ray.util.queue.Queue``, the worker does not wait until an event has arrived. None in place of an
    event says that the worker is alive.
    """

    def __init__(self) -> None:
        self.events: list[Event | None] = []

    def put(self, event: Event | None) -> None:
        self.events.append(event)

    def take(self) -> list[Event | None]:
        events, self.events = self.events, []
        return events


def _take(mailbox: Any) -> list[Event | None]:
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        return ray.get(mailbox.take.remote(), timeout=30)
    except GetTimeoutError:
        return []


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each Ray worker runs."""
    import ray.train

    from clusterns_ray import distributed
    from clusterns_ray.launch.workers import PreemptionWatcher, worker_device, worker_result
    from clusterns_ray.training.context import RunContext
    from clusterns_ray.training.loop import train_worker

    config = make_config(settings["config"])
    send = settings["mailbox"].put.remote

    def report(event: Evaluated) -> None:
        ray.train.report({"step": event.step, "sts_dev": event.score, "best_sts_dev": event.best_score})

    def train() -> dict[str, Any]:
        tokens_dir, sts_dir = unstage(config, settings["staged"])
        run_dir = Path(settings["run_dir"] or run_directory(config))
        uploader = uploader_for(run_url(config), run_dir)
        context = RunContext(config, tokens_dir, sts_dir, run_dir, uploader, tuple(settings["command"]))
        watcher = PreemptionWatcher(lambda: send(None) if distributed.rank() == 0 else None)
        return train_worker(context, worker_device(config), send, on_evaluation=report, should_stop=watcher)

    return worker_result(train)
