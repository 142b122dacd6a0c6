"""Reading plain text: one sentence at a time, from files, object stores and dataset hubs."""

from __future__ import annotations

import codecs
import csv
import fnmatch
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from clusterns_ray.errors import DataError

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

MAX_CHARACTERS = 10_000  # a longer sentence is cut: far beyond what any encoder reads

_MAX_TEXT_LINE = 1 << 16  # bytes of a .txt line that are kept: MAX_CHARACTERS at 4 bytes each, and room
_MAX_RECORD_LINE = 1 << 26  # bytes of a .csv or .jsonl line; a longer one is refused
_BLOCK = 1 << 20
_COMPRESSED = (".gz", ".bz2", ".zst")
_PARQUET_ROWS = 8192
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


@dataclass
class ReadCounts:
    """What was read; ``rows == empty + kept`` once a corpus has been read to its end."""

    files: int = 0
    rows: int = 0
    empty: int = 0
    """Rows without text, skipped."""
    cut: int = 0
    """Rows longer than ``MAX_CHARACTERS``, kept cut to that length."""
    kept: int = 0


@dataclass(frozen=True)
class Source:
    """A file (or dataset) of a corpus, as cheap to compare as a directory listing."""

    path: str
    """Absolute path, or URL."""
    size: int | None = None
    """Bytes, where known."""
    mtime_ns: int | None = None
    """Time of the last change in nanoseconds since 1970, where known."""


class _File(NamedTuple):
    source: Source
    filesystem: FileSystem | None  # None: a dataset of the Hugging Face hub
    location: str


def list_sources(spec: str | Sequence[str]) -> list[Source]:
    """The files that :func:`read_sentences` would read, in its order, without reading them.

    Raises:
        DataError: something named by ``spec`` does not exist or cannot be listed.
    """
    return [file.source for file in _expand(spec)]


def read_sentences(
    spec: str | Sequence[str],
    *,
    text_column: str = "text",
    limit: int | None = None,
    counts: ReadCounts,
) -> Iterator[str]:
    """Stream the sentences of a corpus, one by one, never holding a whole file.

    Args:
        spec: one of the following, or a list of them, read in the order given and each file once:
            a path; a glob (``*``, ``?``, ``[a-z]`` within a name, ``**`` across directories), files sorted;
            a URL ``s3://``, ``gs://`` or ``file://``, with globs of ``*``;
            ``hf://NAME[:split]``, a dataset of the Hugging Face hub or a local directory of one;
            ``hf://OWNER/NAME/FILE``, one file of a dataset of the hub, downloaded once.
            The suffix tells the format: ``.csv`` and ``.tsv`` with a header, ``.jsonl``, ``.ndjson`` and
            ``.json`` with an object a line, ``.parquet``, and anything else with a sentence a line.
            All but parquet may be compressed: ``.gz``, ``.bz2``, ``.zst``.
        text_column: the column or field that holds the sentence.
        limit: stop after this many sentences.
        counts: updated as rows are read.

    Returns:
        An iterator of sentences without outer white space, none empty or above ``MAX_CHARACTERS``.

    Raises:
        DataError: at once, if a source is missing; while reading, if a source is malformed.
    """
    return itertools.islice(_usable(_expand(spec), text_column, counts), limit)


def _usable(files: list[_File], text_column: str, counts: ReadCounts) -> Iterator[str]:
    for file in files:
        counts.files += 1
        for row in _rows(file, text_column):
            counts.rows += 1
            text = row.strip() if row else ""
            if not text:
                counts.empty += 1
                continue
            if len(text) > MAX_CHARACTERS:
                counts.cut += 1
                text = text[:MAX_CHARACTERS].rstrip()
            counts.kept += 1
            yield text


def _rows(file: _File, text_column: str) -> Iterator[str | None]:
    """The raw rows of one source; None for a null."""
    name, filesystem = file.source.path, file.filesystem
    if filesystem is None:
        if (part := _hub_file(file.location)) is not None:
            yield from _rows(_download(part, file.source), text_column)
        else:
            yield from _read_hub(name, text_column)
        return
    stem, suffix = os.path.splitext(file.location.lower())
    compressed = suffix in _COMPRESSED
    if compressed:
        suffix = os.path.splitext(stem)[1]
    try:
        if suffix == ".parquet":
            if compressed:
                raise DataError(
                    f"{name}: a compressed parquet file cannot be streamed, as parquet is read from its end; "
                    "decompress it (parquet compresses its own columns)"
                )
            with filesystem.open_input_file(file.location) as handle:
                yield from _read_parquet(handle, name, text_column)
            return
        with filesystem.open_input_stream(file.location, compression="detect", buffer_size=_BLOCK) as handle:
            stream = io.BufferedReader(handle, _BLOCK)  # type: ignore[arg-type]
            if suffix in (".csv", ".tsv"):
                yield from _read_csv(stream, name, text_column, "\t" if suffix == ".tsv" else ",")
            elif suffix in (".jsonl", ".ndjson", ".json"):
                yield from _read_jsonl(stream, name, text_column)
            else:
                yield from (line for _, line in _lines(stream, name, _MAX_TEXT_LINE))
    except OSError as error:
        raise DataError(
            f"{name}: reading failed: {error}; check that the file is whole and readable, and its suffix true"
        ) from error


