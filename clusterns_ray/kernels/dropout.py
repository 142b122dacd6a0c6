"""Dropout whose mask is a hash: no generator, and the same on every device, whatever else is computed beside it.

An element is kept or dropped by the key of its token and by its own number. A token's key is a hash of its row's key
and of its position, so that neither the batch, nor padding, nor the number of workers enters. Let ``k`` be the key, and
``c`` and ``w`` constants of 64 random bits for the place in the model (the *site*) and for the word that four elements
share:

    x = k ^ c[site] ^ w[number // 4];  x *= A;  x ^= x >> 32;  x *= B;  x ^= x >> 32

An element reads 16 of these 64 bits and is dropped where they are below ``p`` x 65,536. ``A`` and ``B`` are the
multipliers of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with
the constants of David Stafford's variant 13), whose whole finaliser makes keys and constants.

A CPU computes it where it is read, in pieces that stay in its cache, on as many threads as torch has; other devices
compute the masks of many sites in a few operations. Masks are kept for the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clusterns_ray.kernels.transfer import to_device

LEVELS = 2**16
PER_WORD = 4
"""Elements that read one word of 64 bits."""

CHUNK = 2**14
"""Words that are hashed at a time: with what is computed of them they fit into a core's second cache."""

WORDS_TOGETHER = 2**27
"""Words that other devices hash at a time, 1 GiB: at the beginning of a pass, when its activations are not there."""

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
HALF = np.uint64(32)

SITES, HEADS = 2**40, 2**41
"""Where the numbers of the constants of sites and of heads begin; those of words are below."""


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, elementwise over uint64."""
    x = (x ^ (x >> np.uint64(30))) * MULTIPLIERS[0]
    x = (x ^ (x >> np.uint64(27))) * MULTIPLIERS[1]
    return x ^ (x >> np.uint64(31))


def constants(first: int, count: int) -> np.ndarray:
    """uint64: constants number ``first`` and those that follow."""
    return mix(np.arange(first + 1, first + count + 1, dtype=np.uint64) * GAMMA)


def site_words(site: int, width: int) -> np.ndarray:
    """uint64: what tells the words of ``width`` elements apart, at this site."""
    return constants(0, -(-width // PER_WORD)) ^ constants(SITES + site, 1)


@lru_cache(maxsize=4096)
def _moved(kind: str, numbers: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    if kind == "levels":
        return to_device(np.array(numbers) - LEVELS // 2, device).to(torch.int16)
    array = constants(HEADS, count) if kind == "heads" else np.stack([site_words(site, count) for site in numbers])
    return to_device(array.view(np.int64), device)


def _on_device(kind: str, numbers: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Moved to a device other than the CPU once: :func:`site_words` of these sites, int64; the constants of heads,
    int64; or the levels below which a number drops its element, int16."""
    return (_moved.__wrapped__ if device.type == "cpu" else _moved)(kind, numbers, count, device)


# ---- keys -----------------------------------------------------------------------------------------------------------


def token_keys(row_keys_B: np.ndarray, tokens: int) -> np.ndarray:
    """int64 (B, T): the key of each token, by its row's key (int64) and its position."""
    positions_T = np.arange(1, tokens + 1, dtype=np.uint64) * GAMMA
    return mix(row_keys_B.view(np.uint64)[:, None] + positions_T).view(np.int64)


def head_keys(keys_BT: Tensor, heads: int) -> Tensor:
    """int64 (B, H, T): a key for each head and token, where it is a query that draws for its keys."""
    return keys_BT[:, None] ^ _on_device("heads", (), heads, keys_BT.device)[:, None]


# ---- masks ----------------------------------------------------------------------------------------------------------


def dropped_levels(p: float) -> int:
    """How many of the 65,536 numbers drop an element, with probability ``p``."""
    return round(p * LEVELS)


def dropout_scale(p: float) -> float:
    """What kept elements are multiplied by: 1 / (1 - p), with the probability as it is rounded."""
    return LEVELS / (LEVELS - dropped_levels(p))


def drops(p: float) -> bool:
    """Whether dropout with probability ``p`` drops some elements and keeps others."""
    return 0 < dropped_levels(p) < LEVELS


