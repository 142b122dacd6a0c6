"""Dropout for training on a CPU, where drawing the random numbers one by one takes a sixth of a step.

64-bit words of torch's generator are read as four 16-bit numbers each, and one is compared for each element: the
probability is exact to 1/65536, and the scale makes up for what it was rounded to. On other devices torch's own
dropout is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 2**16
ATTENTION = "clusterns_sdpa"
"""The name under which transformers knows :func:`attention`."""

SPECIAL = ("position_bias", "softcap", "cache")
"""What an attention may ask for that is left to transformers."""


def dropped_levels(p: float) -> int:
    """How many of the 65,536 numbers drop an element."""
    return round(p * LEVELS)


def keep_mask(like: Tensor, p: float) -> Tensor:
    """Bool, in the shape of ``like``: True with probability ``1 - p``, from torch's default generator of the CPU."""
    n = like.numel()
    words = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[:n] >= dropped_levels(p) - LEVELS // 2).view(like.shape)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep = keep_mask(x, p)
        ctx.save_for_backward(keep)
        ctx.scale = LEVELS / (LEVELS - dropped_levels(p))
        return x.mul(keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return gradients[0].mul(keep).mul_(ctx.scale), None


def drop(x: Tensor, p: float) -> Tensor:
    """Zeros with probability ``p``, the rest divided by ``1 - p``; in the dtype of ``x``."""
    if x.device.type != "cpu" or not 0 < dropped_levels(p) < LEVELS:
        return nn.functional.dropout(x, p)
    return _Drop.apply(x, p)  # type: ignore[return-value]


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, with the random numbers above."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p) if self.training else input


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
    """Attention as transformers' ``sdpa`` has it; on a CPU, where torch has no fused kernel with dropout, step by step.

    Args:
        query, key, value: (B, heads, T, width of a head).
        attention_mask: bool, True where a key is read; or a number that is added; (B, 1 or heads, 1 or T, T).

    Returns:
        (B, T, heads, width of a head), and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    special = causal or query.shape[1] != key.shape[1] or any(others.get(k) is not None for k in SPECIAL)
    if not dropout or query.device.type != "cpu" or special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    scores = torch.matmul(query, key.transpose(2, 3)).float() * (
        query.shape[-1] ** -0.5 if scaling is None else scaling
    )
    if attention_mask is not None:
        boolean = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if boolean else scores + attention_mask
    weights = drop(torch.softmax(scores, dim=-1).to(value.dtype), dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def use_fast_dropout(backbone: Any) -> None:
    """Replace the dropout of a transformers model, and of its attention where that is torch's; weights stay.

    The model that is exported later is not marked by it: neither is written to its configuration.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p))
    if getattr(backbone.config, "_attn_implementation", None) == "sdpa" and not getattr(
        backbone.config, "is_decoder", False
    ):
        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        backbone.set_attn_implementation(ATTENTION)
