"""Object stores: files, and directories that are whole or not there.

A directory is its files under a prefix and, written last, ``PREFIX.manifest.json`` with their sizes and SHA-256.
Without that object it is not there; what does not match it is not taken. A :class:`Place` is a directory of a run or a
study, wherever it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from clusterns_ray.errors import ConfigError, DamagedError, StorageError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.files import file_lock, json_text, replacing, sha256, write_atomic
from clusterns_ray.io.paths import check_path

MANIFEST = ".manifest.json"
ATTEMPTS = 4
"""Tries of one transfer; the waits between them are 1, 2 and 4 s."""
REPLACED = 3
"""How often a directory is read anew that was replaced while it was copied."""
DOWNLOAD_WAIT_S = 1800
"""How long a process waits for another one of this machine that downloads the same."""

_URL = re.compile(r"([a-z][a-z0-9+]+)://")


def is_url(path: str | Path) -> bool:
    """Whether a path is in an object store (``s3://``, ``gs://``, ``abfs://``) rather than on a file system."""
    return bool(_URL.match(str(path)))


def local_copy(storage_path: str, local_path: str | None = None) -> Path:
    """The directory on this machine for what is, or is copied to, ``storage_path``; absolute."""
    if not is_url(storage_path):
        return Path(storage_path).expanduser().resolve()
    base = os.environ.get("CLUSTERNS_LOCAL_PATH") or local_path
    directory = Path(check_path("CLUSTERNS_LOCAL_PATH", base, ())).expanduser() if base else own_temporary_directory()
    return directory.resolve() / hashlib.sha256(storage_path.encode()).hexdigest()[:16]


def own_temporary_directory() -> Path:
    """A directory of this user alone, under the one for temporary files, where others may make names too.

    Raises:
        ConfigError: somebody else made it, or it is a link.
    """
    path = Path(tempfile.gettempdir()) / f"clusterns-{os.getuid()}"
    try:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
    except OSError as error:
        raise ConfigError(
            f"The folder for temporary files, {str(path)!r}, cannot be made: {error.strerror}. Set the environment "
            "variable CLUSTERNS_LOCAL_PATH to a directory of yours."
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(
            f"{str(path)!r} is a link, a file, or another user's, so copies in it would not be safe. Remove it, or set "
            "the environment variable CLUSTERNS_LOCAL_PATH to a directory of yours."
        )
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


def split_url(url: str) -> tuple[str, str]:
    """The URL of what holds ``url``, and the last part of its path; empty where that is the bucket itself."""
    address, mark, options = url.partition("?")
    holder, _, name = address.rstrip("/").rpartition("/")
    return (holder + mark + options, name) if holder.count("/") > 1 else (url, "")


class Store:
    """A prefix of an object store.

    Credentials and endpoint come from where pyarrow's file systems find them: environment variables such as
    AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL, or the machine's role.
    """

    def __init__(self, url: str, attempts: int = ATTEMPTS) -> None:
        from pyarrow.fs import FileSystem

        self.url, self.attempts = url.rstrip("/"), attempts
        address, _, options = self.url.partition("?")
        self._options = f"?{options}" if options else ""
        self.address = address.rstrip("/")
        try:
            self.filesystem, root = FileSystem.from_uri(self.address + self._options)
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
            raise StorageError(
                f"{url!r} cannot be reached ({_words(error)}). Check the URL and the credentials."
            ) from None
        self.root = root.rstrip("/")

    def __truediv__(self, name: str) -> Store:
        """The prefix below this one."""
        other = object.__new__(Store)
        other.__dict__.update(self.__dict__)
        other.address, other.root = f"{self.address}/{name}", f"{self.root}/{name}"
        other.url = other.address + self._options
        return other

    # ---- single objects -----------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """The bytes of an object; None where there is none."""
        from pyarrow.fs import FileType

        def work() -> bytes | None:
            path = self._path(name)
            if self.filesystem.get_file_info(path).type != FileType.File:
                return None
            with self.filesystem.open_input_stream(path) as stream:
                return stream.read()

        return self._retried(f"reading {name}", work)

    def write(self, name: str, data: bytes) -> None:
        """Replace an object in one step."""

        def work() -> None:
            self._make_directory(name)
            with self.filesystem.open_output_stream(self._path(name)) as stream:
                stream.write(data)

        self._retried(f"writing {name}", work)

    def upload(self, local: Path, name: str) -> None:
        """Copy a local file."""

        def work() -> None:
            self._make_directory(name)
            with local.open("rb") as file, self.filesystem.open_output_stream(self._path(name)) as stream:
                shutil.copyfileobj(file, stream, 8 << 20)

        self._retried(f"uploading {name}", work)

    def download(self, name: str, local: Path) -> str:
        """Copy an object to a local file; the SHA-256 of what came."""

        def work() -> str:
            digest = hashlib.sha256()
            with self.filesystem.open_input_stream(self._path(name)) as stream, local.open("wb") as file:
                while block := stream.read(8 << 20):
                    digest.update(block)
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            return digest.hexdigest()

        return self._retried(f"downloading {name}", work)

    def names(self) -> list[str]:
        """Names of the objects below this prefix, sorted."""
        return sorted(self.times())

    def times(self) -> dict[str, float]:
        """When each object below this prefix was last written, in seconds since 1970 by the store's clock."""
        from pyarrow.fs import FileSelector, FileType

        def work() -> dict[str, float]:
            infos = self.filesystem.get_file_info(FileSelector(self.root, allow_not_found=True, recursive=True))
            return {
                info.path[len(self.root) + 1 :]: info.mtime_ns / 1e9 for info in infos if info.type == FileType.File
            }

        return self._retried("listing", work)

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""

        def work() -> None:
            with suppress(FileNotFoundError):
                self.filesystem.delete_file(self._path(name))

        self._retried(f"removing {name}", work)

    # ---- directories --------------------------------------------------------------------------------------------

    def push_directory(self, local: Path, name: str) -> None:
        """Copy a local directory; it is there once all of it is. An older one of that name is replaced."""
        files = {
            path.relative_to(local).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(local.rglob("*"))
            if path.is_file()
        }
        old = self.manifest(name)
        if old == files:
            return
        if old is not None:
            self.delete(name + MANIFEST)
        for file in files:
            self.upload(local / file, f"{name}/{file}")
        self.complete_directory(name, files)
        for file in set(old or ()) - set(files):
            self.delete(f"{name}/{file}")

    def complete_directory(self, name: str, files: dict[str, dict[str, Any]]) -> None:
        """Make a directory whole, of which all files are there."""
        self.write(name + MANIFEST, json_text(files, indent=1).encode())

    def manifest(self, name: str) -> dict[str, dict[str, Any]] | None:
        """File names, sizes and checksums of a directory; None where it is not (whole) there."""
        raw = self.read(name + MANIFEST)
        if raw is None:
            return None
        try:
            files = json.loads(raw)
            for file, entry in files.items():
                # What is downloaded may not leave its directory.
                if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                    raise ValueError(f"it names {file!r}")
                if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                    raise ValueError(f"it says {entry!r} of {file!r}")
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise StorageError(
                f"{self.address}/{name}{MANIFEST} is damaged ({error}).",
                "Restore it from a copy; or remove it, and the directory counts as not there.",
            ) from None
        return files

    def pull_directory(self, name: str, local: Path, note: OnNote = lambda text: None) -> bool:
        """Make ``local`` the directory ``name``, verified; what is there already and matches stays.

        Only one process of a machine downloads at a time; the others wait for it. A directory that is replaced
        meanwhile is read anew.

        Args:
            note: called when a download begins, and every few seconds with how far it is.

        Returns:
            Whether there is such a directory.

        Raises:
            StorageError: it is damaged, or cannot be read.
        """
        files = self.manifest(name)
        if files is None:
            return False
        local.parent.mkdir(parents=True, exist_ok=True)
        with download_lock(local.parent / f".{local.name}.lock"):
            if local.is_dir() and _matches(local, files):
                return True
            for _ in range(REPLACED):
                try:
                    self._pull(name, files, local, note)
                    return True
                except StorageError:
                    before, files = files, self.manifest(name)
                    if files == before:
                        raise
                    if files is None:
                        return False
        raise StorageError(f"{self.address}/{name} was replaced {REPLACED} times while it was copied. Try again later.")

    def _pull(self, name: str, files: dict[str, dict[str, Any]], local: Path, note: OnNote) -> None:
        size, done, noted = sum(entry["bytes"] for entry in files.values()), 0, time.monotonic()
        note(f"Copying {self.address}/{name} to this machine ({size / 1e6:,.1f} MB)")
        temporary = local.parent / f".{local.name}.{uuid.uuid4().hex[:8]}"
        try:
            for file, entry in files.items():
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                if self.download(f"{name}/{file}", temporary / file) != entry["sha256"]:
                    raise StorageError(
                        f"{self.address}/{name}/{file} is damaged: its checksum is not the one in its manifest.",
                        "Restore it from a copy.",
                    )
                done += entry["bytes"]
                if time.monotonic() - noted > 5:
                    noted = time.monotonic()
                    note(f"  {done / 1e6:,.1f} of {size / 1e6:,.1f} MB")
            if local.exists():
                shutil.rmtree(local)
            temporary.rename(local)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def delete_directory(self, name: str) -> None:
        """Remove all below a name, and first its manifest, if it has one, so that it is never half there."""
        self.delete(name + MANIFEST)
        below = self / name
        for file in below.names():
            below.delete(file)

    def directories(self) -> list[str]:
        """Names of the whole directories right below this prefix, sorted."""
        ends = [name.removesuffix(MANIFEST) for name in self.names() if name.endswith(MANIFEST)]
        return sorted(name for name in ends if "/" not in name)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _make_directory(self, name: str) -> None:
        # Object stores have none, and are spared the request; a file system under file:// has.
        if self.filesystem.type_name == "local":
            self.filesystem.create_dir(self._path(name).rpartition("/")[0], recursive=True)

    def _retried(self, what: str, work: Callable[[], Any]) -> Any:
        for attempt in range(self.attempts):
            try:
                return work()
            except OSError as error:
                if attempt + 1 == self.attempts:
                    times = f"{self.attempts} times" if self.attempts > 1 else "there"
                    raise StorageError(
                        f"{self.address}: {what} failed {times}: {_words(error)}. Check the network, the credentials "
                        "and the rights on that bucket."
                    ) from error
                time.sleep(2**attempt)


@dataclass(frozen=True)
class Place:
    """The files of a run or a study: in a directory, or in an object store with a copy of some on this machine."""

    local: Path
    store: Store | None = None
    """None where ``local`` is all there is."""

    def __truediv__(self, name: str) -> Place:
        return Place(self.local / name, self.store / name if self.store else None)

    @property
    def address(self) -> str:
        """Where a person finds it."""
        return self.store.address if self.store else str(self.local)

    @property
    def path(self) -> str:
        """The same as a ``storage_path``."""
        return self.store.url if self.store else str(self.local)

    def read(self, name: str) -> str | None:
        """A small text from where it belongs; None where there is none."""
        if self.store is not None:
            raw = self.store.read(name)
            return None if raw is None else _decoded(raw, f"{self.store.address}/{name}")
        path = self.local / name
        return _decoded(path.read_bytes(), str(path)) if path.is_file() else None

    def has(self, name: str) -> bool:
        """Whether there is a file of that name, readable or not."""
        return (self.local / name).is_file() if self.store is None else self.store.read(name) is not None

    def names(self) -> list[str]:
        """Names of the files right in it, without hidden ones, sorted."""
        names = [path.name for path in self.local.glob("*") if path.is_file()] if not self.store else self.store.names()
        return sorted(name for name in names if "/" not in name and not name.startswith("."))

    def write(self, name: str, text: str) -> None:
        """Write a small text to where it belongs, and to the copy."""
        (self.local / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.local / name, text)
        if self.store is not None:
            self.store.write(name, text.encode("utf-8"))

    def publish(self, name: str) -> None:
        """Copy a local file or directory to where it belongs."""
        if self.store is not None:
            path = self.local / name
            self.store.push_directory(path, name) if path.is_dir() else self.store.upload(path, name)

    def fetch(self, name: str) -> Path:
        """The directory ``name``, on this machine.

        Raises:
            StorageError: it is not there, or damaged.
        """
        path = self.local / name
        if self.store is not None and not self.store.pull_directory(name, path):
            raise StorageError(
                f"{self.store.address}/{name} is not there, or not whole.", "Restore it from a copy, or make it again."
            )
        return path

    def fetch_files(self, leave_out: tuple[str, ...] = ()) -> None:
        """Make the files right in it on this machine those of the store; directories stay as they are.

        Args:
            leave_out: endings of names that are not copied.
        """
        if self.store is None:
            return
        there = [name for name in self.names() if not name.endswith((MANIFEST, *leave_out))]
        self.local.mkdir(parents=True, exist_ok=True)
        for name in there:
            self.fetch_file(name)
        for path in self.local.iterdir():
            if path.is_file() and path.name not in there and not path.name.startswith("."):
                path.unlink()

    def fetch_file(self, name: str) -> None:
        """Copy one file that is there to this machine, in one step."""
        assert self.store is not None
        self.local.mkdir(parents=True, exist_ok=True)
        with replacing(self.local / name) as temporary:
            self.store.download(name, temporary)

    def remove_file(self, name: str) -> None:
        """Remove a small file, if it is there."""
        (self.local / name).unlink(missing_ok=True)
        if self.store is not None:
            self.store.delete(name)

    def remove(self, name: str) -> None:
        """Remove a directory, if it is there."""
        shutil.rmtree(self.local / name, ignore_errors=True)
        if self.store is not None:
            self.store.delete_directory(name)


def place(storage_path: str, name: str, local_path: str | None = None) -> Place:
    """``STORAGE_PATH/NAME``, of the machine that writes it."""
    store = Store(storage_path) / name if is_url(storage_path) else None
    return Place(local_copy(storage_path, local_path) / name, store)


def reading_place(url: str) -> Place:
    """What is at a URL, with a copy apart from the one that its writer may have on this machine."""
    return Place(local_copy(url) / "files", Store(url))


def read_text(where: str | Path) -> str | None:
    """A small text file, or object; None where there is none."""
    if not is_url(where):
        return _decoded(Path(where).read_bytes(), str(where)) if Path(where).is_file() else None
    holder, name = split_url(str(where))
    raw = Store(holder).read(name)
    return None if raw is None else _decoded(raw, str(where))


def write_text(where: str | Path, text: str) -> None:
    """Replace a small text file, or object, in one step."""
    if not is_url(where):
        write_atomic(Path(where), text)
        return
    holder, name = split_url(str(where))
    Store(holder).write(name, text.encode("utf-8"))


def download_lock(lock: Path) -> AbstractContextManager[None]:
    """Hold ``lock`` as the one process of this machine that downloads; others wait :data:`DOWNLOAD_WAIT_S`."""
    refusal = StorageError(
        f"{str(lock)!r} was held by another process for {DOWNLOAD_WAIT_S} s.", "End that process, or try again later."
    )
    return file_lock(lock, refusal, wait_s=DOWNLOAD_WAIT_S)


def _decoded(raw: bytes, address: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedError(
            f"{address!r} is damaged: it is not text in UTF-8 ({error.reason} at byte {error.start}). Restore it from "
            "a copy."
        ) from None


def _matches(local: Path, files: dict[str, dict[str, Any]]) -> bool:
    there = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    return there == set(files) and all(
        (local / file).stat().st_size == entry["bytes"] and sha256(local / file) == entry["sha256"]
        for file, entry in files.items()
    )


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
