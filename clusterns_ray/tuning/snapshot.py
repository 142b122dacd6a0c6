"""The file of an Optuna study, to an object store and back: consistent copies, taken while it is written."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from clusterns_ray.io.object_store import Place

FILES = {"sqlite": "study.db", "journal": "study.journal"}
LOCK_WAIT_S = 60
"""Seconds for which the one writer waits for a lock of another process."""
LOOK_WAIT_S = 10
"""The same for whoever only looks."""
SNAPSHOT_S = 30.0
"""Evaluations are in the store after this many seconds; the beginning and the end of a trial at once."""


def push_snapshot(home: Place, kind: str) -> None:
    """Copy the study as it is now to the store of ``home``, in one step; nothing where there is none."""
    if home.store is None:
        return
    path = home.local / FILES[kind]
    copy = path.with_name(f".{path.name}.snapshot")
    try:
        _copy_database(path, copy) if kind == "sqlite" else _copy_journal(path, copy)
        home.store.upload(copy, path.name)
    finally:
        copy.unlink(missing_ok=True)


def pull_snapshot(home: Place, kind: str) -> None:
    """Go on from what the store holds, as every machine would: what is here and never got there is given up."""
    if home.store is None:
        return
    for name in FILES.values():
        for path in home.local.glob(f"{name}*"):  # with journals and locks that belong to it
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if FILES[kind] in home.store.names():
        home.fetch_file(FILES[kind])


def _copy_database(path: Path, copy: Path) -> None:
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, timeout=LOCK_WAIT_S)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def _copy_journal(path: Path, copy: Path) -> None:
    """A journal is only ever longer; its last line may be half there."""
    content = path.read_bytes() if path.is_file() else b""
    copy.write_bytes(content[: content.rfind(b"\n") + 1])
