from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from helpers import make_tiny_model, quick_first, sentences, write_corpus

from clusterns_ray.errors import ClusterNSError, ConfigError, DataError
from clusterns_ray.inference import faiss_index as vectors
from clusterns_ray.inference import search as semantic
from clusterns_ray.inference.embedding_file import EmbeddingFile, embedding_schema, embedding_table, write_tables
from clusterns_ray.inference.encode import encode_files, unit_rows, writer_lock
from clusterns_ray.inference.faiss_index import build_index, fewest, good_neighbours, nearest, open_index
from clusterns_ray.inference.search import Hit, SemanticIndex, default_directory
from clusterns_ray.io.events import Event, Note, RowsDone
from clusterns_ray.io.files import write_json
from clusterns_ray.models.encoder import Encoder

QUERIES = ["The baker sells bread.", "an iron key behind a wall", "Two horses"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return write_corpus(tmp_path / "data" / "corpus.txt")


@pytest.fixture
def build(tiny_model: Path, corpus: Path) -> Callable[..., SemanticIndex]:
    def call(**changes: Any) -> SemanticIndex:
        return SemanticIndex.build(**{"model": str(tiny_model), "corpus": str(corpus), **changes})

    return call


class Said(list):
    """The notes of a build."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.append(event.text)

    def has(self, words: str) -> bool:
        return any(words in text for text in self)


def clustered(rows: int, width: int = 16, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((max(rows // 100, 2), width))
    z = centres[draw.integers(0, len(centres), rows)] + draw.standard_normal((rows, width))
    return z.astype(np.float32)


def embedding_file(path: Path, z_ND: np.ndarray, dtype: str = "float32") -> EmbeddingFile:
    """As ``encode`` would write it."""
    width = z_ND.shape[1]
    schema = embedding_schema(width, dtype, {"format": 1, "width": width})
    blocks = [slice(start, start + 128) for start in range(0, len(z_ND), 128)]
    texts = [f"sentence {row}" for row in range(len(z_ND))]
    write_tables(path, (embedding_table(texts[b], z_ND[b].astype(dtype), schema) for b in blocks), schema)
    return EmbeddingFile(path)


def brute_force(queries_QD: np.ndarray, z_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and rows of the ``k`` nearest, in float64."""
    queries, z = queries_QD.astype(np.float64), z_ND.astype(np.float64)
    cosine = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (z / np.linalg.norm(z, axis=1)[:, None]).T
    rows = np.argsort(-cosine, axis=1)[:, :k]
    return np.take_along_axis(cosine, rows, axis=1), rows


@pytest.fixture
def ivf_from_200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "FLAT_ROWS", 200)


# ---- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_flat_is_brute_force(tmp_path: Path, dtype: str) -> None:
    z = clustered(1000).astype(dtype).astype(np.float32)
    info = build_index(embedding_file(tmp_path / "z.parquet", z, dtype), tmp_path)
    queries = clustered(20, seed=1)
    scores, rows = nearest(open_index(tmp_path, info), info, unit_rows(queries), 7)
    wanted_scores, wanted_rows = brute_force(queries, z, 7)
    assert info["kind"] == "flat" and info["bytes_per_embedding"] == 64
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_allclose(scores, wanted_scores, atol=1e-6)


def test_sentences_and_their_embeddings_find_the_same(build: Callable[..., SemanticIndex], tiny_model: Path) -> None:
    index, encoder = build(), Encoder.load(tiny_model)
    by_text = index.search(QUERIES, k=4)
    by_vector = index.search(3.7 * encoder.encode(QUERIES), k=4)
    scores, rows = brute_force(encoder.encode(QUERIES), encoder.encode(sentences(300)), 4)
    for texts, hits, score, row in zip(by_text, by_vector, scores, rows):
        assert [hit.row for hit in texts] == [hit.row for hit in hits] == row.tolist()
        assert [hit.rank for hit in texts] == [1, 2, 3, 4]
        assert [hit.text for hit in texts] == [sentences(300)[number] for number in row]
        np.testing.assert_allclose([hit.score for hit in texts], score, atol=1e-5)
    assert len({tuple(hit.row for hit in hits) for hits in by_text}) == 3


