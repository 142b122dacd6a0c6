"""The map as a section of a page: what the browser draws, and the words around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray.errors import StorageError
from clusterns_ray.io.files import read_manifest
from clusterns_ray.report.map.corpus_map import CorpusMap
from clusterns_ray.report.page import Page, Section, Warning, footer
from clusterns_ray.report.words import count, fixed

HIGH = 0.9
"""Trustworthiness from which neighbours on the map are taken to be neighbours in meaning."""
GRID = 2**14 - 1
"""Coordinates are whole numbers up to this: at a zoom of 20 on a large screen a step is below two pixels."""
LONGEST_TEXT = 300
"""Characters of a sentence that the page holds; the parquet file has all."""


def map_page(corpus_map: CorpusMap) -> Page:
    """The map by itself."""
    facts = corpus_map.facts
    return Page(
        title=f"Map of {facts['corpus']}",
        subtitle=f"{count(len(corpus_map.texts), 'sentence')} as {facts['model']} sees them",
        headline=[],
        sections=[map_section(corpus_map)],
        warnings=map_warnings(corpus_map),
        footer=footer(),
    )


def trust_line(corpus_map: CorpusMap) -> str:
    """The trustworthiness, before training too, and whether it is too low."""
    facts = corpus_map.facts
    text = f"Trustworthiness (scikit-learn): {fixed(facts['trustworthiness'], 3)}"
    if "trustworthiness_before" in facts:
        text += f"; before training {fixed(facts['trustworthiness_before'], 3)}"
    return " ".join([text + ".", *(warning.text for warning in map_warnings(corpus_map))])


def map_warnings(corpus_map: CorpusMap) -> list[Warning]:
    """A note where the trustworthiness is below :data:`HIGH`; else none."""
    trust = corpus_map.facts["trustworthiness"]
    if trust >= HIGH:
        return []
    return [
        Warning(
            f"The trustworthiness of the map is {fixed(trust, 3)}, below {HIGH}: neighbours in the plane are often "
            "no neighbours in meaning.",
            "note",
        )
    ]


def map_section(corpus_map: CorpusMap) -> Section:
    """The words and the data of the map."""
    facts, n = corpus_map.facts, len(corpus_map.texts)
    shown = f"All {n:,} sentences" if n == facts["total"] else f"{n:,} of {facts['total']:,} sentences, drawn at random"
    trust = fixed(facts["trustworthiness"], 3)
    if "trustworthiness_before" in facts:
        trust += f", of the one before training {fixed(facts['trustworthiness_before'], 3)}"
    whose = "the run's own clusters" if facts["own_clusters"] else "clusters by K-means"
    return Section(
        "Map of the corpus",
        words=[
            f"{shown}: close together where the encoder finds them alike, and coloured by {whose}. A cluster is named "
            "by the terms that distinguish it. Distances between far points mean little; the trustworthiness of the "
            f"map (scikit-learn, from 0 to 1) is {trust}.",
        ],
        anchor="map-of-the-corpus",
        map=payload(corpus_map),
    )


def payload(corpus_map: CorpusMap) -> dict[str, Any]:
    """What the page's script reads; clusters are numbered by size, the largest first.

    Lists of all sentences: ``texts``; ``cluster`` and ``second`` (-1 where no sentence shown is in it); ``cosine`` to
    the centroid in thousandths; ``similar``, the false negatives of each, and ``similarCosine`` in hundredths.
    """
    m = corpus_map
    numbers, sizes = np.unique(m.cluster_N, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    place = {int(numbers[at]): rank for rank, at in enumerate(order)}
    planes = [("before training", m.before_N2), ("after training", m.xy_N2)] if m.before_N2 is not None else []
    there_NS = m.similar_NS >= 0
    cosines_NS = np.rint(100 * m.similar_cosine_NS).astype(int)
    return {
        "grid": GRID,
        "panes": [{"name": name, "xy": on_grid(xy_N2)} for name, xy_N2 in planes or [("", m.xy_N2)]],
        "texts": [text[:LONGEST_TEXT] for text in m.texts],
        "clusters": [
            {
                "id": int(numbers[at]),
                "size": int(sizes[at]),
                "terms": m.terms[int(numbers[at])],
                "tightness": round(float(m.cosine_N[m.cluster_N == numbers[at]].mean()), 3),
            }
            for at in order
        ],
        "cluster": [place[cluster] for cluster in m.cluster_N.tolist()],
        "second": [place.get(cluster, -1) for cluster in m.second_N.tolist()],
        "cosine": np.rint(1000 * m.cosine_N).astype(int).tolist(),
        "similar": [row[there].tolist() for row, there in zip(m.similar_NS, there_NS)],
        "similarCosine": [row[there].tolist() for row, there in zip(cosines_NS, there_NS)],
        "hard": None if m.hard_NM is None else [sorted({*row} - {-1}) for row in m.hard_NM.tolist()],
        "falseNegativeCosine": m.facts["false_negative_cosine"],
    }


def on_grid(xy_N2: np.ndarray) -> list[int]:
    """``[x0, y0, x1, y1, ...]`` in whole numbers from 0 to ``GRID``, both axes at one scale, each in the middle."""
    low_2, high_2 = xy_N2.min(axis=0), xy_N2.max(axis=0)
    scale = GRID / max(float((high_2 - low_2).max()), 1e-12)
    middle_2 = (low_2 + high_2) / 2
    return np.rint((xy_N2 - middle_2) * scale + GRID / 2).clip(0, GRID).astype(int).reshape(-1).tolist()


def model_identity(model: Path) -> str | None:
    """The checksum of an exported model's weights by its manifest; None for other models."""
    try:
        files = (read_manifest(model) or {}).get("files", {})
    except StorageError:
        return None
    return next((digest for name, digest in sorted(files.items()) if name.endswith(".safetensors")), None)
