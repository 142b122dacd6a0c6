"""One writer per run directory."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusterns_ray.errors import ClusterNSError


@contextmanager
def exclusive(run_dir: Path, wanted: bool, wait_s: float = 30.0) -> Iterator[None]:
    """Hold ``run_dir`` for one writer, if ``wanted``. The system lets go of it when the process dies, however it dies.

    A worker of a run that was just killed may live a few seconds longer, so this waits ``wait_s`` before it refuses.
    """
    if not wanted:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as lock:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ClusterNSError(
                        f"{str(run_dir)!r} is being written by another process (waited {wait_s:.0f} s). Let it finish, "
                        "end it, or choose another runtime.name."
                    ) from None
                time.sleep(0.2)
        yield
