"""Run one configuration with several seeds, and print mean and standard deviation of its dev scores.

    python experiments/seeds.py experiments/minilm-cpu.yaml --seeds 1 2 3 --name simcse --set clustering.num_clusters=0

Runs are named NAME-seedS; finished ones are not repeated, unfinished ones are resumed. With --test the seven STS tests
are scored as well: they choose nothing, and are for the final figure alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from clusterns_ray import evaluate, load_config, train
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.progress import progress_watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--name", required=True, help="runs are named NAME-seedS")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--test", action="store_true", help="score the seven STS tests of evaluation.sts, too")
    arguments = parser.parse_args()
    config, results = load_config(arguments.config, arguments.set), []
    if arguments.test and config.evaluation.sts in (None, "structure"):
        raise ConfigError(
            f"--test needs the seven tests, and evaluation.sts is {config.evaluation.sts}. Set a directory."
        )
    for seed in arguments.seeds:
        overrides = [*arguments.set, f"seed={seed}", f"runtime.name={arguments.name}-seed{seed}"]
        watch = progress_watch()
        try:
            config = load_config(arguments.config, overrides)
            results.append(train(config, watch))
        finally:
            watch.close()
    print(f"\n{arguments.name}: {len(results)} seeds, {results[0]['dev']}, Spearman x 100")
    for key, text in (
        ("sts_dev_before", "before"),
        ("sts_dev", "best step, chosen on this set"),
        ("sts_dev_last", "last step"),
    ):
        show(text, [result[key] for result in results])
    if arguments.test:
        tests = [evaluate(result["model"], config.evaluation.sts, note=print) for result in results]
        for task in tests[0]["tasks"]:
            show(task, [test["tasks"][task]["spearman"] for test in tests])
        if tests[0]["average"] is not None:
            show("average of the seven tests", [test["average"] for test in tests])


def show(label: str, scores: list[float]) -> None:
    deviation = statistics.stdev(scores) if len(scores) > 1 else float("nan")
    print(
        f"  {label:30} {statistics.mean(scores):.2f} +- {deviation:.2f}   {[round(s, 2) for s in scores]}", flush=True
    )


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
