"""What runs in a trial's process: training in a thread, which waits at every evaluation to be told to go on.

The process stays for the next trial. A trial that is to stop is told so at its next evaluation and returns by itself,
with everything it had started.
"""

from __future__ import annotations

import ctypes
import gc
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray import tune

from clusterns_ray.config import Config, make_config
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.training.metrics import read_metrics

Job = dict[str, Any]
"""Plain values: `id, config, tokens_dir, sts_dir, run_dir, score_before, use_gpu`."""

Result = dict[str, Any]
"""Of an evaluation: `step, score, last, seconds`, the untrained encoder's at step 0. At the end: `outcome`, either
``finished`` (with `score, steps, curve`) or ``failed`` (with `reason`), and `seconds`."""

STOP_S = 60.0
"""How long a stopped trial is waited for before its process is given up."""


class Stopped(Exception):
    """The trial was told to stop."""


class TrialProcess(tune.Trainable):
    """A Ray actor that trains one job after the other; one `step` is one evaluation."""

    run: TrialRun | None = None

    def setup(self, config: Job) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: Job) -> bool:
        self.cleanup()
        self.run = TrialRun(new_config)
        return True

    def step(self) -> Result:
        assert self.run is not None
        result = self.run.next()
        return {**result, "done": "outcome" in result}

    def cleanup(self) -> None:
        if self.run is not None:
            self.run.stop()
            self.run = None
            give_back_memory()


def give_back_memory() -> None:
    """Return freed memory to the system: each trial's thread leaves gigabytes in an arena of its own (seen with glibc,
    6 GB after 14 trials of a run that needs 2)."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class TrialRun:
    """One job, in a thread of this process or on Ray workers that the thread waits for."""

    def __init__(self, job: Job):
        self.job, self.config = job, make_config(job["config"])
        self.results: queue.Queue[Result] = queue.Queue()
        self.verdicts: queue.Queue[bool] = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True, name="trial")
        self.began: float | None = None

    def next(self) -> Result:
        """Let the trial go on to its next evaluation or end, and wait for that."""
        if self.began is None:
            self.began = time.monotonic()
            self.thread.start()
        else:
            self.verdicts.put(True)
        return {**self.results.get(), "seconds": time.monotonic() - self.began}

    def stop(self) -> None:
        """End the trial where it waits. RuntimeError if it does not end: its process cannot be used again."""
        if self.began is None:
            return
        self.verdicts.put(False)
        self.thread.join(STOP_S)
        if self.thread.is_alive():
            raise RuntimeError(f"trial {self.job['id']} did not stop within {STOP_S:.0f} s")

    def tell(self, result: Result) -> None:
        """Called where the training runs; Stopped if it is not to go on."""
        self.results.put(result)
        if not self.verdicts.get():
            raise Stopped

    def _run(self) -> None:
        try:
            train = _train_here if self.config.runtime.num_workers == 0 else _train_on_workers
            self.results.put({"outcome": "finished", **finished(train(self.job, self.config, self.tell), self.job)})
        except Stopped:
            pass
        except BaseException as error:
            self.results.put({"outcome": "failed", "reason": failure(error, Path(self.job["run_dir"]))})


def finished(result: dict[str, Any], job: Job) -> Result:
    """A run's result, and its evaluations: those of earlier attempts may not have been heard of."""
    records = read_metrics(Path(job["run_dir"]) / "metrics.jsonl")
    curve = [(r["step"], r["sts_dev"]) for r in records if r.get("sts_dev") is not None and r["step"] > 0]
    return {"score": result["sts_dev"], "steps": result["steps"], "before": result["sts_dev_before"], "curve": curve}


def failure(error: BaseException, run_dir: Path) -> str:
    """One line on why, and the whole of it in ``error.txt``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    text = " ".join(str(error).split())
    return text if isinstance(error, ClusterNSError) else f"{type(error).__name__}: {text}"


class Listener:
    """The hooks of a training loop on its first worker, turned into results."""

    def __init__(self, tell: Callable[[Result], Any]):
        self.tell, self.total_steps = tell, 0

    def watch(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self.total_steps = event["total_steps"]
        if event["event"] == "evaluation" and event["step"] == 0:
            self.tell({"step": 0, "score": event["sts_dev"], "last": False})

    def report(self, metrics: dict[str, Any]) -> None:
        last = metrics["step"] >= self.total_steps
        self.tell({"step": metrics["step"], "score": metrics["sts_dev"], "last": last})


def _train_here(job: Job, config: Config, tell: Callable[[Result], None]) -> dict[str, Any]:
    import torch

    from clusterns_ray.training.loop import train_worker

    device = torch.device("cuda" if job["use_gpu"] else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(config.runtime.cpus_per_worker)
    listener = Listener(tell)
    try:
        return train_worker(
            config,
            tokens_dir=job["tokens_dir"],
            sts_dir=job["sts_dir"],
            run_dir=job["run_dir"],
            device=device,
            watch=listener.watch,
            report=listener.report,
            score_before=job["score_before"],
        )
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _train_on_workers(job: Job, config: Config, tell: Callable[[Result], None]) -> dict[str, Any]:
    from clusterns_ray.tuning.nested import fit

    return fit(job, config, tell)
