"""A file for ``ray up``: what Ray's own schema refuses, and what it lets pass that costs money, data or a day.

Machines that nothing ends, workers on the head, drivers on a spot machine, versions that differ, no token, open ports.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
from clusterns_ray.ops.doctor.findings import Finding

LONG_IDLE_MINUTES = 60
LOOPBACK = ("127.0.0.1", "localhost", "::1")
WORLD = ("0.0.0.0/0", "::/0")

_GPU_MACHINE = re.compile(r"(?:p|g|gr|trn|inf)\d|(?:a2|a3|a4|g2|g4)-", re.ASCII)
_AUTH_MODE = re.compile(r"RAY_AUTH_MODE=[\"']?(\w*)")


def check_launcher(config: Mapping[str, Any], pinned: Mapping[str, str]) -> list[Finding]:
    """The findings about a file for ``ray up``."""
    complete, found = _with_defaults(config)
    types = _node_types(complete)
    commands = _Commands.of(complete)
    return [
        *found,
        *_check_counts(config, complete, types),
        *_check_head(types, commands),
        *_check_idle(config),
        *_check_installation(complete, commands, pinned),
        *_check_zone(config, types),
        *_check_auth(complete, commands),
        *_check_ports(complete, commands),
        *_check_credentials(complete),
        *_check_workers(complete, types, commands),
    ]


# ---- what is read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NodeType:
    name: str
    is_head: bool
    values: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        return mapping(self.values.get("node_config"))

    @property
    def is_spot(self) -> bool:
        scheduling = self.config.get("scheduling")
        parts = scheduling if isinstance(scheduling, list) else [scheduling]  # Ray's example gives a list
        return mapping(self.config.get("InstanceMarketOptions")).get("MarketType") == "spot" or any(
            mapping(part).get("preemptible") is True or mapping(part).get("provisioningModel") == "SPOT"
            for part in parts
        )

    @property
    def has_gpu(self) -> bool:
        machine = str(self.config.get("InstanceType") or self.config.get("machineType") or "")
        gpus = mapping(self.values.get("resources")).get("GPU", 0)
        accelerators = bool(self.config.get("guestAccelerators"))
        return bool(gpus) or accelerators or bool(_GPU_MACHINE.match(machine.rpartition("/")[2]))


@dataclass(frozen=True)
class _Commands:
    """By where they run, with what runs on every node at the beginning of each."""

    head_setup: list[str]
    worker_setup: list[str]
    head_start: list[str]
    worker_start: list[str]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Commands:
        def read(source: Mapping[str, Any], key: str) -> list[str]:
            value = source.get(key)
            return [str(command) for command in value] if isinstance(value, list) else []

        types = mapping(config.get("available_node_types")).values()
        of_types = [each for value in types for each in read(mapping(value), "worker_setup_commands")]
        everywhere = read(config, "initialization_commands") + read(config, "setup_commands")
        return cls(
            everywhere + read(config, "head_setup_commands"),
            everywhere + read(config, "worker_setup_commands") + of_types,
            read(config, "head_start_ray_commands"),
            read(config, "worker_start_ray_commands"),
        )

    def all(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys([*self.head_setup, *self.worker_setup, *self.head_start, *self.worker_start]))


def _with_defaults(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Finding]]:
    """The file as Ray would fill it in, and what Ray's schema says of it.

    Both functions are private to Ray; where they are gone, that is told, and the rest goes on with the file as it is.
    """
    try:
        from ray.autoscaler._private.util import prepare_config, validate_config
    except ImportError as error:
        remedy = "Install the version in constraints.txt: it is checked without Ray's schema."
        return config, [Finding("warning", "schema", f"this Ray cannot be asked for its schema ({error})", remedy)]
    try:
        # Without the mounts, as Ray would print a hint about each that is a file.
        complete = prepare_config({**copy.deepcopy(dict(config)), "file_mounts": {}})
        complete["file_mounts"] = config.get("file_mounts", {})
        validate_config(complete)
    except Exception as error:  # ValidationError, ValueError, RuntimeError, and whatever a wrong type leads to
        where = ".".join(str(part) for part in getattr(error, "absolute_path", ()))
        reason = str(getattr(error, "message", "") or error or type(error).__name__)
        value = f"{where}: {reason}" if where else reason
        return config, [
            Finding("problem", "schema", " ".join(value.split())[:400], "`ray up` would refuse it: mend it.")
        ]
    return complete, []


def _node_types(config: Mapping[str, Any]) -> list[_NodeType]:
    head = config.get("head_node_type")
    types = mapping(config.get("available_node_types"))
    return [_NodeType(str(name), name == head, mapping(values)) for name, values in types.items()]


# ---- what is checked ------------------------------------------------------------------------------------------------


def _check_counts(given: Mapping[str, Any], config: Mapping[str, Any], types: list[_NodeType]) -> Iterable[Finding]:
    total = config.get("max_workers", 0)
    least = 0
    for node in types:
        low, high = node.values.get("min_workers", 0), node.values.get("max_workers", 0 if node.is_head else total)
        wrong = {key: value for key, value in (("min_workers", low), ("max_workers", high)) if not is_count(value)}
        for key, value in wrong.items():
            yield Finding("problem", f"{node.name}.{key}", f"is {value!r}", "Give a whole number, 0 or more.")
        if wrong:
            continue
        least += low
        if low > high:
            yield Finding(
                "problem",
                f"{node.name}.min_workers",
                f"is {low}, more than its max_workers ({high})",
                "Raise the one or lower the other.",
            )
        if node.is_head and (low or high):
            yield Finding(
                "problem",
                f"{node.name}.max_workers",
                f"is {high}: the head's own type would be started as workers too",
                "Set the head's min_workers and max_workers to 0.",
            )
        elif low:
            yield Finding(
                "warning",
                f"{node.name}.min_workers",
                f"is {low}: so many machines run, and cost, with or without work",
                "Set it to 0 unless that is meant.",
            )
    if not is_count(total):
        yield Finding("problem", "max_workers", f"is {total!r}", "Give a whole number, 0 or more.")
    elif total < least:
        yield Finding(
            "problem",
            "max_workers",
            f"is {total}, less than the min_workers of all types together ({least})",
            "Raise it, or lower those.",
        )
    if "max_workers" not in given:
        yield Finding(
            "warning", "max_workers", f"is not given; Ray takes {total}", "Give it: it caps what a run costs."
        )


def _check_head(types: list[_NodeType], commands: _Commands) -> Iterable[Finding]:
    for node in types:
        if not node.is_head:
            continue
        if node.has_gpu:
            yield Finding(
                "problem",
                f"{node.name}.resources",
                f"the head has GPUs ({_machine(node)}): it stays on, and its GPUs would be paid for without work",
                "Take a machine without GPUs, and give the head `GPU: 0`.",
            )
        if node.is_spot:
            yield Finding(
                "problem",
                f"{node.name}.node_config",
                "the head is a spot machine; all drivers end with it",
                "Take an on-demand machine for the head.",
            )
        cpus = mapping(node.values.get("resources")).get("CPU")
        if cpus != 0 and not any("--num-cpus=0" in command for command in commands.head_start):
            yield Finding(
                "warning",
                f"{node.name}.resources",
                f"CPU is {cpus!r}, so that workers without a GPU may be placed on the head",
                "Give it `CPU: 0`: drivers and controllers need none.",
            )


def _machine(node: _NodeType) -> str:
    gpus = mapping(node.values.get("resources")).get("GPU")
    machine = node.config.get("InstanceType") or node.config.get("machineType")
    return f"{machine}, GPU {gpus}" if gpus else str(machine)


def _check_idle(given: Mapping[str, Any]) -> Iterable[Finding]:
    key = "idle_timeout_minutes"
    if key not in given:
        yield Finding(
            "problem",
            key,
            "is not given, so nothing here says when machines without work end",
            "Give it, such as 5 minutes.",
        )
        return
    value = given[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        yield Finding("problem", key, f"is {value!r}", "Give a number of minutes.")
    elif value > LONG_IDLE_MINUTES:
        yield Finding("warning", key, f"is {value:g} minutes in which machines without work cost", "Lower it.")


def _check_installation(config: Mapping[str, Any], commands: _Commands, pinned: Mapping[str, str]) -> Iterable[Finding]:
    yield from check_versions("setup_commands", commands.all(), pinned)
    docker = mapping(config.get("docker"))
    for key in ("image", "head_image", "worker_image"):
        if docker.get(key):
            yield from check_image(f"docker.{key}", str(docker[key]), pinned)
    for command in commands.all():
        if "pip install" in command and f"-c {CONSTRAINTS}" not in command and f"/{CONSTRAINTS}" not in command:
            yield Finding(
                "problem",
                "setup_commands",
                f"{_short(command)!r} installs without {CONSTRAINTS}, so nodes that start on different days may differ",
                f"Add -c {CONSTRAINTS}.",
            )


def _check_zone(config: Mapping[str, Any], types: list[_NodeType]) -> Iterable[Finding]:
    provider = mapping(config.get("provider"))
    if provider.get("type") != "aws":
        return  # Google Cloud's schema asks for one
    zones = [zone for zone in str(provider.get("availability_zone") or "").split(",") if zone.strip()]
    subnets = {str(subnet) for node in types for subnet in listing(node.config.get("SubnetIds")) or [""]}
    if len(zones) != 1 and (len(subnets) != 1 or "" in subnets):
        yield Finding(
            "warning",
            "provider.availability_zone",
            f"is {provider.get('availability_zone')!r}: head and workers may be in different zones, between which "
            "traffic is slower and is paid for",
            "Give one zone of the region, such as us-west-2a; several are right only where one has too few machines.",
        )


def _check_auth(config: Mapping[str, Any], commands: _Commands) -> Iterable[Finding]:
    starts = {"head_start_ray_commands": commands.head_start, "worker_start_ray_commands": commands.worker_start}
    setups = {"head_start_ray_commands": commands.head_setup, "worker_start_ray_commands": commands.worker_setup}
    for key, started in starts.items():
        if not any("ray start" in command for command in started):
            yield Finding("problem", key, "no `ray start` among them", "See cluster.yaml.")
            continue
        modes = [mode for command in [*setups[key], *started] for mode in _AUTH_MODE.findall(command)]
        if not modes or set(modes) != {"token"}:
            yield Finding(
                "problem",
                key,
                f"RAY_AUTH_MODE is {', '.join(sorted(set(modes))) or 'not set'}: whoever reaches a port of the cluster "
                "could run anything on it",
                "Put `export RAY_AUTH_MODE=token;` before every `ray start`.",
            )
    if not any(str(path).endswith(".ray/auth_token") for path in mapping(config.get("file_mounts"))):
        yield Finding(
            "problem",
            "file_mounts",
            "no node gets the token file, without which none can start",
            "Mount ~/.ray/auth_token (from `ray get-auth-token --generate`) to /home/USER/.ray/auth_token.",
        )


def _check_ports(config: Mapping[str, Any], commands: _Commands) -> Iterable[Finding]:
    for command in commands.head_start:
        for host in re.findall(r"--dashboard-host[= ](\S+)", command):
            if host.strip("\"'") not in LOOPBACK:
                yield Finding(
                    "problem",
                    "head_start_ray_commands",
                    f"--dashboard-host={host}: the dashboard, which runs jobs, listens on every network",
                    "Use --dashboard-host=127.0.0.1, and reach it by `ray dashboard FILE`, through ssh.",
                )
    rules = mapping(mapping(config.get("provider")).get("security_group")).get("IpPermissions")
    for rule in rules if isinstance(rules, list) else []:
        rule = mapping(rule)
        ranges = [*listing(rule.get("IpRanges")), *listing(rule.get("Ipv6Ranges"))]
        sources = [mapping(part).get("CidrIp") or mapping(part).get("CidrIpv6") for part in ranges]
        only_ssh = rule.get("FromPort") == rule.get("ToPort") == 22 and rule.get("IpProtocol") == "tcp"
        if any(source in WORLD for source in sources) and not only_ssh:
            yield Finding(
                "problem",
                "provider.security_group",
                f"ports {rule.get('FromPort')} to {rule.get('ToPort')} are open to the world",
                "Remove the rule: ssh (port 22) is all that `ray up` needs; reach other ports through it.",
            )


def _check_credentials(config: Mapping[str, Any]) -> Iterable[Finding]:
    provider = mapping(config.get("provider"))
    for key in ("aws_credentials", "gcp_credentials"):
        if provider.get(key):
            yield Finding(
                "problem",
                f"provider.{key}",
                "credentials are in the file",
                "Take them out: your own are found where the cloud's tools keep them, machines have roles.",
            )


def _check_workers(config: Mapping[str, Any], types: list[_NodeType], commands: _Commands) -> Iterable[Finding]:
    workers = [node for node in types if not node.is_head]
    spot = [node for node in workers if node.is_spot]
    watchers = [command for command in commands.worker_start if WATCHER in command]
    if spot and not watchers:
        yield Finding(
            "problem",
            "worker_start_ray_commands",
            f"nothing watches for the notice that a spot machine goes ({', '.join(node.name for node in spot)})",
            f"Start the watcher there: nohup python -m {WATCHER} > /tmp/spot.log 2>&1 < /dev/null &",
        )
    if any(not command.rstrip().endswith("&") for command in watchers):
        yield Finding(
            "problem",
            "worker_start_ray_commands",
            "the spot watcher is not in the background, so that the node's start would never end",
            "End the command with &, and give it no terminal: nohup ... > /tmp/spot.log 2>&1 < /dev/null &",
        )
    if spot and len(spot) == len(workers):
        yield Finding(
            "warning",
            "available_node_types",
            "all worker types are spot: where the cloud has none to give, a run waits",
            "Add an on-demand type with the same resources and a lower `priority`.",
        )
    if workers and not any("CLUSTERNS_LOCAL_PATH=" in command for command in commands.all()):
        yield Finding(
            "warning",
            "setup_commands",
            "CLUSTERNS_LOCAL_PATH is not set: local copies go to the folder for temporary files",
            "Export it, as a directory on a disk with room.",
        )
    provider = mapping(config.get("provider"))
    role = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}.get(str(provider.get("type")))
    without = [node.name for node in workers if role and not node.config.get(role)]
    if without:
        yield Finding(
            "warning",
            f"{', '.join(without)}.node_config",
            f"no {role}: these machines cannot reach an object store",
            "Give them a role that may read and write your bucket; no keys in files.",
        )
    if provider.get("type") == "aws" and provider.get("cache_stopped_nodes", True):
        yield Finding(
            "warning",
            "provider.cache_stopped_nodes",
            "machines are stopped, not terminated: their disks cost on",
            "Set it to false.",
        )


def _short(command: str) -> str:
    return command if len(command) <= 60 else command[:57] + "..."
