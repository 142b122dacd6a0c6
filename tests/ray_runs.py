"""``clusterns train`` in processes of its own, with runs that are killed and resumed; fixtures for these."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray  # noqa: F401  carries psutil
import yaml

from clusterns_ray.training.metrics import read_metrics

import psutil  # isort: skip


@dataclass
class Run:
    """A run, for which ``clusterns train`` may be started several times."""

    project: Path
    env: dict[str, str]
    name: str
    settings: tuple[str, ...]
    steps: int = 80
    checkpoint_every: int = 5

    @property
    def directory(self) -> Path:
        return self.project / "runs" / self.name

    def start(self) -> Command:
        command = [sys.executable, "-m", "clusterns_ray.cli", "train", "run.yaml"]
        for setting in (f"runtime.name={self.name}", *self.settings):
            command += ["--set", setting]
        return start_command(command, self.project, self.env, self.name)

    def train(self, timeout_s: float = 300.0) -> Outcome:
        return self.start().wait(timeout_s)

    def result(self) -> dict[str, Any]:
        return json.loads((self.directory / "result.json").read_text())

    def finished(self) -> bool:
        return (self.directory / "result.json").exists()

    def losses(self) -> list[tuple[int, float]]:
        """``(step, loss)`` of every logged step."""
        records = read_metrics(self.directory / "metrics.jsonl")
        return [(record["step"], record["loss"]) for record in records if "loss" in record]

    def weights(self) -> str:
        return hashlib.sha256((self.directory / "model" / "model.safetensors").read_bytes()).hexdigest()

    def checkpointed(self) -> int:
        """The step of the newest checkpoint, 0 before the first."""
        return max((int(path.name[-8:]) for path in self.directory.glob("checkpoints/step-????????")), default=0)


@dataclass(frozen=True)
class Outcome:
    code: int | None
    """None: it had to be killed"""
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """``clusterns train``, started."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def wait(self, timeout_s: float = 300.0) -> Outcome:
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        return Outcome(code, self.out.read_text(), self.err.read_text())

    def until(self, moment: Callable[[], Any], timeout_s: float = 240.0) -> None:
        """Return as soon as ``moment()`` is true; fail if the command ends first."""
        deadline, began = time.monotonic() + timeout_s, time.monotonic()
        while not moment():
            looked_s = time.monotonic() - began
            ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                said = self.wait(0)
                raise AssertionError(f"the moment did not come; exit code {said.code}\n{said.out}\n{said.err}")
            time.sleep(max(0.001, 10 * looked_s))  # a dear look is not repeated at once: the cores are the run's
            began = time.monotonic()

    def kill(self) -> None:
        """SIGKILL of the command's process alone, not of those it started."""
        assert self.process.poll() is None, "it had ended before it could be killed"
        self.process.kill()
        assert self.process.wait(10) == -signal.SIGKILL


def start_command(command: list[str], project: Path, env: dict[str, str], name: str) -> Command:
    """Start it in ``project``, with its output in ``NAME.out`` and ``NAME.err`` there."""
    out, err = project / f"{name}.out", project / f"{name}.err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=project, env=env, stdout=stdout, stderr=stderr, preexec_fn=heed_interrupts
        )
    return Command(process, out, err)


def heed_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so would whatever tests started there start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class RayDirectory:
    """Where Ray keeps its sessions, and the processes of these."""

    path: str

    def sessions(self) -> list[Path]:
        return list(Path(self.path, "ray").glob("session_2*"))

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Live ones whose title holds ``name``. Workers overwrite their command line; their open logs tell them."""
        return [process for process in psutil.process_iter() if self.owns(process, name)]

    def owns(self, process: psutil.Process, name: str = "") -> bool:
        """Whether ``process`` lives, is of one of these sessions, and has ``name`` in its title."""
        try:
            title = " ".join(process.cmdline())
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE or name not in title:
                return False
            logs = (file.path for file in process.open_files())
            return f"{self.path}/" in title or any(log.startswith(f"{self.path}/") for log in logs)
        except psutil.Error:
            return False


@pytest.fixture(scope="session")
def ray_directory() -> Iterator[RayDirectory]:
    """Short, as the paths of sockets have a limit. What Ray leaves there is ended process by process."""
    directory = RayDirectory(os.path.realpath(tempfile.mkdtemp(prefix="cr", dir=tempfile.gettempdir())))
    yield directory
    for process in directory.processes():
        process.kill()
    shutil.rmtree(directory.path, ignore_errors=True)


@pytest.fixture(scope="session")
def environment(ray_directory: RayDirectory) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # else Ray writes one into the home directory
        "RAY_TMPDIR": ray_directory.path,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else workers wait for all else that goes on here
    }


@pytest.fixture(scope="session")
def make_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    corpus_file: Path,
    sts_dir: Path,
    environment: dict[str, str],
) -> Callable[..., Run]:
    """Runs of one configuration: ``make_run(name, "section.key=value", ...)``."""
    project = tmp_path_factory.mktemp("project")
    values = {
        "encoder": {"name": str(tiny_model), "num_layers": 2, "dropout": 0.1},
        "data": {"corpus": str(corpus_file)},
        "loss": {"bml_weight": 0.1, "bml_alpha": 0.05, "bml_beta": 0.2},
        "clustering": {"num_clusters": 6, "start_cosine": 0.8, "rate": 0.1},
        "train": {
            "global_batch_size": 32,
            "shards": 4,
            "epochs": 8,
            "max_steps": Run.steps,
            "learning_rate": 3e-3,
            "precision": "fp32",
        },
        # Each evaluation waits for Ray's next look at the workers: a run is long enough to be hit in the middle of it.
        "evaluation": {"sts": str(sts_dir), "every_steps": 1, "patience": None},
        "runtime": {
            "use_gpu": False,
            "log_every_steps": 1,
            "checkpoint_every_steps": Run.checkpoint_every,
            "log_rows": True,
        },
    }
    (project / "run.yaml").write_text(yaml.safe_dump(values))

    def make(name: str, *settings: str) -> Run:
        return Run(project, environment, name, settings)

    return make


@pytest.fixture(scope="session")
def finished(made_once: Callable[..., Any], environment: dict[str, str]) -> Callable[[Run], tuple[Run, Outcome]]:
    """A run that was trained to its end without a fault, once for all test processes, and what it said."""

    def get(run: Run) -> tuple[Run, Outcome]:
        def train() -> tuple[Run, Outcome]:
            said = run.train()
            assert said.code == 0, said.out + said.err
            return run, said

        made, said = made_once(f"run-{run.name}", train)
        return replace(made, env=environment), said

    return get


@pytest.fixture(scope="session")
def alone(make_run: Callable[..., Run], finished: Callable[..., tuple[Run, Outcome]]) -> tuple[Run, Outcome]:
    """A whole run in one process, without Ray."""
    return finished(make_run("alone"))


@pytest.fixture(scope="session")
def on_two_workers(make_run: Callable[..., Run], finished: Callable[..., tuple[Run, Outcome]]) -> tuple[Run, Outcome]:
    """A whole run on two Ray workers."""
    return finished(make_run("two", "runtime.num_workers=2"))
