"""The search space: what may vary, under which conditions, and how a proposal becomes values of the configuration.

Names are the configuration's own keys (``train.learning_rate``). A parameter with ``when`` is asked for only where the
other keys have those values; elsewhere the base configuration's value stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from clusterns_ray.config import NO_BOOLEANS, Config, Section, check_plain_values, make_config
from clusterns_ray.errors import ConfigError

Scalar = bool | int | float | str | None
Overrides = dict[str, Scalar]
"""Values by configuration key."""

STEP_DIGITS = 12
"""Stepped floats are rounded to these digits: 0.2 + 0.1 is 0.3."""
MAX_STEPS = 1_000_000
"""Values of a stepped float; where there are more, it is as good as a continuum."""
LARGEST_INTEGER = 2**53
"""Samplers compute with floats, which hold integers up to here."""


class Comparison(Section):
    """A condition on a number, or `not` on any value; all that are set must hold."""

    above: float | None = None
    below: float | None = None
    not_: Scalar = Field(default=None, alias="not")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("a condition needs one of above, below, not; or write the value itself, or a list of them")
        return self

    def holds(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (
            (self.above is None or (number and value > self.above))
            and (self.below is None or (number and value < self.below))
            and ("not_" not in self.model_fields_set or not same(value, self.not_))
        )


def _shape(value: Any) -> str:
    """Which of the conditions an entry of `when` is."""
    if isinstance(value, Mapping | Comparison):
        return "comparison"
    return "list" if isinstance(value, list) else "value"


Condition = Annotated[
    Annotated[Comparison, Tag("comparison")] | Annotated[list[Scalar], Tag("list")] | Annotated[Scalar, Tag("value")],
    Discriminator(_shape),
]
"""A value, a list of values of which one is met, or a comparison."""


class _Varied(Section):
    role: Literal["scientific", "nuisance"] = "scientific"
    """A label for the report. `scientific`: what the study asks about. `nuisance`: what has to be tuned along, for a
    fair comparison."""
    when: dict[str, Condition] = Field(default_factory=dict)
    """Other keys of the configuration, and what they must be for this one to matter; all must hold."""


class IntParameter(_Varied):
    type: Literal["int"]
    low: int = Field(strict=True, ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)
    """The smallest value."""
    high: int = Field(strict=True, ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)
    """The largest value."""
    step: int = Field(default=1, strict=True, ge=1, le=LARGEST_INTEGER)
    """Between one value and the next."""
    log: bool = False
    """Draw uniformly in the logarithm."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        _check_range(self.low, self.high, self.step if self.step > 1 else None, self.log)
        return self

    def suggest(self, name: str, trial: Suggests) -> int:
        return trial.suggest_int(name, self.low, self.high, step=self.step, log=self.log)

    def contains(self, value: Scalar) -> bool:
        return type(value) is int and self.low <= value <= self.high and (value - self.low) % self.step == 0

    def grid(self) -> range:
        """Every value there is."""
        return range(self.low, self.high + 1, self.step)

    def ends(self) -> list[int]:
        return [self.low, self.high]

    def describe(self) -> str:
        return f"integers from {self.low} to {self.high}" + (f" in steps of {self.step}" if self.step > 1 else "")


class FloatParameter(_Varied):
    type: Literal["float"]
    low: float = Field(strict=True)
    """The smallest value."""
    high: float = Field(strict=True)
    """The largest value."""
    step: float | None = Field(default=None, strict=True, gt=0)
    """Between one value and the next; if unset, any value between the two."""
    log: bool = False
    """Draw uniformly in the logarithm."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        _check_range(self.low, self.high, self.step, self.log)
        return self

    def suggest(self, name: str, trial: Suggests) -> float:
        value = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        return value if self.step is None else round(value, STEP_DIGITS)

    def contains(self, value: Scalar) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return self.step is None or _is_whole((value - self.low) / self.step)

    @cached_property
    def _values(self) -> list[float] | None:
        if self.step is None:
            return None
        count = round((self.high - self.low) / self.step) + 1
        return [round(self.low + number * self.step, STEP_DIGITS) for number in range(count)]

    def grid(self) -> list[float] | None:
        """Every value there is; None where there is no step: a continuum has no grid."""
        return self._values

    def ends(self) -> list[float]:
        return [self.low, self.high]

    def describe(self) -> str:
        return f"numbers from {self.low} to {self.high}" + (f" in steps of {self.step}" if self.step else "")


class ChoiceParameter(_Varied):
    type: Literal["choice"]
    choices: list[Scalar]
    """The values there are."""

    @model_validator(mode="after")
    def _choices(self) -> Self:
        if not self.choices:
            raise ValueError("choices is empty; list at least two values, or give the key role: fixed with a value")
        if len({(isinstance(choice, bool), choice) for choice in self.choices}) < len(self.choices):
            raise ValueError(f"choices {str(self.choices)[:200]} holds a value twice; list each once")
        return self

    def suggest(self, name: str, trial: Suggests) -> Scalar:
        return trial.suggest_categorical(name, self.choices)

    def contains(self, value: Scalar) -> bool:
        return any(same(value, choice) for choice in self.choices)

    def grid(self) -> list[Scalar]:
        """Every value there is."""
        return self.choices

    def ends(self) -> list[Scalar]:
        return self.choices

    def describe(self) -> str:
        return f"one of {self.choices}"


class FixedParameter(Section):
    role: Literal["fixed"]
    """Held at one value for the whole study, and said so."""
    value: Scalar
    """That value."""


def _kind(value: Any) -> str | None:
    """Which of the parameters an entry of `space` is."""
    get = value.get if isinstance(value, Mapping) else lambda key: getattr(value, key, None)
    return "fixed" if get("role") == "fixed" else get("type")


Parameter = Annotated[
    Annotated[IntParameter, Tag("int")]
    | Annotated[FloatParameter, Tag("float")]
    | Annotated[ChoiceParameter, Tag("choice")]
    | Annotated[FixedParameter, Tag("fixed")],
    Discriminator(
        _kind,
        custom_error_type="parameter_type",
        custom_error_message="needs type int, float or choice; or role fixed, with a value",
    ),
]
Varied = IntParameter | FloatParameter | ChoiceParameter


class Suggests(Protocol):
    """The methods of an ``optuna.trial.Trial`` that a space calls."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...
    def suggest_categorical(self, name: str, choices: list[Scalar]) -> Scalar: ...


