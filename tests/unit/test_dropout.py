"""The dropout of training on a CPU: its probability, its gradient, its stream, and that it leaves the rest alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import clusterns_ray.kernels.dropout
from clusterns_ray.config import EncoderConfig
from clusterns_ray.kernels.dropout import Dropout, Streams, drop, keep_mask
from clusterns_ray.models.backbone import load_transformer
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.sdpa import ATTENTION, attention, use_fast_training


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_zeros_at_every_place_of_a_word(p: float) -> None:
    """Each 64-bit word holds four numbers: all of them, the one with the sign bit too, have the same probability."""
    n = 400_000
    keep = keep_mask(torch.empty(n, 4), p)
    bound = 5 * math.sqrt(p * (1 - p) / n)
    for place in keep.mean(dim=0).tolist():
        assert place == pytest.approx(1 - p, abs=bound + 1 / 65536)


def by_streams(rows: list[int], width: int, p: float, keys: list[int]) -> list[torch.Tensor]:
    masks = [torch.empty(n, width) for n in rows]
    Streams(keys).fill(masks, p)
    return masks


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_zeros_of_each_stream(p: float) -> None:
    n = 400_000
    for keep in by_streams([n, n], 4, p, [1, 2]):
        assert set(keep.unique().tolist()) == {0.0, 1.0}
        for place in keep.mean(dim=0).tolist():
            assert place == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / n) + 1 / 65536)


@pytest.mark.parametrize("drawn", ["torch", "stream"])
def test_neighbours_are_independent(drawn: str) -> None:
    n = 1_000_000
    keep = keep_mask(torch.empty(n), 0.5) if drawn == "torch" else by_streams([n], 1, 0.5, [4])[0].flatten()
    keep = keep - 0.5
    for lag in (1, 2, 3, 4, 7):
        assert abs(float((keep[:-lag] * keep[lag:]).mean())) < 5 * 0.25 / 1000


def test_streams_are_independent_and_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn side by side, of other sizes, in other company: the same numbers."""
    rows, keys = [5000, 7001, 3], [11, 12, 13]
    together = by_streams(rows, 40, 0.5, keys)
    monkeypatch.setattr(clusterns_ray.kernels.dropout, "SIDE_BY_SIDE", 10**9)
    for mask, n, key in zip(together, rows, keys, strict=True):
        assert torch.equal(by_streams([n], 40, 0.5, [key])[0], mask)
    a, b = (mask[:5000].flatten() - 0.5 for mask in together[:2])
    assert abs(float((a * b).mean())) < 5 * 0.25 / math.sqrt(200_000)


def test_a_stream_goes_on() -> None:
    streams = Streams([3])
    first, second, whole = torch.empty(8, 4), torch.empty(8, 4), torch.empty(16, 4)
    streams.fill([first], 0.5), streams.fill([second], 0.5)
    Streams([3]).fill([whole], 0.5)
    assert torch.equal(torch.cat([first, second]), whole)


def test_the_words_are_those_that_numpy_promises() -> None:
    """numpy keeps the stream of a bit generator from version to version, not what it makes of it."""
    (words,) = Streams([9])._draw([1000])
    np.testing.assert_array_equal(words.view(np.uint64) + np.uint64(2**63), np.random.SFC64(9).random_raw(1000))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 5)])
def test_values_mean_and_gradient(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    y = drop(x, 0.25)
    torch.manual_seed(3)
    keep = keep_mask(x, 0.25)
    torch.testing.assert_close(y, torch.where(keep.bool(), x / 0.75, 0.0))
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(gradient, torch.where(keep.bool(), weights / 0.75, 0.0))


def test_the_mean_is_kept() -> None:
    """Also for a probability that 65,536 numbers cannot show exactly."""
    y = drop(torch.ones(4_000_000), 0.1)
    assert float(y.mean()) == pytest.approx(1.0, abs=5 * math.sqrt(0.1 / 0.9 / 4e6))
    assert y.unique().tolist() == [0.0, pytest.approx(65536 / (65536 - 6554))]


def test_no_and_all_dropout_are_torchs() -> None:
    x = torch.randn(10)
    assert torch.equal(drop(x, 0.0), x) and torch.equal(drop(x, 1.0), torch.zeros(10))
    module = Dropout(0.5).eval()
    assert module(x) is x


def test_a_stream_of_its_own_by_the_seed() -> None:
    x = torch.randn(1000)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(drop(x, 0.3))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_it_keeps_half_precision() -> None:
    assert drop(torch.ones(100, dtype=torch.bfloat16), 0.1).dtype == torch.bfloat16


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
    monkeypatch.setattr("clusterns_ray.models.sdpa.drop", lambda x, p: x)
    ours, _ = attention(module, query, key, value, masks(kind), dropout=0.5, scaling=0.3)
    theirs = nn.functional.scaled_dot_product_attention(query, key, value, masks(kind), scale=0.3)
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_attention_drops_weights() -> None:
    query, key = torch.zeros(1, 1, 1000, 4), torch.zeros(1, 1, 1000, 4)
    module = nn.Module()
    module.is_causal = False  # type: ignore[assignment]
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
    assert not torch.allclose(encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state[0], expected[0])

    encoder.save(tmp_path / "model")
    assert "clusterns_sdpa" not in json.dumps(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert Encoder.load(tmp_path / "model").backbone.config._attn_implementation == "sdpa"


def test_dropout_of_the_model_is_as_large_as_torchs(tiny_model: Path) -> None:
    """The spread of the hidden states over draws, of all layers together, is that of torch's own dropout."""
    ids = torch.randint(5, 90, (1, 12))
    spreads = []
    for fast in (False, True):
        backbone, _ = load_transformer(str(tiny_model), dropout=0.2)
        if fast:
            use_fast_training(backbone)
        backbone.train()
        with torch.no_grad():
            states = backbone(input_ids=ids.expand(3000, -1)).last_hidden_state
        spreads.append(float(states.var(dim=0).mean()))
    assert spreads[0] > 1e-3 and spreads[1] == pytest.approx(spreads[0], rel=0.03)
