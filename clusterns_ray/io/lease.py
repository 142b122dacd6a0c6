"""One writer per run: a lock among the processes of a machine, and a lease among machines that share an object store.

A lease is an object of the writer's own, ``.lease/ID.json``, which a thread writes anew every few seconds. Whoever
writes such a claim and then, listing, sees no other live one, holds the place: object stores list what was written
before, so of two that claim at once at least one sees the other and withdraws. That needs no conditional write, which
pyarrow's file systems do not have. Ages are differences of the store's own times, so clocks of machines do not matter.

What it does not give: an upload that had begun when its writer was cut off for :data:`STALE_S` may still end after
another has taken over. No later one begins.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clusterns_ray.errors import ClusterNSError, StorageError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.files import file_lock, storage_error
from clusterns_ray.io.object_store import Store

HEARTBEAT_S = 4.0
"""Seconds between two writes of the claim."""
STALE_S = 20.0
"""A claim without a heartbeat for this long is taken over."""
MARGIN_S = 5.0
"""A holder stops writing this long before others may take it for gone."""


class Held(ClusterNSError):
    """Another process writes there, and is alive."""

    def __init__(self, address: str, holder: Claim) -> None:
        self.holder = holder
        super().__init__(
            f"{address!r} is being written by {holder}. Let it finish, end it, or choose another runtime.name."
        )


@contextmanager
def exclusive(run_dir: Path, wanted: bool, wait_s: float = 30.0) -> Iterator[None]:
    """Hold ``run_dir`` for one writer, if ``wanted``. The system lets go of it when the process dies, however it dies.

    A worker of a run that was just killed may live a few seconds longer, so this waits ``wait_s`` before it refuses.
    """
    if not wanted:
        yield
        return
    refusal = ClusterNSError(
        f"{str(run_dir)!r} is being written by another process (waited {wait_s:.0f} s). Let it finish, end it, or "
        "choose another runtime.name."
    )
    with ExitStack() as held:
        try:
            held.enter_context(file_lock(run_dir / ".lock", refusal, wait_s))
        except OSError as error:
            remedy = "Then give the same command again, or choose another runtime.name."
            raise storage_error(error, run_dir, remedy) or error from error
        yield


@dataclass(frozen=True)
class Claim:
    """Another process's claim, as it is listed in the store."""

    name: str
    written: float
    """by the store's clock, seconds since 1970"""
    age: float
    """seconds since its last heartbeat"""
    who: dict[str, Any]

    def __str__(self) -> str:
        who = self.who
        return (
            f"process {who.get('pid', '?')} on {who.get('host', 'an unknown machine')} since "
            f"{who.get('since', 'an unknown time')} (last heartbeat {max(self.age, 0):.0f} s ago)"
        )


