"""``clusterns prepare --workers N`` on local Ray workers: the store that one process makes, whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import sentences
from ray_runs import Command, start_command
from s3_server import s3_server

pytestmark = pytest.mark.slow

ROWS = 30_000
IN_SMALL_PARTS = (
    "from clusterns_ray.cli import main; from clusterns_ray.data import pieces; pieces.PART_BYTES = 1 << 17; main()"
)
"""The command, with parts of which this corpus has some fifteen."""

TASK = "ray::Map("
"""The title of a process that makes a part."""

FAILING = """
import os, signal
from pathlib import Path
from types import SimpleNamespace
from clusterns_ray.data.token_parts import PartFiles
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.io.object_store import Place
from clusterns_ray.launch import distributed_prepare
from clusterns_ray.launch.ray_cluster import connect

class Files(PartFiles):
    def __init__(self, way):
        self.job, self.way = SimpleNamespace(parts=[0, 1, 2]), way
        self.files = self.records = Place(Path.cwd())
    def make_likely(self, number):
        if self.way == "bug":
            raise KeyError("a bug")
        if self.way == "wrong":
            raise ConfigError("not here")
        if self.way == "kill" and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return SimpleNamespace(files=[{"name": f"tokens-{number:05d}.arrow"}])
    def lacks(self, part):
        return part.files[0]["name"] == "tokens-00002.arrow"

with connect(2, print):
    for way in ("bug", "wrong", "unseen", "kill"):
        try:
            list(distributed_prepare._on_workers(Files(way), 2))
        except ClusterNSError as error:
            print(">", type(error).__name__, error)
"""

Prepare = Callable[..., Command]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A directory with a corpus of two files, of which one is cut, and a configuration."""
    path = tmp_path_factory.mktemp("preparing")
    (path / "a.txt").write_text("\n".join(["", "first", "", "second"]))
    (path / "b.txt").write_text("\n".join((sentences(6000) * (ROWS // 6000))[:ROWS]) + "\n")
    values = {
        "encoder": {"name": str(tiny_model)},
        "data": {"corpus": [str(path / "a.txt"), str(path / "b.txt")]},
        "evaluation": {"sts": None},
    }
    (path / "run.yaml").write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def start(project: Path, environment: dict[str, str]) -> Prepare:
    """``clusterns prepare`` into a cache of this name."""

    def call(name: str, *options: str, **variables: str) -> Command:
        cache = [] if any("storage_path" in option for option in options) else ["--set", f"data.cache_dir={name}"]
        command = [sys.executable, "-c", IN_SMALL_PARTS, "prepare", "run.yaml", *cache, *options]
        return start_command(command, project, environment | variables, name)

    return call


@pytest.fixture(scope="module")
def whole(project: Path, start: Prepare, made_once: Callable[..., Any]) -> dict[str, bytes]:
    """What one process writes."""

    def prepare() -> dict[str, bytes]:
        said = start("whole").wait()
        assert said.code == 0, said.err
        return store(project / "whole")

    return made_once("prepared", prepare)


def store(cache: Path) -> dict[str, bytes]:
    """The files of the one store in a cache, in which nothing else is."""
    (directory,) = cache.iterdir()
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def records(cache: Path) -> list[Path]:
    return list(cache.glob("*.parts/part-*.json"))


def test_the_driver_killed_and_then_a_worker(project, start, whole, ray_directory):
    """A killed command goes on with the parts that are there; a killed worker costs the part that it was at."""
    cache = project / "two"
    command = start("two", "--workers", "2")
    command.until(lambda: len(records(cache)) >= 4)
    command.kill()
    done = {f"tokens-{record.stem[-5:]}.arrow" for record in records(cache)}
    kept = {path.name: path.stat().st_ino for path in cache.glob("*.parts/store/*.arrow") if path.name in done}
    assert kept and not list(cache.glob("tokens-*/manifest.json"))

    command = start("two", "--workers", "2")
    command.until(lambda: len(records(cache)) > len(kept) + 1 and ray_directory.processes(TASK))
    os.kill(random.choice(ray_directory.processes(TASK)).pid, signal.SIGKILL)
    said = command.wait()
    assert (said.code, said.err) == (0, ""), said
    assert "on up to 2 workers" in said.out and f"{ROWS + 2:,} sentences" in said.out
    assert store(cache) == whole and len(whole) > 10
    (directory,) = cache.iterdir()
    again = [name for name, inode in kept.items() if (directory / name).stat().st_ino != inode]
    assert again == [], "parts that were there were made again"


@pytest.mark.nightly
def test_what_a_worker_raises_and_a_part_that_ends_all_of_them(environment, tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", FAILING], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in said.stdout.splitlines() if line.startswith(">")]
    assert lines[0] == "> ClusterNSError A worker failed: KeyError: 'a bug'", said
    assert lines[1] == "> ConfigError not here", said
    assert lines[2].startswith("> ClusterNSError A worker wrote tokens-00002.arrow, and this process does not see it")
    assert lines[3].startswith("> ClusterNSError Part 2 of 3 failed: 4 workers died while making it.")


@pytest.mark.nightly
def test_workers_write_to_an_object_store(project, start, whole):
    """The machine that asked holds no rows; one that needs them has a verified copy."""
    with s3_server() as reached_by:
        options = ("--set", "runtime.storage_path=s3://bucket/runs")
        variables = reached_by | {"CLUSTERNS_LOCAL_PATH": str(project / "here")}
        said = start("stored", *options, "--workers", "2", **variables).wait()
        assert (said.code, said.err) == (0, ""), said
        assert "Wrote s3://bucket/runs/cache/tokens-" in said.out
        assert not list((project / "here").rglob("*.arrow"))
        said = start("again", *options, "--workers", "2", **variables).wait()
        assert "Found s3://bucket/runs/cache/tokens-" in said.out, said
        said = start("copied", *options, **variables).wait()
        assert said.code == 0 and "Found " in said.out, said
    (copied,) = (path.parent for path in (project / "here").rglob("manifest.json"))
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == whole
