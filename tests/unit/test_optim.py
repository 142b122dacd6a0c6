from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import transformers
from helpers import update_weights
from torch import nn

from clusterns_ray.config import TrainConfig
from clusterns_ray.training.optim import Optimizer, decay_groups, learning_rate

CPU = torch.device("cpu")
PEAK = 3e-5


def train_config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"learning_rate": PEAK, **values})


def rates(total: int, **values: Any) -> list[float]:
    return [learning_rate(step, total, train_config(**values)) for step in range(total)]


def rates_of_transformers(schedule: Any, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = schedule(optimizer)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


# ---- the schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "ratio"), [(40, 0.0), (40, 0.1), (7, 0.5), (1, 0.0), (100, 0.99)])
def test_schedules_are_those_of_transformers(total: int, ratio: float) -> None:
    warmup = round(ratio * total)
    expected = {
        "linear": lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, total),
        "cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, warmup, total),
        "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, warmup),
    }
    for name, schedule in expected.items():
        found = rates(total, schedule=name, warmup_ratio=ratio)
        assert found == pytest.approx(rates_of_transformers(schedule, total), abs=1e-15), name
        assert max(found) == pytest.approx(PEAK)


def test_the_first_and_last_rates() -> None:
    linear = rates(10)
    assert linear[0] == PEAK and linear[-1] == pytest.approx(PEAK / 10)
    assert all(a > b for a, b in itertools.pairwise(linear))
    warm = rates(10, warmup_ratio=0.4)
    assert warm[:5] == pytest.approx([0, PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])
    assert rates(10, schedule="constant") == [PEAK] * 10
    assert rates(10, schedule="cosine")[5] == pytest.approx(PEAK / 2)


# ---- the step -----------------------------------------------------------------------------------------------------


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2))


