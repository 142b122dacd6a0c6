"""Reading plain text: one sentence at a time, from files, object stores and dataset hubs."""

from __future__ import annotations

import fnmatch
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import category
from urllib.parse import unquote

from clusterns_ray.data.document import Boundary, Sentence
from clusterns_ray.data.readers import (
    check_characters,
    csv_rows,
    document_of,
    json_rows,
    no_column,
    parquet_rows,
    text_lines,
    text_of,
    tsv_rows,
)
from clusterns_ray.errors import DataError
from clusterns_ray.io.paths import check_regular_file

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem

MAX_CHARACTERS = 10_000  # a longer sentence is cut: far beyond what any encoder reads

_MAX_TEXT_LINE = 1 << 16  # characters of a .txt line that are kept: MAX_CHARACTERS, and room for white space
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
_BLOCK = 1 << 20
_COMPRESSED = (".gz", ".bz2", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv", ".parquet", *JSON_LINES)
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


@dataclass
class ReadCounts:
    """What was read; ``rows == empty + unusable + kept`` once a corpus has been read to its end."""

    files: int = 0
    rows: int = 0
    empty: int = 0
    """Rows without text (white space, control and zero-width characters alone), skipped."""
    cut: int = 0
    """Rows longer than ``MAX_CHARACTERS``, kept cut to that length."""
    kept: int = 0
    unusable: int = 0
    """Sentences of documents that are not plain sentences (see ``documents.is_usable``), skipped."""


@dataclass(frozen=True)
class Source:
    """A file (or dataset) of a corpus, as cheap to compare as a directory listing."""

    path: str
    """Absolute path, or URL."""
    size: int | None = None
    """Bytes, where known."""
    mtime_ns: int | None = None
    """Time of the last change in nanoseconds since 1970, where known."""


class CorpusFile(NamedTuple):
    """A file, or a piece of one that is read by itself (see ``data.pieces``)."""

    source: Source
    filesystem: FileSystem | None
    """None: a dataset of the Hugging Face hub"""
    location: str
    begin: int = 0
    """the byte in or after which the piece begins, with the next line; of parquet its first row group"""
    end: int | None = None
    """where the next piece begins; None where there is none"""
    first: int = 1
    """the number of its first row"""


def list_sources(spec: str | Sequence[str]) -> list[Source]:
    """The files that :func:`read_sentences` would read, in its order, without reading them.

    Raises:
        DataError: something named by ``spec`` does not exist or cannot be listed.
    """
    return [file.source for file in list_files(spec)]


def read_sentences(
    spec: str | Sequence[str],
    *,
    text_column: str = "text",
    limit: int | None = None,
    counts: ReadCounts,
    sources: Sequence[Source] | None = None,
) -> Iterator[str]:
    """The texts of :func:`read_corpus`."""
    rows = read_corpus(spec, text_column=text_column, limit=limit, counts=counts, sources=sources)
    return (row.text for row in rows)


def read_corpus(
    spec: str | Sequence[str],
    *,
    text_column: str = "text",
    document_column: str | None = None,
    limit: int | None = None,
    counts: ReadCounts,
    sources: Sequence[Source] | None = None,
) -> Iterator[Sentence]:
    """Stream the sentences of a corpus, one by one, never holding a whole file.

    A file begins a document. Within it, so does a sentence after a blank line of a text file, and a row of another
    format whose ``document_column`` differs from that of the sentence before it; without that column, every row.

    Args:
        spec: one of the following, or a list of them, read in the order given and each file once, whatever links lead
            to it:
            a path; a glob (``*``, ``?``, ``[a-z]`` within a name, ``**`` across directories), files sorted;
            a URL ``s3://``, ``gs://`` or ``file://``, with globs of ``*``;
            ``hf://NAME[:split]``, a dataset of the Hugging Face hub or a local directory of one;
            ``hf://OWNER/NAME/FILE``, one file of a dataset of the hub, downloaded once.
            The suffix decides the format: ``.csv`` and ``.tsv`` with a header, ``.jsonl``, ``.ndjson`` and
            ``.json`` with an object a line, ``.parquet``, and anything else with a sentence a line.
            All but parquet may be compressed: ``.gz``, ``.bz2``, ``.zst``. Text is UTF-8 (see ``data.readers``).
        text_column: the column or field that holds the sentence.
        document_column: the column or field that names the document of a sentence: a text or a whole number.
        limit: stop after this many sentences.
        counts: updated as rows are read.
        sources: what :func:`list_sources` returned when the result was named; as they are now if not given.

    Returns:
        An iterator of sentences, without outer white space, none empty or above ``MAX_CHARACTERS``.

    Raises:
        ConfigError: at once, if a source is a directory, a device or the like.
        DataError: at once, if a source is missing or unreadable; while reading, if it is malformed; at the end, if it
            has changed meanwhile.
    """
    files = list_files(spec)
    sentences = itertools.islice(read_files(files, text_column, document_column, counts), limit)
    return _unchanged(sentences, spec, [file.source for file in files] if sources is None else sources)


def _unchanged(
    sentences: Iterator[Sentence], spec: str | Sequence[str], before: Sequence[Source]
) -> Iterator[Sentence]:
    """The sentences; at their end the sources have to be what they were."""
    yield from sentences
    check_unchanged(before, list_sources(spec))


def check_unchanged(before: Sequence[Source], after: Sequence[Source]) -> None:
    """Refuse sources that were changed while they were read: what was read may be half of each version.

    Raises:
        DataError: it names one.
    """
    if list(before) == list(after):
        return
    known = {source.path: source for source in before}
    changed = next((source.path for source in after if known.pop(source.path, None) != source), None)
    path = changed or next(iter(known), "the corpus")
    raise DataError(
        f"{path}: it changed while it was read, so rows may be missing or half of one version and half of another; "
        "wait until it is written, and give the same command again"
    )


def read_files(
    files: Sequence[CorpusFile], text_column: str, document_column: str | None, counts: ReadCounts
) -> Iterator[Sentence]:
    """The sentences of :func:`read_corpus`, of files or of pieces of them."""
    for file in files:
        counts.files += file.begin == 0
        last: Any = 0 if file.begin else None  # the document goes on from the piece before
        for number, row, document in _rows(file, text_column, document_column):
            counts.rows += 1
            text = row.strip() if row else ""
            if "\0" in text:
                check_characters(text, f"{file.source.path}:{number}")
            if not is_visible(text):
                counts.empty += 1
                continue
            if len(text) > MAX_CHARACTERS:
                counts.cut += 1
                text = text[:MAX_CHARACTERS].rstrip()
            counts.kept += 1
            yield Sentence(text, Boundary.NONE if document == last else Boundary.DOCUMENT)
            last = document


def is_visible(text: str | bytes) -> bool:
    """Whether there is a character in it that is not white space, control or format (such as a zero-width space)."""
    text = text if isinstance(text, str) else text.decode("utf-8", "ignore")
    return any(category(character) not in _INVISIBLE for character in text)


def is_table(source: Source) -> bool:
    """Whether the rows have columns or fields, of which one may name the document."""
    suffix = file_suffix(source.path)[0]
    return suffix in TABLES or (source.path.startswith("hf://") and _hub_file(source.path) is None)


def file_suffix(location: str) -> tuple[str, bool]:
    """The suffix that decides the format, in lower case, and whether the file is compressed."""
    stem, suffix = os.path.splitext(location.lower())
    return (os.path.splitext(stem)[1], True) if suffix in _COMPRESSED else (suffix, False)


def _rows(
    file: CorpusFile, text_column: str, document_column: str | None
) -> Iterator[tuple[int, str | None, str | int]]:
    """The numbered raw rows of a source, None for a null, each with what identifies its document in the source."""
    name, filesystem = file.source.path, file.filesystem
    if filesystem is None:
        if (part := _hub_file(file.location)) is not None:
            yield from _rows(_download(part, file.source), text_column, document_column)
        else:
            yield from _read_hub(name, text_column, document_column)
        return
    suffix, compressed = file_suffix(file.location)
    columns = [text_column] if document_column is None else [text_column, document_column]
    if document_column is not None and suffix not in TABLES:
        raise DataError(
            f"{name}: it is text with a sentence a line, which has no column {document_column!r} (data.document_column)"
            "; leave data.document_column out and put a blank line between documents, or give csv, jsonl or parquet"
        )
    try:
        if suffix == ".parquet":
            if compressed:
                raise DataError(
                    f"{name}: a compressed parquet file cannot be streamed, as parquet is read from its end; "
                    "decompress it (parquet compresses its own columns)"
                )
            with filesystem.open_input_file(file.location) as handle:
                groups = None if file.end is None else range(file.begin, file.end)
                yield from parquet_rows(handle, name, text_column, document_column, groups, file.first)
            return
        with _open(file) as handle:
            stream = io.BufferedReader(handle, _BLOCK)  # type: ignore[arg-type]
            if suffix in (".csv", ".tsv"):
                read = csv_rows if suffix == ".csv" else tsv_rows
                for number, values in read(text_lines(stream, name), name, columns):
                    if values is None:
                        yield number, None, number
                    else:
                        where = f"{name}:{number}"
                        yield number, values[0], document_of(values[-1], where, document_column, number)
            elif suffix in JSON_LINES:
                lines = text_lines(stream, name, first=file.first)
                for number, record in json_rows(lines, name, columns, begun=file.begin > 0):
                    yield number, *_fields(record, f"{name}:{number}", text_column, document_column, number)
            else:
                documents = 0
                for number, line in text_lines(stream, name, _MAX_TEXT_LINE, cut=True, first=file.first):
                    documents += not line.strip()
                    yield number, line, documents
    except OSError as error:
        raise DataError(
            f"{name}: reading failed: {error}; check that the file is whole and readable, and its suffix true"
        ) from error


@contextmanager
def _open(file: CorpusFile) -> Iterator[NativeFile]:
    """The bytes of a file, decompressed, or of a piece of one."""
    assert file.filesystem is not None
    if file.end is None:
        with file.filesystem.open_input_stream(file.location, compression="detect", buffer_size=_BLOCK) as stream:
            yield stream
        return
    with file.filesystem.open_input_file(file.location) as handle:
        begin, end = _piece_begin(handle, file.begin), _piece_begin(handle, file.end)
        with handle.get_stream(begin, end - begin) as stream:
            yield stream


def _piece_begin(handle: NativeFile, offset: int) -> int:
    """Where the piece begins that is cut at ``offset``: behind the first whole line from there on that has text, so
    that a document goes on from one piece to the next unless a blank line follows; at the end if there is none."""
    size = handle.size()
    if offset <= 0 or offset >= size:
        return max(0, min(offset, size))
    stream = io.BufferedReader(handle.get_stream(offset, size - offset), _BLOCK)  # type: ignore[arg-type]
    whole = False
    while line := stream.readline(_MAX_TEXT_LINE):
        offset += len(line)
        ended = line.endswith(b"\n")
        if ended and whole and is_visible(line.removesuffix(b"\n").removesuffix(b"\r").rpartition(b"\r")[2]):
            return offset
        whole = ended
    return size


def _fields(
    record: Any, where: str, text_column: str, document_column: str | None, number: int
) -> tuple[str | None, str | int]:
    """The text of a record, and what identifies its document."""
    if record is None:
        return None, number
    text = text_of(record, where, text_column)
    if document_column is not None and document_column not in record:
        raise no_column(where, document_column, list(record))
    return text, document_of(record.get(document_column), where, document_column, number)


# The hub


def _read_hub(name: str, text_column: str, document_column: str | None) -> Iterator[tuple[int, str | None, str | int]]:
    import datasets

    dataset, split = _hub_name(name)
    try:
        rows = datasets.load_dataset(dataset, split=split, streaming=True)
        for number, record in enumerate(rows, 1):
            yield number, *_fields(record, f"{name} row {number}", text_column, document_column, number)
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers and the network do
        raise DataError(
            f"{name}: split {split!r} of dataset {dataset!r} cannot be read ({type(error).__name__}: "
            f"{error}); check the name and the split; a machine without network needs a local directory, "
            "hf://DIRECTORY"
        ) from error


def _download(part: tuple[str, str], source: Source) -> CorpusFile:
    """A file of a dataset of the hub, in the hub's own cache."""
    from huggingface_hub import hf_hub_download
    from pyarrow.fs import LocalFileSystem

    dataset, file = part
    try:
        path = hf_hub_download(dataset, file, repo_type="dataset")
    except Exception as error:  # the library raises whatever the network does
        raise DataError(
            f"{source.path}: file {file!r} of dataset {dataset!r} cannot be downloaded ({type(error).__name__}: "
            f"{error}); check the names; a machine without network needs the file itself: give its path"
        ) from error
    return CorpusFile(source, LocalFileSystem(), path)


# Finding files


def list_files(spec: str | Sequence[str]) -> list[CorpusFile]:
    """As :func:`list_sources`, with where each file is."""
    patterns = [spec] if isinstance(spec, (str, os.PathLike)) else spec
    files = [file for pattern in patterns for file in _expand_one(os.fspath(pattern))]
    if not files:
        raise DataError(f"the corpus is {spec!r}, which names no file; give a path, a glob or a URL")
    once: dict[str, CorpusFile] = {}
    for file in files:
        path = file.source.path
        once.setdefault(path if "://" in path else os.path.realpath(path), file)
    return list(once.values())


def _expand_one(pattern: str) -> list[CorpusFile]:
    url = _URL.match(pattern)
    scheme = url[1].lower() if url else ""
    if scheme == "hf":
        return [CorpusFile(_hub_source(pattern), None, pattern)]
    try:
        filesystem, location = _find_filesystem(pattern, scheme)
        matches = _find(filesystem, location)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        remedy = (
            "check the address, credentials and network; schemes are file, s3, gs and hf, and special characters in a "
            "URL are written as %20 and the like"
            if url
            else "check the path, and that this user may read the directory"
        )
        raise DataError(f"{pattern}: cannot be listed ({error}); {remedy}") from error
    if not matches:
        relative = not url and not os.path.isabs(os.path.expanduser(pattern))
        where = f" in the working directory {os.getcwd()}" if relative else ""
        raise DataError(f"{pattern}: no such file, and no file matches it{where}; check the path")
    prefix = f"{scheme}://" if scheme not in ("", "file") else ""
    if not prefix:
        for info in matches:
            check_regular_file("The file", info.path)
            if not os.access(info.path, os.R_OK):
                raise DataError(f"{info.path}: this user may not read it; change its permissions, or leave it out")
    return [CorpusFile(Source(prefix + i.path, i.size, i.mtime_ns), filesystem, i.path) for i in matches]


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
    if recursive and filesystem.type_name == "local":
        matching = [path for path in walk(base) if _matches(path.split("/")[first:], pattern)]
        listing = filesystem.get_file_info(matching) if matching else []
    else:
        listing = filesystem.get_file_info(FileSelector(base, allow_not_found=True, recursive=recursive))
    files = (FileType.File, FileType.Unknown)  # unknown: a FIFO, a device or a socket
    matches = [info for info in listing if info.type in files and _matches(info.path.split("/")[first:], pattern)]
    return sorted(matches, key=lambda info: info.path)


def find_local(location: str) -> list[str]:
    """The files of this machine that match a glob, sorted.

    Raises:
        OSError: a directory cannot be read.
    """
    from pyarrow.fs import LocalFileSystem

    return [info.path for info in _find(LocalFileSystem(), os.path.abspath(location))]


def walk(base: str) -> Iterator[str]:
    """The paths below a directory of this machine that are no directories; links are followed, and no directory is
    entered twice, so that a link to a directory above ends."""
    entered: set[tuple[int, int]] = set()

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(base, onerror=fail if os.path.isdir(base) else None, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in entered:
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        folders.sort()
        yield from (os.path.join(folder, file) for file in files)


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
        if pattern[1] == "**":  # as one alone, and not as many ways as there are to share the parts
            return _matches(parts, pattern[1:])
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
