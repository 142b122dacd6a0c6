"""A study file to a winner: which trial is next, and what becomes of it.

``STORAGE_PATH/NAME/`` holds the Optuna study, ``trials/NNNN/`` and ``confirmation/NNNN-seedS/`` (runs like any other),
and at the end ``result.json``, ``best.yaml``, ``trials.parquet`` and ``model/``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import statistics
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.exc import SQLAlchemyError

from clusterns_ray.config import Config, dump_config, make_config, parse_saved_config
from clusterns_ray.data.digests import check_digests, data_digests
from clusterns_ray.data.prepare import Prepared, cache_directory, check_batch, describe, most_rows, prepare
from clusterns_ray.errors import ClusterNSError, ConfigError, DamagedError, DataError, DiskError, StorageError
from clusterns_ray.evaluation.sts import StsTests, read_pairs
from clusterns_ray.io.files import checksum_holds, disk_fault, json_text, write_probe
from clusterns_ray.io.lease import Held, exclusive, leased
from clusterns_ray.io.object_store import Place
from clusterns_ray.launch.preflight import check_data, check_encoder, check_storage
from clusterns_ray.launch.ray_cluster import check_ray_directory
from clusterns_ray.launch.staging import run_directory, stage
from clusterns_ray.models.base_model import complete
from clusterns_ray.tuning.comparison import (
    difference_over_seeds,
    model_cosines,
    over_pairs,
    seed_interval,
    sentences,
    untrained_cosines,
)
from clusterns_ray.tuning.optuna_study import OptunaStudy, Proposal, file_error
from clusterns_ray.tuning.selection import Candidate, choose, copy_model, summary, top_trials, write_trials
from clusterns_ray.tuning.snapshot import FILES
from clusterns_ray.tuning.space import Overrides, with_values
from clusterns_ray.tuning.study import Study, dump_study

OnEvent = Callable[[dict[str, Any]], None]
Job = dict[str, Any]

FRUITLESS_ATTEMPTS = 5
"""A trial that takes the whole sweep down this often before its first evaluation is given up."""


def tune(study: Study, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
    """Run a study, or go on with it: what is finished is kept, what is half done is resumed.

    Args:
        on_event: called with what happens: ``{"event": "note" | "tokenised" | "trial" | "look", ...}``;
            ``look`` comes a few times a second, with the Optuna study.

    Returns:
        What ``result.json`` holds.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        ClusterNSError: no trial finished, or the cluster failed; what is finished is kept.
    """
    check_request(study)

    def note(text: str) -> None:
        on_event({"event": "note", "text": text})

    with readable_faults(study), owner(study, note) as permit:
        ledger = OptunaStudy(study, permit=permit)
        if ledger.begins_anew:
            note(
                f"{str(ledger.path)!r} is not there, though trials of an earlier study of that name are: the study "
                "begins anew. Runs of exactly the same configuration are kept, the others are replaced."
            )
        study.home.write("study.yaml", dump_study(study))
        sweep = Sweep(study, ledger, on_event)
        if sweep.exhausted():
            note(f"{study.config.name!r} is finished; raise the budget to go on with it.")
        else:
            _check_not_finalized(study)
            # What an earlier end of the study said is not its result any more.
            study.home.remove_file("result.json")
            _run(sweep)
        return write_outcome(study, ledger, note)


@contextmanager
def readable_faults(study: Study) -> Iterator[None]:
    """One line, with the remedy, where the disk fails or the study's file does, anywhere in a sweep.

    Raises:
        DiskError: the disk does not take what is written; no trial is lost by it.
        ClusterNSError: the study's file is locked or damaged.
    """
    try:
        yield
    except ClusterNSError:
        raise
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError) as error:
        raise file_error(study.directory / FILES[study.config.storage], error) from error
    except Exception as error:
        reason = disk_fault(error)
        if reason is None:
            raise
        raise DiskError(
            f"The study's files in {str(study.directory)!r} could not be written ({reason}). {DISK_REMEDY}"
        ) from error


DISK_REMEDY = "Free space there, or make it writable; then the same command goes on, and no trial is lost."


RAY_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # metrics.jsonl and the study hold what its loggers would write
    "TUNE_FORCE_TRIAL_CLEANUP_S": "10",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
RAY_START_SETTINGS = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
"""The first is Ray's default for a local start, said without its warning."""