# Formats


def _lines(stream: io.BufferedReader, name: str, limit: int) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, decoded; of a line above ``limit`` bytes only so many are kept."""
    for number in itertools.count(1):
        line = stream.readline(limit)
        if not line:
            return
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            text = decoder.decode(line)
            while len(line) == limit and not line.endswith(b"\n"):
                line = stream.readline(limit)
                decoder.decode(line)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}:{number}: byte 0x{error.object[error.start]:02x} is not UTF-8 ({error.reason}), and "
                "text is read as UTF-8; re-encode the file, e.g. iconv -f LATIN1 -t UTF-8"
            ) from error
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _read_csv(stream: io.BufferedReader, name: str, text_column: str, delimiter: str) -> Iterator[str | None]:
    lines = (line for _, line in _lines(stream, name, _MAX_RECORD_LINE))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    began = 1
    try:
        header = next(rows, [])
        if text_column not in header:
            raise _no_column(name, text_column, header)
        column = header.index(text_column)
        while True:
            began = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if row and len(row) != len(header):
                raise DataError(
                    f"{name}:{began}: the row has {len(row)} fields, but the header has {len(header)}; quote "
                    f"fields that hold {delimiter!r}, or repair the row"
                )
            yield row[column] if row else None
    except csv.Error as error:
        raise DataError(
            f"{name}:{began}: the row that begins here is malformed ({error}), so it cannot be split into "
            'fields; close its quotes, and double quotes within quotes ("")'
        ) from error


def _read_jsonl(stream: io.BufferedReader, name: str, text_column: str) -> Iterator[str | None]:
    for number, line in _lines(stream, name, _MAX_RECORD_LINE):
        if not line.strip():
            yield None
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}:{number}: invalid JSON ({error}), and each line must be a JSON object of its own; "
                "repair the line, or write the file as JSON lines, e.g. jq -c '.[]'"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{name}:{number}: the line holds a JSON {type(record).__name__}, but each line must be an "
                f'object such as {{"{text_column}": "..."}}; write the file as JSON lines, e.g. jq -c \'.[]\''
            )
        yield _text_of(record, f"{name}:{number}", text_column)


def _read_parquet(handle: Any, name: str, text_column: str) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(handle)
        names = file.schema_arrow.names
        if text_column not in names:
            raise _no_column(name, text_column, names)
        kind = file.schema_arrow.field(text_column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
            raise DataError(
                f"{name}: column {text_column!r} has type {kind}, but sentences are strings; name a column "
                "of strings as text_column, or convert it"
            )
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_column]):
            yield from batch.column(0).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{name}: the parquet file cannot be read ({error}); write it again, or correct its suffix"
        ) from error


def _read_hub(name: str, text_column: str) -> Iterator[str | None]:
    import datasets

    dataset, split = _hub_name(name)
    try:
        rows = datasets.load_dataset(dataset, split=split, streaming=True)
        for number, record in enumerate(rows, 1):
            yield _text_of(record, f"{name} row {number}", text_column)
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers and the network do
        raise DataError(
            f"{name}: split {split!r} of dataset {dataset!r} cannot be read ({type(error).__name__}: "
            f"{error}); check the name and the split; a machine without network needs a local directory, "
            "hf://DIRECTORY"
        ) from error


def _download(part: tuple[str, str], source: Source) -> _File:
    """A file of a dataset of the hub, in the hub's own cache."""
    from huggingface_hub import hf_hub_download
    from pyarrow.fs import LocalFileSystem

    dataset, file = part
    try:
        path = hf_hub_download(dataset, file, repo_type="dataset")
    except Exception as error:  # the library raises whatever the network does
        raise DataError(
            f"{source.path}: file {file!r} of dataset {dataset!r} cannot be had ({type(error).__name__}: "
            f"{error}); check the names; a machine without network needs the file itself: give its path"
        ) from error
    return _File(source, LocalFileSystem(), path)


def _text_of(record: Any, where: str, text_column: str) -> str | None:
    """The sentence of a record, None for a null."""
    if text_column not in record:
        raise _no_column(where, text_column, list(record))
    text = record[text_column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {text_column!r} holds {str(text)[:80]!r} of type {type(text).__name__}, but "
            "sentences are strings; convert it, or name another text_column"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {text_column!r} holds half of a surrogate pair ({text[error.start]!r}), which "
            "is no character; repair or remove the row"
        ) from error
    return text


def _no_column(where: str, text_column: str, names: list[str]) -> DataError:
    there = ", ".join(map(repr, names)) or "none"
    return DataError(
        f"{where}: there is no column {text_column!r}; the columns are: {there}; set text_column to one of them"
    )


