"""A study file to a winner: which trial is next, and what becomes of it.

``STORAGE_PATH/NAME/`` holds the Optuna study, ``trials/NNNN/`` and ``confirmation/NNNN-seedS/`` (runs like any other),
and at the end ``result.json``, ``best.yaml``, ``trials.parquet`` and ``model/``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import optuna

from clusterns_ray.config import Config, dump_config, make_config
from clusterns_ray.data.digests import check_digests, data_digests
from clusterns_ray.data.prepare import Prepared, cache_directory, describe, prepare
from clusterns_ray.errors import ClusterNSError, ConfigError, StorageError
from clusterns_ray.evaluation.sts import read_pairs
from clusterns_ray.files import json_text
from clusterns_ray.launch.places import run_directory, stage
from clusterns_ray.launch.preflight import check_data, check_encoder, check_storage
from clusterns_ray.storage import Place
from clusterns_ray.training.exclusive import Held, exclusive, leased
from clusterns_ray.tuning.ledger import Ledger, Proposal
from clusterns_ray.tuning.outcome import Candidate, choose, copy_model, summary, top_trials, write_trials
from clusterns_ray.tuning.space import Overrides, with_values
from clusterns_ray.tuning.study import Study, dump_study

Watch = Callable[[dict[str, Any]], None]
Job = dict[str, Any]

FRUITLESS_ATTEMPTS = 5
"""A trial that takes the whole sweep down this often before its first evaluation is given up."""


def tune(study: Study, watch: Watch = lambda event: None) -> dict[str, Any]:
    """Run a study, or go on with it: what is finished is kept, what is half done is resumed.

    Args:
        watch: told of what happens: ``{"event": "note" | "tokenised" | "trial" | "look", ...}``; ``look`` comes a few
            times a second, with the Optuna study.

    Returns:
        What ``result.json`` holds.

    Raises:
        ConfigError, DataError: the request cannot work; nothing was started.
        ClusterNSError: no trial finished, or the cluster failed; what is finished is kept.
    """
    check_request(study)
    with owner(study, lambda text: watch({"event": "note", "text": text})) as permit:
        ledger = Ledger(study, permit=permit)
        study.home.write("study.yaml", dump_study(study))
        sweep = Sweep(study, ledger, watch)
        if sweep.exhausted():
            watch({"event": "note", "text": f"{study.config.name!r} is finished; raise the budget to go on with it."})
        else:
            _check_not_finalized(study)
            _run(sweep)
        return write_outcome(study, ledger)


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
    from clusterns_ray.tuning.cluster import cluster, trial_resources
    from clusterns_ray.tuning.pool import Pool

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
                sweep.watch({"event": "look", "study": sweep.ledger.optuna})
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
    check_data(study.base)
    check_storage(study.base)
    check_encoder(study.base)
    for name, parameter in study.space.parameters.items():
        if name.startswith("encoder."):
            for value in parameter.ends():
                check_encoder(study.space.config({name: value}))


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

    def __init__(self, study: Study, ledger: Ledger, watch: Watch):
        self.study, self.ledger, self.watch = study, ledger, watch
        self.use_gpu = False
        self._half_done = [trial.number for trial in ledger.running()]
        self._live: set[str] = set()
        self._confirmations: list[Job] | None = None
        self._prepared: dict[str, tuple[Prepared, dict[str, Any]]] = {}

    def note(self, text: str) -> None:
        self.watch({"event": "note", "text": text})

    def prepare(self) -> None:
        """Tokenise the corpus, once for all trials."""
        prepared, _ = self._data(self.study.base)
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
            self.watch({"event": "trial", "what": "begins", **_told(job)})
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
            self.watch({"event": "trial", "what": "evaluated", **_told(job), **told})
            return False
        pruned = self.ledger.evaluated(
            job["number"], result["step"], result["score"], result["seconds"], result["last"]
        )
        self.watch({"event": "trial", "what": "pruned" if pruned else "evaluated", **_told(job), **told})
        if pruned:
            self._close(job)
        return pruned

    def ended(self, job: Job, result: dict[str, Any]) -> None:
        number, seconds = job["number"], result["seconds"]
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
        self.watch({"event": "trial", "what": result["outcome"], **_told(job), **told})
        self._close(job)

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
        self.watch({"event": "trial", "what": "begins", **_told(job)})
        return job

    def _job(self, name: str, number: int | None, overrides: Overrides) -> Job:
        runs = runs_of(self.study, number)
        config = trial_config(self.study, overrides, runs, name)
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
        for trial, name, seed in planned_confirmations(self.study, self.ledger):
            if name not in failures and runs_of(self.study, None).read(f"{name}/result.json") is None:
                jobs.append(self._job(name, None, {**values_of(self.study, trial), "seed": seed}))
        return jobs

    def _data(self, config: Config) -> tuple[Prepared, dict[str, Any]]:
        """What a run reads, and where it is staged for machines that share a store alone."""
        values = config.identity()
        key = json.dumps([values["data"], values["encoder"], values["evaluation"]["sts"]], sort_keys=True)
        if key not in self._prepared:
            prepared = prepare(config, self.note, lambda rows: self.watch({"event": "tokenised", "rows": rows}))
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


def runs_of(study: Study, number: int | None) -> Place:
    """Where the runs of trials are, or those that confirm (which have no number)."""
    return study.home / ("confirmation" if number is None else "trials")


def remove_leftovers(run: Place, model: bool) -> None:
    """Remove what an ended run needs no more. The models of confirmations stay, as one of them wins."""
    run.remove("checkpoints")
    if model:
        run.remove("model")


def clean_up(study: Study, ledger: Ledger) -> None:
    """Remove what a kill, between the note of a run's end and this, has left; or a pruned trial, still copying."""
    runs = {f"trials/{trial.number:04d}": study.confirms for trial in ledger.ended()}
    runs |= {f"confirmation/{name}": False for _, name, _ in planned_confirmations(study, ledger)}
    store = study.home.store
    there = None if store is None else {"/".join(name.split("/")[:3]) for name in store.names()}
    for name, model in runs.items():
        left = [f"{name}/checkpoints", *([f"{name}/model"] if model else [])]
        if there is None or there.intersection(left):
            remove_leftovers(study.home / name, model)