def _run(sweep: Sweep) -> None:
    # Ray reads some of them when it is imported.
    for key, value in {**RAY_SETTINGS, **({} if os.environ.get("RAY_ADDRESS") else RAY_START_SETTINGS)}.items():
        os.environ.setdefault(key, value)
    from clusterns_ray.tuning.resources import cluster, trial_resources
    from clusterns_ray.tuning.tune_runner import Pool

    study, runtime = sweep.study, sweep.study.base.runtime
    with cluster(study, sweep.note, begun=bool(sweep.ledger.trials())) as use_gpu:
        sweep.prepare()
        sweep.use_gpu = use_gpu
        pool = Pool(
            sweep,
            concurrent=study.config.concurrent_trials,
            resources=trial_resources(study, use_gpu),
            max_failures=runtime.max_failures,
            directory=study.directory / "ray",
            start_timeout_s=runtime.start_timeout_s,
        )
        pool.start()
        try:
            while not pool.wait(0.3):
                sweep.ledger.permit()
                sweep.ledger.save_if_due()
                sweep.on_event({"event": "look", "study": sweep.ledger.optuna})
        except KeyboardInterrupt:
            sweep.note("Stopping. Trials that run keep their newest checkpoints; finished ones are kept.")
            raise
        finally:
            pool.stop()
        if not sweep.exhausted():
            raise ClusterNSError(
                "Ray Tune ended before the study did. What is finished is kept; the same command goes on."
            )


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
def owner(study: Study, note: Callable[[str], None] = lambda text: None) -> Iterator[Callable[[], None]]:
    """Hold the study alone, among all machines that share its store; ConfigError where another process does.

    Yields:
        What raises StorageError as soon as it is held no more.
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


class Sweep:
    """The source of a pool's jobs: first trials that were left half done, then proposals, then confirmations."""

    def __init__(self, study: Study, ledger: OptunaStudy, on_event: OnEvent):
        self.study, self.ledger, self.on_event = study, ledger, on_event
        self.use_gpu = False
        self._half_done = [trial.number for trial in ledger.running()]
        self._live: set[str] = set()
        self._confirmations: list[Job] | None = None
        self._prepared: dict[str, tuple[Prepared, dict[str, Any]]] = {}

    def note(self, text: str) -> None:
        self.on_event({"event": "note", "text": text})

    def prepare(self) -> None:
        """Tokenise the corpus, once for all trials."""
        prepared, _ = self._data(self.study.base)
        check_batches(self.study, prepared.manifest["rows"])
        self.note(("Corpus, as prepared before: " if prepared.reused else "Corpus: ") + describe(prepared.manifest))

    # ---- a pool's source ----------------------------------------------------------------------------------------

    def exhausted(self) -> bool:
        if self._half_done or not self.ledger.spent():
            return False
        if self._confirmations is None and not self._live:
            self._confirmations = self._plan_confirmations()
        return self._confirmations == []

    def next(self) -> Job | None:
        if self._live and not self._scores_before():
            return None  # the first trial is scoring the untrained encoder, for all
        while self._half_done:
            proposal = self._take_up(self._half_done.pop(0))
            if proposal is not None:
                return self._begin(proposal)
        if not self.ledger.spent():
            return self._begin(self.ledger.propose())
        if self._confirmations:
            job = self._confirmations.pop(0)
            self._live.add(job["id"])
            self.on_event({"event": "trial", "what": "begins", **_told(job)})
            return job
        return None

    def evaluated(self, job: Job, result: dict[str, Any]) -> bool:
        if result["step"] == 0:
            known, key = self._scores_before(), _encoder_key(job)
            if key not in known:
                self.ledger.remember("scores_before", {**known, key: result["score"]})
                self.ledger.save()
            return False
        self.ledger.tick()
        told = {"step": result["step"], "score": result["score"]}
        if job["number"] is None:
            self.on_event({"event": "trial", "what": "evaluated", **_told(job), **told})
            return False
        pruned = self.ledger.evaluated(
            job["number"], result["step"], result["score"], result["seconds"], result["last"]
        )
        self.on_event({"event": "trial", "what": "pruned" if pruned else "evaluated", **_told(job), **told})
        if pruned:
            self._close(job)
        return pruned

    def ended(self, job: Job, result: dict[str, Any]) -> None:
        number, seconds = job["number"], result["seconds"]
        if result["outcome"] != "finished":
            self._check_storage(job, result)
        if result["outcome"] == "finished":
            if number is not None:
                self.ledger.complete(number, result["score"], result["steps"], seconds, result["curve"])
            told = {"score": result["score"], "step": result["steps"]}
        else:
            if number is not None:
                self.ledger.fail(number, result["reason"], seconds)
            else:
                failures = self.ledger.recall("confirmation_failures", {})
                self.ledger.remember("confirmation_failures", {**failures, job["id"]: result["reason"]})
                self.ledger.save()
            told = {"reason": result["reason"]}
        self.on_event({"event": "trial", "what": result["outcome"], **_told(job), **told})
        self._close(job)

    def _check_storage(self, job: Job, result: dict[str, Any]) -> None:
        """End the sweep, and not the trial, where it is the storage that failed.

        A process that died of a full disk may not have told so, which is why the disk is tried as well.

        Raises:
            StorageError: the same command takes the trial up again.
        """
        reason = result["reason"] if result["outcome"] == "storage" else full_disk(self.study.directory)
        if reason is None:
            return
        if job["number"] is not None:
            with suppress(Exception):  # which is on the same disk
                self.ledger.begin_again(job["number"])
        self._live.discard(job["id"])
        raise DiskError(f"The sweep stopped in {job['id']}: {reason.rstrip('.')}. {DISK_REMEDY}")

    # ---- jobs ---------------------------------------------------------------------------------------------------

    def _take_up(self, number: int) -> Proposal | None:
        """A half-done trial again, unless it was begun too often in vain."""
        attempts = self.ledger.trials()[number].user_attrs.get("attempts", 0)
        proposal = self.ledger.resume(number)
        if attempts < FRUITLESS_ATTEMPTS:
            return proposal
        self.ledger.fail(number, f"was begun {attempts} times, and the sweep died each time before an evaluation")
        return None

    def _begin(self, proposal: Proposal) -> Job:
        name = f"{proposal.number:04d}"
        job = self._job(name, proposal.number, proposal.overrides)
        self._live.add(name)
        self.on_event({"event": "trial", "what": "begins", **_told(job)})
        return job

    def _job(self, name: str, number: int | None, overrides: Overrides) -> Job:
        runs = runs_of(self.study, number)
        config = trial_config(self.study, overrides, runs, name)
        if not is_run_of(runs / name, config):
            self.note(f"{(runs / name).address} is of another configuration, or damaged; it is replaced.")
            runs.remove(name)
        (runs / name).write("config.yaml", dump_config(config))
        _, staged = self._data(config)
        job: Job = {
            "id": name,
            "number": number,
            "values": overrides,
            "config": config.resolved(),
            "staged": staged,
            "run_dir": str(run_directory(config)),
            "use_gpu": self.use_gpu,
        }
        before = self._scores_before().get(_encoder_key(job))
        heard = None if number is None else -1 if before is None else self.ledger.heard(number)
        return {**job, "score_before": before, "heard": heard}

    def _plan_confirmations(self) -> list[Job]:
        failures = self.ledger.recall("confirmation_failures", {})
        jobs = []
        for run in planned_runs(self.study, self.ledger):
            if run.name not in failures and run.score(self.study) is None:
                jobs.append(self._job(run.name, None, run.overrides))
        return jobs

    def _data(self, config: Config) -> tuple[Prepared, dict[str, Any]]:
        """What a run reads, and where it is staged for machines that share a store alone."""
        values = config.identity()
        key = json.dumps([values["data"], values["encoder"], values["evaluation"]["sts"]], sort_keys=True)
        if key not in self._prepared:
            prepared = prepare(config, self.note, lambda rows: self.on_event({"event": "tokenised", "rows": rows}))
            self._check_unchanged(key, config, prepared)
            if self.study.home.store is not None:
                self.note(f"Staging its tokens in {self.study.base.runtime.storage_path}")
            # Beside the study, so that all its runs share them.
            self._prepared[key] = (
                prepared,
                stage(config.model_copy(update={"runtime": self.study.base.runtime}), prepared),
            )
        return self._prepared[key]

    def _check_unchanged(self, key: str, config: Config, prepared: Prepared) -> None:
        """Refuse to compare trials that read different data under one name."""
        known, key = self.ledger.recall("data", {}), hashlib.sha256(key.encode()).hexdigest()[:16]
        pairs = read_pairs(prepared.sts_dir, config.evaluation.dev) if prepared.sts_dir else None
        digests = data_digests(prepared.manifest, pairs)
        check_digests(f"The study {self.study.config.name!r}", known.get(key), digests)
        if key not in known:
            self.ledger.remember("data", {**known, key: digests})
            self.ledger.save()

    def _scores_before(self) -> dict[str, float]:
        return self.ledger.recall("scores_before", {})

    def _close(self, job: Job) -> None:
        self._live.discard(job["id"])
        remove_leftovers(
            runs_of(self.study, job["number"]) / job["id"], model=job["number"] is not None and self.study.confirms
        )


