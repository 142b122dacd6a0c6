from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics

from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.evaluation.clusters import (
    SHORT_TEXTS,
    evaluate_clusters,
    list_sets,
    read_clusters,
    score_clusters,
)
from clusterns_ray.evaluation.labelled import labelled


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ---- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_accuracy_is_under_the_best_matching(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 60)
    clusters = np.where(rng.random(60) < 0.6, (labels + 1) % 4, rng.integers(0, 4, 60))
    found = score_clusters(clusters, labels.astype(str))
    by_hand = max(
        np.mean([matching[c] == label for c, label in zip(clusters, labels)]) for matching in permutations(range(4))
    )
    assert 0.3 < by_hand < 0.95
    assert found["accuracy"] == pytest.approx(by_hand)
    assert found["right"].mean() == pytest.approx(by_hand) and found["right"].dtype == bool


def test_the_other_measures() -> None:
    rng = np.random.default_rng(1)
    labels, clusters = rng.integers(0, 3, 80), rng.integers(0, 4, 80)
    clusters[:50] = labels[:50]
    found = score_clusters(clusters, labels)
    counts = np.array([[((labels == a) & (clusters == b)).sum() for b in range(4)] for a in range(3)]) / 80

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    of_labels, of_clusters = entropy(counts.sum(axis=1)), entropy(counts.sum(axis=0))
    shared = of_labels + of_clusters - entropy(counts.ravel())
    assert found["nmi"] == pytest.approx(shared / ((of_labels + of_clusters) / 2))
    same = [(labels[i] == labels[j], clusters[i] == clusters[j]) for i in range(80) for j in range(i)]
    a, b = np.array(same).T
    expected = a.mean() * b.mean()
    assert found["ari"] == pytest.approx(((a & b).mean() - expected) / ((a.mean() + b.mean()) / 2 - expected))
    assert found["ami"] == pytest.approx(sklearn.metrics.adjusted_mutual_info_score(labels, clusters))
    assert found["ami"] < found["nmi"]


def test_fewer_clusters_than_labels_are_matched_too() -> None:
    found = score_clusters(np.array([7, 7, 7, 3, 3]), np.array(["a", "a", "b", "c", "c"]))
    assert found["right"].tolist() == [True, True, False, True, True]
    one = score_clusters(np.zeros(4, dtype=int), np.array(["a", "b", "b", "b"]))
    assert one["accuracy"] == 0.75 and one["nmi"] == one["ari"] == 0


# ---- K-means ------------------------------------------------------------------------------------------------------


def around_corners(spread: float) -> Any:
    """Embeddings by the sentence's first letter, of any length."""

    def embed(sentences: Sequence[str]) -> np.ndarray:
        rng = np.random.default_rng(3)
        z = np.stack([np.eye(3)["abc".index(sentence[0])] for sentence in sentences])
        return ((z + spread * rng.normal(size=z.shape)) * rng.uniform(0.1, 9, (len(z), 1))).astype(np.float32)

    return embed


SET = labelled([("abc"[n % 3].upper(), f"{'abc'[n % 3]}{n}") for n in range(60)])


def test_clear_clusters_are_found() -> None:
    # from an unlucky start K-means may stop at a worse place, so not each of the seeds finds them
    scores, right = evaluate_clusters({"x": SET}, around_corners(0.05), seeds=range(10))
    best = right["x"].mean(axis=1)
    assert right["x"].shape == (10, 60) and (best == 1).sum() >= 5
    assert scores["x"]["accuracy"]["mean"] == pytest.approx(100 * best.mean())
    assert scores["x"]["accuracy"]["std"] == pytest.approx(100 * best.std(ddof=1))
    assert (scores["x"]["rows"], scores["x"]["clusters"], scores["x"]["seeds"]) == (60, 3, 10)
    assert all(scores["x"][measure]["mean"] > 80 for measure in ("nmi", "ami", "ari"))


