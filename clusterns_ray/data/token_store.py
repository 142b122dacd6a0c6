"""Tokenised corpora: written once as Arrow files, then memory-mapped and read by row number."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clusterns_ray.data.corpus import ReadCounts
from clusterns_ray.data.document import Boundary, Sentence
from clusterns_ray.errors import DataError
from clusterns_ray.io.files import flush, json_text, sha256
from clusterns_ray.models.tokenization import tokenize

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 2
MANIFEST = "manifest.json"

_FILE_NAME = re.compile(r"tokens-\d{5,}(-\d{5,})?\.arrow")
_TOKENIZE_ROWS = 4096  # the tokenizer's own records take far more memory than the tokens
_STALE_SECONDS = 24 * 3600
_PRIME, _BASE = (1 << 127) - 1, 0x5DEECE66D1B54A32D192ED03
_COMPARED_ROWS = 1_000_000
"""Sentences that are compared with one another to count repetitions: a bound on the memory that this takes."""


def _schema() -> pa.Schema:
    """The columns of every file: a row's token ids, its sentence, and the :class:`Boundary` that begins with it."""
    import pyarrow as pa

    return pa.schema([("input_ids", pa.list_(pa.int32())), ("text", pa.string()), ("boundary", pa.uint8())])


# Writing


@dataclass(frozen=True)
class TokenSettings:
    """How sentences are tokenised, and laid out in files."""

    tokenizer: Any
    max_length: int
    prompt: str | None = None
    rows_per_shard: int = 1_000_000
    """most rows of a file"""
    rows_per_batch: int = 65_536
    """most rows of a record batch, the unit of work and memory"""


@dataclass(frozen=True)
class TokenPart:
    """What is known of a part of a store, without its rows; plain values."""

    counts: dict[str, int]
    """of its reader, and of its sentences, as in the manifest"""
    rows: int
    documents: int
    alone: int
    """sentences that are the only ones of their section, without the last row"""
    tokens: int
    longest: int
    begins: bool
    """whether a section begins with the first row"""
    ends: bool
    """whether one begins with the last"""
    pending: int
    """the :class:`Boundary` that has begun behind the last row"""
    digest: str
    files: list[dict[str, Any]]


