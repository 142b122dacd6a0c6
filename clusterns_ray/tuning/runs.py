"""The runs of a study on disk: where they are, which configuration they have, and what of them still counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import optuna

from clusterns_ray.config import Config, make_config, parse_saved_config
from clusterns_ray.data.prepare import cache_directory
from clusterns_ray.errors import ConfigError, DamagedError, DataError
from clusterns_ray.io.files import checksum_holds
from clusterns_ray.io.object_store import Place
from clusterns_ray.models.base_model import complete
from clusterns_ray.tuning.optuna_study import OptunaStudy
from clusterns_ray.tuning.racing import RACER
from clusterns_ray.tuning.selection import top_trials
from clusterns_ray.tuning.space import Overrides, with_values
from clusterns_ray.tuning.study import Study


@dataclass(frozen=True)
class PlannedRun:
    """A run beside the trials: of one of the best configurations with another seed, or of the base configuration."""

    trial: int | None
    """The trial that it confirms; None for the base configuration."""
    name: str
    seed: int
    overrides: Overrides

    def score(self, study: Study) -> float | None:
        """Its best dev score; None if it has not ended, or if another configuration's run lies there."""
        runs = runs_of(study, None)
        return run_score(runs / self.name, run_config(study, self.overrides, runs, self.name))


def runs_of(study: Study, number: int | None) -> Place:
    """The directory of the trials' runs, or of the runs that confirm (which have no trial number)."""
    return study.home / ("confirmation" if number is None else "trials")


def run_config(study: Study, overrides: Overrides, runs: Place, name: str) -> Config:
    """The base configuration with a trial's values, and with what it leaves to its encoder, as a run in ``runs``."""
    config = study.space.config(overrides, source=f"trial {name}")
    where = {
        "runtime.storage_path": runs.path,
        "runtime.name": name,
        "runtime.keep": 1,
        "runtime.trackers": [],
        "data.cache_dir": str(cache_directory(study.base)),
    }
    return complete(make_config(with_values(config.resolved(), where)))


def planned_runs(study: Study, optuna_study: OptunaStudy) -> list[PlannedRun]:
    """Every run beside the trials, done or not; none before a trial has finished."""
    top = top_trials(optuna_study.merged_trials(), study.config.confirmation.top)
    if not top:
        return []
    base = base_trial(study, optuna_study)
    confirmed = {trial.number for trial in top} if study.confirms else {base}
    racer = top[0].user_attrs.get(RACER)
    raced = list(racer.scores) if racer else [study.base.seed]
    baseline = [] if base is not None and base in confirmed else study.config.confirmation.seeds or raced
    return [PlannedRun(None, f"base-seed{seed}", seed, {"seed": seed}) for seed in baseline] + [
        PlannedRun(trial.number, f"{trial.number:04d}-seed{seed}", seed, {**values_of(study, trial), "seed": seed})
        for trial in top
        for seed in study.config.confirmation.seeds
    ]


def open_runs(study: Study, optuna_study: OptunaStudy) -> list[PlannedRun]:
    """The planned runs that have neither a score nor failed."""
    failures = optuna_study.recall("confirmation_failures", {})
    runs = planned_runs(study, optuna_study)
    return [run for run in runs if run.name not in failures and run.score(study) is None]


def is_finished(study: Study, optuna_study: OptunaStudy) -> bool:
    """Whether every trial and every run beside them has come to an end, for this budget."""
    ended = bool(optuna_study.ended()) and optuna_study.budget_spent() and not optuna_study.running()
    return ended and not open_runs(study, optuna_study)


def base_trial(study: Study, optuna_study: OptunaStudy) -> int | None:
    """The best finished trial with the very values of the base configuration; None if there is none."""
    for trial in top_trials(optuna_study.merged_trials()):
        if study.space.config(values_of(study, trial)).fingerprint() == study.base.fingerprint():
            return trial.number
    return None


def values_of(study: Study, trial: optuna.trial.FrozenTrial) -> Overrides:
    """A trial's values by configuration key, as they were proposed."""
    return study.space.suggest(optuna.trial.FixedTrial(trial.params))


def is_run_of(run: Place, config: Config) -> bool:
    """Whether a directory is free or holds a run of this configuration. False if its configuration is damaged."""
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
    """A run's ``result.json``; None if there is none, or it is damaged."""
    try:
        result = json.loads(run.read("result.json") or "")
    except (ValueError, DamagedError):
        return None
    if not isinstance(result, dict) or ("checksum" in result and not checksum_holds(result)):
        return None
    return result


def was_trained(run: Place) -> bool:
    """Whether a run's ``model/`` is that of a step; if no step was better, it is the untrained encoder."""
    return (read_run_result(run) or {}).get("best_step") != 0


def remove_leftovers(run: Place, model: bool) -> None:
    """Remove what an ended run needs no more. The models of confirmations stay, since one of them wins."""
    run.remove("checkpoints")
    if model:
        run.remove("model")


def clean_up(study: Study, optuna_study: OptunaStudy) -> None:
    """Remove the leftovers of ended runs that a kill, or a pruned trial which was still copying, has left."""
    runs = {f"trials/{trial.number:04d}": study.confirms for trial in optuna_study.ended()}
    runs |= {f"confirmation/{run.name}": False for run in planned_runs(study, optuna_study)}
    store = study.home.store
    there = None if store is None else {"/".join(name.split("/")[:3]) for name in store.names()}
    for name, model in runs.items():
        left = [f"{name}/checkpoints", *([f"{name}/model"] if model else [])]
        if there is None or there.intersection(left):
            remove_leftovers(study.home / name, model)
