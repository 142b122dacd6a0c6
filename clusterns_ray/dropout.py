"""Dropout for training on a CPU, where drawing the random numbers one by one takes a sixth of a step.

64-bit words are read as four 16-bit numbers each, and one is compared for each element: the probability is exact to
1/65536, and the scale makes up for what it was rounded to. The words come from torch's generator or, faster, from
numpy's SFC64. On other devices torch's own dropout is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 2**16


def dropped_levels(p: float) -> int:
    """How many of the 65,536 numbers drop an element."""
    return round(p * LEVELS)


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), with the probability as it is rounded."""
    return LEVELS / (LEVELS - dropped_levels(p))


def kept(like: Tensor, p: float, streams: Sequence[np.random.SFC64] = (), rows: Sequence[int] = ()) -> Tensor:
    """1 with probability ``1 - p`` and else 0; shape and dtype of ``like``.

    Not bool: a CPU multiplies by that several times slower (measured: experiments/LOG.md).

    Args:
        streams, rows: each stream draws for so many rows of ``like``, one after the other; torch's default generator
            of the CPU for all of them, if there is none.
    """
    mask = torch.empty(like.shape, dtype=like.dtype)
    parts = mask.split(list(rows)) if streams else (mask,)
    for part, stream in zip(parts, streams or (None,), strict=True):
        n = part.numel()
        numbers = _words((n + 3) // 4, stream).view(torch.int16)[:n]
        torch.ge(numbers, dropped_levels(p) - LEVELS // 2, out=part.view(-1))
    return mask


def _words(n: int, stream: np.random.SFC64 | None) -> Tensor:
    """So many random 64-bit words."""
    if stream is None:
        return torch.empty(n, dtype=torch.int64).random_(-(2**63), None)
    return torch.from_numpy(stream.random_raw(n).view(np.int64))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return x.mul(keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return gradients[0].mul(keep).mul_(ctx.scale), None, None


def drops(p: float) -> bool:
    """Whether some are dropped and some kept."""
    return 0 < dropped_levels(p) < LEVELS


def drop(x: Tensor, p: float, streams: Sequence[np.random.SFC64] = (), rows: Sequence[int] = ()) -> Tensor:
    """Zeros with probability ``p``, drawn as by :func:`kept`, the rest divided by ``1 - p``; in the dtype of ``x``."""
    if x.device.type != "cpu" or not drops(p):
        return nn.functional.dropout(x, p)
    return _Drop.apply(x, kept(x, p, streams, rows), dropout_scale(p))  # type: ignore[return-value]


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, with the random numbers above."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p) if self.training else input
