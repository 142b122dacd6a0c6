"""What a study teaches: which keys mattered, how sure that is, and what to be wary of. Pure functions of its trials."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from clusterns_ray.tuning.objectives import pareto_front
from clusterns_ray.tuning.previous import PREVIOUS, about_earlier, begun, earlier_trials
from clusterns_ray.tuning.racing import RACER, Racer, merge_seeds
from clusterns_ray.tuning.study import read_study_file
from clusterns_ray.tuning.study_file import read_optuna_study

STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "runs"}
"""Optuna's states of trials, and the words that people read."""

RESAMPLES = 20
MIN_TRIALS = 5
"""No importance is computed from fewer finished trials."""
TREES = 16


@dataclass(frozen=True)
class Trial:
    """A trial as tables and charts show it."""

    number: int
    state: str
    """one of :data:`STATES`"""
    score: float | None
    """the final one, or that of the newest evaluation"""
    values: dict[str, Any]
    curve: list[tuple[int, float]]
    """dev scores by own step"""
    seconds: float
    reason: str | None
    """why it failed or was pruned"""
    steps: int | None = None
    study: str | None = None
    """the earlier study that it is of; None if it is of this one"""
    memory: int | None = None
    """of its worker, in bytes, where that is minimised"""
    scores: dict[int, float] = field(default_factory=dict)
    """by seed, where trials race"""
    race: str = ""
    """how it stands in a race where its state does not say so: its further seed runs, or it is out"""

    def cost(self, minimize: str | None) -> float:
        """What it took of ``seconds`` or ``memory``."""
        return (self.memory or 0) if minimize == "memory" else self.seconds

    @property
    def name(self) -> str:
        return f"{self.study} {self.number}" if self.study else str(self.number)

    @property
    def order(self) -> tuple[bool, bool, int, bool, float, int]:
        """Sorts trials, the best first; where they race, by how many seeds they have."""
        ended = self.state != "COMPLETE", self.race == "out", -len(self.scores)
        return *ended, self.score is None, -(self.score or 0.0), self.number


@dataclass(frozen=True)
class Importance:
    key: str
    share: float
    """of the variance of the score that the key explains alone, by fANOVA"""
    deviation: float
    """over resampled trials"""
    trials: int
    """finished trials in which the key had a value"""


@dataclass(frozen=True)
class StudyRecord:
    """All that a report reads of a study's directory."""

    directory: Path
    config: dict[str, Any]
    """``study.yaml``"""
    trials: list[Trial]
    before: float | None
    """dev score of the untrained encoder; the best, where the space has several"""
    seconds: float
    importances: list[Importance]
    """the largest first"""
    optuna_study: optuna.Study
    """a copy in memory, for Optuna's own figures"""
    earlier: Sequence[Trial] = ()
    """of the studies under ``previous``"""
    about_earlier: Sequence[str] = ()
    """what has to be said of them"""

    @property
    def finished(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "COMPLETE"]

    @property
    def varied(self) -> dict[str, dict[str, Any]]:
        return {key: value for key, value in self.config["space"].items() if value["role"] != "fixed"}


def read_study(directory: Path) -> StudyRecord:
    """Read a study, also while it runs.

    Raises:
        ConfigError: the directory holds none.
        ClusterNSError: a file of it is damaged.
    """
    study = read_optuna_study(directory)
    config = read_study_file(directory / "study.yaml")
    frozen = merge_seeds(begun(study), config["base"]["seed"])
    shown, in_memory = {trial.number: trial for trial in frozen}, optuna.create_study(direction="maximize")
    # Something in place of earlier studies' trials and of further seeds' runs: numbers stay.
    nothing = optuna.trial.create_trial(state=TrialState.FAIL)
    in_memory.add_trials(shown.get(number, nothing) for number in range(len(study.get_trials(deepcopy=False))))
    return StudyRecord(
        directory,
        config,
        list(map(read_trial, frozen)),
        max(study.user_attrs.get("scores_before", {}).values(), default=None),
        study.user_attrs.get("seconds", 0.0),
        importances(frozen),
        in_memory,
        list(map(read_trial, earlier_trials(study))),
        about_earlier(study),
    )