def full_disk(directory: Path) -> str | None:
    """Why nothing more can be written in a directory; None where it can. Real bytes, as a full disk takes names."""
    try:
        write_probe(directory / f".write-test-{uuid.uuid4().hex[:8]}")
    except OSError as error:
        return f"{str(directory)!r} cannot be written ({error.strerror})"
    return None


def runs_of(study: Study, number: int | None) -> Place:
    """Where the runs of trials are, or those that confirm (which have no number)."""
    return study.home / ("confirmation" if number is None else "trials")


def remove_leftovers(run: Place, model: bool) -> None:
    """Remove what an ended run needs no more. The models of confirmations stay, as one of them wins."""
    run.remove("checkpoints")
    if model:
        run.remove("model")


def clean_up(study: Study, ledger: OptunaStudy) -> None:
    """Remove what a kill, between the note of a run's end and this, has left; or a pruned trial, still copying."""
    runs = {f"trials/{trial.number:04d}": study.confirms for trial in ledger.ended()}
    runs |= {f"confirmation/{run.name}": False for run in planned_runs(study, ledger)}
    store = study.home.store
    there = None if store is None else {"/".join(name.split("/")[:3]) for name in store.names()}
    for name, model in runs.items():
        left = [f"{name}/checkpoints", *([f"{name}/model"] if model else [])]
        if there is None or there.intersection(left):
            remove_leftovers(study.home / name, model)


