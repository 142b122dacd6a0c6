from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from helpers import document_sentences

from clusterns_ray.data.document import Document, Section
from clusterns_ray.data.structure import (
    _across_documents,
    _layouts,
    structure_graded_pairs,
    write_structure_dev,
)
from clusterns_ray.errors import DataError


def sentence(*place: int) -> str:
    """A sentence that names its place: document, section, paragraph, position."""
    letters = " ".join("abcdefghijklmnopqrstuvwxyz"[number // 26] + chr(97 + number % 26) for number in place)
    return f"The mark on this stone reads {letters}."


def invent(document: int, sections: int = 3, paragraphs: int = 3, sentences: int = 4) -> Document:
    return Document(
        f"stone {document}",
        tuple(
            Section(
                f"part {s}",
                tuple(" ".join(sentence(document, s, p, i) for i in range(sentences)) for p in range(paragraphs)),
            )
            for s in range(sections)
        ),
    )


def places(documents: int, sections: int = 3, paragraphs: int = 3, sentences: int = 4) -> dict[str, tuple]:
    return {
        sentence(d, s, p, i): (d, s, p, i)
        for d in range(documents)
        for s in range(sections)
        for p in range(paragraphs)
        for i in range(sentences)
    }


def grade(first: tuple, second: tuple) -> int | None:
    """The grade of two places, or None for sentences of one paragraph that are not neighbours."""
    shared = next(level for level in range(4) if first[level] != second[level])
    return shared if shared < 3 else 3 if abs(first[3] - second[3]) == 1 else None


def unordered(rows: list[dict]) -> list[frozenset]:
    return [frozenset((row["sentence1"], row["sentence2"])) for row in rows]


def test_grades_are_right_by_construction():
    rows = structure_graded_pairs([invent(d) for d in range(6)], pairs=400, seed=3)
    where = places(6)
    assert len(rows) == 400
    for row in rows:
        assert grade(where[row["sentence1"]], where[row["sentence2"]]) == row["score"]


@pytest.mark.parametrize("pairs", [4, 5, 6, 7, 100])
def test_grades_are_balanced(pairs):
    counts = Counter(row["score"] for row in structure_graded_pairs([invent(0), invent(1)], pairs=pairs, seed=0))
    assert sum(counts.values()) == pairs
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_every_pair_can_be_drawn_and_none_twice():
    documents = [invent(d, sections=2, paragraphs=2, sentences=2) for d in range(3)]
    # each document: 4 neighbour pairs, 2 * 4 across paragraphs, 16 across sections; 3 * 64 across documents
    rows = structure_graded_pairs(documents, pairs=48, seed=1)
    assert len(set(unordered(rows))) == 48
    assert {len(pair) for pair in unordered(rows)} == {2}
    neighbours = {pair for pair, row in zip(unordered(rows), rows, strict=True) if row["score"] == 3}
    assert len(neighbours) == 12  # all there are


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_pairs_across_documents_can_be_exhausted(count):
    documents = [invent(d, sections=2, paragraphs=2, sentences=4) for d in range(count)]
    short = [Document(f"slip {d}", (Section("", (sentence(d, 9, 9, 9),)),)) for d in range(count)]
    total = count * (count - 1) // 2
    drawn = _across_documents(_layouts(short), total, np.random.default_rng(0))
    assert len({frozenset(pair) for pair in drawn}) == total
    layouts = _layouts(documents)
    assert (
        len({frozenset(pair) for pair in _across_documents(layouts, total * 256, np.random.default_rng(0))})
        == total * 256
    )


def test_seed_decides():
    documents = [invent(d) for d in range(4)]
    first = structure_graded_pairs(documents, pairs=80, seed=5)
    assert structure_graded_pairs(iter(documents), pairs=80, seed=5) == first
    assert structure_graded_pairs(documents, pairs=80, seed=6) != first


def test_long_documents_do_not_dominate():
    documents = [invent(0, sections=20, paragraphs=5, sentences=20), *(invent(d) for d in range(1, 10))]
    rows = structure_graded_pairs(documents, pairs=400, seed=2)
    long = set(document_sentences(documents[0]))
    for score in range(4):
        sides = [row[side] in long for row in rows if row["score"] == score for side in ("sentence1", "sentence2")]
        assert sum(sides) < 0.25 * len(sides)  # a tenth of the documents, though most of the sentences


def test_neighbours_stand_side_by_side():
    gap = Document("gap", (Section("", (f"{sentence(0, 0, 0, 0)} Hush! {sentence(0, 0, 0, 2)}",)),))
    rows = structure_graded_pairs([gap, invent(1), invent(2)], pairs=80, seed=0)
    pair = frozenset((sentence(0, 0, 0, 0), sentence(0, 0, 0, 2)))
    assert pair not in [p for p, row in zip(unordered(rows), rows, strict=True) if row["score"] == 3]


def test_repeated_sentences_are_left_out():
    refrain = "All of our stones are sold as found."
    documents = [
        Document(
            d.title,
            tuple(Section(s.heading, tuple(f"{p} {refrain}" for p in s.paragraphs)) for s in d.sections),
        )
        for d in (invent(0), invent(1))
    ]
    rows = structure_graded_pairs(documents, pairs=100, seed=0)
    assert not any(refrain in pair for pair in unordered(rows))


@pytest.mark.parametrize(
    ("documents", "match"),
    [
        ([invent(0)], r"grade 0 .*different documents.* 5 pairs are needed and 0 were found in 1 document"),
        ([invent(0, sections=1), invent(1, sections=1)], r"grade 1 .*different sections.* 0 were found"),
        (
            [invent(0, paragraphs=1), invent(1, paragraphs=1)],
            r"grade 2 .*different paragraphs.* 0 were found",
        ),
        ([invent(0, sentences=1), invent(1, sentences=1)], r"grade 3 .*neighbouring.* 0 were found"),
        ([], r"grade 3 .* 0 were found in 0 document"),
    ],
)
def test_a_grade_that_cannot_be_filled(documents, match):
    with pytest.raises(DataError, match=match):
        structure_graded_pairs(documents, pairs=20, seed=0)


def test_written_files(tmp_path):
    documents = [invent(d) for d in range(3)]
    path = write_structure_dev(iter(documents), tmp_path, pairs=42, seed=7)
    assert path == tmp_path / "STRUCTURE" / "dev.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == structure_graded_pairs(documents, pairs=42, seed=7)
    about = json.loads((path.parent / "ABOUT.json").read_text(encoding="utf-8"))
    assert "structure-graded" in about["about"] and "not by human judgement" in about["about"]
    assert about["pairs"] == {str(score): count for score, count in Counter(r["score"] for r in rows).items()}
    assert (about["documents"], about["seed"]) == (3, 7)
    assert set(about["grades"]) == {"0", "1", "2", "3"}
    assert sorted(file.name for file in path.parent.iterdir()) == ["ABOUT.json", "dev.jsonl"]

    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    write_structure_dev(documents, tmp_path, pairs=42, seed=7)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
