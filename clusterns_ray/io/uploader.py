"""A run's files in an object store, copied there by a thread of worker 0 while training goes on.

What is pushed is set aside by hard links at once, so that the loop may replace or remove it; a thread copies it, in
the order given. So a checkpoint is there only once what was exported before it is there too, and a machine that dies
loses no more than the steps since the newest one.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clusterns_ray.errors import StorageError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.lease import Lease, leased
from clusterns_ray.io.object_store import Place, Store, download_lock, is_url

LAST_COPY_S = 60.0
"""How long the end waits for a copy that has begun, before others may write."""


class LocalFiles:
    """The files of a run on a file system that every machine sees, where there is nothing to copy."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def address(self, name: str) -> str:
        """Where a person finds a file or directory of the run."""
        return str((self.run_dir / name).resolve())

    @contextmanager
    def writer_lease(self, wanted: bool, note: OnNote = lambda text: None) -> Iterator[None]:
        """Be the one writer among all machines, if ``wanted``; around everything else.

        Args:
            note: called with who is being waited for.

        Raises:
            Held: another machine writes this run, and goes on while this one waits.
        """
        yield

    def pull(self, *, files: bool) -> None:
        """Make the local checkpoints those of the store, before anything reads them; on every worker.

        Args:
            files: the run's small files as well; for worker 0, which alone goes on writing them.
        """

    def begin(self, warn: OnNote) -> None:
        """Start to copy; on worker 0 alone."""

    def push(self, name: str) -> None:
        """Copy a file or directory of the run, soon. One of the same name that still waits is left out.

        Raises:
            StorageError: another machine has taken the run over.
        """

    def keep_newest(self, directory: str, keep: int) -> None:
        """Once what was pushed is there: remove all but the newest directories, by name."""

    def finish(self, timeout_s: float) -> None:
        """Wait until everything is there.

        Raises:
            StorageError: it is not, in time.
        """

    def stop(self) -> None:
        """End the thread, leaving what still waits."""


class Uploader(LocalFiles):
    """Copies a run's files to an object store; ``run_dir`` is the local copy, ``store`` the run's prefix."""

    def __init__(self, store: Store, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.store = store
        self.aside = run_dir / ".uploads"
        self.warn: OnNote = lambda text: None
        self.failed: dict[str, str] = {}
        self._waiting: dict[str, tuple[Callable[[], None], Path | None]] = {}
        self._busy = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._lease: Lease | None = None

    def address(self, name: str) -> str:
        return f"{self.store.address}/{name}"

    @contextmanager
    def writer_lease(self, wanted: bool, note: OnNote = lambda text: None) -> Iterator[None]:
        with leased(self.store, wanted, note=note) as self._lease:
            try:
                yield
            finally:
                self.stop()
                with self._changed:
                    self._changed.wait_for(lambda: not self._busy, LAST_COPY_S)

    def pull(self, *, files: bool) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with download_lock(self.run_dir.parent / f".{self.run_dir.name}.pull"):
            if files:
                Place(self.run_dir, self.store).fetch_files()
                self._pull_model()
            newest = self._pull_newest_checkpoint()
            # The store is what all machines share: a local checkpoint that never got there is not gone on from.
            for path in (self.run_dir / "checkpoints").glob("step-*"):
                if path.name != newest:
                    shutil.rmtree(path, ignore_errors=True)

    def _pull_model(self) -> None:
        """The exported model is the store's; one that is damaged there is not there."""
        try:
            there = self.store.pull_directory("model", self.run_dir / "model")
        except StorageError as error:
            self.warn(f"The exported model is passed over: {error}")
            self.store.delete_directory("model")
            there = False
        if not there:
            shutil.rmtree(self.run_dir / "model", ignore_errors=True)

    def _pull_newest_checkpoint(self) -> str | None:
        checkpoints = self.store / "checkpoints"
        for name in reversed(checkpoints.directories()):
            try:
                if checkpoints.pull_directory(name, self.run_dir / "checkpoints" / name):
                    return name
            except StorageError as error:
                self.warn(f"Checkpoint {name} is passed over: {error}")
        return None

    # ---- copying ------------------------------------------------------------------------------------------------

    def begin(self, warn: OnNote) -> None:
        self.warn = warn
        shutil.rmtree(self.aside, ignore_errors=True)
        self.aside.mkdir(parents=True)
        self._thread = threading.Thread(target=self._copy, name="uploader", daemon=True)
        self._thread.start()

    def push(self, name: str) -> None:
        if self._lease is not None and self._lease.lost:
            raise StorageError(self._lease.lost)
        path = self.run_dir / name
        aside = self.aside / uuid.uuid4().hex
        # metrics.jsonl and the like grow in place; whole files are replaced, never rewritten, so a link is enough.
        shutil.copytree(path, aside, copy_function=os.link) if path.is_dir() else shutil.copy2(path, aside)

        def work() -> None:
            if aside.is_dir():
                self.store.push_directory(aside, name)
            else:
                self.store.upload(aside, name)

        self._add("checkpoint" if name.startswith("checkpoints/") else name, work, aside)

    def keep_newest(self, directory: str, keep: int) -> None:
        def work() -> None:
            prefix = self.store / directory
            for name in prefix.directories()[:-keep]:
                prefix.delete_directory(name)

        self._add(f"old {directory}", work)

    def finish(self, timeout_s: float) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)
            left = list(self._waiting)
        if not done:
            raise StorageError(
                f"{self.store.address}: after {timeout_s:.0f} s these are still not there: {', '.join(left) or 'one'}. "
                f"They are whole in {str(self.run_dir)!r}; the same command copies them again."
            )
        if self.failed:
            raise StorageError(
                "; ".join(f"{name} could not be copied ({reason})" for name, reason in self.failed.items())
                + f". It is whole in {str(self.run_dir)!r}."
            )

    def stop(self) -> None:
        with self._changed:
            self._waiting.clear()
            self._thread = None
            self._changed.notify_all()

    def _add(self, kind: str, work: Callable[[], None], aside: Path | None = None) -> None:
        with self._changed:
            _, older = self._waiting.pop(kind, (None, None))  # to the end of the queue, behind what was pushed since
            self._waiting[kind] = work, aside
            self._changed.notify_all()
        _remove(older)

    def _copy(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._thread is not me)
                if self._thread is not me:
                    return
                kind = next(iter(self._waiting))
                work, aside = self._waiting.pop(kind)
                self._busy = True
            try:
                if self._lease is not None:
                    self._lease.check()
                work()
                self.failed.pop(kind, None)
            except (StorageError, OSError) as error:
                self.failed[kind] = str(error)
                self.warn(f"Not copied to {self.store.address}: {error}")
            finally:
                _remove(aside)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


def _remove(aside: Path | None) -> None:
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)


def uploader_for(url: str | None, run_dir: Path) -> LocalFiles:
    """What copies the files of a run to ``url``, or :class:`LocalFiles` where that is not in an object store."""
    return Uploader(Store(url), run_dir) if url and is_url(url) else LocalFiles(run_dir)
