"""What the project says that it installs: versions, extras, and the one CUDA that they bring."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = [
    line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
]
PINS = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in CONSTRAINTS)}
RESOLVING_PIP = "26.3"
"""The oldest version tried that resolves from the metadata alone; older ones download every wheel in a dry run."""
LIMIT_S = 900


def cuda_majors(packages: dict[str, str]) -> set[str]:
    """The major versions of CUDA that packages of these names and versions are for."""
    suffixed = {match[1] for name in packages if (match := re.search(r"-cu(\d\d)$", name))}
    return suffixed | {
        Version(version).base_version.split(".")[0]
        for name, version in packages.items()
        if name in ("cuda-toolkit", "nvidia-cuda-runtime")
    }


def test_every_constraint_is_one_version() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line) for line in CONSTRAINTS)
    assert len(PINS) == len(CONSTRAINTS), "a package is named twice"
    assert [line.lower() for line in CONSTRAINTS] == sorted(line.lower() for line in CONSTRAINTS)


def test_what_is_required_is_pinned_within_its_range() -> None:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    for text in [each for group in groups for each in group]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), text


def test_the_python_that_is_asked_for_is_one() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert PROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PROJECT["tool"]["pyright"]["pythonVersion"] == "3.11"
    assert "Python 3.11 or newer" in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_constraints_hold_one_cuda() -> None:
    assert cuda_majors(PINS) == {"13"}
    assert cuda_majors({"nvidia-cublas-cu12": "12.9", "cuda-toolkit": "13.0.3.0"}) == {"12", "13"}


@pytest.fixture(scope="module")
def resolutions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The packages and versions that pip would install for each extra, on a machine that has none.

    The configuration of pip on this machine plays no part, except for the network.
    """
    folder = tmp_path_factory.mktemp("pip")
    offline = "pip reaches no package index here"

    def pip(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", *arguments]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)

    newer = pip("install", "--quiet", "--retries=1", "--target", str(folder / "pip"), f"pip=={RESOLVING_PIP}")
    said, _ = newer.communicate(timeout=LIMIT_S)
    if newer.returncode != 0:
        pytest.skip(f"{offline}: {said.strip().splitlines()[-1]}")
    running = {}
    for extra in ("cpu", "gpu"):
        arguments = ["install", "--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--quiet"]
        arguments += ["--report", str(folder / f"{extra}.json"), "-c", str(ROOT / "constraints.txt")]
        running[extra] = pip(*arguments, f"{ROOT}[{extra}]", env={**_environment(), "PYTHONPATH": str(folder / "pip")})
    resolved = {}
    for extra, process in running.items():
        said, _ = process.communicate(timeout=LIMIT_S)
        if process.returncode != 0 and re.search(r"(?i)connection|timed out|temporary failure", said):
            pytest.skip(f"{offline}: {said.strip().splitlines()[-1]}")
        assert process.returncode == 0, said
        installed = [each["metadata"] for each in json.loads((folder / f"{extra}.json").read_text())["install"]]
        resolved[extra] = {canonicalize_name(each["name"]): each["version"] for each in installed}
    return resolved


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}


@pytest.mark.nightly
@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_pip_resolves_an_extra_to_the_constraints(resolutions: dict[str, dict[str, str]], extra: str) -> None:
    packages = {name: version for name, version in resolutions[extra].items() if name != "clusterns-ray"}
    assert "faiss-cpu" in packages and "torch" in packages
    assert {name: Version(version).public for name, version in packages.items()} == {
        name: PINS.get(name, "not pinned") for name in packages
    }
    assert len(cuda_majors(packages)) <= 1, "two versions of CUDA side by side"
