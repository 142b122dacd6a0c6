"""Trials per hour of a study: in a process that is kept from trial to trial, and on Ray workers started for each.

    python experiments/benchmarks/trials_per_hour.py experiments/studies/smoke.yaml --trials 6

The same trials both ways, on one worker, without pruning or confirmation. The first figure counts from the command to
the last trial's end; the second leaves out Ray's start and the first trial, as a long study does not feel them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from clusterns_ray import load_study, tune
from clusterns_ray.console.progress import describe_trial
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.io.events import Event
from clusterns_ray.tuning.events import TrialFailed, TrialScored

WAYS = {"kept process": 0, "workers started for each trial": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.trials < 2:
        parser.error("--trials must be 2 or more, as the first one is left out of the second figure")
    storage = Path(tempfile.mkdtemp(prefix="trials-per-hour-"))
    rates = {}
    try:
        for name, workers in WAYS.items():
            overrides = [
                *arguments.set,
                f"name=workers-{workers}",
                f"workers_per_trial={workers}",
                f"budget.trials={arguments.trials}",
                "concurrent_trials=1",
                "scheduler=none",
                "confirmation.seeds=[]",
                f"runtime.storage_path={storage}",
            ]
            whole, steady = measure(arguments.study, overrides, arguments.trials)
            rates[name] = steady
            print(f"{name:32} {whole:7.1f} trials an hour with the start, {steady:7.1f} without", flush=True)
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    kept, started = rates.values()
    print(f"{kept / started:.1f} times as many in the kept process")


def measure(study: str, overrides: list[str], trials: int) -> tuple[float, float]:
    """Trials an hour, with and without the start."""
    ends: list[float] = []

    def on_event(event: Event) -> None:
        match event:
            case TrialScored(state="finished") | TrialFailed():
                ends.append(time.perf_counter())
                print(f"  {describe_trial(event)}", file=sys.stderr, flush=True)

    began = time.perf_counter()
    tune(load_study(study, overrides), on_event)
    assert len(ends) == trials, f"{len(ends)} of {trials} trials ended"
    return 3600 * trials / (ends[-1] - began), 3600 * (trials - 1) / (ends[-1] - ends[0])


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
