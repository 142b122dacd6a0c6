"""Rows of the global batch as tensors: a shard is what one forward pass reads.

Shape suffixes: B rows of the shard, T tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
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
    """int64 (B) each, on the host: what the dropout of each row is drawn by, whichever rows it is computed with."""

    first_B: np.ndarray
    second_B: np.ndarray
    masked_B: np.ndarray
    templates: tuple[np.ndarray, np.ndarray]
    """by the length of each row, in the prompt of either view"""


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
    """int64: places of the predicted tokens in the masked copy, read row by row"""


def dropout_keys(
    seed: int, step: int, rows: np.ndarray, mask_BT: np.ndarray, second_mask_BT: np.ndarray | None = None
) -> DropoutKeys:
    """The keys of rows of the corpus in a step, a pure function of these; masks mark their tokens, in either view."""
    masks = mask_BT, mask_BT if second_mask_BT is None else second_mask_BT
    first_B, second_B, masked_B = (
        random_draws(rows, "dropout", seed, step, view) for view in ("first", "second", "masked")
    )
    templates = tuple(
        random_draws(mask_BT.sum(axis=1), "dropout", seed, step, "template", view) for view, mask_BT in enumerate(masks)
    )
    return DropoutKeys(first_B, second_B, masked_B, (templates[0], templates[1]))


class ShardReader:
    """Reads a shard of a step: tokens of both views, the keys of their dropout, and which tokens are masked."""

    def __init__(self, config: Config, tokens: TokenStore, tokenizer: Any, device: torch.device) -> None:
        self.config, self.tokens, self.tokenizer, self.device = config, tokens, tokenizer, device
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
        masked, predicted_R = None, None
        if self.config.loss.mlm_weight:
            masked, predicted_R = self.masked_copy(input_ids, stream_key("mlm", seed, step, shard))
        return Shard(
            to_device(input_ids, self.device),
            to_device(mask, self.device),
            dropout_keys(seed, step, rows, mask, None if second is None else second[1]),
            None if second is None else (to_device(second[0], self.device), to_device(second[1], self.device)),
            masked,
            (mask.sum(axis=1), (mask if second is None else second[1]).sum(axis=1)),
            predicted_R,
        )

    def in_second_prompt(self, input_ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of the same sentences in the second prompt."""
        rows = zip(input_ids.tolist(), mask.sum(axis=1).tolist())
        framed = [swap_prompt(row[:length], self.prompt_affixes[0], self.prompt_affixes[1]) for row, length in rows]
        ids_BT, mask_BT = pad(framed, self.tokenizer.pad_token_id)
        return ids_BT.numpy(), mask_BT.numpy()

    def masked_copy(self, input_ids: np.ndarray, key: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Ids with masked tokens and their labels, and where these are: one place that is ignored if there are none."""
        ids_BT, labels_BT = mask_tokens(
            torch.as_tensor(input_ids),
            self.config.loss.mlm_probability,
            mask_id=self.tokenizer.mask_token_id,
            vocabulary=len(self.tokenizer),
            kept_ids=self.tokenizer.all_special_ids,
            generator=torch.Generator().manual_seed(key),
        )
        ids, labels = ids_BT.numpy(), labels_BT.numpy()
        predicted = np.flatnonzero(labels != IGNORED)
        masked = to_device(ids, self.device), to_device(labels, self.device)
        return masked, to_device(predicted if len(predicted) else np.zeros(1, np.int64), self.device)

    def warm_up_shard(self) -> Shard:
        """A shard of one row that exercises every part of the model, and whose values mean nothing."""
        prompts = [[*before, *after] for before, after in self.prompt_affixes] or [
            [self.tokenizer.cls_token_id or 0] * 4
        ]
        ids = [torch.tensor([prompt], device=self.device) for prompt in prompts]
        views = [(ids_BT, torch.ones_like(ids_BT)) for ids_BT in ids]
        return Shard(
            *views[0],
            dropout_keys(0, 0, np.zeros(1, np.int64), views[0][1].numpy(force=True)),
            views[1] if self.config.encoder.second_prompt else None,
            (ids[0], ids[0]) if self.config.loss.mlm_weight else None,
        )
