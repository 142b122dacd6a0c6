"""Keyed dropout in transformers' own forward pass, for models and devices where it is not packed.

Dropout modules and torch's attention draw by the keys of :mod:`clusterns_ray.kernels.dropout`. What a model draws in
its own code, such as T5 for the weights of its attention, comes from torch's generator, which is seeded by the keys of
the batch: it is the same on any number of workers, but not in other batches, nor on other devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clusterns_ray.kernels.dropout import drop, head_keys, token_keys
from clusterns_ray.kernels.transfer import to_device

ATTENTION = "clusterns_sdpa"
"""The name under which transformers knows :func:`attention`."""

SPECIAL = ("position_bias", "softcap", "cache")
"""What an attention may ask for that is left to transformers."""

USES = 2**20
"""A module's second use in one pass is a site of its own, this far behind the first."""


class _Pass:
    """The keys of one forward pass, and how often each module was used in it."""

    def __init__(self, row_keys_B: np.ndarray, device: torch.device) -> None:
        self.row_keys_B, self.device = row_keys_B, device
        self._tokens: dict[int, Tensor] = {}
        self._uses: Counter[int] = Counter()

    def tokens(self, count: int) -> Tensor:
        if count not in self._tokens:
            self._tokens[count] = to_device(token_keys(self.row_keys_B, count), self.device)
        return self._tokens[count]

    def keys(self, shape: torch.Size) -> Tensor | None:
        """int64, for states (B, T, D), vectors (B, D) or weights (B, H, T, T); None where rows do not come first."""
        if not 2 <= len(shape) <= 4 or shape[0] != len(self.row_keys_B):
            return None
        keys_BT = self.tokens(1 if len(shape) == 2 else shape[-2])
        if len(shape) == 2:
            return keys_BT[:, 0]
        return keys_BT if len(shape) == 3 else head_keys(keys_BT, shape[1])

    def drop(self, x: Tensor, p: float, module: nn.Module) -> Tensor:
        keys = self.keys(x.shape)
        if keys is None:
            return nn.functional.dropout(x, p)
        site: int = module.dropout_site  # type: ignore[assignment]
        self._uses[site] += 1
        return drop(x, p, keys, site + USES * (self._uses[site] - 1))


_current: ContextVar[_Pass | None] = ContextVar("dropout keys", default=None)


@contextmanager
def keyed_dropout(row_keys_B: np.ndarray, device: torch.device) -> Iterator[None]:
    """Inside, one forward pass of a batch draws its dropout by the keys of its rows, int64 (B)."""
    torch.manual_seed(int(row_keys_B[0]))  # for what a model draws in its own code
    before = _current.set(_Pass(row_keys_B, device))
    try:
        yield
    finally:
        _current.reset(before)


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, which draws by the keys of the batch inside :func:`keyed_dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        keyed = _current.get()
        if not self.training or keyed is None:
            return super().forward(input)
        return keyed.drop(input, self.p, self)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' ``sdpa`` has it, step by step where it drops weights inside :func:`keyed_dropout`.

    Args:
        query, key, value: (B, heads, T, width of a head).
        attention_mask: bool, True where a key is read; or a number that is added; (B, 1 or heads, 1 or T, T).

    Returns:
        (B, T, heads, width of a head), and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scale: float = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    special = causal or query.shape[1] != key.shape[1] or any(others.get(k) is not None for k in SPECIAL)
    keyed = _current.get()
    if not dropout or keyed is None or special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    if attention_mask is not None:
        boolean = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if boolean else scores + attention_mask
    weights = keyed.drop(torch.softmax(scores, dim=-1).to(value.dtype), dropout, attention_dropout(module))
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def attention_dropout(module: nn.Module) -> nn.Module:
    """The module that stands for the dropout of an attention's weights: a Dropout of its own, or else itself."""
    return next((child for child in module.children() if isinstance(child, nn.Dropout)), module)


def number_dropout(backbone: Any) -> None:
    """Give each module its number: the site of its dropout, by which draws at different places differ."""
    for site, module in enumerate(backbone.modules()):
        module.dropout_site = site


def use_keyed_dropout(backbone: Any) -> None:
    """Replace the dropout of a transformers model, and of its attention where that is torch's; weights stay.

    The model that is exported later is not marked by it: neither is written to its configuration.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p))
    number_dropout(backbone)
    if getattr(backbone.config, "_attn_implementation", None) == "sdpa" and not getattr(
        backbone.config, "is_decoder", False
    ):
        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        backbone.set_attn_implementation(ATTENTION)
