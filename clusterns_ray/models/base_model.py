"""The model that training starts from: what it decides where the configuration does not."""

from __future__ import annotations

from collections.abc import Callable

from clusterns_ray.config import Config, EncoderConfig
from clusterns_ray.errors import ConfigError
from clusterns_ray.io.events import OnNote
from clusterns_ray.models.pretrained import read_config
from clusterns_ray.models.resolve import local_model_config, resolve_model
from clusterns_ray.models.settings import read_settings

BIDIRECTIONAL = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "albert", "electra")
"""Architectures known to read both ways. For any other a small sample is tried, which needs torch."""


def choose_pooling(chosen: str | None, own: str | None, default: str, is_causal: Callable[[], bool], name: str) -> str:
    """The pooling asked for, or the model's own, or ``last`` for a causal model and ``default`` for any other.

    Raises:
        ConfigError: ``cls`` with a causal model, whose first token is the same for all sentences.
    """
    pooling = chosen or own
    if pooling not in (None, "cls") or not is_causal():
        return pooling or default
    if pooling is None:
        return "last"
    raise ConfigError(
        f"encoder {name!r}: pooling is cls, but the model is causal: its first token is read before the rest, so all "
        "sentences that begin with the same token would have the same embedding.",
        "Use last or mean.",
    )


def complete_encoder(config: EncoderConfig) -> tuple[EncoderConfig, list[str]]:
    """``config`` with the pooling and the prompt that it leaves to the model, and a sentence for each value in which it
    differs from the model's own.

    Raises:
        ConfigError: the model cannot be read, cannot be trained, or cannot be pooled so.
    """
    source = resolve_model(config.name)
    own = read_settings(source, revision=config.revision)
    # Read as JSON where it can be: importing transformers takes seconds, and a wrong request is to be refused at once.
    stated = local_model_config(source) or read_config(source, revision=config.revision).to_dict()
    known = stated.get("model_type") in BIDIRECTIONAL and not stated.get("is_decoder", False)

    def is_causal() -> bool:
        return not known and backbone.is_causal(sample)

    if not known:
        from clusterns_ray.models import backbone

        changed = backbone.load_config(
            source, revision=config.revision, num_layers=config.num_layers, dropout=config.dropout
        )
        sample = backbone.sample_model(changed)
        backbone.check_dropout(changed, config.name)
    pooling = choose_pooling(config.pooling, own.pooling, "cls", is_causal, config.name)
    prompt = own.prompt if config.prompt is None else config.prompt
    differences = []
    for key, chosen, theirs in (
        ("pooling", pooling, own.pooling or pooling),
        ("prompt", prompt, own.prompt),
        ("denoise", config.denoise, own.denoise),
    ):
        if chosen != theirs:
            differences.append(f"encoder.{key} is {chosen!r}, and {config.name}'s own is {theirs!r}.")
    if own.similarity != "cosine":
        differences.append(
            f"{config.name} is meant to be compared by {own.similarity}; training, scores and the exported model use "
            "the cosine."
        )
    return config.model_copy(update={"pooling": pooling, "prompt": prompt}), differences


def complete(config: Config, note: OnNote = lambda text: None) -> Config:
    """:func:`complete_encoder` for a whole configuration; ``note`` is called with each difference."""
    encoder, differences = complete_encoder(config.encoder)
    for text in differences:
        note(text)
    return config.model_copy(update={"encoder": encoder})
