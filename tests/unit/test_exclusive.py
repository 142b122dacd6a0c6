"""One writer among machines: leases in an object store, here in files and in a real S3 server."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clusterns_ray.errors import StorageError
from clusterns_ray.io import lease as exclusive
from clusterns_ray.io.lease import Claim, Held, Lease, is_dead, leased, process_identity
from clusterns_ray.io.object_store import Store
from clusterns_ray.io.uploader import Uploader

ELSEWHERE = {"host": "far", "pid": 7, "process": "another-boot pid:[1] 7 99", "since": "2026-01-01T00:00:00+00:00"}
"""Who writes on another machine."""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of files. Its objects are replaced in one step, as an object store does, so that none is read half."""

    def write(self: Store, name: str, data: bytes) -> None:
        (path := Path(self.root) / name).parent.mkdir(parents=True, exist_ok=True)
        (partial := tmp_path / uuid.uuid4().hex).write_bytes(data)
        partial.replace(path)

    monkeypatch.setattr(Store, "write", write)
    return Store(f"file://{tmp_path}/run")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times a fortieth as long."""
    monkeypatch.setattr(exclusive, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(exclusive, "STALE_S", 0.5)
    monkeypatch.setattr(exclusive, "MARGIN_S", 0.12)
    monkeypatch.setattr(exclusive.random, "uniform", lambda low, high: random.random() * 0.05)


def claim_elsewhere(store: Store, name: str = "far.json", age_s: float = 0.0) -> Path:
    """A claim as another machine's process has left it."""
    (store / ".lease").write(name, json.dumps(ELSEWHERE).encode())
    path = Path(f"/{store.root.lstrip('/')}/.lease/{name}")
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def claims(store: Store) -> list[str]:
    return (store / ".lease").names()


def test_the_second_is_refused_and_told_who_is_the_first(files: Store, quick: None) -> None:
    notes: list[str] = []
    with leased(files, True):
        second = Lease(files)
        with pytest.raises(Held) as error:
            second.acquire(0.2, notes.append)
        assert len(claims(files)) == 1, "the one that was refused leaves nothing behind"
    assert f"process {os.getpid()} on " in str(error.value) and "since 20" in str(error.value)
    assert "last heartbeat 0 s ago" in str(error.value) and "runtime.name" in str(error.value)
    assert len(notes) == 1 and "Waiting for that to end" in notes[0]
    assert claims(files) == []
    began = time.monotonic()
    with leased(files, True) as lease:
        assert lease is not None
        lease.check()
    assert time.monotonic() - began < 0.3, "what was let go of is free at once"


def test_without_a_store_or_not_wanted_there_is_no_lease(files: Store) -> None:
    with leased(None, True) as nothing, leased(files, False) as not_wanted:
        assert nothing is None and not_wanted is None
    assert claims(files) == []


def test_a_claim_without_a_heartbeat_is_taken_over(files: Store) -> None:
    claim_elsewhere(files, age_s=exclusive.STALE_S + 5)
    began = time.monotonic()
    with leased(files, True, wait_s=0):
        assert time.monotonic() - began < 1 and len(claims(files)) == 1 and "far.json" not in claims(files)


def test_a_machine_that_was_lost_just_now_is_waited_for_until_it_is_stale(files: Store, quick: None) -> None:
    claim_elsewhere(files)
    began = time.monotonic()
    with leased(files, True, wait_s=0.0):  # without a heartbeat there is no reason to refuse
        assert exclusive.STALE_S - 0.1 < time.monotonic() - began < 3 * exclusive.STALE_S


def test_one_that_lives_is_never_taken_over(files: Store, quick: None) -> None:
    path, end = claim_elsewhere(files), threading.Event()

    def live() -> None:
        while not end.wait(0.05):
            path.touch()

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(Held, match="process 7 on far since 2026-01-01") as error:
        Lease(files).acquire(3 * exclusive.STALE_S)
    end.set()
    thread.join()
    assert error.value.holder.who == ELSEWHERE and path.exists()


