"""The packed forward pass of BERT and its like: the values and gradients of transformers' own, padded one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import clusterns_ray.kernels.packed_attention
import clusterns_ray.models.packed_bert
from clusterns_ray.config import EncoderConfig
from clusterns_ray.data.sampler import random_draws
from clusterns_ray.models.encoder import Encoder, TokenBatch
from clusterns_ray.models.packed_bert import PACKABLE, PackedBert, can_pack, multiply, onednn_multiplies

BATCHES = [[5, 1, 7, 7, 3], [12, 4]]
PROMPT = 'this sentence : "{sentence}" means [MASK] .'


def encoder_of(model: Path, pooling: str = "mean", dropout: float = 0.1, quiet: bool = True) -> Encoder:
    """In training; without dropout if ``quiet``."""
    prompt = PROMPT if pooling == "mask" else None
    config = EncoderConfig(name=str(model), pooling=pooling, dropout=dropout, max_length=16, prompt=prompt)  # type: ignore[arg-type]
    encoder = Encoder.for_training(config, 0).train()
    if quiet:
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return encoder


def row_keys(rows: int, number: int) -> np.ndarray:
    return random_draws(np.arange(rows), "test", number)


def batches_of(encoder: Encoder, lengths: list[list[int]] = BATCHES) -> list[TokenBatch]:
    found = []
    for number, rows in enumerate(lengths):
        mask = (torch.arange(max(rows))[None, :] < torch.tensor(rows)[:, None]).long()
        ids = torch.randint(6, 60, mask.shape)
        if encoder.pooling == "mask":
            ids[torch.arange(len(rows)), torch.tensor(rows) // 2] = encoder.tokenizer.mask_token_id
        ids = ids.where(mask.bool(), torch.tensor(encoder.tokenizer.pad_token_id))
        found.append(TokenBatch(ids, mask, row_keys_B=row_keys(len(rows), number)))
    return found


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


CASES = [(kind, "mean", "fp32", False) for kind in PACKABLE]
CASES += [("bert", pooling, "fp32", True) for pooling in ("cls", "mask", "first_last", "top2")]
CASES += [("roberta", "cls", "fp32", False)]
CASES += [(kind, pooling, "bf16", True) for kind in ("bert", "roberta") for pooling in ("mean", "cls")]


@pytest.mark.parametrize(("kind", "pooling", "precision", "quiet"), CASES)
def test_values_and_gradients_are_transformers(
    kind: str, pooling: str, precision: str, quiet: bool, tiny_models: Callable[[str], Path]
):
    """With dropout too, where not ``quiet``: both ways draw by the same keys."""
    encoder = encoder_of(tiny_models(kind), pooling, quiet=quiet)
    assert can_pack(encoder.backbone)
    batches, half = batches_of(encoder), precision == "bf16"
    weights = [torch.randn(len(batch.input_ids_BT), encoder.width) for batch in batches]

    def outcome(packs: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        encoder.packs = packs
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = encoder.embed(batches)
        torch.stack([(z_BD * w_BD).sum() for z_BD, w_BD in zip(found, weights, strict=True)]).sum().backward()
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        return torch.cat(found).detach(), gradients

    expected, expected_gradients = outcome(packs=False)
    found, gradients = outcome(packs=True)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 10
    assert found.dtype == torch.float32
    if half:  # of eight binary digits, some are lost on either way
        ours, theirs = (flat([g[name] for name in expected_gradients]) for g in (gradients, expected_gradients))
        for a, b in ((found, expected), (ours, theirs)):
            assert float((a - b).norm() / b.norm()) < 0.02
    else:
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "mask", "first_last"])
@pytest.mark.parametrize("bf16", [False, True])
def test_finished_embeddings_are_transformers(
    pooling: str, bf16: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without gradients, where weights are laid out anew; also of rows so long that attention keeps no scores."""
    monkeypatch.setattr(clusterns_ray.kernels.packed_attention, "FUSED_FROM", 12)
    encoder = encoder_of(tiny_model, pooling).eval()
    encoder.max_length = 30
    texts = ["a word", "another sentence of a few words", "one " * 80, "is it so ?"]
    packed = encoder.encode(texts, bf16=bf16)
    encoder.packs = False
    padded = encoder.encode(texts, bf16=bf16)
    np.testing.assert_allclose(packed, padded, atol=0.03 if bf16 else 1e-5)
    assert encoder._weights is None


