"""The search space: kinds of parameters, conditions, and the way from a proposal to a configuration."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from clusterns_ray.config import make_config
from clusterns_ray.tuning.space import Parameter, Space, flatten, same, with_values

BASE = make_config({"data": {"corpus": "demo"}})
PARAMETER = TypeAdapter(Parameter)


def parameter(**values: Any) -> Any:
    return PARAMETER.validate_python({"role": "scientific", **values})


def space(**parameters: Mapping[str, Any]) -> Space:
    """Keys with two underscores for the dot."""
    return Space({name.replace("__", "."): parameter(**values) for name, values in parameters.items()}, BASE)


class Drawn:
    """A trial that draws at random, and notes what it was asked for."""

    def __init__(self, seed: int):
        self.draw, self.asked = random.Random(seed), []

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        self.asked.append(name)
        return self.draw.randrange(low, high + 1, step)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        self.asked.append(name)
        if step is None:
            return self.draw.uniform(low, high)
        return low + step * self.draw.randrange(round((high - low) / step) + 1)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self.asked.append(name)
        return self.draw.choice(choices)


K = {"type": "choice", "choices": [0, 32, 64]}
NOT_ZERO = {"clustering.num_clusters": {"not": 0}}
CONDITIONAL = {
    "loss__bml_alpha": {"type": "float", "low": 0, "high": 0.2, "step": 0.1, "when": {"loss.bml_weight": {"above": 0}}},
    "loss__bml_weight": {"type": "choice", "choices": [0.0, 0.01], "when": NOT_ZERO},
    "clustering__num_clusters": K,
    "train__learning_rate": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True},
}  # fmt: skip


def test_conditions_come_before_what_depends_on_them_else_in_the_files_order() -> None:
    assert list(space(**CONDITIONAL).parameters) == [
        "clustering.num_clusters",
        "loss.bml_weight",
        "loss.bml_alpha",
        "train.learning_rate",
    ]


def test_what_does_not_matter_is_not_asked_for() -> None:
    of = space(**CONDITIONAL)
    seen = set()
    for seed in range(200):
        trial = Drawn(seed)
        overrides = of.suggest(trial)
        assert trial.asked == list(overrides)
        clusters = overrides["clustering.num_clusters"]
        assert ("loss.bml_weight" in overrides) == (clusters != 0)
        # without a proposal the base's weight counts, and that is above 0
        weight = overrides.get("loss.bml_weight", BASE.loss.bml_weight)
        assert ("loss.bml_alpha" in overrides) == (weight > 0)
        assert "train.learning_rate" in overrides
        seen.add(frozenset(overrides))
    assert len(seen) == 3


def test_a_proposal_becomes_a_configuration_and_nothing_else_changes() -> None:
    of = space(**CONDITIONAL)
    overrides = of.suggest(Drawn(3))
    made, base = flatten(of.config(overrides).resolved()), flatten(BASE.resolved())
    assert overrides and {key for key in base if not same(made[key], base[key])} <= set(overrides)
    assert {key: made[key] for key in overrides} == overrides
    assert flatten(BASE.resolved()) == base, "the base was changed"


def test_the_seed_is_a_key_too() -> None:
    assert with_values(BASE.resolved(), {"seed": 7, "train.epochs": 2})["seed"] == 7


@pytest.mark.parametrize(
    ("condition", "met", "not_met"),
    [
        (32, [32], [0, 64]),
        ([32, 64], [32, 64], [0]),
        ({"not": 0}, [32, 64], [0]),
        ({"above": 32}, [64], [0, 32]),
        ({"above": 0, "below": 64}, [32], [0, 64]),
    ],
)
def test_conditions(condition: Any, met: list[int], not_met: list[int]) -> None:
    of = space(
        clustering__num_clusters=K,
        clustering__rate={"type": "float", "low": 0.1, "high": 0.2, "when": {"clustering.num_clusters": condition}},
    )
    for clusters, expected in [*((k, True) for k in met), *((k, False) for k in not_met)]:
        assert of.matters("clustering.rate", {"clustering.num_clusters": clusters}) is expected


def test_true_is_not_one() -> None:
    of = space(loss__hard_negative_weight={"type": "int", "low": 0, "high": 1, "when": {"loss.hard_negatives": 1}})
    assert not of.matters("loss.hard_negative_weight", {"loss.hard_negatives": True})
    assert of.matters("loss.hard_negative_weight", {"loss.hard_negatives": 1})


def test_a_condition_on_a_key_that_does_not_vary_reads_the_base() -> None:
    of = space(clustering__rate={"type": "float", "low": 0.1, "high": 0.2, "when": {"clustering.update": "mean"}})
    assert of.matters("clustering.rate", {})


def test_conditions_in_a_circle_are_refused() -> None:
    with pytest.raises(ValueError, match=r"circle \(loss\.bml_alpha -> loss\.bml_beta -> loss\.bml_alpha\)"):
        space(
            loss__bml_alpha={"type": "float", "low": 0, "high": 0.1, "when": {"loss.bml_beta": 0.3}},
            loss__bml_beta={"type": "float", "low": 0.2, "high": 0.3, "when": {"loss.bml_alpha": 0}},
        )


def test_a_condition_on_no_key_is_refused() -> None:
    with pytest.raises(ValueError, match=r"space\.clustering\.rate\.when: unknown key clustering\.k"):
        space(clustering__rate={"type": "float", "low": 0.1, "high": 0.2, "when": {"clustering.k": 1}})


def test_the_grid_is_every_point_that_matters_once() -> None:
    of = space(**{name: p for name, p in CONDITIONAL.items() if name != "train__learning_rate"})
    points = list(of.grid())
    # K 0 leaves the base's weight, above 0, so alpha varies (3); K 32 and 64: weight 0, or 0.01 with three alphas
    assert len(points) == 3 + 2 * (1 + 3)
    assert not any(a == b for a, b in itertools.combinations(points, 2))
    assert {"clustering.num_clusters": 32, "loss.bml_weight": 0.01, "loss.bml_alpha": 0.2} in points
    assert {"clustering.num_clusters": 32, "loss.bml_weight": 0.0} in points


@settings(deadline=None)
@given(low=st.integers(-50, 50), steps=st.integers(1, 30), step=st.integers(1, 7), seed=st.integers(0, 100))
def test_integers_stay_on_their_grid(low: int, steps: int, step: int, seed: int) -> None:
    p = parameter(type="int", low=low, high=low + steps * step, step=step)
    assert p.grid()[0] == low and p.grid()[-1] == p.high and len(p.grid()) == steps + 1
    value = p.suggest("x", Drawn(seed))
    assert value in p.grid() and p.contains(value)
    assert not p.contains(p.high + step) and not p.contains(low - 1) and not p.contains(float(low))
    assert step == 1 or not p.contains(low + 1)


@settings(deadline=None)
@given(low=st.integers(0, 50), steps=st.integers(1, 30), step=st.sampled_from([0.1, 0.05, 0.3, 0.25]))
def test_stepped_floats_are_the_numbers_that_people_write(low: int, steps: int, step: float) -> None:
    low_ = round(low * 0.1, 1)
    p = parameter(type="float", low=low_, high=round(low_ + steps * step, 10), step=step)
    assert p.grid() == [round(low_ + i * step, 10) for i in range(steps + 1)]
    assert all(p.contains(value) for value in p.grid())
    assert not p.contains(low_ + step / 2) and not p.contains(p.high + step)
    assert p.suggest("x", Drawn(steps)) in p.grid()


WRONG = [
    ({"type": "int", "low": 5, "high": 5}, "low is 5 and high 5: nothing lies between"),
    ({"type": "int", "low": 0, "high": 5, "log": True}, "a logarithm needs low > 0"),
    ({"type": "int", "low": 0, "high": 5, "step": 2}, "steps of 2 from 0 do not meet high .5.; make high 4"),
    ({"type": "int", "low": 0.5, "high": 5}, "valid integer"),
    ({"type": "float", "low": 0.1, "high": 1, "step": 0.1, "log": True}, "log and step exclude each other"),
    ({"type": "float", "low": "a", "high": 1}, "valid number"),
    ({"type": "float", "low": float("nan"), "high": 1}, "finite number"),
    ({"type": "choice", "choices": []}, "choices is empty"),
    ({"type": "choice", "choices": [1, 2, 1]}, "holds a value twice"),
    ({"type": "choice", "choices": [[1]]}, "valid"),
    ({"type": "flat", "low": 0, "high": 1}, "needs type int, float or choice"),
    ({"low": 0, "high": 1}, "needs type int, float or choice"),
    ({"type": "int", "low": 0, "high": 1, "role": "idle"}, "'scientific' or 'nuisance'"),
    ({"type": "int", "low": 0, "high": 1, "hihg": 1}, "Extra inputs"),
    ({"role": "fixed"}, "Field required"),
    ({"type": "int", "low": 0, "high": 1, "when": {"seed": {}}}, "needs one of above, below, not"),
    ({"type": "int", "low": 0, "high": 1, "when": {"seed": {"abov": 1}}}, "Extra inputs"),
]


@pytest.mark.parametrize(("values", "reason"), WRONG)
def test_wrong_parameters(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        parameter(**values)


def test_a_choice_may_hold_true_and_one() -> None:
    p = parameter(type="choice", choices=[True, 1, 0.5, "a", None])
    assert [p.contains(value) for value in (True, 1, 0.5, "a", None)] == [True] * 5
    assert not p.contains(0) and not p.contains(False) and not p.contains("b")
