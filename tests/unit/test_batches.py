from __future__ import annotations

import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterns_ray.data.sampler import (
    BatchOrder,
    cut_shards,
    permute,
    steps_per_epoch,
    stream_key,
)
from clusterns_ray.data.shard_tree import ShardTree, assign_shards, nodes_by_rank, tree_order
from clusterns_ray.errors import DataError

KEYS = st.integers(0, 2**64 - 1)


def row_lengths(rows: np.ndarray) -> np.ndarray:
    """Made-up token lengths, 3 to 60, a fixed function of the row."""
    return 3 + (rows * 2654435761 % 58)


# permute


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=KEYS)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    image = permute(np.arange(n), n, key)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


def test_permute_reaches_every_order_of_a_small_domain() -> None:
    for n, keys in ((1, 1), (2, 20), (3, 100), (4, 400)):
        assert len({tuple(permute(np.arange(n), n, key)) for key in range(keys)}) == math.factorial(n)


@pytest.mark.parametrize("n", [10**9, 10**9 + 7, 2**40 + 1, 2**61 + 3, 2**62])
def test_permute_of_a_huge_domain(n: int) -> None:
    index = np.concatenate([np.arange(50_000), np.arange(n - 50_000, n)])
    began = time.perf_counter()
    image = permute(index, n, 5)
    assert time.perf_counter() - began < 2.0
    assert image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == len(index)
    assert abs(image.mean() / n - 0.5) < 0.01


def test_permute_acts_elementwise_and_keeps_the_shape() -> None:
    whole = permute(np.arange(1000), 1000, 3)
    assert np.array_equal(permute(np.array([[7, 5], [999, 0]]), 1000, 3), whole[[[7, 5], [999, 0]]])
    assert permute(np.array(7), 1000, 3) == whole[7]
    assert permute(np.array([], dtype=np.int64), 1000, 3).shape == (0,)


def test_permute_values_are_fixed() -> None:
    # A change of these numbers breaks the resumption of every run begun before it.
    assert permute(np.arange(6), 10**9, 12345).tolist() == [
        716050502,
        772801392,
        196942840,
        764768665,
        12654456,
        442901372,
    ]
    assert stream_key("order", 7, 0) == 4366538233596548068


def test_permute_looks_random() -> None:
    n, cells = 100_000, 100
    image = permute(np.arange(n), n, stream_key("order", 1, 0))
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.015
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.015
    pairs = np.histogram2d(np.arange(n), image, bins=cells)[0]
    chi_square = ((pairs - n / cells**2) ** 2 / (n / cells**2)).sum()
    freedom = (cells - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("index", "n"), [([10], 10), ([-1], 10), ([0], 0), ([0], 2**62 + 1)])
def test_permute_refuses_what_lies_outside(index: list[int], n: int) -> None:
    with pytest.raises(ValueError, match="permute"):
        permute(np.array(index), n, 0)


# stream_key


def test_stream_key_tells_streams_apart() -> None:
    streams = [(), ("",), ("ab", "c"), ("a", "bc"), ("abc",), (1,), ("1",), (1, 2), (12,), (-1,), ("i1:1",)]
    keys = [stream_key(*parts) for parts in streams]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)
    assert stream_key(np.int64(4)) == stream_key(4)  # type: ignore[arg-type]


def test_stream_key_is_the_same_in_another_process() -> None:
    code = "from clusterns_ray.data.sampler import stream_key; print(stream_key('chunk', 3, 1))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == stream_key("chunk", 3, 1)


# an epoch


@st.composite
def epochs(draw: st.DrawFn) -> dict[str, int]:
    shards = draw(st.integers(1, 6))
    batch_size = draw(st.integers(shards, 40))
    return {"num_rows": draw(st.integers(shards, 1500)), "batch_size": batch_size, "shards": shards}


