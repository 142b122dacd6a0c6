"""Collectives over real processes: what every rank gets."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import RanksFailed, run_ranks

from clusterns_ray import distributed
from clusterns_ray.clustering import bank
from clusterns_ray.config import make_config
from clusterns_ray.errors import CheckpointError, ClusterNSError
from clusterns_ray.training.batch_layout import BatchLayout, build_batch_layout
from clusterns_ray.training.checkpoint import Checkpointer, save_checkpoint
from clusterns_ray.training.context import RunContext

pytestmark = pytest.mark.slow

ROWS, WIDTH = 3, 2
every_size = pytest.mark.parametrize("ranks", [2, 4])


def rows_of(rank: int, count: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def gather_rows() -> dict[str, Any]:
    rank, ranks = distributed.rank(), distributed.world_size()
    rows = rows_of(rank)
    numbers_NP = torch.arange((1 + rank % 2) * 3 * ranks).view(1 + rank % 2, -1) + 100 * rank
    return {
        "gathered": distributed.all_gather_rows(rows),
        "int64": distributed.all_gather_rows(torch.tensor([[2**40 + rank, rank]])),
        "columns": distributed.all_gather_rows(rows.T),  # not contiguous
        "slices": distributed.exchange_slices(numbers_NP, [1 + other % 2 for other in range(ranks)]),
    }


@every_size
def test_rows_and_slices_come_in_order_of_rank(ranks: int):
    leaves = [rows_of(rank) for rank in range(ranks)]
    for rank, result in enumerate(run_ranks(gather_rows, ranks)):
        assert torch.equal(result["gathered"], torch.cat(leaves))
        assert result["int64"].tolist() == [[2**40 + other, other] for other in range(ranks)]
        assert torch.equal(result["columns"], torch.cat([leaf.T for leaf in leaves]))
        for other, part in enumerate(result["slices"]):
            whole = torch.arange((1 + other % 2) * 3 * ranks).view(1 + other % 2, -1) + 100 * other
            assert torch.equal(part, whole[:, 3 * rank : 3 * rank + 3])


def odd_layout(rank: int | None, ranks: int) -> BatchLayout:
    """13 rows in 4 shards: ranks whose shares differ by a row."""
    lengths = np.array([9, 3, 7, 5, 8, 3, 6, 4, 9, 5, 7, 2, 6])
    return build_batch_layout(100 + np.arange(13), lengths, 4, rank=rank, workers=ranks)


def gather_odd_batch() -> dict[str, Any]:
    layout = odd_layout(None, distributed.world_size())
    return {"rank": layout.rank, "gathered": layout.gather(rows_of(0, 13)[layout.canonical(layout.rank)])}


@every_size
def test_an_odd_batch_is_gathered_in_canonical_order(ranks: int):
    shares = [len(odd_layout(rank, ranks).canonical(rank)) for rank in range(ranks)]
    assert len(set(shares)) > 1, "the shares are to differ"

    results = run_ranks(gather_odd_batch, ranks)

    for rank, result in enumerate(results):
        assert result["rank"] == rank and torch.equal(result["gathered"], rows_of(0, 13))


def reduce_and_broadcast() -> dict[str, Any]:
    rank = distributed.rank()
    total = torch.tensor([1.5, 10.0 * rank])
    returned = distributed.all_reduce_sum(total)
    first = distributed.broadcast(torch.tensor([rank + 7]))
    value = distributed.broadcast_object({"rank": rank, "text": "é" * (rank + 1), "none": None})
    distributed.barrier()
    return {
        "place": (rank, distributed.world_size(), distributed.grouped()),
        "total": total,
        "in_place": returned is total,
        "first": first,
        "value": value,
    }


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sums_and_broadcasts_are_the_same_everywhere(ranks: int):
    for rank, result in enumerate(run_ranks(reduce_and_broadcast, ranks)):
        assert result["place"] == (rank, ranks, ranks > 1)
        assert result["total"].tolist() == [1.5 * ranks, 10.0 * sum(range(ranks))]
        assert result["in_place"]
        assert result["first"].tolist() == [7]
        assert result["value"] == {"rank": 0, "text": "é", "none": None}


def parameters_of_a_wrapped_module() -> tuple[bool, torch.Tensor | None]:
    layer = torch.nn.Linear(WIDTH, 1, bias=False).double()
    torch.nn.init.ones_(layer.weight)
    wrapped = distributed.data_parallel(layer)
    wrapped(rows_of(distributed.rank())).sum().backward()
    return wrapped is layer, layer.weight.grad


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_data_parallel_averages_gradients_and_leaves_a_lone_worker_alone(ranks: int):
    expected = torch.stack([rows_of(rank).sum(dim=0) for rank in range(ranks)]).mean(dim=0)
    for same_module, gradient in run_ranks(parameters_of_a_wrapped_module, ranks):
        assert same_module == (ranks == 1)
        torch.testing.assert_close(gradient, expected[None], rtol=1e-12, atol=1e-12)


def newest_of(directories: list[Path]) -> str:
    """What a worker whose run is in a directory of its own says of its newest checkpoint."""
    config = make_config({"encoder": {"name": "x"}, "data": {"corpus": "x"}})
    context = RunContext(config, Path(), None, directories[distributed.rank()])
    try:
        state = Checkpointer(context, {}).newest(lambda text: None)
    except (CheckpointError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"step {state['step']}" if state else "none"


def test_workers_that_do_not_see_the_same_checkpoints_all_raise(tmp_path: Path):
    fingerprint = make_config({"encoder": {"name": "x"}, "data": {"corpus": "x"}}).fingerprint()
    runs = {name: tmp_path / name for name in ("first", "second", "damaged", "empty")}
    for name, step in (("first", 4), ("second", 8), ("damaged", 8)):
        save_checkpoint(runs[name] / "checkpoints", step, {"step": step}, fingerprint, keep=1)
    (runs["damaged"] / "checkpoints" / "step-00000008" / "state.pt").write_bytes(b"")

    assert run_ranks(newest_of, 2, [runs["first"], runs["first"]]) == ["step 4", "step 4"]
    for others, reason in (
        ("second", "RuntimeError: The newest checkpoint in .* is of step 8 on worker 1 and of step 4 on worker 0"),
        ("empty", "RuntimeError: The newest checkpoint in .* is of step 0 on worker 1 and of step 4 on worker 0"),
        ("damaged", "CheckpointError: None of the 1 checkpoints in .*damaged/checkpoints' can be used"),
    ):
        said = run_ranks(newest_of, 2, [runs["first"], runs[others]])
        assert all(re.match(reason, each) for each in said), said


# ---- the helper itself ------------------------------------------------------------------------------------------


def one_rank_is_late(seconds: float) -> int:
    if distributed.rank() == 1:
        time.sleep(seconds)
    distributed.barrier()
    return os.getpid()


def one_rank_fails(how: str) -> None:
    if distributed.rank() == 1:
        if how == "raise":
            raise RuntimeError("no luck")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_deadline_ends_ranks_that_hang():
    began = time.monotonic()
    with pytest.raises(RanksFailed, match="not done after 2 s"):
        run_ranks(one_rank_is_late, 2, 60.0, deadline_s=2)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(("how", "reason"), [("raise", "RuntimeError: no luck"), ("kill", r"\{1: -9\}")])
def test_a_rank_that_fails_ends_the_others(how: str, reason: str):
    began = time.monotonic()
    with pytest.raises(RanksFailed, match=reason):
        run_ranks(one_rank_fails, 2, how)
    assert time.monotonic() - began < 15


def allocate_a_bank(directory: Path) -> str:
    """On the last rank there is no room."""
    made = bank.Bank(np.arange(10), 4, 2, directory, torch.device("cpu"))
    if distributed.rank() == distributed.world_size() - 1:
        bank.mapped_zeros = refuse
    try:
        made.allocate()
    except ClusterNSError as error:
        return str(error)
    return "allocated"


def refuse(directory: Path, *shape: int) -> torch.Tensor:
    raise ClusterNSError("no room here")


def test_a_bank_that_one_rank_has_no_room_for_fails_on_all(tmp_path: Path):
    first, last = run_ranks(allocate_a_bank, 2, tmp_path)
    assert last == "no room here"
    assert "that of another has no room for it" in first and "clustering.bank_rows" in first
