from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import sentences
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterns_ray.config import Config, make_config
from clusterns_ray.data.document import Boundary
from clusterns_ray.data.positives import Positives, choose_crops, choose_neighbours, cut_rows
from clusterns_ray.data.prepare import describe, load_tokenizer, prepare
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.errors import ConfigError, DataError

STRUCTURES = st.lists(st.integers(0, 3), min_size=1, max_size=40).map(lambda rest: np.array([3, *rest], dtype=np.uint8))


def neighbours(boundaries: np.ndarray, rows: np.ndarray, distance: int, seed: int = 0, step: int = 0) -> np.ndarray:
    n = len(boundaries)
    return choose_neighbours(rows, lambda r: boundaries[r], n, distance=distance, seed=seed, step=step)


def candidates(boundaries: np.ndarray, row: int, distance: int) -> set[int]:
    """By the definition, one row at a time."""
    part = {b: np.cumsum(boundaries >= b) for b in Boundary}
    near = [j for j in range(len(boundaries)) if 0 < abs(j - row) <= distance]
    for level in (Boundary.PARAGRAPH, Boundary.SECTION):
        found = {j for j in near if part[level][j] == part[level][row]}
        if found:
            return found
    return {row}


@given(STRUCTURES, st.integers(1, 5), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_a_neighbour_is_near_in_the_same_paragraph_else_section(
    boundaries: np.ndarray, distance: int, seed: int
) -> None:
    rows = np.arange(len(boundaries))
    document = np.cumsum(boundaries == Boundary.DOCUMENT)
    for step in range(3):
        chosen = neighbours(boundaries, rows, distance, seed, step)
        assert (document[chosen] == document).all(), "a neighbour is of another document"
        for row, other in enumerate(chosen.tolist()):
            assert other in candidates(boundaries, row, distance)


def test_all_candidates_are_chosen_alike_and_the_relation_is_symmetric() -> None:
    boundaries = np.array([3, 0, 0, 0, 0, 1, 2, 1, 3], dtype=np.uint8)
    rows = np.arange(len(boundaries))
    counts = np.zeros((len(rows), len(rows)))
    for step in range(3000):
        counts[rows, neighbours(boundaries, rows, 2, step=step)] += 1
    for row in rows.tolist():
        expected = candidates(boundaries, row, 2)
        assert set(np.flatnonzero(counts[row])) == expected
        assert np.abs(counts[row, list(expected)] - 3000 / len(expected)).max() < 150, (
            "some come more often than others"
        )
    within = counts[:5, :5] > 0  # the first paragraph
    assert (within == within.T).all() and not within.diagonal().any()
    assert candidates(boundaries, 8, 2) == {8}, "a document of one sentence"


@given(st.integers(0, 2**40), st.integers(0, 10**9), st.data())
@settings(max_examples=30, deadline=None)
def test_choices_are_functions_of_seed_step_and_row(seed: int, step: int, data: st.DataObject) -> None:
    """Whatever other rows are asked for with a row, as on another number of workers, and in whatever order."""
    boundaries = np.array([3] + [0] * 63, dtype=np.uint8)
    rows = np.array(data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=20, unique=True)))
    everything = np.arange(64)
    assert (
        neighbours(boundaries, rows, 3, seed, step) == neighbours(boundaries, everything, 3, seed, step)[rows]
    ).all()
    lengths = 1 + everything % 30
    whole = choose_crops(everything, lengths, ratio=0.5, seed=seed, step=step)
    some = choose_crops(rows, lengths[rows], ratio=0.5, seed=seed, step=step)
    assert (some[0] == whole[0][rows]).all() and (some[1] == whole[1][rows]).all()


