"""Hugging Face transformers as encoders start from them: loaded, shortened, with their dropout set."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clusterns_ray.errors import ConfigError
from clusterns_ray.tokenization import cannot_load, load_tokenizer

POSITIONS_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
"""Architectures whose position ids start at the padding index + 1."""


def load_transformer(
    source: str, *, revision: str | None = None, num_layers: int | None = None, dropout: float | None = None
) -> tuple[Any, Any]:
    """``(backbone, tokenizer)`` from a directory or the hub, in float32.

    Raises:
        ConfigError: it cannot be loaded, or has fewer layers than asked for.
    """
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    # A checkpoint may lack weights (a masked language model has no pooler): their draw must not differ by worker.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            config = transformers.AutoConfig.from_pretrained(source, revision=revision)
            _shorten(config, num_layers, source)
            override_dropout(config, dropout)
            backbone = transformers.AutoModel.from_pretrained(
                source, revision=revision, config=config, dtype=torch.float32
            )
        except ConfigError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise cannot_load(source, error) from error
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
    return backbone, load_tokenizer(source, revision=revision)


def load_language_model(source: str, backbone: Any, *, revision: str | None = None) -> Any:
    """The masked language model of ``source`` around ``backbone``, whose weights it shares; its head as trained.

    Raises:
        ConfigError: the architecture has none.
    """
    import transformers

    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a directory may lack the head's weights
        try:
            model = transformers.AutoModelForMaskedLM.from_pretrained(
                source, revision=revision, config=backbone.config, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"loss.mlm_weight is not 0, but {source!r} has no masked language model: "
                f"{str(error).strip().splitlines()[0]} Set it to 0, or train an encoder that has."
            ) from error
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
    setattr(model, model.base_model_prefix, backbone)
    model.tie_weights()
    return model


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
    """The position id of a first token: some architectures count from behind the padding index."""
    if getattr(backbone.config, "model_type", "") in POSITIONS_BEHIND_PADDING:
        return (backbone.config.pad_token_id or 0) + 1
    return 0


def longest_input(backbone: Any, tokenizer: Any) -> int | None:
    """Tokens the model can read at once, or None where neither it nor its tokenizer says."""
    positions = getattr(backbone.config, "max_position_embeddings", None)
    if positions and getattr(backbone.config, "model_type", "") in POSITIONS_BEHIND_PADDING:
        positions -= 2
    limits = [n for n in (positions, tokenizer.model_max_length) if n and n < 1_000_000]
    return min(limits) if limits else None
