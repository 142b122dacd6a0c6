"""The file of an Optuna study: opened and checked, with its faults in words, and copied to and from an object store."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import optuna
from sqlalchemy.exc import SQLAlchemyError

from clusterns_ray.errors import ClusterNSError, ConfigError, DiskError
from clusterns_ray.io.files import disk_fault
from clusterns_ray.io.object_store import Place, reading_place
from clusterns_ray.tuning.study import Study

optuna.logging.set_verbosity(optuna.logging.WARNING)

FILES = {"sqlite": "study.db", "journal": "study.journal"}
LOCK_WAIT_S = 60
"""Seconds for which the study's one writer waits for a lock of another process."""
LOOK_WAIT_S = 10
"""The same for a reader."""
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


def readable_directory(home: Place) -> Path:
    """Where a study that another process may be writing is read: its directory, or a copy of what its store holds."""
    if home.store is None:
        return home.local
    here = reading_place(home.store.url)
    here.fetch_files(leave_out=(".html", ".parquet"))
    return here.local


def _copy_database(path: Path, copy: Path) -> None:
    copy.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, timeout=LOCK_WAIT_S)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def _copy_journal(path: Path, copy: Path) -> None:
    """A journal is only ever longer; its last line may be half there."""
    content = path.read_bytes() if path.is_file() else b""
    copy.write_bytes(content[: content.rfind(b"\n") + 1])


def read_optuna_study(directory: Path, name: str | None = None) -> optuna.Study:
    """The Optuna study of a directory, to look at.

    Args:
        name: of the study; None takes the only one that the file holds.

    Raises:
        ConfigError: there is none.
        ClusterNSError: its file is damaged, locked, or cannot be read.
    """
    for kind, file in FILES.items():
        path = directory / file
        if not path.is_file():
            continue
        with readable_file_errors(path):
            storage = open_storage(directory, kind, writing=False)
            names = optuna.get_all_study_names(storage)
            if name is not None and names and name not in names:
                raise ConfigError(f"{str(path)!r} holds the study {names[0]!r}, not {name!r}. Correct `name`.")
            if names:
                study = optuna.load_study(study_name=name or names[0], storage=storage)
                study.get_trials(deepcopy=False)
                return study
    raise ConfigError(f"{str(directory)!r} holds no study yet. `clusterns tune` of the study file begins it.")


def open_storage(directory: Path, kind: str, writing: bool) -> optuna.storages.BaseStorage:
    """The storage in ``directory``; its one writer also repairs what a kill has left half-written.

    Raises:
        ClusterNSError: the file is damaged.
    """
    path = directory / FILES[kind]
    if kind == "sqlite":
        if writing and not path.exists():
            _create_database(path)
        _check_database(path)
        return _database(path, LOCK_WAIT_S if writing else LOOK_WAIT_S)
    if writing:
        _repair_journal(path)
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return optuna.storages.JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))


@contextmanager
def readable_file_errors(path: Path) -> Iterator[None]:
    """One line with the reason and the remedy in place of any error of opening or reading a study's file.

    Raises:
        DiskError: the disk does not take what is written.
        ClusterNSError: the file is locked, damaged, or cannot be opened.
    """
    try:
        yield
    except ClusterNSError:
        raise
    except Exception as error:
        raise file_error(path, error) from error


DISK_REMEDY = "Free space there, or make it writable; then the same command goes on, and no trial is lost."


@contextmanager
def readable_study_errors(study: Study) -> Iterator[None]:
    """One line, with the remedy, wherever in a sweep the disk or the study's file fails.

    Raises:
        DiskError: The disk does not take what is written; no trial is lost by it.
        ClusterNSError: The study's file is locked or damaged.
    """
    try:
        yield
    except ClusterNSError:
        raise
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError) as error:
        raise file_error(study.directory / FILES[study.config.storage], error) from error
    except Exception as error:
        reason = disk_fault(error)
        if reason is None:
            raise
        raise DiskError(
            f"The study's files in {str(study.directory)!r} could not be written ({reason}). {DISK_REMEDY}"
        ) from error


def file_error(path: Path, error: Exception) -> ClusterNSError:
    """An error of SQLite, SQLAlchemy or Optuna about a study's file, as a message with the remedy."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    texts = [" ".join(str(each).split("\n")[0].split()) or type(each).__name__ for each in chain]
    said = " ".join(texts).lower()
    # SQLAlchemy's own text begins with the class of the error below it.
    reason = texts[0].rpartition("(sqlite3.")[2].partition(") ")[2] or texts[0]
    if "locked" in said or "busy" in said:
        return ClusterNSError(
            f"The study's file {str(path)!r} is locked by another process ({reason}). End whatever has it open, such "
            "as a database browser; then the same command goes on."
        )
    full = disk_fault(error)
    if full is not None:
        return DiskError(f"The study's file {str(path)!r} could not be written ({full}). {DISK_REMEDY}")
    if "unable to open" in said or any(isinstance(each, PermissionError) for each in chain):
        return ClusterNSError(
            f"The study's file {str(path)!r} cannot be opened ({reason}). Make it and its directory readable and "
            "writable for this user."
        )
    return ClusterNSError(damaged(path, reason[:200]))


def damaged(path: Path, reason: str) -> str:
    """The message on a damaged study file."""
    return (
        f"The study's file {str(path)!r} is damaged ({reason}). Restore it from a copy; or move it away, and "
        "`clusterns tune` begins the study anew."
    )


def _check_database(path: Path) -> None:
    """Refuse a database that is damaged, before anything is read of it or written to it.

    Raises:
        ClusterNSError: it is.
        sqlite3.Error: it cannot be read.
    """
    if path.stat().st_size == 0:
        raise ClusterNSError(damaged(path, "it is empty"))
    with closing(sqlite3.connect(path, timeout=LOOK_WAIT_S)) as connection:
        (report,) = connection.execute("pragma quick_check(1)").fetchone()
        if report != "ok":
            raise ClusterNSError(damaged(path, " ".join(str(report).split())))
        connection.execute("select count(*) from trials").fetchone()


def _database(path: Path, wait_s: float) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": wait_s}})


def _create_database(path: Path) -> None:
    """Make the tables beside their place, as whoever opens a database without them would make them, too."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    storage = _database(temporary, LOCK_WAIT_S)
    storage.remove_session()
    storage.engine.dispose()
    temporary.replace(path)


def _repair_journal(path: Path) -> None:
    """Drop a last line that was cut off, and locks of a process that is gone."""
    for lock in path.parent.glob(f"{path.name}.lock*"):
        with suppress(OSError):
            lock.unlink()
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content and any((path.parent / "trials").glob("*")):
            raise ClusterNSError(damaged(path, "it is empty"))
        if content and not content.endswith(b"\n"):
            last = content.rfind(b"\n") + 1
            if not content[last:].startswith(b"{"):
                raise ClusterNSError(damaged(path, "its last line is not one that Optuna began to write"))
            file.truncate(last)
