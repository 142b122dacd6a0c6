"""From a study file to a winner: which run is next, and what becomes of it.

``STORAGE_PATH/NAME/`` holds the Optuna study, ``trials/NNNN/`` and ``confirmation/NNNN-seedS/`` (runs like any other),
and at the end ``result.json``, ``best.yaml``, ``trials.parquet`` and ``model/``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from clusterns_ray.config import Config, dump_config
from clusterns_ray.data.digests import check_digests, data_digests
from clusterns_ray.data.prepare import Prepared, check_batch, describe, most_rows, prepare
from clusterns_ray.errors import ClusterNSError, ConfigError, DiskError, GpuError, StorageError
from clusterns_ray.evaluation.sts import read_pairs
from clusterns_ray.io.events import OnEvent, OnNote, notes_to
from clusterns_ray.io.files import write_probe
from clusterns_ray.io.lease import Held, exclusive, leased
from clusterns_ray.launch.preflight import check_data, check_encoder, check_storage
from clusterns_ray.launch.ray_cluster import check_ray_directory
from clusterns_ray.launch.staging import stage
from clusterns_ray.tuning.events import StudyChecked, TrialBegan, TrialFailed, TrialScored
from clusterns_ray.tuning.job import Evaluation, Failed, Finished, GpuShare, Job, Result
from clusterns_ray.tuning.optuna_study import PER_GPU, OptunaStudy, Proposal, enqueued_points
from clusterns_ray.tuning.outcome import check_not_finalized, encoder_key, write_outcome
from clusterns_ray.tuning.packing import trial_bytes
from clusterns_ray.tuning.previous import PREVIOUS, about_earlier
from clusterns_ray.tuning.result import StudyResult
from clusterns_ray.tuning.runs import (
    PlannedRun,
    is_run_of,
    open_runs,
    remove_leftovers,
    run_config,
    runs_of,
)
from clusterns_ray.tuning.space import Overrides
from clusterns_ray.tuning.study import Study, dump_study
from clusterns_ray.tuning.study_file import DISK_REMEDY, readable_study_errors

FRUITLESS_ATTEMPTS = 5
"""A trial that takes the whole sweep down this often before its first evaluation is given up."""

LOOK_S = 0.3
"""Seconds between looks at a sweep that runs."""

RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl and the study hold what its loggers would write
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
RAY_START_SETTINGS = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
"""The first is Ray's default for a local start, set here to avoid its warning."""


def tune(study: Study, on_event: OnEvent = lambda event: None) -> StudyResult:
    """Run a study, or go on with it: what is finished is kept, what is half done is resumed.

    Args:
        study: as of :func:`~clusterns_ray.load_study`.
        on_event: called with each event as it happens (see ``clusterns_ray.tuning.events``).

    Returns:
        What ``result.json`` holds, with the winner's encoder as ``result.model`` and its configuration as
        ``result.best``.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        ClusterNSError: no trial finished, or the cluster failed; what is finished is kept.
    """
    check_request(study)
    note = notes_to(on_event)
    with readable_study_errors(study), owner(study, note) as permit:
        optuna_study = OptunaStudy(study, permit=permit)
        if optuna_study.begins_anew:
            note(
                f"{str(optuna_study.path)!r} is not there, though trials of an earlier study of that name are: the "
                "study begins anew. Runs of exactly the same configuration are kept, the others are replaced."
            )
        study.home.write("study.yaml", dump_study(study))
        for text in about_earlier(optuna_study.optuna):
            note(text)
        sweep = Sweep(study, optuna_study, on_event)
        if sweep.is_complete():
            note(f"{study.config.name!r} is finished; raise the budget to go on with it. {sweep.ended_by()}")
        else:
            check_not_finalized(study)
            study.home.remove_file("result.json")  # that of an earlier budget
            run_on_ray(sweep)
        waiting = len(enqueued_points(study.home, study.space, optuna_study.optuna, note))
        if waiting:
            note(f"Enqueued points that the budget had no trial for: {waiting}. Raise it, and they are tried first.")
        return StudyResult(write_outcome(study, optuna_study, on_event))


