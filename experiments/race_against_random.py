"""Whether a study that races finds what is as good as random search does at equal cost, by both winners over new seeds.

    python experiments/race_against_random.py experiments/studies/quickstart-race.yaml [--seeds 31 32 33 34 35]

Random search has the space, the base and the scheduler of the study, and as many runs: nine of them confirm its three
best trials with three seeds. Both winners then run with seeds that neither has seen, the same for both, as
`experiments/methods.py` runs them. Studies and runs that were killed go on when the command is given again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from clusterns_ray import load_study
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.tuning.study import Study
from clusterns_ray.tuning.study_file import read_optuna_study

TOP, CONFIRMING = 3, (11, 12, 13)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[31, 32, 33, 34, 35])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for both studies")
    parser.add_argument("--jobs", type=int, default=1, help="runs of the winners at a time, which share the cores")
    arguments = parser.parse_args()

    racing = load_study(arguments.study, arguments.set)
    used = {*racing.seeds, *CONFIRMING}.intersection(arguments.seeds)
    if used or not racing.config.race.seeds or racing.config.budget.trials is None:
        raise ConfigError(
            f"--seeds names {min(used)}, which a study uses. Name others."
            if used
            else f"{arguments.study} needs race.seeds and budget.trials."
        )
    ways = {"racing": arguments.set, "random search": [*arguments.set, *as_random(racing)]}
    winners: dict[str, dict[str, Any]] = {}
    for name, settings in ways.items():
        study = load_study(arguments.study, settings)
        options = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "clusterns_ray.cli", "tune", str(arguments.study), *options]
        if subprocess.run(command).returncode:
            raise ClusterNSError(f"The study {study.config.name!r} did not come to its end; the same command goes on.")
        winner = json.loads((study.directory / "result.json").read_text())["winner"]
        winners[name] = {key: value for key, value in winner["values"].items() if key != "seed"}
        print(f"{name}: trial {winner['trial']}, {winner['mean']:.2f}; {trained_steps(study):,} steps trained")
    directory = racing.directory.resolve()
    base, file = directory / "winners-base.yaml", directory / "winners.yaml"
    base.write_text(yaml.safe_dump({key: value for key, value in racing.base.resolved().items() if key != "runtime"}))
    file.write_text(yaml.safe_dump({"base": str(base), "methods": winners}, sort_keys=False))
    command = [sys.executable, str(Path(__file__).with_name("methods.py")), str(file), "--runs", str(directory)]
    command += ["--seeds", *map(str, arguments.seeds), "--against", "random search", "--jobs", str(arguments.jobs)]
    if subprocess.run(command).returncode:
        raise ClusterNSError("The winners were not run with every seed; the same command goes on.")


def as_random(study: Study) -> list[str]:
    """What makes random search at the same number of runs of a study that races."""
    runs = (study.config.budget.trials or 0) - TOP * len(CONFIRMING)
    return [
        f"name={study.config.name}-random",
        "sampler=random",
        "race.seeds=[]",
        f"budget.trials={runs}",
        f"confirmation={json.dumps({'top': TOP, 'seeds': CONFIRMING})}",
    ]


def trained_steps(study: Study) -> int:
    """The steps of a study's trials, and of the runs that confirm; not those of the base configuration."""
    trials = sum(trial.user_attrs.get("steps", 0) for trial in read_optuna_study(study.directory).trials)
    confirming = study.directory.glob("confirmation/[0-9]*/result.json")
    return trials + sum(json.loads(path.read_text())["steps"] for path in confirming)


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
