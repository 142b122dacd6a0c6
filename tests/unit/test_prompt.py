"""The prompt variant: two templates, mask states, template denoising, and that it is exported whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sentences

from clusterns_ray.config import EncoderConfig, make_config
from clusterns_ray.errors import ConfigError
from clusterns_ray.models.backbone import first_position, load_transformer
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.tokenization import prompt_affixes, swap_prompt, tokenize

Models = Callable[[str], Path]

# The templates of the published configurations, in the two kinds of tokenizer that they are for.
PROMPTS = {
    "bert": ('This sentence of "{sentence}" means [MASK].', 'This sentence : "{sentence}" means [MASK].'),
    "roberta": ("This sentence : ' {sentence} ' means<mask>.", "The sentence : ' {sentence} ' means<mask>."),
}
KINDS = list(PROMPTS)
TEXTS = [*sentences(7, seed=5), 'She said: "no", twice.', "It's '.", "x", "ünïcode, 東京 & \u00a0more"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make_encoder(model: Path, kind: str, **values: Any) -> Encoder:
    first, second = PROMPTS[kind]
    options = {"pooling": "mask", "prompt": first, "second_prompt": second, "denoise": True, "max_length": 12, **values}
    return Encoder.for_training(EncoderConfig(name=str(model), **options), seed=1).eval()


# ---- templates ----------------------------------------------------------------------------------------------------


def test_a_row_can_be_put_into_the_other_template(tiny_models: Models, kind: str) -> None:
    _, tokenizer = load_transformer(str(tiny_models(kind)))
    first, second = PROMPTS[kind]
    frames = prompt_affixes(first, tokenizer), prompt_affixes(second, tokenizer)
    rows, others = tokenize(TEXTS, tokenizer, 60, first)[0], tokenize(TEXTS, tokenizer, 60, second)[0]
    assert rows != others
    assert [swap_prompt(row, *frames) for row in rows] == others
    assert [swap_prompt(row, *frames[::-1]) for row in others] == rows


def test_a_frame_is_what_stands_around_every_sentence(tiny_models: Models, kind: str) -> None:
    _, tokenizer = load_transformer(str(tiny_models(kind)))
    before, after = prompt_affixes(PROMPTS[kind][0], tokenizer)
    assert before[0] == tokenizer.cls_token_id and after[-1] == tokenizer.sep_token_id
    assert after.count(tokenizer.mask_token_id) == 1 and tokenizer.mask_token_id not in before
    for row in tokenize(TEXTS, tokenizer, 20, PROMPTS[kind][0])[0]:
        assert row[: len(before)] == before and row[-len(after) :] == after and len(row) > len(before) + len(after)


# ---- denoising ----------------------------------------------------------------------------------------------------


def positions_in_full(ids: list[int], kind: str, pad: int) -> list[int]:
    """Position ids as the architectures' papers and code count them: BERT from 0, RoBERTa from padding_idx + 1."""
    return [number + (pad + 1 if kind == "roberta" else 0) for number in range(len(ids))]


def test_one_sentence_by_hand(tiny_models: Models, kind: str) -> None:
    """Mask state of the prompt with the sentence, less that of the template at the positions it has in there."""
    encoder = make_encoder(tiny_models(kind), kind)
    tokenizer, model = encoder.tokenizer, encoder.backbone
    for view in (0, 1):
        prompt = PROMPTS[kind][view]
        before, after = prompt_affixes(prompt, tokenizer)
        for ids in tokenize(TEXTS, tokenizer, 20, prompt)[0]:
            positions = positions_in_full(ids, kind, tokenizer.pad_token_id)
            bare = before + after
            of_bare = positions[: len(before)] + positions[-len(after) :]
            with torch.no_grad():
                # Without position ids: the model's own count is the one that has to be matched.
                full = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
                alone = model(input_ids=torch.tensor([bare]), position_ids=torch.tensor([of_bare])).last_hidden_state[0]
                found = encoder(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64), view=view)[0]
            expected = full[ids.index(tokenizer.mask_token_id)] - alone[bare.index(tokenizer.mask_token_id)]
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
            assert alone.abs().max() > 0.1 and expected.abs().max() > 1e-3