def read_trial(trial: FrozenTrial) -> Trial:
    """One trial of an Optuna study in the form that tables and charts show."""
    curve, attrs = sorted(trial.intermediate_values.items()), trial.user_attrs
    score = trial.value if trial.value is not None else (curve[-1][1] if curve else None)
    study, number = attrs.get(PREVIOUS, (None, trial.number))
    racer: Racer | None = attrs.get(RACER)
    runs = racer is not None and len(racer.runs) > len(racer.scores)
    return Trial(
        number,
        trial.state.name,
        score,
        trial.params,
        curve,
        attrs.get("seconds", 0.0),
        attrs.get("reason"),
        attrs.get("steps"),
        study,
        attrs.get("memory"),
        racer.scores if racer else {},
        "" if racer is None or not runs else "out" if racer.is_out else "runs again",
    )


def front(trials: Sequence[Trial], minimize: str | None) -> list[Trial]:
    """The finished trials that no other is better than in one objective and as good in the other, by what they took;
    none with one objective."""
    points = [trial for trial in trials if trial.state == "COMPLETE" and trial.score is not None] if minimize else []
    return [points[n] for n in pareto_front([(trial.score or 0.0, trial.cost(minimize)) for trial in points])]


def importances(trials: Sequence[FrozenTrial]) -> list[Importance]:
    """fANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014) over the finished trials, resampled for its uncertainty.

    A key that only matters under a condition is judged among the trials in which it did.
    """
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    keys = list(dict.fromkeys(key for trial in finished for key in trial.params))
    judged_together: dict[tuple[int, ...], list[str]] = {}
    for key in keys:
        having = tuple(number for number, trial in enumerate(finished) if key in trial.params)
        if len(having) >= MIN_TRIALS and len({finished[number].params[key] for number in having}) > 1:
            judged_together.setdefault(having, []).append(key)
    importances = []
    for numbers, judged in judged_together.items():
        having = [finished[number] for number in numbers]
        common = [key for key in keys if all(key in trial.params for trial in having)]
        shares, draw = _shares(having, common), random.Random(0)
        resampled = [_shares(draw.choices(having, k=len(having)), common) for _ in range(RESAMPLES)]
        for key in judged:
            known = [others[key] for others in resampled if math.isfinite(others[key])]
            if math.isfinite(shares[key]) and len(known) > 1:
                importances.append(Importance(key, shares[key], statistics.stdev(known), len(having)))
    return sorted(importances, key=lambda importance: -importance.share)


def _shares(trials: Sequence[FrozenTrial], keys: Sequence[str]) -> dict[str, float]:
    """Each key's share of what varies in the scores; NaN where that is not known."""
    if len({trial.value for trial in trials}) < 2:
        return dict.fromkeys(keys, math.nan)
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                value=trial.value,
                params={name: trial.params[name] for name in keys},
                distributions={name: trial.distributions[name] for name in keys},
            )
            for trial in trials
        ]
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(keys), normalize=False)


def at_the_edge(parameter: dict[str, Any], value: Any) -> str | None:
    """``low`` or ``high`` where a number lies in the outer twentieth of its range, as it is searched."""
    if parameter["type"] == "choice":
        return None
    scale = math.log if parameter.get("log") else float
    low, high = scale(parameter["low"]), scale(parameter["high"])
    place = (scale(value) - low) / (high - low)
    return "low" if place <= 0.05 else "high" if place >= 0.95 else None


def rungs(config: dict[str, Any], last_step: int) -> list[int]:
    """Steps at which ASHA judges; none for other schedulers."""
    scheduler = config["scheduler"]
    if scheduler["name"] != "asha":
        return []
    steps, step = [], scheduler["min_steps"] or config["base"]["evaluation"]["every_steps"]
    while step < last_step:
        steps.append(step)
        step *= scheduler["reduction_factor"]
    return steps
