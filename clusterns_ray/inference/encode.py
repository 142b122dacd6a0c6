"""``encode``: sentences to a parquet file of embeddings, in parts, so that an interrupted command goes on.

Beside OUT, ``OUT.parts/`` holds ``manifest.json`` and a file for each part of ``rows_per_part`` sentences; each appears
whole. When all are there they are joined into OUT, a row group each, and removed.
Shape suffixes: N sentences, D width.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clusterns_ray.config import POOLINGS
from clusterns_ray.data.corpus import ReadCounts, Source, list_sources, read_sentences
from clusterns_ray.errors import ClusterNSError, ConfigError, DataError
from clusterns_ray.inference.embedding_file import (
    FORMAT,
    EmbeddingFile,
    embedding_schema,
    embedding_table,
    read_info,
    write_tables,
)
from clusterns_ray.io.events import Note, OnEvent, RowsDone, notes_to
from clusterns_ray.io.files import check_writable, file_lock, replacing, write_json
from clusterns_ray.models.resolve import resolve_model

if TYPE_CHECKING:
    import pyarrow as pa

    from clusterns_ray.models.encoder import Encoder

DTYPES = ("float32", "float16")
ROWS_PER_PART = 1024
"""Sentences of a part: what a kill can lose, what memory holds, and what is sorted by length together."""

MANIFEST = "manifest.json"

Part = tuple[int, list[str]]
"""The number of a part, and its sentences."""

OnProgress = Callable[[int], None]
"""Called with how many sentences of the part at work are done."""


class EncodedPart(NamedTuple):
    """A part with its embeddings."""

    number: int
    texts: list[str]
    z_ND: np.ndarray
    """float32"""
    truncated: int
    """how many of the texts were cut to the encoder's ``max_length``"""


EncodeParts = Callable[["Encoder", Iterable[Part], int, OnProgress], Iterator[EncodedPart]]
"""Takes an encoder, parts, the batch size and a callback, which it may call; yields parts in any order."""


@dataclass(frozen=True)
class Encoded:
    """The file that :func:`encode_files` wrote, or that was there already (``reused``)."""

    path: Path
    rows: int
    width: int
    reused: bool


def encode_files(
    model: str,
    files: str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    text_column: str = "text",
    limit: int | None = None,
    dtype: str = "float32",
    batch_size: int = 64,
    pooling: str | None = None,
    max_length: int | None = None,
    normalize: bool = False,
    overwrite: bool = False,
    rows_per_part: int = ROWS_PER_PART,
    encode_parts: EncodeParts | None = None,
    on_event: OnEvent = lambda event: None,
) -> Encoded:
    """Write the sentences of ``files`` and their embeddings to the parquet file ``out``, in the order read.

    The file has the columns ``text`` (string) and ``embedding`` (list of fixed size D of ``dtype``), and in its
    metadata, under ``clusterns_ray``, a JSON of how it was made. The same call again goes on from the parts that an
    interrupted one finished, and leaves a finished file as it is.

    Args:
        files: as of ``data.corpus.read_sentences``.
        pooling, max_length: in place of the model's own.
        normalize: to unit length; a model that does so by itself does so in any case.
        overwrite: replace a file, or parts, that something else made.
        encode_parts: where the work is done; in this process if not given.
        on_event: called with notes, and with :class:`~clusterns_ray.io.events.RowsDone` after each batch or part.

    Raises:
        ConfigError, DataError: the request cannot work, or ``out`` belongs to another one.
        ClusterNSError: writing failed, or another process is writing ``out``; finished parts are kept.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    check_settings(dtype=dtype, batch_size=batch_size, pooling=pooling, max_length=max_length, limit=limit)
    resolve_model(model, notes_to(on_event))
    sources = list_sources(files)
    _check_out(out, sources)
    request = encode_request(
        model,
        sources,
        text_column=text_column,
        limit=limit,
        dtype=dtype,
        batch_size=batch_size,
        pooling=pooling,
        max_length=max_length,
        normalize=normalize,
    )
    parts_dir = out.with_name(f"{out.name}.parts")

    def finished_file() -> Encoded | None:
        if not out.exists():
            return None
        changes = _changes_of(out, request)
        if changes and not overwrite:
            raise ConfigError(
                f"-o {str(out)!r} is there already, and was not made by this request: {'; '.join(changes)}. Choose "
                "another file, or give --overwrite."
            )
        if changes:
            return None
        file = EmbeddingFile(out)
        try:
            file.verify()
        except DataError as error:
            if overwrite:
                return None
            raise ClusterNSError(f"{error} With --overwrite it is written again.") from None
        _remove(parts_dir)
        return Encoded(out, len(file), file.width, reused=True)

    finished = finished_file()
    if finished:
        return finished
    plan = {"request": request, "rows_per_part": rows_per_part, "versions": _versions()}
    _check_parts(parts_dir, plan, overwrite)
    total = _count(files, sources, text_column, limit, on_event)

    from clusterns_ray.models.encoder import Encoder

    # Before anything is written: what refuses the request leaves nothing behind.
    encoder = Encoder.load(model, pooling=pooling, max_length=max_length)
    try:
        with writer_lock(parts_dir, f"-o {str(out)!r}"):
            finished = finished_file()  # another process may have been quicker
            if finished:
                return finished
            _claim(parts_dir, plan, overwrite, on_event)
            try:
                return _encode(
                    encoder, model, files, out, parts_dir, plan, total, encode_parts or encode_here, on_event
                )
            except BaseException:
                if not _has_parts(parts_dir):  # so that nothing of a request that came to nothing stays
                    _remove(parts_dir)
                raise
    except OSError as error:
        raise ClusterNSError(
            f"{str(out)!r} cannot be written: {error.strerror or error}. Make room or give the rights, then give the "
            f"same command: it goes on from the parts in {str(parts_dir)!r}."
        ) from error


def writer_lock(directory: Path, what: str) -> AbstractContextManager[None]:
    """Hold ``directory`` as the one process that writes ``what``.

    Raises:
        ClusterNSError: another process holds it.
    """
    refusal = ClusterNSError(
        f"{what} is being written by another process. Let it finish, or end it; then give the same command."
    )
    return file_lock(directory / ".lock", refusal)


def encode_here(
    encoder: Encoder, parts: Iterable[Part], batch_size: int, on_progress: OnProgress = lambda rows: None
) -> Iterator[EncodedPart]:
    """Encode in this process, on the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        encoder.to("cuda")
    for part in parts:
        yield encode_part(encoder, part, batch_size, on_progress)