def run_on_ray(sweep: Sweep) -> None:
    """Run what is left of a study on the cluster of RAY_ADDRESS, or on a Ray that is started here."""
    # Ray reads some of them when it is imported.
    for key, value in {**RAY_SETTINGS, **({} if os.environ.get("RAY_ADDRESS") else RAY_START_SETTINGS)}.items():
        os.environ.setdefault(key, value)
    from clusterns_ray.tuning.gauges import with_trial_gauges
    from clusterns_ray.tuning.resources import cluster, trial_resources
    from clusterns_ray.tuning.tune_runner import Pool

    study, runtime = sweep.study, sweep.study.base.runtime
    with cluster(study, sweep.note, begun=bool(sweep.optuna_study.trials())) as share:
        sweep.prepare()
        sweep.share = share
        sweep.optuna_study.remember(PER_GPU, share.trials)
        sweep.on_event = with_trial_gauges(sweep.on_event, study.config.name)
        with Pool(
            resources=trial_resources(study, share),
            max_failures=runtime.max_failures,
            directory=study.directory / "ray",
            start_timeout_s=runtime.start_timeout_s,
        ) as pool:
            try:
                run_jobs(sweep, pool)
            except KeyboardInterrupt:
                sweep.note("Stopping. Trials that run keep their newest checkpoints; finished ones are kept.")
                raise


class Jobs(Protocol):
    """What runs jobs: ``clusterns_ray.tuning.tune_runner.Pool``, whose methods these are."""

    def begin(self, job: Job) -> None: ...
    def wait(self, timeout_s: float) -> tuple[Job, Result] | None: ...
    def answer(self, go_on: bool) -> None: ...


def run_jobs(sweep: Sweep, jobs: Jobs) -> None:
    """The loop of a sweep, until nothing is left to run."""
    while True:
        while (job := sweep.next_job()) is not None:
            jobs.begin(job)
        if not sweep.live:
            return
        received = jobs.wait(LOOK_S)
        sweep.look()
        match received:
            case (job, Evaluation() as evaluation):
                jobs.answer(go_on=not sweep.prunes(job, evaluation))
            case (job, result):
                sweep.close(job, result)