def trial_config(study: Study, overrides: Overrides, runs: Place, name: str) -> Config:
    """The base with a trial's values and what it leaves to its encoder, as a run of its own in ``runs``."""
    config = study.space.config(overrides, source=f"trial {name}")
    where = {
        "runtime.storage_path": runs.path,
        "runtime.name": name,
        "runtime.keep": 1,
        "runtime.trackers": [],
        "data.cache_dir": str(cache_directory(study.base)),
    }
    return complete(make_config(with_values(config.resolved(), where)))


def _told(job: Job) -> dict[str, Any]:
    return {"id": job["id"], "values": job["values"]}


def _encoder_key(job: Job) -> str:
    """What the untrained encoder's dev score depends on."""
    encoder = {key: value for key, value in job["config"]["encoder"].items() if key not in ("dropout", "head")}
    return json.dumps([encoder, job["config"]["train"]["precision"]], sort_keys=True)


# ---- the end ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A run beside the trials: of one of the best configurations with another seed, or of the base configuration."""

    trial: int | None
    """the trial that it confirms; None for the base configuration"""
    name: str
    seed: int
    overrides: Overrides

    def score(self, study: Study) -> float | None:
        """Its best dev score; None where it has not ended, or what lies there is the run of another configuration."""
        run = runs_of(study, None) / self.name
        return run_score(run, trial_config(study, self.overrides, runs_of(study, None), self.name))