# Finding files


def _expand(spec: str | Sequence[str]) -> list[_File]:
    patterns = [spec] if isinstance(spec, (str, os.PathLike)) else spec
    files = [file for pattern in patterns for file in _expand_one(os.fspath(pattern))]
    if not files:
        raise DataError(f"the corpus is {spec!r}, which names no file; give a path, a glob or a URL")
    return list({file.source.path: file for file in files}.values())


def _expand_one(pattern: str) -> list[_File]:
    url = _URL.match(pattern)
    scheme = url[1].lower() if url else ""
    if scheme == "hf":
        return [_File(_hub_source(pattern), None, pattern)]
    try:
        filesystem, location = _find_filesystem(pattern, scheme)
        found = _find(filesystem, location)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise DataError(
            f"{pattern}: cannot be listed ({error}); check the address, credentials and network; schemes are "
            "file, s3, gs and hf, and special characters in a URL are written as %20 and the like"
        ) from error
    if not found:
        relative = not url and not os.path.isabs(os.path.expanduser(pattern))
        where = f" in the working directory {os.getcwd()}" if relative else ""
        raise DataError(f"{pattern}: no such file, and no file matches it{where}; check the path")
    prefix = f"{scheme}://" if scheme not in ("", "file") else ""
    return [_File(Source(prefix + i.path, i.size, i.mtime_ns), filesystem, i.path) for i in found]


def _find_filesystem(pattern: str, scheme: str) -> tuple[FileSystem, str]:
    """The file system of ``pattern``, and ``pattern`` as an absolute location in it."""
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not scheme:
        return LocalFileSystem(), os.path.abspath(os.path.expanduser(pattern))
    address, mark, options = pattern.partition("?")
    # A URL with a glob is no valid URL: only the part before the glob is given to the parser.
    parts = address.split("/")
    first = next((i for i, part in enumerate(parts) if _is_glob(part)), len(parts))
    base = "/".join(parts[:first]) + ("/" if first < len(parts) else "")
    filesystem, location = FileSystem.from_uri(base + mark + options)
    return filesystem, "/".join([location.rstrip("/"), *map(unquote, parts[first:])])


def _find(filesystem: FileSystem, location: str) -> list[FileInfo]:
    """The file at ``location``, or else the files that match it as a glob, sorted by path."""
    from pyarrow.fs import FileSelector, FileType

    info = filesystem.get_file_info(location)
    if info.type == FileType.Directory:
        raise DataError(f"{location}: this is a directory, not a file; name its files, e.g. {location}/*.txt")
    if info.type != FileType.NotFound:
        return [info]
    parts = location.split("/")
    first = next((i for i, part in enumerate(parts) if _is_glob(part)), None)
    if first is None:
        return []
    base, pattern = "/".join(parts[:first]) or "/", parts[first:]
    recursive = len(pattern) > 1 or "**" in pattern
    listing = filesystem.get_file_info(FileSelector(base, allow_not_found=True, recursive=recursive))
    found = [info for info in listing if info.type == FileType.File and _matches(info.path.split("/")[first:], pattern)]
    return sorted(found, key=lambda info: info.path)


def _is_glob(part: str) -> bool:
    return any(character in part for character in "*?[")


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match those of a glob; as in a shell, a wildcard hides leading dots."""
    if not pattern or not parts:
        return not pattern and not parts
    if parts[0].startswith(".") and not pattern[0].startswith("."):
        return False
    if pattern == ["**"]:
        return not any(part.startswith(".") for part in parts)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _hub_name(url: str) -> tuple[str, str]:
    """Dataset and split of ``hf://NAME[:split]``."""
    name = url[len("hf://") :]
    stem, colon, split = name.rpartition(":")
    if not colon or "/" in split:  # a colon within a directory
        stem, split = name, ""
    return os.path.expanduser(stem), split or "train"


def _hub_file(url: str) -> tuple[str, str] | None:
    """Dataset and file of ``hf://OWNER/NAME/FILE``; None where ``url`` names a dataset or a local directory."""
    name = os.path.expanduser(url[len("hf://") :])
    parts = name.split("/")
    if len(parts) < 3 or not all(parts) or os.path.isdir(_hub_name(url)[0]) or "." not in parts[-1]:
        return None
    return "/".join(parts[:2]), "/".join(parts[2:])


def _hub_source(url: str) -> Source:
    """A local directory is known by the size and the last change of its files together, else by its name."""
    name, split = _hub_name(url)
    if not name:
        raise DataError(f"{url!r} names no dataset; write hf://NAME or hf://NAME:split")
    if _hub_file(url) is not None:
        return Source(url)
    if not os.path.isdir(name):
        return Source(f"hf://{name}:{split}")
    name = os.path.abspath(name)
    stats = [os.stat(os.path.join(folder, file)) for folder, _, files in os.walk(name) for file in files]
    size, mtime_ns = sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)
    return Source(f"hf://{name}:{split}", size, mtime_ns)
