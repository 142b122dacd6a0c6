"""Clusters of several Ray nodes on this machine, and what clouds do to them: nodes come, go, and are drained."""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import ray  # noqa: F401  carries psutil
import yaml
from ray.util import get_node_ip_address

import psutil  # isort: skip

MARK = "CLUSTERNS_TEST_NODE"
"""An environment variable that tells a node's processes from all others: what a raylet starts inherits it."""

START_TIMEOUT_S = 90.0
END_TIMEOUT_S = 30.0

QUICK_TO_NOTICE = {
    # A head that misses a node's answer for 2 s takes it for gone; by default for 15 s.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}


INSTANCE = "RAY_CLOUD_INSTANCE_ID"
"""By this environment variable the autoscaler tells the machines that it asked the cloud for."""

HEAD_INSTANCE = "f" * 51 + "00000"
"""As which Ray's fake cloud knows the head."""

HEAD_TYPE = "ray.head.default"  # the name is the fake cloud's
NODE_TYPE = "spot-trainer"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started_with(**variables: str) -> list[psutil.Process]:
    """The live processes that were started, however indirectly, with these in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            if process.status() != psutil.STATUS_ZOMBIE and variables.items() <= environ.items():
                found.append(process)
        except psutil.Error:
            continue
    return found


def end(processes: Callable[[], list[psutil.Process]], what: str) -> None:
    """SIGKILL all of them, and those that they may have started meanwhile; return when none is left."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while left := processes():
        assert time.monotonic() < deadline, f"{what} does not end: {left}"
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1)


