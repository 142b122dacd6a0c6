"""Parts of a token store that are made in any order and on any machine, and are those that one process makes in turn.

A part has from those before it how many sentences ``data.limit`` leaves to it, the number of its first row in a
message, and whether sentences without tokens have begun a document. It is made by the likely values, and again in the
few cases in which these turn out to be others.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from clusterns_ray.data.corpus import ReadCounts, read_files
from clusterns_ray.data.document import Boundary
from clusterns_ray.data.pieces import Part, is_continued, numbered
from clusterns_ray.data.prepare import TokenJob
from clusterns_ray.data.token_store import TokenPart, write_part
from clusterns_ray.errors import ClusterNSError, ConfigError, DataError
from clusterns_ray.io.files import checksum_holds, json_text, sha256, with_checksum, write_atomic

if TYPE_CHECKING:
    from pyarrow import NativeFile


class PartFiles:
    """The files of the parts of a job, and for each part a record of it: in a directory, or in an object store."""

    def __init__(self, job: TokenJob) -> None:
        self.job = job
        self.records = job.cache / f"{job.name}.parts"
        self.files = job.cache / job.name if job.cache.store else self.records / "store"
        # Parts of another version are not mixed with ours.
        names = ("clusterns-ray", "tokenizers", "transformers", "pyarrow")
        request = {
            "fingerprint": job.fingerprint,
            "versions": {name: importlib.metadata.version(name) for name in names},
            "parts": [[(file.source.path, file.begin, file.end) for file in part] for part in job.parts],
            "rows": [job.settings.rows_per_shard, job.settings.rows_per_batch],
        }
        self._request = hashlib.sha256(json.dumps(request).encode()).hexdigest()

    def make_likely(self, number: int) -> TokenPart | None:
        """Make a part by the likely values, unless that was done before; None if the corpus cannot be used.

        Raises:
            ClusterNSError: this machine does not see the corpus.
            OSError, StorageError: the files cannot be written.
        """
        try:
            return self.make(number, Boundary.NONE, self.job.data.limit)
        except (ConfigError, DataError):  # named by who knows the number of the row
            return None

    def begin(self, number: int, command: str) -> int:
        """Take note that a part is begun for a command, and return how often it was begun for it."""
        name = f"begun-{number:05d}-{command}"
        times = 1 + int(self.records.read(name) or 0)
        self._write(name, str(times))
        return times

    def make(self, number: int, pending: int, limit: int | None, first: int | None = None) -> TokenPart:
        """Make a part, unless that was done before.

        Args:
            pending: the :class:`Boundary` that has begun before its first sentence.
            limit: sentences, at most.
            first: the number of its first row where it goes on in a file, if that is known yet.
        """
        start = [int(pending), limit]
        part = self._find(number, start)
        if part is None:
            data, counts = self.job.data, ReadCounts()
            pieces = numbered(self.job.parts[number], first)
            _check_seen(pieces)
            rows = read_files(pieces, data.text_column, data.document_column, counts)
            with self._new_files() as folder:
                part = write_part(itertools.islice(rows, limit), counts, self.job.settings, folder, number, pending)
            record = {"request": self._request, "start": start, "part": asdict(part)}
            self._write(_record(number), json_text(with_checksum(record), indent=1))
        return part

    def in_order(self, likely: Iterable[TokenPart | None]) -> Iterator[TokenPart]:
        """The parts as they have to be, from those that were made by the likely values.

        Raises:
            ConfigError, DataError: the corpus cannot be used; the first error, as it is met in reading all of it.
        """
        pending, left, first = Boundary.NONE, self.job.data.limit, 1
        for number, (pieces, part) in enumerate(zip(self.job.parts, likely, strict=False)):
            if not is_continued(pieces):
                pending, first = Boundary.NONE, 1
            # One that reaches the limit has read on behind it, if it was made with more left.
            if part is None or pending or (left is not None and part.counts["kept"] >= left):
                part = self.make(number, pending, left, first)
            yield part
            pending, first = part.pending, first + part.counts["rows"]
            if left is not None:
                left -= part.counts["kept"]
                if left == 0:
                    return

    def lacks(self, part: TokenPart) -> bool:
        """Whether a file of a part is not on the disk of this machine, where it should be, as it was written."""
        return self.files.store is None and not all(
            (path := self.files.local / file["name"]).is_file() and path.stat().st_size == file["size"]
            for file in part.files
        )

    def open(self, name: str) -> NativeFile:
        """Open a file of a part for reading."""
        import pyarrow as pa

        store = self.files.store
        if store is None:
            return pa.memory_map(str(self.files.local / name))
        return store.filesystem.open_input_file(f"{store.root}/{name}")

    def _find(self, number: int, start: list[int | None]) -> TokenPart | None:
        try:
            record = json.loads(self.records.read(_record(number)) or "")
            ours = checksum_holds(record) and (record["request"], record["start"]) == (self._request, start)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return None
        part = TokenPart(**record["part"]) if ours else None
        if part is None or self.lacks(part):
            return None
        local = None if self.files.store else self.files.local  # an object is whole or not there
        whole = local is None or all(sha256(local / file["name"]) == file["sha256"] for file in part.files)
        return part if whole else None

    @contextmanager
    def _new_files(self) -> Iterator[Path]:
        """A directory whose files are brought to where they belong."""
        store, local = self.files.store, self.files.local
        if store is None:
            local.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=None if store else local.parent) as folder:
            yield Path(folder)
            for path in sorted(Path(folder).iterdir()):
                store.upload(path, path.name) if store else os.replace(path, local / path.name)

    def _write(self, name: str, text: str) -> None:
        """Write a text where it belongs, without a copy on this machine of what is in an object store."""
        store = self.records.store
        store.write(name, text.encode()) if store else write_atomic(self.records.local / name, text)


def _record(number: int) -> str:
    return f"part-{number:05d}.json"


def _check_seen(part: Part) -> None:
    """Refuse files that are not here what they were where they were listed."""
    for file in part:
        if file.filesystem is None or file.source.size is None:
            continue
        info = file.filesystem.get_file_info(file.location)
        if (info.size, info.mtime_ns) != (file.source.size, file.source.mtime_ns):
            seen = "no such file" if info.size is None else f"another version, of {info.size:,} bytes,"
            raise ClusterNSError(
                f"{file.source.path}: it had {file.source.size:,} bytes when it was listed, but the machine "
                f"{platform.node()} has {seen} there.",
                "Leave the corpus as it is while it is read; where several machines read it, put it on a disk that all "
                "of them see, or in an object store.",
            )