def encode_part(encoder: Encoder, part: Part, batch_size: int, on_progress: OnProgress | None = None) -> EncodedPart:
    """Encode the sentences of one part, and count those that are cut."""
    number, texts = part
    before = encoder.truncated
    z_ND = encoder.encode(texts, batch_size=batch_size, progress=on_progress)
    return EncodedPart(number, texts, z_ND, encoder.truncated - before)


def check_settings(
    *, dtype: str, batch_size: int, pooling: str | None, max_length: int | None, limit: int | None
) -> None:
    """Refuse values that cannot work, before torch is imported."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; it must be {' or '.join(DTYPES)}.")
    if pooling is not None and pooling not in POOLINGS:
        raise ConfigError(f"--pooling is {pooling!r}; it must be {', '.join(POOLINGS)}.")
    for option, value in (("--batch-size", batch_size), ("--max-length", max_length), ("--limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is {value}; it must be 1 or more.")


def encode_request(model: str, sources: Sequence[Source], **settings: Any) -> dict[str, Any]:
    """All that the embeddings depend on, as plain values; files by path, size and time of change."""
    from clusterns_ray.models.serialization import model_digest

    return {"digest": model_digest(model), "sources": [asdict(source) for source in sources], **settings}


def describe_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """List in words what differs between two requests; empty if nothing does."""
    changes = []
    for key in [*after, *(key for key in before if key not in after)]:
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if key == "digest":
            changes.append("the model is another one")
        elif key == "sources":
            changes.append(_changed_source(old or [], new or []))
        else:
            changes.append(f"--{key.replace('_', '-')} was {_value(old)} and is {_value(new)}")
    return changes


def _changed_source(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    old, new = ({source["path"]: source for source in sources} for sources in (before, after))
    for path in new:
        if path not in old:
            return f"{path} was not in the corpus"
        if new[path] != old[path]:
            return f"{path} has changed"
    gone = [path for path in old if path not in new]
    return f"{gone[0]} is no longer in the corpus" if gone else "the files are in another order"


def _value(value: Any) -> str:
    return "not given" if value is None else repr(value)


def _versions() -> dict[str, str]:
    """Packages that the last bits of an embedding depend on; parts of different versions are not mixed."""
    return {name: importlib.metadata.version(name) for name in ("clusterns-ray", "torch", "transformers", "tokenizers")}


def _check_out(out: Path, sources: Sequence[Source]) -> None:
    if out.suffix != ".parquet":
        raise ConfigError(f"-o is {str(out)!r}; embeddings are written as parquet, so its name must end in .parquet.")
    if str(out) in {source.path for source in sources}:
        raise ConfigError(f"-o {str(out)!r} is one of the files to encode. Choose another file.")
    check_writable(out, "-o")


def _changes_of(out: Path, request: dict[str, Any]) -> list[str]:
    try:
        return describe_changes(read_info(out)["request"], request)
    except DataError as error:
        return [str(error)]


def _read_plan(parts_dir: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads((parts_dir / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(plan, dict) and all(isinstance(plan.get(key), dict) for key in ("request", "versions"))
    return plan if whole and "rows_per_part" in plan else None


def _check_parts(parts_dir: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """Refuse parts of another request, and a directory that is none of ours."""
    if not parts_dir.exists():
        return
    saved = _read_plan(parts_dir)
    if saved is None:
        strange = [path.name for path in parts_dir.iterdir() if not path.name.startswith((".lock", f".{MANIFEST}"))]
        if strange:
            raise ConfigError(
                f"{str(parts_dir)!r}, where the parts belong, holds something else ({strange[0]}). Move it away, or "
                "choose another -o."
            )
    elif saved != plan and not overwrite and _has_parts(parts_dir):
        changes = describe_changes(saved["request"], plan["request"])
        changes += [
            f"{name} was {saved['versions'].get(name)} and is {version}"
            for name, version in plan["versions"].items()
            if saved["versions"].get(name) != version
        ]
        if saved["rows_per_part"] != plan["rows_per_part"]:
            changes.append(f"a part had {saved['rows_per_part']} rows and has {plan['rows_per_part']}")
        raise ConfigError(
            f"{str(parts_dir)!r} holds parts of an interrupted request that differs from this one: "
            f"{'; '.join(changes)}. Go back to that request to finish it, choose another -o, or give --overwrite to "
            "discard them."
        )


def _claim(parts_dir: Path, plan: dict[str, Any], overwrite: bool, on_event: OnEvent) -> None:
    """Make the directory of parts ours: of this plan, without what a killed process left half written."""
    _check_parts(parts_dir, plan, overwrite)
    saved = _read_plan(parts_dir)
    if saved is not None and saved != plan and _has_parts(parts_dir):
        on_event(Note(f"Discarding the parts in {parts_dir}, which another request made."))
    for path in parts_dir.iterdir():
        if path.name != ".lock" and (saved != plan or path.name.startswith(".")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if saved != plan:
        write_json(parts_dir / MANIFEST, plan)


def _has_parts(parts_dir: Path) -> bool:
    return any(parts_dir.glob("part-*.parquet"))


def _remove(parts_dir: Path) -> None:
    """Remove parts that are no longer needed. What shows that they are ours goes last, so that a kill loses nothing."""
    if _read_plan(parts_dir) is not None:
        for path in parts_dir.glob("*part-*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(parts_dir, ignore_errors=True)


def _count(
    files: str | Sequence[str], sources: Sequence[Source], text_column: str, limit: int | None, on_event: OnEvent
) -> int | None:
    """How many sentences there are, so that the time left is known, and a malformed file before the work begins.

    What is not on a disk is not read twice: then it is the limit, or None.
    """
    if any("://" in source.path for source in sources):
        return limit
    on_event(Note(f"Counting the sentences of {_names(files)}"))
    counts = ReadCounts()
    total = sum(1 for _ in read_sentences(files, text_column=text_column, limit=limit, counts=counts))
    if not total:
        raise DataError(f"{_names(files)}: no sentence in {counts.rows:,} rows, so there is nothing to encode.")
    empty = f"; {counts.empty:,} empty rows skipped" if counts.empty else ""
    cut = f"; {counts.cut:,} over-long rows cut" if counts.cut else ""
    on_event(Note(f"{total:,} sentences{empty}{cut}"))
    return total


def _names(files: str | Sequence[str]) -> str:
    return files if isinstance(files, str) else ", ".join(map(str, files))


def _encode(
    encoder: Encoder,
    model: str,
    files: str | Sequence[str],
    out: Path,
    parts_dir: Path,
    plan: dict[str, Any],
    total: int | None,
    encode_parts: EncodeParts,
    on_event: OnEvent,
) -> Encoded:
    request = plan["request"]
    width, unit = encoder.width, bool(encoder.normalize or request["normalize"])
    info = {
        "format": FORMAT,
        "model": str(Path(model).expanduser().absolute()) if Path(model).expanduser().is_dir() else model,
        "digest": request["digest"],
        "width": width,
        "dtype": request["dtype"],
        "normalize": unit,
        "pooling": encoder.pooling,
        "max_length": encoder.max_length,
        "request": request,
    }
    schema = embedding_schema(width, request["dtype"], info)
    sentences = read_sentences(
        files,
        text_column=request["text_column"],
        limit=request["limit"],
        counts=ReadCounts(),
        sources=[Source(**source) for source in request["sources"]],
    )
    progress = EncodingProgress(total, on_event)
    parts = truncated = 0

    def missing() -> Iterator[Part]:
        nonlocal parts
        for parts, texts in enumerate(_cut(sentences, plan["rows_per_part"]), 1):
            if _holds(_part_path(parts_dir, parts - 1), texts, schema):
                progress.kept(len(texts))
            else:
                yield parts - 1, texts

    with closing(encode_parts(encoder, missing(), request["batch_size"], progress.working)) as done:  # type: ignore[type-var]
        for number, texts, z_ND, cut in done:
            truncated += cut
            first = number * plan["rows_per_part"]
            table = embedding_table(texts, _finish(z_ND, unit, request["dtype"], first), schema)
            with replacing(_part_path(parts_dir, number)) as path:
                write_tables(path, [table], schema)
            progress.encoded(len(texts))
    if not parts:
        raise DataError(f"{_names(files)}: there is no sentence to encode.")
    if truncated:
        on_event(Note(encoder.describe_truncation(truncated, progress.new)))
    on_event(Note(f"Joining {parts:,} parts"))
    with replacing(out, parts_dir) as path:  # where a kill's leftovers are cleared away
        write_tables(path, (_read_part(_part_path(parts_dir, number)) for number in range(parts)), schema)
    _remove(parts_dir)
    return Encoded(out, progress.rows, width, reused=False)


def _cut(sentences: Iterator[str], rows: int) -> Iterator[list[str]]:
    while texts := list(itertools.islice(sentences, rows)):
        yield texts


def _part_path(parts_dir: Path, number: int) -> Path:
    return parts_dir / f"part-{number:06d}.parquet"


def _finish(z_ND: np.ndarray, unit: bool, dtype: str, first: int) -> np.ndarray:
    """Embeddings as they are stored; those that hold NaN or infinity are refused."""
    if unit:
        z_ND = unit_rows(z_ND)
    with np.errstate(over="ignore"):
        stored_ND = z_ND.astype(dtype)
    broken = np.flatnonzero(~np.isfinite(stored_ND).all(axis=1))
    if len(broken):
        kind = "NaN or infinite" if not np.isfinite(z_ND[broken[0]]).all() else f"beyond what {dtype} holds"
        remedy = "The model's weights are damaged." if kind.startswith("NaN") else "Use --dtype float32 or --normalize."
        raise ClusterNSError(f"The embedding of sentence {first + broken[0] + 1:,} is {kind}. {remedy}")
    return stored_ND


def unit_rows(z_ND: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32; a row of zeros stays."""
    z_ND = np.asarray(z_ND, dtype=np.float32)
    return z_ND / np.maximum(np.linalg.norm(z_ND, axis=1, keepdims=True), 1e-8)


def _read_part(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
        return file.read()


def _holds(path: Path, texts: list[str], schema: pa.Schema) -> bool:
    """Whether a part is there, whole (all of it is read, with its checksums), and of these very sentences."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir():  # as which nothing could take its place
        shutil.rmtree(path)
    if not path.exists():
        return False
    try:
        same = pq.read_schema(path).equals(schema, check_metadata=True)
        return same and _read_part(path).column("text").to_pylist() == texts
    except (OSError, pa.ArrowException, ValueError):
        return False


class EncodingProgress:
    """Counts the sentences that are done, and reports them as events with speed and time left."""

    def __init__(self, total: int | None, on_event: OnEvent) -> None:
        self.total, self.on_event = total, on_event
        self.rows = self.new = 0
        self.started = time.monotonic()

    def kept(self, rows: int) -> None:
        self.rows += rows
        self.working(0)

    def encoded(self, rows: int) -> None:
        self.new += rows
        self.kept(rows)

    def working(self, rows: int) -> None:
        rows, speed = self.rows + rows, (self.new + rows) / max(time.monotonic() - self.started, 1e-9)
        left = (self.total - rows) / speed if self.total and speed else None
        self.on_event(RowsDone("encoded", rows, self.total, speed, left))
