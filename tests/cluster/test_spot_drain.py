"""A real Ray node whose cloud takes its machine back: the watcher hears of it, and the node is drained."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_cloud import FakeCloud, aws_notice, serving
from nodes import Nodes

pytestmark = pytest.mark.slow

WAIT_S = 120.0

DRIVER = """
import json, sys, time
import ray
from ray._raylet import GcsClient

node = sys.argv[1]
ray.init()


@ray.remote(num_cpus=0, resources={"spot": 1})
class Work:
    def where(self):
        return ray.get_runtime_context().get_node_id()


def say(**what):
    print(json.dumps(what), flush=True)


def until(moment):
    deadline = time.monotonic() + 100
    while not (found := moment()):
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.05)
    return found


client = GcsClient(address=ray.get_runtime_context().gcs_address)
work = Work.remote()
say(works_on=ray.get(work.where.remote()), draining=list(client.get_draining_nodes()))
drained = until(client.get_draining_nodes)
say(draining={key if isinstance(key, str) else key.hex(): value for key, value in drained.items()}, now=time.time())
say(answers=ray.get(work.where.remote()))
ray.kill(work)
until(lambda: node not in [each["NodeID"] for each in ray.nodes() if each["Alive"]])
say(alive=len([each for each in ray.nodes() if each["Alive"]]))
"""


@pytest.fixture
def cloud() -> Iterator[Callable[..., FakeCloud]]:
    with serving() as start:
        yield start


def start(nodes: Nodes, log: Path, *command: str) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, *command], env=nodes.driver_env, stdout=file, stderr=subprocess.STDOUT)


def until(log: Path, holds: Callable[[str], bool], process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + WAIT_S
    while not holds(log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return log.read_text()


def test_the_notice_reaches_ray(
    nodes: Nodes,
    cloud: Callable[..., FakeCloud],
    tmp_path: Path,
) -> None:
    nodes.start_head()
    nodes.add("spot", 1, '--resources={"spot": 1}')
    nodes.add("other")
    node = nodes.node_id("spot")
    fake = cloud("aws", (404, ""))
    watched, drove = tmp_path / "watcher.log", tmp_path / "driver.log"
    # --node-id, as all of these nodes share a machine.
    watch = ["-m", "clusterns_ray.launch.preemption", "--endpoint", fake.endpoint, "--poll=0.1", f"--node-id={node}"]
    watcher = start(nodes, watched, *watch)
    driver = start(nodes, drove, "-c", DRIVER, node)
    try:
        until(drove, lambda said: "works_on" in said, driver)
        until(watched, lambda said: "Watching" in said, watcher)
        assert len(fake.asked) > 1 and watcher.poll() is None
        fake.notice, noticed_at = aws_notice(90), time.time()
        assert watcher.wait(WAIT_S) == 0, watched.read_text()
        heard = time.time() - noticed_at
        assert driver.wait(WAIT_S) == 0, drove.read_text()
    finally:
        for process in (watcher, driver):
            if process.poll() is None:
                process.kill()
            process.wait(10)

    said: list[dict[str, Any]] = [json.loads(line) for line in drove.read_text().splitlines() if line.startswith("{")]
    assert said[0] == {"works_on": node, "draining": []}
    assert list(said[1]["draining"]) == [node], "the other nodes stay"
    assert said[1]["draining"][node] / 1000 - noticed_at == pytest.approx(90, abs=3)
    assert heard < 30, f"{heard:.1f} s from the notice to the end of the watcher"
    assert said[2] == {"answers": node}, "what runs there goes on until it leaves by itself"
    assert said[3] == {"alive": 2}, "a node that is drained and idle ends"
    assert f"Node {node} is draining" in watched.read_text()


@pytest.mark.nightly
def test_drain_now_waits_for_the_work(nodes: Nodes, tmp_path: Path) -> None:
    nodes.start_head()
    nodes.add("spot", 1, '--resources={"spot": 1}')
    node = nodes.node_id("spot")
    drove, said = tmp_path / "driver.log", tmp_path / "drain.log"
    driver = start(nodes, drove, "-c", DRIVER, node)
    until(drove, lambda text: "works_on" in text, driver)
    drain = start(nodes, said, "-m", "clusterns_ray.launch.preemption", "--drain-now=100", f"--node-id={node}")
    try:
        assert drain.wait(WAIT_S) == 0, said.read_text()
        assert "The work has left" in said.read_text()
        assert driver.wait(WAIT_S) == 0, drove.read_text()
    finally:
        for process in (drain, driver):
            if process.poll() is None:
                process.kill()
            process.wait(10)
    assert not nodes.nodes["spot"].processes("raylet/raylet")
