"""The doctor on clusters of two nodes: what it finds there, and that it leaves them as they were."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from nodes import MARK, Node, Nodes
from ray_runs import Run

from clusterns_ray.ops.doctor.node import PROBE

pytestmark = pytest.mark.slow


def doctor(run: Run, *arguments: str) -> tuple[int, dict[str, list[dict[str, Any]]], str]:
    """Exit code, findings by what was looked at, and what was printed."""
    file = run.project / "findings.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "clusterns_ray.cli", "doctor", "run.yaml", "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=run.project, env=run.env, capture_output=True, text=True, timeout=100)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(file.read_text())["findings"]:
        found.setdefault(finding["what"], []).append(finding)
    return done.returncode, found, done.stdout + done.stderr


def problems(found: dict[str, list[dict[str, Any]]]) -> set[str]:
    return {what for what, findings in found.items() for finding in findings if finding["level"] == "problem"}


def settings(run: Run) -> list[str]:
    return [f"--set={setting}" for setting in (f"runtime.name={run.name}", *run.settings)]


def add_apart(nodes: Nodes, name: str, hidden: Path, **env: str) -> None:
    """A node that does not see what others see in ``hidden``: something else is mounted there, for it alone."""
    for unshare in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        mount = [*unshare, "mount", "-t", "tmpfs", "none", str(hidden)]
        if subprocess.run(mount, capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("no rights to mount anything, even in a name space of one's own")
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    start += [f"--temp-dir={nodes.ray_directory}/{name}", "--object-store-memory=100000000"]
    start += [f"--address={nodes.address}"]
    mark, log = f"{name}-{secrets.token_hex(8)}", nodes.directory / f"{name}.log"
    script = f"mount -t tmpfs none {shlex.quote(str(hidden))} && exec {shlex.join(start)}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*unshare, "sh", "-c", script],
            env={**nodes.env, "RAY_TMPDIR": nodes.ray_directory, **env, MARK: mark, "SPT_NOENV": "1"},
            cwd=nodes.directory,
            stdout=file,
            stderr=file,
        )
    node = nodes.nodes[name] = Node(name, nodes.directory, process, log, mark)
    node.wait_until_up()


@pytest.mark.nightly  # a minute is all the doctor takes, which other clusters beside it would use up
def test_two_sound_nodes(make_run: Any, nodes: Nodes, tmp_path: Path) -> None:
    nodes.start_head(1)
    nodes.add("second")
    shared = tmp_path / "shared"
    shared.mkdir()
    run = replace(
        make_run("sound", "runtime.num_workers=2", f"runtime.storage_path={shared / 'runs'}"), env=nodes.driver_env
    )
    code, found, said = doctor(run, *settings(run))
    assert (code, problems(found)) == (0, set()), said
    assert "2 up and answering" in found["nodes"][0]["value"]
    assert "on 2 nodes and the driver" in found["versions"][0]["value"]
    assert "written and read on all of 2 nodes" in found["storage"][0]["value"]
    assert "2 workers with 1 CPU each" in found["resources"][0]["value"]
    assert found["authentication"][0]["value"] == "by token"
    # These heads have no dashboard.
    assert [finding["level"] for finding in found["State API"]] == ["warning"]
    assert list(shared.rglob("*")) == [] and not list(tmp_path.rglob(f"{PROBE}*")), "it left something behind"

    code, found, said = doctor(run, *settings(run), "--set=runtime.num_workers=4")
    assert (code, problems(found)) == (1, {"resources"}), said
    assert "asks for 4 workers with 1 CPU each, but the cluster has room for 2" in found["resources"][0]["value"]

    # A sweep needs the State API, which a run does not.
    study = {
        "name": "sweep",
        "base": "run.yaml",
        "space": {"train.learning_rate": {"type": "float", "low": 1e-5, "high": 1e-3, "role": "nuisance"}},
        "budget": {"trials": 2},
        "workers_per_trial": 1,
    }
    (run.project / "sweep.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "clusterns_ray.cli", "doctor", "sweep.yaml"]
    done = subprocess.run(command, cwd=run.project, env=run.env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "problem  State API" in done.stdout, done.stdout + done.stderr

    stranger = replace(run, env={**run.env, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    code, found, said = doctor(stranger, *settings(run))
    assert code == 1 and "cluster" in problems(found), said


@pytest.mark.nightly
def test_a_node_of_another_version_that_does_not_share_the_storage(make_run: Any, nodes: Nodes, tmp_path: Path) -> None:
    nodes.start_head(1)
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    for name, version in (("transformers", "4.0.0"), ("clusterns_ray", "0.0.1")):
        info = other / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    add_apart(nodes, "second", shared, PYTHONPATH=os.pathsep.join([str(other)]))
    run = replace(
        make_run("apart", "runtime.num_workers=2", f"runtime.storage_path={shared / 'runs'}"), env=nodes.driver_env
    )
    code, found, said = doctor(run, *settings(run))
    assert (code, problems(found)) == (1, {"versions", "storage"}), said
    values = {finding["value"].partition(" has ")[2] for finding in found["versions"]}
    assert {value.partition(",")[0] for value in values} == {"transformers 4.0.0", "clusterns-ray 0.0.1"}
    (storage,) = found["storage"]
    assert "does not see what the driver wrote" in storage["value"] and "s3://" in storage["remedy"]
