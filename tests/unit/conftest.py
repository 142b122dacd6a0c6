"""Fixtures for the tests of runs and studies: tiny ones of both, and the command line in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from helpers import write_pairs
from typer.testing import CliRunner, Result

from clusterns_ray.cli import app
from clusterns_ray.config import Config, dump_config, load_config, make_config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.evaluation.sts import TASKS
from clusterns_ray.models.base_model import complete

if TYPE_CHECKING:
    from training_runs import Lab, WholeRun

# What a killed process wrote is there all the same; no test cuts the power.
os.fsync = lambda handle: None

STUDY: dict[str, Any] = {
    "name": "tiny",
    "base": "base.yaml",
    "space": {
        "clustering.num_clusters": {"type": "choice", "choices": [0, 4], "role": "scientific"},
        "train.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True, "role": "nuisance"},
    },
    "budget": {"trials": 3},
    "confirmation": {"top": 2, "seeds": [1, 2]},
}


@pytest.fixture(scope="module")
def run_values(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, corpus_file: Path, sts_dir: Path
) -> dict[str, Any]:
    """The configuration of a tiny run: six steps, two layers, six clusters from the first step on."""
    return {
        "seed": 3,
        "encoder": {"name": str(tiny_model), "num_layers": 2, "pooling": "cls"},
        "data": {"corpus": str(corpus_file), "cache_dir": str(tmp_path_factory.mktemp("cache"))},
        "loss": {"bml_weight": 0.1, "bml_alpha": 0.1},
        "clustering": {"num_clusters": 6, "start_cosine": 1.0, "rate": 0.1},
        "train": {"global_batch_size": 32, "shards": 2, "max_steps": 6, "learning_rate": 1e-3, "precision": "fp32"},
        "evaluation": {"sts": str(sts_dir), "every_steps": 2, "patience": None},
        "runtime": {"log_every_steps": 1, "keep": 9, "trackers": []},
    }


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Whatever ran before, a test draws the same from torch, where that is loaded."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(11)


@pytest.fixture
def lab(run_values: dict[str, Any]) -> Lab:
    """Runs like that of ``run_values``."""
    from training_runs import Lab  # here, as most unit tests need no torch

    return Lab(run_values, prepare(make_config(run_values)))


@pytest.fixture(scope="module")
def whole(run_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """The undisturbed run of ``lab.config()``, with a copy of its metrics for TensorBoard."""
    from training_runs import Lab, WholeRun

    lab, directory = Lab(run_values, prepare(make_config(run_values))), tmp_path_factory.mktemp("whole")
    config = lab.config(runtime={"trackers": ["tensorboard"]})
    return WholeRun(directory, lab.run(directory, config), lab)


@pytest.fixture(scope="session")
def write_study(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, corpus_file: Path) -> Callable[..., Path]:
    """A study file, with these changes, in a directory of its own that also holds its base and STS data."""

    def write(**changes: Any) -> Path:
        directory = tmp_path_factory.mktemp("study")
        for name in ("STSB/dev", *(f"{task}/{subset or 'one'}" for task, subset in TASKS.items())):
            write_pairs(directory / f"sts/{name}.jsonl", count=20)
        base = {
            "encoder": {"name": str(tiny_model), "num_layers": 1},
            "data": {"corpus": str(corpus_file), "limit": 64},
            "clustering": {"num_clusters": 4, "start_cosine": 1.0},
            "train": {"global_batch_size": 16, "shards": 4, "max_steps": 4},
            "evaluation": {"sts": str(directory / "sts"), "every_steps": 2},
            "runtime": {"storage_path": str(directory / "runs"), "use_gpu": False},
        }
        (directory / "base.yaml").write_text(yaml.safe_dump(base))
        (directory / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
        return directory / "study.yaml"

    return write


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The directory of a finished run, written as training would have written it."""
    from report_runs import make_run

    return make_run(tmp_path)


@pytest.fixture
def config_file(tmp_path: Path, tiny_model: Path, corpus_file: Path) -> Path:
    """A configuration that would train two steps in no time."""
    path = tmp_path / "run.yaml"
    values = {
        "encoder": {"name": str(tiny_model), "num_layers": 1},
        "data": {"corpus": str(corpus_file), "limit": 64},
        "clustering": {"num_clusters": 4, "start_cosine": 1.0},
        "train": {"global_batch_size": 16, "shards": 4, "max_steps": 2},
        "runtime": {"storage_path": str(tmp_path / "runs"), "name": "first", "use_gpu": False},
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def begun_run(config_file: Path, tmp_path: Path) -> Path:
    """The directory of a run of ``config_file`` that has begun."""
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(complete(load_config(config_file))))
    return run


@pytest.fixture
def clusterns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """The command, in this process and an empty directory."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def sound_values(tmp_path: Path, tiny_model: Path, corpus_file: Path, sts_dir: Path) -> Callable[..., dict[str, Any]]:
    """``sound_values(section={...})``: a configuration in which nothing is wrong, with these changes."""
    values: dict[str, dict[str, Any]] = {
        "encoder": {"name": str(tiny_model), "num_layers": 1, "dropout": 0.1},
        "data": {"corpus": str(corpus_file)},
        "clustering": {"num_clusters": 4},
        "train": {"global_batch_size": 16, "shards": 4, "max_steps": 2},
        "evaluation": {"sts": str(sts_dir)},
        "runtime": {"storage_path": str(tmp_path / "runs"), "name": "first", "use_gpu": False},
    }
    return lambda **changes: {name: values.get(name, {}) | changes.get(name, {}) for name in {**values, **changes}}


@pytest.fixture
def run_config(sound_values: Callable[..., dict[str, Any]]) -> Callable[..., Config]:
    """:func:`sound_values` as a ``Config``."""
    return lambda **changes: make_config(sound_values(**changes))
