"""The study file: one frozen tree, checked whole before anything starts.

Unknown keys and impossible values are errors that name the key; so are combinations of values that the space allows and
the configuration does not.
"""

from __future__ import annotations

import difflib
import itertools
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, ValidationError, field_validator, model_validator

from clusterns_ray.config import (
    MAX_WORKERS,
    Config,
    Section,
    apply_override,
    check_file_name,
    check_plain_values,
    describe_value,
    known_keys,
    load_config,
    quote_hint,
    shown,
)
from clusterns_ray.errors import ConfigError
from clusterns_ray.io.object_store import Place, is_url, place
from clusterns_ray.io.paths import check_path
from clusterns_ray.io.yaml_text import dump_yaml, load_yaml, read_yaml_text
from clusterns_ray.tuning.space import (
    FixedParameter,
    IntParameter,
    Overrides,
    Parameter,
    Scalar,
    Space,
    Varied,
    point_key,
    same,
)

NOT_SEARCHED = {
    "seed": "seeds are no setting to choose by; name them under confirmation.seeds",
    "evaluation.sts": "scores on different sets do not compare",
    "evaluation.dev": "scores on different sets do not compare",
    "data.cache_dir": "it changes no result",
}
"""Keys that a space may not hold, and why; nor any of `runtime`."""

COMBINATIONS = 4096
"""How many combinations of extreme values, and of random ones, are tried before a study starts."""

GRID_POINTS = 10_000


class BudgetConfig(Section):
    trials: int | None = Field(default=None, ge=1)
    """Trials that reach an end: finished, pruned or failed."""
    hours: float | None = Field(default=None, gt=0)
    """No trial starts after this much time, over all resumptions; those that run are finished."""
    worker_hours: float | None = Field(default=None, gt=0)
    """The same, in hours of workers (in-process counts as one)."""


class TPESampler(Section):
    name: Literal["tpe"]
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seeds the proposals."""
    startup_trials: int = Field(default=10, ge=1)
    """Random trials, first points included, before the model proposes."""


class RandomSampler(Section):
    name: Literal["random"]
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seeds the proposals."""


class GridSampler(Section):
    name: Literal["grid"]
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seeds the order in which the points are visited."""


class GPSampler(Section):
    name: Literal["gp"]
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seeds the proposals."""
    startup_trials: int = Field(default=10, ge=1)
    """Random trials, first points included, before the model proposes."""


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


