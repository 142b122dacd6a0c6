"""Unit vectors in a faiss index on disk; the only importer of faiss for search.

Up to :data:`FLAT_ROWS` embeddings are compared one by one (exact). Beyond, an inverted file (IVF) with half-precision
values: K-means cuts the space into ``4 sqrt(N)`` lists, and a search reads the ``nprobe`` lists nearest to the query.
Half precision takes half the memory and moves no neighbour that matters; 8 bits would take a quarter, but lose two in a
hundred neighbours whatever ``nprobe`` is, and shift scores by 0.001.
Shape suffixes: N embeddings, B of them in a block, Q queries, K neighbours, D width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray.errors import ConfigError
from clusterns_ray.inference.embedding_file import EmbeddingFile
from clusterns_ray.inference.encode import unit_rows
from clusterns_ray.io.events import Note, OnEvent, RowsDone
from clusterns_ray.io.files import replacing, sha256

FLAT_ROWS = 100_000
"""Up to here every embedding is looked at: at width 384 a query reads 150 MB, which takes about 12 ms on two cores."""

SHARD_ROWS = 500_000
"""Embeddings of one index file, which is built in memory: 400 MB at width 384."""

TRAINING_ROWS_PER_LIST = 40
MAX_TRAINING_ROWS = 500_000
RECALL_TARGET = 0.97
"""The recall to reach on the sample. The mean of 256 queries is known to half a point, so 0.95 holds for others too."""

RECALL_QUERIES = 256
RECALL_K = 10
SEED = 0


def build_index(file: EmbeddingFile, folder: Path, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
    """Write the index files of all embeddings to ``folder``; no more than a shard of them is held in memory.

    Returns:
        ``kind`` (flat or ivf), ``rows``, ``width``, ``bytes_per_embedding`` (of the index file, to which the centroids
        of the lists come), ``files``, ``sha256`` of each by its path; of an IVF also ``lists``, ``nprobe``, and
        ``recall``: the share of the 10 exact nearest neighbours that a search finds, mean over ``recall_queries`` rows
        of the corpus, themselves left out.
    """
    faiss = load_faiss()
    rows, width = len(file), file.width
    common = {"rows": rows, "width": width}
    if rows <= FLAT_ROWS:
        index = faiss.IndexFlatIP(width)
        for n_BD in _unit_blocks(file, on_event):
            index.add(n_BD)
        files = [_save(index, folder, 0)]
        info = {"kind": "flat", **common, "bytes_per_embedding": 4 * width, "files": files}
        return {**info, "sha256": _digests(files, folder)}

    lists = round(4 * math.sqrt(rows))
    draw = np.random.default_rng(SEED)
    sample = min(rows, TRAINING_ROWS_PER_LIST * lists, MAX_TRAINING_ROWS)
    on_event(Note(f"Training {lists:,} lists on {sample:,} of {rows:,} embeddings"))
    index = _empty_ivf(width, lists)
    index.cp.min_points_per_centroid = 1
    sample_SD = file.vectors(np.sort(draw.choice(rows, sample, replace=False)))
    faiss.normalize_L2(sample_SD)
    index.train(sample_SD)
    del sample_SD
    files, start = [_save(index, folder, 0)], 0
    for n_BD in _unit_blocks(file, on_event):
        index.add_with_ids(n_BD, np.arange(start, start + len(n_BD)))
        start += len(n_BD)
        if index.ntotal >= SHARD_ROWS or start == rows:
            shard = _empty_ivf(width, lists)  # without the centroids, which the first file holds
            shard.replace_invlists(index.invlists, False)
            shard.ntotal = index.ntotal
            files.append(_save(shard, folder, len(files)))
            index.reset()
    info = {"kind": "ivf", **common, "bytes_per_embedding": index.code_size + 8, "files": files, "lists": lists}
    info["sha256"] = _digests(files, folder)
    queries = np.sort(draw.choice(rows, min(RECALL_QUERIES, rows), replace=False))
    on_event(Note(f"Measuring recall@{RECALL_K} on {len(queries)} sentences against exact search"))
    return {**info, **_choose_nprobe(open_index(folder, info), info, file, queries)}


def _empty_ivf(width: int, lists: int) -> Any:
    faiss = load_faiss()
    return faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )


def _unit_blocks(file: EmbeddingFile, on_event: OnEvent = lambda event: None) -> Iterator[np.ndarray]:
    done = 0
    for z_BD in file.blocks():
        yield unit_rows(z_BD)
        done += len(z_BD)
        on_event(RowsDone("indexed", done, len(file)))


def _save(index: Any, folder: Path, number: int) -> dict[str, Any]:
    path = folder / f"index-{number:05d}.faiss"
    with replacing(path) as temporary:
        load_faiss().write_index(index, str(temporary))
    return stamp_of(path, folder)


def _digests(files: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    return {stamp["path"]: sha256(folder / stamp["path"]) for stamp in files}


def open_index(folder: Path, info: dict[str, Any]) -> Any:
    """Memory-map an index. Of an IVF the first file holds the centroids, each other one a part of every list."""
    faiss = load_faiss()
    first, *rest = (str(folder / stamp["path"]) for stamp in info["files"])
    if info["kind"] == "flat":
        return faiss.read_index(first, faiss.IO_FLAG_MMAP_IFC)
    index = faiss.read_index(first)
    shards = [faiss.read_index(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY) for path in rest]
    parts = faiss.InvertedListsPtrVector()
    for shard in shards:
        lists = faiss.downcast_InvertedLists(shard.invlists)
        lists.prefetch_nthread = 4  # The default, a thread for each of 32 lists, takes longer than reading them.
        parts.push_back(lists)
    stack = faiss.HStackInvertedLists(parts.size(), parts.data())
    index.replace_invlists(stack, False)
    index.ntotal = info["rows"]
    index.referenced_objects = (stack, shards)  # What the index points to has to live as long as it does.
    return index


def nearest(index: Any, info: dict[str, Any], n_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, both (Q, k), of unit queries; row -1 stands for none."""
    if info["kind"] == "flat":
        return index.search(n_QD, k)
    faiss, nprobe = load_faiss(), info["nprobe"]
    scores_QK, rows_QK = index.search(n_QD, k, params=faiss.SearchParametersIVF(nprobe=nprobe))
    while nprobe < info["lists"]:
        short = np.flatnonzero(rows_QK.min(axis=1) < 0)  # the lists that were read do not hold k sentences
        if not len(short):
            break
        nprobe = min(2 * nprobe, info["lists"])
        # Those queries alone: an answer may not depend on what is asked along with it.
        wider = index.search(n_QD[short], k, params=faiss.SearchParametersIVF(nprobe=nprobe))
        scores_QK[short], rows_QK[short] = wider
    return scores_QK, rows_QK