def prepare_tokens(
    parts: Iterable[tuple[Iterable[Sentence], ReadCounts]],
    settings: TokenSettings,
    *,
    directory: Path,
    fingerprint: dict[str, Any],
    progress: Callable[[int], None] | None = None,
) -> TokenStore:
    """Tokenise sentences into ``directory``, which appears only once it is whole.

    A directory that holds a whole store of the same fingerprint, before or after the work, is used as it is,
    so that several processes may prepare the same one.

    Args:
        parts: the sentences in parts, of which each makes files of its own, as of
            :func:`~clusterns_ray.data.pieces.read_parts`; sentences without tokens are skipped.
        fingerprint: what the result depends on, as JSON; kept to decide whether the store can be used again.
        progress: called with the number of rows done.

    Raises:
        DataError: no usable sentence, or ``directory`` holds something else.
        ConfigError: as :func:`~clusterns_ray.models.tokenization.tokenize`.
    """
    import pyarrow as pa

    directory = Path(directory).resolve()
    store = reuse_tokens(directory, fingerprint)
    if store is not None:
        return store
    check_free(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(directory)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        done: list[TokenPart] = []
        total = 0

        def count(rows: int) -> None:
            nonlocal total
            total += rows
            if progress:
                progress(total)

        for number, (sentences, counts) in enumerate(parts):
            pending = done[-1].pending if done else Boundary.DOCUMENT
            done.append(write_part(sentences, counts, settings, temporary, number, pending, count))
        manifest = merge_parts(done, settings, fingerprint)
        manifest["counts"]["repeated"] = count_repeated(
            manifest["files"], lambda name: pa.memory_map(str(temporary / name))
        )
        return publish(temporary, directory, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_part(
    sentences: Iterable[Sentence],
    counts: ReadCounts,
    settings: TokenSettings,
    directory: Path,
    number: int,
    pending: int = Boundary.NONE,
    progress: Callable[[int], None] | None = None,
) -> TokenPart:
    """Tokenise the sentences of part ``number`` into files of ``directory``.

    Args:
        counts: of the reader of the sentences.
        pending: the :class:`Boundary` that has begun before the first one.
        progress: called with how many sentences were done since the last call.
    """
    writer = _Writer(directory, number, settings, pending, progress)
    chunks = iter(sentences)
    while chunk := list(itertools.islice(chunks, min(settings.rows_per_batch, writer.room))):
        writer.write(chunk)
    writer.close_shard()
    return writer.part(counts)


def merge_parts(parts: Sequence[TokenPart], settings: TokenSettings, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the store of which these are the parts, in order; without the count of repeated sentences.

    Raises:
        DataError: there is no row.
    """
    counts = sum((Counter(part.counts) for part in parts), Counter())
    rows, tokens = sum(part.rows for part in parts), sum(part.tokens for part in parts)
    if not rows:
        raise DataError(_nothing_usable(counts))
    alone, ends, digest = 0, False, 0
    for part in parts:
        if part.rows:
            alone += part.alone + (ends and part.begins)
            ends = part.ends
            # A polynomial of the digests of the sentences, so that it does not depend on where they were cut.
            digest = (digest * pow(_BASE, part.rows, _PRIME) + int(part.digest, 16)) % _PRIME
    return {
        "format": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "counts": {name: counts[name] for name in parts[0].counts if counts[name] or name != "unusable"},
        "rows": rows,
        "documents": sum(part.documents for part in parts),
        "alone": alone + ends,
        "tokens": tokens,
        "mean_length": tokens / rows,
        "longest": max(part.longest for part in parts),
        "digest": f"{digest:032x}",
        "vocab_size": len(settings.tokenizer),
        "max_length": settings.max_length,
        "files": [file for part in parts for file in part.files],
    }


def count_repeated(files: Sequence[dict[str, Any]], open_file: Callable[[str], pa.NativeFile]) -> int:
    """How many of the first :data:`_COMPARED_ROWS` sentences of a store were there before.

    Args:
        open_file: opens the file of a name.
    """
    import pyarrow as pa

    hashes: list[bytes] = []
    for entry in files:
        with open_file(entry["name"]) as file, pa.ipc.open_file(file) as reader:
            for number in range(reader.num_record_batches):
                texts = reader.get_batch(number).column(1)[: _COMPARED_ROWS - len(hashes)].to_pylist()
                hashes += [hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest() for text in texts]
        if len(hashes) >= _COMPARED_ROWS:
            break
    return len(hashes) - len(set(hashes))


def publish(temporary: Path, directory: Path, manifest: dict[str, Any]) -> TokenStore:
    """Give a directory of files its manifest and its name, at which another process may have been quicker.

    Raises:
        DataError: there is something else of that name.
    """
    (temporary / MANIFEST).write_text(json_text(manifest, indent=1), encoding="utf-8")
    flush(temporary / MANIFEST)
    flush(temporary)
    try:
        os.rename(temporary, directory)
    except OSError:
        if not directory.exists():
            raise
        store = reuse_tokens(directory, manifest["fingerprint"])
        if store is None:
            raise _occupied(directory) from None
        return store
    flush(directory.parent)
    return TokenStore.open(directory)


def check_free(directory: Path) -> None:
    """Refuse a directory that holds something already.

    Raises:
        DataError: it does.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise _occupied(directory)


class _Writer:
    """Writes the shards of a part one after the other, and counts."""

    def __init__(
        self,
        directory: Path,
        number: int,
        settings: TokenSettings,
        pending: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.schema = _schema()
        self.directory, self.number, self.settings, self.progress = directory, number, settings, progress
        self.rows = self.tokens = self.longest = self.documents = self.alone = self.digest = 0
        self.counts = {"truncated": 0, "without_tokens": 0, "unknown": 0}
        """and sentences without a single token that the tokenizer knows"""
        self.pending = int(pending)
        """what begins with the next row: as skipped ones may have begun something, too"""
        self.begins = self.ends = False
        self.files: list[dict[str, Any]] = []
        self._shard: Any = None
        self._shard_rows = 0

    @property
    def room(self) -> int:
        """Rows that the open shard can still take."""
        return self.settings.rows_per_shard - self._shard_rows

    def part(self, counts: ReadCounts) -> TokenPart:
        """What was written."""
        values = {field.name: getattr(self, field.name) for field in fields(TokenPart)}
        return TokenPart(**values | {"counts": asdict(counts) | self.counts, "digest": f"{self.digest:032x}"})

    def write(self, chunk: list[Sentence]) -> None:
        """Append the sentences of ``chunk`` as one record batch."""
        import pyarrow as pa

        tokenizer, prompt = self.settings.tokenizer, self.settings.prompt
        texts: list[str] = []
        boundaries: list[int] = []
        lengths: list[int] = []
        values: list[np.ndarray] = []
        unknown = _unknown_id(tokenizer)
        for start in range(0, len(chunk), _TOKENIZE_ROWS):
            part = chunk[start : start + _TOKENIZE_ROWS]
            rows, truncated = tokenize(
                [sentence.text for sentence in part], tokenizer, self.settings.max_length, prompt
            )
            self.counts["truncated"] += truncated
            for sentence, ids in zip(part, rows, strict=True):
                self.pending = max(self.pending, sentence.boundary)
                if ids:
                    texts.append(sentence.text)
                    boundaries.append(self.pending)
                    self.pending = Boundary.NONE
            lengths += [len(ids) for ids in rows if ids]
            values.append(np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32))
            if unknown is not None and prompt is None:
                special = {*tokenizer.all_special_ids}
                self.counts["unknown"] += sum(unknown in ids and special.issuperset(ids) for ids in rows)
            if self.progress:
                self.progress(len(part))
        self.counts["without_tokens"] += len(chunk) - len(texts)
        if not texts:
            return
        for text in texts:
            self.digest = (self.digest * _BASE + _digest(text)) % _PRIME
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        input_ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values)))
        columns = [input_ids, pa.array(texts, pa.string()), pa.array(boundaries, pa.uint8())]
        batch = pa.record_batch(columns, schema=self.schema)
        self._count(np.array(boundaries))
        if self._shard is None:
            self._shard = pa.ipc.new_file(self._path(), self.schema)
        self._shard.write_batch(batch)
        self.rows += len(texts)
        self.tokens += int(offsets[-1])
        self.longest = max(self.longest, max(lengths))
        self._shard_rows += len(texts)
        if self._shard_rows == self.settings.rows_per_shard:
            self.close_shard()

    def _count(self, boundaries: np.ndarray) -> None:
        """Count the documents and the sentences alone in their section, of rows that follow those before."""
        self.documents += int((boundaries == Boundary.DOCUMENT).sum())
        sections = boundaries >= Boundary.SECTION
        begins = np.concatenate([[self.ends], sections])
        self.alone += int((begins[:-1] & begins[1:]).sum())
        self.begins = self.begins if self.rows else bool(sections[0])
        self.ends = bool(sections[-1])

    def _path(self) -> Path:
        further = f"-{len(self.files):05d}" if self.files else ""
        return self.directory / f"tokens-{self.number:05d}{further}.arrow"

    def close_shard(self) -> None:
        """Bring the open shard to disk."""
        if self._shard is None:
            return
        self._shard.close()
        path = self._path()
        flush(path)
        self.files.append(
            {
                "name": path.name,
                "rows": self._shard_rows,
                "size": path.stat().st_size,
                "sha256": sha256(path),
            }
        )
        self._shard, self._shard_rows = None, 0


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest(), "little")