def test_the_model_counts_positions_from_where_we_do(tiny_models: Models) -> None:
    for kind, first in (("bert", 0), ("roberta", 2)):
        backbone, _ = load_transformer(str(tiny_models(kind)))
        assert first_position(backbone) == first
        ids = torch.tensor([[7, 8, 9, 10]])
        with torch.no_grad():
            own = backbone(input_ids=ids).last_hidden_state
            given = backbone(input_ids=ids, position_ids=torch.arange(4)[None] + first).last_hidden_state
            other = backbone(input_ids=ids, position_ids=torch.arange(4)[None] + first + 1).last_hidden_state
        torch.testing.assert_close(own, given, rtol=0, atol=0)
        assert (own - other).abs().max() > 1e-3


def test_rows_of_one_length_share_a_template_state_and_padding_changes_nothing(tiny_models: Models, kind: str) -> None:
    encoder = make_encoder(tiny_models(kind), kind)
    states = encoder.template_states(np.array([20, 25, 20]))
    assert torch.equal(states[0], states[2]) and (states[0] - states[1]).abs().max() > 1e-4
    together = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=2e-5)


def test_denoising_off_is_the_plain_prompt(tiny_models: Models, kind: str) -> None:
    noisy = make_encoder(tiny_models(kind), kind, denoise=False)
    clean = make_encoder(tiny_models(kind), kind)
    ids = torch.tensor([noisy.tokenize(TEXTS[:1])[0]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        state = noisy.backbone(input_ids=ids).last_hidden_state[0, ids[0].tolist().index(noisy.tokenizer.mask_token_id)]
        torch.testing.assert_close(noisy(ids, mask)[0], state, rtol=0, atol=1e-5)
        difference = noisy(ids, mask) - clean(ids, mask)
        torch.testing.assert_close(difference, clean.template_states(mask.sum(dim=1).numpy()), rtol=0, atol=1e-5)


def test_the_template_state_carries_gradient(tiny_models: Models, kind: str) -> None:
    encoder = make_encoder(tiny_models(kind), kind)
    encoder.template_states(np.array([20])).square().sum().backward()
    gradients = [p.grad.abs().sum() for p in encoder.backbone.encoder.parameters() if p.grad is not None]
    assert len(gradients) > 10 and max(gradients) > 0


# ---- use ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_saved_encodes_with_the_first_prompt(tiny_models: Models, kind: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = make_encoder(tiny_models(kind), kind)
    z = encoder.encode(TEXTS)
    encoder.save(tmp_path)
    again = Encoder.load(tmp_path)
    assert (again.pooling, again.prompt, again.denoise) == ("mask", PROMPTS[kind][0], True)
    np.testing.assert_allclose(again.encode(TEXTS), z, atol=1e-6)

    model = SentenceTransformer(str(tmp_path), trust_remote_code=True)
    np.testing.assert_allclose(model.encode(TEXTS), z, atol=2e-5)
    model.save(str(tmp_path / "again"))
    np.testing.assert_allclose(Encoder.load(tmp_path / "again").encode(TEXTS), z, atol=1e-6)
    assert np.abs(z - z.mean(axis=0)).max() > 0.01


@pytest.mark.slow
def test_sentence_transformers_does_not_encode_it_wrongly_in_silence(tiny_models: Models, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    make_encoder(tiny_models("bert"), "bert").save(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path))


WRONG = {
    "second without first": ({"second_prompt": "a {sentence}"}, "encoder.prompt is not set"),
    "no place": ({"prompt": "{sentence}", "second_prompt": "a"}, r"second_prompt is 'a': it must hold {sentence}"),
    "denoise": ({"prompt": "{sentence}", "denoise": True}, "denoise is true, but encoder.pooling is unset"),
}


@pytest.mark.parametrize("name", WRONG)
def test_combinations_that_mean_nothing_are_refused(name: str) -> None:
    values, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        make_config({"encoder": values, "data": {"corpus": "x"}})


def test_a_prompt_takes_its_room_from_the_longest_text(tiny_models: Models, kind: str, tmp_path: Path) -> None:
    encoder = make_encoder(tiny_models(kind), kind)
    longest = max(len(row) for row in encoder.tokenize([" ".join(TEXTS * 9)]))
    assert 60 <= longest <= 64, "all positions of the model are used, and no more"
    encoder.save(tmp_path)
    with pytest.raises(ConfigError, match=rf"max_length is 9999, but .* reads at most {encoder.max_length} tokens"):
        Encoder.load(tmp_path, max_length=9999)
    with pytest.raises(ConfigError, match=r"max_length is 60, but .* tokens besides the prompt"):
        make_encoder(tiny_models(kind), kind, max_length=60)


def test_a_second_prompt_without_the_mask_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.second_prompt must hold the mask token"):
        make_encoder(tiny_model, "bert", second_prompt="{sentence} means")
