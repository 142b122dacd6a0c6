"""Hugging Face transformers as encoders start from them: loaded, shortened, with their dropout set."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from clusterns_ray.errors import ConfigError
from clusterns_ray.pretrained import check_complete, check_vocabulary, length_limit, load_weights, read_config
from clusterns_ray.tokenization import load_tokenizer

_ABSOLUTE = re.compile(r"^(?!.*rel).*position|^wpe$")
"""Names of tables of absolute positions."""


def load_transformer(
    source: str, *, revision: str | None = None, num_layers: int | None = None, dropout: float | None = None
) -> tuple[Any, Any]:
    """``(backbone, tokenizer)`` from a directory or the hub, in float32.

    Raises:
        ConfigError: it cannot be loaded, its files lack weights, its tokenizer is another model's, or it has fewer
            layers than asked for.
    """
    from transformers import AutoModel

    tokenizer = load_tokenizer(source, revision=revision)
    config = read_config(source, revision=revision)
    _shorten(config, num_layers, source)
    override_dropout(config, dropout)
    # A checkpoint may lack a pooler (a masked language model has none): its draw must not differ by worker.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone, missing = load_weights(AutoModel, source, config, revision=revision, shortened=num_layers is not None)
    check_complete(source, missing)
    check_vocabulary(source, tokenizer, backbone.get_input_embeddings().num_embeddings)
    return backbone, tokenizer


def load_language_model(source: str, backbone: Any, *, revision: str | None = None) -> tuple[Any, list[str]]:
    """The masked language model of ``source`` around ``backbone``, whose weights it shares, and the names of the
    weights of its head that the files lack: these are drawn, alike everywhere.

    Raises:
        ConfigError: the architecture has none.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM

    if type(backbone.config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ConfigError(
            f"loss.mlm_weight is not 0, but {source!r} is a {backbone.config.model_type}, of which transformers has no "
            "masked language model. Set it to 0, or train an encoder that has one."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, missing = load_weights(AutoModelForMaskedLM, source, backbone.config, revision=revision, shortened=True)
    setattr(model, model.base_model_prefix, backbone)
    model.tie_weights()
    return model, [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]


def _shorten(config: Any, num_layers: int | None, source: str) -> None:
    if num_layers is None:
        return
    if num_layers > config.num_hidden_layers:
        raise ConfigError(
            f"encoder.num_layers is {num_layers}, but {source} has {config.num_hidden_layers} layers. "
            f"Use at most {config.num_hidden_layers}, or leave it unset."
        )
    config.num_hidden_layers = num_layers
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:num_layers]


def _dropout_keys(config: Any) -> list[str]:
    skip = ("classifier", "classif", "qa_", "summary", "final")
    return [
        key
        for key, value in config.to_dict().items()
        if "dropout" in key and isinstance(value, (int, float)) and not any(word in key for word in skip)
    ]


def override_dropout(config: Any, dropout: float | None) -> None:
    """Set every dropout of a transformers configuration, unless it is None."""
    if dropout is not None:
        for key in _dropout_keys(config):
            setattr(config, key, dropout)


def has_dropout(backbone: nn.Module) -> bool:
    """Whether any dropout of the model is on in training, as the two views differ by nothing else."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in backbone.modules())


def first_position(backbone: Any) -> int:
    """The position id of a first token: RoBERTa and its kin count from behind the padding index."""
    return max((_behind_padding(table) for table in _position_tables(backbone)), default=0)


def longest_input(backbone: Any, tokenizer: Any) -> int | None:
    """Tokens the model can read at once, or None where neither it nor its tokenizer says.

    A table of positions has so many rows, less those before the first token's; without one (rotary or relative
    positions) it is the length that config.json states.
    """
    limits = [
        table.num_embeddings - max(getattr(table, "offset", 0), _behind_padding(table))
        for table in _position_tables(backbone)
    ]
    stated = (getattr(backbone.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min([*limits, *filter(None, map(length_limit, stated))], default=None)


def _position_tables(backbone: Any) -> list[nn.Embedding]:
    """The embeddings of absolute positions: one in most models, none where positions are rotary or relative."""
    return [
        module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Embedding) and _ABSOLUTE.search(name.rpartition(".")[2])
    ]


def _behind_padding(table: nn.Embedding) -> int:
    """Rows of a table up to that of padding; classes of their own count in a way of their own."""
    return table.padding_idx + 1 if type(table) is nn.Embedding and table.padding_idx is not None else 0