def test_noise_is_near_chance_and_seeds_decide() -> None:
    notes: list[str] = []
    scores, right = evaluate_clusters({"x": SET}, around_corners(30), seeds=range(10), note=notes.append)
    assert scores["x"]["accuracy"]["mean"] < 60 and abs(scores["x"]["ari"]["mean"]) < 15
    assert scores["x"]["accuracy"]["std"] > 0
    again = evaluate_clusters({"x": SET}, around_corners(30), seeds=range(10))
    assert (again[1]["x"] == right["x"]).all() and again[0] == scores
    assert "x: seed 10 of 10" in notes


# ---- files --------------------------------------------------------------------------------------------------------


def test_usual_names_of_the_eight_sets(tmp_path: Path) -> None:
    assert [known.labels for known in SHORT_TEXTS.values()] == [4, 8, 20, 20, 89, 152, 152, 152]
    rows = "1\tone\n2\ttwo\n1\tthree\n"
    for known in SHORT_TEXTS.values():
        write(tmp_path / "raw" / known.files[0], rows)
        write(tmp_path / "csv" / known.files[1], "text,label\none,1\ntwo,2\nthree,1\n")
    for folder in ("raw", "csv"):
        found = list_sets([tmp_path / folder])
        assert list(found) == list(SHORT_TEXTS)
        for name, path in found.items():
            read = read_clusters(name, path)
            assert (read.labels.tolist(), read.sentences) == (["1", "2", "1"], ["one", "two", "three"])


def test_a_set_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "one" / "mine.tsv", "a\tx\nb\ty\na\tz\n")
    write(tmp_path / "two" / "other.txt", "a\tx\nb\ty\na\tz\n")
    found = list_sets([tmp_path / "one", tmp_path / "two" / "other.txt"])
    assert {name: path.name for name, path in found.items()} == {"mine": "mine.tsv", "other": "other.txt"}
    assert list_sets([tmp_path / "one", tmp_path / "one" / "mine.tsv"]) == {"mine": tmp_path / "one" / "mine.tsv"}
    write(tmp_path / "two" / "mine.tsv", "a\tx\nb\ty\na\tz\n")
    with pytest.raises(ConfigError, match="both called 'mine'"):
        list_sets([tmp_path / "one", tmp_path / "two"])


def test_csv_with_quotes_and_further_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "agnews.csv", 'text,text1,label\n"a, ""b""\nc",x,1\nd,y,2\ne,z,1\n')
    rows = read_clusters("AgNews", path)
    assert (rows.sentences, rows.labels.tolist()) == (['a, "b"\nc', "d", "e"], ["1", "2", "1"])
    tabbed = write(tmp_path / "tweet.csv", "label\ttext\n1\ta, b\n2\tc\n1\td\n")
    assert read_clusters("Tweet", tabbed).sentences == ["a, b", "c", "d"]


def test_tabs_within_sentences_of_stackoverflow_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "1\ta\tb\n2\tc\n1\td\n")
    assert read_clusters("StackOverflow", path).sentences == ["a b", "c", "d"]
    with pytest.raises(DataError, match=r"x:1: .* has 3 columns"):
        read_clusters("Tweet", path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "1\tx\n1\ty\n", "one label only, '1'"),
        ("a.tsv", "1\tx\n2\ty\n", "2 rows with 2 different labels, so there is nothing to group"),
        ("a.tsv", "x\ny\n", r"a.tsv:1: 'x' has 1 columns"),
        ("a.csv", "sentence,class\nx,1\n", "no column 'label'; the columns are: 'sentence', 'class'; name the columns"),
        ("a.csv", "text,label\nx,1\ny\n", r"a.csv:3: the row has 1 fields, but the header has 2"),
        ("a.csv", "text,label\nx,1\ny,\n", r"a.csv:3: the row has no label or no text"),
        ("a.csv", "text,label,text\nx,1,z\n", r"a.csv: 'text' is there 2 times"),
        ("a.csv", 'text,label\n"x,1\ny,2\nz,1\n', r"a.csv:2: the row that begins here is malformed"),
        ("a.csv", "", "columns are: none"),
    ],
)
def test_what_cannot_be_clustered(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_clusters("a", write(tmp_path / name, text))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--clusters .* is not there"):
        list_sets([tmp_path / "none"])
    with pytest.raises(ConfigError, match="holds no labelled sentences"):
        list_sets([tmp_path])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_clusters("a", tmp_path / "none.tsv")