def test_seeds_and_steps_choose_differently() -> None:
    boundaries = np.array([3] + [0] * 499, dtype=np.uint8)
    rows = np.arange(500)
    first = neighbours(boundaries, rows, 1)
    for other in (neighbours(boundaries, rows, 1, seed=1), neighbours(boundaries, rows, 1, step=1)):
        assert 0.4 < (first == other).mean() < 0.6


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
    st.sampled_from([0.01, 0.5, 0.99]),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_crop_is_a_contiguous_part_between_what_is_around_it(
    lengths: list[int], ratio: float, head: int, tail: int, step: int
) -> None:
    body = np.array(lengths)
    full = body + head + tail
    ids = np.zeros((len(full), max(1, full.max())), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(full):
        ids[row, :length], mask[row, :length] = 1000 * row + np.arange(length), 1
    start, kept = choose_crops(np.arange(len(full)), body, ratio=ratio, seed=0, step=step)
    assert (kept >= np.minimum(np.maximum(ratio * body, 1), body)).all() and (start + kept <= body).all()
    cut, cut_mask = cut_rows(ids, mask, start, kept, head, tail)
    for row, length in enumerate(full):
        begin = head + start[row]
        source = list(range(head)) + list(range(begin, begin + kept[row])) + list(range(length - tail, length))
        assert cut[row, cut_mask[row] == 1].tolist() == [1000 * row + i for i in source]
        assert (np.diff(cut_mask[row]) <= 0).all(), "padding stands at the end"


def test_crops_have_all_lengths_and_places() -> None:
    found = {
        (int(start[0]), int(kept[0]))
        for step in range(400)
        for start, kept in [choose_crops(np.array([5]), np.array([6]), ratio=0.5, seed=0, step=step)]
    }
    assert found == {(start, kept) for kept in (3, 4, 5, 6) for start in range(7 - kept)}


# From text to views


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Callable[..., Config]:
    def build(positives: str = "neighbour", encoder: dict[str, Any] | None = None, **data: Any) -> Config:
        return make_config(
            {
                "encoder": {"name": str(tiny_model), **(encoder or {})},
                "data": {"positives": positives, **data},
                "train": {"global_batch_size": 8},
                "clustering": {"num_clusters": 0},
                "runtime": {"storage_path": str(tmp_path / "runs")},
            }
        )

    return build


TEXTS = sentences(9)
BOUNDARIES = [3, 0, 0, 3, 0, 3, 0, 0, 0]


def corpus(directory: Path, kind: str) -> dict[str, Any]:
    """Three documents of 3, 2 and 4 sentences; the second ends with a row without text."""
    names = [10, 10, 10, 4, 4, 4, 10, 10, 10, 10]
    rows = [*TEXTS[:5], " ", *TEXTS[5:]]
    path = directory / f"corpus.{kind}"
    if kind == "txt":
        path.write_text("\n".join([*TEXTS[:3], "", *TEXTS[3:5], " ", "", *TEXTS[5:]]))
        return {"corpus": str(path)}
    if kind == "md":
        path.write_text("# A\n\nYes! " + " ".join(TEXTS[:2]) + "\n\n" + TEXTS[2] + "\n\n## B\n\n" + " ".join(TEXTS[3:]))
        return {"documents": str(path)}
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "page": n}) + "\n" for t, n in zip(rows, names, strict=True)))
    elif kind == "csv":
        path.write_text("text,page\n" + "".join(f'"{t}",{n}\n' for t, n in zip(rows, names, strict=True)))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": rows, "page": names}), path)
    return {"corpus": str(path), "document_column": "page"}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet", "md"])
def test_prepare_keeps_where_documents_begin(config: Callable[..., Config], tmp_path: Path, kind: str) -> None:
    prepared = prepare(config(**corpus(tmp_path, kind)))
    store = TokenStore.open(prepared.tokens_dir)
    everything = np.arange(len(store))
    assert store.texts(everything) == TEXTS
    expected = [3, 0, 1, 2, 0, 0, 0, 0, 0] if kind == "md" else BOUNDARIES
    assert store.boundaries(everything).tolist() == expected
    assert store.boundaries(np.array([3, 0, 4])).tolist() == [expected[3], 3, 0]
    if kind != "md":
        assert prepared.manifest["documents"] == 3 and prepared.manifest["alone"] == 0
        assert "3 documents, 0 sentences alone" in describe(store)


def test_sentences_alone_in_their_section_are_counted(config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["\n".join(TEXTS[:3]), *TEXTS[3:5], "\n".join(TEXTS[5:8]), TEXTS[8]]))
    manifest = prepare(config(corpus=str(tmp_path / "a.txt"))).manifest
    assert (manifest["documents"], manifest["alone"]) == (5, 3)


