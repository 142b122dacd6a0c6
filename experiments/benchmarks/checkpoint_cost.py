"""How long checkpoints hold training up, at the interval that a configuration has.

    CLUSTERNS_DATA=/data python experiments/benchmarks/checkpoint_cost.py experiments/minilm-cpu.yaml
    ... --store s3://BUCKET/PREFIX      # copied there as well, by the thread that does so in every run

Trains twice, in turn with hardly any checkpoints and with those of the configuration; without a dev set, as its
evaluations would make their share smaller. Figures are those of each run's ``result.json``: seconds of the steps alone,
where copying in the background shows, and seconds that the loop waited for checkpoints, with their share of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from clusterns_ray.config import load_config
from clusterns_ray.launch.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--store", help="s3://BUCKET/PREFIX, gs://..., or a directory; a temporary one by default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {"hardly any": [], "as configured": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(arguments.rounds):
            for kind, runs in results.items():
                settings = [
                    *arguments.set,
                    "evaluation.sts=null",
                    "evaluation.also=[]",
                    "runtime.num_workers=0",
                    f"runtime.storage_path={arguments.store or scratch}",
                    f"runtime.name=checkpoint-cost-{os.getpid()}-{number}-{kind.split()[0]}",
                ]
                if kind == "hardly any":
                    settings.append("runtime.checkpoint_every_steps=1000000")
                config = load_config(arguments.config, settings)
                runs.append(train(config))
    every = config.runtime.checkpoint_every_steps or config.evaluation.every_steps  # of the last, as configured
    shown = {
        kind: {
            key: statistics.median(result[key] for result in runs) for key in ("steps", "seconds", "checkpoint_seconds")
        }
        for kind, runs in results.items()
    }
    for kind, values in shown.items():
        share = values["checkpoint_seconds"] / (values["seconds"] + values["checkpoint_seconds"])
        print(
            f"checkpoints {kind + ':':<15}{values['steps']:.0f} steps in {values['seconds']:.1f} s, and "
            f"{values['checkpoint_seconds']:.2f} s for checkpoints ({share:.1%})"
        )
    print(f"As configured is every {every} steps. Medians of {arguments.rounds} rounds.")
    if arguments.json is not None:
        record = {"every": every, "cpus": os.cpu_count(), "runs": results}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
