"""``clusterns map``: a corpus in the plane, as one HTML page with a parquet file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clusterns_ray.config import Config, parse_saved_config
from clusterns_ray.data.corpus import ReadCounts, list_sources, read_sentences
from clusterns_ray.data.prepare import training_sentences
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.inference.encode import EncodingProgress, encode_here
from clusterns_ray.io.events import Note, OnEvent, OnNote, notes_to
from clusterns_ray.io.files import check_writable
from clusterns_ray.io.paths import CORPORA, Named, check_path
from clusterns_ray.io.yaml_text import read_yaml_text
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.report.map.corpus_map import FEWEST, MOST, CorpusMap, draw_sample
from clusterns_ray.report.map.map_file import check_replaceable, write_map
from clusterns_ray.report.map.map_page import map_page, model_identity, trust_line
from clusterns_ray.report.page import write_page

CLUSTERS = 32
"""Clusters of K-means where the run has none of its own."""


class Drawn(NamedTuple):
    """A map that was written; shown as its size and its places."""

    page: Path
    data: Path
    """the same as parquet"""
    corpus_map: CorpusMap

    def __repr__(self) -> str:
        return f"{trust_line(self.corpus_map)}\nMap: {self.page}\nIts data: {self.data}"


def draw_map(
    model: Named,
    corpus: Named | None = None,
    output: Named | None = None,
    *,
    text_column: str = "text",
    sentences: int = MOST,
    clusters: int | None = None,
    seed: int = 0,
    on_event: OnEvent = lambda event: None,
) -> Drawn:
    """Encode a sample of a corpus, lay it out in the plane, and write the map as HTML and parquet.

    Args:
        model: a run, whose clusters and untrained encoder are then shown, or an encoder as of ``Encoder.load``.
        corpus: text, csv, jsonl or parquet: a path, a glob, s3://, gs:// or hf://; that of the run if not given.
        output: the page; ``map.html`` in the run if not given. The parquet file has its name.
        text_column: the column or field that holds the sentence.
        sentences: how many are drawn at random where the corpus has more.
        clusters: this many by K-means, in place of the run's own.
        seed: of the sample, of K-means and of the layout.
        on_event: called with notes, and with RowsDone while sentences are encoded.

    Raises:
        ConfigError, DataError: the request cannot work.
    """
    model = check_path("MODEL", model)
    corpus = None if corpus is None else check_path("CORPUS", corpus, CORPORA)
    output = None if output is None else check_path("--output", output, ())
    config, note = _config_of_run(model), notes_to(on_event)
    if corpus is None and config is None:
        raise ConfigError(f"MODEL is {model!r}, which is not a run, so it has no corpus of its own.", "Name a CORPUS.")
    if output is None and config is None:
        raise ConfigError("No page is named, and MODEL is not a run, in which it would be.", "Give -o FILE.html.")
    page = Path(output if output is not None else Path(model, "map.html")).expanduser()
    if page.suffix not in (".html", ".htm"):
        raise ConfigError(f"-o is {str(page)!r}; the map is a page.", "Give a file that ends in .html.")
    if not FEWEST <= sentences <= MOST:
        raise ConfigError(f"--sentences is {sentences}; it must be from {FEWEST} to {MOST:,}.")
    if clusters is not None and not 2 <= clusters <= sentences:
        raise ConfigError(f"--clusters is {clusters}; it must be from 2 to --sentences, {sentences:,}.")
    data = page.with_suffix(".parquet")
    for path in (page, data):
        check_writable(path, "-o")
    check_replaceable(data)
    encoder = model if config is None else str(Path(model, "model").expanduser())
    resolve_model(encoder, note)
    if corpus is not None:
        list_sources(corpus)  # so that a wrong name is noticed before anything is read

    named = corpus or (config and (config.data.corpus or config.data.documents))
    note(f"Reading {named}")
    counts = ReadCounts()
    if corpus is not None:
        texts = read_sentences(corpus, text_column=text_column, counts=counts)
    else:
        assert config is not None
        texts = (sentence.text for sentence in training_sentences(config, counts))
    sample = draw_sample(texts, seed, sentences)
    note(f"Encoding {len(sample.texts):,} of {sample.total:,} sentences")
    z_ND = _encode(encoder, sample.texts, on_event)
    before_ND = None if config is None else _before(config, sample.texts, on_event)
    facts: dict[str, Any] = {"model": model, "corpus": str(named), "identity": model_identity(Path(encoder))}
    centroids_KD = None if config is None or clusters is not None else _own_centroids(Path(model), config, z_ND, note)
    facts["own_clusters"] = centroids_KD is not None
    from clusterns_ray.clustering.backend import spherical_kmeans  # torch, which no refusal waits for
    from clusterns_ray.report.map.compute import Rule, make_map

    if centroids_KD is None:
        k = clusters or (config and config.clustering.num_clusters) or CLUSTERS
        k = k if clusters else min(k, max(2, len(z_ND) // 5))
        centroids_KD = spherical_kmeans(z_ND, k, seed=seed)
    rule = Rule()
    if config is not None and config.clustering.enabled and config.clustering.scope == "corpus":
        rule = Rule(True, config.clustering.false_negative_cosine, min(config.loss.bank_negatives, 5))
    facts["false_negative_cosine"] = rule.cosine if rule.of_corpus else None
    corpus_map = make_map(sample, z_ND, before_ND, centroids_KD, rule, seed, note)
    corpus_map.facts.update(facts)
    write_map(data, corpus_map)
    write_page(page, map_page(corpus_map))
    return Drawn(page, data, corpus_map)


def _config_of_run(model: str) -> Config | None:
    """The configuration of a run's directory; None for what is none."""
    path = Path(model).expanduser() / "config.yaml"
    return parse_saved_config(read_yaml_text("The run's", path), str(path)) if path.is_file() else None


