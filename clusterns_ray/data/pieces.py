"""A corpus in parts that are read one by one, in any order and anywhere: the files of a part, or a piece of one file.

Where a corpus is cut depends on its files alone, so that its token shards, of which each part makes its own, are the
same whoever reads which.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from clusterns_ray.data.corpus import JSON_LINES, TABLES, CorpusFile, ReadCounts, file_suffix, read_files
from clusterns_ray.data.document import Sentence

PART_BYTES = 1 << 25
"""Larger files are cut, and smaller ones read together, to about this size."""

UNKNOWN = 1 << 60
"""The number of a piece's first row until the pieces before it have been read."""

Part = list[CorpusFile]


def cut_corpus(files: Iterable[CorpusFile], document_column: str | None, part_bytes: int) -> list[Part]:
    """Share files out into parts, in their order.

    Text and JSON lines are cut between lines, parquet between row groups. Whole stay compressed files, csv and tsv,
    whose quotes may hold line ends, data sets of the hub, and all files where ``document_column`` is given, as a row
    has to be compared with the one before it.
    """
    parts: list[Part] = []
    group: Part = []
    size = 0
    for file in files:
        pieces = [file] if document_column is not None else _pieces(file, part_bytes)
        known = file.source.size
        if len(pieces) > 1 or known is None:
            parts += [group] if group else []
            parts += [[piece] for piece in pieces]
            group, size = [], 0
            continue
        group.append(file)
        size += known
        if size >= part_bytes:
            parts.append(group)
            group, size = [], 0
    return parts + ([group] if group else [])


def read_parts(
    parts: Sequence[Part], text_column: str, document_column: str | None, limit: int | None
) -> Iterator[tuple[Iterator[Sentence], ReadCounts]]:
    """The sentences of each part in turn, with counts that are updated as they are read; ``limit`` in all."""
    first = 1
    for part in parts:
        counts = ReadCounts()
        part = numbered(part, first)
        yield itertools.islice(read_files(part, text_column, document_column, counts), limit), counts
        first = part[0].first + counts.rows
        if limit is not None:
            limit -= counts.kept
            if limit == 0:
                return


def numbered(part: Part, first: int | None) -> Part:
    """The part, of which row ``first`` is the first one where it goes on in the file of the part before it."""
    return [part[0]._replace(first=first)] if first and is_continued(part) else part


def is_continued(part: Part) -> bool:
    """Whether the part begins within a file."""
    return part[0].begin > 0


def _pieces(file: CorpusFile, part_bytes: int) -> list[CorpusFile]:
    suffix, compressed = file_suffix(file.location)
    size = file.source.size
    if file.filesystem is None or compressed or size is None or size <= part_bytes:
        return [file]
    if suffix == ".parquet":
        bounds = _row_groups(file, part_bytes)
    elif suffix in TABLES and suffix not in JSON_LINES:
        return [file]
    else:
        bounds = [*range(0, size, part_bytes), size]
    if len(bounds) < 3:
        return [file]
    return [
        file._replace(begin=begin, end=end, first=UNKNOWN if begin else 1) for begin, end in itertools.pairwise(bounds)
    ]


def _row_groups(file: CorpusFile, part_bytes: int) -> list[int]:
    """Where to cut a parquet file: runs of row groups of about the size of a part, by their share of the rows."""
    import pyarrow.parquet as pq

    assert file.filesystem is not None
    try:
        with file.filesystem.open_input_file(file.location) as handle:
            metadata = pq.ParquetFile(handle).metadata
    except Exception:  # of many kinds; what is wrong is said when the file is read
        return []
    wanted = part_bytes * metadata.num_rows / (file.source.size or 1)
    bounds, rows = [0], 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= wanted or group == metadata.num_row_groups - 1:
            bounds.append(group + 1)
            rows = 0
    return bounds
