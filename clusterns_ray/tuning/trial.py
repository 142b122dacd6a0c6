"""The process of a trial: training in a thread, which waits at every evaluation for the verdict on it.

The process stays for the next trial. A trial that is stopped returns by itself, with everything it had started.
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
from dataclasses import replace
from typing import Any

from ray import tune

from clusterns_ray.errors import ClusterNSError, DiskError, GpuError, StorageError
from clusterns_ray.io.files import disk_fault
from clusterns_ray.io.object_store import Place
from clusterns_ray.launch.staging import read_run_file, run_place
from clusterns_ray.tuning.distributed_trial import train_on_workers
from clusterns_ray.tuning.job import Evaluation, Failed, Finished, Job, Result, Stopped
from clusterns_ray.tuning.reporting import Reporter, run_context

STOP_S = 90.0
"""How long a stopped trial may take before its process is given up; an object store gets its last files meanwhile."""


class TrialProcess(tune.Trainable):
    """A Ray actor that trains one job after the other; one ``step`` is one evaluation."""

    run: TrialRun | None = None
    storage_faults = 0
    """How often files of the present job could not be kept."""

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self.run, self.storage_faults = TrialRun(new_config["job"]), 0
        return True

    def step(self) -> dict[str, Any]:
        result = self._next()
        return {"result": result, "done": not isinstance(result, Evaluation)}

    def _next(self) -> Result:
        while True:
            assert self.run is not None
            try:
                return self.run.next()
            except StorageError as error:
                self.storage_faults += 1
                job = self.run.job
                if isinstance(error, DiskError) or self.storage_faults > job.config.runtime.max_failures:
                    return Failed(str(error), fault="storage")
                self.cleanup()
                self.run = TrialRun(job)

    def cleanup(self) -> None:
        if self.run is not None:
            self.run.stop()
            self.run = None
            return_memory()


def return_memory() -> None:
    """Return freed memory to the system.

    Each trial's thread leaves an arena of its own behind; with glibc that was 6 GB after 14 trials of 2 GB each.
    """
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class TrialRun:
    """One job, in a thread of this process or on Ray workers that the thread waits for."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.results: queue.Queue[Result | StorageError] = queue.Queue()
        self.verdicts: queue.Queue[bool] = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True, name="trial")
        self.began: float | None = None

    def next(self) -> Result:
        """Let the job go on to its next evaluation or its end, and wait for that.

        Raises:
            StorageError: What was done could not be kept; begun again, the job goes on from what is there.
        """
        if self.began is None:
            self.began = time.monotonic()
            self.thread.start()
        else:
            self.verdicts.put(True)
        result = self.results.get()
        if isinstance(result, StorageError):
            raise result
        return replace(result, seconds=time.monotonic() - self.began)

    def stop(self) -> None:
        """End the job where it waits.

        Raises:
            RuntimeError: It does not end, so its process cannot be used again.
        """
        if self.began is None:
            return
        self.verdicts.put(False)
        self.thread.join(STOP_S)
        if self.thread.is_alive():
            raise RuntimeError(f"trial {self.job.name} did not stop within {STOP_S:.0f} s")

    def report(self, evaluation: Evaluation) -> None:
        """Called by the training: send an evaluation, and wait for the verdict on it.

        Raises:
            Stopped: The job is not to go on.
        """
        self.results.put(evaluation)
        if not self.verdicts.get():
            raise Stopped

    def _run(self) -> None:
        job = self.job
        try:
            train = train_here if job.config.runtime.num_workers == 0 else train_on_workers
            self.results.put(finished(job, train(job, self.report)))
        except Stopped:
            pass
        except StorageError as error:  # no fault of the trial's values
            self.results.put(error)
        except GpuError as error:
            self.results.put(Failed(str(error), fault="gpu"))
        except BaseException as error:
            reason = disk_fault(error)
            if reason is not None:
                self.results.put(DiskError(f"The files of trial {job.name} could not be written ({reason})."))
            else:
                self.results.put(Failed(failure(error, run_place(job.config))))


def finished(job: Job, result: dict[str, Any]) -> Finished:
    """A job's end, with all its evaluations: the study may not know those of earlier attempts."""
    records = map(json.loads, (read_run_file(job.config, "metrics.jsonl") or "").splitlines())
    curve = [(r["step"], r["sts_dev"]) for r in records if r.get("sts_dev") is not None and r["step"] > 0]
    # Not the exported model's score, which may be the untrained encoder's: the search asks how the values did.
    return Finished(result["sts_dev_trained"], result["steps"], tuple(curve))


def failure(error: BaseException, run: Place) -> str:
    """The reason in one line; the whole traceback goes into the run's ``error.txt``."""
    with suppress(StorageError, OSError):  # the storage may be why it failed
        run.write("error.txt", "".join(traceback.format_exception(error)))
    text = " ".join(str(error).split())
    return text if isinstance(error, ClusterNSError) else f"{type(error).__name__}: {text}"


def train_here(job: Job, report: Callable[[Evaluation], None]) -> dict[str, Any]:
    """Train in this process, on its GPU if the job has one."""
    import torch

    from clusterns_ray.launch.workers import check_gpu
    from clusterns_ray.training.loop import train_worker

    if job.use_gpu:
        check_gpu()
    device = torch.device("cuda" if job.use_gpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(job.config.runtime.cpus_per_worker)
    else:  # so that a trial that needs more fails by itself, and not its neighbours
        torch.cuda.set_per_process_memory_fraction(1 / job.trials_per_gpu)
    reporter = Reporter(job, report)
    try:
        with run_context(job) as context:
            return train_worker(
                context,
                device,
                reporter.on_event,
                on_evaluation=reporter.on_evaluation,
                score_before=job.score_before,
            )
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