class Lease:
    """The right to write to a prefix of an object store. Not for use again once released."""

    def __init__(self, store: Store) -> None:
        self.claims, self.address = store / ".lease", store.address
        self.name = f"{uuid.uuid4().hex}.json"
        self.lost: str | None = None
        self._lock, self._end = threading.Lock(), threading.Event()
        self._confirmed = -float("inf")
        self._content = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process": process_identity(os.getpid()),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        ).encode()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def acquire(self, wait_s: float, note: OnNote = lambda text: None) -> None:
        """Wait until no other process holds it. One that is dead is waited for at most :data:`STALE_S`, and not at
        all where it ran on this machine.

        Args:
            note: called once, with who is being waited for.

        Raises:
            Held: another process holds it and is alive, after ``wait_s``.
            StorageError: the store cannot be read or written.
        """
        began, seen = time.monotonic(), {}
        while True:
            others = self._claim()
            if not others:
                self._thread.start()
                return
            waited = time.monotonic() - began
            if not seen:
                note(f"{self.address} is, or was, written by {others[0]}. Waiting for that to end.")
            alive = any(seen.setdefault(other.name, other.written) != other.written for other in others)
            if waited >= wait_s and (alive or waited > wait_s + 2 * STALE_S):
                raise Held(self.address, others[0])
            time.sleep(random.uniform(0.5, 1.5))  # so that two that saw one another do not do so for ever

    def check(self) -> None:
        """Go on writing only after this.

        Raises:
            StorageError: the lease is lost, or there was no contact with the store for too long to know.
        """
        if time.monotonic() - self._confirmed > STALE_S - MARGIN_S:
            self._renew()
        if self.lost:
            raise StorageError(self.lost)

    def release(self) -> None:
        """Let others write."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(STALE_S)
        if not self._thread.is_alive():  # else it may still write the claim, which then grows stale
            with suppress(StorageError):
                self.claims.delete(self.name)

    def _claim(self) -> list[Claim]:
        """Claim it; the live claims of others, before which this one withdraws."""
        began = time.monotonic()
        self.claims.write(self.name, self._content)
        others = self._others()
        if others:
            self.claims.delete(self.name)
        else:
            self._confirmed = began
        return others

    def _others(self) -> list[Claim]:
        """Live claims but one's own. Those of processes that are gone are removed."""
        times = self.claims.times()
        now = times.get(self.name, max(times.values(), default=0.0))
        live = []
        for name, written in times.items():
            raw = self.claims.read(name) if name != self.name else None
            if raw is None:
                continue
            claim = Claim(name, written, now - written, _read(raw))
            if claim.age > STALE_S or is_dead(claim.who):
                self.claims.delete(name)
            else:
                live.append(claim)
        return live

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            with suppress(StorageError):  # tried again; `check` raises before the next write
                self._renew()

    def _renew(self) -> None:
        """Write a heartbeat; after a long silence, also check whether another process has taken over."""
        with self._lock:
            if self.lost or self._end.is_set():
                return
            began = time.monotonic()
            late = began - self._confirmed > STALE_S - MARGIN_S
            self.claims.write(self.name, self._content)
            # One that only tries to claim withdraws as soon as it sees this heartbeat.
            if late and self._others() and not self._end.wait(2.0) and (others := self._others()):
                self.lost = (
                    f"This process wrote no heartbeat to {self.address} for {began - self._confirmed:.0f} s, and it is "
                    f"now written by {others[0]}. What is there already is kept; that process goes on with it."
                )
                self.claims.delete(self.name)
                return
            self._confirmed = began


@contextmanager
def leased(
    store: Store | None, wanted: bool, wait_s: float = 30.0, note: OnNote = lambda text: None
) -> Iterator[Lease | None]:
    """Hold a prefix among all machines, if ``wanted`` and there is one; see :meth:`Lease.acquire`."""
    if store is None or not wanted:
        yield None
        return
    lease = Lease(store)
    lease.acquire(wait_s, note)
    try:
        yield lease
    finally:
        lease.release()


def claims(store: Store) -> list[Claim]:
    """Who holds a prefix, or tries to, newest first; nothing is changed. Ages are by this machine's clock."""
    folder, now = store / ".lease", time.time()
    contents = [(name, written, folder.read(name)) for name, written in folder.times().items()]
    every = [Claim(name, written, now - written, _read(raw)) for name, written, raw in contents if raw is not None]
    return sorted((claim for claim in every if not is_dead(claim.who)), key=lambda claim: claim.age)


def process_identity(pid: int) -> str | None:
    """What no other process on any machine has, ever: of the start of the system, the process' name space, its number
    and its own start. None where the system does not say, or there is no such process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        if state in "ZX":  # dead, and not yet collected by its parent
            return None
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {fields[18]}"
    except (OSError, IndexError):
        return None


def is_dead(who: dict[str, Any]) -> bool:
    """Whether a process is known to be gone: it was one of this machine, and is not there."""
    theirs, ours = str(who.get("process")).split(), (process_identity(os.getpid()) or "").split()
    if len(theirs) != 4 or theirs[:2] != ours[:2] or not theirs[2].isdecimal():
        return False
    return process_identity(int(theirs[2])) != " ".join(theirs)


def _read(raw: bytes) -> dict[str, Any]:
    """What a claim says; nothing of one that is damaged, which still counts."""
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
