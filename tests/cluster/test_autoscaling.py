"""A head without workers and a real autoscaler: machines come when a run or a sweep asks for them, and go after it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import yaml
from nodes import Nodes
from studies import STUDY, StudyRun, base_values
from test_faults import check_same_run, hit_in_the_middle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT_S = 300.0


def wait_until_gone(nodes: Nodes, timeout_s: float = 120.0) -> None:
    """Until the autoscaler has taken back all machines."""
    deadline = time.monotonic() + timeout_s
    while left := nodes.instances():
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


def test_a_run_brings_two_machines_and_leaves_none(nodes, make_run_on, undisturbed):
    nodes.start_autoscaling_head(most=3)
    run = make_run_on("autoscaled", "runtime.num_workers=2")
    assert nodes.instances() == {}
    command = run.start()
    command.until(run.checkpointed, TIMEOUT_S)
    assert len(nodes.instances()) == 2, "it needs two, and there could be three"
    said = command.wait(TIMEOUT_S)
    assert (said.code, said.err) == (0, "")
    check_same_run(run, undisturbed, attempts=1)
    wait_until_gone(nodes)


def test_a_machine_is_taken_away_and_replaced(nodes, make_run_on, undisturbed):
    nodes.start_autoscaling_head(most=3)
    run = make_run_on("autoscaled-fault", "runtime.num_workers=2")
    command = run.start()
    hit_in_the_middle(run, command)
    before = set(nodes.instances())
    assert len(before) == 2
    gone = random.choice(sorted(before))
    nodes.take_away_instance(gone)
    command.until(lambda: set(nodes.instances()) - before, TIMEOUT_S)
    said = command.wait(TIMEOUT_S)
    assert said.code == 0, said.err
    assert "Training from step" in said.out
    check_same_run(run, undisturbed)


def test_concurrent_trials_bring_a_machine_each(
    nodes: Nodes, tmp_path: Path, tiny_model: Path, corpus_file: Path, sts_dir: Path
):
    nodes.start_autoscaling_head(most=3, dashboard=True)
    base = base_values(tiny_model, corpus_file, sts_dir)
    base["evaluation"]["every_steps"] = 2  # unhurried
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    settings = ("workers_per_trial=1", "concurrent_trials=2", "budget.trials=3", "scheduler=none")
    study = StudyRun(tmp_path, nodes.driver_env, "sweep", (*settings, "confirmation.seeds=[]"))
    command = study.start()
    command.until(lambda: len(nodes.instances()) == 2 and study.count("RUNNING") == 2, TIMEOUT_S)
    said = command.wait(TIMEOUT_S)
    assert said.code == 0, said.err
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE"] * 3
    wait_until_gone(nodes)