class Sweep:
    """Which job is next, and what its results change in the study."""

    def __init__(self, study: Study, optuna_study: OptunaStudy, on_event: OnEvent) -> None:
        self.study, self.optuna_study, self.on_event = study, optuna_study, on_event
        self.note = notes_to(on_event)
        self.share = GpuShare()
        self.live: set[str] = set()
        """Names of the jobs that run."""
        self._half_done = [trial.number for trial in optuna_study.running()]
        self._confirmations: list[PlannedRun] | None = None
        """Those still to run; None while trials do."""
        self._prepared: dict[str, tuple[Prepared, dict[str, Any]]] = {}
        self._shown_at = 0.0

    def look(self) -> None:
        """What is done a few times a second: check the lease, save the study if it is time, show it."""
        self.optuna_study.permit()
        self.optuna_study.save_if_due()
        if time.monotonic() - self._shown_at > LOOK_S:
            self._shown_at = time.monotonic()
            self.on_event(StudyChecked(self.optuna_study.optuna))

    def prepare(self) -> None:
        """Tokenise the corpus, once for all trials."""
        prepared, _ = self._data(self.study.base)
        check_batches(self.study, prepared.manifest["rows"])
        self.note(("Corpus, as prepared before: " if prepared.reused else "Corpus: ") + describe(prepared.manifest))

    # ---- which job is next ---------------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """Whether no job is left to begin, whatever becomes of those that run."""
        if self._half_done or not self.optuna_study.budget_spent():
            return False
        if self._confirmations is None and not self.live:
            self._confirmations = open_runs(self.study, self.optuna_study)
        return self._confirmations == []

    def next_job(self) -> Job | None:
        """A job to begin now: a half-done trial, a new one, or a run that confirms, in this order.

        None if there is no room for it, if it has to wait for a job that runs, or if there are no more.
        """
        if len(self.live) >= self.study.config.concurrent_trials:
            return None
        if self.live and not self._scores_before():
            return None  # the first trial is scoring the untrained encoder, for all
        while self._half_done:
            proposal = self._take_up(self._half_done.pop(0))
            if proposal is not None:
                return self._begin(f"{proposal.number:04d}", proposal.number, proposal.overrides)
        if not self.ended_by():
            proposal = self.optuna_study.propose(self.note)
            return self._begin(f"{proposal.number:04d}", proposal.number, proposal.overrides)
        if not self.is_complete() and self._confirmations:
            run = self._confirmations.pop(0)
            return self._begin(run.name, None, run.overrides)
        return None

    def ended_by(self) -> str:
        """Why no further trial begins, in a sentence that the study keeps and that is noted once; empty if one does."""
        reason = self.optuna_study.ended_by()
        text = f"No further trial begins: {reason}." if reason else ""
        if text != self.optuna_study.recall("ended_by", ""):
            self.optuna_study.remember("ended_by", text)
            if text:
                self.note(text)
        return text

    def _take_up(self, number: int) -> Proposal | None:
        """Resume a half-done trial; None where it fails, as too many attempts at it ended before an evaluation."""
        attempts = self.optuna_study.trial(number).user_attrs.get("attempts", 0)
        proposal = self.optuna_study.resume(number)
        if attempts < FRUITLESS_ATTEMPTS:
            return proposal
        reason = f"was begun {attempts} times, and the sweep died each time before an evaluation"
        self.optuna_study.fail(number, reason)
        return None

    def _begin(self, name: str, number: int | None, overrides: Overrides) -> Job:
        runs = runs_of(self.study, number)
        config = run_config(self.study, overrides, runs, name)
        if not is_run_of(runs / name, config):
            self.note(f"{(runs / name).address} is of another configuration, or damaged; it is replaced.")
            runs.remove(name)
        (runs / name).write("config.yaml", dump_config(config))
        if number is not None and self.study.config.minimize == "memory":
            self.optuna_study.note_memory(number, trial_bytes(config, gpu=self.share.use_gpu))
        _, staged = self._data(config)
        before = self._scores_before().get(encoder_key(config))
        known_step = None
        if number is not None:
            known_step = -1 if before is None else self.optuna_study.known_step(number)
        self.live.add(name)
        share = self.share
        job = Job(name, number, overrides, config, staged, share.use_gpu, share.trials, before, known_step)
        self.on_event(TrialBegan(name, overrides))
        return job

    def _data(self, config: Config) -> tuple[Prepared, dict[str, Any]]:
        """What a run reads, and where it is staged for machines that share only an object store."""
        values = config.identity()
        key = json.dumps([values["data"], values["encoder"], values["evaluation"]["sts"]], sort_keys=True)
        if key not in self._prepared:
            prepared = prepare(config, self.on_event)
            self._check_unchanged(key, config, prepared)
            if self.study.home.store is not None:
                self.note(f"Staging its tokens in {self.study.base.runtime.storage_path}")
            # Beside the study, so that all its runs share them.
            beside = config.model_copy(update={"runtime": self.study.base.runtime})
            self._prepared[key] = prepared, stage(beside, prepared)
        return self._prepared[key]

    def _check_unchanged(self, key: str, config: Config, prepared: Prepared) -> None:
        """Refuse to compare trials that read different data under one name."""
        known, key = self.optuna_study.recall("data", {}), hashlib.sha256(key.encode()).hexdigest()[:16]
        pairs = read_pairs(prepared.sts_dir, config.evaluation.dev) if prepared.sts_dir else None
        digests = data_digests(prepared.manifest, pairs)
        what = f"The study {self.study.config.name!r}"
        if self.optuna_study.recall(PREVIOUS):
            what += " (or one under its `previous`)"
        check_digests(what, known.get(key), digests)
        if key not in known:
            self.optuna_study.remember("data", {**known, key: digests})
            self.optuna_study.save()

    def _scores_before(self) -> dict[str, float]:
        return self.optuna_study.recall("scores_before", {})

    # ---- what becomes of it --------------------------------------------------------------------------------------

    def prunes(self, job: Job, evaluation: Evaluation) -> bool:
        """Put an evaluation into the study. Returns whether the job ends here."""
        if evaluation.step == 0:
            known, key = self._scores_before(), encoder_key(job.config)
            if key not in known:
                self.optuna_study.remember("scores_before", {**known, key: evaluation.score})
                self.optuna_study.save()
            return False
        self.optuna_study.add_elapsed_time()
        pruned = job.number is not None and self.optuna_study.report(job.number, evaluation)
        state = "pruned" if pruned else "evaluated"
        self.on_event(TrialScored(job.name, state, evaluation.step, evaluation.score))
        if pruned:
            self._tidy(job)
        return pruned

    def close(self, job: Job, result: Result) -> None:
        """Put a job's own end into the study.

        Raises:
            DiskError, GpuError: The storage or a GPU and not the job failed, so the sweep ends; the same command takes
                the job up again.
        """
        if job.number is None:
            seconds = self.optuna_study.recall("confirmation_seconds", 0.0) + result.seconds
            self.optuna_study.remember("confirmation_seconds", seconds)
        if isinstance(result, Finished):
            if job.number is not None:
                self.optuna_study.complete(job.number, result)
            self.on_event(TrialScored(job.name, "finished", result.steps, result.score))
        elif isinstance(result, Failed):
            self._check_fault(job, result)
            if job.number is not None:
                self.optuna_study.fail(job.number, result.reason, result.seconds)
            else:
                failures = self.optuna_study.recall("confirmation_failures", {})
                self.optuna_study.remember("confirmation_failures", {**failures, job.name: result.reason})
                self.optuna_study.save()
            self.on_event(TrialFailed(job.name, result.reason))
        self._tidy(job)

    def _check_fault(self, job: Job, result: Failed) -> None:
        # A process that died of a full disk may not have said so, which is why the disk is tried as well.
        reason = result.reason if result.fault else full_disk(self.study.directory)
        if reason is None:
            return
        if job.number is not None:
            with suppress(Exception):  # the study is on the same disk
                self.optuna_study.take_back(job.number)
        text = f"The sweep stopped in {job.name}: {reason.rstrip('.')}."
        if result.fault == "gpu":
            raise GpuError(text, "Then the same command goes on, and no trial is lost.")
        raise DiskError(text, DISK_REMEDY)

    def _tidy(self, job: Job) -> None:
        self.live.discard(job.name)
        remove_leftovers(
            runs_of(self.study, job.number) / job.name, model=job.number is not None and self.study.confirms
        )


