"""Checks of a study file before anything starts, and pydantic's errors in the words of the file."""

from __future__ import annotations

import difflib
import itertools
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from clusterns_ray.config import Config, known_keys, quote_hint, shown
from clusterns_ray.errors import ConfigError
from clusterns_ray.tuning.space import Overrides, Scalar, Space, point_key

NOT_SEARCHED = {
    "seed": "seeds are no setting to choose by; name them under confirmation.seeds",
    "evaluation.sts": "scores on different sets do not compare",
    "evaluation.dev": "scores on different sets do not compare",
    "data.cache_dir": "it changes no result",
}
"""Keys that a space may not hold, and why; nor any of `runtime`."""

COMBINATIONS = 512
"""How many combinations of extreme values, and of random ones, are tried before a study starts."""

GRID_POINTS = 10_000

WORDS = {
    "role": ("scientific", "nuisance", "fixed"),
    "type": ("int", "float", "choice"),
    "sampler": ("tpe", "gp", "cmaes", "random", "qmc", "grid"),
    "scheduler": ("asha", "median", "none"),
    "storage": ("sqlite", "journal"),
    "minimize": ("seconds", "memory"),
}
"""The keys of a study that take one of a few words."""

BRANCHES = {word for words in WORDS.values() for word in words} | {"comparison", "list", "value"}
"""Names of the branches of unions, which pydantic adds to the keys that users wrote."""


def check_keys(searched: Collection[str], fixed: Collection[str], source: str) -> None:
    """Each key of ``space`` and of ``set`` exists, may be there, and is in one of them only."""
    known = known_keys()
    for section, keys in (("space", searched), ("set", fixed)):
        for key in keys:
            if key not in known:
                hint = suggestion(key[:100], known, "keys are written as train.learning_rate.")
                raise ConfigError(f"{source}: unknown key {key[:100]} in {section}: {hint}")
    for key in searched:
        reason = "where and how a trial runs changes no result" if key.startswith("runtime.") else NOT_SEARCHED.get(key)
        if reason:
            raise ConfigError(f"{source}: {key} cannot be in space: {reason}.")
    both = sorted(set(searched) & set(fixed))
    if both:
        raise ConfigError(f"{source}: {both[0]} is both in space and in set; keep it in one of them.")


def check_space(space: Space, source: str) -> None:
    """Every value is possible by itself, every key matters at some point, and every combination is possible."""
    _check_values(space, source)
    draw, used = random.Random(0), set()
    for point in itertools.chain(_corners(space, draw), _random_points(space, draw)):
        used |= set(point)
        _check_combination(space, point, source)
    for name, parameter in space.parameters.items():
        if name not in used:
            raise ConfigError(
                f"{source}: space.{name}.when ({', '.join(parameter.when)}) is met by no value of the space or the "
                "base, so the key would never vary. Correct the condition, or leave the key out."
            )


def _check_values(space: Space, source: str) -> None:
    for name, parameter in space.parameters.items():
        section, _, key = name.rpartition(".")
        model: Any = Config.model_fields[section].annotation if section else Config
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


def _check_combination(space: Space, point: Overrides, source: str) -> None:
    try:
        space.config(point)
    except ConfigError:
        culprits = _smallest_failing(space, point)
        named = ", ".join(f"{key} {value!r}" for key, value in culprits.items()) or "the base configuration"
        together = " together" if len(culprits) > 1 else ""
        try:
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
    """All combinations of extreme values, or a sample of them if they are many."""
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


def _draw_point(space: Space, value: Callable[[str], Scalar]) -> Overrides:
    point: Overrides = {}
    for name in space.parameters:
        if space.matters(name, point):
            point[name] = value(name)
    return point


def check_point(space: Space, point: Mapping[str, Scalar], source: str) -> None:
    """A point lies in the space and names what its keys depend on; one that leaves nothing open is possible."""
    for key, value in point.items():
        if key not in space.parameters:
            hint = suggestion(key, list(space.parameters), f"it varies {', '.join(space.parameters)}.")
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
    if all(name in point or not space.matters(name, point) for name in space.parameters):
        space.config(point, source)


