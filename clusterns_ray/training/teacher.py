"""The finished encoder whose ranking of a batch is learnt, where ``loss.teacher`` names one.

Shape suffixes: b rows of this worker, D the teacher's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clusterns_ray.config import Config
from clusterns_ray.encoder import Encoder, autocast
from clusterns_ray.errors import ConfigError
from clusterns_ray.model_files import read_settings
from clusterns_ray.models import resolve_model
from clusterns_ray.tokenization import load_tokenizer
from clusterns_ray.training.shards import Shard


def check_teacher(config: Config) -> None:
    """Refuse a teacher that cannot read the student's tokens; loads tokenizers alone.

    Raises:
        ConfigError: it is not there, or has another tokenizer or prompt.
    """
    name = config.loss.teacher
    if name is None:
        return
    source = resolve_model(name)
    student = load_tokenizer(resolve_model(config.encoder.name), revision=config.encoder.revision)
    if load_tokenizer(source).get_vocab() != student.get_vocab():
        raise ConfigError(
            f"loss.teacher is {name!r}, whose tokenizer is not that of {config.encoder.name!r}; it reads the tokens of "
            "the batch as they are. Name an encoder of the same family, such as the model/ of an earlier run."
        )
    prompt = read_settings(source).get("prompt")
    if prompt != config.encoder.prompt:
        raise ConfigError(
            f"loss.teacher is {name!r}, which was trained with the prompt {prompt!r}, but encoder.prompt is "
            f"{config.encoder.prompt!r}, and both read the same tokens. Use one prompt, or a teacher of this one."
        )


class Teacher:
    """Embeds the rows of a batch as a finished encoder does: without dropout, without a training head."""

    def __init__(self, name: str, device: torch.device):
        self.encoder: Any = Encoder.load(name).to(device).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, shards: list[Shard], dtype: torch.dtype) -> Tensor:
        """float32 (b, D), the shards' rows one after the other; products in ``dtype``."""
        with autocast(shards[0].input_ids_BT.device, dtype):
            rows = [self.encoder(shard.input_ids_BT, shard.attention_mask_BT).float() for shard in shards]
        return torch.cat(rows)
