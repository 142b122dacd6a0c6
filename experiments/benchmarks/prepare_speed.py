"""What `clusterns prepare` takes of a processor: in one process, of a worker, and of the process that asks workers.

    CLUSTERNS_DATA=... python experiments/benchmarks/prepare_speed.py --rows 300000

Processor seconds, which other work on the machine changes little. The text is data.corpus, repeated.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from clusterns_ray.config import Config, load_config
from clusterns_ray.data import pieces
from clusterns_ray.data import prepare as one_process
from clusterns_ray.data.prepare import TokenJob
from clusterns_ray.data.token_parts import PartFiles
from clusterns_ray.data.token_store import merge_parts
from clusterns_ray.io.events import Event, RowsDone
from clusterns_ray.launch import distributed_prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="experiments/minilm-cpu.yaml")
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", type=int, default=100, help="of the last figure: small ones, as only they count")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "corpus.txt")
        lines = Path(str(load_config(arguments.config).data.corpus)).read_bytes().splitlines(keepends=True)
        text.write_bytes(b"".join(islice(cycle(lines), arguments.rows)))

        def configuration(name: str) -> Config:
            sets = {"data.corpus": text, "data.limit": "null", "data.cache_dir": Path(folder, name)}
            return load_config(arguments.config, [f"{key}={value}" for key, value in sets.items()])

        size = text.stat().st_size
        print(f"{arguments.rows:,} rows, {size / arguments.rows:.0f} bytes each")
        began = time.process_time()
        one_process.prepare(configuration("one"))
        show("one process", time.process_time() - began, arguments.rows)

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        one_process.prepare(configuration("worker"), tokenise=lambda job, _: worker(job, arguments.rows))

        pieces.PART_BYTES = size // arguments.parts
        seen: list[float] = []

        def on_event(event: Event) -> None:
            if isinstance(event, RowsDone):
                seen.append(time.process_time())

        began = time.process_time()
        distributed_prepare.prepare(configuration("workers"), on_event, workers=arguments.workers)
        asking = (seen[-1] - seen[0]) / (len(seen) - 1)
        rest = time.process_time() - began - (seen[-1] - seen[0])
        print(f"the process that asks: {1e3 * asking:.1f} ms a part, and {rest:.1f} s before and after")


def worker(job: TokenJob, rows: int) -> tuple[dict[str, object], bool]:
    """Make the parts here, as a worker does."""
    files = PartFiles(job)
    began = time.process_time()
    parts = [files.make_likely(number) for number in range(len(job.parts))]
    show("a worker", time.process_time() - began, rows)
    return merge_parts([part for part in parts if part], job.settings, job.fingerprint), False


def show(what: str, seconds: float, rows: int) -> None:
    print(f"{what}: {seconds:.1f} s, {rows / seconds:,.0f} rows a second")


if __name__ == "__main__":
    main()
