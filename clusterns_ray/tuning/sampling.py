"""The samplers and pruners of a study, as Optuna knows them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from clusterns_ray.data.sampler import stream_key
from clusterns_ray.tuning.space import Overrides, point_key
from clusterns_ray.tuning.study import Study


class Sampler(optuna.samplers.BaseSampler):
    """An Optuna sampler whose draws depend on the seed, the trial's number, the parameter and the trials before it.

    So a proposal that was cut off after some of its values gets the others as it would have.

    Args:
        seen: gives the study as the sampler shall see it.
    """

    def __init__(self, config: Any, seen: Callable[[optuna.Study], optuna.Study] = lambda study: study) -> None:
        self.config, self.seen = config, seen
        self.joint: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        self.joint = self._make(trial.number)
        return self.joint.infer_relative_search_space(self.seen(study), trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self.joint.sample_relative(self.seen(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        sampler = self._make(trial.number, param_name)
        return sampler.sample_independent(self.seen(study), trial, param_name, param_distribution)

    def _make(self, number: int, *parts: str) -> optuna.samplers.BaseSampler:
        config, seed = self.config, stream_key("sampler", self.config.seed, number, *parts) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if config.name == "tpe":
                return optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=config.startup_trials, multivariate=True, group=True, constant_liar=True
                )
            if config.name == "gp":
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=config.startup_trials)
            if config.name == "cmaes":
                return optuna.samplers.CmaEsSampler(
                    seed=seed, n_startup_trials=config.startup_trials, warn_independent_sampling=False
                )
            if config.name == "qmc":
                independent = optuna.samplers.RandomSampler(seed=seed)
                return SobolSampler(stream_key("sampler", config.seed) % 2**32, number, independent)
        return optuna.samplers.RandomSampler(seed=seed)


class SobolSampler(optuna.samplers.QMCSampler):
    """The point of a scrambled Sobol sequence that has the trial's number; Optuna's own count moves on at a kill.

    The first trial, and keys that it did not have, are drawn by ``independent``.
    """

    def __init__(self, seed: int, number: int, independent: optuna.samplers.BaseSampler) -> None:
        super().__init__(scramble=True, seed=seed, independent_sampler=independent, warn_independent_sampling=False)
        self.number = number

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, Any]) -> int:
        return self.number


def pruner(study: Study) -> optuna.pruners.BasePruner:
    """The pruner of a scheduler. It counts a trial's own training steps, and keeps what it decided in the study."""
    config = study.config.scheduler
    if config.name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=config.min_steps or study.base.evaluation.every_steps,
            reduction_factor=config.reduction_factor,
        )
    if config.name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials, n_warmup_steps=config.warmup_steps)
    return optuna.pruners.NopPruner()


def grid(study: Study) -> list[Overrides]:
    """The first points, then the rest of the grid in an order of the sampler's seed."""
    first: list[Mapping[str, Any]] = list(study.config.first_points)
    taken = set(map(point_key, first))
    rest = [point for point in study.space.grid() if point_key(point) not in taken]
    random.Random(stream_key("grid", study.config.sampler.seed)).shuffle(rest)
    return [*map(dict, first), *rest]