def loss_of(module: nn.Module, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (module(torch.randn(8, 4, generator=generator)) - 1).square().mean() * scale


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def everything(optimizer: Optimizer) -> list[torch.Tensor]:
    """Weights and moments: what a step that is skipped must leave alone."""
    state = optimizer.adamw.state
    moments = [state[p][key].clone() for p in optimizer.parameters for key in ("exp_avg", "exp_avg_sq", "step")]
    return [p.detach().clone() for p in optimizer.parameters] + moments


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    assert len(a) == len(b) > 0
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_a_step_is_adamw_with_clipping() -> None:
    module = model()
    twin = copy.deepcopy(module)
    optimizer = Optimizer(module, train_config(max_grad_norm=0.1, weight_decay=0.01), "fp32", CPU)
    plain = torch.optim.AdamW(decay_groups(twin.named_parameters(), 0.01), lr=1.0)
    for step in range(4):
        rate = 0.01 * (step + 1)
        norm = update_weights(optimizer, loss_of(module), rate)
        plain.zero_grad()
        loss_of(twin).backward()
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        assert norm == pytest.approx(float(expected), rel=1e-5) and norm > 0.1, "nothing was clipped"
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
    torch.testing.assert_close(weights(module), weights(twin), rtol=1e-5, atol=1e-7)
    assert not equal(weights(module), weights(model()))


def test_gradients_are_scaled_down_to_the_norm_and_not_up() -> None:
    for limit, expected in ((0.05, 0.05), (1e6, None)):
        module = model()
        optimizer = Optimizer(module, train_config(max_grad_norm=limit), "fp32", CPU)
        before = update_weights(optimizer, loss_of(module), PEAK)
        after = math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None))
        assert after == pytest.approx(expected or float(before), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted(value: float) -> None:
    module = model()
    optimizer = Optimizer(module, train_config(), "fp32", CPU)
    update_weights(optimizer, loss_of(module), 0.01)
    before = everything(optimizer)
    for count in (1, 2, 3):
        norm = update_weights(optimizer, loss_of(module, value), 0.01)
        assert not norm.isfinite()
        assert equal(everything(optimizer), before), "weights or moments moved"
        assert optimizer.skipped.tolist() == [count, count]
    update_weights(optimizer, loss_of(module), 0.01)
    assert not equal(everything(optimizer), before), "it never moves again"
    assert optimizer.skipped.tolist() == [3, 0], "all, and in a row"


def test_one_parameter_with_nan_is_enough() -> None:
    module = model()
    optimizer = Optimizer(module, train_config(), "fp32", CPU)
    update_weights(optimizer, loss_of(module), 0.01)
    before = everything(optimizer)
    module[3].bias.register_hook(lambda grad: grad * torch.tensor([1.0, math.nan]))
    update_weights(optimizer, loss_of(module), 0.01)
    assert equal(everything(optimizer), before)
    assert optimizer.skipped.tolist() == [1, 1]


def test_fp16_scales_skips_and_counts() -> None:
    module = model()
    optimizer = Optimizer(module, train_config(), "fp16", CPU)
    assert optimizer.scaler.is_enabled()
    scale = optimizer.scaler.get_scale()
    assert scale > 1
    norm = update_weights(optimizer, loss_of(module), 0.01)
    loss_of(twin := model()).backward()
    plain = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None))
    assert float(norm) == pytest.approx(plain, rel=1e-3), "the norm is of scaled gradients"
    assert optimizer.skipped.tolist() == [0, 0]
    before = everything(optimizer)
    update_weights(optimizer, loss_of(module, math.inf), 0.01)
    assert equal(everything(optimizer), before)
    assert optimizer.skipped.tolist() == [1, 1]
    assert optimizer.scaler.get_scale() == scale / 2
    update_weights(optimizer, loss_of(module), 0.01)
    assert not equal(everything(optimizer), before)
    assert optimizer.skipped.tolist() == [1, 0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_do_not_scale(precision: str) -> None:
    assert not Optimizer(model(), train_config(), precision, CPU).scaler.is_enabled()


def test_matrices_decay_and_vectors_do_not() -> None:
    module = model()
    module[0].weight.requires_grad_(False)
    decayed, plain = decay_groups(module.named_parameters(), 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [p is module[3].weight for p in decayed["params"]] == [True]
    expected = {id(module[0].bias), id(module[1].weight), id(module[1].bias), id(module[3].bias)}
    assert {id(p) for p in plain["params"]} == expected and len(plain["params"]) == 4


def test_decay_reaches_the_weights() -> None:
    module, twin = model(), model()
    update_weights(Optimizer(module, train_config(weight_decay=0.5), "fp32", CPU), loss_of(module), 0.1)
    update_weights(Optimizer(twin, train_config(), "fp32", CPU), loss_of(twin), 0.1)
    for (name, a), b in zip(module.named_parameters(), twin.parameters()):
        assert torch.equal(a, b) is (a.ndim < 2), name


def test_frozen_parameters_stay() -> None:
    module = model()
    module[0].weight.requires_grad_(False)
    before = module[0].weight.clone()
    optimizer = Optimizer(module, train_config(weight_decay=0.5), "fp32", CPU)
    update_weights(optimizer, loss_of(module), 0.1)
    assert torch.equal(module[0].weight, before)
    assert len(optimizer.parameters) == 5


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_resumed_optimiser_goes_on_as_the_first_would(precision: str) -> None:
    module = model()
    optimizer = Optimizer(module, train_config(), precision, CPU)
    for scale in (1.0, math.nan, 1.0):
        update_weights(optimizer, loss_of(module, scale), 0.01)
    twin = model(seed=1)
    twin.load_state_dict(module.state_dict())
    resumed = Optimizer(twin, train_config(), precision, CPU)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.skipped.tolist() == [1, 0]
    assert resumed.scaler.get_scale() == optimizer.scaler.get_scale()
    before = weights(module)
    for one, other in ((module, optimizer), (twin, resumed)):
        update_weights(other, loss_of(one), 0.02)
        update_weights(other, loss_of(one), 0.01)
    assert equal(everything(optimizer), everything(resumed))
    assert not equal(weights(module), before)