def check_grid(first_points: Sequence[Overrides], space: Space, source: str) -> None:
    """A grid is small enough to be listed, and each first point is one of it."""
    # A single key may have more values than could be listed.
    longest = max(len(parameter.grid() or ()) for parameter in space.parameters.values())
    grid = space.grid() if longest <= GRID_POINTS else ()
    points = set(map(point_key, itertools.islice(grid, GRID_POINTS + 1)))
    if max(longest, len(points)) > GRID_POINTS:
        raise ConfigError(
            f"{source}: the grid has more than {GRID_POINTS} points. Make steps wider, or use random or tpe."
        )
    for number, point in enumerate(first_points):
        if point_key(point) not in points:
            raise ConfigError(
                f"{source}: first_points[{number}] is no whole point of the grid; name every key that matters there."
            )


def suggestion(key: str, known: Iterable[str], otherwise: str) -> str:
    """``did you mean ...?``, or something else if no known key is like this one."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else otherwise


def describe(error: ValidationError, source: str, places: Mapping[str, str]) -> str:
    """pydantic's errors as messages that name keys as the file has them.

    Args:
        places: Every key that a study file can hold somewhere, with its section if it is in one section only.
    """
    lines = [_describe_item(item, places) for item in error.errors()]
    return f"{source}: " + "\n  ".join(dict.fromkeys(lines))


def _describe_item(item: Any, places: Mapping[str, str]) -> str:
    parts = [str(part) for part in item["loc"]]
    # pydantic names the branch of a union that it took; users did not write that
    written = [part for part in parts[:-1] if part not in BRANCHES]
    if parts and (parts[-1] not in BRANCHES or (item["type"] == "missing" and parts[-1] == "value")):
        written.append(parts[-1])
    key, kind, reason = ".".join(written), item["type"], item["msg"].removeprefix("Value error, ")
    refused = item.get("ctx", {}).get("error")
    words = str(refused) if isinstance(refused, ConfigError) else _describe_word(key, item)
    if words is not None:
        return words
    if kind == "extra_forbidden":
        if parts[-2:-1] == ["fixed"]:
            return f"unknown key {key[:100]}: a key with role fixed has a value and nothing else."
        close = difflib.get_close_matches(parts[-1][:100], sorted(places), n=1, cutoff=0.6)
        # The right word in the wrong place: say the right one.
        meant = [places[name] if name == parts[-1] else name for name in close]
        return f"unknown key {key[:100]}" + (f": did you mean {meant[0]}?" if meant else ".")
    if kind == "missing":
        return f"{key} is missing."
    if kind == "value_error":
        return f"{key}: {reason}." if key else f"{reason}."
    return f"{key} is {shown(item['input'])}: {reason[:1].lower()}{reason[1:]}{quote_hint(item)}."


def _describe_word(key: str, item: Any) -> str | None:
    """The message on one of :data:`WORDS`, with all that it can be; None for other errors."""
    name, value, missing = key.rpartition(".")[2], item["input"], item["type"] == "missing"
    if item["type"] == "parameter_type":
        if not isinstance(value, Mapping):
            return None
        # Without a type it is the role that decides whether one is needed.
        name = "role" if value.get("role", "nuisance") not in WORDS["role"] else "type"
        key, missing, value = f"{key}.{name}", name not in value, value.get(name)
    elif item["type"].startswith("union_tag") and isinstance(value, Mapping):
        missing, value = "name" not in value, value.get("name")
        key = f"{key}.name" if missing else key
    elif item["type"] not in ("literal_error", "missing", "model_attributes_type"):
        return None
    if name not in WORDS:
        return None
    words = ", ".join(WORDS[name][:-1]) + f" or {WORDS[name][-1]}"
    return f"{key} is missing; it must be {words}." if missing else f"{key} is {value!r}; it must be {words}."
