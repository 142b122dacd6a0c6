"""How soon the command line answers on a machine that has nothing else to do: make check runs these tests alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = ("torch", "ray", "transformers", "faiss", "scipy", "pyarrow", "datasets")


def run_command(*arguments: str | Path, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command, in a process of its own, and how long it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "clusterns_ray.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        timeout=60,
    )
    return done, time.monotonic() - began


def imported(stderr: str) -> set[str]:
    """Top-level packages that ``-X importtime`` saw."""
    names = {line.rsplit("|", 1)[1].strip() for line in stderr.splitlines() if line.startswith("import time:")}
    return {name.split(".")[0] for name in names}


def said(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if not line.startswith("import time:")]


def test_import_is_fast_and_light(tmp_path: Path) -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import clusterns_ray; print(time.perf_counter() - t, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    seconds, *modules = done.stdout.split()
    assert "clusterns_ray" in modules
    assert float(seconds) < 1
    assert set(HEAVY) & set(modules) == set()
    assert "pydantic" not in modules and "yaml" not in modules
    code = "import sys, clusterns_ray.data.corpus; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert set(HEAVY) & set(done.stdout.split()) == set()


def test_help_is_fast_and_light(tmp_path: Path) -> None:
    done, seconds = run_command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for verb in ("train", "prepare", "evaluate"):
        assert verb in done.stdout
    packages = imported(done.stderr)
    assert {"clusterns_ray", "typer"} <= packages, "the list of imports was not read"
    assert set(HEAVY) & packages == set()
    assert seconds < 1.5, "more than a second, on a machine that has nothing else to do"


def test_a_wrong_request_is_refused_quickly_and_without_ray(config_file: Path, tmp_path: Path) -> None:
    for arguments, named in (
        (("train", config_file, "--set", "data.corpus=none.txt"), "none.txt"),
        (("encode", "/none/m", "x.txt", "-o", "o.parquet", "--workers", "2"), "/none/m"),
        (("map", "/none/m", "x.txt", "-o", "m.html"), "/none/m"),
        (("export", "/none/m", "-o", "out", "--to", "sentence-transformers"), "/none/m"),
    ):
        done, seconds = run_command(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        lines = said(done.stderr)
        assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]
        assert seconds < 2
        assert "typer" in imported(done.stderr)
        assert {"ray", "torch", "transformers", "faiss"} & imported(done.stderr) == set()


@pytest.mark.usefixtures("begun_run")
def test_a_name_in_use_is_refused_quickly_and_without_ray(config_file: Path, tmp_path: Path) -> None:
    done, seconds = run_command("train", config_file, "--set", "runtime.num_workers=2", "--set", "seed=1", cwd=tmp_path)
    assert done.returncode == 2
    lines = said(done.stderr)
    assert len(lines) == 1 and "seed was 42 and is now 1" in lines[0]
    assert seconds < 2
    assert {"ray", "torch", "transformers"} & imported(done.stderr) == set()


def test_a_wrong_study_is_refused_quickly_and_without_ray(write_study: Callable[..., Path], tmp_path: Path) -> None:
    done, seconds = run_command("tune", write_study(), "--set", "budget.trails=3", cwd=tmp_path)
    names = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    lines = said(done.stderr)
    assert done.returncode == 2 and done.stdout == ""
    assert len(lines) == 1 and "unknown key budget.trails: did you mean trials?" in lines[0]
    assert {"clusterns_ray.tuning.study", "pydantic"} <= names, "the list of imports was not read"
    assert {"ray", "torch", "transformers", "optuna", "scipy", "plotly"} & names == set()
    assert seconds < 4