def test_a_sentence_of_the_corpus_is_its_own_nearest(build: Callable[..., SemanticIndex]) -> None:
    index = build()
    assert len(index) == 300
    [[hit]] = index.search([sentences(300)[123]], k=1)
    assert hit == Hit(1, pytest.approx(1, abs=1e-5), 123, sentences(300)[123])


def test_as_many_as_there_are(build: Callable[..., SemanticIndex]) -> None:
    [hits] = build().search(["a lamp"], k=300)
    assert sorted(hit.row for hit in hits) == list(range(300))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_any_text_is_given_back_whole(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text\n"zwei\nZeilen, 雪"\n""\nplain\n', encoding="utf-8")
    index = SemanticIndex.build(str(tiny_model), str(path))
    [hits] = index.search(["zwei"], k=2)
    assert {hit.row: hit.text for hit in hits} == {0: "zwei\nZeilen, 雪", 1: "plain"}


# ---- IVF ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ivf_from_200")
def test_ivf_reaches_the_recall_it_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "SHARD_ROWS", 1000)
    monkeypatch.setattr(EmbeddingFile.blocks, "__defaults__", (512,))
    z = clustered(5000)
    info = build_index(embedding_file(tmp_path / "z.parquet", z), tmp_path)
    assert (info["kind"], info["lists"], info["rows"]) == ("ivf", 283, 5000)
    assert len(info["files"]) == 6, "the centroids, and five shards"
    assert info["bytes_per_embedding"] == 2 * 16 + 8
    index, own = open_index(tmp_path, info), np.random.default_rng(5).choice(5000, 400, replace=False)

    def recall(queries: np.ndarray, nprobe: int, own: np.ndarray | None = None) -> float:
        """Over the ten nearest, the query itself left out."""
        _, wanted = brute_force(queries, z, 11)
        _, found = nearest(index, {**info, "nprobe": nprobe}, unit_rows(queries), 11)
        drop = [-1] * len(queries) if own is None else own.tolist()
        tens = [([r for r in a if r != o][:10], [r for r in b if r != o][:10]) for a, b, o in zip(wanted, found, drop)]
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in tens]))

    assert 1 < info["nprobe"] < info["lists"] / 2
    assert info["recall"] >= 0.97 and info["recall_queries"] == 256
    assert recall(z[own], info["nprobe"], own) == pytest.approx(info["recall"], abs=0.02)
    assert recall(clustered(400), info["nprobe"]) >= 0.95, "of queries that are not in the corpus"
    assert recall(z[own], info["nprobe"] // 2, own) < 0.965, "half as many would not do"
    assert recall(z[own], info["lists"], own) > 0.995, "half precision loses nothing"


@pytest.mark.usefixtures("ivf_from_200")
def test_shards_change_nothing_but_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = embedding_file(tmp_path / "z.parquet", clustered(3000))
    monkeypatch.setattr(EmbeddingFile.blocks, "__defaults__", (512,))
    found = []
    for name, rows in (("one", 10_000), ("many", 600)):
        monkeypatch.setattr(vectors, "SHARD_ROWS", rows)
        (tmp_path / name).mkdir()
        info = build_index(file, tmp_path / name)
        found.append((info, nearest(open_index(tmp_path / name, info), info, unit_rows(clustered(50)), 10)))
    (one, (scores, rows)), (many, (many_scores, many_rows)) = found
    assert (len(one["files"]), len(many["files"])) == (2, 4)
    assert one["nprobe"] == many["nprobe"]
    np.testing.assert_array_equal(rows, many_rows)
    np.testing.assert_array_equal(scores, many_scores)


@pytest.mark.usefixtures("ivf_from_200")
def test_more_answers_than_the_nearest_lists_hold(tmp_path: Path) -> None:
    info = build_index(embedding_file(tmp_path / "z.parquet", clustered(1000)), tmp_path)
    index = open_index(tmp_path, info)
    lists = [index.invlists.list_size(number) for number in range(info["lists"])]
    assert sum(lists) == 1000 and max(lists) < 200
    _, rows = nearest(index, {**info, "nprobe": 1}, unit_rows(clustered(5)), 1000)
    assert [sorted(found) for found in rows.tolist()] == [list(range(1000))] * 5


@pytest.mark.usefixtures("ivf_from_200")
def test_ivf_from_sentences(build: Callable[..., SemanticIndex], tiny_model: Path) -> None:
    said = Said()
    index = build(on_event=said)
    assert index.manifest["index"]["kind"] == "ivf" and said.has("Training 69 lists") and said.has("recall@10")
    [hits] = index.search([QUERIES[0]], k=10)
    encoder = Encoder.load(tiny_model)
    wanted = brute_force(encoder.encode(QUERIES[:1]), encoder.encode(sentences(300)), 10)[1][0]
    assert len(hits) == 10 and len({hit.row for hit in hits} & set(wanted.tolist())) >= 8


@pytest.mark.parametrize("ivf", quick_first([True, False], 1))
def test_indexes_are_mapped_and_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ivf: bool) -> None:
    monkeypatch.setattr(vectors, "FLAT_ROWS", 200 if ivf else 10**6)
    info = build_index(embedding_file(tmp_path / "z.parquet", clustered(3000, 64)), tmp_path)
    biggest = max(info["files"], key=lambda stamp: stamp["size"])["path"]

    def mapped() -> bool:
        return str(tmp_path / biggest) in Path("/proc/self/maps").read_text()

    gc.collect()
    assert not mapped()
    for _ in range(3):  # and no harm is done by opening it again
        index = open_index(tmp_path, info)
        gc.collect()
        assert mapped() and nearest(index, info, unit_rows(clustered(2, 64)), 5)[1].shape == (2, 5)
        del index
        gc.collect()
        assert not mapped()


