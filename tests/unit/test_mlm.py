"""Masked language modelling: which tokens, which loss, and that the contrastive part does not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES

from clusterns_ray.config import EncoderConfig
from clusterns_ray.errors import ConfigError
from clusterns_ray.models.backbone import load_language_model, load_transformer
from clusterns_ray.models.encoder import Encoder, TokenBatch
from clusterns_ray.models.sdpa import keyed_dropout
from clusterns_ray.training.mlm import (
    IGNORED,
    LanguageModelHead,
    mask_tokens,
    packed_prediction_loss,
    prediction_loss,
)

MASK, VOCABULARY, SPECIAL = 4, 1000, (0, 1, 2, 3, 4)


def masked(ids: torch.Tensor, key: int = 0, probability: float = 0.15) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(key)
    return mask_tokens(ids, probability, mask_id=MASK, vocabulary=VOCABULARY, kept_ids=SPECIAL, generator=generator)


def test_shares_of_masked_random_and_kept_tokens() -> None:
    ids = torch.randint(5, VOCABULARY, (400, 500), generator=torch.Generator().manual_seed(1))
    found, labels = masked(ids)
    chosen = labels != IGNORED
    n = int(chosen.sum())
    assert n / ids.numel() == pytest.approx(0.15, abs=0.005)
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(found[~chosen], ids[~chosen])
    became_mask, stayed = (found[chosen] == MASK), (found[chosen] == ids[chosen])
    assert float(became_mask.float().mean()) == pytest.approx(0.8, abs=0.01)
    assert float(stayed.float().mean()) == pytest.approx(0.1, abs=0.01)
    drawn = found[chosen][~became_mask & ~stayed]
    assert len(drawn) / n == pytest.approx(0.1, abs=0.01) and len(drawn.unique()) > 900


def test_special_tokens_are_never_chosen_and_the_input_stays() -> None:
    ids = torch.tensor([[2, 7, 8, 9, 3, 0, 0]] * 50)
    before = ids.clone()
    _, labels = masked(ids, probability=0.9)
    assert torch.equal(ids, before)
    assert (labels[:, [0, 4, 5, 6]] == IGNORED).all() and (labels[:, 1:4] != IGNORED).float().mean() > 0.8


def test_the_stream_is_the_generators_alone() -> None:
    ids = torch.randint(5, VOCABULARY, (8, 30))
    state = torch.get_rng_state()
    first, again, other = masked(ids, 1), masked(ids, 1), masked(ids, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_loss_is_the_cross_entropy_of_the_chosen_tokens(tiny_models: Callable[[str], Path], kind: str) -> None:
    source = str(tiny_models(kind))
    backbone, tokenizer = load_transformer(source, num_layers=2)
    model = load_language_model(source, backbone)[0].eval()
    batch = tokenizer(["the baker sells bread", "a doctor finds a lamp at night"], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = torch.full_like(ids, IGNORED)
    labels[0, 1], labels[1, 2], labels[1, 3] = 7, 8, 9
    with torch.no_grad():
        total, count = prediction_loss(model, ids, mask, labels).tolist()
        logits = model(input_ids=ids, attention_mask=mask).logits.double()
    by_hand = sum(-logits[row, at].log_softmax(dim=0)[label] for row, at, label in ((0, 1, 7), (1, 2, 8), (1, 3, 9)))
    assert count == 3 and total == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_packed_predictions_are_those_of_the_padded_copy(tiny_models: Callable[[str], Path], kind: str) -> None:
    """Values and gradients, with dropout; where nothing is predicted it is 0 of 0, and has a gradient all the same."""
    encoder = Encoder.for_training(EncoderConfig(name=str(tiny_models(kind)), dropout=0.2), seed=0).train()
    model = load_language_model(str(tiny_models(kind)), encoder.backbone)[0].train()
    lengths = np.array([4, 9, 6])
    mask = torch.from_numpy((np.arange(9) < lengths[:, None]).astype(np.int64))
    ids = torch.randint(10, 40, mask.shape, generator=torch.Generator().manual_seed(0))
    ids = ids.where(mask.bool(), torch.tensor(encoder.tokenizer.pad_token_id))
    rows, device = np.array([5, 6, 7]), torch.device("cpu")
    labels = torch.full_like(ids, IGNORED)
    labels[0, 1], labels[1, 8], labels[2, 3] = 7, 8, 9
    batch = TokenBatch(ids, mask, row_keys_B=rows, lengths_B=lengths)

    def outcome(loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss[0].backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with keyed_dropout(rows, device):
        expected, expected_gradients = outcome(prediction_loss(model, ids, mask, labels))
    at = (labels.flatten() != IGNORED).nonzero()[:, 0]
    found, gradients = outcome(packed_prediction_loss(encoder, model, batch, at, labels))
    assert found[1] == 3 and gradients.keys() == expected_gradients.keys()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)
    none, gradients = outcome(
        packed_prediction_loss(encoder, model, batch, torch.zeros(1, dtype=torch.int64), torch.full_like(ids, IGNORED))
    )
    assert none.tolist() == [0.0, 0.0] and gradients.keys() == expected_gradients.keys()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_head_stands_on_the_encoders_own_weights(tiny_models: Callable[[str], Path], kind: str) -> None:
    source = str(tiny_models(kind))
    backbone, _ = load_transformer(source)
    model, drawn = load_language_model(source, backbone)
    assert drawn and not any(name.startswith(model.base_model_prefix) for name in drawn), "the file has no head"
    own = {id(p) for p in backbone.parameters()}
    assert {id(p) for p in model.base_model.parameters()} == own
    output = model.get_output_embeddings()
    assert output.weight is backbone.get_input_embeddings().weight, "the head predicts with the input's embeddings"
    assert (head := LanguageModelHead(model).state_dict()) and not any(
        map(str.startswith, head, [model.base_model_prefix] * len(head))
    )
    # No weight of the model is left out of the two.
    heads = {id(p) for name, p in model.named_parameters() if not name.startswith(model.base_model_prefix + ".")}
    assert heads and heads | own == {id(p) for p in model.parameters()}


def test_a_model_without_a_language_model_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.CLIPTextModel(config).save_pretrained(tmp_path)
    backbone = transformers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"mlm_weight is not 0, but .* has no masked language model"):
        load_language_model(str(tmp_path), backbone)
