"""``clusterns status``: what it says of a run while it trains, after it was cut off, and when it is finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from clusterns_ray.config import make_config
from clusterns_ray.io.events import Evaluated, Event, RunStarted, StepLogged
from clusterns_ray.io.object_store import Store
from clusterns_ray.launch.gauges import GAUGES, with_gauges
from clusterns_ray.launch.trainer import train
from clusterns_ray.tuning.events import TrialBegan, TrialFailed, TrialScored
from clusterns_ray.tuning.gauges import with_trial_gauges

AT_WORK = {"here": "A process of this machine is at work on it.", "store": "At work on it: process "}
IDLE = {"here": "No process of this machine is at work", "store": "No process is at work on it"}


class CutOff(Exception):
    pass


@pytest.mark.parametrize("where", ["here", "store"])
def test_a_run_that_trains_is_cut_off_and_finished(
    where: str, run_values: dict[str, Any], store: Store, tmp_path: Path, clusterns: Callable[..., Result]
) -> None:
    storage = store.url if where == "store" else str(tmp_path / "runs")
    runtime = {"storage_path": storage, "local_path": str(tmp_path / "local"), "name": "seen", "use_gpu": False}
    config = make_config({**run_values, "runtime": {**run_values["runtime"], **runtime}})
    address, said = f"{storage}/seen", []

    def look(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == 5:
            said.append(clusterns("status", address))
            raise CutOff

    with pytest.raises(CutOff):
        train(config, look)
    assert said[0].exit_code == 0, said[0].output
    lines = said[0].stdout.splitlines()
    assert lines[0] == f"Run seen in {address}"
    assert lines[-1].startswith(AT_WORK[where])
    if where == "here":  # to a store metrics go with checkpoints, by a thread
        assert any(line.startswith("Step 5 of 6, ") and "of training left" in line for line in lines), lines
        assert any(line.startswith("Scores at step 4: STSB/dev ") and " before training." in line for line in lines)
        assert any(line.startswith("Newest checkpoint: of step 4, 0:0") for line in lines)

    idle = clusterns("status", address)
    assert idle.exit_code == 0 and idle.stdout.splitlines()[-1].startswith(IDLE[where]), idle.output

    train(config)
    done = clusterns("status", address)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == "Finished.", done.output
    assert "Step 6 of 6." in done.stdout and "Newest checkpoint: of step 6" in done.stdout


def test_what_is_neither_run_nor_study(clusterns: Callable[..., Result], tmp_path: Path, begun_run: Path) -> None:
    for place in (tmp_path / "nowhere", begun_run.parent):
        said = clusterns("status", place)
        assert said.exit_code == 2 and said.stderr.startswith("error: ") and said.stderr.count("\n") == 1, said.output
    begun = clusterns("status", begun_run)
    assert begun.exit_code == 0 and "Step 0 of 2." in begun.stdout and "No checkpoint yet." in begun.stdout


def test_what_the_gauges_are_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[tuple[str, str, str], float] = {}

    def set_gauge(name: str, value: float, run: str, state: str = "") -> None:
        values[run, name, state] = value

    monkeypatch.setattr("clusterns_ray.launch.gauges.set_gauge", set_gauge)
    monkeypatch.setattr("clusterns_ray.tuning.gauges.set_gauge", set_gauge)
    passed: list[Event] = []
    of_run, of_study = with_gauges(passed.append, "mine"), with_trial_gauges(passed.append, "sweep")
    of_run(RunStarted(0, 9, 300, 4))
    of_run(StepLogged(3, 0.5, 77.0, {"step": 3, "epoch": 0.1, "loss": 0.5, "sentences_per_second": 77.0}))
    of_run(Evaluated(4, 61.5, {"step": 4, "sts_dev": 61.5}, True, 62.5))
    of_run(RunStarted(4, 9, 300, 4))
    for event in (
        TrialBegan("0000", {}),
        TrialBegan("0001", {}),
        TrialScored("0000", "evaluated", 4, 71.0),
        TrialScored("0000", "finished", 9, 70.0),
        TrialFailed("0001", "why not"),
    ):
        of_study(event)
    assert len(passed) == 9, "the caller's own view gets all of them"
    run = {"step": 4, "restarts": 1, "loss": 0.5, "sentences_per_second": 77, "dev_score": 61.5, "best_dev_score": 62.5}
    trials = {"running": 0, "pruned": 0, "finished": 1, "failed": 1}
    assert values == {
        **{("mine", name, ""): value for name, value in run.items()},
        **{("sweep", "trials", state): count for state, count in trials.items()},
        ("sweep", "best_dev_score", ""): 71.0,
    }


def test_the_dashboard_shows_every_gauge_and_no_other() -> None:
    file = Path(__file__).parents[2] / "experiments/clusters/grafana.json"
    panels = json.loads(file.read_text(encoding="utf-8"))["panels"]
    asked = {target["expr"].partition("{")[0] for panel in panels for target in panel["targets"]}
    assert asked == {f"ray_clusterns_{name}" for name in GAUGES}
