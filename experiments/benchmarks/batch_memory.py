"""The memory of one training step by the size of the batch, all activations held and with the gradient cached.

    python experiments/benchmarks/batch_memory.py 512 8192 --chunk 256

Each figure is the peak resident memory of a process of its own, less what it had before its first step. The corpus and
the model are the quickstart's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batches", type=int, nargs="+")
    parser.add_argument("--chunk", type=int, default=256, help="sentences whose activations are held at a time")
    parser.add_argument("--held", type=int, default=2048, help="largest batch that is tried without caching")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cached", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.batches[0], arguments.chunk, arguments.cached)))
        return
    print(f"{'batch':>6} {'activations':>24} {'whole process':>14} {'of the step':>12} {'seconds':>8}")
    for batch in arguments.batches:
        for cached in (False, True):
            if not cached and batch > arguments.held:
                continue
            command = [sys.executable, __file__, str(batch), "--chunk", str(arguments.chunk), "--worker"]
            done = subprocess.run(command + ["--cached"] * cached, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            used = json.loads(done.stdout.splitlines()[-1])
            kind = f"of {arguments.chunk} at a time" if cached else "all held"
            peak, step = (used[key] / 2**30 for key in ("peak", "step"))
            print(f"{batch:>6} {kind:>24} {peak:>10.2f} GiB {step:>8.2f} GiB {used['seconds']:>8.1f}", flush=True)


def measure(batch: int, chunk: int, cached: bool) -> dict[str, float]:
    """One step with clusters, after a small one that sets everything up."""
    import torch
    from racing import QUICKSTART, quiet_run, take_step

    from clusterns_ray.config import load_config
    from clusterns_ray.data.prepare import prepare

    config = load_config(
        QUICKSTART,
        [
            f"train.global_batch_size={batch}",
            f"train.shards={max(1, batch // 64)}",
            f"train.cache_chunk={chunk if cached else 'null'}",
            "evaluation.sts=null",
            "evaluation.also=[]",
            "data.positives=dropout",
            "clustering.num_clusters=128",
        ],
    )
    run = quiet_run(config, prepare(config).tokens_dir, Path("."))
    run.clustering.set_centroids(torch.randn(128, run.encoder.width))
    run.views(run.batch(0)[1][:1])[0].sum().backward()
    run.optimizer.clip_gradients()
    run.optimizer.step(0.0)
    before = _peak()
    began = time.perf_counter()
    take_step(run, 0)
    return {"peak": _peak(), "step": _peak() - before, "seconds": time.perf_counter() - began}


def _peak() -> float:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
