"""All checks, begun together and told in one order; each has a deadline, and none leaves anything behind."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from clusterns_ray.config import Config, load_config
from clusterns_ray.data.prepare import cache_directory
from clusterns_ray.errors import ClusterNSError, ConfigError, DataError
from clusterns_ray.io.files import json_text
from clusterns_ray.io.object_store import is_url, local_copy
from clusterns_ray.io.paths import check_path, check_regular_file
from clusterns_ray.io.yaml_text import load_yaml, read_yaml_text
from clusterns_ray.launch.ray_cluster import check_ray_directory
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.ops.doctor import machines, request
from clusterns_ray.ops.doctor.findings import Check, Finding, from_error
from clusterns_ray.ops.doctor.node import PROBE, nearest_directory
from clusterns_ray.ops.doctor.request import Request, Sizes

DEADLINE_S = 55.0
"""For everything."""

SHUTDOWN_S = 10.0
"""For Ray to end, where it was started for this."""

LOOK_AT_HEAD = "Look whether the head is up (`ray status`), can be reached from here, and has this version and token."

LoadStudy = Callable[[Path, Iterable[str]], Any]
"""``clusterns_ray.tuning.study.load_study``, given by whoever calls, as this layer is below that one."""


def examine(
    path: Path | None,
    overrides: Iterable[str] = (),
    *,
    load_study: LoadStudy,
    cluster_file: Path | None = None,
    deadline_s: float = DEADLINE_S,
) -> Iterator[Finding]:
    """Look for what would go wrong with a run or a study, on the cluster that RAY_ADDRESS names, else on this machine.

    Args:
        path: a configuration or a study; without one only the machines are looked at.
        overrides: ``section.key=value``.
        cluster_file: of Ray's cluster launcher or KubeRay, checked too.
        deadline_s: in which all of it ends; what has not answered then is a finding.

    Returns:
        Findings, as soon as they are there, always in the same order.

    Raises:
        ConfigError: there is no such file. What is wrong *in* it is a finding.
    """
    for file in (path, cluster_file):
        if file is not None:
            check_regular_file("CONFIG" if file is path else "--cluster", check_path("--cluster", file, ()))
    return _findings(path, tuple(overrides), load_study, cluster_file, time.monotonic() + deadline_s)


def verdict(findings: Iterable[Finding], seconds: float) -> str:
    """The last line."""
    levels = [finding.level for finding in findings]
    problems, warnings = levels.count("problem"), levels.count("warning")
    fine = levels.count("ok")
    counts = f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}, {fine} fine, in {seconds:.0f} s."
    if problems:
        return f"{counts} Mend what is a problem first: a run would fail, or not be what was asked for."
    return counts + (" Nothing here stops a run; read the warnings." if warnings else " Nothing here stops a run.")


def as_json(findings: list[Finding], seconds: float) -> str:
    """All findings, for programs."""
    levels = [finding.level for finding in findings]
    value = {
        "problems": levels.count("problem"),
        "warnings": levels.count("warning"),
        "seconds": round(seconds, 1),
        "findings": [vars(finding) for finding in findings],
    }
    return json_text(value)


def read_request(path: Path, overrides: Iterable[str], load_study: LoadStudy) -> Request:
    """The configuration of a run, or the base of a study.

    Raises:
        ConfigError: what is wrong in it.
    """
    values = load_yaml(read_yaml_text("The configuration", path), str(path))
    if isinstance(values, dict) and "space" in values:
        study = load_study(path, overrides)
        return Request(study.base, study=True, concurrent=study.config.concurrent_trials)
    return Request(load_config(path, overrides))


def _findings(
    path: Path | None, overrides: tuple[str, ...], load_study: LoadStudy, cluster_file: Path | None, deadline: float
) -> Iterator[Finding]:
    asked: Request | None = None
    if path is not None:
        try:
            asked = read_request(path, overrides, load_study)
        except (ConfigError, DataError) as error:
            yield from from_error("configuration", error)
    sizes = Sizes()
    checks: list[Check] = []
    if asked is not None:
        yield from request.examine_values(asked)
        config = asked.config
        work: dict[str, Callable[[], list[Finding]]] = {
            "storage": lambda: request.examine_storage_path(config),
            "trackers": lambda: request.examine_trackers(config),
            "corpus": lambda: request.examine_corpus(config),
            "dev set": lambda: request.examine_dev_set(config),
            "encoder": lambda: request.examine_encoder(config, sizes),
        }
        if not asked.study:
            work = {"name": lambda: request.examine_name(config), **work}
        if asked.on_ray:
            work = {"Ray's directory": examine_ray_directory, **work}
        checks = [Check(what, check, deadline) for what, check in work.items()]
    if cluster_file is not None:
        checks.append(Check("cluster file", lambda: _cluster_file(cluster_file), deadline))
    with _inspection(asked, deadline) as lines:
        for check in checks:
            yield from check.findings()
        joined = bool(os.environ.get("RAY_ADDRESS"))
        facts = list(lines)
        yield from _machines(asked, machines.read_facts(facts, joined), facts, sizes, joined)


def _machines(
    asked: Request | None, cluster: machines.Cluster | None, facts: list[dict[str, Any]], sizes: Sizes, joined: bool
) -> Iterator[Finding]:
    kinds = {fact["kind"] for fact in facts}
    if cluster is None:
        remedy = "Look at this machine's disk and at its Python."
        yield Finding("problem", "this machine", "Python did not answer in time, or its process ended", remedy)
        return
    refused = [fact["error"] for fact in facts if fact["kind"] == "cluster_error"]
    on_ray = joined or (asked is not None and asked.on_ray)
    if on_ray and "cluster" not in kinds:
        address = os.environ.get("RAY_ADDRESS")
        where = f"Ray at RAY_ADDRESS ({address})" if joined else "Ray, started on this machine,"
        silence = f"{where} did not answer in time, or its process ended"
        (finding, *_) = from_error("cluster", RuntimeError(refused[0] if refused else silence), remedy=LOOK_AT_HEAD)
        yield finding
        cluster.machines = []  # what it would run on was not seen
    yield from machines.examine_answers(cluster)
    yield from machines.examine_versions(cluster)
    if "cluster" in kinds:
        yield from machines.examine_security(cluster)
        yield from machines.examine_clocks(cluster)
        yield from machines.examine_state_api(asked, cluster)
    if cluster.machines:
        yield from machines.examine_gpus(asked, cluster)
        yield from machines.examine_faiss(cluster)
        if asked is not None:
            yield from machines.examine_storage(asked, cluster)
            yield from machines.examine_model(cluster)
            yield from machines.examine_resources(asked, cluster)
            yield from machines.examine_cpus(asked, cluster, os.cpu_count() or 1)
            yield from machines.examine_memory(asked, cluster, sizes)
    if asked is not None:
        yield from machines.examine_disk(asked, cluster, sizes)


def examine_ray_directory() -> list[Finding]:
    """Whether the sockets of a Ray that is started here have room for their paths."""
    check_ray_directory()
    return []


def _cluster_file(path: Path) -> list[Finding]:
    from clusterns_ray.ops.cluster_lint import check_cluster_file

    return check_cluster_file(path) or [Finding("ok", "cluster file", f"{path} is valid")]


# ---- the process that looks at the machines -------------------------------------------------------------------------


@contextmanager
def _inspection(asked: Request | None, deadline: float) -> Iterator[Iterator[dict[str, Any]]]:
    """Start it; give what it tells until it is done or the deadline is over; end it, and remove what it left."""
    joined = bool(os.environ.get("RAY_ADDRESS"))
    on_ray = joined or (asked is not None and asked.on_ray)
    with ExitStack() as stack:
        env = dict(os.environ)
        if on_ray and not joined:
            # A Ray that is started here leaves its logs, and a token in the home directory.
            scratch = tempfile.mkdtemp(prefix="cd", dir="/tmp" if os.path.isdir("/tmp") else None)
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            env["RAY_TMPDIR"] = scratch
            env.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        seconds = max(deadline - time.monotonic(), 1.0)
        told = {
            "ray": on_ray,
            "cpus": 1 if asked is None else asked.most * asked.concurrent * asked.config.runtime.cpus_per_worker,
            "state_api": asked is not None and asked.needs_state_api,
            "seconds": max(seconds - 10, seconds / 2),
            "node": _of_node(None if asked is None else asked.config, on_ray, stack),
        }
        # As a program and not as a module, whose directory Ray would put before others on the nodes.
        program = "from clusterns_ray.ops.doctor.inspection import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
        )
        stack.callback(_end, process)
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(told).encode())
            process.stdin.close()
        yield _told(process, deadline)


def _told(process: subprocess.Popen[bytes], deadline: float) -> Iterator[dict[str, Any]]:
    """What the process tells, until it has told all, ends, or is out of time."""
    lines: list[dict[str, Any]] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(json.loads(line))
            if lines[-1]["kind"] == "end":
                return

    reader = threading.Thread(target=read, daemon=True, name="doctor inspection")
    reader.start()
    reader.join(max(deadline - time.monotonic(), 0))
    yield from lines
    if lines and lines[-1]["kind"] == "end":
        with suppress(subprocess.TimeoutExpired):
            process.wait(SHUTDOWN_S)  # of a Ray that it started


def _end(process: subprocess.Popen[bytes]) -> None:
    """What has not ended by itself is killed."""
    for end in (process.terminate, process.kill):
        end()
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


def _of_node(config: Config | None, on_ray: bool, stack: ExitStack) -> dict[str, Any]:
    """What each node is asked (see :func:`clusterns_ray.ops.doctor.node.describe`); files that show whether nodes
    see one another's are written, and removed with ``stack``."""
    asked: dict[str, Any] = {"directories": {}, "tokens": {}, "store": None, "local_path": None, "model": None}
    if config is None:
        return asked
    runtime = config.runtime
    asked["local_path"] = runtime.local_path
    shared: list[str] = []
    if is_url(runtime.storage_path):
        asked["store"] = runtime.storage_path
        asked["directories"]["runtime.local_path"] = None
    else:
        asked["directories"]["runtime.storage_path"] = str(local_copy(runtime.storage_path))
        shared = ["runtime.storage_path"]
        if config.data.cache_dir is not None:
            asked["directories"]["data.cache_dir"] = str(cache_directory(config))
            shared.append("data.cache_dir")
    if on_ray:
        for key in shared:
            with suppress(OSError):  # that nothing can be written there is found by the node
                where = nearest_directory(asked["directories"][key])
                token = tempfile.NamedTemporaryFile(prefix=PROBE, dir=where)  # noqa: SIM115
                asked["tokens"][key] = stack.enter_context(token).name
        with suppress(ClusterNSError):
            staged = asked["store"] is not None and os.path.isdir(resolve_model(config.encoder.name))
            if not staged:
                asked["model"] = {"name": config.encoder.name, "revision": config.encoder.revision}
    return asked


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}"
