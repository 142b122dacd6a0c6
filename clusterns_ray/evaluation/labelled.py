"""Files of labelled sentences: ``label<TAB>sentence`` a line, for classification and clustering."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clusterns_ray.data.readers import read_lines
from clusterns_ray.errors import DataError


@dataclass(frozen=True)
class Labelled:
    """Rows of a file, in its order."""

    labels: np.ndarray
    """(N) strings"""
    columns: list[list[str]]
    """one list of N sentences, or two for pairs"""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sentences(self) -> list[str]:
        """The only column."""
        (sentences,) = self.columns
        return sentences


def labelled(rows: list[tuple[str, ...]]) -> Labelled:
    """Make columns of rows, each a label and one sentence or more."""
    labels, *columns = zip(*rows, strict=True)
    return Labelled(np.array(labels), [list(column) for column in columns])


def read_labelled(path: str | Path, sentences: int = 1, *, header: bool = False, loose_tabs: bool = False) -> Labelled:
    """Read a label and ``sentences`` texts a line, with tabs between them; blank lines are passed over.

    Args:
        header: the first line names the columns and is no row.
        loose_tabs: tabs after the first one belong to the (only) sentence, as spaces.

    Raises:
        ConfigError: there is no such file, or it is not a regular one.
        DataError: it is not UTF-8, a line has other columns, or there are fewer than two labels.
    """
    wanted = "<TAB>".join(["label", *(f"sentence{n + 1}" if sentences > 1 else "sentence" for n in range(sentences))])
    rows = []
    for number, line in read_lines(path):
        if not line.strip() or (header and number == 1):
            continue
        label, *texts = line.split("\t")
        if loose_tabs:
            texts = [" ".join(texts)] if texts else []
        if len(texts) != sentences or not label.strip():
            raise DataError(
                f"{path}:{number}: {line[:80]!r} has {len(texts) + 1} columns and the label {label.strip()[:40]!r}; "
                f"each line must be {wanted}."
            )
        rows.append((label.strip(), *(text.strip() for text in texts)))
    check_labels(path, [row[0] for row in rows])
    return labelled(rows)


def check_labels(path: str | Path, labels: list[str]) -> None:
    """Refuse rows that have no two labels."""
    if len(set(labels)) < 2:
        there = f"one label only, {labels[0]!r}" if labels else "none"
        raise DataError(f"{path}: {len(labels)} rows, and of labels {there}; there must be at least two.")