def test_equal_neighbours_are_equally_good() -> None:
    """Row 7 asks. Of its copies any ten will do; where more are equal than are known it is not judged."""
    scores = np.linspace(0.9, 0.5, 100)
    rows = np.arange(100)
    assert good_neighbours(scores[None], rows[None], np.array([7])) == [{*range(7), 8, 9, 10}]
    tied = scores.copy()
    tied[8:30] = tied[8]
    assert good_neighbours(tied[None], rows[None], np.array([7])) == [{*range(7), *range(8, 30)}]
    assert good_neighbours(np.ones((1, 100)), rows[None], np.array([700])) == [None]


@pytest.mark.usefixtures("ivf_from_200")
def test_repeated_sentences_do_not_spoil_the_measure(tmp_path: Path) -> None:
    z = clustered(1000)
    z[::3] = z[0]  # more copies than are looked at
    z[1::3] = np.repeat(z[1::3][:12], 28, axis=0)[: len(z[1::3])]  # fewer
    info = build_index(embedding_file(tmp_path / "z.parquet", z), tmp_path)
    assert 100 < info["recall_queries"] < 200
    assert info["nprobe"] < info["lists"] and info["recall"] >= 0.97


@pytest.mark.parametrize("reached", [1, 2, 3, 7, 8, 9, 40, 41])
def test_the_fewest_lists_are_found(reached: int) -> None:
    asked: list[int] = []

    def recall(n: int) -> float:
        asked.append(n)
        return 0.98 if n >= reached else 0.1

    assert fewest(recall, 40) == ((reached, 0.98) if reached <= 40 else (40, 0.1))
    assert len(asked) <= 12


# ---- reuse and staleness ------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_it_is_built_once_beside_the_corpus(build: Callable[..., SemanticIndex], corpus: Path) -> None:
    first, again = Said(), Said()
    folder = build(on_event=first).directory
    assert folder == corpus.with_name("corpus.txt.index") == default_directory(str(corpus))
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "embeddings.parquet",
        "index-00000.faiss",
        "manifest.json",
    }
    before = state(folder)
    build(on_event=again)
    assert state(folder) == before
    assert first.has(f"Building the index in {folder}") and not first.has("up to date")
    assert list(again) == [f"The index in {folder} is up to date: 300 sentences, 128 bytes each, exact search"]