def _choose_nprobe(index: Any, info: dict[str, Any], file: EmbeddingFile, queries: np.ndarray) -> dict[str, Any]:
    """The fewest lists to read at which recall reaches the target; see :func:`build_index` for what is returned."""
    from faiss.contrib.exhaustive_search import knn_ground_truth

    n_QD = unit_rows(file.vectors(queries))
    depth = min(10 * RECALL_K, len(file))
    exact = knn_ground_truth(n_QD, _unit_blocks(file), depth, load_faiss().METRIC_INNER_PRODUCT, ngpu=0)
    good = good_neighbours(*exact, queries)
    judged = [place for place, rows in enumerate(good) if rows is not None]

    def recall(nprobe: int) -> float:
        rows_QK = nearest(index, {**info, "nprobe": nprobe}, n_QD[judged], RECALL_K + 1)[1]
        good_among_first = [
            len(set([row for row in rows if row != queries[place]][:RECALL_K]) & (good[place] or set()))
            for place, rows in zip(judged, rows_QK.tolist())
        ]
        return float(np.mean(good_among_first)) / RECALL_K

    if not judged:
        return {"nprobe": info["lists"], "recall": 1.0, "recall_queries": 0}
    nprobe, value = fewest(recall, info["lists"])
    return {"nprobe": nprobe, "recall": value, "recall_queries": len(judged)}


def good_neighbours(scores_QK: np.ndarray, rows_QK: np.ndarray, queries: np.ndarray) -> list[set[int] | None]:
    """Rows at least as similar to each query as its tenth nearest other row, so that of equal ones any counts.

    None where all rows that were searched for are equal (a sentence repeated many times), as there may be more.
    """
    good: list[set[int] | None] = []
    for scores, rows, own in zip(scores_QK, rows_QK, queries):
        other = rows != own
        scores, rows = scores[other], rows[other]
        close = scores >= scores[RECALL_K - 1] - 1e-6
        good.append(None if close.all() and len(close) > RECALL_K else set(rows[close].tolist()))
    return good


def fewest(recall: Callable[[int], float], most: int) -> tuple[int, float]:
    """The smallest ``n`` in 1..most at which a growing function reaches the target, else ``most``; and its value."""
    high, value = 1, recall(1)
    while value < RECALL_TARGET and high < most:
        high = min(2 * high, most)
        value = recall(high)
    low = high // 2
    while high - low > 1 and value >= RECALL_TARGET:
        middle = (low + high) // 2
        if (reached := recall(middle)) >= RECALL_TARGET:
            high, value = middle, reached
        else:
            low = middle
    return high, value


def load_faiss() -> Any:
    """The module, or a ConfigError that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        from clusterns_ray.clustering.backend import faiss_conflict

        raise ConfigError(
            faiss_conflict()
            or f"Search needs faiss, which cannot be imported ({error}). Install it: pip install faiss-cpu."
        ) from None
    return faiss


def stamp_of(path: Path, folder: Path) -> dict[str, Any]:
    """A file as it is now; by its way from ``folder``, so that both can be moved together."""
    stat = path.stat()
    return {"path": os.path.relpath(path, folder), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
