"""Dropout for training on a CPU, where drawing the random numbers one by one takes a good part of a step.

64-bit words are read as four 16-bit numbers each, and one is compared for each element: the probability is exact to
1/65536, and the scale makes up for what it was rounded to. The words come from torch's generator or, faster, from
numpy's SFC64. On other devices torch's own dropout is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 2**16

SIDE_BY_SIDE = 20_000
"""Words below which it does not pay to wake other threads."""


def dropped_levels(p: float) -> int:
    """How many of the 65,536 numbers drop an element, with probability ``p``."""
    return round(p * LEVELS)


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), with the probability as it is rounded."""
    return LEVELS / (LEVELS - dropped_levels(p))


def keep_mask(like: Tensor, p: float) -> Tensor:
    """A mask of the shape and dtype of ``like``: 1 with probability ``1 - p``, else 0, by torch's default generator.

    It is not bool, as a CPU multiplies by that several times slower (measured: experiments/LOG.md).
    """
    words = torch.empty(_num_words(like), dtype=torch.int64).random_(-(2**63), None)
    mask = torch.empty(like.shape, dtype=like.dtype)
    _compare(words, p, mask)
    return mask


class Streams:
    """Random numbers of several streams, numpy's SFC64, drawn side by side."""

    def __init__(self, keys: Sequence[int]) -> None:
        self.generators = [np.random.Generator(np.random.SFC64(key)) for key in keys]

    def fill(self, masks: Sequence[Tensor], p: float) -> None:
        """Fill each mask as :func:`keep_mask` does, from the stream of the same number."""
        for words, mask in zip(self._draw([_num_words(mask) for mask in masks]), masks, strict=True):
            _compare(torch.as_tensor(words), p, mask)

    def _draw(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """int64 words of each stream."""
        limits = np.iinfo(np.int64)

        def draw(generator: np.random.Generator, size: int) -> np.ndarray:
            return generator.integers(limits.min, limits.max, size, endpoint=True)

        threads = min(torch.get_num_threads(), len(sizes))
        if threads == 1 or sum(sizes) < SIDE_BY_SIDE:
            return [draw(generator, size) for generator, size in zip(self.generators, sizes, strict=True)]
        return list(_pool(threads).map(draw, self.generators, sizes))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """numpy draws without holding the interpreter's lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="dropout")


def _num_words(mask: Tensor) -> int:
    """64-bit words that the elements of a mask take."""
    return (mask.numel() + 3) // 4


def _compare(words: Tensor, p: float, out: Tensor) -> None:
    torch.ge(words.view(torch.int16)[: out.numel()], dropped_levels(p) - LEVELS // 2, out=out.view(-1))


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
    """Whether dropout with probability ``p`` drops some elements and keeps others."""
    return 0 < dropped_levels(p) < LEVELS


def drop(x: Tensor, p: float, streams: Streams | None = None, rows: Sequence[int] = ()) -> Tensor:
    """Zeros with probability ``p``, the rest divided by ``1 - p``; in the dtype of ``x``.

    Args:
        streams: the random numbers; torch's default generator if not given.
        rows: how many consecutive rows of ``x`` each stream draws for.
    """
    if x.device.type != "cpu" or not drops(p):
        return nn.functional.dropout(x, p)
    if streams is None:
        keep = keep_mask(x, p)
    else:
        keep = torch.empty(x.shape, dtype=x.dtype)
        streams.fill(torch.split(keep, list(rows)), p)
    return _Drop.apply(x, keep, dropout_scale(p))  # type: ignore[return-value]


class Dropout(nn.Dropout):
    """``torch.nn.Dropout``, with the random numbers above."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p) if self.training else input