def planned_runs(study: Study, ledger: OptunaStudy) -> list[Planned]:
    """Every run beside the trials, done or not; none before a trial has finished."""
    top = top_trials(ledger.ended(), study.config.confirmation.top)
    if not top:
        return []
    base = base_trial(study, ledger)
    confirmed = {trial.number for trial in top} if study.confirms else {base}
    baseline = [] if base is not None and base in confirmed else study.config.confirmation.seeds or [study.base.seed]
    return [Planned(None, f"base-seed{seed}", seed, {"seed": seed}) for seed in baseline] + [
        Planned(trial.number, f"{trial.number:04d}-seed{seed}", seed, {**values_of(study, trial), "seed": seed})
        for trial in top
        for seed in study.config.confirmation.seeds
    ]


def base_trial(study: Study, ledger: OptunaStudy) -> int | None:
    """The best finished trial with the very values of the base configuration; None where there is none."""
    for trial in top_trials(ledger.ended(), len(ledger.ended())):
        if study.space.config(values_of(study, trial)).fingerprint() == study.base.fingerprint():
            return trial.number
    return None


def is_run_of(run: Place, config: Config) -> bool:
    """Whether a directory is free, or holds a run of this configuration; not where its configuration is damaged."""
    try:
        text = run.read("config.yaml")
        return text is None or parse_saved_config(text, str(run.address)).fingerprint() == config.fingerprint()
    except (ConfigError, DataError, DamagedError):  # not a store that cannot be reached
        return False


def run_score(run: Place, config: Config) -> float | None:
    """The best dev score after a step of a run that has ended and is of this configuration; None for any other."""
    result = read_run_result(run)
    if result is None or not is_run_of(run, config):
        return None
    score = result.get("sts_dev_trained", result.get("sts_dev"))
    if isinstance(score, bool) or not isinstance(score, int | float):
        return None
    return float(score) if result.get("fingerprint", config.fingerprint()) == config.fingerprint() else None


def read_run_result(run: Place) -> dict[str, Any] | None:
    """A run's ``result.json``; None where there is none, or it is damaged."""
    try:
        result = json.loads(run.read("result.json") or "")
    except (ValueError, DamagedError):
        return None
    if not isinstance(result, dict) or ("checksum" in result and not checksum_holds(result)):
        return None
    return result


def values_of(study: Study, trial: optuna.trial.FrozenTrial) -> Overrides:
    """A trial's values by configuration key, as they were proposed."""
    return study.space.suggest(optuna.trial.FixedTrial(trial.params))


def candidates(study: Study, ledger: OptunaStudy) -> list[Candidate]:
    """The best trials with the scores of their confirmations."""
    scores: dict[int, dict[int, float]] = {}
    for run in planned_runs(study, ledger):
        score = run.score(study) if run.trial is not None else None
        if run.trial is not None and score is not None:
            scores.setdefault(run.trial, {})[run.seed] = score
    return [
        Candidate(trial.number, values_of(study, trial), trial.value or 0.0, scores.get(trial.number, {}))
        for trial in top_trials(ledger.ended(), study.config.confirmation.top)
    ]


def baseline(study: Study, ledger: OptunaStudy, found: list[Candidate]) -> Candidate | None:
    """The base configuration, by the same seeds as the others; None where none of its runs has ended."""
    number = base_trial(study, ledger)
    for candidate in found:
        if candidate.number == number and (candidate.scores or not study.confirms):
            return candidate
    runs = [run for run in planned_runs(study, ledger) if run.trial is None]
    scores = {run.seed: score for run in runs if (score := run.score(study)) is not None}
    if not study.confirms:
        trial = next((trial for trial in ledger.ended() if trial.number == number), None)
        score = trial.value if trial is not None else scores.get(study.base.seed)
        return None if score is None else Candidate(number, {}, score, {})
    return Candidate(number, {}, None, scores) if scores else None


def models_of(study: Study, candidate: Candidate) -> list[Place]:
    """The directories of a candidate's runs, one a seed, the trial's own where nothing was confirmed."""
    name = "base" if candidate.number is None or not candidate.overrides else f"{candidate.number:04d}"
    if candidate.scores:
        return [runs_of(study, None) / f"{name}-seed{seed}" for seed in sorted(candidate.scores)]
    if candidate.number is None:
        return [runs_of(study, None) / f"base-seed{study.base.seed}"]
    return [runs_of(study, candidate.number) / f"{candidate.number:04d}"]