class ConfirmationConfig(Section):
    top: int = Field(default=3, ge=1)
    """How many of the best configurations are run again."""
    seeds: list[int] = Field(default_factory=list)
    """New seeds, each for every one of them; without any, the best single trial wins."""

    @field_validator("seeds")
    @classmethod
    def _different(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or min(value, default=0) < 0:
            raise ValueError("seeds must be different numbers of at least 0")
        return value


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
    """When no further trial starts: whichever limit is reached first."""
    concurrent_trials: int = Field(default=1, ge=1, le=4096)
    """Trials that run at a time."""
    workers_per_trial: int = Field(default=0, ge=0, le=MAX_WORKERS)
    """0: in the trial's own process, kept for the next trial. N: that many Ray workers a trial."""
    sampler: Annotated[TPESampler | RandomSampler | GridSampler | GPSampler, Discriminator("name")] = TPESampler(
        name="tpe"
    )
    """How the values of the next trial are proposed; a name alone takes its defaults."""
    scheduler: Annotated[ASHAScheduler | MedianScheduler | NoScheduler, Discriminator("name")] = NoScheduler(
        name="none"
    )
    """Which trials are stopped early; a name alone takes its defaults."""
    first_points: list[dict[str, Scalar]] = Field(default_factory=list)
    """Tried first, in this order; keys that are left out are proposed by the sampler."""
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

    @model_validator(mode="after")
    def _whole(self):
        if not self.varied():
            raise ValueError("space varies nothing; give at least one key a type (int, float or choice)")
        if self.sampler.name == "grid":
            for name, parameter in self.varied().items():
                if parameter.grid() is None:
                    raise ValueError(f"space.{name} has no step, and sampler grid needs one: a continuum has no grid")
        elif self.budget == BudgetConfig():
            raise ValueError("budget is empty; give trials, hours or worker_hours")
        return self

    def varied(self) -> dict[str, Varied]:
        return {name: p for name, p in self.space.items() if not isinstance(p, FixedParameter)}

    def fixed(self) -> Overrides:
        return {name: p.value for name, p in self.space.items() if isinstance(p, FixedParameter)}


@dataclass(frozen=True)
class Study:
    """A study that was found to be sound."""

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

    def identity(self) -> dict[str, Any]:
        """What the proposals and their scores depend on. Budget, concurrency and confirmation may change later."""
        values = self.config.model_dump(mode="json", by_alias=True, exclude_unset=True)
        kept = {key: values.get(key) for key in ("space", "first_points")}
        for key in ("sampler", "scheduler"):
            kept[key] = getattr(self.config, key).model_dump(mode="json")
        return {"base": self.base.identity(), **kept}


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> Study:
    """Read and check a study file.

    Args:
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
        raise ConfigError(_describe(error, str(path))) from None
    _check_keys(config, str(path))
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
    if base.seed in config.confirmation.seeds:
        raise ConfigError(
            f"{path}: confirmation.seeds holds {base.seed}, the seed of the trials; their scores chose the "
            "configurations, so they cannot confirm them. Use other seeds."
        )
    try:
        space = Space(config.varied(), base)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}.") from None
    _check_values(space, str(path))
    _check_reachable(space, str(path))
    _check_combinations(space, str(path))
    for number, point in enumerate(config.first_points):
        _check_point(space, point, f"{path}: first_points[{number}]")
    if config.sampler.name == "grid":
        _check_grid(config, space, str(path))
    return Study(config, base, space)


def dump_study(study: Study) -> str:
    """The study as YAML, all that was left to defaults included, with the resolved base beneath ``base``."""
    values = study.config.model_dump(mode="json", by_alias=True, exclude={"set"})
    values["space"] = study.config.model_dump(mode="json", by_alias=True, exclude_unset=True)["space"]
    values["base"] = study.base.resolved()
    return dump_yaml(values)


# ---- checks -------------------------------------------------------------------------------------------------------


def _check_keys(config: StudyConfig, source: str) -> None:
    known = known_keys()
    for section, keys in (("space", config.space), ("set", config.set)):
        for key in keys:
            if key not in known:
                close = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.6)
                hint = f"did you mean {close[0]}?" if close else "keys are written as train.learning_rate."
                raise ConfigError(f"{source}: unknown key {key[:100]} in {section}: {hint}")
    for key in config.space:
        reason = "where and how a trial runs changes no result" if key.startswith("runtime.") else NOT_SEARCHED.get(key)
        if reason:
            raise ConfigError(f"{source}: {key} cannot be in space: {reason}.")
    both = sorted(set(config.space) & set(config.set))
    if both:
        raise ConfigError(f"{source}: {both[0]} is both in space and in set; keep it in one of them.")


def _check_values(space: Space, source: str) -> None:
    """Each key takes its own extreme values, whatever the other keys are."""
    for name, parameter in space.parameters.items():
        section, _, key = name.rpartition(".")
        model = _section_model(section)
        for value in parameter.ends():
            try:
                model.__pydantic_validator__.validate_assignment(model.model_construct(), key, value)
            except ValidationError as error:
                own = [item for item in error.errors() if item["loc"]]
                if own:
                    reason = own[0]["msg"].removeprefix("Value error, ")
                    raise ConfigError(
                        f"{source}: space.{name} allows {value!r}, which the configuration does not: {reason}. Change "
                        "its bounds or choices."
                    ) from None


def _section_model(section: str) -> Any:
    return Config.model_fields[section].annotation if section else Config


def _check_reachable(space: Space, source: str) -> None:
    """Every key matters somewhere: a condition that never holds is a mistake."""
    seen = set()
    draw = random.Random(0)
    for point in itertools.chain(_corners(space, draw), _random_points(space, draw)):
        seen |= set(point)
        if len(seen) == len(space.parameters):
            return
    for name in space.parameters:
        if name not in seen:
            raise ConfigError(
                f"{source}: space.{name}.when ({', '.join(space.parameters[name].when)}) is met by no value of the "
                "space or the base, so the key would never vary. Mend the condition, or leave the key out."
            )


def _check_combinations(space: Space, source: str) -> None:
    """Extreme values together, values inside one at a time, and random points: each makes a configuration."""
    draw = random.Random(1)
    for point in itertools.chain(_corners(space, draw), _random_points(space, draw)):
        try:
            space.config(point)
        except ConfigError:
            culprits = _smallest_failing(space, point)
            named = ", ".join(f"{key} {value!r}" for key, value in culprits.items()) or "the base configuration"
            try:
                together = " together" if len(culprits) > 1 else ""
                space.config(culprits, source=f"{source}: the space allows {named}{together}")
            except ConfigError as error:
                raise ConfigError(f"{error} Change the space so that every combination is possible.") from None


def _smallest_failing(space: Space, point: Overrides) -> Overrides:
    """The values of ``point`` that are needed for it to fail."""
    kept = dict(point)
    for name in point:
        fewer = {key: value for key, value in kept.items() if key != name}
        try:
            space.config(fewer)
        except ConfigError:
            kept = fewer
    return kept


def _corners(space: Space, draw: random.Random) -> Iterable[Overrides]:
    """All combinations of extreme values, or a sample of them where they are many."""
    ends = {name: parameter.ends() for name, parameter in space.parameters.items()}
    if len(list(itertools.islice(space.points(ends), COMBINATIONS + 1))) <= COMBINATIONS:
        return space.points(ends)
    return (_draw_point(space, lambda name: draw.choice(ends[name])) for _ in range(COMBINATIONS))


def _random_points(space: Space, draw: random.Random) -> Iterable[Overrides]:
    def value(name: str) -> Scalar:
        parameter = space.parameters[name]
        values = parameter.grid()
        return draw.choice(values) if values is not None else draw.uniform(*parameter.ends())  # type: ignore[arg-type]

    return (_draw_point(space, value) for _ in range(COMBINATIONS))


def _draw_point(space: Space, value: Any) -> Overrides:
    point: Overrides = {}
    for name in space.parameters:
        if space.matters(name, point):
            point[name] = value(name)
    return point


def _check_point(space: Space, point: Mapping[str, Scalar], source: str) -> None:
    for key, value in point.items():
        if key not in space.parameters:
            close = difflib.get_close_matches(key, space.parameters, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"it varies {', '.join(space.parameters)}."
            raise ConfigError(f"{source}: {key} is not a key that the space varies: {hint}")
        parameter = space.parameters[key]
        if not parameter.contains(value):
            raise ConfigError(f"{source}: {key} is {value!r}, but the space has {parameter.describe()}.")
        missing = [parent for parent in parameter.when if parent in space.parameters and parent not in point]
        if missing:
            raise ConfigError(
                f"{source}: {key} depends on {missing[0]}, which the point leaves open. Give that as well."
            )
        if not space.matters(key, point):
            raise ConfigError(f"{source}: {key} does not matter at this point (see its `when`). Leave it out.")


def _check_grid(config: StudyConfig, space: Space, source: str) -> None:
    # One key alone may have more values than could be listed.
    longest = max(len(parameter.grid() or ()) for parameter in space.parameters.values())
    grid = space.grid() if longest <= GRID_POINTS else ()
    points = set(map(point_key, itertools.islice(grid, GRID_POINTS + 1)))
    if max(longest, len(points)) > GRID_POINTS:
        raise ConfigError(
            f"{source}: the grid has more than {GRID_POINTS} points. Make steps wider, or use random or tpe."
        )
    for number, point in enumerate(config.first_points):
        if point_key(point) not in points:
            raise ConfigError(
                f"{source}: first_points[{number}] is no whole point of the grid; name every key that matters there."
            )


def _describe(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        parts = [str(part) for part in item["loc"]]
        # pydantic names the branch of a union it took; users did not write that
        key = ".".join(part for part in parts[:-1] if part not in _BRANCHES)
        key = ".".join(filter(None, (key, parts[-1]))) if parts and _is_written(parts, item) else key
        reason = item["msg"].removeprefix("Value error, ")
        refused = item.get("ctx", {}).get("error")
        enumerated = str(refused) if isinstance(refused, ConfigError) else _enumerated(key, item)
        if enumerated is not None:
            lines.append(enumerated)
        elif item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(parts[-1][:100], _NAMES, n=1, cutoff=0.6)
            # The right word in the wrong place: say the right one.
            meant = [_PLACES.get(name, name) if name == parts[-1] else name for name in close]
            if parts[-2:-1] == ["fixed"]:
                lines.append(f"unknown key {key[:100]}: a key with role fixed has a value and nothing else.")
            else:
                lines.append(f"unknown key {key[:100]}" + (f": did you mean {meant[0]}?" if meant else "."))
        elif item["type"] == "missing":
            lines.append(f"{key} is missing.")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {reason}." if key else f"{reason}.")
        else:
            hint = quote_hint(item)
            lines.append(f"{key} is {shown(item['input'])}: {reason[:1].lower()}{reason[1:]}{hint}.")
    return f"{source}: " + "\n  ".join(dict.fromkeys(lines))


def _is_written(parts: list[str], item: Any) -> bool:
    """Whether the last part of an error's location is a key of the file rather than a branch of a union."""
    return parts[-1] not in _BRANCHES or (item["type"] == "missing" and parts[-1] == "value")


def _enumerated(key: str, item: Any) -> str | None:
    """The line on a key of which the values are listed, with all of them; None for other errors."""
    name, value = key.rpartition(".")[2], item["input"]
    missing = item["type"] == "missing"
    if item["type"] == "parameter_type":
        if not isinstance(value, Mapping):
            return None
        # Without a type it is the role that tells whether one is needed.
        name = "role" if "role" in value and value["role"] not in _VALUES["role"] else "type"
        key, missing, value = f"{key}.{name}", name not in value, value.get(name)
    elif item["type"].startswith("union_tag") and isinstance(value, Mapping):
        missing, value = "name" not in value, value.get("name")
        key = f"{key}.name" if missing else key
    elif item["type"] not in ("literal_error", "missing", "model_attributes_type"):
        return None
    if name not in _VALUES:
        return None
    values = ", ".join(_VALUES[name][:-1]) + f" or {_VALUES[name][-1]}"
    return f"{key} is missing; it must be {values}." if missing else f"{key} is {value!r}; it must be {values}."


_VALUES = {
    "role": ("scientific", "nuisance", "fixed"),
    "type": ("int", "float", "choice"),
    "sampler": ("tpe", "random", "grid", "gp"),
    "scheduler": ("asha", "median", "none"),
    "storage": ("sqlite", "journal"),
}
"""What the keys of a study can be that take one of a few words."""

_NUMBERS = {"budget.trials", "budget.hours", "budget.worker_hours", "concurrent_trials", "workers_per_trial"} | {
    "confirmation.top", "confirmation.seeds", "sampler.seed", "sampler.startup_trials", "scheduler.min_steps",
    "scheduler.reduction_factor", "scheduler.startup_trials", "scheduler.warmup_steps",
}  # fmt: skip
_BRANCHES = {"int", "float", "choice", "fixed", "tpe", "random", "grid", "gp", "asha", "median", "none"} | {
    "comparison", "list", "value"
}  # fmt: skip
_NAMES = sorted(
    {
        name
        for model in (StudyConfig, BudgetConfig, ConfirmationConfig, IntParameter, FixedParameter, TPESampler)
        for name in model.model_fields
    }
    | {"choices", "min_steps", "reduction_factor", "warmup_steps"}
)

_PLACES = {
    name: f"{section}.{name}"
    for section, model in (("budget", BudgetConfig), ("confirmation", ConfirmationConfig))
    for name in model.model_fields
}


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two identities differ, with both values."""
    found = []
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key), after.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif not same(a, b):
            found.append(f"{prefix}{key} was {a!r} and is now {b!r}")
    return found
