from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from training_runs import Killed, Lab, assert_same_tensors, kill_at, weights

from clusterns_ray.errors import DataError
from clusterns_ray.training import checkpoint, loop
from clusterns_ray.training.checkpoint import Checkpointer
from clusterns_ray.training.parts import TrainingParts
from clusterns_ray.training.prefetch import Prefetcher


@pytest.mark.parametrize("ahead", [True, False])
def test_every_batch_is_read_once_and_the_next_one_by_the_thread(ahead: bool) -> None:
    read: list[tuple[int, bool]] = []

    def batch(step: int) -> int:
        read.append((step, threading.current_thread() is threading.main_thread()))
        if step == 5:
            raise DataError("row 7 is gone")
        return 10 * step

    with ThreadPoolExecutor(1) as thread:
        batches = Prefetcher(batch, 7, thread if ahead else None)
        assert [batches(step) for step in (3, 4)] == [30, 40]
        with pytest.raises(DataError, match="row 7 is gone"):
            batches(5)
        last = Prefetcher(batch, 7, thread if ahead else None)
        assert last(6) == 60, "nothing is read beyond the last step"
    assert read == [(3, True), (4, not ahead), (5, not ahead), (6, True)]


@pytest.mark.slow
def test_a_run_with_threads_is_the_same_to_the_bit(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches read ahead and checkpoints written behind, as on a GPU; also where it is killed and resumed."""
    config = lab.config(loss={"mlm_weight": 0.1}, data={"positives": "crop"})
    lab.run(tmp_path / "plain", config)
    by: set[str] = set()

    def seen(name: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            by.add(f"{name} {threading.current_thread().name}")
            return function(*arguments)

        return run

    with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
        monkeypatch.setattr(loop, "Prefetcher", lambda read, steps, _: Prefetcher(read, steps, reader))
        monkeypatch.setattr(loop, "Checkpointer", lambda context, parts, _: Checkpointer(context, parts, writer))
        monkeypatch.setattr(TrainingParts, "batch", seen("batch", TrainingParts.batch))
        monkeypatch.setattr(checkpoint, "save_checkpoint", seen("save", checkpoint.save_checkpoint))
        with pytest.raises(Killed):
            lab.run(tmp_path / "threads", config, kill_at(4))
        lab.run(tmp_path / "threads", config)
    assert by == {"batch MainThread", "batch reader_0", "save writer_0"}
    for step in (2, 4, 6):
        assert_same_tensors(weights(tmp_path / "plain", step), weights(tmp_path / "threads", step))
