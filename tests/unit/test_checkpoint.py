from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from clusterns_ray.config import make_config
from clusterns_ray.errors import CheckpointError, StorageError
from clusterns_ray.io.files import write_atomic
from clusterns_ray.training import checkpoint
from clusterns_ray.training.checkpoint import (
    Checkpointer,
    copy_to_host,
    list_checkpoints,
    load_newest,
    remove_leftovers,
    replace_directory,
    save_checkpoint,
    verify,
)
from clusterns_ray.training.context import RunContext

STAMP = "0123456789abcdef"


def state(value: float) -> dict[str, Any]:
    return {
        "encoder": {"weight": torch.full((3, 2), value)},
        "clustering": {"centroids_KD": None},
        "progress": {"step": int(value), "best_score": None, "seconds": 1.5},
    }


def save(directory: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(directory, step, state(step), STAMP, keep)


def load(directory: Path, stamp: str = STAMP) -> tuple[int | None, list[str]]:
    """The step that is found, after the state is compared with it, and the warnings."""
    warnings: list[str] = []
    found = load_newest(directory, stamp, warnings.append)
    if found is None:
        return None, warnings
    step, values = found
    assert torch.equal(values["encoder"]["weight"], torch.full((3, 2), float(step)))
    assert values["progress"] == {"step": step, "best_score": None, "seconds": 1.5}
    assert values["clustering"] == {"centroids_KD": None}
    return step, warnings


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 40)
    assert path == tmp_path / "checkpoints" / "step-00000040"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.pt"]
    assert verify(path, STAMP) == 40
    assert load(tmp_path / "checkpoints") == (40, [])
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["fingerprint"]) == (40, STAMP)
    assert manifest["files"]["state.pt"]["bytes"] == (path / "state.pt").stat().st_size


