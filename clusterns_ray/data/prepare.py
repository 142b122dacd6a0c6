"""``prepare``: text to tokenised shards, and documents to a structure-graded dev set; both once, then reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clusterns_ray.config import Config, DataConfig
from clusterns_ray.data import pieces
from clusterns_ray.data.corpus import ReadCounts, Source, check_unchanged, list_files, list_sources, read_corpus
from clusterns_ray.data.document import Boundary, Document, Sentence
from clusterns_ray.data.documents import all_sentences, document_sources, is_usable, read_documents
from clusterns_ray.data.pieces import Part, cut_corpus, read_parts
from clusterns_ray.data.positives import check_columns, check_positives
from clusterns_ray.data.structure import write_structure_dev
from clusterns_ray.data.token_store import TokenSettings, TokenStore, prepare_tokens, reuse_tokens
from clusterns_ray.errors import ConfigError
from clusterns_ray.evaluation.hub import fetch_sts
from clusterns_ray.evaluation.lee import LEE
from clusterns_ray.io.events import OnEvent, OnNote, RowsDone, notes_to
from clusterns_ray.io.object_store import Place, Store, is_url, local_copy
from clusterns_ray.models.resolve import resolve_model

STRUCTURE_SEED = 0
"""Not the run's seed: runs of different seeds have to be judged by the same pairs."""


@dataclass(frozen=True)
class Prepared:
    """What training reads."""

    tokens_dir: Path
    sts_dir: str | None
    """the dev set's directory, absolute; None without one"""
    manifest: dict[str, Any]
    reused: bool
    address: str = ""
    """where the tokens are, if they are not in ``tokens_dir`` yet, but in an object store"""


@dataclass(frozen=True)
class TokenJob:
    """A corpus of sentences that is to be tokenised."""

    data: DataConfig
    parts: list[Part]
    settings: TokenSettings
    fingerprint: dict[str, Any]
    cache: Place
    """the directory of the token store: in an object store where that is what all machines see"""
    name: str
    """of the token store in it"""

    def check_unchanged(self) -> None:
        """Refuse files that are no longer what they were when the store was named.

        Raises:
            DataError: one has changed.
        """
        check_unchanged(
            [Source(**source) for source in self.fingerprint["corpus"]], list_sources(self.data.corpus or "")
        )


Tokenise = Callable[[TokenJob, OnEvent], tuple[dict[str, Any], bool]]
"""Makes the tokens of a job, or finds them (then True); returns the manifest."""


