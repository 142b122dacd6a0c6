"""Dropout by keys: its probability, randomness and gradient, what it depends on, and that it leaves the rest alone."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

from dropout_randomness import ALARM, battery

import clusterns_ray.kernels.dropout
from clusterns_ray.config import EncoderConfig
from clusterns_ray.kernels.dropout import drop, drop_by, head_keys, keep_mask, keep_masks
from clusterns_ray.models.backbone import load_transformer
from clusterns_ray.models.encoder import Encoder, TokenBatch
from clusterns_ray.models.sdpa import ATTENTION, Dropout, attention, keyed_dropout, number_dropout, use_keyed_dropout
from clusterns_ray.training.collate import DropoutKeys

CPU = torch.device("cpu")


def token_keys(row_keys_B: np.ndarray, tokens: int) -> torch.Tensor:
    return torch.from_numpy(clusterns_ray.kernels.dropout.token_keys(row_keys_B, tokens))


def keys(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return token_keys(row_keys(rows, seed), tokens)


def row_keys(rows: int, seed: int = 1, step: int = 1) -> np.ndarray:
    return DropoutKeys(seed, step, np.arange(rows)).of_rows("first")


# ---- the hash -------------------------------------------------------------------------------------------------------

MASK = 2**64 - 1


def splitmix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_it_is_the_hash_that_is_described():
    """In Python's own numbers: a run goes on with the same masks as long as this holds."""
    gamma, row, position, site, p = 0x9E3779B97F4A7C15, 123456789, 3, 5, 0.3
    found = keep_mask(token_keys(np.array([row]), 4), 30, p, site)[0, position]
    key = splitmix((row + (position + 1) * gamma) & MASK)
    for element in range(30):
        x = key ^ splitmix((2**40 + site + 1) * gamma & MASK) ^ splitmix((element // 4 + 1) * gamma & MASK)
        for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            x = (x * multiplier) & MASK
            x ^= x >> 32
        number = (x >> 16 * (element % 4)) & 0xFFFF
        signed = number - 2**16 if number >= 2**15 else number
        assert bool(found[element]) == (signed >= round(p * 2**16) - 2**15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "width"), [((3,), 1), ((2, 5), 7), ((2, 3, 4), 32), ((700,), 400), ((1, 2), 70_000)])
def test_a_cpu_draws_what_other_devices_do(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the pieces and threads in which it is computed, the sites beside it, and in every precision."""
    keys_S = torch.randint(-(2**63), 2**63 - 1, shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = keep_mask(keys_S, width, 0.3, 2, kept=2.0, dtype=dtype)
    finally:
        torch.set_num_threads(threads)
    sites = {5: 0.1, 2: 0.3, 7: 0.5}
    for together in (1, keys_S.numel() * width // 2, 2**27):
        monkeypatch.setattr(clusterns_ray.kernels.dropout, "WORDS_TOGETHER", together)
        masks = keep_masks(keys_S, width, sites)
        assert list(masks) == list(sites) and torch.equal(found, masks[2].to(dtype) * 2)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_zeros_at_every_place_of_a_word(p: float):
    """Each word of 64 bits holds four numbers: all of them, that with the sign bit too, have the same probability."""
    n = 400_000
    keep = keep_mask(keys(n, 1)[:, 0], 4, p, 0)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    for place in keep.mean(dim=0).tolist():
        assert place == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / n) + 1 / 65536)


def alarms() -> list[str]:
    return [name for name, off in battery(rows=16) if abs(off) > ALARM]


def test_it_cannot_be_told_from_random_numbers():
    assert alarms() == []


@pytest.mark.parametrize(
    ("multipliers", "seen"),
    [
        ((1, 1), "bits of two tokens and two words"),  # no product at all
        ((0xBF58476D1CE4E5B9, 1), "bits of two tokens and two words"),  # one alone: its lowest bits are weak
        ((0xBF58476D1CE4E5B9, 3), "bits of two sites"),  # the second hardly mixes
    ],
)
def test_a_weaker_hash_is_seen(multipliers: tuple[int, int], seen: str, monkeypatch: pytest.MonkeyPatch):
    weak = tuple(np.uint64(multiplier) for multiplier in multipliers)
    monkeypatch.setattr(clusterns_ray.kernels.dropout, "MULTIPLIERS", weak)
    assert seen in alarms()


@pytest.mark.parametrize("other", ["row", "step", "seed", "view", "site", "position", "head", "prefix"])
def test_what_a_mask_depends_on(other: str):
    """Each of these gives another, independent mask; how many rows, tokens and elements there are besides does not."""
    rows, tokens, width = 64, 8, 64
    first = keep_mask(keys(rows, tokens), width, 0.5, 3)
    changed = {
        "row": lambda: keep_mask(keys(2 * rows, tokens)[rows:], width, 0.5, 3),
        "step": lambda: keep_mask(token_keys(row_keys(rows, step=2), tokens), width, 0.5, 3),
        "seed": lambda: keep_mask(keys(rows, tokens, seed=2), width, 0.5, 3),
        "view": lambda: keep_mask(
            token_keys(DropoutKeys(1, 1, np.arange(rows)).of_rows("second"), tokens), width, 0.5, 3
        ),
        "site": lambda: keep_mask(keys(rows, tokens), width, 0.5, 4),
        "position": lambda: keep_mask(keys(rows, 2 * tokens)[:, tokens:], width, 0.5, 3),
        "head": lambda: keep_mask(head_keys(keys(rows, tokens), 2)[:, 1], width, 0.5, 3),
    }
    if other == "prefix":
        assert torch.equal(keep_mask(keys(rows + 3, tokens + 2), width + 5, 0.5, 3)[:rows, :tokens, :width], first)
        return
    second = changed[other]()
    assert abs(float(((first - 0.5) * (second - 0.5)).mean())) < 5 * 0.25 / math.sqrt(first.numel())


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [False, True])
def test_values_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, at_once: bool):
    """Also by a mask that was made with others, as on a GPU."""
    x = torch.randn(shape, requires_grad=True, dtype=dtype)
    keys_S = torch.randint(2**62, shape[:-1])
    y = drop_by(x, 0.25, keep_masks(keys_S, shape[-1], {1: 0.25})[1]) if at_once else drop(x, 0.25, keys_S, 1)
    keep = keep_mask(keys_S, shape[-1], 0.25, 1).bool()
    torch.testing.assert_close(y, torch.where(keep, x / 0.75, 0.0))
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(gradient, torch.where(keep, weights / 0.75, 0.0))


def test_the_mean_is_kept():
    """Also for a probability that 65,536 numbers cannot show exactly."""
    y = drop(torch.ones(1000, 4000), 0.1, keys(1000, 1)[:, 0], 0)
    assert float(y.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(0.1 / 0.9 / 4e6))
    assert y.unique().tolist() == [0.0, pytest.approx(65536 / (65536 - 6554))]


def test_no_and_all_dropout_are_torchs():
    x, keys_S = torch.randn(10), torch.tensor(1)
    assert torch.equal(drop(x, 0.0, keys_S, 0), x) and torch.equal(drop(x, 1.0, keys_S, 0), torch.zeros(10))
    module = Dropout(0.5).eval()
    with keyed_dropout(row_keys(10), CPU):
        assert module(x) is x


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 8), (3, 2, 5, 5), (4, 5, 8), (5,)])
def test_a_module_draws_by_the_keys_of_its_pass(shape: tuple[int, ...]):
    """By row, position and site; anew at each of its uses; by torch's generator where rows do not come first."""
    modules = nn.Sequential(Dropout(0.5), Dropout(0.5)).train()
    number_dropout(modules)
    x, rows = torch.ones(shape), row_keys(3)
    passes = []
    for _ in range(2):
        with keyed_dropout(rows, CPU):
            passes.append([modules[0](x), modules[0](x), modules[1](x)])
            torch.rand(5)  # what else is drawn does not matter
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))
    assert not any(torch.equal(passes[0][i], passes[0][j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    if shape == (3, 5, 8):
        assert torch.equal(passes[0][0], drop(x, 0.5, token_keys(rows, 5), modules[0].dropout_site))
    with keyed_dropout(row_keys(3, seed=2), CPU):
        assert not torch.equal(modules[0](x), passes[0][0])
    assert not torch.equal(modules[0](x), modules[0](x)), "without keys the draws go on"


def masks(kind: str) -> torch.Tensor | None:
    keep = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    keep[1, :, :, 4:] = False
    if kind == "none":
        return None
    return keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_attention_without_its_dropout_is_torchs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the dropout replaced by nothing, the steps are those of scaled dot product attention."""
    query, key, value = (torch.randn(2, 3, 6, 8) for _ in range(3))
    module = nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    monkeypatch.setattr("clusterns_ray.models.sdpa.drop", lambda x, *others: x)
    number_dropout(module)
    with keyed_dropout(row_keys(2), CPU):
        ours, _ = attention(module, query, key, value, masks(kind), dropout=0.5, scaling=0.3)
    theirs = nn.functional.scaled_dot_product_attention(query, key, value, masks(kind), scale=0.3)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_attention_drops_weights() -> None:
    query, key = torch.zeros(1, 1, 1000, 4), torch.zeros(1, 1, 1000, 4)
    module = nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    number_dropout(module)
    with keyed_dropout(row_keys(1), CPU):
        ours, _ = attention(module, query, key, torch.ones(1, 1, 1000, 4), None, dropout=0.2, scaling=1.0)
    # Each row is a mean of 1,000 kept or dropped weights, each of variance 0.2 / 0.8.
    assert float(ours.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(0.25 / 1e6))
    assert float(ours[0, :, 0, 0].var()) == pytest.approx(0.25 / 1000, rel=0.2)


def test_attention_that_asks_for_more_is_left_to_transformers() -> None:
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    ours, _ = attention(module, query, key, value, None, dropout=0.0)
    theirs = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))


@pytest.mark.slow
def test_a_model_with_it(tiny_model: Path, tmp_path: Path) -> None:
    encoder = Encoder.for_training(EncoderConfig(name=str(tiny_model), dropout=0.2), seed=0)
    kinds = {type(module) for module in encoder.backbone.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {Dropout}
    assert encoder.backbone.config._attn_implementation == ATTENTION
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    plain, _ = load_transformer(str(tiny_model), dropout=0.2)
    encoder.eval(), plain.eval()
    expected = plain(input_ids=ids, attention_mask=mask).last_hidden_state
    found = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-6, rtol=1e-5)
    encoder.train()
    with keyed_dropout(row_keys(2), CPU):
        states = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    assert not torch.allclose(states[0], expected[0])

    encoder.save(tmp_path / "model")
    assert "clusterns_sdpa" not in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert Encoder.load(tmp_path / "model").backbone.config._attn_implementation == "sdpa"


def test_dropout_of_the_model_is_as_large_as_torchs(tiny_model: Path) -> None:
    """The spread of the hidden states over draws, of all layers together, is that of torch's own dropout."""
    ids = torch.randint(5, 90, (1, 12))
    spreads = []
    for keyed in (False, True):
        backbone, _ = load_transformer(str(tiny_model), dropout=0.2)
        if keyed:
            use_keyed_dropout(backbone)
        backbone.train()
        with torch.no_grad(), keyed_dropout(row_keys(3000), CPU):
            states = backbone(input_ids=ids.expand(3000, -1)).last_hidden_state
        spreads.append(float(states.var(dim=0).mean()))
    assert spreads[0] > 1e-3 and spreads[1] == pytest.approx(spreads[0], rel=0.03)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_row_draws_the_same_in_any_company(kind: str, tiny_models: Callable[[str], Path]) -> None:
    """By transformers' own forward pass, where a model is padded: beside other rows, and longer ones."""
    encoder = Encoder.for_training(EncoderConfig(name=str(tiny_models(kind)), dropout=0.3), seed=0).train()
    encoder.packs = False
    lengths, keys_B = torch.tensor([4, 9, 6]), row_keys(3)
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(10, 40, mask.shape).where(mask.bool(), torch.tensor(encoder.tokenizer.pad_token_id))
    together = encoder.embed([TokenBatch(ids, mask, row_keys_B=keys_B)])[0]
    for row, length in enumerate(lengths.tolist()):
        one = slice(row, row + 1)
        alone = encoder.embed([TokenBatch(ids[one, :length], mask[one, :length], row_keys_B=keys_B[one])])[0]
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-4)
