"""What a study chooses, and what it costs, by simulation: search with confirmation, seeds that race, a fit.

    python experiments/benchmarks/racing_studies.py [--studies 200] [--only WORD] [--skewed] [--output FILE]

Each study searches a response surface of its own, drawn after what `experiments/LOG.md` has of `minilm-cpu`. The true
mean of a configuration is a bowl over learning rate and temperature, in their logarithms, from 74.6 down to what 0.9
points between the shipped and the best configuration give; the number of clusters and the start cosine move it by
hundredths. A seed adds noise that is smooth over the configurations: deviation 0.45 at any one, of which 0.3 is common
to all, so that paired differences spread by 0.01 to 0.04 where only clusters differ, and by up to 0.5 between far rates
and temperatures; each evaluation (steps 10 to 40) has 0.08 of its own. Sampler, scheduler, and which trial gets a
further seed, are the product's own.

The last way fits what it is to find by its own form, a bowl. With `--skewed` the bowl is four times as steep on one
side of its best as on the other.

Cost is in trained steps, as runs of 40; the base configuration's runs, which both ways have, are left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from racing import environment
from scipy.stats import qmc

from clusterns_ray.io.files import json_text
from clusterns_ray.tuning import racing
from clusterns_ray.tuning.sampling import Sampler
from clusterns_ray.tuning.study import ModelSampler, PlainSampler

STEPS = (10, 20, 30, 40)
CLUSTERS = (0, 16, 32, 64)
SEED, FURTHER, CONFIRMING = 0, (1, 2, 3, 4), (11, 12, 13)
FRESH = range(1000, 1300)
"""Seeds over which a true mean is taken."""
BEST, UNTRAINED = 74.6, 68.0
COMMON, OWN, OF_STEP = 0.3, 0.34, 0.08
"""Deviations of a seed's noise: for all configurations alike, by configuration, and by configuration and step."""
LENGTH = 0.25
"""Over which noise by configuration changes, in shares of the range of rate and temperature."""
WAVES = 64

Point = dict[str, Any]


class Surface:
    """A response surface: dev scores at :data:`STEPS` by configuration and seed.

    The noise is a Gaussian process over configurations, drawn by random Fourier features (Rahimi and Recht, NIPS 2007).
    """

    def __init__(self, number: int, skewed: bool = False) -> None:
        self.steepness = (0.5, 2.0) if skewed else (1.0, 1.0)
        draw = np.random.default_rng([number, 0])
        self.number = number
        self.top, self.curvature = draw.uniform(0.2, 0.8, 2), draw.uniform(3, 9, 2)
        self.by_clusters, self.by_start, self.start = draw.normal(0, 0.02, 4), draw.uniform(0, 0.05), draw.uniform()
        self.half_time = draw.uniform(6, 14)
        self.waves, self.phases = draw.normal(size=(WAVES, 5)) / LENGTH, draw.uniform(0, 2 * np.pi, WAVES)
        self.seed_draws = cache(self._seed_draws)

    def mean(self, point: Point) -> float:
        away = np.array([point["rate"], point["temperature"]]) - self.top
        start = self.by_start * (point["start"] - self.start) ** 2 if point["clusters"] else 0.0
        bowl = float((self.curvature * np.where(away < 0, *self.steepness) * away**2).sum())
        return BEST - bowl + float(self.by_clusters[CLUSTERS.index(point["clusters"])]) - start

    def _seed_draws(self, seed: int) -> tuple[float, np.ndarray, np.ndarray]:
        draw = np.random.default_rng([self.number, 1, seed])
        return draw.normal(0, COMMON), OWN * draw.normal(size=WAVES), OF_STEP * draw.normal(size=(len(STEPS), WAVES))

    def curves(self, point: Point, seeds: Sequence[int]) -> np.ndarray:
        """Scores ``(seeds, steps)``."""
        kind = np.zeros(2)
        at = CLUSTERS.index(point["clusters"])
        kind[at // 2] = 0.03 * (-1) ** at  # differences of some 0.02 between numbers of clusters
        where = np.array([point["rate"], point["temperature"], *kind, 0.05 * point.get("start", 0.0)])
        basis = math.sqrt(2 / WAVES) * np.cos(self.waves @ where + self.phases)
        draws = [self.seed_draws(seed) for seed in seeds]
        noise = np.array([common + own @ basis + by_step @ basis for common, own, by_step in draws])
        reached = 1 - np.exp(-np.array(STEPS) / (self.half_time * (1.6 - point["rate"])))
        return UNTRAINED + (self.mean(point) - UNTRAINED) * reached / reached[-1] + noise

    def true_mean(self, point: Point) -> float:
        """The expected score of a run: its best step."""
        return float(self.curves(point, FRESH).max(axis=1).mean())

    def best(self) -> float:
        rate, temperature = self.top
        tops = [{"clusters": k, "start": self.start, "rate": rate, "temperature": temperature} for k in CLUSTERS]
        return max(map(self.true_mean, tops))


def point_of(trial: optuna.Trial) -> Point:
    point: Point = {"clusters": trial.suggest_categorical("clusters", CLUSTERS)}
    if point["clusters"]:
        point["start"] = trial.suggest_float("start", 0.0, 1.0, step=0.125)
    return point | {key: trial.suggest_float(key, 0.0, 1.0) for key in ("rate", "temperature")}


def search(surface: Surface, sampler: str, runs: int, further: Sequence[int] = ()) -> tuple[optuna.Study, int]:
    """A study of that many runs, and the steps that it trained; with ``further`` seeds they race."""
    config = ModelSampler(name="tpe", seed=surface.number, startup_trials=8)
    study = optuna.create_study(
        direction="maximize",
        sampler=Sampler(
            config if sampler == "tpe" else PlainSampler(name="random", seed=surface.number),
            partial(racing.MergedStudy, seed=SEED),
        ),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=STEPS[0], reduction_factor=2),
    )
    steps, seeds = 0, (SEED, *further)
    for _ in range(runs):
        due = racing.next_run(study.get_trials(deepcopy=False), seeds) if further else None
        if due is not None:
            study.enqueue_trial(due[0].params, {racing.RACE: [due[0].number, due[1]]})
        trial = study.ask()
        curve = surface.curves(point_of(trial), [due[1] if due else SEED])[0]
        for step, score in zip(STEPS, curve, strict=True):
            trial.report(score, step)
            steps += STEPS[0]
            trials = study.get_trials(deepcopy=False)
            stops = racing.stops(trials, seeds, trials[trial.number], step) if due else trial.should_prune()
            if stops and step < STEPS[-1]:
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, float(curve.max()))
    return study, steps


