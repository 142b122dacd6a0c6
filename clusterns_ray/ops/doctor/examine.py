"""All checks, begun together and shown in one order; each has a deadline, and none leaves anything behind."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from clusterns_ray.config import Config, load_config
from clusterns_ray.data.prepare import cache_directory
from clusterns_ray.errors import ClusterNSError, ConfigError, DataError
from clusterns_ray.io.files import json_text
from clusterns_ray.io.object_store import is_url, local_copy
from clusterns_ray.io.paths import check_path, check_regular_file
from clusterns_ray.io.yaml_text import load_yaml, read_yaml_text
from clusterns_ray.launch.preflight import check_lasting, check_trackers
from clusterns_ray.launch.ray_cluster import check_ray_directory
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.ops.cluster_lint import check_cluster_file
from clusterns_ray.ops.doctor import machines, request
from clusterns_ray.ops.doctor.findings import Check, Finding, count_text, from_error, ok, problem
from clusterns_ray.ops.doctor.node import PROBE, nearest_directory
from clusterns_ray.ops.doctor.request import Request, Sizes

DEADLINE_S = 55.0
"""Seconds for all checks together."""

SCRATCH_DIRECTORY, SCRATCH_PREFIX = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), "cd"
"""Where a Ray that is started here keeps its files: short, as the paths of its sockets have a limit."""

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
        cluster_file: a file for Ray's cluster launcher or KubeRay, which is checked too.
        deadline_s: seconds for all of it; a check that has not answered by then is a finding.

    Returns:
        Findings, each as soon as it is known, always in the same order.

    Raises:
        ConfigError: there is no such file. What is wrong *in* it is a finding.
    """
    for key, file in (("CONFIG", path), ("--cluster", cluster_file)):
        if file is not None:
            check_regular_file(key, check_path(key, file, ()))
    return _findings(path, tuple(overrides), load_study, cluster_file, time.monotonic() + deadline_s)


def verdict(findings: Iterable[Finding], seconds: float) -> str:
    """The last line: how many findings of each level there are, and whether a run may start."""
    levels = [finding.level for finding in findings]
    problems, warnings = levels.count("problem"), levels.count("warning")
    counts = f"{count_text(problems, 'problem')}, {count_text(warnings, 'warning')}, {levels.count('ok')} fine, in "
    counts += f"{seconds:.0f} s. "
    if problems:
        return counts + "Correct the problems first: a run would fail, or not be what was asked for."
    return counts + "Nothing here stops a run" + ("; read the warnings." if warnings else ".")


def as_json(findings: list[Finding], seconds: float) -> str:
    """All findings and their counts as JSON, for programs."""
    levels = [finding.level for finding in findings]
    counts = {"problems": levels.count("problem"), "warnings": levels.count("warning"), "seconds": round(seconds, 1)}
    return json_text({**counts, "findings": [vars(finding) for finding in findings]})


def read_request(path: Path, overrides: Iterable[str], load_study: LoadStudy) -> Request:
    """The configuration of a run, or the base of a study.

    Raises:
        ConfigError: what is wrong in it.
    """
    values = load_yaml(read_yaml_text("The configuration", path), str(path))
    if isinstance(values, dict) and "space" in values:
        study = load_study(path, overrides)
        shared_by, choose = study.config.trials_per_gpu, None
        if shared_by == "auto":
            from clusterns_ray.tuning.packing import choose_trials_per_gpu

            shared_by, choose = 1, partial(choose_trials_per_gpu, study)
        return Request(study.base, True, study.config.concurrent_trials, shared_by, choose)
    return Request(load_config(path, overrides))


def _findings(
    path: Path | None, overrides: tuple[str, ...], load_study: LoadStudy, cluster_file: Path | None, deadline: float
) -> Iterator[Finding]:
    asked: Request | None = None
    if path is not None:
        try:
            asked = read_request(path, overrides, load_study)
            yield request.check_values(asked)
        except (ConfigError, DataError) as error:
            yield from from_error("configuration", error)
    sizes = Sizes()
    facts: list[dict[str, Any]] = []
    inspection = Check("this machine", lambda: _inspect(asked, deadline, facts), deadline + 15)
    checks = [Check(what, work, deadline) for what, work in _work(asked, sizes, cluster_file).items()]
    for check in checks:
        yield from check.findings()
    yield from inspection.findings()
    yield from machines.check_facts(asked, facts, sizes, joined=bool(os.environ.get("RAY_ADDRESS")))