def write_outcome(study: Study, ledger: OptunaStudy, note: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """``trials.parquet``, ``best.yaml``, ``model/`` and ``result.json``, from what the study and its runs hold."""
    home, trials = study.home, ledger.trials()
    clean_up(study, ledger)
    write_trials(home.local / "trials.parquet", trials, list(study.space.parameters))
    home.publish("trials.parquet")
    if not candidates(study, ledger):
        reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
        raise ClusterNSError(
            f"None of the {len(trials)} trials of {study.config.name!r} finished"
            + (f"; the last: {reasons[-1]}" if reasons else ".")
            + f" See {(home / 'trials').address!r}."
        )
    outcome = decide(study, ledger)
    winner, config = outcome.winner, study.space.config(outcome.winner.overrides)
    result = {
        "study": study.config.name,
        "dev": study.base.evaluation.dev,
        "sts_dev_before": outcome.before,
        "trials": {state: sum(t.state.name == state for t in trials) for state in ("COMPLETE", "PRUNED", "FAIL")},
        "seconds": round(ledger.recall("seconds", 0.0), 1),
        "seeds": study.config.confirmation.seeds,
        "winner": summary(winner),
        "base": summary(outcome.base) if outcome.base else None,
        "intervals": {
            name: seed_interval(list(candidate.scores.values())) if candidate else None
            for name, candidate in (("winner", winner), ("base", outcome.base))
        },
        "against": {},
        "model_is_trained": was_trained(best_run(study, winner)),
        "not_told_apart": [candidate.number for candidate in outcome.alike],
        "candidates": [summary(candidate) for candidate in outcome.candidates],
        "confirmation_failures": ledger.recall("confirmation_failures", {}),
        "best": (home / "best.yaml").address,
        "model": (home / "model").address,
    }
    result["against"] = compare_winner(study, ledger, outcome, result, note)
    best = make_config(with_values(config.resolved(), {"runtime.name": f"{study.config.name}-best"}))
    about = [*outcome_words(result), *sentences(result)]
    home.write("best.yaml", "".join(f"# {line}\n" for line in about) + dump_config(best))
    copy_model(best_run(study, winner).fetch("model"), home.local / "model", about)
    home.publish("model")
    ledger.save()
    home.write("result.json", json_text(result))  # last, as it says that everything is there
    return result


@dataclass(frozen=True)
class Outcome:
    """What a study's trials and confirmations decide."""

    candidates: list[Candidate]
    winner: Candidate
    alike: list[Candidate]
    """not to be told apart from the winner"""
    base: Candidate | None
    """the base configuration; None where its runs failed"""
    before: float | None
    """the dev score of the encoder that the winner started from, untrained"""


def decide(study: Study, ledger: OptunaStudy) -> Outcome:
    """The winner and what stands beside it; there has to be a candidate."""
    found = candidates(study, ledger)
    winner, alike = choose(found, len(study.config.confirmation.seeds))
    scores = ledger.recall("scores_before", {})
    key = _encoder_key({"config": complete(study.space.config(winner.overrides)).resolved()})
    return Outcome(found, winner, alike, baseline(study, ledger, found), scores.get(key))


def count_seeds(count: int) -> str:
    return "one further seed" if count == 1 else f"{count} further seeds"


def outcome_words(result: dict[str, Any]) -> list[str]:
    """What kind of score chose the winner of a study."""
    winner, dev = result["winner"], result["dev"]
    if not winner["scores"]:
        return [
            f"Trial {winner['trial']} of the study {result['study']}: {winner['mean']:.2f} on {dev} (Spearman x 100), "
            "the best of single runs, which no other seed confirmed."
        ]
    spread = "" if winner["deviation"] is None else f" +- {winner['deviation']:.2f}"
    return [
        f"Trial {winner['trial']} of the study {result['study']}: {winner['mean']:.2f}{spread} on {dev} (Spearman x "
        f"100) over {count_seeds(len(winner['scores']))}; model/ is that of the seed with the best score."
    ]


def compare_winner(
    study: Study, ledger: OptunaStudy, outcome: Outcome, result: dict[str, Any], note: Callable[[str], None]
) -> dict[str, dict[str, Any] | None]:
    """Score, difference and intervals of the winner against the untrained encoder and the base configuration.

    The intervals over the dev pairs need the models to be run; those of the last time are kept where no score changed.
    """
    winner = outcome.winner
    own = list(winner.scores.values()) or [winner.mean]
    others = {
        "untrained": None if outcome.before is None else [outcome.before],
        "base": outcome.base and (list(outcome.base.scores.values()) or [outcome.base.mean]),
    }
    kept = ledger.recall("comparison", {})
    if kept.get("of") != _compared(result):
        kept = {"of": _compared(result), "intervals": _pair_intervals(study, outcome, note)}
        ledger.remember("comparison", kept if kept["intervals"] else {})
    pairs = kept["intervals"]
    found: dict[str, dict[str, Any] | None] = {}
    for name, scores in others.items():
        if scores is None:
            found[name] = None
            continue
        score = statistics.fmean(scores)
        alone = name == "base" and len(scores) == 1  # of one seed nothing is known about others
        found[name] = {
            "score": score,
            "difference": winner.mean - score,
            "over_pairs": pairs.get(name),
            "over_seeds": None if alone else difference_over_seeds(own, scores),
        }
    return found


def _compared(result: dict[str, Any]) -> str:
    return json.dumps([result[key] for key in ("winner", "base", "sts_dev_before")], sort_keys=True)


def _pair_intervals(study: Study, outcome: Outcome, note: Callable[[str], None]) -> dict[str, Any]:
    """Over the dev pairs, by name of what the winner is compared with; empty where a model cannot be run."""
    config = study.space.config(outcome.winner.overrides)
    note("Comparing the winner with the untrained encoder and the base configuration on the pairs of the dev set")
    try:
        prepared = prepare(config, note)
        assert prepared.sts_dir is not None
        tests = StsTests({}, [read_pairs(prepared.sts_dir, config.evaluation.dev)])
        if not all(map(was_trained, models_of(study, outcome.winner))):
            note("No intervals over the dev pairs: a run of the winner exported the untrained encoder.")
            return {}
        winner = model_cosines([run.fetch("model") for run in models_of(study, outcome.winner)], tests)
        base = models_of(study, outcome.base) if outcome.base else []
        base = base if all(map(was_trained, base)) else []
        others = {
            "untrained": [untrained_cosines(config, tests)],
            "base": model_cosines([run.fetch("model") for run in base], tests),
        }
    except ClusterNSError as error:
        note(f"No intervals over the dev pairs, as a model could not be run: {error}")
        return {}
    return {name: found[config.evaluation.dev] for name, found in over_pairs(tests, winner, others).items()}


def was_trained(run: Place) -> bool:
    """Whether the ``model/`` of a run is that of a step: where none was better, it is the untrained encoder."""
    return (read_run_result(run) or {}).get("best_step") != 0


def best_run(study: Study, winner: Candidate) -> Place:
    """The winner's run with its best seed."""
    runs = models_of(study, winner)
    if not winner.scores:
        return runs[0]
    seeds = sorted(winner.scores)
    return runs[seeds.index(min(seeds, key=lambda seed: (-winner.scores[seed], seed)))]


def is_finished(study: Study, ledger: OptunaStudy) -> bool:
    """Whether every trial and every run beside them has come to an end, for this budget."""
    failures = ledger.recall("confirmation_failures", {})
    runs = planned_runs(study, ledger)
    return (
        bool(runs or ledger.ended())
        and ledger.spent()
        and not ledger.running()
        and all(run.name in failures or run.score(study) is not None for run in runs)
    )


def read_final(study: Study) -> dict[str, Any]:
    """What ``final.json`` holds.

    Raises:
        DataError: it is damaged.
    """
    try:
        value = json.loads(study.home.read("final.json") or "")
        if isinstance(value["when"], str) and isinstance(value["tasks"], dict) and isinstance(value["seeds"], list):
            return value
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(
        f"{(study.home / 'final.json').address!r} is damaged: it does not tell when the tests were looked at, and with "
        "which scores. Restore it from a copy; or remove it, and --finalize scores the same winner again."
    )


def _check_not_finalized(study: Study) -> None:
    if study.home.has("final.json"):
        raise ConfigError(
            f"The study {study.config.name!r} was finalized at {read_final(study)['when']}: its tests have been looked "
            "at, so nothing more may be chosen. Begin a study of another name."
        )
