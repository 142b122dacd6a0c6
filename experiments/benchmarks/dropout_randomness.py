"""Whether the hash by which dropout is drawn can be told from random numbers.

    python experiments/benchmarks/dropout_randomness.py [--rows 200] [--seed 1]
    python experiments/benchmarks/dropout_randomness.py --stream features | RNG_test stdin64

Without ``--stream`` a battery of statistics is taken, and each is printed as the number of standard deviations by which
it is off. With it, the words of 64 bits, four elements each, are written without end for a battery of others, such as
PractRand: neighbours in the stream are neighbours in what it is named after.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch

from clusterns_ray.data.sampler import random_draws
from clusterns_ray.kernels.dropout import LEVELS, hashed_words, head_keys
from clusterns_ray.kernels.dropout import token_keys as keys_of_tokens

ALARM = 5.0
"""Standard deviations: of a hundred statistics, one is further off in one of 20,000 runs."""

PER_CALL = 1 << 16


def words(keys: torch.Tensor, count: int, site: int = 1) -> np.ndarray:
    """uint64 ``(*S, count)`` of keys of shape ``S``."""
    return hashed_words(keys, 4 * count, (site,))[0].numpy().view(np.uint64)


def row_keys(rows: np.ndarray, step: int = 0, seed: int = 1) -> np.ndarray:
    return random_draws(rows, "dropout", seed, step, "first")


def token_keys(row_keys_B: np.ndarray, count: int) -> torch.Tensor:
    return torch.from_numpy(keys_of_tokens(row_keys_B, count))


# ---- streams --------------------------------------------------------------------------------------------------------


def features(start: int) -> np.ndarray:
    """All words of width 768, of the tokens of rows of 32."""
    return words(token_keys(row_keys(np.arange(16 * start, 16 * (start + 1))), 32), 192)


def tokens(start: int) -> np.ndarray:
    """One word of the tokens of rows of 512."""
    return words(token_keys(row_keys(np.arange(128 * start, 128 * (start + 1))), 512), 1)


def rows(start: int) -> np.ndarray:
    """One word of the first token of each row of the corpus."""
    count = PER_CALL
    return words(token_keys(row_keys(np.arange(start * count, (start + 1) * count)), 1), 1)


def steps(start: int) -> np.ndarray:
    """One word of the same 16 rows in each step."""
    keys = [row_keys(np.arange(16), step) for step in range(start * 512, (start + 1) * 512)]
    return words(token_keys(np.concatenate(keys), 1), 1)


def sites(start: int) -> np.ndarray:
    """One word of each of 256 sites, of each token."""
    keys = token_keys(row_keys(np.arange(start * 64, start * 64 + 64)), 16)
    return np.stack([words(keys, 1, site)[..., 0] for site in range(256)], axis=-1)


def heads(start: int) -> np.ndarray:
    """One word of each of 16 heads, of each query."""
    keys = head_keys(token_keys(row_keys(np.arange(start * 128, start * 128 + 128)), 32), 16)
    return words(keys.transpose(1, 2).contiguous(), 1)


STREAMS: dict[str, Callable[[int], np.ndarray]] = {
    stream.__name__: stream for stream in (features, tokens, rows, steps, sites, heads)
}


# ---- the battery ----------------------------------------------------------------------------------------------------


def battery(rows: int = 40, tokens: int = 16, width: int = 256, seed: int = 1) -> Iterator[tuple[str, float]]:
    """The name of each statistic, and by how many standard deviations it is off.

    A table of elements has an axis for rows, sites, tokens and words; heads and steps are others beside it.
    """
    here = row_keys(np.arange(rows), seed=seed)
    keys_BT = token_keys(here, tokens)
    table = np.stack([words(keys_BT, width // 4, site) for site in (1, 2)], axis=1)  # (B, 2, T, W)
    numbers = table.view(np.uint16)  # (B, 2, T, D), as elements read them

    for place in range(4):
        yield f"uniform, place {place} of a word", _uniform(numbers[..., place::4].ravel() >> 8, 256)
    yield "pairs of neighbours are uniform", _uniform(_pairs(numbers[..., 0::2], numbers[..., 1::2]), 256)
    yield "pairs of tokens are uniform", _uniform(_pairs(numbers[:, :, 0::2], numbers[:, :, 1::2]), 256)

    for p in (0.1, 0.5):
        keep = (numbers >= round(p * LEVELS)).astype(np.float32) - (1 - round(p * LEVELS) / LEVELS)
        keep /= math.sqrt(p * (1 - p))
        for axis, name in ((0, "rows"), (1, "sites"), (2, "tokens"), (3, "features")):
            yield f"neighbouring {name}, p {p}", _correlation(*_neighbours(keep, axis, 1))
        for lag in (2, 3, 4, 8):
            yield f"features {lag} apart, p {p}", _correlation(*_neighbours(keep, 3, lag))
        sums = keep.sum(axis=3) / math.sqrt(width)
        yield f"spread over tokens, p {p}", float((sums.var() - 1) / math.sqrt(2 / sums.size))
        yield f"gaps, p {p}", _gaps(numbers.reshape(-1, width) < round(p * LEVELS), p)

    others = {
        "heads": [words(each, width // 4) for each in head_keys(keys_BT, 2).unbind(1)],
        "steps": [words(token_keys(row_keys(np.arange(rows), step, seed), tokens), width // 4) for step in (1, 2)],
        "seeds": [words(token_keys(row_keys(np.arange(rows), 1, s), tokens), width // 4) for s in (seed, seed + 1)],
    }
    for name, (first, second) in others.items():
        yield f"bits of two {name}", _bits(first ^ second)
    yield "bits of two sites", _bits(table[:, 0] ^ table[:, 1])
    for name, step in (("tokens", np.s_[:, :, ::2]), ("rows", np.s_[::2])):
        other = np.s_[:, :, 1::2] if name == "tokens" else np.s_[1::2]
        pair = table[step] ^ table[other]
        yield f"bits of two {name}", _bits(pair)
        # What is a sum or a product of a token's and a feature's part gives itself away by two of each.
        yield f"bits of two {name} and two words", _bits(pair[..., ::2] ^ pair[..., 1::2])
    square = table[:, 0] ^ table[:, 1]
    yield "bits of two sites and two words", _bits(square[..., ::2] ^ square[..., 1::2])
    for lag in (16, 32):  # elements that share a word
        folded = table ^ (table >> np.uint64(lag))
        pair = folded[:, :, ::2] ^ folded[:, :, 1::2]
        yield f"bits {lag} apart", _bits(folded, 64 - lag)
        yield f"bits {lag} apart of two tokens and two words", _bits(pair[..., ::2] ^ pair[..., 1::2], 64 - lag)
    yield "birthday spacings", _birthdays(table.ravel())


def _uniform(values: np.ndarray, bins: int) -> float:
    counts = np.bincount(values, minlength=bins)
    expected = values.size / bins
    return (float(((counts - expected) ** 2).sum() / expected) - (bins - 1)) / math.sqrt(2 * (bins - 1))


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return ((first >> 12) * 16 + (second >> 12)).ravel()


def _neighbours(x: np.ndarray, axis: int, lag: int) -> tuple[np.ndarray, np.ndarray]:
    n = x.shape[axis]
    return x.take(range(lag, n), axis), x.take(range(n - lag), axis)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Of values of mean 0 and variance 1."""
    return float((first * second).mean(dtype=np.float64) * math.sqrt(first.size))


