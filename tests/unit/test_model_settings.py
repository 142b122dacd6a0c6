"""What a model says of its embeddings: read as sentence-transformers reads it, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import WIDTH, sentences

from clusterns_ray.config import EncoderConfig
from clusterns_ray.errors import ConfigError
from clusterns_ray.models.base_model import complete_encoder
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.settings import read_settings

TEXTS = [*sentences(6, seed=5), " ".join(sentences(8, seed=6)), "A BAKER Sells bread."]
NEW = "sentence_transformers.base.modules.transformer.Transformer"
NEW_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
NEW_NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"


@pytest.fixture
def directory(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a sentence-transformers directory around a tiny BERT: keys of each of its files, and its modules."""

    def write(
        transformer: dict[str, Any] | None = None,
        pooling: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        types: tuple[str, ...] = ("sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"),
        normalize: dict[str, Any] | None = None,
        cased: bool = False,
    ) -> Path:
        path = tmp_path / "st"
        shutil.copytree(tiny_model, path)
        folders = ["", "1_Pooling", "2_Normalize", "3_More"]
        rows = [
            {"idx": i, "name": str(i), "path": folder, "type": kind}
            for i, (folder, kind) in enumerate(zip(folders, types, strict=False))
        ]
        (path / "modules.json").write_text(json.dumps(rows))
        (path / "sentence_bert_config.json").write_text(json.dumps(transformer or {}))
        if model is not None:
            (path / "config_sentence_transformers.json").write_text(json.dumps(model))
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(
            json.dumps({"word_embedding_dimension": WIDTH, **(pooling or {})})
        )
        if normalize is not None:
            (path / "2_Normalize").mkdir()
            (path / "2_Normalize" / "config.json").write_text(json.dumps(normalize))
        if cased:
            file = path / "tokenizer.json"
            values = json.loads(file.read_text())
            values["normalizer"]["lowercase"] = False
            file.write_text(json.dumps(values))
        return path

    return write


PROMPTS = {"prompts": {"query": "the baker : ", "plain": ""}}
MODULES = ("sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling")
TASK = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
SAME: dict[str, dict[str, Any]] = {
    "nothing": {},
    "short": {"transformer": {"max_seq_length": 9}},
    "longer than the model": {"transformer": {"max_seq_length": 64}},
    "lower case": {"transformer": {"do_lower_case": True}, "cased": True},
    "cased": {"transformer": {"do_lower_case": False}, "cased": True},
    "cls": {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}},
    "last": {"pooling": {"pooling_mode_lasttoken": True}},
    "new last": {"pooling": {"pooling_mode": "lasttoken"}},
    "one in a list": {"pooling": {"pooling_mode": ["cls"], "include_prompt": True}},
    "no mode is on": {"pooling": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}},
    "normalised": {"types": (*MODULES, "sentence_transformers.models.Normalize")},
    "new names": {
        "types": (NEW, NEW_POOLING, NEW_NORMALIZE),
        "normalize": {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"},
        "transformer": {
            "transformer_task": "feature-extraction",
            "modality_config": TASK,
            "module_output_name": "token_embeddings",
        },
        "pooling": {"embedding_dimension": WIDTH, "pooling_mode": "mean", "include_prompt": True},
        "model": {"model_type": "SentenceTransformer", "prompts": {"query": "", "document": ""}},
    },
    "prompts without a default": {"model": PROMPTS},
    "default prompt": {"model": {**PROMPTS, "default_prompt_name": "query"}},
    "default prompt, cut": {
        "model": {**PROMPTS, "default_prompt_name": "query"},
        "transformer": {"max_seq_length": 9, "do_lower_case": True},
        "cased": True,
    },
    "empty default prompt": {
        "model": {**PROMPTS, "default_prompt_name": "plain"},
        "pooling": {"include_prompt": False, "pooling_mode": "mean"},
    },
    "dot": {"model": {"similarity_fn_name": "dot", "truncate_dim": None}},
    "harmless arguments": {
        "transformer": {"model_args": {"attn_implementation": "eager"}, "config_args": {}, "unpad_inputs": False}
    },
}


