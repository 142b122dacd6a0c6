"""``clusterns encode --workers N`` on local Ray workers: the same file as in one process, whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import write_corpus

pytestmark = pytest.mark.slow

SENTENCES = 6000


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a corpus of a few parts."""
    path = tmp_path_factory.mktemp("encoding")
    write_corpus(path / "corpus.txt", SENTENCES)
    return path


@pytest.fixture(scope="module")
def start(project: Path, tiny_model: Path, environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """``clusterns encode`` of that corpus."""

    def call(out: str, *options: str) -> subprocess.Popen[str]:
        arguments = ["encode", str(tiny_model), "corpus.txt", "-o", out, "--batch-size", "4", *options]
        command = [sys.executable, "-m", "clusterns_ray.cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=project, env=environment, **pipes)

    return call


@pytest.fixture(scope="module")
def whole(project: Path, start: Callable[..., subprocess.Popen[str]], made_once: Callable[..., Any]) -> bytes:
    """What one process writes."""

    def encode() -> bytes:
        out, err = start("whole.parquet").communicate(timeout=300)
        assert err == "" and f"({SENTENCES:,} sentences" in out
        return (project / "whole.parquet").read_bytes()

    return made_once("encoded", encode)


def run_script(script: str, project: Path, environment: dict[str, str]) -> list[str]:
    """What a script prints, without what Ray says of dead workers."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=project, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "(raylet" not in line]


def wait_for(moment: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not moment():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def test_two_workers_of_which_one_is_killed_write_what_one_process_writes(project, start, whole, ray_directory):
    process = start("two.parquet", "--workers", "2")
    wait_for(lambda: list((project / "two.parquet.parts").glob("part-*")), process)
    workers = ray_directory.processes("ray::_Worker")
    assert len(workers) == 2
    os.kill(random.choice(workers).pid, signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "A worker ended; part " in out
    assert out.splitlines()[-1] == f"Wrote {project / 'two.parquet'} ({SENTENCES:,} sentences, 32 values each)"
    assert (project / "two.parquet").read_bytes() == whole
    assert pq.read_metadata(project / "two.parquet").num_rows == SENTENCES
    assert not (project / "two.parquet.parts").exists()


@pytest.mark.nightly
def test_the_driver_killed_and_the_command_given_again(project, start, whole, ray_directory):
    """With workers, and then without: what is done is kept."""
    parts = project / "driver.parquet.parts"
    process = start("driver.parquet", "--workers", "2")
    wait_for(lambda: len(list(parts.glob("part-*"))) >= 2, process)
    orphans = ray_directory.processes("ray::_Worker")
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    kept = {path.name: path.stat().st_ino for path in parts.glob("part-*")}
    assert kept and not (project / "driver.parquet").exists()

    process = start("driver.parquet")
    wait_for(lambda: len(list(parts.glob("part-*"))) > len(kept), process)
    assert {name: (parts / name).stat().st_ino for name in kept} == kept, "parts were made again"
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert (project / "driver.parquet").read_bytes() == whole
    deadline = time.monotonic() + 30
    while any(ray_directory.owns(orphan) for orphan in orphans) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [orphan for orphan in orphans if ray_directory.owns(orphan)] == []


FAKE = """
import os, signal, sys
import numpy as np
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.inference import distributed_encode as encode

class Device:
    type = "cuda"  # so that torch is not asked for threads

class Fake:
    '''Encodes a text as its length; ends its process, or raises, where a text asks for it.'''
    device = Device()
    truncated = 0
    def to(self, device):
        return self
    def encode(self, texts, batch_size, progress):
        for text in texts:
            if text == "once" and not os.path.exists("died"):
                open("died", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if text == "always":
                os.kill(os.getpid(), signal.SIGKILL)
            if text == "wrong":
                raise ConfigError("this cannot be encoded")
            if text == "bug":
                raise KeyError("a bug")
            self.truncated += text == "long"
        return np.array([[len(text)] for text in texts], dtype=np.float32)

def run(*texts, workers=2):
    here = os.getcwd()
    parts = ((number, [f"x{number}", text]) for number, text in enumerate(texts))
    said = []
    try:
        done = encode.encode_on_ray(Fake(), parts, 8, workers=workers, note=said.append)
        print("done", sorted((part.number, part.texts, part.z_ND.tolist(), part.truncated) for part in done), said)
    except ClusterNSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.nightly
def test_workers_that_die_or_raise(environment, tmp_path):
    """A part goes to another worker, unless it ends one after the other; an error ends the command."""
    script = (
        FAKE + "run('a', 'once', 'long', 'd', 'e')\nrun('a', 'always', 'c')\nrun('a', 'wrong')\nrun('bug')\nrun()\n"
    )
    lines = run_script(script, tmp_path, environment)
    texts = enumerate(("a", "once", "long", "d", "e"))
    wanted = [
        (number, [f"x{number}", text], [[2.0], [float(len(text))]], int(text == "long")) for number, text in texts
    ]
    assert lines[0] == f"done {wanted} ['A worker ended; part 2 goes to another.']"
    assert lines[1].startswith("ClusterNSError 4 workers ended over part 2, of 2 sentences.")
    assert "--batch-size" in lines[1]
    assert lines[2] == "ConfigError this cannot be encoded"
    assert lines[3].startswith("ClusterNSError A worker failed: KeyError: 'a bug'")
    assert lines[4] == "done [] []"


@pytest.mark.nightly
def test_workers_that_cannot_start_end_the_command(environment, tmp_path):
    script = FAKE + (
        "import ray, time\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=40)\n"
        "@ray.remote(num_cpus=1)\nclass Taken: pass\n"
        "taken = Taken.remote()\ntime.sleep(3)\n"
        "encode.START_TIMEOUT_S = 3\nbegan = time.monotonic()\nrun('a', 'b')\nprint(time.monotonic() - began)\n"
    )
    line, seconds = run_script(script, tmp_path, environment)
    assert line.startswith("ClusterNSError No worker started within 3 s. Asked for 2 workers with 1 CPU each;")
    assert "the cluster has 1 CPUs, 0 of them free" in line
    assert 3 <= float(seconds) < 20


def test_a_cluster_that_does_not_answer_is_said_at_once(project, tiny_model, environment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ["encode", str(tiny_model), "corpus.txt", "-o", "nowhere.parquet", "--workers", "2"]
        done = subprocess.run(
            [sys.executable, "-m", "clusterns_ray.cli", *command],
            cwd=project,
            env=environment | {"RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr.startswith(f"failed: RAY_ADDRESS is '{address}', where nothing answers")
    assert done.stderr.count("\n") == 1 and "unset it" in done.stderr
