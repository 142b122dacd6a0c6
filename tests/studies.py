"""``clusterns tune`` in processes of its own, on tiny models."""

from __future__ import annotations

import json
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from ray_runs import Command, Outcome, start_command

from clusterns_ray.tuning.study_file import read_optuna_study


@dataclass
class StudyRun:
    """A study, for which ``clusterns tune`` may be run several times."""

    project: Path
    env: dict[str, str]
    name: str
    settings: tuple[str, ...]

    @property
    def directory(self) -> Path:
        return self.project / "runs" / self.name

    def start(self, *options: str) -> Command:
        command = [sys.executable, "-m", "clusterns_ray.cli", "tune", "study.yaml", *options]
        for setting in (f"name={self.name}", *self.settings):
            command += ["--set", setting]
        return start_command(command, self.project, self.env, self.name)

    def tune(self, *options: str, timeout_s: float = 400.0) -> Outcome:
        return self.start(*options).wait(timeout_s)

    def result(self) -> dict[str, Any]:
        return json.loads((self.directory / "result.json").read_text())

    def study(self) -> optuna.Study:
        return read_optuna_study(self.directory)

    def trials(self) -> list[FrozenTrial]:
        return self.study().get_trials(deepcopy=False)

    def story(self) -> list[tuple[Any, ...]]:
        """What has to be the same, however often the study was interrupted."""
        return [(t.number, t.state.name, t.params, t.value, t.intermediate_values) for t in self.trials()]

    def count(self, state: str) -> int:
        """Trials in a state, asked of the file as often as a test likes."""
        file = self.directory / "study.db"
        if not file.exists():
            return 0
        try:
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5) as connection:
                return connection.execute("select count(*) from trials where state = ?", (state,)).fetchone()[0]
        except sqlite3.OperationalError:
            return 0

    def metrics(self, number: int) -> list[str]:
        """Lines with the times of the attempt that wrote them."""
        path = self.directory / "trials" / f"{number:04d}" / "metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def checkpointed(self, number: int) -> int:
        """The step of a trial's newest checkpoint, 0 before the first."""
        checkpoints = (self.directory / "trials" / f"{number:04d}").glob("checkpoints/step-????????")
        return max((int(path.name[-8:]) for path in checkpoints), default=0)


def base_values(model: Path, corpus: Path, sts: Path) -> dict[str, Any]:
    return {
        "encoder": {"name": str(model), "num_layers": 2, "dropout": 0.1},
        "data": {"corpus": str(corpus)},
        "loss": {"bml_weight": 0.1, "bml_alpha": 0.05, "bml_beta": 0.2},
        "clustering": {"num_clusters": 6, "start_cosine": 0.8, "rate": 0.1},
        "train": {
            "global_batch_size": 32,
            "shards": 4,
            "epochs": 12,
            "max_steps": 40,
            "learning_rate": 1e-3,
            "precision": "fp32",
        },
        "evaluation": {"sts": str(sts), "every_steps": 10, "patience": None},
        "runtime": {"use_gpu": False, "log_every_steps": 1, "storage_path": "runs"},
    }


STUDY: dict[str, Any] = {
    "name": "study",
    "base": "base.yaml",
    "space": {
        "clustering.num_clusters": {"type": "choice", "choices": [0, 4, 8], "role": "scientific"},
        "clustering.start_cosine": {
            "type": "float",
            "low": 0.2,
            "high": 0.9,
            "step": 0.1,
            "role": "scientific",
            "when": {"clustering.num_clusters": {"not": 0}},
        },
        "train.learning_rate": {"type": "float", "low": 1e-4, "high": 3e-2, "log": True, "role": "nuisance"},
    },
    "budget": {"trials": 7},
    "sampler": {"name": "tpe", "startup_trials": 4},
    "scheduler": {"name": "asha", "min_steps": 10, "reduction_factor": 2},
    "first_points": [{"clustering.num_clusters": 4, "clustering.start_cosine": 0.8, "train.learning_rate": 1e-3}],
    "confirmation": {"top": 2, "seeds": [1, 2]},
}
