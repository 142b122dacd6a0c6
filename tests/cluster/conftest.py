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
from ray_runs import Outcome, Run, environment, finished, make_run, ray_directory  # noqa: F401  fixtures

UNHURRIED = ("evaluation.every_steps=1", "runtime.log_rows=true")
"""Each evaluation waits for Ray's next look at the workers: a run takes long enough to be hit in the middle of it."""


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
        return replace(make_run(name, *UNHURRIED, *settings), env=nodes.driver_env)

    return make


@pytest.fixture(scope="session")
def undisturbed(
    make_run: Callable[..., Run],  # noqa: F811
    finished: Callable[..., tuple[Run, Outcome]],  # noqa: F811
) -> Run:
    """The same run on two workers, with nothing that happens to them."""
    run, said = finished(make_run("undisturbed", *UNHURRIED, "runtime.num_workers=2"))
    assert said.code == 0, said.err
    return run
