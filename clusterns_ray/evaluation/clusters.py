"""Clustering: how well K-means over the embeddings finds labels that it does not see.

Spherical K-means with the true number of labels, from several seeds. Accuracy is under the best one-to-one matching of
clusters and labels (Hungarian method); NMI, AMI and ARI are scikit-learn's, with arithmetic means.

Shape suffixes: N rows, K clusters, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray.data.readers import csv_rows, read_lines
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.evaluation.geometry import unit_rows
from clusterns_ray.evaluation.labelled import Labelled, check_labels, labelled, read_labelled
from clusterns_ray.evaluation.sts import Embed
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.paths import check_regular_file

SEEDS = 10
COLUMNS = "name the columns label and text in the first line (others are passed over), or give label<TAB>sentence"
MEASURES = ("accuracy", "nmi", "ami", "ari")


@dataclass(frozen=True)
class ShortTexts:
    """One of the eight sets that short-text clustering is measured on (Xu et al. 2017; Rakib et al. 2020)."""

    labels: int
    files: tuple[str, ...]
    """its names in the usual copies: that of Rakib et al., and csv files as SCCL (Zhang et al. 2021) reads"""
    loose_tabs: bool = False
    """its sentences hold tabs"""


SHORT_TEXTS = {
    "AgNews": ShortTexts(4, ("agnewsdataraw-8000", "agnews.csv")),
    "SearchSnippets": ShortTexts(
        8, ("search_snippets/search_snippets_true_text", "searchsnippets.csv", "search_snippets.csv")
    ),
    "StackOverflow": ShortTexts(20, ("stackoverflow/stackoverflow_true_text", "stackoverflow.csv"), loose_tabs=True),
    "Biomedical": ShortTexts(20, ("biomedical/biomedical_true_text", "biomedical.csv")),
    "Tweet": ShortTexts(89, ("tweet-original-order.txt", "tweet.csv", "tweet89.csv")),
    "GoogleNews-T": ShortTexts(152, ("T", "googlenews_T.csv")),
    "GoogleNews-S": ShortTexts(152, ("S", "googlenews_S.csv")),
    "GoogleNews-TS": ShortTexts(152, ("TS", "googlenews_TS.csv")),
}


def list_sets(sources: Sequence[str | Path]) -> dict[str, Path]:
    """Names and files of what is to be clustered.

    A file is named by its stem. Of a directory, the eight short-text sets are taken under their usual file names, and
    every ``*.tsv``.

    Raises:
        ConfigError: a path is not there or holds no such file, or two files have one name.
    """
    sets: dict[str, Path] = {}
    for source in map(Path, sources):
        if source.exists() and not source.is_dir():
            check_regular_file("--clusters", source)
            here = {source.stem: source}
        elif source.is_dir():
            here = {
                name: path
                for name, known in SHORT_TEXTS.items()
                if (path := next((source / file for file in known.files if (source / file).is_file()), None))
            }
            here |= {path.stem: path for path in sorted(source.glob("*.tsv"))}
        else:
            raise ConfigError(
                f"--clusters {str(source)!r} is not there. Give a file of label<TAB>sentence, or a directory."
            )
        if not here:
            usual = ", ".join(known.files[0] for known in SHORT_TEXTS.values())
            raise ConfigError(
                f"--clusters {str(source)!r} holds no labelled sentences. Give a file of label<TAB>sentence, or a "
                f"directory with *.tsv or the short-text sets by their usual names ({usual})."
            )
        for name, path in here.items():
            if sets.setdefault(name, path).resolve() != path.resolve():
                raise ConfigError(f"--clusters: {sets[name]} and {path} are both called {name!r}. Rename one.")
    return sets


def read_clusters(name: str, path: str | Path) -> Labelled:
    """Rows of one set: ``label<TAB>sentence`` lines, or of ``*.csv`` the columns ``label`` and ``text``.

    Raises:
        ConfigError: there is no such file.
        DataError: wrong columns, fewer than two labels, or as many labels as rows.
    """
    if Path(path).suffix == ".csv":
        rows = _read_csv(name, path)
    else:
        rows = read_labelled(path, loose_tabs=name in SHORT_TEXTS and SHORT_TEXTS[name].loose_tabs)
    if len(set(rows.labels)) == len(rows):
        raise DataError(
            f"{path}: {len(rows)} rows with {len(rows)} different labels, so there is nothing to group. Give "
            "label<TAB>sentence, with labels that repeat."
        )
    return rows


def _read_csv(name: str, path: str | Path) -> Labelled:
    """Read commas and quotes or, since the usual copies are called csv too, a tab between the two columns."""
    lines = read_lines(path)
    if lines and lines[0][1].split("\t") == ["label", "text"]:
        return read_labelled(path, header=True, loose_tabs=name in SHORT_TEXTS and SHORT_TEXTS[name].loose_tabs)
    rows = []
    with_ends = ((number, line + "\n") for number, line in lines)
    for number, values in csv_rows(with_ends, str(path), ["label", "text"], COLUMNS):
        if values is None:
            continue
        label, text = (value.strip() for value in values)
        if not label or not text:
            raise DataError(f"{path}:{number}: the row has no label or no text. Correct it, or take it out.")
        rows.append((label, text))
    check_labels(path, [row[0] for row in rows])
    return labelled(rows)


def evaluate_clusters(
    sets: dict[str, Labelled],
    embed: Embed,
    *,
    seeds: Sequence[int],
    note: OnNote = lambda text: None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores of K-means over each set.

    Returns:
        Of each set ``accuracy``, ``nmi``, ``ami``, ``ari``, each ``{"mean", "std"}`` over the seeds (x 100), ``rows``,
        ``clusters`` and ``seeds``. And of each set which rows were in the cluster of their label: bool (S, N).
    """
    from clusterns_ray.clustering.backend import spherical_kmeans

    scores, right = {}, {}
    for name, rows in sets.items():
        k = len(set(rows.labels))
        note(f"{name}: K-means of {len(rows):,} rows into {k} clusters, {len(seeds)} seeds")
        n_ND = unit_rows(embed(rows.sentences)).astype(np.float32)
        runs = []
        for number, seed in enumerate(seeds, start=1):
            centroids_KD = spherical_kmeans(n_ND, k, seed=seed)
            runs.append(score_clusters((n_ND @ centroids_KD.T).argmax(axis=1), rows.labels))
            note(f"{name}: seed {number} of {len(seeds)}")
        right[name] = np.stack([run.pop("right") for run in runs])
        values = {measure: 100 * np.array([run[measure] for run in runs]) for measure in MEASURES}
        scores[name] = {
            **{measure: {"mean": float(v.mean()), "std": _deviation(v)} for measure, v in values.items()},
            "rows": len(rows),
            "clusters": k,
            "seeds": len(seeds),
        }
    return scores, right


def score_clusters(clusters_N: np.ndarray, labels_N: np.ndarray) -> dict[str, Any]:
    """One clustering against the labels: ``accuracy``, ``nmi``, ``ami``, ``ari``, and ``right``: bool (N)."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    table_LK = contingency_matrix(labels_N, clusters_N)  # labels and clusters that occur, sorted
    label_of, cluster_of = linear_sum_assignment(table_LK, maximize=True)
    match = dict(zip(np.unique(clusters_N)[cluster_of].tolist(), np.unique(labels_N)[label_of].tolist(), strict=True))
    right = np.array([match.get(c) == label for c, label in zip(clusters_N.tolist(), labels_N.tolist(), strict=True)])
    return {
        "accuracy": float(right.mean()),
        "nmi": float(normalized_mutual_info_score(labels_N, clusters_N)),
        "ami": float(adjusted_mutual_info_score(labels_N, clusters_N)),
        "ari": float(adjusted_rand_score(labels_N, clusters_N)),
        "right": right,
    }


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")
