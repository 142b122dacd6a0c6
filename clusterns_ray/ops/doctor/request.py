"""What can be found wrong with a configuration on this machine, without Ray: its values, its data, its encoder's size.

Each function returns findings, and refuses by raising, as everything else here does; nothing is written.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from clusterns_ray.config import Config
from clusterns_ray.data.corpus import ReadCounts, list_sources, read_sentences
from clusterns_ray.data.documents import list_documents
from clusterns_ray.data.prepare import cache_directory, corpus_is_documents, documents_of
from clusterns_ray.data.sampler import steps_per_epoch
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.launch.preflight import check_data, check_lasting, check_name, check_trackers
from clusterns_ray.launch.staging import read_run_file
from clusterns_ray.ops.doctor.findings import Finding, size_text
from clusterns_ray.ops.doctor.hub import AWAY, find_dataset, find_model, settings_of
from clusterns_ray.ops.estimates import ModelSize, TextSample, corpus_rows, model_size, sample_text

SAMPLE_ROWS = 1000
"""Sentences of the corpus that are read, and tell how long the others are."""

COMPRESSION = 4
"""How much larger text is than a compressed file or parquet of it, about."""


@dataclass(frozen=True)
class Request:
    """What is asked of the cluster: one run, or the trials of a study."""

    config: Config
    study: bool = False
    concurrent: int = 1
    """runs at the same time"""

    @property
    def on_ray(self) -> bool:
        return self.study or self.config.runtime.num_workers != 0

    @property
    def fewest(self) -> int:
        """Workers without which a run cannot start."""
        return self.config.runtime.worker_counts()[0]

    @property
    def most(self) -> int:
        return self.config.runtime.worker_counts()[-1]

    @property
    def needs_state_api(self) -> bool:
        """Trials with workers of their own are watched through it."""
        return self.study and self.config.runtime.num_workers != 0


@dataclass
class Sizes:
    """What the estimates are made of, as far as it could be found out."""

    model: ModelSize | None = None
    sample: TextSample | None = None
    rows: int | None = None


def examine_values(request: Request) -> list[Finding]:
    """How batch, shards, workers and clusters fit; the configuration itself refuses those that do not."""
    config = request.config
    train, k = config.train, config.clustering.num_clusters
    counts = config.runtime.worker_counts()
    workers = f"{counts[0]} to {counts[-1]} workers" if len(counts) > 1 else _count(counts[0], "worker")
    parts = [
        f"batch {train.global_batch_size} in {train.shards} shards of {train.global_batch_size // train.shards} rows",
        workers + ("" if request.on_ray else " in the process itself"),
        f"{k} clusters{' of the corpus' if config.clustering.scope == 'corpus' else ''}"
        if k
        else "no clusters (SimCSE)",
    ]
    if request.study:
        parts.append(f"{_count(request.concurrent, 'trial')} at a time")
    return [Finding("ok", "configuration", ", ".join(parts))]


def examine_name(config: Config) -> list[Finding]:
    """Whether the run's name is free, or its own."""
    check_name(config)
    name = config.runtime.name
    if read_run_file(config, "result.json") is not None:
        remedy = "Choose another runtime.name to train anew."
        return [Finding("warning", "name", f"{name!r} is finished, and would be left as it is", remedy)]
    if read_run_file(config, "config.yaml") is not None:
        return [Finding("ok", "name", f"{name!r} was begun with this configuration, and would go on")]
    return [Finding("ok", "name", f"{name!r} is free")]


def examine_storage_path(config: Config) -> list[Finding]:
    """Whether what is written outlasts the job; whether it can be written is asked of each node."""
    check_lasting(config)
    return []


def examine_trackers(config: Config) -> list[Finding]:
    check_trackers(config)
    return [Finding("ok", "trackers", ", ".join(config.runtime.trackers) or "none")]


def examine_corpus(config: Config) -> list[Finding]:
    """Whether the text is there and can be read, by its first rows; of a data set that is still to be downloaded,
    whether the hub has it."""
    corpus = config.data.corpus
    if corpus_is_documents(config):
        count = len(list_documents(documents_of(config) or ""))
        return [Finding("ok", "corpus", f"the sentences of {_count(count, 'document file')}")]
    assert corpus is not None
    for url in _hub_urls(config):
        away = find_dataset(url)
        if away is not None:
            return [Finding("ok", "corpus", away)]
    sources = list_sources(corpus)
    read = len(_first_sentences(config))
    if not read:
        raise ConfigError(f"data.corpus is {corpus!r}, which holds no text. Give a file with a sentence a line.")
    size = sum(source.size or 0 for source in sources)
    text = f"{_count(len(sources), 'source')}, {size_text(size)}; the first {read:,} sentences were read"
    return [Finding("ok", "corpus", text)]


