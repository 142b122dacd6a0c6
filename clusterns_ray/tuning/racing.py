"""Seeds inside a search: which trial gets a further seed, which is behind the leader, and what the sampler sees.

With one seed all trials see the same batches and dropout masks, so that configurations are compared by *paired*
differences over the seeds that both have. A further seed of a trial is a run of its own in the study, with the trial's
values and :data:`RACE`. Pure functions of a study's runs: asked again, they answer the same.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from clusterns_ray.tuning.comparison import paired

RACE = "race"
"""The attribute of a run with a further seed: the number of its trial, and the seed."""

RACER = "racer"
"""The attribute of a trial as :func:`merge_seeds` gives it: its :class:`Racer`."""

REDUCTION = 3
"""About one trial in this many of those with a number of seeds gets one more."""

LEVEL = 0.05
"""The chance that a trial which is as good as the leader is put out in all looks at it together."""


@dataclass(frozen=True)
class Racer:
    """A trial and its runs by seed, those of further seeds in the order in which they began."""

    trial: FrozenTrial
    runs: dict[int, FrozenTrial]

    @property
    def scores(self) -> dict[int, float]:
        """The final dev scores by seed of the runs that have finished."""
        return {
            s: run.value for s, run in self.runs.items() if run.state == TrialState.COMPLETE and run.value is not None
        }

    def best_scores(self, step: int) -> dict[int, float]:
        """The best dev scores up to ``step`` by seed, of the runs that were evaluated there."""
        curves = {seed: run.intermediate_values for seed, run in self.runs.items()}
        return {s: max(v for at, v in curve.items() if at <= step) for s, curve in curves.items() if step in curve}

    @property
    def waits(self) -> bool:
        """Whether all its runs have finished, so that it may get a further seed."""
        return len(self.scores) == len(self.runs)

    @property
    def is_out(self) -> bool:
        """Whether a run of it was stopped or failed."""
        return any(run.state in (TrialState.PRUNED, TrialState.FAIL) for run in self.runs.values())


def racers(trials: Sequence[FrozenTrial], seed: int) -> list[Racer]:
    """The trials of a study's runs, by number; ``seed`` is the first of each."""
    first = {trial.number: Racer(trial, {seed: trial}) for trial in trials if RACE not in trial.user_attrs}
    for run in trials:
        number, further = run.user_attrs.get(RACE, (None, None))
        if number in first:
            first[number].runs[further] = run
    return list(first.values())


def ranking(racers: Sequence[Racer]) -> list[Racer]:
    """Those with a score: by their number of seeds, then by their mean beside the first with that number."""
    scored = [racer for racer in racers if racer.scores]
    # A trial that was put out is behind all that were not, with however many seeds.
    return sorted(
        scored, key=lambda r: (r.is_out, -len(r.scores), -statistics.fmean(r.scores.values()), r.trial.number)
    )


def leader(racers: Sequence[Racer]) -> Racer | None:
    """The best mean among the trials with the most seeds; None before one has finished."""
    return next(iter(ranking(racers)), None)


def differences(racer: Racer, other: Racer, step: int | None = None) -> list[float]:
    """Score minus score by common seed: final ones, or the best ones so far at a common evaluation ``step``."""
    if step is None:
        return paired(racer.scores, other.scores)
    return paired(racer.best_scores(step), other.best_scores(step))


def is_behind(differences: Sequence[float], looks: int) -> bool:
    """Whether paired differences have a mean below zero: Student's t, one-sided, at :data:`LEVEL` over ``looks``.

    The level is spent evenly over the looks (alpha spending: Lan and DeMets, Biometrika 1983, with the linear spending
    function, and Bonferroni's bound in place of the joint distribution, so that it holds whatever the looks share):
    ``mean / (deviation / sqrt(n)) < t(LEVEL / looks; n - 1)``. One pair decides nothing, two may. Races by t-tests are
    those of Maron and Moore (NIPS 1993) and Birattari et al. (GECCO 2002), who do not correct.
    """
    if len(differences) < 2 or (mean := statistics.fmean(differences)) >= 0:
        return False
    return mean < statistics.stdev(differences) / math.sqrt(len(differences)) * _quantile(looks, len(differences) - 1)


@cache
def _quantile(looks: int, freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(LEVEL / looks, freedom))


