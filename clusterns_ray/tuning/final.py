"""``--finalize``: the winner on the test sets, once, when nothing more is to be chosen."""

from __future__ import annotations

import json
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clusterns_ray.config import parse_config
from clusterns_ray.errors import ConfigError
from clusterns_ray.files import json_text
from clusterns_ray.tuning.study import Study
from clusterns_ray.tuning.sweep import owner, runs_of


def finalize(study: Study) -> tuple[dict[str, Any], str]:
    """Score the models of the winner, one a seed, on the STS tests; or read what was scored before.

    Returns:
        What ``final.json`` holds (`when`, `trial`, `seeds`; `tasks` and `average` with mean and deviation), and where
        that is.

    Raises:
        ConfigError: the study is not finished, or its STS data holds no tests.
    """
    home = study.home
    where = (home / "final.json").address
    final = home.read("final.json")
    if final is not None:
        return json.loads(final), where
    if study.base.evaluation.sts == "structure":
        raise ConfigError(
            "evaluation.sts is structure, which has no test sets. Score the model with `clusterns evaluate "
            f"{(home / 'model').address} --sts DIRECTORY`."
        )
    found = home.read("result.json")
    if found is None:
        raise ConfigError(
            f"The study {study.config.name!r} is not finished, and tests are looked at once. Run `clusterns tune` of "
            "it to its end first."
        )
    with owner(study):
        result = json.loads(found)
        sts = parse_config(home.read("best.yaml") or "", source=result["best"]).evaluation.sts
        from clusterns_ray.evaluation.suite import evaluate_model

        scores = [evaluate_model(str(model), sts) for model in winners(study, result)]
        tasks = {task: spread([s["tasks"][task]["spearman"] for s in scores]) for task in scores[0]["tasks"]}
        averages = [s["average"] for s in scores if s["average"] is not None]
        value = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "trial": result["winner"]["trial"],
            "seeds": sorted(map(int, result["winner"]["scores"])),
            "tasks": tasks,
            "average": spread(averages) if averages else None,
        }
        home.write("final.json", json_text(value))
    return value, where


def winners(study: Study, result: dict[str, Any]) -> list[Path]:
    """The winner's model of every seed; the trial's own where nothing was confirmed."""
    trial, seeds = result["winner"]["trial"], result["winner"]["scores"]
    if not seeds:
        return [study.home.fetch("model")]
    return [(runs_of(study, None) / f"{trial:04d}-seed{seed}").fetch("model") for seed in seeds]


def spread(scores: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    return {"mean": statistics.fmean(scores), "deviation": deviation, "scores": scores}


def render_final(final: dict[str, Any]) -> None:
    """Print the table of tasks."""
    from rich.console import Console
    from rich.table import Table

    seeds = ", ".join(map(str, final["seeds"])) or "the trials' own"
    table = Table(title=f"Winner, trial {final['trial']}, seeds {seeds}: Spearman x 100, looked at {final['when']}")
    table.add_column("task")
    table.add_column("mean", justify="right")
    table.add_column("+-", justify="right")
    rows = dict(final["tasks"]) | ({"average": final["average"]} if final["average"] else {})
    for task, value in rows.items():
        deviation = "" if value["deviation"] is None else f"{value['deviation']:.2f}"
        table.add_row(task, f"{value['mean']:.2f}", deviation)
    Console().print(table)
