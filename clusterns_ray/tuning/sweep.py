"""A study file to a winner: which trial is next, and what becomes of it.

``STORAGE_PATH/NAME/`` holds the Optuna study, ``trials/NNNN/`` and ``confirmation/NNNN-seedS/`` (runs like any other),
and at the end ``result.json``, ``best.yaml``, ``trials.parquet`` and ``model/``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna

from clusterns_ray.config import Config, dump_config, make_config
from clusterns_ray.data.prepare import Prepared, cache_directory, describe, prepare
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.files import write_atomic
from clusterns_ray.launch.preflight import check_data, check_encoder, check_storage
from clusterns_ray.training.exclusive import exclusive
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
    with owner(study):
        ledger = Ledger(study)
        write_atomic(study.directory / "study.yaml", dump_study(study))
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
    from clusterns_ray.launch.cluster import uses_gpu
    from clusterns_ray.tuning.cluster import cluster, trial_resources
    from clusterns_ray.tuning.pool import Pool

    study, runtime = sweep.study, sweep.study.base.runtime
    with cluster(study, sweep.note):
        sweep.prepare()
        sweep.use_gpu = uses_gpu(study.base.runtime)
        pool = Pool(
            sweep,
            concurrent=study.config.concurrent_trials,
            resources=trial_resources(study),
            max_failures=runtime.max_failures,
            directory=study.directory / "ray",
            start_timeout_s=runtime.start_timeout_s,
        )
        pool.start()
        try:
            while not pool.wait(0.3):
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
def owner(study: Study) -> Iterator[None]:
    """Hold the study's directory alone; ConfigError where another process does."""
    held = exclusive(study.directory, True, wait_s=2.0)
    try:
        held.__enter__()
    except ClusterNSError:
        raise ConfigError(
            f"The study {study.config.name!r} is being run by another process. Look at it with --status, let it "
            "finish, or end it."
        ) from None
    try:
        yield
    finally:
        held.__exit__(None, None, None)


class Sweep:
    """The source of a pool's jobs: first trials that were left half done, then proposals, then confirmations."""

    def __init__(self, study: Study, ledger: Ledger, watch: Watch):
        self.study, self.ledger, self.watch = study, ledger, watch
        self.use_gpu = False
        self._half_done = [trial.number for trial in ledger.running()]
        self._live: set[str] = set()
        self._confirmations: list[Job] | None = None
        self._prepared: dict[str, Prepared] = {}

    def note(self, text: str) -> None:
        self.watch({"event": "note", "text": text})

    def prepare(self) -> None:
        """Tokenise the corpus, once for all trials."""
        prepared = self._data(self.study.base)
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
            self.ledger.remember("scores_before", {**self._scores_before(), _encoder_key(job): result["score"]})
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
        directory = self.study.directory / "trials"
        job = self._job(name, proposal.number, directory, proposal.overrides)
        self._live.add(name)
        self.watch({"event": "trial", "what": "begins", **_told(job)})
        return job

    def _job(self, name: str, number: int | None, directory: Path, overrides: Overrides) -> Job:
        config = trial_config(self.study, overrides, directory, name)
        run_dir = directory / name
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir / "config.yaml", dump_config(config))
        prepared = self._data(config)
        job: Job = {
            "id": name,
            "number": number,
            "values": overrides,
            "config": config.resolved(),
            "tokens_dir": str(prepared.tokens_dir),
            "sts_dir": prepared.sts_dir,
            "run_dir": str(run_dir),
            "use_gpu": self.use_gpu,
        }
        return {**job, "score_before": self._scores_before().get(_encoder_key(job))}

    def _plan_confirmations(self) -> list[Job]:
        failures = self.ledger.recall("confirmation_failures", {})
        jobs = []
        for trial, name, seed in planned_confirmations(self.study, self.ledger):
            directory = self.study.directory / "confirmation"
            if name not in failures and not (directory / name / "result.json").is_file():
                overrides = {**values_of(self.study, trial), "seed": seed}
                jobs.append(self._job(name, None, directory, overrides))
        return jobs

    def _data(self, config: Config) -> Prepared:
        values = config.identity()
        key = json.dumps([values["data"], values["encoder"], values["evaluation"]["sts"]], sort_keys=True)
        if key not in self._prepared:
            self._prepared[key] = prepare(
                config, self.note, lambda rows: self.watch({"event": "tokenised", "rows": rows})
            )
        return self._prepared[key]

    def _scores_before(self) -> dict[str, float]:
        return self.ledger.recall("scores_before", {})

    def _close(self, job: Job) -> None:
        self._live.discard(job["id"])
        remove_leftovers(Path(job["run_dir"]), model=job["number"] is not None and self.study.confirms)


