"""Dropout and attention of transformers' own forward pass in training on a CPU, for what is not packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clusterns_ray.kernels.dropout import Dropout, drop

ATTENTION = "clusterns_sdpa"
"""The name under which transformers knows :func:`attention`."""

SPECIAL = ("position_bias", "softcap", "cache")
"""What an attention may ask for that is left to transformers."""


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

    scale: float = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    special = causal or query.shape[1] != key.shape[1] or any(others.get(k) is not None for k in SPECIAL)
    if not dropout or query.device.type != "cpu" or special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    scores = torch.matmul(query, key.transpose(2, 3)).float() * scale
    if attention_mask is not None:
        boolean = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if boolean else scores + attention_mask
    weights = drop(torch.softmax(scores, dim=-1).to(value.dtype), dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def use_fast_training(backbone: Any) -> None:
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