def test_nothing_there_is_nothing_found(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == (None, [])
    assert load(tmp_path) == (None, [])


def test_the_newest_is_found_and_keep_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 9, 10, 100):
        save(tmp_path, step, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100", "step-00000010", "step-00000009"]
    assert load(tmp_path) == (100, [])
    save(tmp_path, 101, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000101"]
    assert hidden(tmp_path) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save_checkpoint(tmp_path, 4, state(4) | {"more": 1}, STAMP, keep=2)
    found = load_newest(tmp_path, STAMP, pytest.fail)
    assert found is not None and found[1]["more"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


# ---- crashes ------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Not an Exception, as a kill is none."""


POINTS = {
    "torch.save": (torch, "save"),
    "hash": (checkpoint, "file_sha256"),
    "manifest": (Path, "write_text"),
    "flush": (checkpoint, "flush"),
    "rename": (Path, "rename"),
}


@pytest.mark.parametrize("half", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_a_crash_while_writing_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, half: bool
) -> None:
    """Not even the clean-up runs, as in a power cut."""
    save(tmp_path, 1)
    owner, name = POINTS[point]
    original = getattr(owner, name)
    met = []

    def crash(*args: Any, **kwargs: Any) -> Any:
        met.append(name)
        if half:
            original(*args, **kwargs)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Crash):
            save(tmp_path, 2)
    assert met == [name]
    finished = point == "rename" and half
    assert load(tmp_path) == (2 if finished else 1, [])
    save(tmp_path, 3)
    assert load(tmp_path) == (3, [])
    assert hidden(tmp_path) == [], "what the crash left was not cleared away"


def test_a_crash_is_cleared_away_at_once_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise Crash

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(Crash):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    original_flush, original_rename = checkpoint.flush, Path.rename

    def flush(path: Path) -> None:
        events.append(f"flush {path.name}")
        original_flush(path)

    def rename(self: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return original_rename(self, target)

    monkeypatch.setattr(checkpoint, "flush", flush)
    monkeypatch.setattr(Path, "rename", rename)
    save(tmp_path / "checkpoints", 1)
    renamed = events.index("rename to step-00000001")
    assert {"flush state.pt", "flush manifest.json"} <= set(events[:renamed])
    assert events[renamed + 1 :] == ["flush checkpoints"]


# ---- written by a thread ------------------------------------------------------------------------------------------


class Weights:
    """A part of a run that is one tensor."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "numbers": [1, 2]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor = state["tensor"]


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as thread:
        yield thread


def checkpointer(directory: Path, weights: Weights, thread: ThreadPoolExecutor) -> Checkpointer:
    config = make_config({"encoder": {"name": "x"}, "data": {"corpus": "x"}, "runtime": {"keep": 2}})
    return Checkpointer(RunContext(config, directory, None, directory), {"weights": weights}, thread)


def test_a_thread_writes_what_was_there_and_one_checkpoint_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread: ThreadPoolExecutor
) -> None:
    weights, may_write, original = Weights(), Event(), checkpoint.save_checkpoint
    writer = checkpointer(tmp_path, weights, thread)
    begun: list[int] = []

    def slow(directory: Path, step: int, *rest: Any) -> Path:
        begun.append(step)
        assert may_write.wait(30)
        return original(directory, step, *rest)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    writer.save(1)
    weights.tensor += 7
    assert list_checkpoints(writer.directory) == [], "save has waited for the disk"
    with ThreadPoolExecutor(1) as other:
        second = other.submit(writer.save, 2)
        assert not second.done() and begun == [1]
        may_write.set()
        second.result(30)
    writer.finish()
    assert begun == [1, 2] and [path.name[-1] for path in list_checkpoints(writer.directory)] == ["2", "1"]
    for step, value in ((1, 0.0), (2, 7.0)):
        state = writer.of_step(step)
        assert state is not None and torch.equal(state["weights"]["tensor"], torch.full((3,), value))


@pytest.mark.parametrize("then", ["save", "finish"])
def test_a_failed_write_is_raised_at_the_next_opportunity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread: ThreadPoolExecutor, then: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "state.pt"))

    writer = checkpointer(tmp_path, Weights(), thread)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", full)
        writer.save(1)
        with pytest.raises(StorageError, match=r"state\.pt' cannot be read or written: the disk is full"):
            writer.save(2) if then == "save" else writer.finish()
    assert list_checkpoints(writer.directory) == []
    writer.finish()
    writer.save(3)
    writer.finish()
    assert [path.name for path in list_checkpoints(writer.directory)] == ["step-00000003"], "it was raised once"


def test_tensors_that_are_one_stay_one_in_a_copy() -> None:
    tied = torch.arange(6.0).view(2, 3)
    copied = copy_to_host({"a": {"weight": tied}, "b": [tied, tied.T, None, 3], "bits": tied.view(torch.int32)})
    assert copied["a"]["weight"] is copied["b"][0] and copied["b"][0] is not tied
    assert copied["b"][1].shape == (3, 2) and copied["b"][1].stride() == tied.T.stride()
    assert copied["bits"].dtype == torch.int32 and torch.equal(copied["b"][1], tied.T) and copied["b"][2:] == [None, 3]


# ---- damage -------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "bit": lambda path: flip(path / "state.pt"),
    "truncated": lambda path: os.truncate(path / "state.pt", 100),
    "empty": lambda path: os.truncate(path / "state.pt", 0),
    "no state": lambda path: (path / "state.pt").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "manifest cut": lambda path: os.truncate(path / "manifest.json", 30),
    "manifest empty": lambda path: (path / "manifest.json").write_text("{}"),
    "manifest no object": lambda path: (path / "manifest.json").write_text("[]"),
    "manifest not text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"),
    "nothing": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2))
    step, warnings = load(tmp_path)
    assert step == 1
    assert len(warnings) == 1 and "step-00000002 is passed over" in warnings[0]


def test_any_flipped_bit_of_a_manifest_is_harmless(tmp_path: Path) -> None:
    """Either it does not matter, or the one before is taken; never a traceback, nor a wrong step."""
    save(tmp_path, 1)
    manifest = save(tmp_path, 2) / "manifest.json"
    whole = manifest.read_bytes()
    assert len(whole) > 100
    passed_over = 0
    for place in range(len(whole)):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        step, warnings = load(tmp_path)
        assert (step, len(warnings)) in ((2, 0), (1, 1)), f"byte {place}"
        passed_over += step == 1
    assert passed_over > 60, "the hash alone has more bytes"


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.pt")
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints") as caught:
        load_newest(tmp_path, STAMP, warnings.append)
    assert len(warnings) == 2 and all("missing or damaged" in text for text in warnings)
    assert str(tmp_path) in str(caught.value) and "Remove that directory" in str(caught.value)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"another configuration .{STAMP}, not other"):
        verify(path, "other")
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match="None of the 1"):
        load_newest(tmp_path, "other", warnings.append)
    assert "belongs to another configuration" in warnings[0]
    assert load(tmp_path) == (1, [])


def test_a_state_that_runs_code_is_not_loaded(tmp_path: Path) -> None:
    """Even if its manifest is right: what is stored is tensors and plain values."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("exit 1",)

    save(tmp_path, 1)
    save_checkpoint(tmp_path, 2, {"evil": Evil()}, STAMP, 2)
    step, warnings = load(tmp_path)
    assert step == 1 and len(warnings) == 1 and "step-00000002" in warnings[0]


# ---- directories and files ----------------------------------------------------------------------------------------


def write(text: str) -> Any:
    def write_into(path: Path) -> None:
        (path / "sub").mkdir()
        (path / "sub" / "file").write_text(text)

    return write_into


def test_replace_directory(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "model"
    replace_directory(final, write("one"))
    (final / "stale").write_text("x")
    replace_directory(final, write("two"))
    assert (final / "sub" / "file").read_text() == "two" and not (final / "stale").exists()
    assert [path.name for path in final.parent.iterdir()] == ["model"]


def test_a_failed_write_leaves_the_old_directory(tmp_path: Path) -> None:
    final = tmp_path / "model"
    replace_directory(final, write("one"))

    def fail(path: Path) -> None:
        (path / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_directory(final, fail)
    assert (final / "sub" / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_killed_between_its_two_renames_the_old_one_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "model"
    replace_directory(final, write("one"))
    original, count = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        count.append(target)
        if len(count) == 2:
            raise Crash
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Crash):
            replace_directory(final, write("two"))
    assert not final.exists(), "the crash was not between the renames"
    assert len(hidden(tmp_path)) == 2
    remove_leftovers(final)
    assert (final / "sub" / "file").read_text() == "one"
    assert hidden(tmp_path) == []


def test_the_same_is_healed_by_the_next_write(tmp_path: Path) -> None:
    final = tmp_path / "model"
    replace_directory(final, write("one"))
    final.rename(tmp_path / ".model.old-12345678")
    (tmp_path / ".model.new-12345678").mkdir()
    (tmp_path / ".other.new-12345678").mkdir()
    (tmp_path / ".models.old-12345678").mkdir()
    replace_directory(final, write("two"))
    assert (final / "sub" / "file").read_text() == "two"
    assert hidden(tmp_path) == [".models.old-12345678", ".other.new-12345678"], "what is another's is left alone"


def test_a_checkpoint_killed_between_its_two_renames_falls_back(tmp_path: Path) -> None:
    save(tmp_path, 6)
    save(tmp_path, 7).rename(tmp_path / ".step-00000007.old-12345678")
    assert load(tmp_path) == (6, [])
    save(tmp_path, 7)
    assert load(tmp_path) == (7, []) and hidden(tmp_path) == []


def test_leftovers_of_other_steps_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.new-12345678").mkdir(parents=True)
    (tmp_path / ".step-00000003.new-12345678" / "state.pt").write_text("half")
    assert load(tmp_path) == (None, [])
    save(tmp_path, 4)
    assert hidden(tmp_path) == []


def test_write_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_atomic(path, "one")
    write_atomic(path, "zwei – ü")
    assert path.read_text(encoding="utf-8") == "zwei – ü"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]

    def crash(*_: Any) -> None:
        raise Crash

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(Crash):
        write_atomic(path, "three")
    assert path.read_text(encoding="utf-8") == "zwei – ü"
