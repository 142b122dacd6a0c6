"""How many tokens a model reads: what is computed from its parts is what it really takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from clusterns_ray.config import EncoderConfig
from clusterns_ray.errors import ConfigError
from clusterns_ray.models.backbone import first_position, load_transformer, longest_input
from clusterns_ray.models.encoder import LONGEST_ENCODED, Encoder
from clusterns_ray.models.pretrained import length_limit

POSITIONS = 16
LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TABLE = {**LAYERS, "max_position_embeddings": POSITIONS}
PADDED = {**LAYERS, "max_position_embeddings": POSITIONS + 2, "pad_token_id": 1}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
BART = {
    **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": POSITIONS},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
}
ENDS = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}

WITH_TABLE: dict[str, dict[str, Any]] = {
    "Bert": TABLE,
    "Roberta": PADDED,
    "MPNet": PADDED,
    "XLMRoberta": PADDED,
    "Longformer": {**PADDED, "attention_window": 8},
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 2, "max_position_embeddings": POSITIONS},
    "Electra": TABLE,
    "Albert": {**TABLE, "embedding_size": 16},
    "Deberta": TABLE,
    "Nystromformer": {**TABLE, "segment_means_seq_len": 16, "num_landmarks": 16},
    "GPT2": GPT,
    "OPT": {**TABLE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bart": BART,
}
WITHOUT_LIMIT: dict[str, dict[str, Any]] = {
    "XLNet": {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48},
    "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
}
ROTARY = {"ModernBert": {**TABLE, **ENDS}, "Llama": TABLE}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """A tokenizer that knows no limit, as where its tokenizer_config.json states none."""
    found = transformers.AutoTokenizer.from_pretrained(tiny_model, trust_remote_code=False)
    found.model_max_length = int(1e30)
    return found


def make(directory: Path, kind: str, shape: dict[str, Any], tokenizer: Any) -> Path:
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **shape)
    transformers.AutoModel.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def states(backbone: Any, length: int) -> torch.Tensor:
    ids = torch.full((1, length), 20)
    with torch.no_grad():
        return backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


@pytest.mark.parametrize("kind", WITH_TABLE)
def test_the_limit_of_a_table_is_the_last_length_that_works(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    backbone, own = load_transformer(str(make(tmp_path, kind, WITH_TABLE[kind], tokenizer)))
    limit = longest_input(backbone, own)
    assert limit == POSITIONS
    assert states(backbone, limit).shape == (1, limit, 32)
    with pytest.raises((IndexError, RuntimeError)):
        states(backbone, limit + 1)


@pytest.mark.parametrize("kind", WITHOUT_LIMIT)
def test_relative_positions_have_no_limit(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    make(tmp_path, kind, WITHOUT_LIMIT[kind], tokenizer)
    backbone, own = load_transformer(str(tmp_path))
    assert longest_input(backbone, own) is None
    assert states(backbone, 700).shape == (1, 700, 32)
    assert Encoder.load(tmp_path, max_length=700).max_length == 700
    config = EncoderConfig(name=str(tmp_path), max_length=600, dropout=0.1, pooling="mean")
    assert Encoder.for_training(config, seed=1).max_length == LONGEST_ENCODED


@pytest.mark.parametrize("kind", ROTARY)
def test_without_a_table_the_stated_length_holds(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    backbone, own = load_transformer(str(make(tmp_path, kind, ROTARY[kind], tokenizer)))
    assert longest_input(backbone, own) == POSITIONS


def test_the_tokenizers_limit_counts_where_it_is_lower(tmp_path: Path, tokenizer: Any) -> None:
    make(tmp_path, "Bert", TABLE, tokenizer)
    backbone, own = load_transformer(str(tmp_path))
    own.model_max_length = 9
    assert longest_input(backbone, own) == 9
    own.model_max_length = 99
    assert longest_input(backbone, own) == POSITIONS


def test_another_padding_index_moves_the_first_position(tmp_path: Path, tokenizer: Any) -> None:
    make(tmp_path, "Roberta", {**LAYERS, "max_position_embeddings": 20, "pad_token_id": 4}, tokenizer)
    backbone, own = load_transformer(str(tmp_path))
    assert first_position(backbone) == 5 and longest_input(backbone, own) == 15
    ids = torch.full((1, 15), 20)
    with torch.no_grad():
        given = backbone(input_ids=ids, position_ids=torch.arange(5, 20)[None]).last_hidden_state
    torch.testing.assert_close(given, states(backbone, 15))
    with pytest.raises((IndexError, RuntimeError)):
        states(backbone, 16)


def test_a_table_without_room_is_refused_and_not_taken_for_no_limit(tmp_path: Path, tokenizer: Any) -> None:
    make(tmp_path, "Roberta", {**LAYERS, "max_position_embeddings": 2, "pad_token_id": 1}, tokenizer)
    with pytest.raises(ConfigError, match="cannot be used"):
        Encoder.load(tmp_path)


@pytest.mark.parametrize(
    ("value", "limit"), [(512, 512), (-1, None), (0, None), (1e30, None), (int(1e30), None), (None, None), ("x", None)]
)
def test_length_limit(value: Any, limit: int | None) -> None:
    assert length_limit(value) == limit


def test_a_sentence_transformers_directory_without_a_length_cuts_nothing(tmp_path: Path, tokenizer: Any) -> None:
    make(tmp_path, "Bloom", WITHOUT_LIMIT["Bloom"], tokenizer)
    backbone, own = load_transformer(str(tmp_path))
    Encoder(backbone, own, pooling="mean").save(tmp_path)
    (tmp_path / "clusterns.json").unlink()
    (tmp_path / "sentence_bert_config.json").write_text("{}")
    encoder = Encoder.load(tmp_path)
    words = "the baker sells bread " * 300
    assert len(encoder.tokenize([words])[0]) > 1200
    assert encoder.encode([words, "the baker"]).shape == (2, 32)