def _work(asked: Request | None, sizes: Sizes, cluster_file: Path | None) -> dict[str, Callable[[], Iterable[Finding]]]:
    """The checks that need no other machine, by the name under which their findings are shown."""

    def silent(check: Callable[[], object], *findings: Finding) -> Callable[[], Iterable[Finding]]:
        """A check that has something to say only where it refuses; else its findings are ``findings``."""

        def work() -> Iterable[Finding]:
            check()
            return findings

        return work

    work: dict[str, Callable[[], Iterable[Finding]]] = {}
    if asked is not None:
        config = asked.config
        if asked.on_ray:
            work["Ray's directory"] = silent(check_ray_directory)
        if not asked.study:
            work["name"] = lambda: request.check_run_name(config)
        trackers = ", ".join(config.runtime.trackers) or "none"
        work |= {
            "storage": silent(lambda: check_lasting(config)),
            "trackers": silent(lambda: check_trackers(config), ok("trackers", trackers)),
            "corpus": lambda: request.check_corpus(config, sizes),
            "dev set": lambda: request.check_dev_set(config),
            "encoder": lambda: request.check_model(config, sizes),
        }
    if cluster_file is not None:
        valid = [ok("cluster file", f"{cluster_file} is valid")]
        work["cluster file"] = lambda: check_cluster_file(cluster_file) or valid
    return work


# ---- the process that looks at the machines -------------------------------------------------------------------------


def _inspect(asked: Request | None, deadline: float, facts: list[dict[str, Any]]) -> list[Finding]:
    """Run ``inspection.py`` in a process of its own, put what it writes into ``facts``, and remove what it left."""
    joined = bool(os.environ.get("RAY_ADDRESS"))
    on_ray = joined or (asked is not None and asked.on_ray)
    with ExitStack() as stack:
        env = dict(os.environ)
        if on_ray and not joined:
            # A Ray that is started here leaves its logs, and a token in the home directory.
            scratch = tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=SCRATCH_DIRECTORY)
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            env["RAY_TMPDIR"] = scratch
            env.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        seconds = max(deadline - time.monotonic(), 1.0)
        wanted = {
            "ray": on_ray,
            "cpus": 1 if asked is None else asked.most * asked.concurrent * asked.config.runtime.cpus_per_worker,
            "label_selector": asked.config.runtime.label_selector if asked else {},
            "state_api": asked is not None and asked.needs_state_api,
            "seconds": max(seconds - 10, seconds / 2),
            "node": _node_request(None if asked is None else asked.config, on_ray, stack),
        }
        # As a program and not as a module, whose directory Ray would put before others on the nodes.
        command = [sys.executable, "-c", "from clusterns_ray.ops.doctor.inspection import main; main()"]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, env=env)
        output = _output(process, json.dumps(wanted).encode(), deadline - time.monotonic())
    facts += [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
    if facts:
        return []
    value = "Python did not answer in time, or its process ended"
    return [problem("this machine", value, "Look at this machine's disk and at its Python.")]


def _output(process: subprocess.Popen[bytes], given: bytes, seconds: float) -> bytes:
    """What the process writes until it ends; one that has not ended in time is terminated, and five seconds later
    killed."""
    with suppress(subprocess.TimeoutExpired):
        return process.communicate(given, max(seconds, 0))[0]
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        return process.communicate(timeout=5)[0]
    process.kill()
    return process.communicate()[0]


def _node_request(config: Config | None, on_ray: bool, stack: ExitStack) -> dict[str, Any]:
    """The request that each node gets (see :func:`clusterns_ray.ops.doctor.node.describe`). The files by which nodes
    show that they share a file system are written here, and removed when ``stack`` closes."""
    asked: dict[str, Any] = {"directories": {}, "tokens": {}, "store": None, "local_path": None, "model": None}
    if config is None:
        return asked
    runtime, directories = config.runtime, asked["directories"]
    asked["local_path"] = runtime.local_path
    if is_url(runtime.storage_path):
        asked["store"], directories["runtime.local_path"] = runtime.storage_path, None
    else:
        directories["runtime.storage_path"] = str(local_copy(runtime.storage_path))
        if config.data.cache_dir is not None:
            directories["data.cache_dir"] = str(cache_directory(config))
    for key, directory in directories.items() if on_ray else ():
        with suppress(OSError, TypeError):  # where nothing can be written, the node says so
            token = tempfile.NamedTemporaryFile(prefix=PROBE, dir=nearest_directory(directory))  # noqa: SIM115
            asked["tokens"][key] = stack.enter_context(token).name
    with suppress(ClusterNSError):
        if on_ray and not (asked["store"] and os.path.isdir(resolve_model(config.encoder.name))):  # else it is staged
            asked["model"] = {"name": config.encoder.name, "revision": config.encoder.revision}
    return asked