class Space:
    """The varied keys in an order in which conditions come before what depends on them, over a base configuration.

    Raises:
        ValueError: conditions lead in a circle, or name a key that is not in the configuration.
    """

    def __init__(self, parameters: Mapping[str, Varied], base: Config) -> None:
        self.base, self._base = base, base.resolved()
        self._base_values = flatten(self._base)
        for name, parameter in parameters.items():
            for key in parameter.when:
                if key not in self._base_values:
                    raise ValueError(f"space.{name}.when: unknown key {key}")
        self.parameters: dict[str, Varied] = {name: parameters[name] for name in _order(parameters)}

    def suggest(self, trial: Suggests) -> Overrides:
        """Ask ``trial`` for every parameter that matters, given those before it."""
        overrides: Overrides = {}
        for name, parameter in self.parameters.items():
            if self.matters(name, overrides):
                overrides[name] = parameter.suggest(name, trial)
        return overrides

    def matters(self, name: str, overrides: Mapping[str, Any]) -> bool:
        """Whether the conditions of ``name`` hold, under the base's values and ``overrides``."""
        return all(
            _holds(condition, overrides.get(key, self._base_values[key]))
            for key, condition in self.parameters[name].when.items()
        )

    def points(self, values: Mapping[str, Sequence[Any]]) -> Iterator[Overrides]:
        """Every combination of ``values``, a parameter that does not matter left out."""
        names = list(self.parameters)

        def extend(overrides: Overrides, position: int) -> Iterator[Overrides]:
            if position == len(names):
                yield overrides
            elif not self.matters(names[position], overrides):
                yield from extend(overrides, position + 1)
            else:
                for value in values[names[position]]:
                    yield from extend({**overrides, names[position]: value}, position + 1)

        return extend({}, 0)

    def grid(self) -> Iterator[Overrides]:
        """Every point of a space whose floats all have steps."""
        return self.points({name: parameter.grid() or [] for name, parameter in self.parameters.items()})

    def config(self, overrides: Mapping[str, Any], source: str = "trial") -> Config:
        """The base configuration with these values; ConfigError if they cannot be."""
        values = with_values(self._base, overrides)
        try:
            # Thousands of combinations are tried before a study starts, so only what may be new is checked again.
            check_plain_values(overrides, source, NO_BOOLEANS)
            return Config.model_validate(values)
        except (ConfigError, ValidationError):
            return make_config(values, source)  # the same error in the words of the configuration


def with_values(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration tree with ``section.key`` values replaced."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for name, value in overrides.items():
        section, _, key = name.rpartition(".")
        (tree[section] if section else tree)[key] = value
    return tree


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"train": {"epochs": 1}}`` to ``{"train.epochs": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def same(a: Any, b: Any) -> bool:
    """Equality that keeps true and 1 apart."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def point_key(point: Mapping[str, Scalar]) -> frozenset[tuple[str, bool, Scalar]]:
    """A point as something that sets hold, with true and 1 kept apart."""
    return frozenset((key, isinstance(value, bool), value) for key, value in point.items())


def _holds(condition: Condition, value: Any) -> bool:
    if isinstance(condition, Comparison):
        return condition.holds(value)
    return any(same(value, option) for option in (condition if isinstance(condition, list) else [condition]))


def _order(parameters: Mapping[str, Varied]) -> list[str]:
    """File order, moved as little as conditions ask for."""
    done: dict[str, None] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        if name in done:
            return
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise ValueError(f"space: the conditions lead in a circle ({circle}); remove one `when`")
        path.append(name)
        for key in parameters[name].when:
            if key in parameters:
                visit(key)
        path.pop()
        done[name] = None

    for name in parameters:
        visit(name)
    return list(done)


def _check_range(low: float, high: float, step: float | None, log: bool) -> None:
    if not low < high:
        raise ValueError(f"low is {low} and high {high}: nothing lies between; make low < high, or use role: fixed")
    if log and step is not None:
        raise ValueError("log and step exclude each other; leave one out")
    if log and low <= 0:
        raise ValueError(f"low is {low}: a logarithm needs low > 0")
    if step is not None and (high - low) / step < 1 - 1e-8:
        raise ValueError(f"step is {step}, more than lies between low ({low}) and high ({high}); make it smaller")
    if isinstance(step, float) and (high - low) / step > MAX_STEPS:
        raise ValueError(
            f"steps of {step} from {low} to {high} make more than {MAX_STEPS:,} values; make step larger, or leave it "
            "out"
        )
    if isinstance(step, float) and (step < 10 ** (3 - STEP_DIGITS) or round(low, STEP_DIGITS) != low):
        raise ValueError(
            f"low is {low} and step {step}, but stepped values are rounded to {STEP_DIGITS} decimal places; leave step "
            "out, or use log: true"
        )
    if step is not None and not _is_whole((high - low) / step):
        last = round(low + math.floor((high - low) / step) * step, STEP_DIGITS)
        raise ValueError(f"steps of {step} from {low} do not meet high ({high}); make high {last}")


def _is_whole(value: float) -> bool:
    return abs(value - round(value)) < 1e-8
