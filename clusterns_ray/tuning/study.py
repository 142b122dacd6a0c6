"""The study file: one frozen tree, checked whole before anything starts.

Unknown keys and impossible values are errors that name the key; so are combinations of values that the space allows and
the configuration does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from clusterns_ray.config import (
    MAX_WORKERS,
    Config,
    Section,
    apply_override,
    check_file_name,
    check_plain_values,
    describe_value,
    load_config,
    make_config,
    shown,
)
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.io.object_store import Place, is_url, place, split_url
from clusterns_ray.io.paths import check_path
from clusterns_ray.io.yaml_text import dump_yaml, load_yaml, read_yaml_text
from clusterns_ray.tuning.space import (
    ChoiceParameter,
    FixedParameter,
    IntParameter,
    Overrides,
    Parameter,
    Scalar,
    Space,
    Varied,
    same,
)
from clusterns_ray.tuning.study_checks import check_grid, check_keys, check_point, check_space, describe


class BudgetConfig(Section):
    trials: int | None = Field(default=None, ge=1)
    """Trials that reach an end: finished, pruned or failed."""
    hours: float | None = Field(default=None, gt=0)
    """No trial starts after this much time, over all resumptions; those that run are finished."""
    worker_hours: float | None = Field(default=None, gt=0)
    """The same, in hours that workers were held by trials (in-process counts as one). Confirming runs come on top."""
    cost: float | None = Field(default=None, gt=0)
    """The same, in money: worker-hours times `price`."""
    price: float | None = Field(default=None, gt=0)
    """What a worker costs for an hour, in any currency; also shown with what a study took."""

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.cost is not None and self.price is None:
            raise ValueError("cost needs a price; give what a worker costs for an hour")
        return self

    def limits(self) -> dict[str, float]:
        """The limits that are set, by key."""
        return {key: value for key, value in self.model_dump().items() if value is not None and key != "price"}


def _gain(value: Any) -> Any:
    if value == "noise" or (isinstance(value, int | float) and value >= 0):
        return value
    raise ValueError(f"{shown(value)} is neither a number of at least 0 nor noise; give one of these")


class StopConfig(Section):
    after: int | None = Field(default=None, ge=1)
    """No trial starts once this many in a row, finished or pruned, have brought no gain."""
    gain: Annotated[float | Literal["noise"], BeforeValidator(_gain)] = 0.0
    """How far a score has to lie above the best before it to be a gain; what seeds alone change is none. `noise`, where
    trials race: as far as two equal configurations with one seed differ once in twenty times, by the paired differences
    that the race has measured so far; any gain counts until it has some."""


class ModelSampler(Section):
    """Proposes by a model of the scores so far: a tree-structured Parzen estimator; a Gaussian process, which suits few
    trials; or the normal distribution of CMA-ES, for many trials and numbers that all matter."""

    name: Literal["tpe", "gp", "cmaes"]
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seeds the proposals."""
    startup_trials: int = Field(default=10, ge=1)
    """Random trials, first points and those of `previous` included, before the model proposes."""