def remove_leftovers(run_dir: Path, model: bool) -> None:
    """Remove what an ended run needs no more. The models of confirmations stay, as one of them wins."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    if model:
        shutil.rmtree(run_dir / "model", ignore_errors=True)


def trial_config(study: Study, overrides: Overrides, directory: Path, name: str) -> Config:
    """The base with a trial's values, as a run of its own in ``directory``."""
    config = study.space.config(overrides, source=f"trial {name}")
    where = {
        "runtime.storage_path": str(directory),
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
        result = study.directory / "confirmation" / name / "result.json"
        if result.is_file():
            scores.setdefault(trial.number, {})[seed] = json.loads(result.read_text(encoding="utf-8"))["sts_dev"]
    return [
        Candidate(trial.number, values_of(study, trial), trial.value or 0.0, scores.get(trial.number, {}))
        for trial in top_trials(ledger.ended(), study.config.confirmation.top)
    ]


def write_outcome(study: Study, ledger: Ledger) -> dict[str, Any]:
    """``trials.parquet``, ``best.yaml``, ``model/`` and ``result.json``, from what is on disk."""
    directory, trials = study.directory, ledger.trials()
    for trial in ledger.ended():  # a kill may have come between the note of its end and this
        remove_leftovers(directory / "trials" / f"{trial.number:04d}", model=study.confirms)
    for _, name, _ in planned_confirmations(study, ledger):
        remove_leftovers(directory / "confirmation" / name, model=False)
    write_trials(directory / "trials.parquet", trials, list(study.space.parameters))
    found = candidates(study, ledger)
    if not found:
        reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
        raise ClusterNSError(
            f"None of the {len(trials)} trials of {study.config.name!r} finished"
            + (f"; the last: {reasons[-1]}" if reasons else ".")
            + f" See {str(directory / 'trials')!r}."
        )
    winner, alike = choose(found, len(study.config.confirmation.seeds))
    config = study.space.config(winner.overrides)
    best = make_config(with_values(config.resolved(), {"runtime.name": f"{study.config.name}-best"}))
    write_atomic(directory / "best.yaml", dump_config(best))
    copy_model(_models(study, winner)[0], directory / "model")
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
        "best": str(directory / "best.yaml"),
        "model": str(directory / "model"),
    }
    write_atomic(directory / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _models(study: Study, winner: Candidate) -> list[Path]:
    """The models of the winner, that of its best seed first."""
    if not winner.scores:
        return [study.directory / "trials" / f"{winner.number:04d}" / "model"]
    seeds = sorted(winner.scores, key=lambda seed: (-winner.scores[seed], seed))
    return [study.directory / "confirmation" / f"{winner.number:04d}-seed{seed}" / "model" for seed in seeds]


def _check_not_finalized(study: Study) -> None:
    final = study.directory / "final.json"
    if final.is_file():
        when = json.loads(final.read_text(encoding="utf-8"))["when"]
        raise ConfigError(
            f"The study {study.config.name!r} was finalized at {when}: its tests have been looked at, so nothing more "
            "may be chosen. Begin a study of another name."
        )