@dataclass
class Node:
    """One machine, as far as Ray and our command can tell: its processes, directories, and local copies."""

    name: str
    directory: Path
    """what it keeps, such as ``CLUSTERNS_LOCAL_PATH``; there still when another node of that name is started"""
    command: subprocess.Popen[bytes]
    log: Path
    mark: str

    def said(self) -> str:
        return re.sub(r"\x1b\[\d+m", "", self.log.read_text())

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Live ones whose title holds ``title``."""
        return [process for process in started_with(**{MARK: self.mark}) if title in _title(process)]

    def take_away(self) -> None:
        """SIGKILL of everything on it, as when a cloud takes a machine back without a word."""
        end(self.processes, f"node {self.name}")
        self.command.wait(END_TIMEOUT_S)

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in self.said() or "block forever" not in self.said():
            assert self.command.poll() is None, f"node {self.name} ended:\n{self.said()}"
            assert time.monotonic() < deadline, f"node {self.name} is not up in {START_TIMEOUT_S} s:\n{self.said()}"
            time.sleep(0.05)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@dataclass
class Nodes:
    """A head and other nodes.

    Args:
        directory: for logs, and what each node keeps.
        env: of every node and of drivers.
        ray_directory: short, as the paths of sockets have a limit.
    """

    directory: Path
    env: dict[str, str]
    ray_directory: str
    port: int = field(default_factory=free_port)
    nodes: dict[str, Node] = field(default_factory=dict)
    started: int = 0

    @property
    def address(self) -> str:
        found = re.search(r"--address='([^']+)'", self.nodes["head"].said())
        assert found is not None, self.nodes["head"].said()
        return found[1]

    @property
    def driver_env(self) -> dict[str, str]:
        """The environment of a command on the head."""
        return {**self._env("head"), "RAY_ADDRESS": self.address}

    def start_head(self, cpus: int = 0, *options: str, dashboard: bool = False, **env: str) -> Node:
        """A head; by default it drives only, as an on-demand machine beside spot ones does. Once more with the same
        port when it was taken away."""
        # A port of its own, as several heads may be up on this machine.
        served = ("--include-dashboard=true", f"--dashboard-port={free_port()}") if dashboard else ()
        head = ("--head", f"--port={self.port}", f"--ray-client-server-port={free_port()}")
        head += served or ("--include-dashboard=false",)
        return self._start("head", cpus, *head, *options, **{**QUICK_TO_NOTICE, **env})

    def start_autoscaling_head(
        self, most: int, idle_s: float = 10.0, dashboard: bool = False, version: int = 2, gpus: int = 0
    ) -> Node:
        """A head without CPUs whose autoscaler, a real one, brings up to ``most`` machines of one CPU each. The cloud
        is Ray's fake one: its machines are processes here.

        Args:
            idle_s: seconds that a machine is kept without work.
            version: of the autoscaler. A plain `ray start` has version 1; `ray up` and KubeRay ask for version 2.
            gpus: of each machine, as Ray counts them; torch sees none.
        """
        lists = ["cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands"]
        lists += [f"{kind}_{part}_commands" for kind in ("head", "worker") for part in ("setup", "start_ray")]
        provider = {
            1: {"type": "fake_multinode", "foreground_node_launch": True},
            2: {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            },
        }
        resources = {"CPU": 1} | ({"GPU": gpus} if gpus else {})
        config = {
            "cluster_name": "tests",
            "max_workers": most,
            "idle_timeout_minutes": idle_s / 60,
            "provider": {
                **provider[version],
                "use_node_id_as_ip": version == 1,
                "gcs_address": f"{get_node_ip_address()}:{self.port}",
                "launch_multiple": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": HEAD_TYPE,
            "available_node_types": {
                HEAD_TYPE: {"resources": {}, "node_config": {}, "max_workers": 0},
                NODE_TYPE: {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": most},
            },
            "auth": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **{name: [] for name in lists},
        }
        path = self.directory / "autoscaling.yaml"
        path.write_text(yaml.safe_dump(config))
        env = {"RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_INSTANCE, INSTANCE: HEAD_INSTANCE}
        env |= {"RAY_enable_autoscaler_v2": str(version - 1), "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(f"GPU-none-{number}" for number in range(gpus))
        return self.start_head(0, f"--autoscaling-config={path}", dashboard=dashboard, **env)

    def instances(self) -> dict[str, list[psutil.Process]]:
        """The machines that the autoscaler has brought, each with its processes; one that ends has none left."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.nodes["head"].processes():
            try:
                name = process.environ().get(INSTANCE, HEAD_INSTANCE)
            except psutil.Error:
                continue
            if name != HEAD_INSTANCE:
                found.setdefault(name, []).append(process)
        return found

    def take_away_instance(self, name: str) -> None:
        mark = self.nodes["head"].mark
        end(lambda: started_with(**{MARK: mark, INSTANCE: name}), f"instance {name}")

    def add(self, name: str, cpus: int = 1, *options: str) -> Node:
        return self._start(name, cpus, f"--address={self.address}", *options)

    def take_away(self, name: str) -> None:
        self.nodes.pop(name).take_away()

    def drain(self, name: str, reason: str = "preemption", deadline_s: int = 30) -> None:
        """The notice that a node goes in ``deadline_s``, as it reaches Ray. The node itself stays until taken away."""
        words = {"preemption": "DRAIN_NODE_REASON_PREEMPTION", "idle": "DRAIN_NODE_REASON_IDLE_TERMINATION"}
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}"]
        command += [f"--node-id={self.node_id(name)}", f"--reason={words[reason]}", f"--reason-message={reason}"]
        command += [f"--deadline-remaining-seconds={deadline_s}"]
        done = subprocess.run(command, env=self._env("head"), capture_output=True, text=True, timeout=START_TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr

    def node_id(self, name: str) -> str:
        """Ray's hexadecimal name of a node."""
        (raylet,) = self.nodes[name].processes("raylet/raylet")
        found = re.search(r"--node[_-]id=(\w+)", _title(raylet))
        assert found is not None, _title(raylet)
        return found[1]

    def processes(self, title: str = "") -> list[psutil.Process]:
        return [process for node in self.nodes.values() for process in node.processes(title)]

    def close(self) -> None:
        """End all of it; what comes next finds the machine quiet."""
        with ExitStack() as left:  # one that does not end leaves none of the others
            for name in self.nodes:
                left.callback(self.take_away, name)

    def _env(self, name: str) -> dict[str, str]:
        local = self.directory / name
        return {**self.env, "CLUSTERNS_LOCAL_PATH": str(local), "RAY_TMPDIR": self.ray_directory}

    def _start(self, name: str, cpus: int, *options: str, **env: str) -> Node:
        assert name not in self.nodes, f"there is a node {name!r}"
        self.started += 1
        mark = f"{name}-{secrets.token_hex(8)}"
        directory = self.directory / name
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}"]
        command += ["--include-log-monitor=false"]
        # Each machine has a /tmp of its own.
        command += [f"--temp-dir={self.ray_directory}/{self.started}", "--object-store-memory=100000000", *options]
        log = self.directory / f"{self.started}-{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                # SPT_NOENV: a process that gives itself a title leaves its environment readable.
                env={**self._env(name), **env, MARK: mark, "SPT_NOENV": "1"},
                cwd=directory,
                stdout=file,
                stderr=file,
            )
        node = self.nodes[name] = Node(name, directory, process, log, mark)
        node.wait_until_up()
        return node