def touched(corpus: Path, model: Path) -> dict[str, Any]:
    os.utime(corpus, ns=(1, 1))
    return {}


def longer(corpus: Path, model: Path) -> dict[str, Any]:
    write_corpus(corpus, 301)
    return {}


def another_model(corpus: Path, model: Path) -> dict[str, Any]:
    make_tiny_model(model, layers=1)
    return {}


def fewer(corpus: Path, model: Path) -> dict[str, Any]:
    return {"limit": 100}


def pooled_otherwise(corpus: Path, model: Path) -> dict[str, Any]:
    return {"pooling": "cls"}


def lost(corpus: Path, model: Path) -> dict[str, Any]:
    (corpus.with_name("corpus.txt.index") / "embeddings.parquet").unlink()
    return {}


def damaged(corpus: Path, model: Path) -> dict[str, Any]:
    path = corpus.with_name("corpus.txt.index") / "index-00000.faiss"
    path.write_bytes(path.read_bytes()[:-1])
    return {}


STALE = {
    touched: "corpus.txt has changed",
    longer: "corpus.txt has changed",
    another_model: "the model is another one",
    fewer: "--limit was not given and is 100",
    pooled_otherwise: "--pooling was not given and is 'cls'",
    lost: "embeddings.parquet is gone",
    damaged: "index-00000.faiss has changed",
}


