"""``clusterns map``: the sample, the terms, the layout, the file, the page, and what is refused."""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import sentences
from report_runs import Html, make_corpus_map, make_run
from typer.testing import Result

from clusterns_ray.config import parse_config
from clusterns_ray.errors import DataError
from clusterns_ray.io.files import write_manifest
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.report import write_report
from clusterns_ray.report.map import compute, layout
from clusterns_ray.report.map.compute import most_similar
from clusterns_ray.report.map.corpus_map import MOST, draw_sample
from clusterns_ray.report.map.map_file import read_map, write_map
from clusterns_ray.report.map.map_page import GRID, map_page, on_grid, payload, trust_line
from clusterns_ray.report.map.terms import distinguishing_terms
from clusterns_ray.report.page import render_page

# ---- terms ----------------------------------------------------------------------------------------------------------

TEXTS = ["Boats sail the sea", "boats and sea", "The bank lends", "banks lend the money", "bank bank sea", "the boats"]
CLUSTERS = np.array([0, 0, 1, 1, 1, 3])


def test_terms_are_those_of_an_independent_calculation() -> None:
    words = [text.lower().split() for text in TEXTS]
    total = Counter(word for row in words for word in row)
    by_class = {c: Counter(w for row, at in zip(words, CLUSTERS) if at == c for w in row) for c in (0, 1, 3)}
    mean = sum(total.values()) / 3  # no text is in class 2
    for c, counts in by_class.items():
        weights = {
            word: tf * math.log(1 + mean / total[word])
            for word, tf in counts.items()
            if tf / counts.total() > total[word] / total.total() and word not in ("the", "and")
        }
        expected = sorted(weights, key=lambda word: (-weights[word], word))[:4]
        assert distinguishing_terms(TEXTS, CLUSTERS, 4, n=4)[c] == expected
    assert distinguishing_terms(TEXTS, CLUSTERS, 4)[2] == []


@pytest.mark.parametrize("texts", [["12 34", "!!!"], ["the", "don't it's isn’t"]])
def test_texts_without_words_have_no_terms(texts: list[str]) -> None:
    assert distinguishing_terms(texts, np.array([0, 1]), 2) == [[], []]


# ---- sample ---------------------------------------------------------------------------------------------------------


def test_a_sample_is_seeded_and_in_the_order_of_the_corpus() -> None:
    texts = sentences(500)
    sample = draw_sample(iter(texts), seed=3, most=100)
    assert sample.total == 500 and len(sample.texts) == 100
    assert (np.diff(sample.rows_N) > 0).all() and sample.texts == [texts[row] for row in sample.rows_N]
    assert draw_sample(iter(texts), 3, 100).texts == sample.texts != draw_sample(iter(texts), 4, 100).texts
    assert draw_sample(iter(texts), 3, 500).texts == texts
    drawn = np.bincount(np.concatenate([draw_sample(iter(texts[:20]), s, 10).rows_N for s in range(400)]))
    assert abs(drawn - 200).max() < 60, "every sentence is as likely"


# ---- layout ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["openTSNE", "scikit-learn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "openTSNE" and importlib.util.find_spec("openTSNE") is None:
        pytest.skip("openTSNE is not installed")
    monkeypatch.setattr(layout, "has_opentsne", lambda: request.param == "openTSNE")
    return request.param


def clouds(n: int = 150, width: int = 24) -> np.ndarray:
    """Unit rows in three directions, of which those of row number modulo 3 are alike."""
    draw = np.random.default_rng(5)
    z_ND = draw.normal(size=(3, width))[np.arange(n) % 3] * 3 + draw.normal(size=(n, width))
    return (z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True)).astype(np.float32)


def test_alike_sentences_are_close_and_the_seed_decides(library: str) -> None:
    unit_ND = clouds()
    xy_N2 = layout.lay_out(unit_ND, seed=1)
    assert xy_N2.shape == (150, 2) and xy_N2.dtype == np.float32
    np.testing.assert_array_equal(xy_N2, layout.lay_out(unit_ND, seed=1))
    middles = np.stack([xy_N2[at::3].mean(axis=0) for at in range(3)])
    nearest = ((xy_N2[:, None] - middles) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == np.arange(150) % 3).all()
    assert layout.trustworthiness(unit_ND, xy_N2, 0) > 0.8
    random = np.random.default_rng(0).normal(size=(150, 2))
    assert layout.trustworthiness(unit_ND, random, 0) < 0.6


@pytest.mark.parametrize("n", [10, 11])
def test_few_or_equal_sentences_can_be_laid_out(library: str, n: int) -> None:
    for unit_ND in (clouds(n), np.tile(clouds(1), (n, 1))):
        assert np.isfinite(layout.lay_out(unit_ND, seed=0)).all()


