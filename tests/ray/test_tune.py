"""``clusterns tune`` on a local Ray: what it makes, what it says, and how it ends when it cannot work."""

from __future__ import annotations

import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from optuna.trial import TrialState
from ray_runs import Outcome
from studies import STUDY, StudyRun, base_values

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def make_study(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    corpus_file: Path,
    sts_dir: Path,
    environment: dict[str, str],
) -> Callable[..., StudyRun]:
    """Studies of one file: ``make_study(name, "section.key=value", ...)``."""
    project = tmp_path_factory.mktemp("studies")
    (project / "base.yaml").write_text(yaml.safe_dump(base_values(tiny_model, corpus_file, sts_dir)))
    (project / "study.yaml").write_text(yaml.safe_dump(STUDY))

    def make(name: str, *settings: str) -> StudyRun:
        return StudyRun(project, environment, name, settings)

    return make


@pytest.fixture(scope="session")
def whole(
    make_study: Callable[..., StudyRun], made_once: Callable[..., Any], environment: dict[str, str]
) -> tuple[StudyRun, Outcome]:
    """A study that nothing happened to, run once for all test processes."""

    def run() -> tuple[StudyRun, Outcome]:
        study = make_study("whole")
        return study, study.tune()

    study, said = made_once("study-whole", run)
    return replace(study, env=environment), said


def test_a_study_from_its_file_to_its_winner(whole):
    study, said = whole
    assert (said.code, said.err) == (0, "")
    result, trials = study.result(), study.trials()
    assert [trial.number for trial in trials] == list(range(7)), "the budget is exact"
    assert result["trials"] == {
        state.name: sum(trial.state == state for trial in trials)
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    }
    assert result["trials"]["COMPLETE"] >= 2 and result["trials"]["PRUNED"] >= 1
    assert trials[0].params == STUDY["first_points"][0]

    winner = max(result["candidates"], key=lambda candidate: candidate["mean"])
    assert result["winner"] == winner
    for candidate in result["candidates"]:
        names = [f"{candidate['trial']:04d}-seed{seed}" for seed in (1, 2)]
        scores = [json.loads((study.directory / f"confirmation/{name}/result.json").read_text()) for name in names]
        assert list(candidate["scores"].values()) == [score["sts_dev"] for score in scores]
        assert candidate["mean"] == pytest.approx(statistics.mean(score["sts_dev"] for score in scores))
        assert candidate["deviation"] == pytest.approx(statistics.stdev(score["sts_dev"] for score in scores))
    top = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: -t.value)[:2]
    assert [candidate["trial"] for candidate in result["candidates"]] == [trial.number for trial in top]