def _unknown_id(tokenizer: Any) -> int | None:
    """The id of the token for what is not in the vocabulary; None where that is also a mark that every text has."""
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    return None if tokenizer.unk_token_id in marks else tokenizer.unk_token_id


def _nothing_usable(counts: Mapping[str, int]) -> str:
    rows = max(counts["rows"], counts["without_tokens"])
    if counts["unusable"] and counts["unusable"] == rows:
        return (
            f"{rows:,} sentences were found in the documents, and none is a plain sentence of 4 to 60 words "
            "that ends in a full stop or the like, so there is nothing to train on; give documents of prose, or a file "
            "with a sentence a line as data.corpus, which is taken as it is"
        )
    return (
        f"0 of {rows} rows usable: {counts['empty']} empty, {counts['without_tokens']} without tokens, so there "
        "is nothing to train on; check that the corpus has text, and that text_column names its column"
    )


def _occupied(directory: Path) -> DataError:
    return DataError(
        f"{directory}: the directory is not empty, and what it holds is not a whole token store of "
        "this corpus, tokenizer and length, so it is neither used nor overwritten; remove it or name "
        "another directory"
    )


def _remove_stale(directory: Path) -> None:
    """Remove what interrupted runs left behind; a live run touches its directory with every shard."""
    for path in directory.parent.glob(f".{directory.name}.*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # removed by another process
            continue


# Reading


def reuse_tokens(directory: Path, fingerprint: dict[str, Any]) -> TokenStore | None:
    """The store in ``directory``, if it is whole and of this fingerprint."""
    try:
        store = TokenStore.open(directory)
    except DataError:
        return None
    # As JSON, where a tuple and a list, or the keys 1 and "1", are the same.
    return store if store.manifest["fingerprint"] == json.loads(json.dumps(fingerprint)) else None


class TokenStore:
    """A tokenised corpus on disk, read by row number; see :meth:`open`.

    Rows are numbered from 0 across all files. Only the boundaries of the record batches and views into the
    memory-mapped files are held, so the memory taken does not depend on the number of rows.
    """

    def __init__(self, manifest: dict[str, Any], batches: Iterable[pa.RecordBatch]) -> None:
        self.manifest = manifest
        self._offsets: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._texts: list[pa.Array] = []
        self._boundaries: list[np.ndarray] = []
        sizes = []
        for batch in batches:
            input_ids, text, boundary = batch.columns
            # Views, as to_numpy makes them; but that imports pandas, which takes longer than all else here.
            self._offsets.append(np.from_dlpack(input_ids.offsets))
            self._values.append(np.from_dlpack(input_ids.values))
            self._texts.append(text)
            self._boundaries.append(np.from_dlpack(boundary))
            sizes.append(len(text))
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @classmethod
    def open(cls, directory: Path, *, verify: bool = False) -> TokenStore:
        """Memory-map the store in ``directory``.

        The checksum of a file that was changed after the manifest is compared; if it is right, the manifest is touched,
        so that the next opening is quick again.

        Args:
            verify: compare the checksums of all files.

        Raises:
            DataError: the manifest or a file is missing, damaged, or of another format.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        for entry in manifest["files"]:
            _check_file(directory / entry["name"], entry)
        _check_sums(directory, manifest, verify)
        return cls(manifest, _record_batches(directory, manifest["files"]))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Token length of each row, special tokens included: int64 ``(n,)`` to int32 ``(n,)``."""
        order, _, lengths, _ = self._spans(rows)
        result = np.empty(len(order), dtype=np.int32)
        result[order] = lengths
        return result

    def tokens(self, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the rows, padded on the right to the longest of them.

        Args:
            rows: int64 ``(n,)``, in any order, repeats allowed.

        Returns:
            input_ids and attention_mask (1 for tokens, 0 for padding), both int64 ``(n, longest)``.

        Raises:
            IndexError: a row that the store does not have.
        """
        order, begins, lengths, groups = self._spans(rows)
        ends = np.cumsum(lengths, dtype=np.int64)
        total, longest = (int(ends[-1]), int(lengths.max())) if len(order) else (0, 0)
        # The place of each token within its record batch: a run of consecutive numbers per row.
        places = np.repeat(begins - (ends - lengths), lengths) + np.arange(total)
        values = np.empty(total, dtype=np.int32)
        stops = [0, *ends.tolist()]
        for batch, start, stop in groups:
            here = slice(stops[start], stops[stop])
            values[here] = self._values[batch][places[here]]
        mask = np.arange(longest) < lengths[:, None]
        padded = np.full(mask.shape, pad_id, dtype=np.int64)
        padded[mask] = values
        input_ids, attention_mask = np.empty_like(padded), np.empty_like(padded)
        input_ids[order], attention_mask[order] = padded, mask
        return input_ids, attention_mask

    def boundaries(self, rows: np.ndarray) -> np.ndarray:
        """The :class:`Boundary` that begins with each row: int64 ``(n,)`` to uint8 ``(n,)``.

        Raises:
            IndexError: a row that the store does not have.
        """
        order, local, groups = self._locate(rows)
        result = np.empty(len(order), dtype=np.uint8)
        for batch, start, stop in groups:
            result[order[start:stop]] = self._boundaries[batch][local[start:stop]]
        return result

    def texts(self, rows: np.ndarray) -> list[str]:
        """The sentence of each row, as it was before any prompt or truncation.

        Raises:
            IndexError: a row that the store does not have.
        """
        import pyarrow as pa

        order, local, groups = self._locate(rows)
        result = [""] * len(order)
        for batch, start, stop in groups:
            texts = self._texts[batch].take(pa.array(local[start:stop])).to_pylist()
            for place, text in zip(order[start:stop].tolist(), texts, strict=True):
                result[place] = text
        return result

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
        """Rows sorted by record batch.

        Returns the order that sorts them, in that order their places within their batches, and for each batch
        ``(batch, start, stop)``, its slice of the order.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1 or (rows.size and not (rows.min() >= 0 and rows.max() < len(self))):
            raise IndexError(
                f"rows of shape {rows.shape} spanning {rows.min(initial=0)} to {rows.max(initial=0)} were "
                f"asked for, but the store has rows 0 to {len(self) - 1}; pass a 1-d array of these"
            )
        batch = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(batch, kind="stable")
        batch = batch[order]
        local = rows[order] - self._starts[batch]
        bounds = np.flatnonzero(np.diff(batch, prepend=-1, append=-1)).tolist()
        return order, local, list(zip(batch[bounds[:-1]].tolist(), bounds[:-1], bounds[1:], strict=True))

    def _spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, int, int]]]:
        """As :meth:`_locate`, with where each row begins in the values of its batch, and its length."""
        order, local, groups = self._locate(rows)
        begins, ends = np.empty((2, len(order)), dtype=np.int64)
        for batch, start, stop in groups:
            offsets, places = self._offsets[batch], local[start:stop]
            begins[start:stop] = offsets[places]
            ends[start:stop] = offsets[places + 1]
        return order, begins, ends - begins, groups


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    remedy = "remove the directory and prepare the tokens again"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: there is no such file, so {directory} is not a token store; check the path, or prepare "
            "the tokens first"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the manifest cannot be read ({error}), so it is damaged; {remedy}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: the manifest has format {version!r}, but this version reads format {FORMAT_VERSION}; {remedy}"
        )
    try:
        if "fingerprint" not in manifest:
            raise KeyError("fingerprint")
        files = [(f["name"], f["sha256"], int(f["size"]), int(f["rows"])) for f in manifest["files"]]
        whole = sum(rows for *_, rows in files) == manifest["rows"] > 0
        safe = all(_FILE_NAME.fullmatch(name) for name, *_ in files)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: the manifest is damaged ({type(error).__name__}: {error}); {remedy}") from error
    if not safe:
        names = [name for name, *_ in files if not _FILE_NAME.fullmatch(name)]
        raise DataError(
            f"{path}: the manifest names the files {names}, but files of a store are called "
            f"tokens-00000.arrow and so on, and lie beside the manifest; {remedy}"
        )
    if not whole:
        raise DataError(
            f"{path}: the rows of the files do not add up to {manifest['rows']!r}, so it is damaged; {remedy}"
        )
    return manifest


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    remedy = "remove the directory and prepare the tokens again"
    if not path.is_file():
        raise DataError(f"{path}: the file is missing, but the manifest lists it; {remedy}")
    size = path.stat().st_size
    if size != entry["size"]:
        raise DataError(f"{path}: the file has {size} bytes, but {entry['size']} were written; {remedy}")