@settings(deadline=None)
@given(shape=epochs(), seed=st.integers(0, 9), order=st.sampled_from(["random", "length_grouped"]))
def test_an_epoch_has_every_row_once(shape: dict[str, int], seed: int, order: str) -> None:
    steps = steps_per_epoch(**shape)
    batch_order = BatchOrder(seed, order=order, lengths=row_lengths, **shape)
    epoch = [batch_order.sample_ids(2, step) for step in range(steps)]
    assert np.array_equal(np.sort(np.concatenate(epoch)), np.arange(shape["num_rows"]))
    sizes = [len(batch) for batch in epoch]
    assert min(sizes) >= shape["shards"]
    assert sum(size != shape["batch_size"] for size in sizes) <= 1
    assert max(sizes) < shape["batch_size"] + shape["shards"]


@pytest.mark.parametrize(
    ("num_rows", "sizes"),
    [(20, [10, 10]), (22, [10, 12]), (23, [10, 10, 3]), (3, [3]), (12, [12]), (13, [10, 3])],
)
def test_the_remainder(num_rows: int, sizes: list[int]) -> None:
    shape = {"num_rows": num_rows, "batch_size": 10, "shards": 3}
    bounds = [BatchOrder(0, **shape).bounds(step) for step in range(steps_per_epoch(**shape))]
    assert [stop - start for start, stop in bounds] == sizes
    assert [start for start, _ in bounds] == [0, *np.cumsum(sizes)[:-1].tolist()]


@pytest.mark.parametrize("order", ["random", "length_grouped"])
def test_batches_are_a_pure_function(order: str) -> None:
    shape = {"num_rows": 1003, "batch_size": 10, "shards": 4}
    batch_order = BatchOrder(5, order=order, lengths=row_lengths, **shape)
    steps = steps_per_epoch(**shape)
    questions = np.random.default_rng(0).permutation([(epoch, step) for epoch in (0, 1) for step in range(steps)])
    for epoch, step in questions.tolist():
        answer = batch_order.sample_ids(epoch, step)
        another = BatchOrder(5, order=order, lengths=row_lengths, **shape)
        assert np.array_equal(answer, another.sample_ids(epoch, step))
        answer[:] = -1  # what a caller does to an answer does not reach the cache


@pytest.mark.parametrize("order", ["random", "length_grouped"])
def test_seeds_and_epochs_differ(order: str) -> None:
    batches = [
        BatchOrder(seed, 10_000, 64, order=order, lengths=row_lengths).sample_ids(epoch, 0)
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert len(np.intersect1d(batches[i], batches[j])) < 10


def test_consecutive_steps_sort_a_chunk_once() -> None:
    calls: list[int] = []

    def lengths(rows: np.ndarray) -> np.ndarray:
        calls.append(len(rows))
        return row_lengths(rows)

    batch_order = BatchOrder(0, 1000, 10, order="length_grouped", lengths=lengths)
    for step in range(100):
        batch_order.sample_ids(0, step)
    assert calls == [160] * 6 + [40]


def test_grouped_batches_are_of_like_length_and_in_no_order_of_length() -> None:
    def of(order: str) -> list[np.ndarray]:
        batch_order = BatchOrder(3, 8000, 50, order=order, lengths=row_lengths)
        return [row_lengths(batch_order.sample_ids(0, step)) for step in range(160)]

    grouped, random = of("length_grouped"), of("random")
    assert np.mean([np.ptp(x) for x in grouped]) < 0.2 * np.mean([np.ptp(x) for x in random])
    means = np.array([x.mean() for x in grouped]).reshape(10, 16)
    assert abs(np.corrcoef(means.mean(axis=0), np.arange(16))[0, 1]) < 0.75
    assert len({tuple(np.argsort(chunk)) for chunk in means}) == 10


def test_a_chunk_holds_the_rows_of_its_positions() -> None:
    by_length = BatchOrder(0, 10_000, 100, order="length_grouped", lengths=row_lengths)
    at_random = BatchOrder(0, 10_000, 100)
    for chunk in (0, 3, 6):
        steps = range(16 * chunk, min(16 * chunk + 16, 100))
        grouped, plain = ([order.sample_ids(0, step) for step in steps] for order in (by_length, at_random))
        assert np.array_equal(np.sort(np.concatenate(grouped)), np.sort(np.concatenate(plain)))


def test_a_billion_rows_are_quick() -> None:
    batch_order = BatchOrder(0, 10**9, 512, shards=8, order="length_grouped", lengths=row_lengths)
    began = time.perf_counter()
    for step in range(10**6, 10**6 + 64):
        assert len(batch_order.sample_ids(0, step)) == 512
    assert time.perf_counter() - began < 2.0


def test_errors_of_an_epoch() -> None:
    with pytest.raises(DataError, match=r"has 3 rows, fewer than the 4 shards.*add text"):
        steps_per_epoch(3, 8, 4)
    with pytest.raises(DataError, match="has 0 rows"):
        BatchOrder(0, num_rows=0, batch_size=1)
    with pytest.raises(ValueError, match=r"step is 10, but this epoch has 10 steps.*\[0, 10\)"):
        BatchOrder(0, num_rows=100, batch_size=10).sample_ids(0, 10)


# shards


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60), data=st.data())
def test_cut_shards(lengths: list[int], data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, len(lengths)))
    lengths_B = np.array(lengths)
    pieces = cut_shards(lengths_B, shards)
    sizes = [len(piece) for piece in pieces]
    assert len(pieces) == shards and max(sizes) - min(sizes) <= 1
    order = np.concatenate(pieces)
    assert order.tolist() == sorted(range(len(lengths)), key=lambda i: (lengths[i], i))


