"""Two nodes that share nothing but an object store: each stages what it needs; the result is that of one machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clusterns_ray.storage import Store

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A real S3 server, and the environment that leads to it."""
    pytest.importorskip("moto.server")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    import boto3

    deadline = time.monotonic() + 30
    while True:
        try:
            boto3.client("s3").create_bucket(Bucket="bucket")
            break
        except Exception:
            assert time.monotonic() < deadline and server.poll() is None, "the S3 server did not start"
            time.sleep(0.2)
    yield env
    server.kill()
    server.wait(10)


@pytest.fixture
def machines(environment: dict[str, str], s3: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head and a second node with one CPU each and directories of their own; the driver's environment."""
    processes = []
    # Said on every side: a driver and a joining node do not take it from the head.
    shared = {**environment, **s3, "RAY_AUTH_MODE": "token"}

    def start(name: str, *options: str) -> str:
        """Start a node; what it said once it was up."""
        env = {**shared, "CLUSTERNS_LOCAL_PATH": str(tmp_path / name)}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", *options]
        log = tmp_path / f"{name}.log"
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, env=env, cwd=tmp_path, stdout=file, stderr=file))
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text() or "block forever" not in log.read_text():
            assert time.monotonic() < deadline and processes[-1].poll() is None, log.read_text()
            time.sleep(0.1)
        return re.sub(r"\x1b\[\d+m", "", log.read_text())

    said = start("head", "--head", f"--port={free_port()}", "--include-dashboard=false")
    address = re.search(r"ray start --address='([^']+)'", said)
    assert address is not None, said
    start("second", f"--address={address[1]}")
    yield {**shared, "CLUSTERNS_LOCAL_PATH": str(tmp_path / "head"), "RAY_ADDRESS": address[1]}
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()


def files_below(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_nodes_that_share_nothing_but_a_store(
    make_run: Any, on_two_workers: Any, machines: dict[str, str], tmp_path: Path
) -> None:
    url = f"s3://bucket/{tmp_path.name}"
    run = make_run("stored", "runtime.num_workers=2", f"runtime.storage_path={url}")
    said = replace(run, env=machines).train()
    assert said.code == 0, said.out + said.err
    assert f"Wrote {url}/stored/model" in said.out

    store = Store(url)
    names = store.names()
    for part in ("stored/result.json", "stored/config.yaml", "stored/metrics.jsonl", "stored/model.manifest.json"):
        assert part in names, names
    assert store.pull_directory("stored/model", tmp_path / "pulled")
    ours = (tmp_path / "pulled" / "model.safetensors").read_bytes()
    shared = (on_two_workers[0].directory / "model" / "model.safetensors").read_bytes()
    assert ours == shared, "not the weights of the run on one file system"

    staged = [file for file in files_below(tmp_path / "second") if "/staged/" in file]
    assert any("tokens-" in file for file in staged) and any("encoder-" in file for file in staged)
    assert any(file.endswith("STSB/dev.jsonl") for file in staged)
    written = [machine for machine in ("head", "second") if list((tmp_path / machine).rglob("model.safetensors"))]
    assert os.path.isdir(tmp_path / "second") and written