# ---- false negatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [-2.0, 0.3])
def test_false_negatives_share_a_cluster_and_are_alike_enough(cosine: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clusterns_ray.losses.BLOCK", 64)  # several blocks
    unit, cluster = torch.as_tensor(clouds(60)), torch.arange(60) % 7
    cluster[cluster == 6] = 5
    cluster[0] = 6  # alone
    places, cosines = (each.numpy() for each in most_similar(unit, cluster, cosine))
    full = (unit @ unit.T).numpy()
    for i in range(60):
        others = [j for j in range(60) if j != i and cluster[j] == cluster[i] and full[i, j] > cosine]
        expected = sorted(others, key=lambda j: -full[i, j])[: compute.SIMILAR]
        assert places[i][places[i] >= 0].tolist() == expected
        np.testing.assert_allclose(cosines[i][: len(expected)], full[i, expected], atol=1e-6)
    assert (places[0] == -1).all()


# ---- file and page --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_the_file_holds_all_of_the_map(tmp_path: Path, before: bool) -> None:
    corpus_map = make_corpus_map(60, before=before)
    corpus_map.similar_NS[3, 2:] = -1
    corpus_map.similar_cosine_NS[3, 2:] = 0
    if before:
        corpus_map = replace(corpus_map, hard_NM=np.arange(120).reshape(60, 2) % 60)
    write_map(tmp_path / "map.parquet", corpus_map)
    again = read_map(tmp_path / "map.parquet")
    for field in fields(corpus_map):
        np.testing.assert_equal(getattr(again, field.name), getattr(corpus_map, field.name))
    table = pq.read_table(tmp_path / "map.parquet")
    assert table["label"][0].as_py() == ", ".join(corpus_map.terms[int(corpus_map.cluster_N[0])])
    assert payload(again) == payload(corpus_map)
    data = (tmp_path / "map.parquet").read_bytes()
    (tmp_path / "map.parquet").write_bytes(data[:400] + b"\xff" * 8 + data[408:])
    with pytest.raises(DataError, match="Make it again"):
        read_map(tmp_path / "map.parquet")


@pytest.mark.slow
def test_the_page_is_complete_in_itself_and_below_5_megabytes() -> None:
    source = render_page(map_page(make_corpus_map(MOST, 100)))
    assert len(source.encode()) < 5_000_000
    page = Html(source)
    assert page.loads == ["data:,"] and "0.950" in page.text and "20,000 of 200,000 sentences" in page.text
    assert [name for _, name, _ in page.scripts] == ["map-data", None]


def test_coordinates_keep_their_proportions() -> None:
    assert on_grid(np.array([[0.0, 1.0], [4.0, 3.0]])) == [0, round(GRID / 4), GRID, round(GRID * 3 / 4)]
    assert set(on_grid(np.ones((3, 2)))) == {round(GRID / 2)}


def test_a_map_that_cannot_be_trusted_says_so() -> None:
    corpus_map = make_corpus_map(20)
    assert "below" not in trust_line(corpus_map) and not map_page(corpus_map).warnings
    corpus_map.facts["trustworthiness"] = 0.85
    assert "0.850, below 0.9" in trust_line(corpus_map) and len(map_page(corpus_map).warnings) == 1


def test_a_report_shows_the_map_of_its_run_unless_it_is_of_another_model(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_map(run / "map.parquet", make_corpus_map(40))
    page = write_report([run])[1]
    assert "Map of the corpus" in [section.title for section in page.sections]
    corpus_map = make_corpus_map(40)
    corpus_map.facts["identity"] = "another"
    write_map(run / "map.parquet", corpus_map)
    page = write_report([run])[1]
    assert "Map of the corpus" not in [section.title for section in page.sections]
    assert any("of another model" in warning.text for warning in page.warnings)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that costs nothing."""
    monkeypatch.setattr(compute, "lay_out", lambda unit_ND, *_, **__: unit_ND[:, :2].copy())


@pytest.fixture
def ended_run(begun_run: Path) -> Path:
    """A run of four clusters whose model is still that of its beginning."""
    config = (begun_run / "config.yaml").read_text().replace("head: mlp", "head: none")
    (begun_run / "config.yaml").write_text(config)
    encoder = Encoder.for_training(parse_config(config).encoder, 0)
    encoder.save(begun_run / "model")
    write_manifest(begun_run / "model")
    np.save(begun_run / "centroids.npy", encoder.encode(sentences(4, seed=8)))
    return begun_run


def test_a_run_is_drawn_with_its_clusters_and_as_it_was_before(
    clusterns: Callable[..., Result], ended_run: Path, quick: None
) -> None:
    said = clusterns("map", ended_run)
    assert said.exit_code == 0, said.output
    assert "Trustworthiness (scikit-learn): " in said.stdout and "before training" in said.stdout
    assert said.stdout.splitlines()[-1] == f"Wrote {ended_run}/map.html and {ended_run}/map.parquet"
    corpus_map = read_map(ended_run / "map.parquet")
    assert corpus_map.facts["own_clusters"] and len(corpus_map.texts) == 64
    np.testing.assert_array_equal(corpus_map.before_N2, corpus_map.xy_N2)
    assert clusterns("map", ended_run).exit_code == 0, "a map replaces a map"
    assert "map-of-the-corpus" in write_report([ended_run])[0].read_text()


@pytest.mark.parametrize("head", ["none", "mlp"])
def test_centroids_of_another_space_are_not_taken(
    clusterns: Callable[..., Result], ended_run: Path, head: str, quick: None
) -> None:
    config = (ended_run / "config.yaml").read_text()
    (ended_run / "config.yaml").write_text(config.replace("head: none", f"head: {head}"))
    said = clusterns("map", ended_run)
    assert said.exit_code == 0 and ("behind its training head" in said.stdout) is (head == "mlp")
    assert read_map(ended_run / "map.parquet").facts["own_clusters"] is (head == "none")
    np.save(ended_run / "centroids.npy", np.ones((4, 3)))
    said = clusterns("map", ended_run)
    assert said.exit_code == (2 if head == "none" else 0) and ("centroids.npy" in said.stderr) is (head == "none")


def test_hard_negatives_of_a_run_over_the_corpus_are_sentences(
    clusterns: Callable[..., Result], ended_run: Path, quick: None
) -> None:
    config = (ended_run / "config.yaml").read_text()
    config = config.replace("scope: batch", "scope: corpus").replace("bank_negatives: 1", "bank_negatives: 3")
    (ended_run / "config.yaml").write_text(config)
    assert clusterns("map", ended_run).exit_code == 0
    corpus_map = read_map(ended_run / "map.parquet")
    assert corpus_map.hard_NM is not None and corpus_map.hard_NM.shape == (64, 3)
    assert (corpus_map.cluster_N[corpus_map.hard_NM] != corpus_map.cluster_N[:, None]).all()
    assert corpus_map.facts["false_negative_cosine"] == 0.7
    assert (corpus_map.similar_cosine_NS[corpus_map.similar_NS >= 0] > 0.7).all()


def test_an_encoder_and_a_corpus_are_drawn_by_k_means(
    clusterns: Callable[..., Result], tiny_model: Path, corpus_file: Path, tmp_path: Path, quick: None
) -> None:
    said = clusterns("map", tiny_model, corpus_file, "-o", "m.html", "--sentences", "50", "--clusters", "3")
    assert said.exit_code == 0, said.output
    corpus_map = read_map(tmp_path / "m.parquet")
    assert len(corpus_map.texts) == 50 and corpus_map.facts["total"] == 300 and corpus_map.before_N2 is None
    assert set(corpus_map.cluster_N.tolist()) <= {0, 1, 2} and (corpus_map.second_N != corpus_map.cluster_N).all()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("missing/model", "corpus.txt", "-o", "m.html"), ("missing/model",)),
        (("MODEL", "corpus.txt"), ("No page is named", "-o FILE.html")),
        (("MODEL", "-o", "m.html"), ("not a run", "Name a CORPUS")),
        (("MODEL", "missing.txt", "-o", "m.html"), ("missing.txt",)),
        (("MODEL", "empty.txt", "-o", "m.html"), ("0 sentences", "at least 10")),
        (("MODEL", "corpus.txt", "-o", "m.png"), ("m.png", ".html")),
        (("MODEL", "corpus.txt", "-o", "nowhere/m.html"), ("nowhere", "cannot be written")),
        (("MODEL", "corpus.txt", "-o", "other.html"), ("other.parquet", "is no map")),
        (("MODEL", "corpus.txt", "-o", "m.html", "--sentences", "20001"), ("--sentences is 20001",)),
        (("MODEL", "corpus.txt", "-o", "m.html", "--clusters", "1"), ("--clusters is 1",)),
        (("MODEL", "corpus.txt", "-o", "m.html", "--clusters", "301"), ("301 clusters", "300")),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
    clusterns: Callable[..., Result],
    tiny_model: Path,
    corpus_file: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "corpus.txt").write_bytes(corpus_file.read_bytes())
    (tmp_path / "empty.txt").touch()
    pq.write_table(pa.table({"text": ["a corpus"]}), tmp_path / "other.parquet")
    result = clusterns("map", *(str(tiny_model) if value == "MODEL" else value for value in arguments))
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(part in lines[0] for part in parts), result.stderr
    assert not list(tmp_path.glob("m.*"))