@pytest.mark.parametrize("prompt", [None, 'this sentence : "{sentence}" means'])
def test_second_views(config: Callable[..., Config], tmp_path: Path, prompt: str | None) -> None:
    data, encoder = corpus(tmp_path, "txt"), {"prompt": prompt} if prompt else {}
    asked = config("neighbour", encoder, **data)
    tokenizer = load_tokenizer(asked)
    store = TokenStore.open(prepare(asked).tokens_dir)
    rows = np.array([4, 0, 8])
    ids, mask = store.tokens(rows, tokenizer.pad_token_id)
    assert Positives(config("dropout", encoder, **data), store, tokenizer)(rows, ids, mask, 0) is None

    second = Positives(asked, store, tokenizer)(rows, ids, mask, 0)
    assert second is not None
    chosen = choose_neighbours(rows, store.boundaries, len(store), distance=1, seed=42, step=0)
    assert chosen.tolist() == [3, 1, 7], "each has one neighbour"
    assert all((a == b).all() for a, b in zip(second, store.tokens(chosen, tokenizer.pad_token_id), strict=True))

    crops = Positives(config("crop", encoder, **data), store, tokenizer)
    seen = set()
    for step in range(20):
        cut, cut_mask = crops(rows, ids, mask, step) or pytest.fail("there is no second view")
        for row in range(3):
            whole = tokenizer.decode(ids[row, mask[row] == 1])
            part = tokenizer.decode(cut[row, cut_mask[row] == 1])
            body = part.removeprefix("[CLS]").removesuffix("[SEP]").strip()
            if prompt:
                assert body.startswith('this sentence : "') and body.endswith('" means')
                body = body.removeprefix('this sentence : "').removesuffix('" means').strip()
            assert body and body in whole
            seen.add(body)
    assert len(seen) > 20


LOOSE = {
    "text without blank lines": ("corpus.txt", "\n".join(TEXTS), r"no blank line between sentences"),
    "json without a column": (
        "corpus.jsonl",
        "".join(json.dumps({"text": t}) + "\n" for t in TEXTS),
        r"data\.document_column",
    ),
    "a document a sentence": ("corpus.txt", "\n\n".join(TEXTS), r"none of the 9 sentences .* has another one"),
}


@pytest.mark.parametrize("case", LOOSE)
def test_neighbours_need_documents(config: Callable[..., Config], tmp_path: Path, case: str) -> None:
    name, text, reason = LOOSE[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=reason) as caught:
        prepare(config(corpus=str(tmp_path / name)))
    for remedy in ("data.documents", "blank line", "data.document_column", "dropout or crop"):
        assert remedy in str(caught.value)
    assert prepare(config("crop", corpus=str(tmp_path / name))).manifest["rows"] == 9


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("jsonl", {"document_column": "pagina"}, r"no column 'pagina'; the columns are: 'text', 'page'"),
        ("parquet", {"document_column": "pagina"}, r"no column 'pagina'.*document_column"),
        ("txt", {"document_column": "page"}, r"which has no column 'page'.*blank line"),
    ],
)
def test_columns_that_are_not_there(
    config: Callable[..., Config], tmp_path: Path, kind: str, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        prepare(config(**{**corpus(tmp_path, kind), **change}))


def test_a_row_without_its_document_is_refused(config: Callable[..., Config], tmp_path: Path) -> None:
    for value in (None, 1.5, ""):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "One.", "page": value}) + "\n")
        with pytest.raises(DataError, match=r"a\.jsonl:1: column 'page' holds .* a text or a whole number"):
            prepare(config(corpus=str(tmp_path / "a.jsonl"), document_column="page"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"corpus": "a.txt", "neighbour_distance": 2}, r"neighbour_distance is 2, but data.positives is dropout"),
        (
            {"corpus": "a.txt", "positives": "neighbour", "crop_ratio": 0.3},
            r"crop_ratio is 0\.3.*positives to crop",
        ),
        (
            {"corpus": "demo", "document_column": "page"},
            r"document_column is 'page', but the text is that of whole",
        ),
        ({"corpus": "a.csv", "document_column": "text"}, r"document_column is 'text', the column that holds the text"),
    ],
)
def test_options_that_mean_nothing_are_refused(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_config({"data": data})
