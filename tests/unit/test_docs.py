"""The documentation is built by MkDocs, which is strict about links, anchors and names of the API."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clusterns_ray.config import known_keys

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install -c constraints.txt '.[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "WARNING" not in built.stderr
    reference = (tmp_path / "reference/configuration.html").read_text(encoding="utf-8")
    assert [key for key in known_keys() if f'id="{key}"' not in reference] == []
    assert "https://fonts." not in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<math" in (tmp_path / "algorithm.html").read_text(encoding="utf-8")
