"""Checks of a SkyPilot task that need no SkyPilot: versions, the token, GPUs, storage, and `ray stop`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from clusterns_ray.ops.cluster_lint.common import CONSTRAINTS, listing, mapping
from clusterns_ray.ops.doctor.findings import Finding, problem


def check_task(task: Mapping[str, Any]) -> Iterable[Finding]:
    """Return the findings about a task. Its schema is left to SkyPilot (`sky launch --dryrun`)."""
    setup, run, resources = str(task.get("setup") or ""), str(task.get("run") or ""), mapping(task.get("resources"))
    if "pip install" in setup and CONSTRAINTS not in setup:
        value = f"installs without {CONSTRAINTS}, so machines that start on different days may differ"
        yield problem("setup", value, f"Add -c {CONSTRAINTS}.")
    settings = {**mapping(task.get("envs")), **mapping(task.get("secrets"))}
    if settings.get("RAY_AUTH_MODE") != "token" or "RAY_AUTH_TOKEN" not in settings:
        value = "Ray asks for no token: whoever reaches a port of the cluster could run anything on it"
        yield problem("secrets", value, "Set RAY_AUTH_MODE: token under envs, and RAY_AUTH_TOKEN: null under secrets.")
    if re.search(r"^\s*ray stop\b", run, re.MULTILINE):
        value = "`ray stop` ends SkyPilot's own Ray, too"
        yield problem("run", value, "Call ~/sky_templates/ray/stop_cluster with RAY_CMD=$HOME/venv/bin/ray.")
    kinds = [mapping(kind) for key in ("any_of", "ordered") for kind in listing(resources.get(key))]
    if not any(kind.get("accelerators") for kind in (resources, *kinds)):
        yield problem("resources", "has no accelerators, so machines have no GPU", "Add some, such as L4 or A10G.")
    if "runtime.storage_path=" not in run:
        value = "runs would stay on machines that are taken away"
        yield problem("run", value, "Set runtime.storage_path to a place in a bucket.")