def _bits(x: np.ndarray, bits: int = 64) -> float:
    """The one of the lower bits that is furthest from being set half of the time."""
    x = x.ravel()
    shares = [int(((x >> np.uint64(bit)) & np.uint64(1)).sum()) / x.size for bit in range(bits)]
    worst = max(abs(share - 0.5) for share in shares) * 2 * math.sqrt(x.size)
    return worst - 2.0  # of 64 numbers, the largest is about 2.4 by chance


def _gaps(dropped: np.ndarray, p: float) -> float:
    """Elements that are kept between two that are dropped: how many are none, one, two and so on."""
    ends = np.flatnonzero(dropped.ravel())
    gaps = np.minimum(np.diff(ends) - 1, 19)
    shares = p * (1 - p) ** np.arange(20)
    shares[-1] = (1 - p) ** 19
    expected = shares * len(gaps)
    full = expected > 10
    chi = ((np.bincount(gaps, minlength=20) - expected)[full] ** 2 / expected[full]).sum()
    return float((chi - full.sum()) / math.sqrt(2 * full.sum()))


def _birthdays(x: np.ndarray) -> float:
    """Marsaglia's: spacings of the upper 32 bits that come more than once, among days of 4,096 births."""
    births, days = 4096, 2.0**32
    x = np.sort((x[: x.size // births * births] >> np.uint64(32)).reshape(-1, births), axis=1)
    spacings = np.sort(np.diff(x.astype(np.int64), axis=1), axis=1)
    repeats = int((np.diff(spacings, axis=1) == 0).sum())
    expected = len(x) * births**3 / (4 * days)
    return (repeats - expected) / math.sqrt(expected)


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", choices=STREAMS)
    parser.add_argument("--rows", type=int, default=200, help="of the battery")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.stream:
        number = 0
        while True:
            try:
                sys.stdout.buffer.write(STREAMS[arguments.stream](number).tobytes())
            except BrokenPipeError:
                sys.exit()
            number += 1
    worst = 0.0
    for name, off in battery(arguments.rows, seed=arguments.seed):
        print(f"  {name:<44}{off:>8.2f}{'   ALARM' if abs(off) > ALARM else ''}")
        worst = max(worst, abs(off))
    sys.exit(int(worst > ALARM))


if __name__ == "__main__":
    main()