def test_masks_made_at_once_and_one_by_one_are_the_same(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """As a GPU has them, and a CPU."""
    encoder, outcomes = encoder_of(tiny_model, quiet=False), []
    batches = batches_of(encoder)
    for at_once in (False, True):
        monkeypatch.setattr(clusterns_ray.models.packed_bert, "masks_at_once", lambda device, at_once=at_once: at_once)
        encoder.zero_grad()
        z_BD = torch.cat(encoder.embed(batches))
        z_BD.square().sum().backward()
        gradients = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
        outcomes.append([z_BD.detach(), *gradients])
    assert len(gradients) > 10
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_with_dropout_a_batch_does_not_depend_on_those_beside_it(tiny_model: Path):
    encoder = encoder_of(tiny_model, quiet=False)
    batches = batches_of(encoder)
    together = encoder.embed(batches)
    alone = [encoder.embed([batch])[0] for batch in reversed(batches)][::-1]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    other = encoder.embed([batch._replace(row_keys_B=row_keys(len(batch.input_ids_BT), 7)) for batch in batches])
    assert not torch.allclose(together[0], other[0], atol=1e-3)
    torch.manual_seed(1)
    first, second = (encoder.embed([batches[0]._replace(row_keys_B=None)])[0] for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3), "without a key the draws go on"


@pytest.mark.parametrize("packs", [True, False])
def test_with_dropout_a_batch_is_the_same_in_any_number_of_pieces(packs: bool, tiny_model: Path):
    """Each padded to its own longest row; values and gradients."""
    encoder = encoder_of(tiny_model, quiet=False)
    lengths, keys_B = [3, 4, 4, 5, 7, 7, 9, 12], row_keys(8, 1)
    whole = batches_of(encoder, [lengths])[0]
    outcomes = []
    for pieces in (1, 2, 8):
        encoder.packs = packs or pieces == 1  # whole and packed, it is the same as in padded pieces
        batches = []
        for rows in np.array_split(np.arange(8), pieces):
            ids, mask = (each[rows, : lengths[rows[-1]]] for each in whole[:2])
            batches.append(TokenBatch(ids, mask, row_keys_B=keys_B[rows], lengths_B=np.array(lengths)[rows]))
        encoder.zero_grad()
        z_BD = torch.cat(encoder.embed(batches))
        z_BD.square().sum().backward()
        outcomes.append((z_BD.detach(), {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}))
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_all_precisions_draw_the_same_dropout(tiny_model: Path, precision: torch.dtype):
    encoder = encoder_of(tiny_model, quiet=False, dropout=0.5)
    batches = batches_of(encoder)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        found = torch.cat(encoder.embed(batches))
    torch.testing.assert_close(found, torch.cat(encoder.embed(batches)), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("pooling", ["mean", "cls", "mask", "first_last"])
@pytest.mark.parametrize("packs", [True, False])
def test_two_draws_are_the_batch_twice(packs: bool, pooling: str, tiny_model: Path):
    """Values and gradients; as one batch of twice the rows they draw the same dropout."""
    encoder = encoder_of(tiny_model, pooling, quiet=False)
    encoder.packs = packs
    batches = [
        batch._replace(draws=2, row_keys_B=row_keys(2 * len(batch.input_ids_BT), number))
        for number, batch in enumerate(batches_of(encoder))
    ]
    twice = [
        TokenBatch(b.input_ids_BT.repeat(2, 1), b.attention_mask_BT.repeat(2, 1), row_keys_B=b.row_keys_B)
        for b in batches
    ]
    outcomes = []
    for given in (batches, twice):
        encoder.zero_grad()
        z_BD = torch.cat(encoder.embed(given))
        z_BD.square().sum().backward()
        outcomes.append((z_BD.detach(), {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}))
    assert len(outcomes[0][0]) == 2 * sum(map(len, BATCHES))
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=1e-5, rtol=1e-4)
    first, second = outcomes[0][0][: 2 * len(BATCHES[0])].chunk(2)
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize(("onednn", "multiplied"), [(True, 64), (False, sum(map(sum, BATCHES)))])
@pytest.mark.parametrize("pooling", ["cls", "mask"])
def test_the_last_layer_computes_no_more_than_is_read(
    pooling: str, onednn: bool, multiplied: int, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where oneDNN multiplies, which compiles for each number of rows, this is a multiple of 32."""
    encoder, rows = encoder_of(tiny_model, pooling), []
    monkeypatch.setattr(clusterns_ray.models.packed_bert, "onednn_multiplies", lambda dtype: onednn)

    def spy(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(x_NI))
        return nn.functional.linear(x_NI, weight_OI, bias_O)

    monkeypatch.setattr(clusterns_ray.models.packed_bert, "multiply", spy)
    encoder.embed(batches_of(encoder))
    sentences = sum(map(len, BATCHES))
    assert rows == [multiplied] * (4 * len(encoder.backbone.encoder.layer) - 3) + [sentences] * 3


def test_weights_are_read_anew_after_they_changed(tiny_model: Path):
    encoder = encoder_of(tiny_model).eval()
    before = encoder.encode(["a word"])
    with torch.no_grad():
        encoder.backbone.encoder.layer[0].output.dense.weight.mul_(1.5)
    assert np.abs(encoder.encode(["a word"]) - before).max() > 1e-3


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("change", ["type", "hook", "decoder", "double"])
def test_a_model_that_was_changed_is_left_to_transformers(change: str, tiny_model: Path):
    encoder = encoder_of(tiny_model).eval()
    layer = encoder.backbone.encoder.layer[0]
    plain = encoder.encode(["a word", "two words of it"])
    if change == "type":
        old = layer.output.dense
        layer.output.dense = Doubled(old.in_features, old.out_features)
        layer.output.dense.load_state_dict(old.state_dict())
    elif change == "hook":
        layer.output.dense.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif change == "decoder":
        encoder.backbone.config.is_decoder = True
    else:
        encoder.backbone.double()
    assert not can_pack(encoder.backbone)
    if change in ("type", "hook"):
        assert np.abs(encoder.encode(["a word", "two words of it"]) - plain).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("onednn", [True, False])
def test_products_are_torchs(dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch):
    if not onednn:
        monkeypatch.setattr(clusterns_ray.models.packed_bert, "onednn_multiplies", lambda dtype: False)
    half = dtype == torch.bfloat16
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((70, 40), (50, 40), (50,)))
    y = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(multiply(x, weight, bias), y, atol=0.1 if half else 1e-5, rtol=0.02)
    # The gradient of the inputs multiplies by the transpose of the weight, as it lies.
    torch.testing.assert_close(multiply(y, weight.T, None), y @ weight, atol=1.0 if half else 1e-4, rtol=0.02)


def test_where_onednn_cannot_multiply_it_is_not_asked_to(monkeypatch: pytest.MonkeyPatch, tiny_model: Path):
    assert not onednn_multiplies(torch.float64)
    encoder = encoder_of(tiny_model).eval()
    expected = encoder.encode(["a word", "some more words"])
    monkeypatch.setattr(clusterns_ray.models.packed_bert, "onednn_multiplies", lambda dtype: False)
    np.testing.assert_allclose(encoder.encode(["a word", "some more words"]), expected, atol=1e-6)


def test_states_of_all_layers(tiny_model: Path):
    encoder = encoder_of(tiny_model)
    batch = batches_of(encoder)[0]
    output = encoder.backbone(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, output_hidden_states=True
    )
    packing = clusterns_ray.models.packed_bert.Packing.of(batch.real_BT(), torch.device("cpu"))
    token_embeds_ND = encoder.backbone.get_input_embeddings()(packing.pack(batch.input_ids_BT))
    states = PackedBert(encoder.backbone, torch.float32)(token_embeds_ND, [packing], all_layers=True)
    assert len(states) == len(output.hidden_states)
    for ours, theirs in zip(states, output.hidden_states, strict=True):
        torch.testing.assert_close(ours, packing.pack(theirs), atol=1e-5, rtol=1e-5)