class PlainSampler(Section):
    """Proposes without a look at scores: at random, by a Sobol sequence, which covers the space more evenly, or every
    point of a space whose floats all have steps, in an order of the seed."""

    name: Literal["random", "qmc", "grid"]
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seeds the proposals."""


class ASHAScheduler(Section):
    name: Literal["asha"]
    min_steps: int | None = Field(default=None, ge=1)
    """Training steps of the first rung; `evaluation.every_steps` if unset."""
    reduction_factor: int = Field(default=3, ge=2, le=10**6)
    """About one in this many goes on from a rung; each rung is this many times as long as the one before."""


class MedianScheduler(Section):
    name: Literal["median"]
    startup_trials: int = Field(default=5, ge=0)
    """Trials that are let run to their end first."""
    warmup_steps: int = Field(default=0, ge=0)
    """Training steps before which nothing is pruned."""


class NoScheduler(Section):
    name: Literal["none"]


def _different(value: list[int]) -> list[int]:
    if len(set(value)) < len(value) or min(value, default=0) < 0:
        raise ValueError("seeds must be different numbers of at least 0")
    return value


Seeds = Annotated[list[int], AfterValidator(_different)]


class RaceConfig(Section):
    seeds: Seeds = Field(default_factory=list)
    """Further seeds of a trial, after the base's, which every trial has: about the best third of those that have some
    get one more, until a paired test says that they are behind. Each is a run that the budget counts as a trial."""


class ConfirmationConfig(Section):
    top: int = Field(default=3, ge=1)
    """How many of the best configurations are run again."""
    seeds: Seeds = Field(default_factory=list)
    """New seeds, each for every one of them; without any, the best trial of the search wins."""


MOST_PER_GPU = 64
"""Trials that may share a GPU."""


def _trials_per_gpu(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 1 <= value <= MOST_PER_GPU):
        return value
    raise ValueError(f"{shown(value)} is neither a number from 1 to {MOST_PER_GPU} nor auto; give one of these")


class StudyConfig(Section):
    """The whole study."""

    name: str
    """The study's name; its files are in STORAGE_PATH/NAME. The same command again goes on with it."""
    base: str
    """The configuration that trials start from, relative to the study file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to it, by key: `train.max_steps: 20`."""
    space: dict[str, Parameter]
    """What varies, by key, and what is declared as held fixed."""
    budget: BudgetConfig = BudgetConfig()
    """When no further trial starts: whichever limit is reached first. Trials that run then are finished."""
    stop: StopConfig = StopConfig()
    """When the search is no longer worth its trials, though the budget is not used up."""
    concurrent_trials: int = Field(default=1, ge=1, le=4096)
    """Trials that run at a time."""
    workers_per_trial: int = Field(default=0, ge=0, le=MAX_WORKERS)
    """0: in the trial's own process, kept for the next trial. N: that many Ray workers a trial."""
    trials_per_gpu: Annotated[int | Literal["auto"], BeforeValidator(_trials_per_gpu)] = 1
    """Trials in processes of their own that share a GPU, where trials take GPUs, from 1 to 64: each may use its part of
    the memory. `auto`: as many as fit, by the estimate of `clusterns plan` for the trial that needs the most."""
    sampler: Annotated[ModelSampler | PlainSampler, Discriminator("name")] = ModelSampler(name="tpe")
    """How the values of the next trial are proposed; a name alone takes its defaults."""
    scheduler: Annotated[ASHAScheduler | MedianScheduler | NoScheduler, Discriminator("name")] = NoScheduler(
        name="none"
    )
    """Which trials are stopped early; a name alone takes its defaults."""
    minimize: Literal["seconds", "memory"] | None = None
    """What a trial should take little of, besides a high dev score: its time, or the memory of its worker by the
    estimate of `clusterns plan`. The sampler sees both, and the Pareto front is shown."""
    first_points: list[dict[str, Scalar]] = Field(default_factory=list)
    """Tried first, in this order; keys that are left out are proposed by the sampler."""
    previous: list[str] = Field(default_factory=list)
    """Earlier studies over the same keys, whose finished trials the sampler knows from the start: directories or URLs,
    relative to STORAGE_PATH. All that does not vary has to be the same."""
    race: RaceConfig = RaceConfig()
    """Whether trials race for further seeds inside the search."""
    confirmation: ConfirmationConfig = ConfirmationConfig()
    """How the winner is confirmed on further seeds."""
    storage: Literal["sqlite", "journal"] = "sqlite"
    """How the Optuna study is kept; `journal` where the directory is on a network file system. In an object store there
    are snapshots of it."""

    @field_validator("sampler", "scheduler", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_file_name(value)

    @field_validator("base")
    @classmethod
    def _base(cls, value: str) -> str:
        return check_path("base", value)

    @field_validator("previous")
    @classmethod
    def _previous(cls, value: list[str]) -> list[str]:
        return [check_path("previous", name).rstrip("/") for name in dict.fromkeys(value)]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.varied():
            raise ValueError("space varies nothing; give at least one key a type (int, float or choice)")
        if self.trials_per_gpu != 1 and self.workers_per_trial:
            raise ValueError(
                f"trials_per_gpu is {self.trials_per_gpu} and workers_per_trial {self.workers_per_trial}: Ray workers "
                "take whole GPUs; set workers_per_trial to 0, or leave trials_per_gpu out"
            )
        if self.trials_per_gpu != "auto" and self.trials_per_gpu > self.concurrent_trials:
            raise ValueError(
                f"trials_per_gpu is {self.trials_per_gpu}, but only {self.concurrent_trials} run at a time "
                "(concurrent_trials); raise that, or lower trials_per_gpu"
            )
        if self.stop.gain == "noise" and not self.race.seeds:
            raise ValueError(
                "stop.gain is noise, which is measured where trials race; give race.seeds, or a number of points"
            )
        if self.previous and self.sampler.name not in ("tpe", "gp"):
            raise ValueError(
                f"previous is of no use to the sampler {self.sampler.name}, which looks at no scores of other studies; "
                "use tpe or gp, or leave it out"
            )
        if self.sampler.name == "cmaes":
            self._suits_cmaes()
        if self.minimize is not None:
            self._has_two_objectives()
        if self.sampler.name == "grid":
            for name, parameter in self.varied().items():
                if parameter.grid() is None:
                    raise ValueError(f"space.{name} has no step, and sampler grid needs one: a continuum has no grid")
        elif not self.budget.limits():
            raise ValueError("budget is empty; give trials, hours, worker_hours or cost")
        return self

    def _suits_cmaes(self) -> None:
        varied = self.varied()
        for name, parameter in varied.items():
            if isinstance(parameter, ChoiceParameter) or parameter.when:
                raise ValueError(
                    f"space.{name} is a choice or has `when`, and sampler cmaes moves numbers that all matter; use tpe "
                    "or gp, or leave the key out"
                )
        if len(varied) < 2:
            raise ValueError("sampler cmaes needs two keys that vary; use tpe or gp, or add one")

    def _has_two_objectives(self) -> None:
        wrong = {
            f"sampler {self.sampler.name}": self.sampler.name == "cmaes",
            f"scheduler {self.scheduler.name}": self.scheduler.name != "none",
            "stop.after": self.stop.after is not None,
            "race.seeds": self.race.seeds,
            "confirmation.seeds": self.confirmation.seeds,
            "previous": self.previous,
        }
        for what in (what for what, is_set in wrong.items() if is_set):
            raise ValueError(
                f"minimize is {self.minimize}, so that no one trial is the best, and {what} goes by the score alone; "
                "leave out one of the two"
            )

    def varied(self) -> dict[str, Varied]:
        return {name: p for name, p in self.space.items() if not isinstance(p, FixedParameter)}

    def fixed(self) -> Overrides:
        return {name: p.value for name, p in self.space.items() if isinstance(p, FixedParameter)}


@dataclass(frozen=True)
class Study:
    """A study whose file has been checked."""

    config: StudyConfig
    base: Config
    """with `set`, fixed values and `workers_per_trial` applied"""
    space: Space

    @cached_property
    def home(self) -> Place:
        """STORAGE_PATH/NAME."""
        return place(self.base.runtime.storage_path, self.config.name, self.base.runtime.local_path)

    @property
    def directory(self) -> Path:
        """STORAGE_PATH/NAME, or this machine's copy of it; absolute."""
        return self.home.local

    @property
    def confirms(self) -> bool:
        """Whether the best configurations are run again with other seeds."""
        return bool(self.config.confirmation.seeds)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every trial, and those for which trials race."""
        return self.base.seed, *self.config.race.seeds

    def identity(self) -> dict[str, Any]:
        """What the proposals and their scores depend on. Budget, stop, concurrency, first points, previous
        studies, roles, the race's seeds and confirmation may change later."""
        values = self.config.model_dump(mode="json", by_alias=True, exclude_unset=True)
        kept = {key: getattr(self.config, key).model_dump(mode="json") for key in ("sampler", "scheduler")}
        if self.config.minimize is not None:
            kept["minimize"] = self.config.minimize
        return compared({"base": self.base.identity(), "space": values["space"], **kept})


def compared(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what may change; those of version 0.1 hold roles and first points."""
    kept = {key: value for key, value in identity.items() if key != "first_points"}
    space = {
        key: {name: value for name, value in parameter.items() if name != "role"}
        for key, parameter in identity["space"].items()
    }
    return {**kept, "space": space}


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """Read and check a study file.

    Args:
        path: of the YAML file.
        overrides: ``section.key=value``, of the base configuration (``train.max_steps=8``) or of the study
            (``budget.trials=4``).

    Raises:
        ConfigError: what is wrong, and where.
    """
    path = check_path("STUDY", path, ())
    values = load_yaml(
        read_yaml_text("The study", path, "Give the path of a YAML file, such as experiments/studies/smoke.yaml."), path
    )
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {describe_value(values)}, not `key: value`. Give a study.")
    return check_study(values, Path(path).expanduser(), overrides)


def check_study(values: dict[str, Any], path: Path, overrides: Iterable[str] = ()) -> Study:
    """:func:`load_study` from plain values; ``path`` is where relative bases start, and what messages name."""
    of_base = []
    for override in overrides:
        first = override.partition("=")[0].partition(".")[0].strip()
        of_base.append(override) if first in Config.model_fields else apply_override(values, override)
    check_plain_values(values, str(path), _NUMBERS)
    try:
        config = StudyConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe(error, str(path), _PLACES)) from None
    check_keys(config.space, config.set, str(path))
    base_path = Path(config.base).expanduser()
    if not is_url(config.base) and not base_path.is_absolute():
        base_path = path.parent / base_path
    changes = [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in {**config.set, **config.fixed()}.items()
    ]
    base = load_config(
        config.base if is_url(config.base) else base_path,
        [*changes, *of_base, f"runtime.num_workers={config.workers_per_trial}"],
    )
    for override in of_base:
        key = override.partition("=")[0].strip()
        if key in config.space:
            raise ConfigError(f"--set {shown(override)}: {key} is in the study's space. Change the space instead.")
    if base.evaluation.sts is None:
        raise ConfigError(
            f"{path}: the base configuration has no evaluation.sts, so trials have no score. Give it a directory of "
            "TASK/SUBSET.jsonl files, or `structure`."
        )
    if config.sampler.name == "cmaes" and find_spec("cmaes") is None:
        raise ConfigError(
            f"{path}: sampler cmaes needs the package cmaes, which is not installed: pip install -c constraints.txt "
            "'.[cmaes]', or use tpe or gp."
        )
    if base.seed in config.race.seeds:
        raise ConfigError(
            f"{path}: race.seeds holds {base.seed}, the seed that every trial has anyway. Name further ones."
        )
    for seed in (base.seed, *config.race.seeds):
        if seed in config.confirmation.seeds:
            raise ConfigError(
                f"{path}: confirmation.seeds holds {seed}, a seed of the trials; their scores chose the "
                "configurations, so they cannot confirm them. Use other seeds."
            )
    try:
        space = Space(config.varied(), base)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}.") from None
    check_space(space, str(path))
    for number, point in enumerate(config.first_points):
        check_point(space, point, f"{path}: first_points[{number}]")
    if config.sampler.name == "grid":
        check_grid(config.first_points, space, str(path))
    return Study(config, base, space)


def read_study_file(path: Path) -> dict[str, Any]:
    """The study as it was written into its directory.

    Raises:
        DataError: that file is damaged.
    """
    reason = "it is not a study"
    try:
        value = load_yaml(read_yaml_text("The study", path), str(path))
        roles = [parameter["role"] for parameter in value["space"].values()]
        names = [
            value["name"],
            value["sampler"]["name"],
            value["scheduler"]["name"],
            value["base"]["evaluation"]["dev"],
        ]
        if all(isinstance(text, str) for text in (*roles, *names)):
            return value
    except ConfigError as error:
        reason = str(error).rstrip(".")
    except (KeyError, TypeError, AttributeError):
        pass
    raise DataError(
        f"{str(path)!r} is damaged ({reason}). Give `clusterns tune` of the study file again, which writes it anew."
    )


def saved_study(directory: Path, where: str) -> Study:
    """The study that ``study.yaml`` in ``directory`` says was begun, at the place where it is now.

    Args:
        where: the directory, or the URL that it is a copy of.

    Raises:
        ConfigError: the directory has another name than the study.
        DataError: that file is damaged.
    """
    path = directory / "study.yaml"
    values = read_study_file(path)
    try:
        base = make_config(values["base"], str(path))
        config = StudyConfig.model_validate({**values, "base": str(path)})
        space = Space(config.varied(), base)
    except ValidationError as error:
        raise DataError(describe(error, f"{str(path)!r} is damaged", _PLACES)) from None
    except ValueError as error:
        raise DataError(f"{str(path)!r} is damaged: {error}.") from None
    holder, name = split_url(where) if is_url(where) else (str(directory.resolve().parent), directory.resolve().name)
    if name != config.name:
        raise ConfigError(
            f"{where!r} holds the study {config.name!r}.", f"Give the directory the name {config.name!r}."
        )
    runtime = base.runtime.model_copy(update={"storage_path": holder})
    return Study(config, base.model_copy(update={"runtime": runtime}), space)


def dump_study(study: Study) -> str:
    """The study as YAML, all that was left to defaults included, with the resolved base beneath ``base``."""
    values = study.config.model_dump(mode="json", by_alias=True, exclude={"set"})
    written = study.config.model_dump(mode="json", by_alias=True, exclude_unset=True)["space"]
    values["space"] = {key: {**written[key], "role": parameter.role} for key, parameter in study.config.space.items()}
    values["base"] = study.base.resolved()
    return dump_yaml(values)


_NUMBERS = {f"budget.{key}" for key in BudgetConfig.model_fields} | {
    "stop.after", "stop.gain", "concurrent_trials", "workers_per_trial", "trials_per_gpu",
    "confirmation.top", "confirmation.seeds", "race.seeds", "sampler.seed", "sampler.startup_trials",
    "scheduler.min_steps", "scheduler.reduction_factor", "scheduler.startup_trials", "scheduler.warmup_steps",
}  # fmt: skip
"""Keys where true and false are wrong."""

_PLACES = {
    name: name
    for model in (
        StudyConfig,
        IntParameter,
        ChoiceParameter,
        FixedParameter,
        ModelSampler,
        ASHAScheduler,
        MedianScheduler,
    )
    for name in model.model_fields
} | {
    name: f"{section}.{name}"
    for section, model in (("budget", BudgetConfig), ("stop", StopConfig), ("confirmation", ConfirmationConfig))
    for name in model.model_fields
}
"""Every key of a study file, with its section if it is in one section only."""


def check_identity(study: Study, known: Mapping[str, Any]) -> None:
    """Refuse to go on with a study that was begun with another space, base, sampler or scheduler.

    Args:
        known: the identity that it was begun with.

    Raises:
        ConfigError: it names what differs.
    """
    changed = differences(compared(known), study.identity())
    if changed:
        raise ConfigError(
            f"The study {study.config.name!r} in {study.home.address!r} is another one: "
            + "; ".join(changed[:5])
            + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
            + ". Choose another name, or go back to those values to go on with it."
        )


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two identities differ, with both values."""
    changed = []
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key), after.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += differences(a, b, f"{prefix}{key}.")
        elif not same(a, b):
            changed.append(f"{prefix}{key} was {a!r} and is now {b!r}")
    return changed
