"""Semantic search: a corpus to an index on disk, and queries to answers.

An index is a directory: ``manifest.json``, ``index-00000.faiss`` and so on, and ``embeddings.parquet``, unless the
corpus is itself a file that ``encode`` wrote. Texts stay in the embeddings' file. All are memory-mapped: what a search
does not touch takes no memory.

Shape suffixes: Q queries, K answers, D width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray.data.corpus import ReadCounts, list_sources, read_sentences
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.inference.embedding_file import EmbeddingFile, read_info
from clusterns_ray.inference.encode import (
    check_settings,
    describe_changes,
    encode_files,
    encode_request,
    unit_rows,
    writer_lock,
)
from clusterns_ray.inference.faiss_index import RECALL_K, build_index, load_faiss, nearest, open_index, stamp_of
from clusterns_ray.io.events import OnEvent, notes_to
from clusterns_ray.io.files import (
    checksum_holds,
    json_text,
    remove_partial_files,
    sha256,
    storage_error,
    with_checksum,
    write_json,
)
from clusterns_ray.io.paths import CORPORA, Named, check_outlasts_job, check_path, job_package, names
from clusterns_ray.io.terminal import printable
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.models.settings import read_settings

FORMAT = 1
MANIFEST = "manifest.json"
EMBEDDINGS = "embeddings.parquet"
VERIFIED_BYTES = 256 << 20
"""Index files up to this size are compared with their checksum whenever the index is opened, which takes a second."""

OURS = (MANIFEST, EMBEDDINGS, f"{EMBEDDINGS}.parts", ".lock")


@dataclass(frozen=True)
class Hit:
    """One answer."""

    rank: int
    """from 1"""
    score: float
    """cosine similarity"""
    row: int
    """of the corpus, counted from 0 over its sentences"""
    text: str


class SemanticIndex:
    """A corpus to be searched by meaning.

    Examples:
        >>> index = SemanticIndex.build("runs/quickstart/model", "texts.txt", "texts.index")
        >>> index.search(["a boat on the river"], k=3)[0][0].text
    """

    def __init__(self, directory: str | os.PathLike[str], *, model: str | None = None) -> None:
        """Open an index, as :meth:`load` does."""
        self.directory = Path(os.path.abspath(Path(directory).expanduser()))
        load_faiss()
        manifest = _read_manifest(self.directory)
        if manifest is None or manifest["index"] is None:
            raise DataError(f"{str(self.directory)!r} holds no finished index. Build it: clusterns search, or `build`.")
        stale = _damage(self.directory, manifest)
        if stale:
            raise DataError(f"{str(self.directory)!r}: {stale} since the index was built. Build it again.")
        self.manifest = manifest
        self.model = model or manifest["model"]
        self.embeddings = EmbeddingFile(self.directory / manifest["embeddings"]["path"])
        self._index = open_index(self.directory, manifest["index"])
        self._encoder: Any = None

    # ---- making one -------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        model: Named,
        corpus: Named | Sequence[Named],
        directory: Named | None = None,
        *,
        text_column: str = "text",
        limit: int | None = None,
        batch_size: int = 64,
        pooling: str | None = None,
        max_length: int | None = None,
        rebuild: bool = False,
        on_event: OnEvent = lambda event: None,
    ) -> SemanticIndex:
        """Index a corpus, or find the index that was built before, if corpus, model and settings are the same.

        Args:
            model: an encoder as of :meth:`clusterns_ray.Encoder.load`.
            corpus: text, csv, jsonl or parquet: paths, globs, s3://, gs:// or hf://; or a file that ``encode`` wrote,
                which is not encoded again.
            directory: of the index; :func:`default_directory` if not given. There an outdated index is replaced; in a
                directory that was named, one of another model is not, unless ``rebuild``.
            rebuild: build the index anew; embeddings that are up to date are kept.
            on_event: called with what ``encode_files`` reports, and with
                :class:`~clusterns_ray.io.events.RowsDone` while the index is made.

        Raises:
            ConfigError, DataError: the request cannot work, faiss is missing, or ``directory`` is not ours.
            ClusterNSError: writing failed, or another process is building there; encoded parts are kept.
        """
        note = notes_to(on_event)
        model, corpus = os.fspath(model), [check_path("CORPUS", part, CORPORA) for part in names(corpus)]
        directory = None if directory is None else check_path("--index", directory, ())
        load_faiss()
        folder = Path(os.path.abspath(Path(directory or default_directory(corpus)).expanduser()))
        check_settings(dtype="float32", batch_size=batch_size, pooling=pooling, max_length=max_length, limit=limit)
        resolve_model(model, note)
        settings = {
            "text_column": text_column,
            "limit": limit,
            "dtype": "float32",
            "batch_size": batch_size,
            "pooling": pooling,
            "max_length": max_length,
            "normalize": False,
        }
        embeddings, request = _request(model, corpus, settings)
        _check_directory(folder)

        def up_to_date() -> bool:
            saved = _read_manifest(folder)
            if saved and saved["request"]["digest"] != request["digest"] and directory is not None and not rebuild:
                raise ConfigError(
                    f"--index {str(folder)!r} is of another model: {saved['model']!r} made it, and {model!r} is not "
                    "the same. Name that model, choose another directory, or replace it with --rebuild."
                )
            return saved is not None and not rebuild and not _outdated(folder, saved, request)

        built = False
        if not up_to_date():
            with writer_lock(_made(folder), f"The index in {str(folder)!r}"):
                if not up_to_date():  # another process may have been quicker
                    note(_why(folder, request))
                    try:
                        _build(model, corpus, embeddings, request, settings, folder, on_event)
                    except OSError as error:
                        remedy = "Then give the same command again: it goes on."
                        raise storage_error(error, folder, remedy) or error from error
                    built = True
        state = "Built:" if built else f"The index in {folder} is up to date:"
        note(f"{state} {_describe(_read_manifest(folder))}")
        if similarity := read_settings(resolve_model(model)).other_similarity:
            note(f"{model} is meant to be compared by {similarity}; search ranks by the cosine.")
        return cls(folder, model=model)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, model: str | None = None) -> SemanticIndex:
        """Open an index without looking whether its corpus has changed.

        Args:
            model: where the model is now, if it was moved; it is loaded when sentences are first searched for.

        Raises:
            DataError: there is no finished index, or its files have changed.
            ConfigError: faiss is missing.
        """
        return cls(directory, model=model)

    # ---- asking it --------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"{_describe(self.manifest)} in {self.directory}"

    def __len__(self) -> int:
        """How many sentences there are."""
        return len(self.embeddings)

    def search(self, queries: Sequence[str] | np.ndarray, k: int = 10) -> list[list[Hit]]:
        """The ``k`` sentences most similar to each query, the most similar first.

        Args:
            queries: sentences, or their embeddings (Q, D) by the index's model, of any length.

        Raises:
            ConfigError: no or an empty query, ``k`` that cannot be, embeddings of another width, or a model that is not
                the index's.
        """
        if isinstance(queries, str):
            raise TypeError("SemanticIndex.search takes a list of queries, and got one str; wrap it: search([text]).")
        check_k(k, len(self))
        if isinstance(queries, np.ndarray):
            z_QD = queries
            if not np.isfinite(z_QD).all():
                raise ConfigError("The queries hold NaN or infinity, to which nothing is similar.", "Leave those out.")
            if z_QD.ndim != 2 or z_QD.shape[1] != self.embeddings.width:
                raise ConfigError(
                    f"The queries are an array of shape {z_QD.shape}; this index takes (n, {self.embeddings.width})."
                )
        else:
            check_queries(queries)
            z_QD = self._encode(queries)
        scores_QK, rows_QK = nearest(self._index, self.manifest["index"], unit_rows(z_QD), k)
        wanted, place = np.unique(rows_QK[rows_QK >= 0], return_inverse=True)
        texts = self.embeddings.texts(wanted)
        text_numbers = iter(place.tolist())
        return [
            [
                Hit(rank, score, row, texts[next(text_numbers)])
                for rank, (score, row) in enumerate(zip(scores, rows), 1)
                if row >= 0
            ]
            for scores, rows in zip(scores_QK.tolist(), rows_QK.tolist())
        ]

    def _encode(self, queries: Sequence[str]) -> np.ndarray:
        if self._encoder is None:
            from clusterns_ray.models.encoder import Encoder
            from clusterns_ray.models.serialization import model_digest

            if model_digest(self.model) != self.manifest["request"]["digest"]:
                raise ConfigError(
                    f"{self.model!r} is not the model that made the index in {str(self.directory)!r}, or has changed "
                    "since. Name that model, or build the index again."
                )
            info = self.embeddings.info
            self._encoder = Encoder.load(self.model, pooling=info["pooling"], max_length=info["max_length"])
        return self._encoder.encode(list(queries))


def check_queries(queries: Sequence[str]) -> None:
    """Refuse queries to which nothing can be similar: none at all, an empty one, or one that is not text."""
    if not len(queries):
        raise ConfigError("There is no query. Give one sentence or more.")
    for number, query in enumerate(queries, 1):
        if not query.strip():
            raise ConfigError(f"Query {number} is {query!r}, which is empty. Give a sentence.")
        try:
            query.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"Query {number} is {query!r}, which is not text in UTF-8. Give it in UTF-8.") from None


def check_k(k: int, rows: int | None = None) -> None:
    """Refuse a number of answers that cannot be given."""
    if k < 1:
        raise ConfigError(f"-k is {k}; it must be 1 or more.")
    if rows is not None and k > rows:
        raise ConfigError(
            f"-k is {k}, but the corpus holds {rows:,} sentence{'s'[: rows != 1]}. Use at most -k {rows}."
        )


def default_directory(corpus: str | Sequence[str]) -> Path:
    """Where an index is kept if nobody says: ``FILE.index`` beside a corpus that is one file of this machine, in a
    directory that can be written to and lasts; else in ``~/.cache/clusterns_ray/search`` (or ``$XDG_CACHE_HOME``), by
    the name of the corpus.

    Raises:
        DataError: there is no such corpus.
    """
    sources = list_sources(corpus)
    path = Path(sources[0].path)
    lasts = "://" not in sources[0].path and job_package(path) is None
    if len(sources) == 1 and lasts and os.access(path.parent, os.W_OK):
        return path.with_name(f"{path.name}.index")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    names = [corpus] if isinstance(corpus, str) else list(corpus)
    full = [name if "://" in name else os.path.abspath(os.path.expanduser(name)) for name in names]
    mark = hashlib.sha256("\n".join(full).encode()).hexdigest()[:12]
    return cache / "clusterns_ray" / "search" / f"{path.name}-{mark}.index"


def _request(model: str, corpus: str | Sequence[str], settings: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """The file of embeddings, where the corpus is one, and all that the index depends on."""
    sources = list_sources(corpus)
    request = encode_request(model, sources, **settings)
    path = Path(sources[0].path)
    # So that a wrong column is noticed before anything is made.
    next(read_sentences(corpus, text_column=settings["text_column"], limit=1, counts=ReadCounts()), None)
    if len(sources) > 1 or path.suffix != ".parquet" or not path.is_file():
        return None, request
    try:
        info = read_info(path)
    except DataError:  # text in parquet
        return None, request
    if info["digest"] != request["digest"]:
        raise ConfigError(
            f"{str(path)!r} holds embeddings of another model: {info['model']!r} made them, and {model!r} is not the "
            "same. Name that model, or encode the text with this one."
        )
    for option in ("text_column", "limit", "pooling", "max_length"):
        if settings[option] != (None if option != "text_column" else "text"):
            raise ConfigError(
                f"--{option.replace('_', '-')} has no meaning for {str(path)!r}, which is encoded already. Leave it "
                "out."
            )
    return path, {"digest": request["digest"], "sources": request["sources"]}


def _outdated(folder: Path, manifest: dict[str, Any], request: dict[str, Any]) -> list[str]:
    """List in words why an index cannot be used; empty if it can."""
    if manifest["index"] is None:
        return ["it was not finished", *describe_changes(manifest["request"], request)]
    damage = _damage(folder, manifest)
    return describe_changes(manifest["request"], request) or ([damage] if damage else [])


def _why(folder: Path, request: dict[str, Any]) -> str:
    saved = _read_manifest(folder)
    if saved is None:
        begun = any((folder / name).exists() for name in (EMBEDDINGS, f"{EMBEDDINGS}.parts"))
        return f"Building the index in {folder}" + (" anew: it was not finished, or is damaged." if begun else "")
    return f"Building the index in {folder} anew: {'; '.join(_outdated(folder, saved, request)) or 'as asked for'}."


def _build(
    model: str,
    corpus: str | Sequence[str],
    embeddings: Path | None,
    request: dict[str, Any],
    settings: dict[str, Any],
    folder: Path,
    on_event: OnEvent,
) -> None:
    """Encode the corpus, unless ``embeddings`` are given, and index it; after a kill the next call goes on."""
    remove_partial_files(folder, [MANIFEST])
    if embeddings is None:  # first, as it refuses what cannot be encoded
        embeddings = folder / EMBEDDINGS
        encode_files(model, corpus, embeddings, overwrite=True, on_event=on_event, **settings)
    manifest = {"format": FORMAT, "model": _absolute(model), "request": request, "embeddings": None, "index": None}
    write_json(folder / MANIFEST, with_checksum(manifest))
    for old in folder.glob("*index-*.faiss*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    manifest["embeddings"] = stamp_of(embeddings, folder)
    manifest["index"] = build_index(EmbeddingFile(embeddings), folder, on_event)
    write_json(folder / MANIFEST, with_checksum(manifest))


def _absolute(model: str) -> str:
    path = Path(model).expanduser()
    return os.path.abspath(path) if path.is_dir() else model


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--index {str(folder)!r} cannot be made: {error.strerror}. Choose a directory that can be."
        ) from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--index {str(folder)!r} cannot be written to. Choose a directory that can be.")
    return folder


def _check_directory(folder: Path) -> None:
    """Refuse a directory that holds something else, or does not last."""
    check_outlasts_job("--index", folder)
    if folder.is_dir() and not (folder / MANIFEST).exists():
        strange = [
            path.name
            for path in folder.iterdir()
            if path.name not in OURS and not path.name.startswith(".") and not path.match("index-[0-9]*.faiss")
        ]
        if strange:
            raise ConfigError(
                f"--index {str(folder)!r} holds something else ({strange[0]}). Choose a new or empty directory."
            )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if checksum_holds(manifest) and manifest["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _damage(folder: Path, manifest: dict[str, Any]) -> str | None:
    """What has happened to the files of a finished index; None if nothing."""
    digests = manifest["index"]["sha256"]
    for stamp in (manifest["embeddings"], *manifest["index"]["files"]):
        path = folder / stamp["path"]
        if not path.is_file():
            return f"{path.name} is gone"
        same = stamp_of(path, folder) == stamp
        # A large file is not read for one search; what has changed it has changed its time, but for a failing disk.
        if same and stamp["path"] in digests and stamp["size"] <= VERIFIED_BYTES:
            same = sha256(path) == digests[stamp["path"]]
        if not same:
            return f"{path.name} has changed"
    return None


def _describe(manifest: dict[str, Any] | None) -> str:
    assert manifest is not None
    index = manifest["index"]
    text = f"{index['rows']:,} sentences, {index['bytes_per_embedding']:,} bytes each, "
    if index["kind"] == "flat":
        return text + "exact search"
    return (
        f"{text}{index['lists']:,} lists of which a search reads {index['nprobe']}: recall@{RECALL_K} "
        f"{index['recall']:.3f} on {index['recall_queries']} of them"
    )


def hits_as_json(query: str, hits: Sequence[Hit]) -> str:
    """One line: ``{"query", "hits": [{"rank", "score", "row", "text"}]}``."""
    return json_text({"query": query, "hits": [asdict(hit) for hit in hits]}, indent=None).rstrip()


def hits_as_text(query: str, hits: Sequence[Hit]) -> str:
    """The query, and a line each: rank, score, sentence; for a terminal, so without its escape sequences."""
    lines = [f"{hit.rank:3}  {hit.score:6.3f}  {' '.join(printable(hit.text).split())}" for hit in hits]
    return "\n".join([f'"{printable(query)}"', *lines])
