"""A study in an object store whose driver is killed and whose machine is lost: the same command on another one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray_runs import RayDirectory
from s3_server import s3_server
from studies import StudyRun
from test_tune import make_study, whole  # noqa: F401  fixtures

from clusterns_ray.io.object_store import Store, reading_place
from clusterns_ray.tuning.study_file import read_optuna_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def server() -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        yield environment


class StoredStudy(StudyRun):
    """A study in ``s3://bucket``; each command of it on a machine of its own, which then is no more."""

    machine: Path

    def on(self, machine: Path, environment: dict[str, str]) -> StoredStudy:
        self.machine = machine
        self.env = {**self.env, **environment, "CLUSTERNS_LOCAL_PATH": str(machine)}
        return self

    @property
    def store(self) -> Store:
        return Store("s3://bucket/runs") / self.name

    def lose(self) -> None:
        """What was killed takes its processes with it; then the disk goes, too."""
        time.sleep(2)
        shutil.rmtree(self.machine)

    def result(self) -> dict[str, Any]:
        return json.loads(self.store.read("result.json") or b"")

    def trials(self) -> list[Any]:
        place = reading_place(self.store.url)
        place.fetch_files(leave_out=(".html", ".parquet"))
        return read_optuna_study(place.local).get_trials(deepcopy=False)

    def has(self, end: str) -> bool:
        return any(name.endswith(end) for name in self.store.names())


MOMENTS = (
    "trials/0002/config.yaml",  # as a trial begins
    "trials/0000/checkpoints/step-00000020.manifest.json",  # inside a trial, of which the snapshot knows less
    "-seed1/result.json",  # between runs that confirm
)


@pytest.mark.parametrize("moments", [MOMENTS[:1], pytest.param(MOMENTS[1:], marks=pytest.mark.nightly)])
def test_a_driver_killed_with_its_machine(
    make_study: Any,  # noqa: F811
    whole: Any,  # noqa: F811
    server: dict[str, str],
    tmp_path: Path,
    moments: tuple[str, ...],
) -> None:
    made = make_study(f"stored-{len(moments)}", "runtime.storage_path=s3://bucket/runs")
    study = StoredStudy(made.project, made.env, made.name, made.settings)
    for number, moment in enumerate(moments):
        command = study.on(tmp_path / f"machine{number}", server).start()
        command.until(partial(study.has, moment), timeout_s=400)
        command.kill()
        study.lose()
    said = study.on(tmp_path / "last", server).tune(timeout_s=400)
    assert said.code == 0, said.out + said.err
    assert "begins" in said.out and said.out.count("0000 begins") == 0, "finished trials were run again"
    assert f"Wrote {study.store.url}/best.yaml, {study.store.url}/model and {study.store.url}/report.html" in said.out

    undisturbed = whole[0]
    assert study.story() == undisturbed.story()
    mine, other = study.result(), undisturbed.result()
    for key in ("trials", "candidates", "winner", "not_told_apart", "sts_dev_before"):
        assert mine[key] == other[key], key
    names = study.store.names()
    assert not [name for name in names if "/checkpoints/" in name or name.startswith(".lease")]
    assert study.store.pull_directory("model", tmp_path / "model")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "model" / file).read_bytes() == (undisturbed.directory / "model" / file).read_bytes()

    again = study.on(tmp_path / "again", server).tune()
    assert again.code == 0 and "is finished; raise the budget" in again.out, again.err


def check_refused_elsewhere(study: StoredStudy, process: int, machine: Path) -> None:
    """A second driver of a study that is at work, on another machine."""
    env = {**study.env, "CLUSTERNS_LOCAL_PATH": str(machine)}
    command = [sys.executable, "-m", "clusterns_ray.cli", "tune", "study.yaml"]
    command += [f"--set={setting}" for setting in (f"name={study.name}", *study.settings)]
    done = subprocess.run(command, cwd=study.project, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and f"is being run by process {process} on " in done.stderr, done.stderr
    assert " since 20" in done.stderr and "last heartbeat" in done.stderr


def test_trials_with_workers_of_their_own(
    make_study: Any,  # noqa: F811
    whole: Any,  # noqa: F811
    ray_directory: RayDirectory,
    server: dict[str, str],
    tmp_path: Path,
) -> None:
    """A pruned one's workers return by themselves; scores are those of one process."""
    few = ("budget.trials=2", "confirmation.seeds=[]")
    made = make_study("workers", *few, "workers_per_trial=2", "runtime.storage_path=s3://bucket/runs")
    study = StoredStudy(made.project, made.env, made.name, made.settings).on(tmp_path / "here", server)
    command = study.start()
    command.until(lambda: study.has("trials/0000/config.yaml"))
    check_refused_elsewhere(study, command.process.pid, tmp_path / "other")
    said = command.wait(800)
    assert said.code == 0, said.out + said.err
    assert {trial.state.name for trial in study.trials()} == {"COMPLETE", "PRUNED"}
    for mine, other in zip(study.trials(), whole[0].trials()):
        assert (mine.state, mine.params) == (other.state, other.params)
        assert mine.intermediate_values == pytest.approx(other.intermediate_values, abs=0.5)
    assert ray_directory.processes("RayTrainWorker") == []
    names = study.store.names()
    for file in ("trials/0000/config.yaml", "trials/0000/metrics.jsonl", "result.json", "model/model.safetensors"):
        assert file in names, names
    assert not [name for name in names if "/checkpoints/" in name]
    assert not list((tmp_path / "here").glob("*/*/model.safetensors")), "a copy of a run that ended was left"
