"""Ray Tune as a pool of processes that run the jobs of a sweep.

The sweep decides what is proposed, stopped and counted. Tune runs in a thread and keeps nothing that matters; its own
resumption is not used.
"""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from clusterns_ray.errors import ClusterNSError
from clusterns_ray.tuning.job import Failed, Job, Result
from clusterns_ray.tuning.trial import TrialProcess

STOP_S = 60.0
"""How long jobs are given to end when the pool closes."""


class Pool:
    """Begins jobs and returns their results, to the one thread that opened it (``with Pool(...) as pool``).

    Args:
        resources: What the process of one job needs, as Ray counts it.
        max_failures: How often a job whose process dies is begun again, from its own checkpoint.
        directory: For what Tune writes; removed afterwards.
        start_timeout_s: How long no job may run before there is an error.
    """

    def __init__(
        self, *, resources: dict[str, float], max_failures: int, directory: Path, start_timeout_s: float
    ) -> None:
        self.start_timeout_s, self._directory = start_timeout_s, directory
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[tuple[Job, Result]] = queue.SimpleQueue()
        self.verdicts: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.live: dict[str, Job] = {}
        """The jobs that Tune has taken and not ended, by Tune's trial id."""
        self.started: set[str] = set()
        self.stopped: set[str] = set()
        self.closing = False
        self._error: BaseException | None = None
        self._idle_since = time.monotonic()
        shutil.rmtree(directory, ignore_errors=True)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns of missing files that nobody reads
        self._tuner = tune.Tuner(
            tune.with_resources(TrialProcess, resources),
            tune_config=TuneConfig(
                search_alg=_Feed(self), scheduler=_Verdicts(self), num_samples=-1, reuse_actors=True
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=str(directory),
                failure_config=FailureConfig(max_failures=max_failures),
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
                stop=_Stop(self),
                callbacks=[_Starts(self)],
                verbose=0,
            ),
        )
        self._thread = threading.Thread(target=self._fit, daemon=True, name="tune")
        # Not Thread.join: after Control-C it takes a running thread for one that has ended (Python 3.11).
        self._ended = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its search algorithm for a resumption that is not used."""
        return {}

    def __enter__(self) -> Pool:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Let no job go on. Each keeps its newest checkpoint."""
        self.closing = True
        self.jobs.put(None)
        self.verdicts.put(False)
        self._ended.wait(STOP_S)

    def begin(self, job: Job) -> None:
        """Run a job as soon as there is room for it."""
        self.jobs.put(job)

    def wait(self, timeout_s: float) -> tuple[Job, Result] | None:
        """The next result of any job; None if none came in time. An evaluation has to be answered.

        Raises:
            ClusterNSError: No job starts, or Tune ended by itself.
        """
        try:
            return self.results.get(timeout=timeout_s)
        except queue.Empty:
            pass
        if self._ended.is_set():
            raise self._error or ClusterNSError(
                "Ray Tune ended before the study did. Finished trials are kept; the same command goes on."
            )
        if self.started or not self.live:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > self.start_timeout_s:
            raise ClusterNSError(
                f"No trial started within runtime.start_timeout_s ({self.start_timeout_s:.0f} s). Is the cluster busy, "
                "or are its nodes not coming up? Finished trials are kept; the same command goes on."
            )
        return None

    def answer(self, go_on: bool) -> None:
        """Whether the job of the evaluation that :meth:`wait` returned goes on."""
        self.verdicts.put(go_on)

    def _fit(self) -> None:
        try:
            self._tuner.fit()
        except BaseException as error:
            self._error = error
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._ended.set()


class _Feed(Searcher):
    """Gives Tune the jobs that were begun, and takes their ends."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def suggest(self, trial_id: str) -> Any:
        try:
            # Without a live job Tune would sleep a second before it asks again, so it waits here.
            job = None if self.pool.closing else self.pool.jobs.get(block=not self.pool.live)
        except queue.Empty:
            return None
        if job is None:
            return Searcher.FINISHED
        self.pool.live[trial_id] = job
        return {"job": job}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self.pool.live.pop(trial_id, None)
        self.pool.started.discard(trial_id)
        if self.pool.closing or job is None or trial_id in self.pool.stopped:
            return
        if error:
            died = Failed("its process died, again after each retry; see Ray's logs (out of memory?)")
            self.pool.results.put((job, died))
        else:
            assert result is not None
            self.pool.results.put((job, result["result"]))

    def save(self, checkpoint_path: str) -> None:
        """Nothing is saved, though Tune asks for it: a sweep goes on from its Optuna study."""


class _Verdicts(FIFOScheduler):
    """Waits after every evaluation for the sweep's verdict."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        pool, trial_id = self.pool, trial.trial_id
        if pool.closing or trial_id in pool.stopped:
            return TrialScheduler.STOP
        pool.results.put((pool.live[trial_id], result["result"]))
        if pool.verdicts.get():
            return TrialScheduler.CONTINUE
        pool.stopped.add(trial_id)
        return TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.pool.started.discard(trial.trial_id)


class _Stop(Stopper):
    """Ends all jobs when the pool closes."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.pool.closing


class _Starts(Callback):
    """Notes which jobs have a process."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.pool.started.add(trial.trial_id)
