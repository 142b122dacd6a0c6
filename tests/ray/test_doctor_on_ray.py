"""The doctor where Ray has to be started for it, and is gone afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray  # noqa: F401  carries psutil
from ray_runs import Run

from clusterns_ray.ops.doctor.examine import SCRATCH_DIRECTORY, SCRATCH_PREFIX

import psutil  # isort: skip

pytestmark = pytest.mark.slow


def scratch() -> set[Path]:
    return set(Path(SCRATCH_DIRECTORY).glob(f"{SCRATCH_PREFIX}*"))


def test_ray_is_started_and_ended(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run, file, before = make_run("healthy"), tmp_path / "findings.json", scratch()
    command = [sys.executable, "-m", "clusterns_ray.cli", "doctor", "run.yaml", "--json", str(file)]
    command += ["--set=runtime.num_workers=2", f"--set=runtime.storage_path={tmp_path / 'runs'}"]
    done = subprocess.run(command, cwd=run.project, env=run.env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {finding["what"]: finding for finding in json.loads(file.read_text())["findings"]}
    assert "2 workers with 1 CPU each: room on 1 node" in found["resources"]["value"]
    assert "State API" not in found, "nothing here needs it"
    assert not (tmp_path / "runs").exists() and scratch() == before
    started = f"{SCRATCH_DIRECTORY}/{SCRATCH_PREFIX}"
    left = [p for p in psutil.process_iter(["cmdline"]) if any(started in part for part in p.info["cmdline"] or ())]
    assert left == []
