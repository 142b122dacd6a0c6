"""SIGKILL at moments nobody chose, then the same command: the very bits of a run that was left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def check_same_run(run, undisturbed) -> None:
    assert run.losses() == undisturbed.losses()
    assert len(run.losses()) == run.steps
    assert run.weights() == undisturbed.weights()
    for key in ("best_step", "sts_dev", "sts_dev_before", "sts_dev_last", "clustering_started_at", "steps"):
        assert run.result()[key] == undisturbed.result()[key], key
    hidden = {path.relative_to(run.directory) for path in run.directory.rglob(".*")} - {Path(".lock")}
    assert [path for path in hidden if path.parts[0] != "ray"] == [], "left over"


def writing(run) -> bool:
    """Whether a checkpoint is being written, or the run is so close to its end that the wait for one is over."""
    late = run.checkpointed() >= run.steps - 4 * run.checkpoint_every
    return late or any(run.directory.glob("checkpoints/.step-*"))


def test_in_one_process_killed_twice(make_run, alone):
    """At any moment, then while a checkpoint is being written."""
    run = make_run("killed-alone")
    command = run.start()
    command.until(run.checkpointed)
    time.sleep(random.uniform(0, 0.2))
    command.kill()
    first = run.checkpointed()

    command = run.start()
    command.until(lambda: run.checkpointed() > first)
    command.until(lambda: writing(run))
    command.kill()
    second = run.checkpointed()
    assert run.checkpoint_every <= first < second < run.steps and not run.finished()

    said = run.train()
    assert said.code == 0, said.err
    assert f"Training from step {second}: {run.steps} steps" in said.out
    check_same_run(run, alone[0])


def test_on_ray_a_worker_killed_then_the_driver(make_run, on_two_workers, ray_directory):
    """A worker at a moment that nobody chose, the driver while a checkpoint is being written; then the command again at
    once."""
    run = make_run("killed", "runtime.num_workers=2")
    command = run.start()
    command.until(run.checkpointed)
    time.sleep(random.uniform(0, 0.2))
    workers = ray_directory.processes("RayTrainWorker")
    assert len(workers) == 2
    os.kill(random.choice(workers).pid, signal.SIGKILL)
    command.until(lambda: "Training from step" in command.out.read_text())
    reached = run.checkpointed()
    command.until(lambda: run.checkpointed() > reached)
    orphans = ray_directory.processes("RayTrainWorker")
    command.until(lambda: writing(run))
    command.kill()
    assert len(orphans) == 2 and not run.finished()

    said = run.train()
    assert (said.code, said.err) == (0, "")
    assert "Training from step" in said.out
    check_same_run(run, on_two_workers[0])
    assert [orphan for orphan in orphans if ray_directory.owns(orphan)] == []