def cache_directory(config: Config) -> Path:
    """Where prepared data is kept: ``data.cache_dir``, else ``STORAGE_PATH/cache`` (its local copy)."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir).expanduser().resolve()
    return local_copy(config.runtime.storage_path, config.runtime.local_path) / "cache"


def documents_of(config: Config) -> str | list[str] | None:
    """What names the documents, where sentences or the dev set come from documents."""
    return config.data.documents or ("demo" if config.data.corpus == "demo" else None)


def corpus_is_documents(config: Config) -> bool:
    return config.data.corpus is None or config.data.corpus == "demo"


def prepare(config: Config, on_event: OnEvent = lambda event: None, tokenise: Tokenise | None = None) -> Prepared:
    """Make, or find again, the token shards and the dev set that ``config`` asks for.

    Args:
        on_event: called with a note for each thing that is done, and with the number of sentences tokenised.
        tokenise: where a corpus of sentences is tokenised; in this process if not given.

    Raises:
        ConfigError, DataError: the encoder, the corpus or the documents cannot be used.
    """
    note = notes_to(on_event)
    cache = cache_directory(config)
    spec = documents_of(config)
    document_files = document_sources(spec or [])
    documents: list[Document] | None = None

    def read() -> list[Document]:
        nonlocal documents
        assert spec is not None
        if documents is None:
            note(f"Reading documents from {spec}")
            documents = list(read_documents(spec, config.data.text_column))
        check_unchanged(document_files, document_sources(spec))
        return documents

    sts_dir = config.evaluation.sts
    names = [config.evaluation.dev, *config.evaluation.also]
    if sts_dir == "hf":  # first, so that a machine without a network fails at once
        sts_dir = str(fetch_sts(cache / "sts-hub", [name for name in names if name != LEE], note))
    tokenizer = load_tokenizer(config)
    check_teacher(config, tokenizer)
    check_columns(config)
    fingerprint = corpus_fingerprint(config, tokenizer)
    place, name = _cache_place(config), f"tokens-{_short_hash(fingerprint)}"
    tokens_dir, address = place.local / name, ""
    settings = TokenSettings(tokenizer, config.encoder.max_length, config.encoder.prompt)
    store = reuse_tokens(tokens_dir, fingerprint)
    if store is None and tokenise is None and place.store and place.store.pull_directory(name, tokens_dir, note):
        store = reuse_tokens(tokens_dir, fingerprint)
    reused = store is not None
    if store is not None:
        manifest = store.manifest
    elif tokenise is not None and not corpus_is_documents(config):
        manifest, reused = tokenise(_token_job(config, fingerprint, settings, place, name), on_event)
        address = (place / name).address if place.store else ""
    else:
        if tokenise is not None:
            note("The sentences of documents are tokenised in this process, as documents are read as a whole.")
        note(f"Tokenising {config.data.corpus or config.data.documents}")
        if corpus_is_documents(config):
            counts = ReadCounts()
            parts = iter([(training_sentences(config, counts, read=read), counts)])
        else:
            parts = read_job(_token_job(config, fingerprint, settings, place, name))
        manifest = prepare_tokens(
            parts,
            settings,
            directory=tokens_dir,
            fingerprint=fingerprint,
            progress=lambda rows: on_event(RowsDone("tokenised", rows)),
        ).manifest
    check_positives(config, manifest)
    if sts_dir == "structure":
        assert spec is not None
        pairs, column = config.evaluation.structure_pairs, config.data.text_column
        sts_dir = str(structure_dev_set(spec, cache, pairs=pairs, text_column=column, note=note, read=read))
    elif sts_dir is not None:
        sts_dir = str(Path(sts_dir).expanduser().resolve())
    return Prepared(tokens_dir, sts_dir, manifest, reused, address)


def read_job(job: TokenJob) -> Iterator[tuple[Iterator[Sentence], ReadCounts]]:
    """The sentences of a job, a part at a time; at their end its files have to be what they were."""
    yield from read_parts(job.parts, job.data.text_column, job.data.document_column, job.data.limit)
    job.check_unchanged()


def training_sentences(
    config: Config,
    counts: ReadCounts,
    read: Callable[[], Iterable[Document]] | None = None,
) -> Iterator[Sentence]:
    """The sentences that a run trains on, in the order of its corpus.

    Args:
        counts: updated as rows are read.
        read: gives the documents where they have been read before.

    Raises:
        ConfigError, DataError: the corpus is not there, or cannot be read.
    """
    if corpus_is_documents(config):
        documents = read() if read else read_documents(documents_of(config) or [], config.data.text_column)
        return _usable_sentences(documents, counts, config.data.limit)
    assert config.data.corpus is not None
    return read_corpus(
        config.data.corpus,
        text_column=config.data.text_column,
        document_column=config.data.document_column,
        limit=config.data.limit,
        counts=counts,
    )


def structure_dev_set(
    documents: str | list[str],
    cache: Path,
    *,
    pairs: int,
    text_column: str = "text",
    note: OnNote = lambda text: None,
    read: Callable[[], list[Document]] | None = None,
) -> Path:
    """Make, or find again, the pairs of sentences graded by the structure of ``documents``.

    Args:
        cache: the directory in which the set is kept, under a name that the files, the column and the number of pairs
            decide.
        read: gives the documents where they have been read before.

    Returns:
        The directory that holds ``STRUCTURE/dev.jsonl``.

    Raises:
        ConfigError, DataError: the documents are not there, or hold too little text.
    """
    files = document_sources(documents)
    identity = {"documents": [asdict(file) for file in files], "pairs": pairs, "seed": STRUCTURE_SEED}
    if text_column != "text":  # only then, so that sets made before are found again
        identity["text_column"] = text_column
    directory = cache / f"structure-{_short_hash(identity)}"
    if not (directory / "STRUCTURE" / "dev.jsonl").is_file():
        note("Grading pairs of sentences by where they stand in their documents")
        parsed = read() if read is not None else list(read_documents(documents, text_column))
        check_unchanged(files, document_sources(documents))
        write_structure_dev(parsed, directory, pairs=pairs, seed=STRUCTURE_SEED)
    return directory


def most_rows(config: Config) -> int | None:
    """How many sentences the corpus has at most, as far as that is known without reading it; else None."""
    known = [config.data.limit] if config.data.limit is not None else []
    if not corpus_is_documents(config):
        paths = [source.path for source in list_sources(config.data.corpus or "")]
        if all("://" not in path and path.lower().endswith(".parquet") for path in paths):
            import pyarrow.parquet as pq

            with suppress(Exception):  # what is wrong with the file is reported when it is read
                known.append(sum(pq.read_metadata(path).num_rows for path in paths))
    return min(known, default=None)


def check_batch(config: Config, rows: int | None) -> None:
    """Refuse a batch larger than the corpus; ``rows`` is None where that is not known.

    Raises:
        ConfigError: it names both figures.
    """
    batch, shards = config.train.global_batch_size, config.train.shards
    if rows is None or batch <= rows:
        return
    largest = rows // shards * shards
    remedy = f"Set it to {largest:,} or a smaller multiple of train.shards ({shards}), or give more text."
    if not largest:
        remedy = f"Give more text, or lower it and train.shards ({shards})."
    raise ConfigError(
        f"train.global_batch_size is {batch:,}, but the corpus has {rows:,} sentences, so not one batch can be filled. "
        f"{remedy}"
    )


def check_teacher(config: Config, tokenizer: Any) -> None:
    """Refuse a teacher that cannot read the encoder's tokens.

    Raises:
        ConfigError: it is not there, or has another tokenizer or prompt.
    """
    name = config.loss.teacher
    if name is None:
        return
    from clusterns_ray.models.settings import read_settings
    from clusterns_ray.models.tokenization import load_tokenizer

    source = resolve_model(name)
    if load_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"loss.teacher is {name!r}, whose tokenizer is not that of {config.encoder.name!r}; it reads the tokens of "
            "the batch as they are. Name an encoder of the same family, such as the model/ of an earlier run."
        )
    prompt = read_settings(source).prompt
    if prompt != config.encoder.prompt:
        raise ConfigError(
            f"loss.teacher is {name!r}, which was trained with the prompt {prompt!r}, but encoder.prompt is "
            f"{config.encoder.prompt!r}, and both read the same tokens. Use one prompt, or a teacher of this one."
        )


def load_tokenizer(config: Config) -> Any:
    """The encoder's tokenizer, without its weights."""
    from clusterns_ray.models.tokenization import load_tokenizer

    return load_tokenizer(resolve_model(config.encoder.name), revision=config.encoder.revision)


