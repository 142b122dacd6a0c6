"""Run one configuration with several seeds, and print mean and standard deviation of its dev scores.

    python experiments/seeds.py experiments/minilm-cpu.yaml --seeds 1 2 3 --name simcse --set clustering.num_clusters=0

Runs are named NAME-seedS; finished ones are not repeated, unfinished ones are resumed.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from clusterns_ray import load_config, train
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.progress import progress_watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--name", required=True, help="runs are named NAME-seedS")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        overrides = [*arguments.set, f"seed={seed}", f"runtime.name={arguments.name}-seed{seed}"]
        watch = progress_watch()
        try:
            results.append(train(load_config(arguments.config, overrides), watch))
        finally:
            watch.close()
    print(f"\n{arguments.name}: {len(results)} seeds, {results[0]['dev']}, Spearman x 100")
    for key, text in (
        ("sts_dev_before", "before"),
        ("sts_dev", "best step, chosen on this set"),
        ("sts_dev_last", "last step"),
    ):
        scores = [result[key] for result in results]
        deviation = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        print(f"  {text:30} {statistics.mean(scores):.2f} +- {deviation:.2f}   {[round(s, 2) for s in scores]}")


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
