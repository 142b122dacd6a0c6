"""Ray Tune as a pool of processes: it asks for jobs, runs each where there is room, and says what became of it.

What is proposed, stopped and counted is decided elsewhere (a :class:`Source`); Tune keeps nothing that matters. Its own
resumption is not used.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from clusterns_ray.errors import ClusterNSError
from clusterns_ray.tuning.job import Job, Result
from clusterns_ray.tuning.trial import TrialProcess


class Source(Protocol):
    """Where jobs come from. Called from one thread."""

    def next(self) -> Job | None:
        """A job to begin now; None if it has to wait for one that runs, or if there is no more."""
        ...

    def exhausted(self) -> bool:
        """Whether there will be no more jobs, whatever becomes of those that run."""
        ...

    def evaluated(self, job: Job, result: Result) -> bool:
        """Hear of an evaluation; whether the job ends here."""
        ...

    def ended(self, job: Job, result: Result) -> None:
        """Hear of a job's own end."""
        ...


class Pool:
    """Run the jobs of ``source``, at most ``concurrent`` at a time.

    Args:
        resources: of one job's process, as Ray counts them.
        max_failures: how often a job whose process dies is begun again, from its own checkpoint.
        directory: for what Tune writes; removed afterwards.
        start_timeout_s: how long no job may run before there is an error.
    """

    def __init__(
        self,
        source: Source,
        *,
        concurrent: int,
        resources: dict[str, float],
        max_failures: int,
        directory: Path,
        start_timeout_s: float,
    ):
        self.source, self.concurrent, self.start_timeout_s = source, concurrent, start_timeout_s
        self.live: dict[str, Job] = {}
        self.begun: set[str] = set()
        self.closed: set[str] = set()
        """stopped at an evaluation: whatever Tune still has to say of them"""
        self.stopping = False
        self.error: BaseException | None = None
        self._idle_since = time.monotonic()
        self._directory = directory
        shutil.rmtree(directory, ignore_errors=True)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns that what nobody reads is not there
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
        # Not Thread.join: interrupted by Control-C it takes a thread that runs for one that has ended (Python 3.11).
        self._done = threading.Event()

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes itself down with all it holds, for a resumption that is not used."""
        return {}

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether all is done; raises what went wrong."""
        if not self._done.wait(timeout_s):
            self._check_start()
            return False
        if self.error is not None:
            raise self.error
        return True

    def stop(self, timeout_s: float = 60.0) -> None:
        """Let no job go on. Each keeps its newest checkpoint."""
        self.stopping = True
        self._done.wait(timeout_s)

    def _fit(self) -> None:
        try:
            self._tuner.fit()
        except BaseException as error:
            self.error = self.error or error
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._done.set()

    def _check_start(self) -> None:
        if self.begun or not self.live or self.stopping:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > self.start_timeout_s:
            self.stopping = True
            raise ClusterNSError(
                f"No trial started within runtime.start_timeout_s ({self.start_timeout_s:.0f} s). Is the cluster busy, "
                "or are its nodes not coming up? Finished trials are kept; the same command goes on."
            )

    def guard(self, call: Any, *arguments: Any) -> Any:
        """A call into the source; its error ends the pool and is raised by :meth:`wait` as it is."""
        if self.stopping:
            return None
        try:
            return call(*arguments)
        except BaseException as error:
            self.error, self.stopping = error, True
            return None


class _Feed(Searcher):
    """Tune's questions for jobs, passed on."""

    def __init__(self, pool: Pool):
        super().__init__()
        self.pool = pool

    def suggest(self, trial_id: str) -> Any:
        pool = self.pool
        if pool.stopping or pool.guard(pool.source.exhausted):
            return Searcher.FINISHED
        job = pool.guard(pool.source.next) if len(pool.live) < pool.concurrent else None
        if job is not None:
            pool.live[trial_id] = job
        return job

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pool, job = self.pool, self.pool.live.get(trial_id)
        if pool.stopping or job is None:
            return
        if error:
            result = {
                "outcome": "failed",
                "reason": "its process died, again after each retry; see Ray's logs (out of memory?)",
                "seconds": 0.0,
            }
        assert result is not None
        if trial_id not in pool.closed:
            pool.guard(pool.source.ended, job, result)
        pool.live.pop(trial_id)
        pool.begun.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the source keeps what matters."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from its Optuna study")


class _Verdicts(FIFOScheduler):
    """Asks after every evaluation whether the job ends there."""

    def __init__(self, pool: Pool):
        super().__init__()
        self.pool = pool

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        pool, trial_id = self.pool, trial.trial_id
        if trial_id not in pool.closed and pool.guard(pool.source.evaluated, pool.live[trial_id], result):
            pool.closed.add(trial_id)
        return TrialScheduler.STOP if trial_id in pool.closed else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.pool.begun.discard(trial.trial_id)


class _Stop(Stopper):
    """Ends the whole pool when it is told to."""

    def __init__(self, pool: Pool):
        self.pool = pool

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.pool.stopping


class _Starts(Callback):
    def __init__(self, pool: Pool):
        self.pool = pool

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.pool.begun.add(trial.trial_id)