def corpus_fingerprint(config: Config, tokenizer: Any) -> dict[str, Any]:
    """What the token shards depend on; files by path, size and time of change."""
    is_documents = corpus_is_documents(config)
    sources = document_sources(documents_of(config) or []) if is_documents else list_sources(config.data.corpus or "")
    return {
        "corpus": [asdict(source) for source in sources],
        "text_column": config.data.text_column,
        "document_column": config.data.document_column,
        "limit": config.data.limit,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "max_length": config.encoder.max_length,
        "prompt": config.encoder.prompt,
    }


def _token_job(
    config: Config, fingerprint: dict[str, Any], settings: TokenSettings, cache: Place, name: str
) -> TokenJob:
    files = list_files(config.data.corpus or "")
    parts = cut_corpus(files, config.data.document_column, pieces.PART_BYTES)
    return TokenJob(config.data, parts, settings, fingerprint, cache, name)


def _cache_place(config: Config) -> Place:
    """Where prepared data is kept: with the runs, unless ``data.cache_dir`` says otherwise."""
    path = config.runtime.storage_path
    store = Store(path) / "cache" if config.data.cache_dir is None and is_url(path) else None
    return Place(cache_directory(config), store)


def describe(store: TokenStore | dict[str, Any]) -> str:
    """One line on what a corpus holds, and what was left out of it."""
    manifest = store.manifest if isinstance(store, TokenStore) else store
    counts = manifest["counts"]
    parts = [f"{manifest['rows']:,} sentences, {manifest['tokens']:,} tokens (mean {manifest['mean_length']:.1f})"]
    if 1 < manifest["documents"] < manifest["rows"]:
        parts.append(f"{manifest['documents']:,} documents, {manifest['alone']:,} sentences alone in their section")
    for key, text in (
        ("empty", "{:,} empty rows skipped"),
        ("unusable", "{:,} sentences of documents skipped (not of 4 to 60 words, with markup, or unfinished)"),
        ("cut", "{:,} over-long rows cut"),
        ("truncated", "{:,} sentences cut to max_length"),
        ("without_tokens", "{:,} rows without tokens skipped"),
        ("unknown", "{:,} sentences of which the tokenizer knows no token, so that they look alike"),
        ("repeated", "{:,} sentences repeat an earlier one"),
    ):
        if counts.get(key):
            parts.append(text.format(counts[key]))
    return "; ".join(parts)


def _usable_sentences(documents: Iterable[Document], counts: ReadCounts, limit: int | None) -> Iterator[Sentence]:
    for document in documents:
        begins = Boundary.NONE  # with the next usable sentence: what skipped ones have begun is begun by it
        for text, boundary in all_sentences(document):
            if limit is not None and counts.kept >= limit:
                return
            counts.rows += 1
            begins = max(begins, boundary)
            if is_usable(text):
                counts.kept += 1
                yield Sentence(text, begins)
                begins = Boundary.NONE
            else:
                counts.unusable += 1


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