# ---- before anything starts ---------------------------------------------------------------------------------------


def check_request(study: Study) -> None:
    """Refuse what cannot work, for the base and for each encoder of the space."""
    check_ray_directory()
    check_data(study.base)
    check_storage(study.base)
    check_encoder(study.base)
    check_batches(study, most_rows(study.base))
    for name, parameter in study.space.parameters.items():
        if name.startswith("encoder."):
            for value in parameter.ends():
                check_encoder(study.space.config({name: value}))


def check_batches(study: Study, rows: int | None) -> None:
    """Refuse a study that would try a batch larger than the corpus; ``rows`` is None if not known."""
    batches = study.space.parameters.get("train.global_batch_size")
    for value in batches.ends() if batches else [study.base.train.global_batch_size]:
        train = study.base.train.model_copy(update={"global_batch_size": value})
        check_batch(study.base.model_copy(update={"train": train}), rows)


@contextmanager
def owner(study: Study, note: OnNote = lambda text: None) -> Iterator[Callable[[], None]]:
    """Hold the study alone, among all machines that share its store; ConfigError if another process does.

    Yields:
        A function that raises StorageError as soon as another process has taken over.
    """
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(study.directory, True, wait_s=2.0))
            lease = held.enter_context(leased(study.home.store, True, wait_s=2.0, note=note))
        except StorageError:
            raise
        except ClusterNSError as error:
            who = str(error.holder) if isinstance(error, Held) else "another process"
            raise ConfigError(
                f"The study {study.config.name!r} is being run by {who}. Look at it with --status, let it finish, or "
                "end it."
            ) from None
        yield lease.check if lease else lambda: None


def full_disk(directory: Path) -> str | None:
    """Why nothing more can be written in a directory; None if it can. Real bytes are tried: a full disk takes names."""
    try:
        write_probe(directory / f".write-test-{uuid.uuid4().hex[:8]}")
    except OSError as error:
        return f"{str(directory)!r} cannot be written ({error.strerror})"
    return None
