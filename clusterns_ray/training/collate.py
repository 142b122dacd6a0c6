"""Rows of the global batch as tensors: one forward pass reads a shard, or several that are joined.

Shape suffixes: B rows of the shard, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clusterns_ray.config import Config
from clusterns_ray.data.positives import Positives
from clusterns_ray.data.sampler import random_draws, stream_key
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.models.encoder import pad
from clusterns_ray.models.tokenization import prompt_affixes, swap_prompt
from clusterns_ray.training.batch_layout import BatchLayout, to_device
from clusterns_ray.training.mlm import IGNORED, mask_tokens


class DropoutKeys(NamedTuple):
    """By what the dropout of rows of the corpus is drawn in a step, whichever rows they are computed with: int64, on
    the host, a pure function of these."""

    seed: int
    step: int
    rows_B: np.ndarray

    def of_rows(self, copy: str) -> np.ndarray:
        """A key for each row (B): of its ``first`` or ``second`` view, or of its ``masked`` copy."""
        return random_draws(self.rows_B, "dropout", self.seed, self.step, copy)

    def of_template(self, lengths_B: np.ndarray, view: int) -> np.ndarray:
        """A key for the template of either view (0 or 1) at each length (B)."""
        return random_draws(lengths_B, "dropout", self.seed, self.step, "template", view)


class Shard(NamedTuple):
    """The unit of padding and of distribution."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    dropout_keys: DropoutKeys
    second: tuple[Tensor, Tensor] | None = None
    """ids and mask of the second view, where they are not those of the first"""
    masked: tuple[Tensor, Tensor] | None = None
    """ids with masked tokens and their labels, for masked language modelling"""
    lengths: tuple[np.ndarray, np.ndarray] | None = None
    """on the host: tokens of each row, int64 (B), in both views; where it is None, it is read from the masks"""
    predicted_R: Tensor | None = None
    """int64: places of the predicted tokens in the masked copy, read row by row; one that is ignored if there are
    none"""

    def to(self, device: torch.device) -> Shard:
        """The same with its tensors on ``device``; the host does not wait for the copies."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return to_device(value.numpy(), device)
            return tuple(map(moved, value)) if type(value) is tuple else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]

        fields: Any = self
        return self if device.type == "cpu" else Shard(*map(moved, fields))


class ShardReader:
    """Reads a shard of a step: tokens of both views, the keys of their dropout, and which tokens are masked, all on
    the host."""

    def __init__(self, config: Config, tokens: TokenStore, tokenizer: Any) -> None:
        self.config, self.tokens, self.tokenizer = config, tokens, tokenizer
        prompts = (config.encoder.prompt, config.encoder.second_prompt)
        self.positives = Positives(config, tokens, tokenizer)
        self.prompt_affixes = [prompt_affixes(prompt, tokenizer) for prompt in prompts if prompt]

    def __call__(self, layout: BatchLayout, shard: int, step: int) -> Shard:
        seed = self.config.seed
        rows = layout.shard_rows(shard)
        input_ids, mask = self.tokens.tokens(rows, self.tokenizer.pad_token_id or 0)
        second = self.positives(rows, input_ids, mask, step)
        if self.config.encoder.second_prompt:
            second = self.in_second_prompt(*(second or (input_ids, mask)))
        masked = None
        if self.config.loss.mlm_weight:
            masked = self.masked_copy(input_ids, stream_key("mlm", seed, step, shard))
        return Shard(
            torch.as_tensor(input_ids),
            torch.as_tensor(mask),
            DropoutKeys(seed, step, rows),
            None if second is None else (torch.as_tensor(second[0]), torch.as_tensor(second[1])),
            masked,
            (mask.sum(axis=1), (mask if second is None else second[1]).sum(axis=1)),
            None if masked is None else _predicted(masked[1]),
        )

    def join(self, shards: list[Shard]) -> Shard:
        """The rows of shards one after the other, padded to the longest of all."""
        if len(shards) == 1:
            return shards[0]
        pad_id = self.tokenizer.pad_token_id or 0
        lengths = [np.concatenate(views) for views in zip(*(shard.lengths or () for shard in shards), strict=True)]
        first = _joined([(shard.input_ids_BT, shard.attention_mask_BT) for shard in shards], (pad_id, 0))
        masked = _joined([shard.masked for shard in shards if shard.masked], (pad_id, IGNORED))
        assert first
        return Shard(
            *first,
            shards[0].dropout_keys._replace(rows_B=np.concatenate([shard.dropout_keys.rows_B for shard in shards])),
            _joined([shard.second for shard in shards if shard.second], (pad_id, 0)),
            masked,
            (lengths[0], lengths[1]),
            None if masked is None else _predicted(masked[1]),
        )

    def in_second_prompt(self, input_ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of the same sentences in the second prompt."""
        rows = zip(input_ids.tolist(), mask.sum(axis=1).tolist())
        framed = [swap_prompt(row[:length], self.prompt_affixes[0], self.prompt_affixes[1]) for row, length in rows]
        ids_BT, mask_BT = pad(framed, self.tokenizer.pad_token_id)
        return ids_BT.numpy(), mask_BT.numpy()

    def masked_copy(self, input_ids: np.ndarray, key: int) -> tuple[Tensor, Tensor]:
        """Ids with masked tokens, and their labels."""
        return mask_tokens(
            torch.as_tensor(input_ids),
            self.config.loss.mlm_probability,
            mask_id=self.tokenizer.mask_token_id,
            vocabulary=len(self.tokenizer),
            kept_ids=self.tokenizer.all_special_ids,
            generator=torch.Generator().manual_seed(key),
        )

    def warm_up_shard(self) -> Shard:
        """A shard of one row that exercises every part of the model, and whose values mean nothing."""
        prompts = [[*before, *after] for before, after in self.prompt_affixes] or [
            [self.tokenizer.cls_token_id or 0] * 4
        ]
        ids = [torch.tensor([prompt]) for prompt in prompts]
        views = [(ids_BT, torch.ones_like(ids_BT)) for ids_BT in ids]
        return Shard(
            *views[0],
            DropoutKeys(0, 0, np.zeros(1, np.int64)),
            views[1] if self.config.encoder.second_prompt else None,
            (ids[0], ids[0]) if self.config.loss.mlm_weight else None,
        )


def _predicted(labels_BT: Tensor) -> Tensor:
    places = np.flatnonzero(labels_BT.numpy() != IGNORED)
    return torch.as_tensor(places if len(places) else np.zeros(1, np.int64))


def _joined(pairs: Sequence[tuple[Tensor, Tensor]], padding: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Pairs of (B, T) one below the other, each padded by its number; None where there are none."""
    if not pairs:
        return None
    longest = max(first.shape[1] for first, _ in pairs)
    first, second = (
        torch.cat([F.pad(pair[place], (0, longest - pair[place].shape[1]), value=padding[place]) for pair in pairs])
        for place in (0, 1)
    )
    return first, second