def examine_dev_set(config: Config) -> list[Finding]:
    """Whether the dev set is there, and whole."""
    from clusterns_ray.evaluation.hub import HUB, check_hub, fetch_sts, hub_cache
    from clusterns_ray.evaluation.sts import read_pairs

    sts, dev = config.evaluation.sts, config.evaluation.dev
    if sts is None:
        remedy = "Set evaluation.sts, unless that is meant."
        return [Finding("warning", "dev set", "none, so the last step's model is exported and not the best", remedy)]
    if sts == "structure":
        count = len(list_documents(documents_of(config) or ""))
        return [Finding("ok", "dev set", f"{dev}, graded by the structure of {_count(count, 'document file')}")]
    if sts != "hf":
        directory = Path(sts).expanduser()
        return [Finding("ok", "dev set", f"{dev}, {len(read_pairs(directory, dev)):,} graded pairs in {directory}")]
    if dev not in HUB:
        check_data(config)  # which refuses it in words of its own
    for kept in (cache_directory(config) / "sts-hub", hub_cache()):
        if (kept / f"{dev}.jsonl").is_file():
            pairs = len(read_pairs(kept, dev))
            return [Finding("ok", "dev set", f"{dev}, {pairs:,} graded pairs from the hub, kept in {kept}")]
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        import tempfile

        with tempfile.TemporaryDirectory() as scratch:  # what the hub client has cached is read as a run would
            fetch_sts(Path(scratch), [dev])
        return [Finding("ok", "dev set", f"{dev}, in the hub's cache here")]
    check_hub([HUB[dev][0]])
    return [Finding("ok", "dev set", f"{dev}, to be downloaded from the hub, which answers")]


def examine_encoder(config: Config, sizes: Sizes) -> list[Finding]:
    """Whether the encoder is there and takes what is asked of it; its size, and that of the corpus in its tokens."""
    encoder = config.encoder
    where = find_model(encoder.name, encoder.revision)
    with settings_of(encoder.name, encoder.revision) if where == AWAY else nullcontext(encoder.name) as name:
        here = config.model_copy(update={"encoder": encoder.model_copy(update={"name": name})})
        sizes.model = model_size(here)
        _measure_text(here, sizes)
    size = f"{sizes.model.all:,} parameters, {_count(sizes.model.layers, 'layer')}, width {sizes.model.width}"
    found = [Finding("ok", "encoder", f"{size}; {where}")]
    if sizes.rows is not None and sizes.sample is not None:
        train = config.train
        steps = steps_per_epoch(sizes.rows, train.global_batch_size, train.shards) * train.epochs
        steps = min(steps, train.max_steps or steps)
        about = "" if sizes.sample.whole else "about "
        found.append(
            Finding(
                "ok",
                "steps",
                f"{about}{sizes.rows:,} sentences of {sizes.sample.mean_tokens:.1f} tokens, so {about}{steps:,} steps",
            )
        )
        if sizes.sample.whole and sizes.rows < train.global_batch_size:
            found[-1] = Finding(
                "problem",
                "steps",
                f"{sizes.rows:,} sentences, fewer than train.global_batch_size ({train.global_batch_size}): not one "
                "batch can be filled",
                "Give more text, or a smaller batch.",
            )
    return found


def _measure_text(config: Config, sizes: Sizes) -> None:
    """Without findings of its own: what is wrong with the corpus is found where it is examined."""
    from clusterns_ray.data.prepare import load_tokenizer
    from clusterns_ray.models.tokenization import tokenize

    if corpus_is_documents(config):
        return
    try:
        if any(find_dataset(url) for url in _hub_urls(config)):
            return
        sentences, size = _first_sentences(config), _text_bytes(config)
    except (ClusterNSError, OSError):
        return
    tokenizer, limit = load_tokenizer(config), config.data.limit
    sizes.sample = sample_text(
        sentences,
        len(sentences) < SAMPLE_ROWS or len(sentences) == limit,
        lambda texts: tokenize(texts, tokenizer, config.encoder.max_length, config.encoder.prompt)[0],
    )
    if sizes.sample is not None:
        sizes.rows = corpus_rows(sizes.sample, size, limit)


def _hub_urls(config: Config) -> list[str]:
    corpus = config.data.corpus or []
    return [url for url in ([corpus] if isinstance(corpus, str) else corpus) if url.startswith("hf://")]


def _first_sentences(config: Config) -> list[str]:
    assert config.data.corpus is not None
    limit = min(SAMPLE_ROWS, config.data.limit or SAMPLE_ROWS)
    text_column = config.data.text_column
    return list(read_sentences(config.data.corpus, text_column=text_column, limit=limit, counts=ReadCounts()))


def _text_bytes(config: Config) -> int | None:
    """Of the corpus as text; None where a source does not say."""
    sources = list_sources(config.data.corpus or "")
    if any(source.size is None for source in sources):
        return None
    packed = (".gz", ".bz2", ".zst", ".parquet")
    return sum((source.size or 0) * (COMPRESSION if source.path.lower().endswith(packed) else 1) for source in sources)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s'[: number != 1]}"