@pytest.mark.parametrize("change", STALE)
def test_what_is_out_of_date_is_built_anew_and_said_why(
    change: Callable[[Path, Path], dict[str, Any]], tiny_model: Path, corpus: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    SemanticIndex.build(str(model), str(corpus))
    settings = change(corpus, model)
    said = Said()
    index = SemanticIndex.build(str(model), str(corpus), on_event=said, **settings)
    assert said[0].startswith(f"Building the index in {index.directory} anew: ")
    assert said[0].endswith(f"{STALE[change]}.")
    texts = corpus.read_text().splitlines()[: settings.get("limit")]
    assert len(index) == len(texts)
    z = Encoder.load(model, pooling=settings.get("pooling")).encode(texts)
    [hits] = index.search([texts[50]], k=5)
    assert [hit.row for hit in hits] == brute_force(z[50:51], z, 5)[1][0].tolist()
    again = Said()
    SemanticIndex.build(str(model), str(corpus), on_event=again, **settings)
    assert again.has("up to date")


def test_rebuild_makes_the_index_anew_and_keeps_the_embeddings(build: Callable[..., SemanticIndex]) -> None:
    before, said = state(build().directory), Said()
    after = state(build(rebuild=True, on_event=said).directory)
    assert said.has("anew: as asked for.")
    assert before["index-00000.faiss"] != after["index-00000.faiss"]
    assert before["embeddings.parquet"] == after["embeddings.parquet"]


def test_an_index_of_another_model_that_was_named_is_refused(
    build: Callable[..., SemanticIndex], tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, other = tmp_path / "named", str(tiny_models("roberta"))
    build(directory=folder)
    before = state(folder)
    with pytest.raises(ConfigError, match="is of another model") as error:
        build(directory=folder, model=other)
    assert other in str(error.value) and "--rebuild" in str(error.value) and "\n" not in str(error.value)
    assert state(folder) == before
    assert build(directory=folder, model=other, rebuild=True).search(["a lamp"], k=1)


def test_another_similarity_than_the_cosine_is_said(
    tiny_model: Path, corpus_file: Path, build: Callable[..., SemanticIndex], tmp_path: Path
) -> None:
    from clusterns_ray.inference.distributed_encode import encode

    model = tmp_path / "dot"
    shutil.copytree(tiny_model, model)
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in
               (("", "Transformer"), ("1_Pooling", "Pooling"))]  # fmt: skip
    (model / "1_Pooling").mkdir()
    write_json(model / "1_Pooling/config.json", {"pooling_mode": "mean"})
    write_json(model / "modules.json", modules)
    write_json(model / "config_sentence_transformers.json", {"similarity_fn_name": "dot"})
    for _ in range(2):  # built, then found
        said = Said()
        build(model=str(model), on_event=said)
        assert said.has("dot is meant to be compared by dot; search ranks by the cosine.")
    said = Said()
    encode(str(model), str(corpus_file), tmp_path / "out.parquet", limit=3, on_event=said)
    assert said.has("meant to be compared by dot; compare these so, too.")


def test_an_up_to_date_index_is_searched_while_another_process_holds_it(build: Callable[..., SemanticIndex]) -> None:
    folder = build().directory
    with writer_lock(folder, "it"):
        assert build().search(["a lamp"], k=1)
        with pytest.raises(ClusterNSError, match="another process"):
            build(rebuild=True)


def test_what_is_not_ours_is_not_touched(build: Callable[..., SemanticIndex], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "sea.jpg").write_bytes(b"sea")
    with pytest.raises(ConfigError, match=r"something else \(sea.jpg\)"):
        build(directory=folder, rebuild=True)
    assert [path.name for path in folder.iterdir()] == ["sea.jpg"]


def test_where_an_index_is_kept(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(corpus.parent)
    assert default_directory("corpus.txt") == default_directory(str(corpus)) == corpus.with_name("corpus.txt.index")
    write_corpus(corpus.with_name("more.txt"))
    several = default_directory("*.txt")
    assert several.parent == tmp_path / "cache" / "clusterns_ray" / "search"
    assert several == default_directory(str(corpus.parent / "*.txt")) != default_directory("**/*.txt")
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.R_OK)
    assert default_directory("corpus.txt").parent == several.parent
    with pytest.raises(DataError, match="no such file"):
        default_directory("none.txt")


# ---- killed and resumed -------------------------------------------------------------------------------------------


def kill_me(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["encoding", "saving", "measuring"])
def test_killed_and_given_again(
    build: Callable[..., SemanticIndex], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    monkeypatch.setattr(vectors, "FLAT_ROWS", 200)
    whole = build(directory=tmp_path / "whole")

    def on_event(event: Event) -> None:
        if moment == "encoding" and isinstance(event, RowsDone) and event.rows == 128:
            kill_me()

    with pytest.MonkeyPatch.context() as patch:
        if moment == "saving":
            patch.setattr(faiss, "write_index", kill_me)
        if moment == "measuring":
            patch.setattr(vectors, "_choose_nprobe", kill_me)
        process = multiprocessing.get_context("fork").Process(
            target=partial(build, directory=tmp_path / "killed", on_event=on_event)
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    with pytest.raises(DataError, match="no finished index"):
        SemanticIndex.load(tmp_path / "killed")
    said = Said()
    index = build(directory=tmp_path / "killed", on_event=said)
    assert said.has("it was not finished")
    names = [path.name for path in sorted(index.directory.iterdir())]
    assert names == [path.name for path in sorted(whole.directory.iterdir())]
    for name in ("index-00000.faiss", "index-00001.faiss", "embeddings.parquet"):
        assert (index.directory / name).read_bytes() == (whole.directory / name).read_bytes()
    assert index.search(QUERIES) == whole.search(QUERIES)


# ---- a file that encode wrote -------------------------------------------------------------------------------------


def test_embeddings_are_not_made_again(
    tiny_model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    encode_files(str(tiny_model), str(corpus), out, dtype="float16", pooling="cls", max_length=7)
    monkeypatch.setattr(semantic, "encode_files", kill_me)
    index = SemanticIndex.build(str(tiny_model), str(out))
    assert index.directory == tmp_path / "out.parquet.index"
    assert sorted(state(index.directory)) == [".lock", "index-00000.faiss", "manifest.json"]
    z = Encoder.load(tiny_model, pooling="cls", max_length=7).encode(sentences(300))
    [hits] = index.search([sentences(300)[3]], k=5)
    cosine = unit_rows(z) @ unit_rows(z)[3]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosine)[:-6:-1], atol=2e-3)
    np.testing.assert_allclose([hit.score for hit in hits], cosine[[hit.row for hit in hits]], atol=2e-3)
    other = Encoder.load(tiny_model).encode(sentences(300))
    assert np.abs(unit_rows(other) @ unit_rows(other)[3] - cosine).max() > 0.1


def test_what_has_no_meaning_for_embeddings_is_refused(
    tiny_model: Path, tiny_models: Callable[[str], Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.parquet"
    encode_files(str(tiny_model), str(corpus), out)
    for option, value in (("limit", 5), ("text_column", "x"), ("pooling", "cls"), ("max_length", 9)):
        with pytest.raises((ConfigError, DataError), match=option.replace("_", "-") + "|no column"):
            SemanticIndex.build(str(tiny_model), str(out), **{option: value})
    with pytest.raises(ConfigError, match="holds embeddings of another model"):
        SemanticIndex.build(str(tiny_models("roberta")), str(out))
    assert not (tmp_path / "out.parquet.index").exists()


# ---- loading ------------------------------------------------------------------------------------------------------


def test_an_index_can_be_moved(build: Callable[..., SemanticIndex], tmp_path: Path) -> None:
    found = build(directory=tmp_path / "a").search(QUERIES)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert SemanticIndex.load(tmp_path / "b").search(QUERIES) == found
    with pytest.raises(DataError, match="no finished index"):
        SemanticIndex.load(tmp_path / "a")


def test_a_damaged_index_is_not_loaded(build: Callable[..., SemanticIndex]) -> None:
    folder = build().directory
    with (folder / "embeddings.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"embeddings.parquet has changed since the index was built"):
        SemanticIndex.load(folder)


def test_a_model_that_changed_is_noticed_when_it_is_needed(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    folder = SemanticIndex.build(str(model), str(corpus)).directory
    make_tiny_model(model, layers=1)
    index = SemanticIndex.load(folder)
    assert index.search(np.ones((1, 32)), k=1)
    with pytest.raises(ConfigError, match="is not the model that made the index"):
        index.search(["a lamp"], k=1)
    assert SemanticIndex.load(folder, model=str(tiny_model)).search(["a lamp"], k=1)


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_wrong_questions(build: Callable[..., SemanticIndex]) -> None:
    index = build()
    for queries, k, words in (
        ([], 1, "There is no query"),
        (["a", "  "], 1, "Query 2 is '  ', which is empty"),
        (["\udcff"], 1, "not text in UTF-8"),
        (["a"], 0, "-k is 0; it must be 1 or more"),
        (["a"], 301, "-k is 301, but the corpus holds 300 sentences. Use at most -k 300."),
        (np.ones((2, 31)), 1, r"(2, 31); this index takes (n, 32)"),
        (np.ones(32), 1, "shape (32,)"),
    ):
        with pytest.raises(ConfigError) as error:
            index.search(queries, k)
        assert words in str(error.value)
    with pytest.raises(TypeError, match="wrap it"):
        index.search("a lamp")


def test_without_faiss_the_remedy_is_said(build: Callable[..., SemanticIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="pip install faiss-cpu"):
        build()


def test_a_wrong_column_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("sentence\nhello\n")
    with pytest.raises(DataError, match="there is no column 'text'"):
        SemanticIndex.build(str(tiny_model), str(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("ivf_from_200")
def test_an_answer_does_not_depend_on_what_is_asked_along_with_it(tmp_path: Path) -> None:
    """A query whose lists are too short is asked again with more of them; the others are not."""
    z = np.concatenate([clustered(1000), -clustered(1)[:1] * 3])
    info = {**build_index(embedding_file(tmp_path / "z.parquet", z), tmp_path), "nprobe": 1}
    index = open_index(tmp_path, info)
    queries = unit_rows(np.concatenate([z[-1:], clustered(60)]))
    together = nearest(index, info, queries, 5)
    alone = [nearest(index, info, query, 5) for query in np.split(queries, len(queries))]
    widened = index.search(queries, 5)  # faiss's own nprobe is 1
    assert (widened[1] < 0).any() and not (widened[1] < 0).any(axis=1).all(), "some queries are short, and not all"
    np.testing.assert_array_equal(together[1], np.concatenate([rows for _, rows in alone]))
    np.testing.assert_array_equal(together[0], np.concatenate([scores for scores, _ in alone]))
