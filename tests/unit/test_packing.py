"""Packed batches: nothing but the padding's cost changes, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import clusterns_ray.attention
from clusterns_ray.attention import PACKABLE, can_pack
from clusterns_ray.config import EncoderConfig
from clusterns_ray.dropout import Dropout
from clusterns_ray.encoder import Encoder
from clusterns_ray.packing import Packing, packed_attention

LENGTHS = [5, 1, 7, 7, 3]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        yield


def mask_of(lengths: list[int]) -> torch.Tensor:
    return (torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]).long()


def test_real_tokens_in_order_and_back():
    packing = Packing.of(mask_of(LENGTHS))
    x_BTD = torch.randn(5, 7, 4, requires_grad=True)
    x_ND = packing.pack(x_BTD)
    rows = [x_BTD[row, :length] for row, length in enumerate(LENGTHS)]
    torch.testing.assert_close(x_ND, torch.cat(rows))
    assert packing.positions_N.tolist() == [position for length in LENGTHS for position in range(length)]
    back_BTD = packing.unpack(x_ND)
    real = mask_of(LENGTHS).bool()
    assert torch.equal(back_BTD[real], x_BTD[real]) and not back_BTD[~real].any()
    weights = torch.randn_like(back_BTD)
    (back_BTD * weights).sum().backward()
    assert x_BTD.grad is not None
    torch.testing.assert_close(x_BTD.grad, weights * real[:, :, None])


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4]])
def test_attention_and_its_gradients_are_torchs_row_by_row(lengths: list[int]):
    n, heads, width = sum(lengths), 3, 8
    leaves = [torch.randn(1, n, heads, width, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query, key, value = (leaf.transpose(1, 2) for leaf in leaves)
    ours = packed_attention(query, key, value, Packing.of(mask_of(lengths)), 0.0, 0.4)
    assert ours.shape == (1, n, heads, width)
    pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    theirs = [nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2) for q, k, v in pieces]
    expected = torch.cat(theirs, dim=1)
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(ours)
    found = torch.autograd.grad((ours * weights).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), leaves))


def test_gradients_with_dropout_are_those_of_finite_differences():
    packing = Packing.of(mask_of([3, 1, 4]))

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, p: float = 0.3) -> torch.Tensor:
        torch.manual_seed(5)  # the same weights are dropped at each call
        return packed_attention(query, key, value, packing, p, 0.5)

    inputs = [torch.randn(1, 2, 8, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query, key, value = inputs
    assert not torch.allclose(attend(query, key, value), attend(query, key, value, p=0.0))
    assert torch.autograd.gradcheck(attend, inputs)


def test_dropout_of_weights_keeps_their_mean():
    packing = Packing.of(mask_of([40] * 500))
    query = torch.zeros(1, 2, 20_000, 4)
    out = packed_attention(query, query, torch.ones_like(query), packing, 0.2, 1.0)
    assert float(out.mean()) == pytest.approx(1.0, abs=5 * (0.25 / 40 / 40_000) ** 0.5)
    assert float(out[..., 0].var()) == pytest.approx(0.25 / 40, rel=0.05)


def encoder_of(model: Path, pooling: str) -> Encoder:
    encoder = Encoder.for_training(EncoderConfig(name=str(model), pooling=pooling, dropout=0.1, max_length=16), 0)  # type: ignore[arg-type]
    for module in encoder.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    return encoder


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


CASES = [(kind, "mean", "fp32") for kind in PACKABLE]
CASES += [("bert", pooling, "fp32") for pooling in ("cls", "first_last", "top2")]
CASES += [(kind, "mean", "bf16") for kind in ("bert", "roberta")]


@pytest.mark.parametrize(("kind", "pooling", "precision"), CASES)
def test_an_encoder_packs_in_training_and_nothing_changes(
    kind: str, pooling: str, precision: str, tiny_models: Callable[[str], Path]
):
    encoder = encoder_of(tiny_models(kind), pooling)
    assert can_pack(encoder.backbone)
    half = precision == "bf16"
    pad = encoder.tokenizer.pad_token_id
    mask = mask_of(LENGTHS)
    ids = torch.randint(6, 60, mask.shape).where(mask.bool(), torch.tensor(pad))
    weights = torch.randn(len(ids), encoder.width)

    def outcome(packs: bool, words: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        encoder.train()
        encoder.packs = packs
        encoder.zero_grad()
        found = encoder.backbone.get_input_embeddings()(ids) if words else None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            z_BD = encoder(ids, mask, words_BTD=found)
        (z_BD * weights).sum().backward()
        return z_BD.detach(), [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    expected, expected_gradients = outcome(packs=False, words=False)
    for words in (False, True):
        found, gradients = outcome(packs=True, words=words)
        assert len(gradients) == len(expected_gradients) > 10
        if half:  # of eight binary digits, some are lost on either way
            for ours, theirs in ((found, expected), (flat(gradients), flat(expected_gradients))):
                assert float((ours - theirs).norm() / theirs.norm()) < 0.02
        else:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)


def test_no_mask_of_tokens_by_tokens_is_made(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    encoder, seen = encoder_of(tiny_model, "mean"), []

    def spy(*arguments: object) -> torch.Tensor:
        seen.append(arguments)
        return packed_attention(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(clusterns_ray.attention, "packed_attention", spy)
    mask = mask_of(LENGTHS)
    passed = []
    for layer in encoder.backbone.encoder.layer:
        layer.register_forward_pre_hook(lambda module, args, kwargs: passed.append((args, kwargs)), with_kwargs=True)
    encoder(torch.full(mask.shape, 7), mask)
    assert len(seen) == len(encoder.backbone.encoder.layer) > 0
    for args, kwargs in passed:
        assert args[0].shape == (1, sum(LENGTHS), encoder.width)
        assert len(args) < 2 or args[1] is None
        assert kwargs.get("attention_mask") is None


def test_with_another_attention_nothing_is_packed(tiny_model: Path):
    """It would take all sentences for one."""
    encoder = encoder_of(tiny_model, "mean")
    mask = mask_of(LENGTHS)
    ids = torch.randint(6, 60, mask.shape)
    expected = encoder(ids, mask)
    encoder.backbone.set_attn_implementation("sdpa")
    torch.testing.assert_close(encoder(ids, mask), expected, atol=1e-6, rtol=1e-5)
