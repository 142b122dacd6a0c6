"""How a search index grows: build time, memory and latency for random clustered unit vectors.

    python experiments/benchmarks/index_scale.py 100000 1000000 --json index_scale.json

Each size is built, and then searched, in a process of its own, whose resident memory is measured: at its peak while
building, and after searching, pages of mapped files included. Recall@10 is against exact search, for queries that are
not in the index. The vectors are written to a temporary directory first: 1.5 GB for a million of width 384.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clusterns_ray.inference import faiss_index as vectors
from clusterns_ray.inference.embedding_file import EmbeddingFile, embedding_schema, embedding_table, write_tables
from clusterns_ray.inference.encode import unit_rows
from clusterns_ray.inference.faiss_index import build_index, load_faiss, nearest, open_index
from clusterns_ray.io.events import Event, Note

QUERIES = 200
BLOCK = 8192
SPREAD = 1.2
"""Spread of vectors around their centre, where centres spread by 1: cosines are about 0.4 in a cluster, else 0."""


def draw(rows: int, width: int, centres_CD: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Unit vectors (rows, D) around centres drawn at random."""
    z = centres_CD[random.integers(0, len(centres_CD), rows)]
    return unit_rows(z + SPREAD * random.standard_normal((rows, width), dtype=np.float32))


def write_vectors(path: Path, rows: int, width: int, seed: int) -> np.ndarray:
    """Write ``rows`` vectors as `encode` would, and return queries drawn in the same way."""
    random = np.random.default_rng(seed)
    centres_CD = random.standard_normal((max(rows // 500, 1), width), dtype=np.float32)
    schema = embedding_schema(width, "float32", {"format": 1, "width": width})

    def tables() -> Iterator[pa.Table]:
        for start in range(0, rows, BLOCK):
            z = draw(min(BLOCK, rows - start), width, centres_CD, random)
            yield embedding_table([f"sentence {start + i}" for i in range(len(z))], z, schema)

    write_tables(path, tables(), schema)
    return draw(QUERIES, width, centres_CD, random)


def resident(key: str = "VmRSS") -> float:
    """MB that this process has resident, pages of mapped files included; at its peak so far by the key VmHWM."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 1024


def build(folder: Path, flat_rows: int) -> dict[str, Any]:
    """What the building process measures."""
    vectors.FLAT_ROWS = flat_rows
    load_faiss()
    before, started = resident(), time.perf_counter()

    def on_event(event: Event) -> None:
        if isinstance(event, Note):
            print(f"  {event.text}", file=sys.stderr, flush=True)

    info = build_index(EmbeddingFile(folder / "vectors.parquet"), folder, on_event)
    seconds = time.perf_counter() - started
    (folder / "info.json").write_text(json.dumps(info))
    return {"build_s": seconds, "build_peak_resident_mb": resident("VmHWM") - before, "info": info}


def ask(folder: Path) -> dict[str, Any]:
    """What the searching process measures."""
    info = json.loads((folder / "info.json").read_text())
    queries_QD, exact_QK = np.load(folder / "queries.npy"), np.load(folder / "exact.npy")
    load_faiss()
    before, started = resident(), time.perf_counter()
    index = open_index(folder, info)
    opened_s, after_open = time.perf_counter() - started, resident()
    times, nearest_QK = [], []
    for query_1D in np.split(queries_QD, len(queries_QD)):
        started = time.perf_counter()
        nearest_QK.append(nearest(index, info, query_1D, 10)[1][0])
        times.append(time.perf_counter() - started)
    after = resident()
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(np.array(nearest_QK).tolist(), exact_QK.tolist())])
    return {
        "open_s": opened_s,
        "open_mb": after_open - before,
        "searched_mb": after - before,
        "latency_ms": 1000 * float(np.median(times)),
        "latency_p95_ms": 1000 * float(np.quantile(times, 0.95)),
        "recall_at_10": float(recall),
    }


def in_a_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def measure(rows: int, width: int, seed: int, flat_rows: int, directory: Path) -> dict[str, Any]:
    from faiss.contrib.exhaustive_search import knn_ground_truth

    print(f"{rows:,} vectors: writing", file=sys.stderr, flush=True)
    folder = directory / str(rows)
    folder.mkdir()
    queries_QD = write_vectors(folder / "vectors.parquet", rows, width, seed)
    blocks = EmbeddingFile(folder / "vectors.parquet").blocks()
    exact_QK = knn_ground_truth(queries_QD, blocks, 10, load_faiss().METRIC_INNER_PRODUCT, ngpu=0)[1]
    np.save(folder / "queries.npy", queries_QD)
    np.save(folder / "exact.npy", exact_QK)
    built = in_a_process("--build", str(folder), "--flat-rows", str(flat_rows))
    info = built.pop("info")
    size = sum(stamp["size"] for stamp in info["files"])
    kind = {"kind": info["kind"], "lists": info.get("lists"), "nprobe": info.get("nprobe")}
    return {
        "rows": rows,
        "width": width,
        **kind,
        **built,
        "bytes_per_vector": size / rows,
        **in_a_process("--ask", str(folder)),
    }


def show(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Search index, width {results[0]['width']}, {os.cpu_count()} CPUs")
    columns = {
        "vectors": lambda r: f"{r['rows']:,}",
        "kind": lambda r: r["kind"] if r["kind"] == "flat" else f"ivf {r['lists']:,}, nprobe {r['nprobe']}",
        "build s": lambda r: f"{r['build_s']:.1f}",
        "s a million": lambda r: f"{r['build_s'] / r['rows'] * 1e6:.0f}",
        "peak MB": lambda r: f"{r['build_peak_resident_mb']:,.0f}",
        "bytes a vector": lambda r: f"{r['bytes_per_vector']:,.0f}",
        "MB opened": lambda r: f"{r['open_mb']:,.0f}",
        "MB searched": lambda r: f"{r['searched_mb']:,.0f}",
        "ms a query": lambda r: f"{r['latency_ms']:.1f} (p95 {r['latency_p95_ms']:.1f})",
        "recall@10": lambda r: f"{r['recall_at_10']:.3f}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(*(text(result) for text in columns.values()))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="for the vectors and the indexes, removed afterwards")
    parser.add_argument("--flat-rows", type=int, default=vectors.FLAT_ROWS, help="up to how many an index is flat")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build or given.ask:
        print(json.dumps(build(given.build, given.flat_rows) if given.build else ask(given.ask)))
        return
    results = []
    for rows in given.rows:
        with tempfile.TemporaryDirectory(dir=given.directory) as directory:
            results.append(measure(rows, given.width, given.seed, given.flat_rows, Path(directory)))
    show(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"Wrote {given.json}")


if __name__ == "__main__":
    main()