def trial_config(study: Study, overrides: Overrides, runs: Place, name: str) -> Config:
    """The base with a trial's values, as a run of its own in ``runs``."""
    config = study.space.config(overrides, source=f"trial {name}")
    where = {
        "runtime.storage_path": runs.path,
        "runtime.name": name,
        "runtime.keep": 1,
        "runtime.trackers": [],
        "data.cache_dir": str(cache_directory(study.base)),
    }
    return make_config(with_values(config.resolved(), where))


def _told(job: Job) -> dict[str, Any]:
    return {"id": job["id"], "values": job["values"]}


def _encoder_key(job: Job) -> str:
    """What the untrained encoder's dev score depends on."""
    encoder = {key: value for key, value in job["config"]["encoder"].items() if key not in ("dropout", "head")}
    return json.dumps([encoder, job["config"]["train"]["precision"]], sort_keys=True)


# ---- the end ------------------------------------------------------------------------------------------------------


def planned_confirmations(study: Study, ledger: Ledger) -> list[tuple[optuna.trial.FrozenTrial, str, int]]:
    """(trial, run name, seed) of every run that confirms, done or not."""
    config = study.config.confirmation
    return [
        (trial, f"{trial.number:04d}-seed{seed}", seed)
        for trial in top_trials(ledger.ended(), config.top)
        for seed in config.seeds
    ]


def values_of(study: Study, trial: optuna.trial.FrozenTrial) -> Overrides:
    """A trial's values by configuration key, as they were proposed."""
    return study.space.suggest(optuna.trial.FixedTrial(trial.params))


def candidates(study: Study, ledger: Ledger) -> list[Candidate]:
    """The best trials with the scores of their confirmations."""
    scores: dict[int, dict[int, float]] = {}
    for trial, name, seed in planned_confirmations(study, ledger):
        result = runs_of(study, None).read(f"{name}/result.json")
        if result is not None:
            scores.setdefault(trial.number, {})[seed] = json.loads(result)["sts_dev_trained"]
    return [
        Candidate(trial.number, values_of(study, trial), trial.value or 0.0, scores.get(trial.number, {}))
        for trial in top_trials(ledger.ended(), study.config.confirmation.top)
    ]


def write_outcome(study: Study, ledger: Ledger) -> dict[str, Any]:
    """``trials.parquet``, ``best.yaml``, ``model/`` and ``result.json``, from what the study and its runs hold."""
    home, trials = study.home, ledger.trials()
    clean_up(study, ledger)
    write_trials(home.local / "trials.parquet", trials, list(study.space.parameters))
    home.publish("trials.parquet")
    found = candidates(study, ledger)
    if not found:
        reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
        raise ClusterNSError(
            f"None of the {len(trials)} trials of {study.config.name!r} finished"
            + (f"; the last: {reasons[-1]}" if reasons else ".")
            + f" See {(home / 'trials').address!r}."
        )
    winner, alike = choose(found, len(study.config.confirmation.seeds))
    config = study.space.config(winner.overrides)
    best = make_config(with_values(config.resolved(), {"runtime.name": f"{study.config.name}-best"}))
    home.write("best.yaml", dump_config(best))
    copy_model(_best_run(study, winner).fetch("model"), home.local / "model")
    home.publish("model")
    scores_before = list(ledger.recall("scores_before", {}).values())
    result = {
        "study": study.config.name,
        "dev": study.base.evaluation.dev,
        "sts_dev_before": scores_before[0] if len(scores_before) == 1 else None,
        "trials": {state: sum(t.state.name == state for t in trials) for state in ("COMPLETE", "PRUNED", "FAIL")},
        "seconds": round(ledger.recall("seconds", 0.0), 1),
        "seeds": study.config.confirmation.seeds,
        "winner": summary(winner),
        "not_told_apart": [candidate.number for candidate in alike],
        "candidates": [summary(candidate) for candidate in found],
        "confirmation_failures": ledger.recall("confirmation_failures", {}),
        "best": (home / "best.yaml").address,
        "model": (home / "model").address,
    }
    ledger.save()
    home.write("result.json", json_text(result))  # last, as it says that everything is there
    return result


def _best_run(study: Study, winner: Candidate) -> Place:
    """The winner's run with its best seed."""
    if not winner.scores:
        return runs_of(study, winner.number) / f"{winner.number:04d}"
    seed = min(winner.scores, key=lambda seed: (-winner.scores[seed], seed))
    return runs_of(study, None) / f"{winner.number:04d}-seed{seed}"


def _check_not_finalized(study: Study) -> None:
    final = study.home.read("final.json")
    if final is not None:
        when = json.loads(final)["when"]
        raise ConfigError(
            f"The study {study.config.name!r} was finalized at {when}: its tests have been looked at, so nothing more "
            "may be chosen. Begin a study of another name."
        )
