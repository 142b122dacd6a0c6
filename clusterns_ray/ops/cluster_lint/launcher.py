"""A file for ``ray up``: what Ray's own schema refuses, and mistakes that it accepts and that are costly or unsafe.

These are machines that nothing ends or caps, a missing token, versions that differ, spot machines without a watcher.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from clusterns_ray.ops.cluster_lint.common import (
    CONSTRAINTS,
    WATCHER,
    check_image,
    check_versions,
    is_count,
    listing,
    mapping,
)
from clusterns_ray.ops.doctor.findings import Finding, problem, warning

LONG_IDLE_MINUTES = 60

START_WATCHER = f"nohup flock -n ~/clusterns-spot.lock python -m {WATCHER} >> ~/clusterns-spot.log 2>&1 < /dev/null &"
"""The command that the shipped files have, there with ``--provider``: one watcher at a time, in the background."""

_ZONE = re.compile(r"\bzones/([\w-]+)/")
_AUTH_MODE = re.compile(r"RAY_AUTH_MODE=[\"']?(\w*)")


def check_launcher(config: Mapping[str, Any], pinned: Mapping[str, str]) -> list[Finding]:
    """The findings about a file for ``ray up``."""
    complete, findings = _with_defaults(config)
    checks = (_check_zones, _check_counts, _check_idle, _check_auth, _check_spot)
    return [
        *findings,
        *(finding for check in checks for finding in check(config, complete)),
        *_check_versions(complete, pinned),
    ]


def _with_defaults(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Finding]]:
    """The file as Ray would complete it, and the findings of Ray's schema.

    Both functions are private to Ray. Where they do not exist, a finding says so, and the file is checked as it is.
    """
    try:
        from ray.autoscaler._private.util import prepare_config, validate_config
    except ImportError as error:
        remedy = "Install the version in constraints.txt: the file is checked without Ray's schema."
        return config, [warning("schema", f"this Ray cannot be asked for its schema ({error})", remedy)]
    try:
        # Without the mounts, as Ray would print a hint about each that is a file.
        complete = prepare_config({**copy.deepcopy(dict(config)), "file_mounts": {}})
        complete["file_mounts"] = config.get("file_mounts", {})
        validate_config(complete)
    except Exception as error:  # ValidationError, ValueError, RuntimeError, and whatever a wrong type leads to
        where = ".".join(str(part) for part in getattr(error, "absolute_path", ()))
        reason = str(getattr(error, "message", "") or error or type(error).__name__)
        value = " ".join((f"{where}: {reason}" if where else reason).split())[:400]
        return config, [problem("schema", value, "Correct it: `ray up` would refuse it.")]
    return complete, []


def _node_types(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {str(name): mapping(node) for name, node in mapping(config.get("available_node_types")).items()}


def _commands(config: Mapping[str, Any], *keys: str) -> list[str]:
    """The commands of these lists, each once."""
    return list(dict.fromkeys(str(command) for key in keys for command in listing(config.get(key))))


def _is_spot(node: Mapping[str, Any]) -> bool:
    config = mapping(node.get("node_config"))
    scheduling = config.get("scheduling")
    parts = scheduling if isinstance(scheduling, list) else [scheduling]  # Ray's example gives a list
    return mapping(config.get("InstanceMarketOptions")).get("MarketType") == "spot" or any(
        mapping(part).get("preemptible") is True or mapping(part).get("provisioningModel") == "SPOT" for part in parts
    )


def _check_zones(given: Mapping[str, Any], config: Mapping[str, Any]) -> Iterable[Finding]:
    """Check that zones are in the region, and that disks are in the zone of their machines."""
    provider, key = mapping(given.get("provider")), "provider.availability_zone"
    region = str(provider.get("region") or "")
    zones = [zone.strip() for zone in str(provider.get("availability_zone") or "").split(",") if zone.strip()]
    for zone in zones:
        if not zone.startswith(region):
            value = f"is {zone}, which is not in provider.region, {region}"
            yield problem(key, value, f"Name a zone of {region}, or the region of {zone}.")
    for name, node in _node_types(given).items():
        for zone in dict.fromkeys(_ZONE.findall(str(node.get("node_config")))):
            if zones and zone not in zones:
                value = f"names zone {zone}, and {key} is {', '.join(zones)}"
                yield problem(f"{name}.node_config", value, "Name the same zone in both.")


def _check_counts(given: Mapping[str, Any], config: Mapping[str, Any]) -> Iterable[Finding]:
    """Check how many machines there may be, which caps what they cost."""
    total = config.get("max_workers", 0)
    if "max_workers" not in given:
        yield warning("max_workers", f"is not given; Ray takes {total}", "Give it: it caps what a run costs.")
    elif not is_count(total):
        yield problem("max_workers", f"is {total!r}", "Give a whole number, 0 or more.")
    for name, node in _node_types(config).items():
        is_head = name == config.get("head_node_type")
        least, most = node.get("min_workers", 0), node.get("max_workers", 0 if is_head else total)
        if not (is_count(least) and is_count(most) and least <= most):
            value = f"min_workers is {least!r} and max_workers {most!r}"
            yield problem(name, value, "Give whole numbers, 0 or more, and no minimum above the maximum.")
        elif is_head and most:
            value = f"is {most}: the head's own type would be started as workers too"
            yield problem(f"{name}.max_workers", value, "Set the head's min_workers and max_workers to 0.")
        elif least:
            value = f"is {least}: that many machines run, and cost, with or without work"
            yield warning(f"{name}.min_workers", value, "Set it to 0 unless that is meant.")


def _check_idle(given: Mapping[str, Any], config: Mapping[str, Any]) -> Iterable[Finding]:
    key, value = "idle_timeout_minutes", given.get("idle_timeout_minutes")
    if value is None:
        text = "is not given, so nothing here says when machines without work end"
        yield problem(key, text, "Give it, such as 5 minutes.")
    elif not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        yield problem(key, f"is {value!r}", "Give a number of minutes.")
    elif value > LONG_IDLE_MINUTES:
        yield warning(key, f"is {value:g} minutes in which machines without work cost", "Lower it.")


def _check_auth(given: Mapping[str, Any], config: Mapping[str, Any]) -> Iterable[Finding]:
    for node in ("head", "worker"):
        key = f"{node}_start_ray_commands"
        commands = _commands(config, "initialization_commands", "setup_commands", f"{node}_setup_commands", key)
        modes = {mode for command in commands for mode in _AUTH_MODE.findall(command)}
        if modes != {"token"}:
            value = f"RAY_AUTH_MODE is {', '.join(sorted(modes)) or 'not set'}: whoever reaches a port of the cluster "
            remedy = "Put `export RAY_AUTH_MODE=token;` before every `ray start`."
            yield problem(key, value + "could run anything on it", remedy)
    if not any(str(path).endswith(".ray/auth_token") for path in mapping(config.get("file_mounts"))):
        remedy = "Mount ~/.ray/auth_token (from `ray get-auth-token --generate`) to /home/USER/.ray/auth_token."
        yield problem("file_mounts", "no node gets the token file, without which none can start", remedy)


def _check_spot(given: Mapping[str, Any], config: Mapping[str, Any]) -> Iterable[Finding]:
    key = "worker_start_ray_commands"
    spot = [name for name, node in _node_types(config).items() if _is_spot(node)]
    watchers = [command for command in _commands(config, key) if WATCHER in command]
    if spot and not watchers:
        value = f"nothing watches for the notice that a spot machine is taken away ({', '.join(spot)})"
        yield problem(key, value, f"Start the watcher: {START_WATCHER}")
    if any(not command.rstrip().endswith("&") for command in watchers):
        value = "the spot watcher is not in the background, so that the node's start would never end"
        yield problem(key, value, f"End the command with &: {START_WATCHER}")


def _check_versions(config: Mapping[str, Any], pinned: Mapping[str, str]) -> Iterable[Finding]:
    keys = (key for key in config if str(key).endswith("_commands"))
    commands = _commands(config, *keys)
    for node in _node_types(config).values():
        commands += _commands(node, "worker_setup_commands")
    yield from check_versions("setup_commands", commands, pinned)
    docker = mapping(config.get("docker"))
    for key in ("image", "head_image", "worker_image"):
        if docker.get(key):
            yield from check_image(f"docker.{key}", str(docker[key]), pinned)
    for command in commands:
        if "pip install" in command and f"-c {CONSTRAINTS}" not in command and f"/{CONSTRAINTS}" not in command:
            value = f"{command[:60]!r} installs without {CONSTRAINTS}, so nodes that start on different days may differ"
            yield problem("setup_commands", value, f"Add -c {CONSTRAINTS}.")
