"""The second view of a sentence: itself under other dropout, a neighbour of it in its document, or a crop.

Which neighbour and which crop are pure functions of the seed, the step and the row, so that they are the same on any
number of workers and after a resumption. Neighbours as positives: Giorgi et al., "DeCLUTR: Deep Contrastive Learning
for Unsupervised Textual Representations", ACL 2021.

Shape suffixes: B rows, T tokens, X candidates of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from clusterns_ray.config import Config
from clusterns_ray.data.corpus import is_table, list_sources
from clusterns_ray.data.document import Boundary
from clusterns_ray.data.sampler import random_draws
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.errors import DataError
from clusterns_ray.models.tokenization import prompt_affixes


def choose_neighbours(
    rows_B: np.ndarray,
    boundaries: Callable[[np.ndarray], np.ndarray],
    num_rows: int,
    *,
    distance: int,
    seed: int,
    step: int,
) -> np.ndarray:
    """For each row another one of its paragraph, else of its section, at most ``distance`` rows away; else itself.

    All that there are to choose from are equally likely.

    Args:
        rows_B: int64 row numbers of the corpus.
        boundaries: the :class:`Boundary` of each of some rows, as uint8; the first row begins a document.
        num_rows: of the corpus.

    Returns:
        int64 row numbers (B).
    """
    steps = np.arange(distance)
    # What lies between a row and the ones before it begins with the row itself; after it, with the next one.
    before_BX = _crossed(rows_B[:, None] - steps, boundaries, num_rows)
    after_BX = _crossed(rows_B[:, None] + 1 + steps, boundaries, num_rows)
    crossed_BX = np.concatenate([before_BX, after_BX], axis=1)
    allowed_BX = crossed_BX < Boundary.PARAGRAPH
    alone_B = ~allowed_BX.any(axis=1)
    allowed_BX[alone_B] = crossed_BX[alone_B] < Boundary.SECTION
    count_B = allowed_BX.sum(axis=1)
    draw_B = random_draws(rows_B, "neighbour", seed, step) % np.maximum(count_B, 1)
    chosen_B = (allowed_BX.cumsum(axis=1) > draw_B[:, None]).argmax(axis=1)
    offsets_X = np.concatenate([-1 - steps, 1 + steps])
    return np.where(count_B > 0, rows_B + offsets_X[chosen_B], rows_B)


def _crossed(rows_BX: np.ndarray, boundaries: Callable[[np.ndarray], np.ndarray], num_rows: int) -> np.ndarray:
    """The largest boundary up to each column: uint8 (B, X). The ends of the corpus are ends of documents."""
    inside_BX = (rows_BX >= 0) & (rows_BX < num_rows)
    boundary_BX = np.full(rows_BX.shape, Boundary.DOCUMENT, dtype=np.uint8)
    boundary_BX[inside_BX] = boundaries(rows_BX[inside_BX])
    return np.maximum.accumulate(boundary_BX, axis=1)


def choose_crops(
    rows_B: np.ndarray, lengths_B: np.ndarray, *, ratio: float, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each row a contiguous part of its tokens: of at least ``ratio`` of them, and of one at least.

    All lengths from there to the whole are equally likely, and so are all places for a length.

    Args:
        rows_B: int64 row numbers of the corpus.
        lengths_B: tokens of each, special ones and prompt left out.

    Returns:
        First token and number of tokens of each part: int64 (B) both.
    """
    least_B = np.minimum(np.maximum(np.ceil(ratio * lengths_B).astype(np.int64), 1), lengths_B)
    draw_B = random_draws(rows_B, "crop_length", seed, step)
    kept_B = least_B + draw_B % (lengths_B - least_B + 1)
    draw_B = random_draws(rows_B, "crop_start", seed, step)
    return draw_B % (lengths_B - kept_B + 1), kept_B


