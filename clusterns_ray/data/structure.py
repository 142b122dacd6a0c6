"""A structure-graded dev set: pairs of sentences scored by how close they stand in their documents.

It is a stand-in for those who have no graded pairs of their own; it is not human judgement.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clusterns_ray.data.document import Document
from clusterns_ray.data.documents import is_usable, split_sentences
from clusterns_ray.errors import DataError
from clusterns_ray.io.files import write_atomic, write_json

GRADES = {
    3: "neighbouring sentences of a paragraph",
    2: "sentences of different paragraphs of one section",
    1: "sentences of different sections of one document",
    0: "sentences of different documents",
}
ABOUT = (
    "A structure-graded dev set: pairs of sentences scored by how close they stand in their documents, "
    "not by human judgement."
)


@dataclass(frozen=True)
class _Layout:
    """The n usable sentences of a document in order, and the earlier partners of each by grade.

    The earlier sentences that share grade g with sentence j are a contiguous range,
    ``first[g][j] <= i < stop[g][j]``, so pairs can be counted and drawn without listing them.
    """

    sentences: list[str]
    first: dict[int, np.ndarray]
    stop: dict[int, np.ndarray]

    def partners(self, grade: int) -> np.ndarray:
        """Number of earlier partners of each sentence, shape (n,)."""
        return self.stop[grade] - self.first[grade]

    def pair(self, grade: int, rank: int) -> tuple[str, str]:
        """The pair with this rank, 0 <= rank < partners(grade).sum(), earlier sentence first."""
        ends = np.cumsum(self.partners(grade))
        later = int(np.searchsorted(ends, rank, side="right"))
        earlier = int(self.stop[grade][later] - (ends[later] - rank))
        return self.sentences[earlier], self.sentences[later]


def structure_graded_pairs(
    documents: Iterable[Document], *, pairs: int = 2000, seed: int
) -> list[dict[str, str | int]]:
    """Draw pairs of sentences graded 3 (neighbours) to 0 (different documents), a quarter of each.

    Args:
        documents: at least two, with several sections and paragraphs between them.
        pairs: number of pairs, at least 4; the counts per grade differ by at most one.
        seed: of the draw; the same documents and seed give the same list.

    Returns:
        Dicts with ``sentence1``, ``sentence2`` and ``score`` (int), in random order. No pair occurs twice, in
        either order. Documents are chosen uniformly among those that can still give the grade. A sentence
        that occurs more than once in the documents is left out, for its grade would be ambiguous.

    Raises:
        DataError: the documents hold too few pairs of some grade.
    """
    rng = np.random.default_rng(seed)
    layouts = _layouts(documents)
    rows: list[dict[str, str | int]] = []
    for offset, grade in enumerate(GRADES):
        need = (pairs + offset) // len(GRADES)
        drawn = _across_documents(layouts, need, rng) if grade == 0 else _within(layouts, grade, need, rng)
        rows += [{"sentence1": first, "sentence2": second, "score": grade} for first, second in drawn]
    return [rows[index] for index in rng.permutation(len(rows))]


def write_structure_dev(
    documents: Iterable[Document],
    directory: str | Path,
    *,
    pairs: int = 2000,
    seed: int,
) -> Path:
    """Write a structure-graded dev set as ``directory/STRUCTURE/dev.jsonl``, described by ``ABOUT.json``.

    Both files are written atomically, with the same bytes for the same documents, pairs and seed.

    Returns:
        The path of ``dev.jsonl``.

    Raises:
        DataError: as `structure_graded_pairs`.
    """
    documents = list(documents)
    rows = structure_graded_pairs(documents, pairs=pairs, seed=seed)
    counts = Counter(row["score"] for row in rows)
    about = {
        "about": ABOUT,
        "grades": {str(grade): meaning for grade, meaning in GRADES.items()},
        "pairs": {str(grade): counts[grade] for grade in GRADES},
        "documents": len(documents),
        "seed": seed,
    }
    folder = Path(directory, "STRUCTURE")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "ABOUT.json", about)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(folder / "dev.jsonl", "".join(lines))
    return folder / "dev.jsonl"


def _layouts(documents: Iterable[Document]) -> list[_Layout]:
    split = [
        [[split_sentences(paragraph) for paragraph in section.paragraphs] for section in document.sections]
        for document in documents
    ]
    counts = Counter(
        sentence for document in split for section in document for paragraph in section for sentence in paragraph
    )
    return [_layout(document, counts) for document in split]


def _layout(document: list[list[list[str]]], counts: Counter[str]) -> _Layout:
    """Lay out a document given as sections of paragraphs of sentences."""
    sentences: list[str] = []
    section_starts, paragraph_starts, neighbour_starts = [], [], []
    for section in document:
        section_start = len(sentences)
        for paragraph in section:
            paragraph_start = len(sentences)
            after_usable = False  # neighbours stand side by side in the text, with nothing left out between
            for sentence in paragraph:
                usable = counts[sentence] == 1 and is_usable(sentence)
                if usable:
                    section_starts.append(section_start)
                    paragraph_starts.append(paragraph_start)
                    neighbour_starts.append(len(sentences) - after_usable)
                    sentences.append(sentence)
                after_usable = usable
    section_bound = np.array(section_starts, dtype=np.int64)
    paragraph_bound = np.array(paragraph_starts, dtype=np.int64)
    return _Layout(
        sentences,
        first={
            3: np.array(neighbour_starts, dtype=np.int64),
            2: section_bound,
            1: np.zeros_like(section_bound),
        },
        stop={3: np.arange(len(sentences)), 2: paragraph_bound, 1: section_bound},
    )


def _within(layouts: Sequence[_Layout], grade: int, need: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """``need`` distinct pairs of one grade, each from a single document."""
    capacity = [int(layout.partners(grade).sum()) for layout in layouts]
    _check_enough(grade, sum(capacity), need, layouts)
    return [
        layouts[index].pair(grade, int(rank))
        for index, count in _spread(capacity, need, rng).items()
        for rank in rng.choice(capacity[index], size=count, replace=False)
    ]


def _across_documents(layouts: Sequence[_Layout], need: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """``need`` distinct pairs of sentences from different documents.

    The documents stand on a circle, and each owns its pairings with the half that follows it: every pairing
    of two documents is owned once, and evenly, so drawing an owner and then a partner is fair to all.
    """
    filled = [layout.sentences for layout in layouts if layout.sentences]
    circle = [filled[index] for index in rng.permutation(len(filled))]
    sizes = np.array([len(sentences) for sentences in circle], dtype=np.int64)
    owners = np.arange(len(circle))
    widths = (len(circle) - 1) // 2 + ((len(circle) % 2 == 0) & (owners < len(circle) // 2))
    ends = np.concatenate([[0], np.cumsum(np.tile(sizes, 2))])
    capacity = (sizes * (ends[owners + 1 + widths] - ends[owners + 1])).tolist()
    _check_enough(0, sum(capacity), need, layouts)
    drawn = []
    for owner, owner_count in _spread(capacity, need, rng).items():
        first = circle[owner]
        partners = [circle[(owner + step) % len(circle)] for step in range(1, int(widths[owner]) + 1)]
        products = [len(first) * len(second) for second in partners]
        for index, count in _spread(products, owner_count, rng).items():
            second = partners[index]
            ranks = rng.choice(products[index], size=count, replace=False)
            drawn += [(first[rank // len(second)], second[rank % len(second)]) for rank in ranks]
    return drawn


def _spread(capacity: Sequence[int], need: int, rng: np.random.Generator) -> dict[int, int]:
    """Share ``need`` <= sum(capacity) draws out, each to an index uniform among those not yet full."""
    counts: dict[int, int] = {}
    open_indices = [index for index, size in enumerate(capacity) if size]
    for _ in range(need):
        position = int(rng.integers(len(open_indices)))
        index = open_indices[position]
        counts[index] = counts.get(index, 0) + 1
        if counts[index] == capacity[index]:
            open_indices.pop(position)
    return counts


def _check_enough(grade: int, available: int, need: int, layouts: Sequence[_Layout]) -> None:
    if available < need:
        usable = sum(len(layout.sentences) for layout in layouts)
        raise DataError(
            f"Cannot fill grade {grade} of the structure-graded dev set ({GRADES[grade]}): {need} pairs are "
            f"needed and {available} were found in {len(layouts)} document(s), for too few of their {usable:,} usable "
            "sentences (of 4 to 60 words, and not repeated) stand that way. Give more documents with headings and "
            "paragraphs, or ask for fewer pairs."
        )