def test_pruned_trials_are_pruned_in_the_study_with_their_curves(whole):
    study, _ = whole
    pruned = [trial for trial in study.trials() if trial.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        steps = sorted(trial.intermediate_values)
        assert steps == list(range(10, steps[-1] + 1, 10)) and steps[-1] < 40
        assert trial.value == trial.intermediate_values[steps[-1]]
        assert trial.user_attrs["steps"] == steps[-1] and trial.user_attrs["seconds"] > 0
        assert len(study.metrics(trial.number)) < 41, "it went on"


def test_the_best_configuration_is_a_run_like_any_other(whole):
    """The same loop: `train` with the winner's configuration has the scores of its trial."""
    study, _ = whole
    command = [sys.executable, "-m", "clusterns_ray.cli", "train", str(study.directory / "best.yaml")]
    done = subprocess.run(command, env=study.env, cwd=study.project, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    winner = study.result()["winner"]
    config = yaml.safe_load((study.project / "runs/whole-best/config.yaml").read_text())
    assert config["train"]["learning_rate"] == winner["values"]["train.learning_rate"]
    assert config["clustering"]["num_clusters"] == winner["values"]["clustering.num_clusters"]
    alone = json.loads((study.project / "runs/whole-best/result.json").read_text())
    assert alone["sts_dev"] == study.trials()[winner["trial"]].value
    assert alone["sts_dev_before"] == study.result()["sts_dev_before"], "scored once for all trials"


def test_files_of_the_outcome(whole):
    study, said = whole
    rows = pq.read_table(study.directory / "trials.parquet").to_pylist()
    assert [row["number"] for row in rows] == list(range(7))
    for row, trial in zip(rows, study.trials()):
        assert (row["state"], row["score"]) == (trial.state.name, trial.value)
        assert dict(zip(row["evaluated_steps"], row["evaluated_scores"])) == trial.intermediate_values
        assert row["train.learning_rate"] == trial.params["train.learning_rate"]
        assert row["clustering.start_cosine"] == trial.params.get("clustering.start_cosine")
    assert (study.directory / "model" / "model.safetensors").is_file()
    names = [study.directory / name for name in ("best.yaml", "model", "report.html")]
    assert said.out.splitlines()[-1] == f"Wrote {names[0]}, {names[1]} and {names[2]}"
    assert all(name.exists() for name in names)
    assert not list(study.directory.glob("trials/*/checkpoints")) and not (study.directory / "ray").exists()


def test_what_is_said(whole):
    study, said = whole
    lines = [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in said.out.splitlines()]
    for trial in study.trials():
        mine = [line for line in lines if line.startswith(f"{trial.number:04d} ")]
        assert "begins" in mine[0] and "learning_rate" in mine[0]
        word = {"COMPLETE": "finished at step 40", "PRUNED": "pruned at step"}[trial.state.name]
        assert word in mine[-1] and f"dev {trial.value:.2f}" in mine[-1]
    assert sum(line.startswith("Winner by STSB/dev: trial ") for line in lines) == 1
    assert sum("over 2 of 2 seeds" in line for line in lines) == 2


def test_the_same_command_again_changes_nothing(whole, ray_directory):
    study, _ = whole
    before, sessions = study.story(), len(ray_directory.sessions())
    again = study.tune()
    assert again.code == 0 and "is finished; raise the budget" in again.out and "Winner by" in again.out
    assert study.story() == before and len(ray_directory.sessions()) == sessions, "it started Ray for nothing"


def test_trials_at_once_have_the_very_results_of_each_alone(make_study):
    """Two processes at a time, one trial in each."""
    settings = ("sampler=random", "scheduler=none", "budget.trials=3", "confirmation.seeds=[]", "train.max_steps=20")
    alone, packed = make_study("one-by-one", *settings), make_study("packed", "concurrent_trials=2", *settings)
    assert [study.tune().code for study in (alone, packed)] == [0, 0]
    assert packed.story() == alone.story() and len(alone.story()) == 3
    ended = sorted((t.datetime_start, t.datetime_complete) for t in packed.trials())
    assert any(second[0] < first[1] for first, second in itertools.pairwise(ended)), "they did not run at once"
    for number in range(3):
        file = f"trials/{number:04d}/model/model.safetensors"
        assert (packed.directory / file).read_bytes() == (alone.directory / file).read_bytes()


def test_status_reads_the_storage_alone(whole, ray_directory):
    study, _ = whole
    sessions = len(ray_directory.sessions())
    said = study.tune("--status")
    assert (said.code, said.err) == (0, "")
    best = max((trial for trial in study.trials() if trial.state == TrialState.COMPLETE), key=lambda t: t.value)
    assert "7 of 7 trials" in said.out.replace("\n", " ")
    assert f"best {best.value:.2f} of trial {best.number}" in said.out.replace("\n", " ")
    assert len(ray_directory.sessions()) == sessions


def test_resources_that_are_not_there_are_refused(make_study):
    study = make_study("impossible", "runtime.use_gpu=true")
    began = time.monotonic()
    said = study.tune(timeout_s=100)
    assert said.code == 2
    assert said.err.startswith("error: A trial asks for 1 worker with 1 CPU and 1 GPU each, but the cluster")
    assert "0 GPU" in said.err and "no trial could ever start" in said.err
    assert time.monotonic() - began < 60
    assert study.trials() == [], "a trial was proposed for nothing"