HOLD = """
import sys, time
from clusterns_ray.io.object_store import Store
from clusterns_ray.io.lease import Lease
Lease(Store(sys.argv[1])).acquire(0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(files: Store) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, files.url], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(Held, match=f"process {holder.pid} on "):
        Lease(files).acquire(exclusive.HEARTBEAT_S)
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table of processes
    began = time.monotonic()
    with leased(files, True, wait_s=0):
        assert time.monotonic() - began < 2 < exclusive.STALE_S
    holder.wait()


def test_who_is_known_to_be_dead() -> None:
    mine = process_identity(os.getpid())
    assert mine is not None
    boot, space, pid, start = mine.split()
    assert pid == str(os.getpid()) and not is_dead({"process": mine})
    assert is_dead({"process": f"{boot} {space} {pid} {int(start) + 1}"}), "another process had this number"
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert is_dead({"process": f"{boot} {space} {gone.pid} 1"})
    assert not is_dead({"process": f"{boot[:-1]}- {space} {gone.pid} 1"}), "of another machine nothing is known"
    assert not is_dead({"process": f"{boot} pid:[1] {gone.pid} 1"}), "nor of another container"
    for damaged in ({}, {"process": None}, {"process": "x"}, {"process": f"{boot} {space} x 1"}):
        assert not is_dead(damaged)


def test_of_many_that_claim_at_once_at_most_one_holds(files: Store, quick: None) -> None:
    inside, most, held, errors = 0, 0, 0, []
    lock = threading.Lock()

    def work() -> None:
        nonlocal inside, most, held
        for _ in range(4):
            try:
                with leased(files, True, wait_s=60):
                    with lock:
                        inside += 1
                        most, held = max(most, inside), held + 1
                    time.sleep(0.01)
                    with lock:
                        inside -= 1
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and (most, held) == (1, 20) and claims(files) == []


def silent(store: Store) -> Lease:
    """A lease whose process was stopped just after it was had."""
    lease = Lease(store)
    lease._thread = threading.Thread()
    lease.acquire(0)
    return lease


def test_a_holder_that_was_cut_off_notices_that_another_took_over(files: Store, quick: None) -> None:
    first = silent(files)
    first.check()
    with leased(files, True, wait_s=0):
        with pytest.raises(StorageError, match=f"wrote no heartbeat .* now written by process {os.getpid()} on"):
            first.check()
        with pytest.raises(StorageError, match="wrote no heartbeat"):
            first.check()
        assert len(claims(files)) == 1
    first.release()


def test_a_holder_that_was_cut_off_goes_on_where_nobody_took_over(files: Store, quick: None) -> None:
    lease = silent(files)
    time.sleep(2 * exclusive.STALE_S)
    lease.check()
    assert [claim.name for claim in Lease(files)._others()] == [lease.name], "and others see that"
    lease.release()


def test_no_contact_with_the_store_is_no_right_to_write(
    files: Store, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = silent(files)
    time.sleep(exclusive.STALE_S)

    def fail(self: Store, name: str, data: bytes) -> None:
        raise StorageError("no network")

    monkeypatch.setattr(Store, "write", fail)
    with pytest.raises(StorageError, match="no network"):
        lease.check()


def test_a_claim_that_is_damaged_still_counts(files: Store, quick: None) -> None:
    claim_elsewhere(files).write_bytes(b"{")
    assert [claim.who for claim in Lease(files)._others()] == [{}]
    assert str(Claim("x", 0.0, 3.2, {})) == (
        "process ? on an unknown machine since an unknown time (last heartbeat 3 s ago)"
    )


def test_on_an_s3_server(store: Store, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "STALE_S", 20.0)  # its times are whole seconds
    with leased(store, True) as lease:
        assert lease is not None and len(claims(store)) == 1
        with pytest.raises(Held, match=f"process {os.getpid()} on "):
            Lease(store).acquire(1.5)
        lease.check()
    assert claims(store) == []


# ---- a run's copies -------------------------------------------------------------------------------------------------


def test_a_run_that_lost_its_lease_copies_nothing_more(files: Store, quick: None, tmp_path: Path) -> None:
    run_dir, warnings = tmp_path / "here", []
    run_dir.mkdir()
    uploader = Uploader(files, run_dir)
    (run_dir / "a.txt").write_text("first")
    with uploader.writer_lease(True):
        uploader.begin(warnings.append)
        uploader.push("a.txt")
        uploader.finish(5)
        assert uploader._lease is not None
        uploader._lease.lost = "it is now written by another"
        (run_dir / "a.txt").write_text("second")
        with pytest.raises(StorageError, match="now written by another"):
            uploader.push("a.txt")
    assert files.read("a.txt") == b"first" and claims(files) == []


def test_what_waits_is_not_copied_once_the_lease_is_lost(files: Store, quick: None, tmp_path: Path) -> None:
    run_dir, warnings = tmp_path / "here", []
    run_dir.mkdir()
    (run_dir / "a.txt").write_text("late")
    uploader, began, gate = Uploader(files, run_dir), threading.Event(), threading.Event()

    def wait() -> None:
        began.set()
        gate.wait(5)

    with uploader.writer_lease(True):
        uploader.begin(warnings.append)
        uploader._add("slow", wait)
        uploader.push("a.txt")
        assert began.wait(5)
        assert uploader._lease is not None
        uploader._lease.lost = "it is now written by another"
        gate.set()
        with pytest.raises(StorageError, match="now written by another"):
            uploader.finish(5)
    assert files.read("a.txt") is None and len(warnings) == 1


def test_a_copy_under_way_ends_before_others_may_write(files: Store, quick: None, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    uploader, order = Uploader(files, tmp_path / "here"), []

    def slow() -> None:
        time.sleep(0.5)
        order.append("copied")

    original: Callable[..., Any] = Lease.release

    def release(self: Lease) -> None:
        order.append("released")
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lease, "release", release)
        with uploader.writer_lease(True):
            uploader.begin(lambda text: None)
            uploader._add("slow", slow)
            time.sleep(0.1)
    assert order == ["copied", "released"]


def test_other_workers_and_other_places_need_no_lease(files: Store, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with Uploader(files, tmp_path / "here").writer_lease(False):
        assert claims(files) == []
