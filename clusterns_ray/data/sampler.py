"""Which rows make up which batch: pure functions of the seed, the epoch and the step.

No order is ever stored. Row numbers are computed on demand by a keyed bijection of ``range(num_rows)``, so
a run that resumes at any step, on any number of workers, sees the same batches, and a billion rows cost no
memory.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from clusterns_ray.errors import DataError

CHUNK_BATCHES = 16  # global batches sorted by length together under order "length_grouped"

_ROUNDS = 8
_MAX_ROWS = 2**62  # the largest even-bit domain whose values fit in int64

# Constants of the SplitMix64 generator: Steele, Lea and Flood, "Fast splittable pseudorandom number
# generators", OOPSLA 2014; the finaliser is variant 13 of David Stafford's 64-bit mixers.
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Lengths = Callable[[np.ndarray], np.ndarray]


def stream_key(*parts: int | str) -> int:
    """A key in ``[0, 2**63)`` for the random stream named by ``parts``, e.g. ``("dropout", seed, step)``.

    The same on every platform and in every process. Parts are labelled with their kind and length, so that
    ``("ab", "c")``, ``("a", "bc")``, ``(1,)`` and ``("1",)`` name four different streams.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        kind, text = ("s", part) if isinstance(part, str) else ("i", str(operator.index(part)))
        data = text.encode("utf-8")
        digest.update(f"{kind}{len(data)}:".encode("ascii") + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where the permutation of ``range(n)`` named by ``key`` sends each entry of ``index``.

    A balanced Feistel network is a bijection of the smallest even-bit power of two that holds ``n``; results
    outside ``range(n)`` are sent through it again until they fall inside (cycle walking), which leaves a
    bijection of ``range(n)``. At most three quarters of the domain lies outside, so that takes few turns.

    Args:
        index: int64 array of any shape, entries in ``[0, n)``.
        n: size of the domain, from 1 to ``2**62``.
        key: 64-bit integer, see :func:`stream_key`.

    Returns:
        int64 array of the shape of ``index``.

    Raises:
        ValueError: ``n`` or an entry of ``index`` is out of range.
    """
    index = np.asarray(index, dtype=np.int64)
    if not 1 <= n <= _MAX_ROWS:
        raise ValueError(
            f"permute: n is {n}, but a permutation is defined for 1 to 2**62 rows; pass the number of rows"
        )
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise ValueError(
            f"permute: index spans {index.min()} to {index.max()}, outside [0, {n}), where the permutation "
            "is not defined; pass positions below n"
        )
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = _mix(np.uint64(key % 2**64) + _GOLDEN_GAMMA * np.arange(1, _ROUNDS + 1, dtype=np.uint64))
    values = _feistel(index.reshape(-1).astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64).reshape(index.shape)


def random_draws(index: np.ndarray, *stream: int | str) -> np.ndarray:
    """A random number for each entry of ``index``: a pure function of the entry and of the stream (see
    :func:`stream_key`). The range is so wide that ``draw % n`` is as good as uniform.

    Args:
        index: int64 array of any shape, entries in ``[0, 2**62)``.

    Returns:
        int64 array of the shape of ``index``, in ``[0, 2**62)``; different entries draw different numbers.
    """
    return permute(index, _MAX_ROWS, stream_key(*stream))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, elementwise over uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _feistel(x: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    """A bijection of ``range(4**half_bits)``, elementwise over uint64."""
    bits, spare = np.uint64(half_bits), np.uint64(64 - half_bits)
    left, right = x >> bits, x & (~np.uint64(0) >> spare)
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) >> spare)  # the high bits are the best mixed
    return (left << bits) | right


def steps_per_epoch(num_rows: int, batch_size: int, shards: int = 1) -> int:
    """How many global batches an epoch has; see :meth:`BatchOrder.bounds` for what becomes of the remainder.

    Raises:
        DataError: there are fewer rows than shards.
    """
    if num_rows < shards:
        raise DataError(
            f"the corpus has {num_rows} rows, fewer than the {shards} shards a batch is cut into, so no "
            "batch can be formed; add text or use fewer shards"
        )
    full, rest = divmod(num_rows, batch_size)
    return full + (rest >= shards and rest > 0)


@dataclass
class BatchOrder:
    """The order in which rows come: every row once per epoch.

    Consecutive steps of ``"length_grouped"`` read the same chunk; keeping the last one saves sorting it 16 times. The
    cache is no state: the answer to a question never depends on the questions before it.

    Args:
        order: ``"random"``, or ``"length_grouped"``: the rows of 16 consecutive batches are sorted by length
            and cut into batches of rows of like length, which come in a seeded order.
        lengths: needed by ``"length_grouped"``: maps int64 row numbers ``(n,)`` to token lengths ``(n,)``.

    Raises:
        DataError: there are fewer rows than shards.
    """

    seed: int
    num_rows: int
    batch_size: int
    shards: int = 1
    order: str = "random"
    lengths: Lengths | None = None
    _last: tuple[tuple[int, int], list[np.ndarray]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.steps_per_epoch = steps_per_epoch(self.num_rows, self.batch_size, self.shards)

    def bounds(self, step: int) -> tuple[int, int]:
        """The positions ``[start, stop)`` of the epoch that batch ``step`` covers.

        Every batch has ``batch_size`` rows but possibly the last: a remainder of at least one row per shard is a
        smaller batch of its own; a remainder below that joins the batch before it. So every batch has a row for
        every shard, and an epoch neither repeats nor skips a row.

        Raises:
            ValueError: the epoch has no such step.
        """
        steps, size = self.steps_per_epoch, self.batch_size
        if not 0 <= step < steps:
            raise ValueError(
                f"step is {step}, but this epoch has {steps} steps, numbered from 0; pass one of [0, {steps})"
            )
        return step * size, self.num_rows if step == steps - 1 else (step + 1) * size

    def sample_ids(self, epoch: int, step: int) -> np.ndarray:
        """The rows of global batch ``step`` (0-based within ``epoch``): int64 ``(rows in the batch,)``.

        Raises:
            ValueError: the epoch has no such step.
        """
        start, stop = self.bounds(step)
        if self.order == "random":
            return self._rows(epoch, start, stop)
        chunk, place = divmod(step, CHUNK_BATCHES)
        if self._last is None or self._last[0] != (epoch, chunk):
            self._last = (epoch, chunk), self._chunk(epoch, chunk)
        return self._last[1][place].copy()

    def _rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        positions = np.arange(start, stop, dtype=np.int64)
        return permute(positions, self.num_rows, stream_key("order", self.seed, epoch))

    def _chunk(self, epoch: int, chunk: int) -> list[np.ndarray]:
        """The batches of one chunk, each of rows of like length, in the order in which they come."""
        assert self.lengths is not None
        first = chunk * CHUNK_BATCHES
        last = min(first + CHUNK_BATCHES, self.steps_per_epoch) - 1
        starts = np.array([self.bounds(step)[0] for step in range(first, last + 1)])
        rows = self._rows(epoch, self.bounds(first)[0], self.bounds(last)[1])
        rows = rows[np.argsort(self.lengths(rows), kind="stable")]
        batches = np.split(rows, starts[1:] - starts[0])
        # Sorting raw draws, as numpy promises the stream of a bit generator across versions, but not that of
        # Generator.permutation.
        draws = np.random.PCG64(stream_key("chunk", self.seed, epoch, chunk)).random_raw(len(batches))
        return [batches[i] for i in np.argsort(draws, kind="stable")]


def cut_shards(lengths_B: np.ndarray, shards: int) -> list[np.ndarray]:
    """Cut a batch into shards of rows of like length, their sizes differing by one at most.

    Args:
        lengths_B: token length of each of the B rows of the batch.

    Returns:
        ``shards`` int64 arrays of positions within the batch, shortest rows first.

    Raises:
        DataError: there are fewer rows than shards.
    """
    if not 1 <= shards <= len(lengths_B):
        raise DataError(
            f"a batch of {len(lengths_B)} rows cannot be cut into {shards} shards, as each needs a row; use "
            "larger batches or fewer shards"
        )
    return np.array_split(np.argsort(lengths_B, kind="stable"), shards)
