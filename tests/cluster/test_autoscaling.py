"""A head without workers and a real autoscaler: machines come when a run or a sweep asks for them, and go after it."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from nodes import NODE_TYPE, Nodes
from studies import STUDY, StudyRun, base_values
from test_faults import check_same_run, hit_in_the_middle

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]

TIMEOUT_S = 300.0
VERSIONS = pytest.mark.parametrize("version", [1, 2])


def wait_until_gone(nodes: Nodes, timeout_s: float = 120.0) -> None:
    """Until the autoscaler has taken back all machines."""
    deadline = time.monotonic() + timeout_s
    while left := nodes.instances():
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)


@VERSIONS
def test_a_run_brings_two_machines_and_leaves_none(nodes, make_run_on, undisturbed, version):
    nodes.start_autoscaling_head(most=3, version=version)
    run = make_run_on(f"autoscaled-{version}", "runtime.num_workers=2")
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


NO_GPU = "Ray gave a GPU to a worker on"
"""What torch has to say of the fake cloud's GPUs."""


@VERSIONS
def test_runs_where_the_machines_have_gpus(nodes, make_run_on, version):
    """`runtime.use_gpu` unset, true and false, from a head without CPUs: none, two and back."""
    nodes.start_autoscaling_head(most=2, version=version, gpus=1, idle_s=5)
    short = ("runtime.num_workers=2", "train.max_steps=20", "evaluation.every_steps=10")

    refused = make_run_on(f"four-{version}", "runtime.num_workers=4", "runtime.use_gpu=null")
    said = refused.train(TIMEOUT_S)
    assert said.code == 2, said.out + said.err
    assert "asks for 4 workers with 1 CPU and 1 GPU each, but the cluster has room for 2" in said.err
    assert f"an autoscaler (version {version}) that may start at most 2 {NODE_TYPE} with 1 CPU, 1 GPU" in said.err
    assert nodes.instances() == {} and not refused.directory.joinpath("config.yaml").exists()

    for use_gpu in ("null", "true"):
        command = make_run_on(f"gpus-{use_gpu}-{version}", *short, f"runtime.use_gpu={use_gpu}").start()
        command.until(lambda: len(nodes.instances()) == 2, TIMEOUT_S)
        said = command.wait(TIMEOUT_S)
        assert said.code == 1 and NO_GPU in said.err, said.out + said.err
        assert "Traceback" not in said.err and "set runtime.use_gpu to false" in said.err

    said = make_run_on(f"cpus-{version}", *short, "runtime.use_gpu=false").train(TIMEOUT_S)
    assert said.code == 0, said.out + said.err
    wait_until_gone(nodes)


@VERSIONS
def test_sweeps_where_the_machines_have_gpus(nodes, tmp_path, tiny_model, corpus_file, sts_dir, version):
    """As above, with CPUs first."""
    nodes.start_autoscaling_head(most=2, version=version, gpus=1, idle_s=5, dashboard=True)
    base = base_values(tiny_model, corpus_file, sts_dir)
    base["runtime"]["use_gpu"] = None
    base["train"]["max_steps"] = 20
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    settings = ("workers_per_trial=2", "budget.trials=1", "scheduler=none", "confirmation.seeds=[]")

    study = StudyRun(tmp_path, nodes.driver_env, "cpus", (*settings, "runtime.use_gpu=false"))
    command = study.start()
    command.until(lambda: len(nodes.instances()) == 2, TIMEOUT_S)
    said = command.wait(TIMEOUT_S)
    assert said.code == 0, said.out + said.err
    for name, more in (("unset", ()), ("gpus", ("runtime.use_gpu=true",))):
        said = StudyRun(tmp_path, nodes.driver_env, name, (*settings, *more)).tune(timeout_s=TIMEOUT_S)
        assert said.code == 1 and NO_GPU in said.err, said.out + said.err
    wait_until_gone(nodes)


@VERSIONS
def test_an_autoscaler_that_does_not_tell(nodes, make_run_on, version):
    """Its file cannot be read: whether there will be GPUs has to be said, and the wait for workers has an end."""
    nodes.start_autoscaling_head(most=2, version=version, gpus=1)
    (nodes.directory / "autoscaling.yaml").unlink()
    run = make_run_on(f"untold-{version}", "runtime.num_workers=2", "runtime.start_timeout_s=15")
    unset = replace(run, settings=(*run.settings, "runtime.use_gpu=null")).train(TIMEOUT_S)
    assert unset.code == 2, unset.out + unset.err
    assert f"an autoscaler (version {version}) that does not say what it may start" in unset.err
    assert "--set runtime.use_gpu=true" in unset.err
    began = time.monotonic()
    said = run.train(TIMEOUT_S)
    assert said.code == 1 and time.monotonic() - began > 15
    assert "No worker started within runtime.start_timeout_s (15 s)" in said.err
    assert "Asked for 2 workers with 1 CPU each" in said.err and "Traceback" not in said.err


def test_a_submitted_job_keeps_its_results_out_of_rays_package(nodes, make_run_on, tmp_path):
    nodes.start_head(1, dashboard=True)
    run = make_run_on("job")
    (tmp_path / "job").mkdir()
    shutil.copy(run.project / "run.yaml", tmp_path / "job")

    def submit(*settings: str) -> str:
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(tmp_path / "job")]
        command += ["--", sys.executable, "-m", "clusterns_ray.cli", "train", "run.yaml", "--set", "train.max_steps=10"]
        for setting in settings:
            command += ["--set", setting]
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            done = subprocess.run(command, env=nodes.driver_env, capture_output=True, text=True, timeout=TIMEOUT_S)
            if "No available agent" not in done.stderr or time.monotonic() > deadline:  # the head has just started
                return done.stdout + done.stderr
            time.sleep(2)

    said = submit()
    assert "error: runtime.storage_path 'runs' is in '" in said and "Ray's copy of the job's working directory" in said
    said = submit(f"runtime.storage_path={tmp_path / 'runs'}", "runtime.name=kept")
    assert (tmp_path / "runs" / "kept" / "result.json").is_file(), said
