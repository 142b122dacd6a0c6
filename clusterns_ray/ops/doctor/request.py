"""Checks of a configuration on this machine, without Ray: those of ``launch/preflight.py``, and what takes longer.

Each function returns findings, and refuses by raising, as everything else here does; nothing is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from clusterns_ray.config import Config
from clusterns_ray.data.corpus import ReadCounts, list_sources, read_corpus
from clusterns_ray.data.documents import list_documents
from clusterns_ray.data.prepare import (
    cache_directory,
    check_batch,
    check_teacher,
    corpus_is_documents,
    documents_of,
    load_tokenizer,
    most_rows,
)
from clusterns_ray.errors import ConfigError
from clusterns_ray.launch.capacity import ClusterCapacity
from clusterns_ray.launch.estimates import ModelSize, model_size
from clusterns_ray.launch.preflight import check_encoder, check_name, check_sts
from clusterns_ray.launch.staging import read_run_file
from clusterns_ray.ops.doctor.findings import Finding, count_text, ok, size_text, warning
from clusterns_ray.ops.doctor.hub import ON_THE_HUB, find_dataset, find_model, settings_of

SAMPLE_ROWS = 1000
"""Sentences of the corpus that are read, where a batch has no more."""

COMPRESSION = 4
"""About how many times larger text is than a compressed file or parquet of it."""


@dataclass(frozen=True)
class Request:
    """What the cluster has to run: one run, or the trials of a study."""

    config: Config
    study: bool = False
    concurrent: int = 1
    """Runs at the same time."""
    shared_by: int = 1
    """Runs that share a GPU."""
    choose_shared_by: Callable[[int, ClusterCapacity], tuple[int, str]] | None = None
    """How many share one, and why, by the memory of the smallest GPU and what the nodes hold, where `auto` asks for
    that."""

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
    """What the estimates of memory and disk are made of; None where it is not known (yet)."""

    model: ModelSize | None = None
    text_bytes: int | None = None
    """Approximate bytes of the corpus as text."""


def check_values(request: Request) -> Finding:
    """How batch, shards, workers and clusters fit; the configuration itself refuses those that do not."""
    train, k = request.config.train, request.config.clustering.num_clusters
    workers = count_text(request.most, "worker") + ("" if request.on_ray else " in the process itself")
    rows = train.global_batch_size // train.shards
    text = f"batch {train.global_batch_size} in {train.shards} shards of {rows} rows, {workers}, "
    text += f"{k} clusters" if k else "no clusters (SimCSE)"
    return ok("configuration", text + (f", {count_text(request.concurrent, 'trial')} at a time" * request.study))


def check_run_name(config: Config) -> Iterable[Finding]:
    """Whether the run's name is free, or its own."""
    check_name(config)
    name = config.runtime.name
    if read_run_file(config, "result.json") is not None:
        remedy = "Choose another runtime.name to train again."
        yield warning("name", f"{name!r} is finished, and would be left as it is", remedy)
    elif read_run_file(config, "config.yaml") is not None:
        yield ok("name", f"{name!r} was begun with this configuration, and would go on")
    else:
        yield ok("name", f"{name!r} is free")


def check_corpus(config: Config, sizes: Sizes) -> Iterable[Finding]:
    """Whether the text is there, can be read, and fills a batch, by its first rows; for a data set that has not been
    downloaded, whether the hub has it."""
    corpus = config.data.corpus or ""
    if corpus_is_documents(config):
        yield ok(
            "corpus", f"the sentences of {count_text(len(list_documents(documents_of(config) or '')), 'document')}"
        )
        return
    urls = [url for url in ([corpus] if isinstance(corpus, str) else corpus) if url.startswith("hf://")]
    on_the_hub = next(filter(None, map(find_dataset, urls)), None)
    if on_the_hub is not None:
        yield ok("corpus", on_the_hub)
        return
    sources = list_sources(corpus)
    size = sum(source.size or 0 for source in sources)
    packed = (".gz", ".bz2", ".zst", ".parquet")
    sizes.text_bytes = size * (COMPRESSION if any(each.path.lower().endswith(packed) for each in sources) else 1)
    check_batch(config, most_rows(config))
    limit = min(max(SAMPLE_ROWS, config.train.global_batch_size), config.data.limit or 2**53)
    columns = {"text_column": config.data.text_column, "document_column": config.data.document_column}
    rows = sum(1 for _ in read_corpus(corpus, **columns, limit=limit, counts=ReadCounts()))
    if not rows:
        raise ConfigError(f"data.corpus is {corpus!r}, which holds no text.", "Give a file with a sentence a line.")
    if rows < limit:
        check_batch(config, rows)
    text = f"{count_text(len(sources), 'source')}, {size_text(size)}; the first {rows:,} sentences were read"
    yield ok("corpus", text)


def check_dev_set(config: Config) -> Iterable[Finding]:
    """Whether the dev set, and those of ``evaluation.also``, are there, and whole."""
    from clusterns_ray.evaluation.hub import HUB, check_hub, fetch_sts, hub_cache
    from clusterns_ray.evaluation.sts import read_pairs

    check_sts(config)
    sts, dev = config.evaluation.sts, config.evaluation.dev
    if sts is None:
        remedy = "Set evaluation.sts, unless that is meant."
        yield warning("dev set", "none, so the last step's model is exported and not the best", remedy)
    elif sts == "structure":
        count = count_text(len(list_documents(documents_of(config) or "")), "document")
        yield ok("dev set", f"{dev}, graded by the structure of {count}")
    elif sts != "hf":
        directory = Path(sts).expanduser()
        yield ok("dev set", f"{dev}, {len(read_pairs(directory, dev)):,} graded pairs in {directory}")
        for also in config.evaluation.also:
            yield ok("dev set", f"{also}, {len(read_pairs(directory, also)):,} graded pairs, which select nothing")
    else:
        for kept in (cache_directory(config) / "sts-hub", hub_cache()):
            if (kept / f"{dev}.jsonl").is_file():
                yield ok("dev set", f"{dev}, {len(read_pairs(kept, dev)):,} graded pairs from the hub, kept in {kept}")
                return
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            with tempfile.TemporaryDirectory() as scratch:  # what the hub client has cached is read as a run would
                fetch_sts(Path(scratch), [dev])
        check_hub([HUB[dev][0]])
        yield ok("dev set", f"{dev}, in the hub's cache here, or to be downloaded from the hub, which answers")


def check_model(config: Config, sizes: Sizes) -> Iterable[Finding]:
    """Whether encoder and teacher are there and take what is asked of them; the encoder's size."""
    encoder = config.encoder
    where = find_model(encoder.name, encoder.revision)
    with settings_of(encoder.name, encoder.revision) if where == ON_THE_HUB else nullcontext(encoder.name) as name:
        here = check_encoder(config.model_copy(update={"encoder": encoder.model_copy(update={"name": name})}))
        sizes.model = model_size(here)
        check_teacher(here, load_tokenizer(here))
    size = f"{sizes.model.all:,} parameters, {count_text(sizes.model.layers, 'layer')}, width {sizes.model.width}"
    yield ok("encoder", f"{size}; {where}")
