from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from clusterns_ray import distributed
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.training.batch_layout import BatchLayout, build_batch_layout

WORKERS = (1, 2, 4, 8)


def batch(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of a corpus, and the length of each."""
    rng = np.random.default_rng(seed)
    return rng.permutation(10_000)[:size].astype(np.int64), rng.integers(3, 33, size)


def layouts(size: int, workers: int, shards: int = 8, seed: int = 0) -> list[BatchLayout]:
    rows, lengths = batch(size, seed)
    return [build_batch_layout(rows, lengths, shards, rank=rank, workers=workers) for rank in range(workers)]


@pytest.mark.parametrize("size", [8, 64, 61, 13])
def test_the_canonical_order_does_not_depend_on_the_workers(size: int) -> None:
    alone = layouts(size, 1)[0]
    for workers in WORKERS:
        for layout in layouts(size, workers):
            np.testing.assert_array_equal(layout.rows_B, alone.rows_B)
            np.testing.assert_array_equal(layout.starts, alone.starts)
            assert layout.size == size
    np.testing.assert_array_equal(alone.canonical(0), np.arange(size))
    assert len(alone.starts) == 9 and alone.starts[0] == 0 and alone.starts[-1] == size


@pytest.mark.parametrize("size", [8, 64, 61, 13])
@pytest.mark.parametrize("workers", WORKERS)
def test_every_row_is_on_exactly_one_worker(size: int, workers: int) -> None:
    found = layouts(size, workers)
    assert sorted(found[0].rows_B.tolist()) == sorted(batch(size)[0].tolist())
    places = np.concatenate([layout.canonical(layout.rank) for layout in found])
    assert sorted(places.tolist()) == list(range(size))
    shards = [shard for its_shards in found[0].shards_by_rank for shard in its_shards]
    assert sorted(shards) == list(range(8))
    assert {len(its_shards) for its_shards in found[0].shards_by_rank} == {8 // workers}
    for layout in found:
        assert layout.shards_by_rank == found[0].shards_by_rank, "the workers do not agree on their shards"
        mine = np.concatenate([layout.shard_rows(shard) for shard in layout.shards_by_rank[layout.rank]])
        np.testing.assert_array_equal(mine, layout.rows_B[layout.canonical(layout.rank)])


def test_shards_are_alike_in_length() -> None:
    rows, lengths = batch(64)
    length_of = dict(zip(rows.tolist(), lengths.tolist()))
    layout = build_batch_layout(rows, lengths, 8, rank=0, workers=1)
    spans = []
    for shard in range(8):
        here = [length_of[row] for row in layout.shard_rows(shard).tolist()]
        assert len(here) == 8
        spans.append((min(here), max(here)))
    assert all(low <= high for low, high in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), "shards overlap in length"
    assert spans[0][0] < spans[-1][1]


def test_tokens_are_balanced() -> None:
    rows, lengths = batch(512)
    layout = build_batch_layout(rows, lengths, 16, rank=0, workers=4)
    length_of = dict(zip(rows.tolist(), lengths.tolist()))
    loads = [
        sum(len(layout.shard_rows(s)) * max(length_of[r] for r in layout.shard_rows(s).tolist()) for s in its_shards)
        for its_shards in layout.shards_by_rank
    ]
    assert max(loads) < 1.15 * min(loads)
    in_a_row = [sum(length_of[r] for s in range(4 * w, 4 * w + 4) for r in layout.shard_rows(s)) for w in range(4)]
    assert max(in_a_row) > 2 * min(in_a_row), "dealing in order would do as well, so this shows nothing"


# ---- gathering, as the collectives would do it -----------------------------------------------------------------------


def gather_all(
    found: list[BatchLayout], locals_: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """What each worker's ``gather`` gives, when the workers' (padded) rows are put in order of rank."""
    padded: dict[int, torch.Tensor] = {}
    with monkeypatch.context() as patch:
        # First to see what each one brings, then to give each one what all have brought.
        for layout, local in zip(found, locals_):

            def bring(rows: torch.Tensor, rank: int = layout.rank) -> torch.Tensor:
                padded[rank] = rows
                return torch.cat([rows] * len(found))

            patch.setattr(distributed, "all_gather_rows", bring)
            layout.gather(local)
        assert len({len(rows) for rows in padded.values()}) == 1, "the workers bring different numbers of rows"
        whole = torch.cat([padded[rank] for rank in range(len(found))])
        patch.setattr(distributed, "all_gather_rows", lambda rows: whole)
        return [layout.gather(local) for layout, local in zip(found, locals_)]


@pytest.mark.parametrize("size", [64, 61, 13, 8])
@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_gather_is_in_canonical_order(size: int, workers: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = layouts(size, workers, seed=seed)
    rows_B = torch.from_numpy(found[0].rows_B)
    locals_ = [rows_B[layout.canonical(layout.rank)] for layout in found]
    # Three columns, none of them constant, so that a mix-up of rows or columns shows.
    locals_ = [torch.stack([local, -local, local % 7], dim=1).double() for local in locals_]
    for gathered in gather_all(found, locals_, monkeypatch):
        assert gathered.shape == (size, 3)
        assert torch.equal(gathered[:, 0], rows_B.double())
        assert torch.equal(gathered[:, 1], -rows_B.double())
        assert torch.equal(gathered[:, 2], (rows_B % 7).double())


def test_odd_batches_need_padding_at_all() -> None:
    counts = [len(layout.canonical(layout.rank)) for layout in layouts(61, 4)]
    assert len(set(counts)) > 1 and sum(counts) == 61


def test_gather_keeps_types_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = layouts(13, 4)
    ids = [torch.from_numpy(layout.canonical(layout.rank)) for layout in found]
    gathered = gather_all(found, ids, monkeypatch)
    assert gathered[0].dtype == torch.int64 and gathered[0].tolist() == list(range(13))

    locals_ = [one.double()[:, None].requires_grad_() for one in ids]
    weight = torch.arange(1.0, 14.0, dtype=torch.float64)[:, None]
    (gather_all(found, locals_, monkeypatch)[0] * weight).sum().backward()
    for one, local in zip(ids, locals_):
        assert local.grad is not None
        assert torch.equal(local.grad, weight[one]), "a row got another row's gradient"


def test_one_worker_gathers_itself() -> None:
    layout = layouts(13, 1)[0]
    local = torch.rand(13, 2)
    assert layout.gather(local) is local


@pytest.mark.parametrize("workers", [3, 5, 16])
def test_workers_that_do_not_divide_the_shards(workers: int) -> None:
    rows, lengths = batch(64)
    with pytest.raises(ConfigError, match=f"8 shards cannot be dealt to {workers} workers"):
        build_batch_layout(rows, lengths, 8, rank=0, workers=workers)


def test_fewer_rows_than_shards() -> None:
    rows, lengths = batch(7)
    with pytest.raises(DataError, match="7 rows cannot be cut into 8 shards"):
        build_batch_layout(rows, lengths, 8, rank=0, workers=1)


def test_this_process_is_one_worker() -> None:
    rows, lengths = batch(16)
    layout = build_batch_layout(rows, lengths, 8)
    assert (layout.rank, len(layout.shards_by_rank)) == (0, 1)
