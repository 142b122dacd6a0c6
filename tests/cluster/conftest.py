"""Clusters of several nodes on this machine, and runs on them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nodes import Nodes
from ray_runs import (  # noqa: F401  fixtures
    Outcome,
    Run,
    environment,
    finished,
    make_run,
    on_two_workers,
    ray_directory,
)


@pytest.fixture
def nodes(environment: dict[str, str], tmp_path: Path) -> Iterator[Nodes]:  # noqa: F811
    """No node as yet; all that a test starts is ended with it."""
    short = os.path.realpath(tempfile.mkdtemp(prefix="cn", dir="/tmp"))
    # Said on every side: a driver and a joining node do not take it from the head.
    found = Nodes(tmp_path, {**environment, "RAY_AUTH_MODE": "token"}, short)
    yield found
    found.close()
    shutil.rmtree(short, ignore_errors=True)


@pytest.fixture
def make_run_on(make_run: Callable[..., Run], nodes: Nodes) -> Callable[..., Run]:  # noqa: F811
    """Runs whose commands join the head of ``nodes``, which has to be up: ``make_run_on(name, setting, ...)``."""

    def make(name: str, *settings: str) -> Run:
        return replace(make_run(name, *settings), env=nodes.driver_env)

    return make


@pytest.fixture(scope="session")
def undisturbed(on_two_workers: tuple[Run, Outcome]) -> Run:  # noqa: F811
    """The same run on two workers, with nothing that happens to them."""
    return on_two_workers[0]
