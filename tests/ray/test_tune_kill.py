"""SIGKILL at moments nobody chose, then the same command: the study that would have been."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from test_tune import make_study, whole  # noqa: F401  fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def check_same_study(study, undisturbed) -> None:
    assert study.story() == undisturbed.story()
    mine, other = study.result(), undisturbed.result()
    for key in ("trials", "candidates", "winner", "not_told_apart", "sts_dev_before"):
        assert mine[key] == other[key], key
    assert not list(study.directory.glob("trials/*/checkpoints"))


def test_a_trials_process_killed_then_the_driver_then_control_c(make_study, whole, ray_directory):  # noqa: F811
    """Inside the first trial, which goes on from its checkpoint each time; then the study is stopped between trials."""
    study = make_study("killed")
    command = study.start()
    command.until(lambda: study.checkpointed(0) >= 10)
    (process,) = ray_directory.processes("ResourceTrainable")
    os.kill(process.pid, signal.SIGKILL)
    reached = study.checkpointed(0)
    command.until(lambda: study.checkpointed(0) > reached)
    command.kill()
    assert study.count("RUNNING") == 1 and study.count("COMPLETE") == study.count("FAIL") == 0
    time.sleep(2)  # what it started is gone by then
    reached, before = study.checkpointed(0), study.metrics(0)
    assert 10 < reached < 40

    command = study.start()
    command.until(lambda: study.count("COMPLETE") >= 1)
    assert study.metrics(0)[: reached + 1] == before[: reached + 1], "its first steps were trained again"
    began = time.monotonic()
    command.process.send_signal(signal.SIGINT)
    said = command.wait(60)
    assert said.code == 1 and time.monotonic() - began < 45
    assert "Stopping. Trials that run keep" in said.out
    assert "Interrupted. The same command goes on" in said.err and "Traceback" not in said.err
    assert ray_directory.processes("ResourceTrainable") == []
    assert study.count("FAIL") == 0

    said = study.tune()
    assert said.code == 0, said.err
    check_same_study(study, whole[0])


@pytest.mark.nightly
def test_the_driver_killed_while_it_confirms(make_study, whole):  # noqa: F811
    study = make_study("killed-late")
    command = study.start()
    command.until(lambda: list(study.directory.glob("confirmation/*/result.json")), timeout_s=200)
    command.kill()
    said = study.tune()
    assert said.code == 0, said.err
    check_same_study(study, whole[0])
    assert said.out.count("begins") < 6, "trials were run again"


def test_failed_trials_of_two_at_a_time_do_not_end_the_study(make_study, ray_directory):  # noqa: F811
    """One whose process dies once too often, and one whose values make no sense; nothing is confirmed."""
    study = make_study(
        "failing",
        "concurrent_trials=2",
        "runtime.max_failures=0",
        "sampler=grid",
        "first_points=[]",
        "scheduler=none",
        "budget={}",
        "confirmation.seeds=[]",
        "space={train.learning_rate: {type: choice, choices: [1e-3, 2e-3, 1e30], role: nuisance}}",
    )
    command = study.start()
    command.until(lambda: study.count("RUNNING") == 2 and study.checkpointed(0) >= 10)
    process = random.choice(ray_directory.processes("ResourceTrainable"))
    os.kill(process.pid, signal.SIGKILL)
    said = command.wait(200)
    assert said.code == 0, said.err
    trials = study.trials()
    assert [trial.params["train.learning_rate"] for trial in trials] == [1e-3, 2e-3, 1e30]
    assert sorted(trial.state.name for trial in trials[:2]) == ["COMPLETE", "FAIL"] and trials[2].state.name == "FAIL"
    (died,) = [trial for trial in trials[:2] if trial.state.name == "FAIL"]
    reasons = [trial.user_attrs["reason"] for trial in (died, trials[2])]
    assert reasons[0].startswith("its process died") and f"{died.number:04d} failed: its process died" in said.out
    assert reasons[1].startswith("The last 10 gradients before step 11 were NaN or infinite") and reasons[1] in said.out
    assert "NonFiniteError" in (study.directory / "trials" / "0002" / "error.txt").read_text()
    assert len(study.study().user_attrs["scores_before"]) == 1
    assert study.result()["winner"]["scores"] == {} and "may be chance" in said.out
    assert (study.directory / "model" / "model.safetensors").is_file()