def confirmed(surface: Surface, sampler: str) -> tuple[Point, float]:
    """24 trials, the best three of which are run again with three fresh seeds: the winner, and what it cost in runs."""
    study, steps = search(surface, sampler, 24)
    finished = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    top = sorted(finished, key=lambda trial: -(trial.value or 0.0))[:3]
    winner = max(top, key=lambda trial: surface.curves(trial.params, CONFIRMING).max(axis=1).mean())
    return winner.params, steps / STEPS[-1] + len(top) * len(CONFIRMING)


def raced(surface: Surface, runs: int) -> tuple[Point, float]:
    """The leader of a race in this many runs, and what they cost."""
    study, steps = search(surface, "tpe", runs, FURTHER)
    first = racing.leader(racing.racers(study.trials, SEED))
    assert first is not None
    return first.trial.params, steps / STEPS[-1]


def fitted(surface: Surface, runs: int) -> tuple[Point, float]:
    """Whole runs with one seed at points of a Sobol sequence, and a last one at the top of the parabolas in rate and
    temperature that fit them best."""
    draw = np.random.default_rng([surface.number, 2])
    keys = ("rate", "temperature")
    points: list[Point] = []
    for place in qmc.Sobol(2, rng=draw).random_base2(4)[: runs - 1]:
        clusters = CLUSTERS[len(points) % len(CLUSTERS)]
        start = {"start": float(draw.uniform())} if clusters else {}
        points.append({"clusters": clusters, **start, **dict(zip(keys, map(float, place)))})
    scores = [float(surface.curves(point, [SEED]).max()) for point in points]

    def terms(places: np.ndarray) -> np.ndarray:
        return np.concatenate([np.ones((len(places), 1)), places, places**2], axis=1)

    weights = np.linalg.lstsq(terms(np.array([[point[key] for key in keys] for point in points])), scores)[0]
    axis = np.linspace(0, 1, 101)
    places = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    top = places[np.argmax(terms(places) @ weights)]
    return points[int(np.argmax(scores))] | dict(zip(keys, map(float, top))), runs


WAYS = {
    "TPE, three confirmed with three seeds": partial(confirmed, sampler="tpe"),
    "random, three confirmed with three seeds": partial(confirmed, sampler="random"),
    "TPE, racing, 20 runs": partial(raced, runs=20),
    "TPE, racing, 27 runs": partial(raced, runs=27),
    "TPE, racing, 34 runs": partial(raced, runs=34),
    "parabolas fitted to 13 runs, and one more": partial(fitted, runs=14),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--only", default="", help="the ways whose name holds this")
    parser.add_argument("--skewed", action="store_true", help="bowls that are steeper on one side")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    surfaces = [Surface(number, arguments.skewed) for number in range(arguments.studies)]
    best = [surface.best() for surface in surfaces]
    figures: dict[str, dict[str, float]] = {}
    for name, way in ((name, way) for name, way in WAYS.items() if arguments.only in name):
        chosen = [way(surface) for surface in surfaces]
        below = [top - surface.true_mean(point) for top, surface, (point, _) in zip(best, surfaces, chosen)]
        error = statistics.stdev(below) / math.sqrt(len(below)) if len(below) > 1 else math.nan
        cost = statistics.fmean(cost for _, cost in chosen)
        within = statistics.fmean(value <= 0.1 for value in below)
        figures[name] = {"below": statistics.fmean(below), "error": error, "within 0.1": within, "cost": cost}
        print(
            f"{name:<42}{figures[name]['below']:.3f} +- {error:.3f} below the best, {within:.0%} within 0.1, "
            f"{cost:.1f} runs",
            flush=True,
        )
    if arguments.output:
        arguments.output.write_text(json_text({"environment": environment("optuna"), "ways": figures}))


if __name__ == "__main__":
    main()