def test_cut_shards_refuses_too_few_rows() -> None:
    with pytest.raises(DataError, match="2 rows cannot be cut into 3 shards"):
        cut_shards(np.array([1, 2]), 3)


@pytest.mark.parametrize("shards", [1, 2, 3, 6, 8, 12, 20, 64])
def test_workers_get_runs_of_the_tree_with_about_the_same_number_of_tokens(shards: int) -> None:
    order = tree_order(shards)
    assert sorted(order) == list(range(shards))
    tokens = np.arange(shards) + 10
    for workers in (n for n in range(1, shards + 1) if shards % n == 0):
        by_rank = assign_shards(shards, workers)
        assert sorted(shard for its_shards in by_rank for shard in its_shards) == list(range(shards))
        assert all(its_shards == sorted(its_shards) for its_shards in by_rank)
        assert {len(its_shards) for its_shards in by_rank} == {shards // workers}
        loads = [tokens[its_shards].sum() for its_shards in by_rank]
        if shards // workers % 2 == 0:
            assert max(loads) - min(loads) <= tokens.max() / 4


def test_tree_order_folds_short_onto_long() -> None:
    assert tree_order(8) == [0, 7, 3, 4, 1, 6, 2, 5]
    assert assign_shards(8, 2) == [[0, 3, 4, 7], [1, 2, 5, 6]]


@pytest.mark.parametrize("workers", [0, 3, 8])
def test_assign_shards_refuses_an_uneven_share(workers: int) -> None:
    with pytest.raises(ValueError, match=f"4 shards cannot be dealt to {workers} workers"):
        assign_shards(4, workers)


@pytest.mark.parametrize("shards", [1, 2, 3, 6, 8, 10, 12])
def test_all_workers_add_up_the_same_tree(shards: int) -> None:
    """Sums are written out with their brackets; the shards of each worker come in its own order."""

    def add(a: str, b: str) -> str:
        return "(" + "+".join(sorted([a, b])) + ")"

    roots = set()
    for workers in (n for n in range(1, shards + 1) if shards % n == 0):
        whole = ShardTree[str](shards, add)
        for its_shards, nodes in zip(assign_shards(shards, workers), nodes_by_rank(shards, workers), strict=True):
            tree = ShardTree[str](shards, add)
            for shard in reversed(its_shards):
                tree.put(0, tree_order(shards).index(shard), str(shard))
            assert sorted(tree.nodes) == nodes and len(nodes) <= 3
            if shards & (shards - 1) == 0:
                assert len(nodes) == 1, "one partial sum is sent"
            for node, value in tree.nodes.items():
                whole.put(*node, value)
        (root,) = whole.nodes.values()
        assert sorted(int(shard) for shard in re.findall(r"\d+", root)) == list(range(shards))
        roots.add(root)
    assert len(roots) == 1