def _check_sums(directory: Path, manifest: dict[str, Any], verify: bool) -> None:
    """Compare checksums: of all files, or of those whose inode changed after the manifest's.

    The time of an inode's change (ctime) is new after any write, copy or replacement, whatever was done to mtime.
    """
    checked_ns = (directory / MANIFEST).stat().st_ctime_ns
    changed = [entry for entry in manifest["files"] if (directory / entry["name"]).stat().st_ctime_ns > checked_ns]
    for entry in manifest["files"] if verify else changed:
        path = directory / entry["name"]
        if sha256(path) != entry["sha256"]:
            raise DataError(
                f"{path}: the checksum differs from the one in the manifest, so it was changed; remove the directory "
                "and prepare the tokens again"
            )
    if changed:
        with suppress(OSError):  # where it may only be read, it is compared every time
            os.utime(directory / MANIFEST)


def _record_batches(directory: Path, files: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    """The record batches of all files, zero-copy."""
    import pyarrow as pa

    schema = _schema()
    for entry in files:
        path = directory / entry["name"]
        try:
            # Closing the file gives its descriptor back; the batches keep the map alive.
            with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
                written = reader.schema
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: this is not a readable Arrow file ({error}), so it is damaged; remove the "
                "directory and prepare the tokens again"
            ) from error
        rows = sum(batch.num_rows for batch in batches)
        if written != schema or rows != entry["rows"]:
            raise DataError(
                f"{path}: the file holds {rows} rows of {written.names}, but {entry['rows']} rows of "
                f"{schema.names} were written; remove the directory and prepare the tokens again"
            )
        yield from batches