@pytest.mark.slow  # importing sentence_transformers takes seconds
@pytest.mark.parametrize("name", SAME)
def test_embeddings_are_those_of_sentence_transformers(
    directory: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    path = directory(**SAME[name])
    ours, theirs = Encoder.load(path), library.SentenceTransformer(str(path), device="cpu")
    z = theirs.encode(TEXTS)
    np.testing.assert_allclose(ours.encode(TEXTS), z, atol=1e-5)
    ours.save(tmp_path / "saved")  # and what is written says the same, to both
    np.testing.assert_allclose(Encoder.load(tmp_path / "saved").encode(TEXTS), z, atol=1e-5)
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), z, atol=1e-5)


def test_the_options_change_the_embeddings(directory: Callable[..., Path], tiny_model: Path) -> None:
    """Else their parity would show nothing."""
    plain = Encoder.load(tiny_model, max_length=64).encode(TEXTS)
    changed = directory(**SAME["default prompt, cut"])
    assert np.abs(Encoder.load(changed).encode(TEXTS) - plain).max() > 0.05


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "max": ({"pooling": {"pooling_mode_max_tokens": True}}, "'max'"),
    "several": ({"pooling": {"pooling_mode": ["cls", "mean"]}}, r"pooling_mode to \['cls', 'mean'\]"),
    "weighted": ({"pooling": {"pooling_mode_weightedmean_tokens": True}}, "weightedmean"),
    "prompt left out": (
        {"pooling": {"include_prompt": False}, "model": {**PROMPTS, "default_prompt_name": "query"}},
        "include_prompt to False",
    ),
    "no such prompt": ({"model": {**PROMPTS, "default_prompt_name": "other"}}, "default_prompt_name to 'other'"),
    "truncate_dim": ({"model": {"truncate_dim": 8}}, "truncate_dim to 8"),
    "kind of model": ({"model": {"model_type": "SparseEncoder"}}, "model_type to 'SparseEncoder'"),
    "similarity": ({"model": {"similarity_fn_name": "maxsim"}}, "similarity_fn_name to 'maxsim'"),
    "unknown of the model": ({"model": {"whitening": True}}, "whitening to True"),
    "unknown of pooling": ({"pooling": {"temperature": 2}}, "temperature to 2"),
    "unknown of the transformer": ({"transformer": {"max_seq_len": 9}}, "max_seq_len to 9"),
    "task": ({"transformer": {"transformer_task": "fill-mask"}}, "transformer_task to 'fill-mask'"),
    "modality": ({"transformer": {"modality_config": {"message": {}}}}, "modality_config to"),
    "tokenizer arguments": (
        {"transformer": {"tokenizer_args": {"do_lower_case": True}}},
        "tokenizer_args.do_lower_case",
    ),
    "model arguments": ({"transformer": {"model_kwargs": {"dtype": "float16"}}}, "model_kwargs.dtype to 'float16'"),
    "query length": ({"transformer": {"query_length": 32}}, "query_length to 32"),
    "token normalisation": (
        {"types": (*MODULES, NEW_NORMALIZE), "normalize": {"module_input_name": "token_embeddings"}},
        "module_input_name to 'token_embeddings'",
    ),
    "dense": ({"types": (*MODULES, "sentence_transformers.models.Dense")}, "module sentence_transformers.models.Dense"),
    "layer norm": ({"types": (*MODULES, "sentence_transformers.models.LayerNorm")}, "LayerNorm"),
    "static": ({"types": ("sentence_transformers.models.StaticEmbedding",)}, "StaticEmbedding"),
    "own class": ({"types": ("custom.Transformer", MODULES[1])}, "custom.Transformer"),
    "order": ({"types": (MODULES[0], NEW_NORMALIZE, MODULES[1])}, "Transformer, Normalize, Pooling"),
    "two transformers": ({"types": (MODULES[0], MODULES[0], MODULES[1])}, "Transformer, Transformer, Pooling"),
    "no pooling": ({"types": (MODULES[0],)}, "the modules Transformer, and"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(directory: Callable[..., Path], name: str) -> None:
    values, message = REFUSED[name]
    path = directory(**values)
    with pytest.raises(ConfigError, match=message) as caught:
        Encoder.load(path)
    assert str(path) in str(caught.value) and "Name another" in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        complete_encoder(EncoderConfig(name=str(path)))


def test_a_transformer_in_a_folder_is_refused_with_a_remedy(directory: Callable[..., Path]) -> None:
    path = directory()
    rows = json.loads((path / "modules.json").read_text())
    rows[0]["path"] = "0_Transformer"
    (path / "modules.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=r"Transformer in '0_Transformer'.*SentenceTransformer\(DIRECTORY\)\.save"):
        read_settings(str(path))


@pytest.mark.parametrize(
    "file", ["clusterns.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"]
)
@pytest.mark.parametrize("text", ["{", "3", '"x"'])
def test_damaged_files_are_named(directory: Callable[..., Path], file: str, text: str) -> None:
    path = directory()
    (path / file).write_text(text)
    with pytest.raises(ConfigError, match=file):
        read_settings(str(path))


def test_a_prompt_that_leaves_no_room_is_refused(directory: Callable[..., Path]) -> None:
    path = directory(model={**PROMPTS, "default_prompt_name": "query"}, transformer={"max_seq_length": 5})
    with pytest.raises(ConfigError, match=r"reads 5 tokens.*'the baker : ' leaves none for the text"):
        Encoder.load(path)


# ---- training starts as the model says ----------------------------------------------------------------------------


def test_training_takes_what_the_model_says(directory: Callable[..., Path]) -> None:
    path = directory(
        model={**PROMPTS, "default_prompt_name": "query", "similarity_fn_name": "dot"},
        transformer={"max_seq_length": 20, "do_lower_case": True},
        types=(*MODULES, NEW_NORMALIZE),
        cased=True,
    )
    config = EncoderConfig(name=str(path), max_length=8)
    complete, notes = complete_encoder(config)
    assert (complete.pooling, complete.prompt) == ("mean", "the baker : {sentence}")
    assert len(notes) == 1 and "compared by dot" in notes[0]
    encoder = Encoder.for_training(config, seed=1).eval()
    np.testing.assert_allclose(encoder.encode(TEXTS), Encoder.load(path).encode(TEXTS), atol=1e-6)
    assert complete_encoder(complete)[0] == complete


def test_what_differs_from_the_model_is_said(directory: Callable[..., Path]) -> None:
    path = directory(model={**PROMPTS, "default_prompt_name": "query"})
    complete, notes = complete_encoder(EncoderConfig(name=str(path), pooling="cls", prompt="{sentence}"))
    assert (complete.pooling, complete.prompt) == ("cls", "{sentence}")
    assert [text.split()[0] for text in notes] == ["encoder.pooling", "encoder.prompt"]
    assert "'cls'" in notes[0] and "'mean'" in notes[0] and "'the baker : {sentence}'" in notes[1]


def test_a_run_goes_on_from_a_run_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    prompt = "this sentence : {sentence} means [MASK] ."
    Encoder.for_training(EncoderConfig(name=str(tiny_model), pooling="mask", prompt=prompt), seed=1).save(tmp_path)
    complete, notes = complete_encoder(EncoderConfig(name=str(tmp_path)))
    assert (complete.pooling, complete.prompt, notes) == ("mask", prompt, [])


def test_a_plain_encoder_is_still_pooled_by_its_first_token(tiny_model: Path) -> None:
    complete, notes = complete_encoder(EncoderConfig(name=str(tiny_model)))
    assert (complete.pooling, complete.prompt, notes) == ("cls", None, [])


# ---- decoders, encoder-decoders ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def other_models(tiny_models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model that is not one of BERT's kin; GPT-2's tokenizer names no padding token."""
    import transformers

    base, made = tmp_path_factory.mktemp("other"), {}
    shape: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH}
    bart = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    bart |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}

    def directory(kind: str) -> Path:
        if kind in made:
            return made[kind]
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_models("roberta"))
        common: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2}
        if kind == "gpt2":
            config: Any = transformers.GPT2Config(**common, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64)
            tokenizer.backend_tokenizer.post_processor = None
            tokenizer = transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", unk_token="</s>", padding_side="left"
            )
        elif kind == "qwen2":
            config = transformers.Qwen2Config(
                **common, **shape, intermediate_size=48, num_key_value_heads=2, attention_dropout=0.1
            )
        elif kind == "t5":
            config = transformers.T5Config(**common, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        elif kind == "bart":
            config = transformers.BartConfig(**common, **bart, d_model=WIDTH, max_position_embeddings=64)
        else:
            config = transformers.MarianConfig(
                **common, **bart, d_model=WIDTH, decoder_start_token_id=0, pad_token_id=1
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = transformers.AutoModel.from_config(config)
        model.save_pretrained(base / kind)
        tokenizer.save_pretrained(base / kind)
        made[kind] = base / kind
        return made[kind]

    return directory


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_causal_model_is_pooled_by_its_last_token(other_models: Callable[[str], Path], kind: str) -> None:
    name = str(other_models(kind))
    assert complete_encoder(EncoderConfig(name=name))[0].pooling == "last"
    encoder = Encoder.load(name)
    assert encoder.pooling == "last"
    for text, z in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        ids = torch.tensor(encoder.tokenize([text]))
        with torch.no_grad():
            alone = encoder.backbone(input_ids=ids).last_hidden_state[0, -1]
        np.testing.assert_allclose(z, alone.numpy(), atol=1e-5)
    for refuse in (
        lambda: complete_encoder(EncoderConfig(name=name, pooling="cls")),
        lambda: Encoder.load(name, pooling="cls"),
        lambda: Encoder.for_training(EncoderConfig(name=name, pooling="cls"), seed=1),
    ):
        with pytest.raises(ConfigError, match=r"pooling is cls, but the model is causal.*Use last or mean"):
            refuse()


def test_last_and_first_tokens_do_not_depend_on_where_padding_stands(tiny_model: Path) -> None:
    encoder = Encoder.load(tiny_model, pooling="last")
    states = [torch.randn(2, 5, 3)]
    from clusterns_ray.models.encoder import TokenBatch, pool

    right, left = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for pooling, mask, expected in (("last", right, 2), ("last", left, 4), ("cls", right, 0), ("cls", left, 2)):
        encoder.pooling = pooling
        column_B = encoder._read_B(TokenBatch(torch.ones(2, 5, dtype=torch.int64), mask, draws=1))
        assert column_B is not None and column_B.tolist() == [expected, 4 if pooling == "last" else 0]
        assert torch.equal(pool(states, mask, pooling, column_B)[0], states[0][0, expected])


EXPORTS = [(kind, pooling) for kind in ("gpt2", "t5") for pooling in ("last", "mean", "first_last", "top2")]
EXPORTS += [("qwen2", "last"), ("t5", "cls"), ("bart", "cls"), ("bart", "mean"), ("bart", "last"), ("bert", "last")]
EXPORTS += [("mpnet", "last")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pooling"), EXPORTS)
def test_what_is_exported_loads_everywhere(
    tiny_models: Callable[[str], Path],
    other_models: Callable[[str], Path],
    kind: str,
    pooling: str,
    tmp_path: Path,
) -> None:
    library = pytest.importorskip("sentence_transformers")
    source = tiny_models(kind) if kind in ("bert", "mpnet") else other_models(kind)
    config = EncoderConfig.model_validate({"name": str(source), "pooling": pooling, "dropout": 0.1, "max_length": 16})
    encoder = Encoder.for_training(config, seed=1)
    z = encoder.encode(TEXTS)
    assert np.abs(z - z.mean(axis=0)).max() > 1e-3
    encoder.save(tmp_path)
    np.testing.assert_allclose(Encoder.load(tmp_path).encode(TEXTS), z, atol=1e-5)
    model = library.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS), z, atol=1e-5)
    assert model.tokenizer.pad_token is not None and model.tokenizer.padding_side == "right"


def test_layers_of_an_encoder_decoder_are_not_pooled(other_models: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"pooling is top2.*encoder-decoder.*Use mean or last"):
        Encoder.load(other_models("bart"), pooling="top2")


def test_an_encoder_decoder_whose_decoder_wants_text_is_refused(other_models: Callable[[str], Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"'marian' cannot be used as an encoder.*its decoder wants a text of its own"
    ):
        complete_encoder(EncoderConfig(name=str(other_models("marian"))))


def test_dropout_that_is_no_module_counts(other_models: Callable[[str], Path], tmp_path: Path) -> None:
    from clusterns_ray.models.backbone import check_dropout, has_dropout, load_config

    config = load_config(str(other_models("bart")))
    assert has_dropout(config)
    quiet = load_config(str(other_models("bart")), dropout=0.0)
    with pytest.raises(ConfigError, match=r"x has no dropout.*Set encoder.dropout, for example to 0.1"):
        check_dropout(quiet, "x")
    gpt2 = load_config(str(other_models("gpt2")), dropout=0.3)
    assert (gpt2.resid_pdrop, gpt2.embd_pdrop, gpt2.attn_pdrop) == (0.3, 0.3, 0.3)
