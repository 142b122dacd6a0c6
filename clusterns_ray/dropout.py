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


def dropped_levels(p: float) -> int:
    """How many of the 65,536 numbers drop an element."""
    return round(p * LEVELS)


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), with the probability as it is rounded."""
    return LEVELS / (LEVELS - dropped_levels(p))


def kept(like: Tensor, p: float) -> Tensor:
    """1 with probability ``1 - p`` and else 0, by torch's default generator of the CPU; shape and dtype of ``like``.

    Not bool: a CPU multiplies by that several times slower (measured: experiments/LOG.md).
    """
    n = like.numel()
    words = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    mask = torch.empty(n, dtype=like.dtype)
    torch.ge(words.view(torch.int16)[:n], dropped_levels(p) - LEVELS // 2, out=mask)
    return mask.view(like.shape)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep = kept(x, p)
        ctx.save_for_backward(keep)
        ctx.scale = dropout_scale(p)
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