def keep_mask(
    keys: Tensor, width: int, p: float, site: int, *, kept: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Which elements stay: for keys of any shape ``S`` a tensor ``(*S, width)`` of ``kept``, with probability
    ``1 - p``, and zeros.

    It is not bool, as a CPU multiplies by that several times slower (measured: experiments/LOG.md).
    """
    if keys.device.type == "cpu":
        mask = torch.empty((*keys.shape, width), dtype=dtype)
        if type(mask) is Tensor:  # else it has no values, and memory alone is counted
            _fill(mask.view(-1, width), keys.flatten(), p, site, kept)
        return mask
    return keep_masks(keys, width, {site: p})[site].to(dtype) * kept


def keep_masks(keys: Tensor, width: int, sites: Mapping[int, float]) -> dict[int, Tensor]:
    """The masks of sites with the probabilities of their dropout, bool ``(*S, width)``, by torch's operations on any
    device: as many sites at a time as memory allows, so that they are few."""
    words = -(-width // PER_WORD)
    together = max(1, WORDS_TOGETHER // max(1, keys.numel() * words))
    masks, numbers = dict[int, Tensor](), list(sites)
    for first in range(0, len(numbers), together):
        some = tuple(numbers[first : first + together])
        levels = _on_device("levels", tuple(dropped_levels(sites[site]) for site in some), 0, keys.device)
        number = hashed_words(keys, width, some).view(torch.int16)[..., :width]
        masks |= zip(some, (number >= levels.view(-1, *[1] * (keys.dim() + 1))).unbind())
    return masks


def hashed_words(keys: Tensor, width: int, sites: tuple[int, ...]) -> Tensor:
    """int64 ``(sites, *S, words)`` of keys of shape ``S``: the words that ``width`` elements read, by torch's
    operations."""
    words = _on_device("words", sites, width, keys.device)
    x = keys[..., None] ^ words.view(len(sites), *[1] * keys.dim(), -1)
    low, high = x.view(torch.int32)[..., ::2], x.view(torch.int32)[..., 1::2]
    for multiplier in MULTIPLIERS:
        x.mul_(int(multiplier.astype(np.int64)))
        low.bitwise_xor_(high)  # x ^= x >> 32
    return x


def _fill(mask_MD: Tensor, keys_M: Tensor, p: float, site: int, kept: float) -> None:
    """On a CPU: rows of the mask in pieces, which threads share where there are many."""
    width = mask_MD.shape[1]
    words = _moved("words", (site,), width, keys_M.device)[0]
    level = np.int16(dropped_levels(p) - LEVELS // 2)
    # A mask is 0 and a pattern of bits, and whole numbers of every size multiply fast.
    pattern = torch.full((1,), kept, dtype=mask_MD.dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[mask_MD.dtype.itemsize]
    bits, out = pattern.view(integer).numpy()[0], mask_MD.view(integer).numpy()
    rows = max(1, CHUNK // len(words))

    def fill(start: int, stop: int) -> None:
        x_RW = torch.empty(min(rows, stop - start), len(words), dtype=torch.int64)
        shifted_RW = np.empty(x_RW.shape, dtype=np.uint64)
        keeps_RD = np.empty((len(x_RW), PER_WORD * len(words)), dtype=np.bool_)
        for first in range(start, stop, rows):
            piece = slice(first, min(first + rows, stop))
            n = piece.stop - piece.start
            # Torch's is the faster one where a row is short.
            torch.bitwise_xor(keys_M[piece, None], words, out=x_RW[:n])
            x, shifted, keeps = x_RW[:n].numpy().view(np.uint64), shifted_RW[:n], keeps_RD[:n]
            for multiplier in MULTIPLIERS:
                np.multiply(x, multiplier, out=x)
                np.right_shift(x, HALF, out=shifted)
                np.bitwise_xor(x, shifted, out=x)
            np.greater_equal(x.view(np.int16), level, out=keeps)
            np.copyto(out[piece], keeps[:, :width])
            np.multiply(out[piece], bits, out=out[piece])

    share = -(-len(keys_M) // torch.get_num_threads())
    if share == len(keys_M) or mask_MD.numel() < PER_WORD * CHUNK:
        fill(0, len(keys_M))
        return
    starts = range(0, len(keys_M), share)
    list(_pool(len(starts)).map(fill, starts, [min(start + share, len(keys_M)) for start in starts]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """numpy works without holding the interpreter's lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="dropout")


# ---- dropout --------------------------------------------------------------------------------------------------------


def masked(x: Tensor, mask: Tensor, kept: float, *, in_place: bool = False) -> Tensor:
    """``x * mask * kept`` in the dtype of ``x``, which the mask has too, or else is bool; no gradient."""
    if mask.dtype == torch.bool:
        return torch.ops.aten.native_dropout_backward(x, mask, kept)  # One kernel of a GPU, which does just this.
    x = x.mul_(mask) if in_place else x * mask
    return x if kept == 1.0 else x.mul_(kept)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, kept: float) -> Tensor:
        ctx.kept = kept
        ctx.save_for_backward(mask)
        return masked(x, mask, kept)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return masked(gradients[0], mask, ctx.kept), None, None


def drop_by(x: Tensor, p: float, mask: Tensor) -> Tensor:
    """:func:`drop` by a mask of :func:`keep_masks`."""
    return _Drop.apply(x, mask, dropout_scale(p))  # type: ignore[return-value]


def drop(x: Tensor, p: float, keys: Tensor, site: int) -> Tensor:
    """Zeros with probability ``p``, the rest divided by ``1 - p``; in the dtype of ``x``.

    Args:
        x: of shape ``(*S, width)``.
        keys: int64 ``S``, see :func:`token_keys` and :func:`head_keys`.
        site: the number of this place in the model.
    """
    if not drops(p):
        return nn.functional.dropout(x, p)
    width, kept = x.shape[-1], dropout_scale(p)
    if keys.device.type != "cpu":
        return drop_by(x, p, keep_masks(keys, width, {site: p})[site])
    if x.dtype.itemsize < 4:  # a narrow mask cannot hold the scale
        return _Drop.apply(x, keep_mask(keys, width, p, site, dtype=x.dtype), kept)  # type: ignore[return-value]
    return _Drop.apply(x, keep_mask(keys, width, p, site, kept=kept, dtype=x.dtype), 1.0)  # type: ignore[return-value]
