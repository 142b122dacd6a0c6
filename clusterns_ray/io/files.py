"""Files that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clusterns_ray.errors import REASONS, ClusterNSError, ConfigError, DiskError, StorageError
from clusterns_ray.io.paths import check_outlasts_job

PROBE_BYTES = 1 << 20
"""What a test of a disk writes: a full one still takes an empty file."""

DIRECTORY_MANIFEST = "clusterns_manifest.json"
"""The file of an exported model that holds the checksums of the others."""

UNCHECKED = {DIRECTORY_MANIFEST, "README.md"}
"""Files without a checksum: people write in a model card."""


@contextmanager
def replacing(path: Path, folder: Path | None = None) -> Iterator[Path]:
    """A path to write to, which takes the place of the file ``path`` in one step, flushed to disk first.

    Args:
        folder: where it is meanwhile, on the same file system; beside ``path`` if not given.
    """
    temporary = (folder or path.parent) / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Replace a UTF-8 text file in one step, flushed to disk first."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def file_lock(lock: Path, refusal: ClusterNSError, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock among the processes of this machine; the system lets go of it when the process ends, however it ends.

    Args:
        lock: a file, which is made with its directory where it is not there.
        refusal: raised where another process still holds the lock after ``wait_s`` seconds.
    """
    deadline = time.monotonic() + wait_s
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise refusal from None
                    time.sleep(0.1)
            # The one before may have removed the file between our opening and our locking.
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                yield
                return


def is_locked(lock: Path) -> bool:
    """Whether a process of this machine holds a :func:`file_lock`."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError) as error:
        return isinstance(error, BlockingIOError)
    return False


def json_text(value: Any, indent: int | None = 2) -> str:
    """JSON that any reader takes, ending in a newline: NaN and infinities, which JSON does not have, become null."""
    return json.dumps(null_for_nan(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step (see :func:`json_text`)."""
    write_atomic(path, json_text(value))


def with_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """The same object with ``checksum``, by which :func:`checksum_holds` knows a file that is as it was written."""
    return {**value, "checksum": _checksum(value)}


def checksum_holds(value: dict[str, Any]) -> bool:
    """Whether an object read from JSON is what :func:`with_checksum` made."""
    return value.get("checksum") == _checksum({key: item for key, item in value.items() if key != "checksum"})


def _checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(json_text(dict(sorted(value.items())), indent=None).encode()).hexdigest()[:16]


def null_for_nan(value: Any) -> Any:
    """A JSON value with None in place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: null_for_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_for_nan(item) for item in value]
    return value


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that could not be written in the end, before the work that it is for.

    Raises:
        ConfigError: its directory is not there, does not take files or does not last, or it is a directory itself.
    """
    check_outlasts_job(option, path)
    reason = "it is a directory" if path.is_dir() else None
    if reason is None:
        probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            write_probe(probe)
        except OSError as error:
            reason = error.strerror
    if reason:
        raise ConfigError(f"{option} {str(path)!r} cannot be written: {reason}. Choose another file.")


def follow_umask(directory: Path) -> None:
    """Give the weights in a directory the mode of any new file there: safetensors writes them for their owner alone."""
    probe = directory / f".{uuid.uuid4().hex[:8]}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)


def write_probe(path: Path) -> None:
    """Write :data:`PROBE_BYTES` to a new file, flush them to disk, and remove it.

    Raises:
        OSError: the disk is full or read-only, or the directory is missing or may not be written to.
    """
    try:
        with path.open("xb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def storage_error(error: BaseException, path: Path, remedy: str) -> StorageError | None:
    """A failed write as one sentence with its reason and remedy; None where ``error`` is of another kind.

    Args:
        path: what was written, or its directory, where the error does not name a file.
        remedy: what to do once the disk takes files again; a whole sentence.

    Returns:
        A DiskError where it is the disk that fails (see :func:`disk_fault`), a StorageError for any other reason.
    """
    cause = _system_cause(error)
    if cause is None:
        return None
    reason, cure = cause
    named = getattr(error, "filename", None)
    kind = StorageError if disk_fault(error) is None else DiskError
    return kind(f"{str(named or path)!r} cannot be read or written: {reason}. {cure} {remedy}")


def _system_cause(error: BaseException) -> tuple[str, str] | None:
    """The operating system's reason, also where torch or safetensors has wrapped it into an error of its own, and what
    to do about it."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return None
    number = None
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or str(error) or type(error).__name__
    elif code := re.search(r"os error (\d+)", str(error)):
        number = int(code[1])
        reason = os.strerror(number)
    elif isinstance(error, RuntimeError) and "inline_container" in str(error):
        reason = "the disk took only a part of it"
    else:
        return None
    return REASONS.get(number or 0, (reason, "Check that disk and the rights on it."))


def remove_partial_files(directory: Path, names: Iterable[str]) -> None:
    """Remove what a killed :func:`write_atomic` of one of these files left beside it.

    To be called by the one process that may write them.
    """
    for name in names:
        for path in directory.glob(f".{name}.????????"):
            if re.fullmatch(r"[0-9a-f]{8}", path.suffix[1:]) and path.is_file():
                path.unlink(missing_ok=True)


def write_manifest(directory: Path, **facts: Any) -> None:
    """Write the SHA-256 of every file of a directory, and ``facts``, to :data:`DIRECTORY_MANIFEST` in it."""
    files = {
        path.relative_to(directory).as_posix(): sha256(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in UNCHECKED
    }
    write_json(directory / DIRECTORY_MANIFEST, {**facts, "files": files})


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """What :func:`write_manifest` wrote; None where there is none.

    Raises:
        StorageError: it is damaged.
    """
    path = directory / DIRECTORY_MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(digest, str) for digest in manifest["files"].values()):
            raise ValueError("a checksum is not text")
        return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{str(path)!r} is damaged ({type(error).__name__}: {error}).") from None


def changed_file(directory: Path, manifest: dict[str, Any]) -> str | None:
    """What is wrong with the first file that is not as the manifest says; None where all are."""
    for name, digest in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is not what was written"
    return None


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG)
DISK_WORDS = (
    *(os.strerror(number).lower() for number in DISK_ERRORS),
    "disk is full",  # sqlite
    "disk i/o error",
    "readonly database",
    "pytorchstreamwriter failed writing",  # torch.save, which says no more of a full disk
    "inline_container.cc",
)


def disk_fault(error: BaseException | None) -> str | None:
    """Why the disk does not take what is written to it, where that caused ``error``; None for other errors.

    Libraries wrap the system's error, and some keep its words alone, so the whole chain of causes is read.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = f": {str(error.filename)!r}" if error.filename else ""
            return f"{os.strerror(error.errno)}{where}"
        text = " ".join(str(error).split())
        if any(words in text.lower() for words in DISK_WORDS):
            return f"{type(error).__name__}: {text[:200]}"
        error = error.__cause__ or error.__context__
    return None


def check_unchanged(directory: Path) -> None:
    """Refuse a directory whose files are not those of its manifest; one without a manifest is not looked at.

    Raises:
        StorageError: it names the file.
    """
    remedy = f"Restore the directory from a copy. If it was changed on purpose, remove {DIRECTORY_MANIFEST} from it."
    try:
        manifest = read_manifest(directory)
        wrong = manifest and changed_file(directory, manifest)
    except StorageError as error:
        raise StorageError(f"{error} {remedy}") from None
    if wrong:
        raise StorageError(f"{str(directory)!r} was changed or damaged after it was exported: {wrong}. {remedy}")


def flush(path: Path) -> None:
    """Bring a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. The file is read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