def cut_rows(
    ids_BT: np.ndarray, mask_BT: np.ndarray, start_B: np.ndarray, kept_B: np.ndarray, head: int, tail: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keep of each row its first ``head`` and last ``tail`` tokens, and ``kept_B`` tokens between from ``start_B`` on.

    Returns:
        ids and mask of the shorter rows, padded on the right to the longest of them.
    """
    length_B = mask_BT.sum(axis=1)
    column_T = np.arange(ids_BT.shape[1])
    after_BT = column_T >= head + kept_B[:, None]
    source_BT = column_T + np.where(after_BT, (length_B - head - tail - kept_B)[:, None], start_B[:, None])
    source_BT[:, :head] = column_T[:head]
    new_B = head + kept_B + tail
    longest = int(new_B.max(initial=0))
    source_BT = np.minimum(source_BT, ids_BT.shape[1] - 1)[:, :longest]
    mask = (column_T[:longest] < new_B[:, None]).astype(mask_BT.dtype)
    # What pads the cut rows is whatever the row had there: the mask hides it, as it hides any padding.
    return np.take_along_axis(ids_BT, source_BT, axis=1), mask


class Positives:
    """The tokens of second views, as ``data.positives`` has them."""

    def __init__(self, config: Config, tokens: TokenStore, tokenizer: Any) -> None:
        """
        Raises:
            DataError: neighbours are asked for, and the corpus has no documents.
        """
        check_positives(config, tokens.manifest)
        self.config, self.tokens, self.pad_id = config, tokens, tokenizer.pad_token_id or 0
        head, tail = prompt_affixes(config.encoder.prompt or "{sentence}", tokenizer)
        self.head, self.tail = len(head), len(tail)

    def __call__(
        self, rows_B: np.ndarray, ids_BT: np.ndarray, mask_BT: np.ndarray, step: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids and mask of the second views of some rows, given those of the first; None where they are the same."""
        data, seed = self.config.data, self.config.seed
        if data.positives == "neighbour":
            store = self.tokens
            distance = data.neighbour_distance
            chosen = choose_neighbours(rows_B, store.boundaries, len(store), distance=distance, seed=seed, step=step)
            return store.tokens(chosen, self.pad_id)
        if data.positives == "crop":
            body_B = np.maximum(mask_BT.sum(axis=1) - self.head - self.tail, 0)
            start_B, kept_B = choose_crops(rows_B, body_B, ratio=data.crop_ratio, seed=seed, step=step)
            return cut_rows(ids_BT, mask_BT, start_B, kept_B, self.head, self.tail)
        return None


REMEDY = (
    "Name whole documents (.jsonl, .md or .txt) as data.documents and leave data.corpus out; or put a blank line "
    "between the documents of a text file; or name the column of a csv, jsonl or parquet file that names the document "
    "as data.document_column, with the sentences of a document one after the other; or set data.positives to dropout "
    "or crop."
)


def check_columns(config: Config) -> None:
    """Refuse neighbours in files with columns where none is said to name the document; before any of them is read.

    Raises:
        DataError: it names one.
    """
    data = config.data
    if data.positives != "neighbour" or data.corpus in (None, "demo") or data.document_column is not None:
        return
    sources = list_sources(data.corpus or "")
    if all(is_table(source) for source in sources):
        raise DataError(
            f"data.positives is neighbour, but which document a row of {sources[0].path} belongs to is not known, as "
            "data.document_column is not set.",
            REMEDY,
        )


def check_positives(config: Config, manifest: dict[str, Any]) -> None:
    """Refuse neighbours in a corpus without documents, or without a sentence that has a neighbour.

    Args:
        manifest: of the token store.

    Raises:
        DataError: it says why, and what to do.
    """
    data = config.data
    if data.positives != "neighbour":
        return
    corpus, documents = data.corpus or data.documents, manifest["documents"]
    if data.corpus not in (None, "demo") and data.document_column is None and documents <= manifest["counts"]["files"]:
        raise DataError(
            f"data.positives is neighbour, but {corpus!r} has no documents: it has no blank line between sentences, so "
            "lines that follow each other may have nothing to do with each other.",
            REMEDY,
        )
    if manifest["alone"] == manifest["rows"]:
        raise DataError(
            f"data.positives is neighbour, but none of the {manifest['rows']:,} sentences of {corpus!r} has another "
            "one of its section beside it.",
            REMEDY,
        )
