"""A file of sentences and embeddings: parquet with the columns ``text`` and ``embedding``, read by row.

Shape suffixes: N sentences, D width.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clusterns_ray.errors import DataError, first_line
from clusterns_ray.io.files import checksum_holds, with_checksum

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT = 1
METADATA = "clusterns_ray"
"""The key of a file's metadata that holds, as JSON, what it was made with."""


def embedding_schema(width: int, dtype: str, info: dict[str, Any]) -> pa.Schema:
    import pyarrow as pa

    value = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
    columns = [
        pa.field("text", pa.string(), nullable=False),
        pa.field("embedding", pa.list_(value, width), nullable=False),
    ]
    return pa.schema(columns, metadata={METADATA: json.dumps(with_checksum(info))})


def embedding_table(texts: list[str], stored_ND: np.ndarray, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    values = pa.array(np.ascontiguousarray(stored_ND).reshape(-1))
    embedding = pa.FixedSizeListArray.from_arrays(values, type=schema.field("embedding").type)
    return pa.table([pa.array(texts, pa.string()), embedding], schema=schema)


def write_tables(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Write a parquet file, a row group for each table; embeddings uncompressed, as nothing would be gained."""
    import pyarrow.parquet as pq

    codecs: Any = {"text": "zstd", "embedding.list.element": "none"}
    options: Any = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    with pq.ParquetWriter(path, schema, compression=codecs, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How a file of embeddings was made.

    Raises:
        DataError: it is no parquet file, or not one that ``encode`` wrote.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
        info = json.loads(metadata[METADATA.encode()])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: it cannot be read as parquet ({first_line(error)})") from None
    except KeyError:
        raise DataError(f"{path}: `clusterns encode` did not write it, as its metadata has no {METADATA!r}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its metadata are damaged ({error}); encode again") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        written = info.get("format") if isinstance(info, dict) else info
        raise DataError(f"{path}: its format is {written!r}, and this version reads {FORMAT}; encode again")
    if "checksum" in info and not checksum_holds(info):
        raise DataError(f"{path}: its metadata are damaged (their checksum is another); encode again")
    return info


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of reading an embedding file as DataError: pages have checksums, which are compared when they are read."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = first_line(error)
        raise DataError(f"{path}: it is damaged ({reason[:200]}). Restore it from a copy, or encode again.") from None


class EmbeddingFile:
    """A file that ``encode`` wrote, read by row, a row group at a time; its texts are memory-mapped.

    Raises:
        DataError: it is not such a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import pyarrow.parquet as pq

        self.path = Path(path)
        self.info = read_info(path)
        with readable(path):
            self._texts = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
            metadata = self._texts.metadata
            # Not mapped, so that a pass over all of them leaves nothing in memory.
            self._embeddings = pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True)
            size = self._texts.schema_arrow.field("embedding").type.list_size
            if size != self.info["width"]:
                raise ValueError(f"its embeddings have {size} values, and {self.info['width']!r} were written")
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """D, the number of values in an embedding."""
        return self.info["width"]

    def verify(self) -> None:
        """Read all of it and compare checksums.

        Raises:
            DataError: it is damaged.
        """
        for group in range(len(self._starts) - 1):
            for name in ("text", "embedding"):
                self._column(self._embeddings, group, name)

    def blocks(self, rows: int = 16_384) -> Iterator[np.ndarray]:
        """All embeddings in order, float32 ``(n, D)``, about ``rows`` at a time."""
        waiting: list[np.ndarray] = []
        for group in range(len(self._starts) - 1):
            waiting.append(self._vectors(group))
            if sum(map(len, waiting)) >= rows:
                yield np.concatenate(waiting)
                waiting = []
        if waiting:
            yield np.concatenate(waiting)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """The embeddings of rows in any order: int64 ``(n,)`` to float32 ``(n, D)``."""
        z_nD = np.empty((len(rows), self.width), dtype=np.float32)
        for group, places, local in self._by_group(rows):
            z_nD[places] = self._vectors(group)[local]
        return z_nD

    def texts(self, rows: np.ndarray) -> list[str]:
        """The sentences of rows in any order: int64 ``(n,)``."""
        texts = [""] * len(rows)
        for group, places, local in self._by_group(rows):
            column = self._column(self._texts, group, "text")
            for place, text in zip(places.tolist(), column.take(local).to_pylist()):
                texts[place] = text
        return texts

    def _vectors(self, group: int) -> np.ndarray:
        column = self._column(self._embeddings, group, "embedding").combine_chunks()
        return column.flatten().to_numpy().reshape(-1, self.width).astype(np.float32, copy=False)

    def _column(self, file: pq.ParquetFile, group: int, name: str) -> pa.ChunkedArray:
        with readable(self.path):
            column = file.read_row_group(group, columns=[name]).column(0)
            rows = int(self._starts[group + 1] - self._starts[group])
            if len(column) != rows:
                raise ValueError(f"row group {group} has {len(column)} values of {name!r} for {rows} rows")
        return column

    def _by_group(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Row groups that hold ``rows``: the group, places within ``rows``, and row numbers within the group."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} were asked for, of {len(self)}")
        groups = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(groups, kind="stable")
        bounds = np.flatnonzero(np.diff(groups[order], prepend=-1, append=-1))
        for start, stop in itertools.pairwise(bounds):
            places = order[start:stop]
            group = int(groups[places[0]])
            yield group, places, rows[places] - self._starts[group]
