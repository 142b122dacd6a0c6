"""What runs in a trial's process: training in a thread, which waits at every evaluation to be told to go on.

The process stays for the next trial. A trial that is to stop is told so at its next evaluation and returns by itself,
with everything it had started.
"""

from __future__ import annotations

import ctypes
import gc
import json
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray import tune

from clusterns_ray.config import Config, make_config
from clusterns_ray.errors import ClusterNSError, DiskError, StorageError
from clusterns_ray.io.files import disk_fault
from clusterns_ray.io.object_store import Place
from clusterns_ray.launch.staging import read_run_file, run_place
from clusterns_ray.tuning.distributed_trial import fit
from clusterns_ray.tuning.job import Job, Listener, Result, Stopped, run_context

STOP_S = 90.0
"""How long a stopped trial is waited for before its process is given up; a store gets its last files meanwhile."""


class TrialProcess(tune.Trainable):
    """A Ray actor that trains one job after the other; one `step` is one evaluation."""

    run: TrialRun | None = None
    storage_faults = 0
    """how often what this job did could not be kept"""

    def setup(self, config: Job) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: Job) -> bool:
        self.cleanup()
        self.run, self.storage_faults = TrialRun(new_config), 0
        return True

    def step(self) -> Result:
        while True:
            assert self.run is not None
            try:
                result = self.run.next()
            except StorageError as error:
                self.storage_faults += 1
                if isinstance(error, DiskError) or self.storage_faults > self.run.config.runtime.max_failures:
                    return {"outcome": "storage", "reason": str(error), "seconds": 0.0, "done": True}
                job = self.run.job
                self.cleanup()
                self.run = TrialRun(job)
                continue
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
        self.results: queue.Queue[Result | StorageError] = queue.Queue()
        self.verdicts: queue.Queue[bool] = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True, name="trial")
        self.began: float | None = None

    def next(self) -> Result:
        """Let the trial go on to its next evaluation or end, and wait for that.

        Raises:
            StorageError: what was done could not be kept; begun again, the trial goes on from what is there.
        """
        if self.began is None:
            self.began = time.monotonic()
            self.thread.start()
        else:
            self.verdicts.put(True)
        result = self.results.get()
        if isinstance(result, StorageError):
            raise result
        return {**result, "seconds": time.monotonic() - self.began}

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
            self.results.put({"outcome": "finished", **finished(train(self.job, self.config, self.tell), self.config)})
        except Stopped:
            pass
        except StorageError as error:  # no fault of the trial's values
            self.results.put(error)
        except BaseException as error:
            reason = disk_fault(error)
            if reason is not None:
                self.results.put(DiskError(f"The files of trial {self.job['id']} could not be written ({reason})."))
                return
            self.results.put({"outcome": "failed", "reason": failure(error, run_place(self.config))})


def finished(result: dict[str, Any], config: Config) -> Result:
    """A run's result, and its evaluations: those of earlier attempts may not have been heard of."""
    records = map(json.loads, (read_run_file(config, "metrics.jsonl") or "").splitlines())
    curve = [(r["step"], r["sts_dev"]) for r in records if r.get("sts_dev") is not None and r["step"] > 0]
    # Not the exported model's, which may be the untrained encoder: the search needs to know how the values did.
    return {
        "score": result["sts_dev_trained"],
        "steps": result["steps"],
        "before": result["sts_dev_before"],
        "curve": curve,
    }


def failure(error: BaseException, run: Place) -> str:
    """One line on why, and the whole of it in ``error.txt``."""
    with suppress(StorageError, OSError):  # which may be why it failed
        run.write("error.txt", "".join(traceback.format_exception(error)))
    text = " ".join(str(error).split())
    return text if isinstance(error, ClusterNSError) else f"{type(error).__name__}: {text}"


def _train_here(job: Job, config: Config, tell: Callable[[Result], None]) -> dict[str, Any]:
    import torch

    from clusterns_ray.launch.workers import check_gpu
    from clusterns_ray.training.loop import train_worker

    if job["use_gpu"]:
        check_gpu()
    device = torch.device("cuda" if job["use_gpu"] else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(config.runtime.cpus_per_worker)
    listener = Listener(tell, config, job["heard"])
    try:
        with run_context(job, config) as context:
            return train_worker(
                context,
                device,
                listener.on_event,
                on_evaluation=listener.report,
                score_before=job["score_before"],
            )
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _train_on_workers(job: Job, config: Config, tell: Callable[[Result], None]) -> dict[str, Any]:
    return fit(job, config, tell)