def looks(racers: Sequence[Racer], seeds: Sequence[int]) -> int:
    """How often a trial is looked at in a whole race: at each evaluation of each further seed."""
    return max((len(racer.trial.intermediate_values) for racer in racers), default=1) * max(len(seeds) - 1, 1)


def next_run(trials: Sequence[FrozenTrial], seeds: Sequence[int]) -> tuple[FrozenTrial, int] | None:
    """The trial that gets a further seed now, and the seed; None where a new trial is due.

    Successive halving, asynchronous (ASHA: Li et al., MLSys 2020), with seeds as the resource: of those that have k
    seeds the best third by the mean over them gets one more, the furthest first, but none that is behind the leader.

    Args:
        seeds: the first, which every trial has, and the further ones in their order.
    """
    field = racers(trials, seeds[0])
    first, count = leader(field), looks(field, seeds)
    for rung in range(len(seeds) - 1, 0, -1):
        having, seed = seeds[:rung], seeds[rung]
        there = [racer for racer in field if all(known in racer.scores for known in having)]
        there.sort(key=lambda racer: (-statistics.fmean(racer.scores[known] for known in having), racer.trial.number))
        for racer in there[: len(there) // REDUCTION]:
            behind = first is not None and is_behind(differences(racer, first), count)
            if racer.waits and seed not in racer.runs and not behind:
                return racer.trial, seed
    return None


def stops(trials: Sequence[FrozenTrial], seeds: Sequence[int], run: FrozenTrial, step: int) -> bool:
    """Whether a run with a further seed ends at its evaluation at ``step``, and its trial leaves the race.

    It does where the trial is behind the leader at that step, over all seeds, and was also worse at the end of those
    before: a curve that begins low and ends high is no reason.
    """
    field = racers(trials, seeds[0])
    number, seed = run.user_attrs[RACE]
    racer, first = next(r for r in field if r.trial.number == number), leader(field)
    if first is None or first is racer or seed not in first.scores:
        return False
    ended = differences(racer, first)
    return (
        bool(ended) and statistics.fmean(ended) < 0 and is_behind(differences(racer, first, step), looks(field, seeds))
    )


def noise(trials: Sequence[FrozenTrial], seeds: Sequence[int]) -> float:
    """How far one trial is above another with one seed, once in twenty times, though both are as good; 0 while not
    known.

    It is the deviation of the paired differences of trials from the leader around their means, pooled, by Student's t.
    """
    field = racers(trials, seeds[0])
    first = leader(field)
    pairs = [differences(racer, first) for racer in field if first is not None and racer is not first]
    pairs = [each for each in pairs if len(each) > 1]
    freedom = sum(len(each) - 1 for each in pairs)
    if freedom < 2:
        return 0.0
    variance = sum(statistics.variance(each) * (len(each) - 1) for each in pairs) / freedom
    return -_quantile(1, freedom) * math.sqrt(variance)


def merge_seeds(trials: Sequence[FrozenTrial], seed: int) -> list[FrozenTrial]:
    """The trials of a study with one value each, and their runs as :data:`RACER`; as they are where none race.

    The value is the mean over the leader's seeds that the trial would have by its paired differences from the leader:
    a trial whose only seed is a lucky one for all does not stand above those that have more.
    """
    if not any(RACE in trial.user_attrs for trial in trials):
        return list(trials)
    field = racers(trials, seed)
    first, shown = leader(field), []
    for racer in field:
        trial = copy.copy(racer.trial)
        if first is not None and racer.scores and (beside := differences(racer, first)):
            trial.value = statistics.fmean(first.scores.values()) + statistics.fmean(beside)
            trial.user_attrs = {
                **trial.user_attrs,
                RACER: racer,
                "seconds": sum(run.user_attrs.get("seconds", 0.0) for run in racer.runs.values()),
            }
        shown.append(trial)
    return shown


class MergedStudy(optuna.Study):
    """A study as its sampler and its pruner see it: without the runs of further seeds, which are in the values."""

    def __init__(self, study: optuna.Study, seed: int) -> None:
        self.__dict__.update(study.__dict__)
        self._seed = seed

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        trials = merge_seeds(self._storage.get_all_trials(self._study_id, deepcopy=False), self._seed)
        return [trial for trial in trials if states is None or trial.state in states]
