"""Compare methods over seeds on one testbed: mean, deviation, and the difference from the first method, seed by seed.

    python experiments/methods.py experiments/methods/quickstart.yaml --jobs 2 --test DIR

A file of methods names a base configuration, values that all methods share, and for each method the values that make
it. Every method runs with the same seeds, so with the same batches and first dropout masks. Finished runs are not
repeated, unfinished ones are resumed, and those of other values are refused. A method would be chosen by its dev score
at the best step. The sets of evaluation.also at that step, and with --test STS-B dev (where it does not select) and the
seven STS tests, choose nothing: they are for the final figure alone.

A value may name another method's model of the same seed as ``model:METHOD``, such as a teacher; that one runs first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from clusterns_ray import Encoder, load_config
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.io.files import write_atomic
from clusterns_ray.launch.preflight import check_name
from clusterns_ray.tuning.comparison import seed_interval

COLUMNS = {"dev": "dev, best step", "last": "dev, last step", "tests": "seven tests"}
DEV = "STSB/dev"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    parser.add_argument("--only", nargs="+", help="methods, by name; the first one always")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every method")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="runs are RUNS/FILE/METHOD-seedS")
    parser.add_argument("--against", help="the method that differences are from, by default the first")
    parser.add_argument("--test", metavar="DIR", help="score STS-B dev, and the seven STS tests if they are there, too")
    parser.add_argument("--json", type=Path, help="where to write all scores")
    arguments = parser.parse_args()

    study = Study(arguments.methods, arguments.runs / arguments.methods.stem, arguments.set, arguments.jobs)
    names = study.chosen(arguments.only)
    if arguments.against and arguments.against not in names:
        raise ConfigError(f"--against {arguments.against!r} names none of the methods that run: {', '.join(names)}.")
    scores = study.run(names, arguments.seeds, test=arguments.test)
    before = study.untrained(arguments.seeds[0], arguments.test)
    print(table(scores, before, arguments.against))
    if arguments.json:
        command = " ".join(["python", "experiments/methods.py", *sys.argv[1:]])
        written = {"command": command, "before": before, "scores": scores}
        write_atomic(arguments.json, json.dumps(written, indent=1) + "\n")
        print(f"Wrote {arguments.json}")


class Study:
    """The methods of a file, and their runs."""

    def __init__(self, file: Path, runs: Path, overrides: list[str], jobs: int) -> None:
        """
        Raises:
            ConfigError: the file is no such file, or one of its methods is no possible configuration.
        """
        if not file.is_file():
            raise ConfigError(f"{file} is not a file. Name one such as experiments/methods/minilm-cpu.yaml.")
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        if set(content) - {"base", "set", "methods"} or not content.get("base") or not content.get("methods"):
            raise ConfigError(
                f"{file} needs base and methods, and may have set; it has {', '.join(content) or 'nothing'}."
            )
        self.base, self.runs, self.jobs = file.parent / content["base"], runs, jobs
        self.methods: dict[str, dict[str, Any]] = content["methods"]
        self.first = next(iter(self.methods))
        shared = [f"{key}={json.dumps(value)}" for key, value in content.get("set", {}).items()]
        self.overrides = [*shared, *overrides]
        for method in self.methods:
            load_config(self.base, self.values(method, seed=1))

    def chosen(self, only: list[str] | None) -> list[str]:
        """The first method and those named, or all, in the order of the file."""
        unknown = [name for name in only or () if name not in self.methods]
        if unknown:
            raise ConfigError(f"--only {unknown[0]!r} names no method; there are {', '.join(self.methods)}.")
        return [name for name in self.methods if not only or name in only or name == self.first]

    def values(self, method: str, seed: int) -> list[str]:
        """``section.key=value`` of one run."""
        own = []
        for key, value in self.methods[method].items():
            teacher = named_model(value)
            value = str(self.path(teacher, seed) / "model") if teacher else value
            own.append(f"{key}={json.dumps(value)}")
        path = self.path(method, seed)
        return [
            *self.overrides,
            *own,
            f"runtime.storage_path={path.parent}",
            f"runtime.name={path.name}",
            f"seed={seed}",
        ]

    def path(self, method: str, seed: int) -> Path:
        if method not in self.methods:
            raise ConfigError(f"model:{method} names no method; there are {', '.join(self.methods)}.")
        return self.runs / f"{re.sub('[^A-Za-z0-9.]+', '-', method)}-seed{seed}"

    def run(self, names: list[str], seeds: list[int], *, test: str | None) -> dict[str, dict[str, list[float]]]:
        """Scores of every method, in the order of ``seeds``: ``{"dev": [...], "last": [...], "tests": [...], ...}``.

        Args:
            test: The directory of the sets that are scored at the end.
        """
        needed = {named_model(value) for name in names for value in self.methods[name].values()} - {None}
        first = [name for name in self.methods if name in needed]
        self.began, self.done, self.total = time.monotonic(), 0, len({*first, *names}) * len(seeds)
        for group in (first, [name for name in names if name not in first]):
            with ThreadPoolExecutor(self.jobs) as pool:
                runs = [pool.submit(self.one, name, seed, test) for seed in seeds for name in group]
                try:
                    for run in as_completed(runs):
                        run.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)  # runs that train end by themselves
                    raise
        return {name: self.scores(name, seeds, test) for name in names}

    def one(self, method: str, seed: int, test: str | None) -> None:
        """Train, and score the tests, in processes of their own with this job's share of the cores."""
        path, values = self.path(method, seed), self.values(method, seed)
        check_name(load_config(self.base, values))
        if not (path / "result.json").exists():
            pairs = [part for value in values for part in ("--set", value)]
            self.command(path, "train", str(self.base), *pairs)
        result = json.loads((path / "result.json").read_text())
        if test:
            self.tested(path, test, result["dev"])
        self.done += 1
        left = (time.monotonic() - self.began) / self.done * (self.total - self.done)
        print(
            f"{self.done}/{self.total}  {method}, seed {seed}: dev {result['sts_dev_trained']:.2f} at best; "
            f"about {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )

    def untrained(self, seed: int, test: str | None) -> dict[str, float]:
        """What the first method's encoder scores before training; by the columns of :func:`table`."""
        result = json.loads((self.path(self.first, seed) / "result.json").read_text())
        scores = {"dev": result["sts_dev_before"], "last": result["sts_dev_before"]}
        scores |= {name: also["before"] for name, also in result["also"].items()}
        if test:
            path = self.runs / "untrained"
            if not (path / "model").exists():
                encoder = load_config(self.base, self.values(self.first, seed)).encoder
                Encoder.for_training(encoder, seed).save(path / "model")
            scores |= self.tested(path, test, result["dev"])
        return scores

    def tested(self, path: Path, test: str, dev: str) -> dict[str, float]:
        """Scores of ``path``/model on STS-B dev, where that is not the dev set, and on the seven tests if all are in
        ``test``; each model is scored once."""
        if not (path / "evaluation.json").exists():
            arguments = ["--sts", test, "--dev", DEV, "--json", f"{path}/evaluation.json"]
            self.command(path, "evaluate", str(path / "model"), *arguments)
        evaluation = json.loads((path / "evaluation.json").read_text())
        scores = {} if dev == DEV else {DEV: evaluation["extra"][DEV]}
        return scores if evaluation["average"] is None else {**scores, "tests": evaluation["average"]}

    def command(self, path: Path, *arguments: str) -> None:
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.parent / f"{path.name}.log"
        with log.open("a", encoding="utf-8") as output:
            code = subprocess.run(
                [sys.executable, "-m", "clusterns_ray.cli", *arguments],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        if code:
            last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
            raise ClusterNSError(f"clusterns {arguments[0]} of {path.name} ended with {code}; {log} ends with\n{last}")

    def scores(self, method: str, seeds: list[int], test: str | None) -> dict[str, list[float]]:
        results = [json.loads((self.path(method, seed) / "result.json").read_text()) for seed in seeds]
        scores = {"dev": [r["sts_dev_trained"] for r in results], "last": [r["sts_dev_last"] for r in results]}
        scores |= {name: [r["also"][name]["after"] for r in results] for name in results[0]["also"]}
        if test:
            tests = [self.tested(self.path(method, seed), test, results[0]["dev"]) for seed in seeds]
            scores |= {name: [each[name] for each in tests] for name in tests[0]}
        return scores


def named_model(value: Any) -> str | None:
    """The method of a value ``model:METHOD``."""
    return value.removeprefix("model:") if isinstance(value, str) and value.startswith("model:") else None


def table(
    scores: dict[str, dict[str, list[float]]], before: dict[str, float] | None = None, against: str | None = None
) -> str:
    """Markdown: mean +- standard deviation of each method, and the mean difference from ``against`` (by default the
    first), paired by seed, with its 95 % interval by Student's t; above them the scores ``before`` training."""
    against = against or next(iter(scores))
    reference = scores[against]
    head = " | ".join(f"{COLUMNS.get(column, column)} | against {against}" for column in reference)
    lines = [
        f"| Spearman x 100, {len(reference['dev'])} seeds | {head} |",
        "|---" * (1 + 2 * len(reference)) + "|",
    ]
    if before:
        cells = [cell for column in reference for cell in (f"{before[column]:.2f}", "")]
        lines.append(f"| before training | {' | '.join(cells)} |")
    for name, ours in scores.items():
        cells = []
        for column, theirs in reference.items():
            cells.append(spread(ours[column]))
            cells.append("" if ours is reference else difference(ours[column], theirs))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(scores: list[float]) -> str:
    deviation = statistics.stdev(scores) if len(scores) > 1 else math.nan
    return f"{statistics.mean(scores):.2f} +- {deviation:.2f}"


def difference(ours: list[float], theirs: list[float]) -> str:
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    interval, mean = seed_interval(gaps), statistics.mean(gaps)
    return f"{mean:+.2f}" + (f" ({interval['low']:+.2f} to {interval['high']:+.2f})" if interval else "")


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