def _own_centroids(run: Path, config: Config, z_ND: np.ndarray, note: OnNote) -> np.ndarray | None:
    """The centroids of the exported step; None where the run has none in the space of finished embeddings."""
    path = run.expanduser() / "centroids.npy"
    if not path.is_file():
        return None
    if config.encoder.head != "none":
        note("The run's centroids are behind its training head, which model/ is without: K-means makes others.")
        return None
    try:
        centroids_KD = np.load(path)
        if centroids_KD.ndim != 2 or centroids_KD.shape[1] != z_ND.shape[1] or not np.isfinite(centroids_KD).all():
            raise ValueError(f"an array of shape {centroids_KD.shape}")
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{str(path)!r} does not hold the centroids of this run ({error}).",
            "Restore it from a copy, or give --clusters.",
        ) from None
    return centroids_KD.astype(np.float32)


def _before(config: Config, texts: list[str], on_event: OnEvent) -> np.ndarray | None:
    """Embeddings by the encoder that the run started from; None, with a note, where it cannot be loaded here."""
    from clusterns_ray.models.encoder import Encoder

    try:
        encoder = Encoder.for_training(config.encoder, 0)
    except ClusterNSError as error:
        on_event(Note(f"The untrained encoder cannot be shown: {error}"))
        return None
    on_event(Note("Encoding them as before training"))
    return _encode(encoder, texts, on_event)


def _encode(model: Any, texts: list[str], on_event: OnEvent) -> np.ndarray:
    """float32 (N, D)"""
    from clusterns_ray.models.encoder import Encoder

    encoder = Encoder.load(model) if isinstance(model, str) else model
    progress = EncodingProgress(len(texts), on_event)
    part = next(encode_here(encoder, [(0, texts)], 64, progress.working))
    if part.truncated:
        on_event(Note(encoder.describe_truncation(part.truncated, len(texts))))
    return part.z_ND
