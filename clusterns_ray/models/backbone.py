"""Hugging Face transformers as encoders start from them: loaded, shortened, with their dropout set."""

from __future__ import annotations

import copy
import re
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from clusterns_ray.errors import ConfigError
from clusterns_ray.models.pretrained import check_complete, length_limit, load_weights, loading, one_line, read_config
from clusterns_ray.models.tokenization import load_tokenizer

_ABSOLUTE = re.compile(r"^(?!.*rel).*position|^wpe$")
"""Names of tables of absolute positions."""


SAMPLE_VOCABULARY = 32
"""Words of a :func:`sample_model`."""

TRIAL = list(range(6, 14))
"""Tokens by which a model is tried: none of them pads in a common vocabulary."""


def load_config(
    source: str, *, revision: str | None = None, num_layers: int | None = None, dropout: float | None = None
) -> Any:
    """The transformers configuration of a directory or of the hub, with ``num_layers`` and ``dropout`` where given.

    Raises:
        ConfigError: it cannot be loaded, or has fewer layers than asked for.
    """
    config = read_config(source, revision=revision)
    _shorten(config, num_layers, source)
    override_dropout(config, dropout)
    return config


def empty_model(config: Any, source: str, auto: Any = None) -> Any:
    """A model in float32 as ``config`` describes it, drawn at random, or without values under a fake or meta device.

    Raises:
        ConfigError: transformers cannot make one.
    """
    with loading(source, "its config.json"):
        return (auto or auto_class(config)).from_config(config, dtype=torch.float32, trust_remote_code=False)


def auto_class(config: Any) -> Any:
    """The transformers class that loads an encoder: of T5 and its kin the encoder alone, as sentence-transformers does,
    else ``AutoModel``."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    alone = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type, "").endswith("EncoderModel")
    return transformers.AutoModelForTextEncoding if alone else transformers.AutoModel


def load_transformer(
    source: str, *, revision: str | None = None, num_layers: int | None = None, dropout: float | None = None
) -> tuple[Any, Any]:
    """``(backbone, tokenizer)`` from a directory or the hub, in float32.

    Raises:
        ConfigError: it cannot be loaded, its files lack weights, its tokenizer is another model's, or it has fewer
            layers than asked for.
    """
    tokenizer = load_tokenizer(source, revision=revision)
    config = load_config(source, revision=revision, num_layers=num_layers, dropout=dropout)
    # A checkpoint may lack a pooler (a masked language model has none), which is then drawn, the same on every worker.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone, missing = load_weights(
            auto_class(config), source, config, revision=revision, shortened=num_layers is not None
        )
    check_complete(source, missing)
    _try(source, backbone, tokenizer)
    return backbone, tokenizer


@torch.no_grad()
def _try(source: str, backbone: Any, tokenizer: Any) -> None:
    """Refuse a model that makes no token states of a sentence alone, as one does whose decoder wants another text."""
    ids_BT = torch.tensor([tokenizer("a")["input_ids"] or [0]])
    try:
        states_BTD = backbone(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state
        width, stated = states_BTD.shape[-1], backbone.config.hidden_size
    except Exception as error:  # each architecture raises its own
        reason = one_line(error)
    else:
        if width == stated:
            return
        reason = f"its token states have {width} values, and its hidden_size is {stated}"
    raise ConfigError(
        f"encoder {source!r} cannot be used, as a {backbone.config.model_type} makes no token states of a sentence "
        f"alone ({reason}).",
        "Name an encoder such as BERT, or a decoder such as GPT-2.",
    )


def masked_language_model_class(config: Any, source: str) -> Any:
    """``transformers.AutoModelForMaskedLM``, where it has a class for this architecture.

    Raises:
        ConfigError: it has none.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM

    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ConfigError(
            f"loss.mlm_weight is not 0, but {source!r} is a {config.model_type}, of which transformers has no "
            "masked language model.",
            "Set it to 0, or train an encoder that has one.",
        )
    return AutoModelForMaskedLM


def load_language_model(source: str, backbone: Any, *, revision: str | None = None) -> tuple[Any, list[str]]:
    """The masked language model of ``source`` around ``backbone``, whose weights it shares, and the names of the
    weights of its head that the files lack: these are drawn at random, the same on every worker.

    Raises:
        ConfigError: the architecture has none.
    """
    auto = masked_language_model_class(backbone.config, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, missing = load_weights(auto, source, backbone.config, revision=revision, shortened=True)
    setattr(model, model.base_model_prefix, backbone)
    model.tie_weights()
    return model, [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]


def _shorten(config: Any, num_layers: int | None, source: str) -> None:
    if num_layers is None:
        return
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise ConfigError(
            f"encoder.num_layers is {num_layers}, but the layers of a {config.model_type} such as {source} cannot be "
            "counted.",
            "Leave it unset.",
        )
    if num_layers > config.num_hidden_layers:
        raise ConfigError(
            f"encoder.num_layers is {num_layers}, but {source} has {config.num_hidden_layers} layers.",
            f"Use at most {config.num_hidden_layers}, or leave it unset.",
        )
    try:
        config.num_hidden_layers = num_layers
    except NotImplementedError:  # what transformers raises where the number follows from other keys, as in a Funnel
        raise ConfigError(
            f"encoder.num_layers is {num_layers}, but a {config.model_type} such as {source} cannot be shortened.",
            "Leave it unset.",
        ) from None
    if hasattr(config, "decoder_layers"):
        config.decoder_layers = min(num_layers, config.decoder_layers)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[:num_layers]


def dropout_rates(config: Any) -> dict[str, float]:
    """The dropout probabilities of a transformers configuration, by name; those of task heads are left out."""
    skip = ("classifier", "classif", "qa_", "summary", "final")
    return {
        key: value
        for key, value in config.to_dict().items()
        if ("dropout" in key or key.endswith("pdrop"))
        and isinstance(value, (int, float))
        and not any(word in key for word in skip)
    }


def override_dropout(config: Any, dropout: float | None) -> None:
    """Set every dropout of a transformers configuration, unless it is None."""
    if dropout is not None:
        for key in dropout_rates(config):
            setattr(config, key, dropout)


def sample_model(config: Any) -> Any:
    """A randomly drawn model of one layer and few words, otherwise as ``config`` describes it: it shows what follows
    from the architecture alone, at little cost.

    Raises:
        ConfigError: transformers cannot make a model of it that reads text.
    """
    config = copy.deepcopy(config)
    smaller = {"num_hidden_layers": 1, "decoder_layers": 1, "vocab_size": SAMPLE_VOCABULARY, "intermediate_size": 8}
    special = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
    for key in special:
        if (getattr(config, key, None) or 0) >= SAMPLE_VOCABULARY:
            smaller[key] = 0
    if isinstance(getattr(config, "layer_types", None), list):
        smaller["layer_types"] = config.layer_types[:1]
    for key, value in smaller.items():
        if hasattr(config, key):
            # What transformers raises where the value follows from other keys, as in a Funnel; it then stays as it is.
            with suppress(NotImplementedError, AttributeError):
                setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
            _states(model, [TRIAL])
        except Exception as error:  # each architecture raises its own
            reason = "its decoder wants a text of its own" if config.is_encoder_decoder else one_line(error)
            raise ConfigError(
                f"the architecture {config.model_type!r} cannot be used as an encoder: transformers makes no token "
                f"states of a sentence alone ({reason}).",
                "Name another model, such as a BERT, a T5 or a GPT-2.",
            ) from error
    return model


@torch.no_grad()
def _states(backbone: Any, rows: list[list[int]]) -> torch.Tensor:
    """Token states of the last layer (B x T x D), of rows of the same length."""
    ids_BT = torch.tensor(rows, device=backbone.device)
    return backbone(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).last_hidden_state


def has_decoder(backbone: Any) -> bool:
    """Whether token states are those of a decoder that is given what the encoder has read, as BART's are."""
    return bool(getattr(backbone.config, "is_encoder_decoder", False)) and hasattr(backbone, "decoder")


def is_causal(backbone: Any) -> bool:
    """Whether a token's state does not depend on the tokens behind it; tried by changing the last one."""
    training = backbone.training
    first_BD = _states(backbone.eval(), [TRIAL, [*TRIAL[:-1], TRIAL[-1] + 1]])[:, 0]
    backbone.train(training)
    return bool((first_BD[0] - first_BD[1]).abs().max() <= 1e-5 * first_BD.abs().max())


def passes_differ(backbone: Any) -> bool:
    """Whether two passes of the same tokens differ in training, by dropout or what else is random in a model."""
    training = backbone.training
    backbone.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = _states(backbone, [TRIAL]), _states(backbone, [TRIAL])
    backbone.train(training)
    return not torch.equal(first, second)


def has_dropout(config: Any) -> bool:
    """Whether passes of such a model differ in training: tried with higher probabilities, as small ones drop little."""
    config = copy.deepcopy(config)
    for key, rate in dropout_rates(config).items():
        if rate > 0:
            setattr(config, key, 0.5)
    return passes_differ(sample_model(config))


def check_dropout(config: Any, name: str) -> None:
    """Refuse to train a model whose two views of a sentence would be equal.

    Raises:
        ConfigError: with the remedy that this architecture leaves.
    """
    if has_dropout(config):
        return
    raised = copy.deepcopy(config)
    override_dropout(raised, 0.5)
    remedy = (
        "Set encoder.dropout, for example to 0.1."
        if has_dropout(raised)
        else f"The architecture {config.model_type!r} has none that encoder.dropout could set: start from another."
    )
    raise ConfigError(
        f"{name} has no dropout, so the two views of a sentence would be equal and there would be nothing to learn.",
        remedy,
    )


def first_position(backbone: Any) -> int:
    """The position id of a first token: RoBERTa and its kin count from behind the padding index."""
    return max((_behind_padding(table) for table in _position_tables(backbone)), default=0)


def longest_input(backbone: Any, tokenizer: Any) -> int | None:
    """Tokens the model can read at once, or None where neither it nor its tokenizer says.

    With a table of positions it is the number of its rows, less those before the first token's; without one (rotary or
    relative positions) it is the length that config.json states.
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
