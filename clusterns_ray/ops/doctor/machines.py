"""What the machines told (``inspection.py``), judged: plain facts in, findings out."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.object_store import is_url
from clusterns_ray.launch.capacity import ClusterCapacity, check_room, wants_gpu, worker_resources, workers_on
from clusterns_ray.ops.doctor.findings import Finding, from_error, size_text
from clusterns_ray.ops.doctor.request import Request, Sizes
from clusterns_ray.ops.estimates import bank_bytes, checkpoint_bytes, held_shards, run_bytes, worker_memory

CLOCKS_S = 5.0
"""Seconds by which clocks may differ before it is said."""

NEARLY = 0.8
"""Of what is free: what needs more than that share of it is warned of."""


@dataclass
class Machine:
    """A node that is up, or this machine where no Ray is needed."""

    name: str
    address: str = "127.0.0.1"
    resources: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] | None = None
    """of ``node.describe``; None: no answer in time"""
    computed: dict[str, Any] | None = None
    """of ``node.compute``"""


@dataclass
class Cluster:
    """All that was told."""

    driver: dict[str, Any]
    machines: list[Machine]
    capacity: ClusterCapacity = field(default_factory=lambda: ClusterCapacity(()))
    """what its nodes hold, and what its autoscaler may start"""
    authenticated: bool = True
    state_api_error: str | None = None
    joined: bool = False
    """through RAY_ADDRESS; else Ray was started here, or is not needed"""


def read_facts(lines: Iterable[Mapping[str, Any]], joined: bool) -> Cluster | None:
    """Put together what was told; None before the first line."""
    cluster: Cluster | None = None
    by_id: dict[str, Machine] = {}
    for fact in lines:
        kind = fact["kind"]
        if kind == "driver":
            by_id["driver"] = Machine("this machine", facts=dict(fact))
            cluster = Cluster(dict(fact), [by_id["driver"]], joined=joined)
        elif cluster is None:
            continue
        elif kind == "cluster":
            by_id = {
                node["id"]: Machine(f"node {node['id'][:8]} ({node['address']})", node["address"], node["resources"])
                for node in fact["nodes"]
            }
            cluster.machines = list(by_id.values())
            cluster.authenticated = fact["authenticated"]
            cluster.capacity = ClusterCapacity.from_values(fact["capacity"])
        elif kind == "state_api":
            cluster.state_api_error = fact["error"]
        elif kind == "describe" and fact["node"] in by_id:
            by_id[fact["node"]].facts = dict(fact)
        elif kind == "compute" and fact["node"] in by_id:
            by_id[fact["node"]].computed = dict(fact)
    return cluster


def examine_answers(cluster: Cluster) -> list[Finding]:
    """Nodes that said nothing, or nothing but that something is wrong."""
    found = []
    for machine in cluster.machines:
        for told, what in ((machine.facts, "describe itself"), (machine.computed, "try its GPUs and faiss")):
            if told is None or "error" in told:
                reason = "did not answer in time" if told is None else f"failed: {told['error']}"
                found.append(
                    Finding(
                        "problem",
                        "nodes",
                        f"{machine.name}: asked to {what}, it {reason}",
                        "Look at that node (`ray status`, its logs in /tmp/ray), or remove it from the cluster.",
                    )
                )
    if cluster.joined and cluster.machines and not found:
        text = f"{len(cluster.machines)} up and answering: {cluster.capacity.describe()}"
        found.append(Finding("warning" if cluster.capacity.failure else "ok", "nodes", text))
    return found


def examine_versions(cluster: Cluster) -> list[Finding]:
    """Whether every node has what the driver has."""
    own = cluster.driver["versions"]
    found = []
    for machine in cluster.machines:
        theirs = (machine.facts or {}).get("versions", own)
        for name, version in own.items():
            if theirs.get(name) != version:
                found.append(
                    Finding(
                        "problem",
                        "versions",
                        f"{machine.name} has {name} {theirs.get(name) or 'not at all'}, and the driver {version}",
                        "Install the same on every node: pip install -c constraints.txt '.[cpu]' or '.[gpu]'.",
                    )
                )
    where = f" on {_count(len(cluster.machines), 'node')} and the driver" if cluster.joined and cluster.machines else ""
    same = ", ".join(f"{name} {version}" for name, version in own.items())
    return found or [Finding("ok", "versions", same + where)]


def examine_storage(request: Request, cluster: Cluster) -> list[Finding]:
    """Whether every node writes and reads where the run lives, and sees there what the driver wrote."""
    path = request.config.runtime.storage_path
    found = []
    for machine in cluster.machines:
        facts = machine.facts or {}
        for key, told in facts.get("directories", {}).items():
            if told["error"]:
                found.append(
                    Finding(
                        "problem",
                        "storage",
                        f"{machine.name}: {key} is {told['path']!r}, where nothing can be written ({told['error']})",
                        "Choose a directory that can be written on every node.",
                    )
                )
            elif told["shared"] is False:
                found.append(
                    Finding(
                        "problem",
                        "storage",
                        f"{machine.name}: {key} is {told['path']!r}, where it does not see what the driver wrote",
                        "Mount one file system there on every node, or set runtime.storage_path to s3://BUCKET/PREFIX.",
                    )
                )
        if facts.get("store") and facts["store"]["error"]:
            problem = from_error("storage", RuntimeError(facts["store"]["error"]))[0]
            found.append(Finding("problem", "storage", f"{machine.name}: {problem.value}", problem.remedy))
    if found:
        return found
    answered = [machine for machine in cluster.machines if machine.facts and "error" not in machine.facts]
    several = f" on all of {len(answered)} nodes" if len(answered) > 1 else ""
    kind = "object store, " if is_url(path) else "one directory, " if len(answered) > 1 else ""
    return [Finding("ok", "storage", f"{path}: {kind}written and read{several}")] if answered else []


def examine_model(cluster: Cluster) -> list[Finding]:
    """Whether every node finds the encoder, where it is not staged to them."""
    found = []
    for machine in cluster.machines:
        told = (machine.facts or {}).get("model")
        if told and told["error"]:
            problem = from_error("encoder", RuntimeError(told["error"]))[0]
            found.append(Finding("problem", "encoder", f"{machine.name}: {problem.value}", problem.remedy))
    return found


def examine_clocks(cluster: Cluster) -> list[Finding]:
    """Whether the nodes agree on the time; leases and signatures of requests to object stores carry it."""
    found = []
    for machine in cluster.machines:
        facts = machine.facts or {}
        if "asked" not in facts or "time" not in facts:
            continue
        middle, doubt = (facts["answered"] + facts["asked"]) / 2, (facts["answered"] - facts["asked"]) / 2
        ahead = facts["time"] - middle
        if abs(ahead) > doubt + CLOCKS_S:
            found.append(
                Finding(
                    "warning",
                    "clocks",
                    f"{machine.name}: its clock is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the "
                    "driver's",
                    "Let the nodes take their time from one place (chrony, systemd-timesyncd).",
                )
            )
    return found


def examine_security(cluster: Cluster) -> list[Finding]:
    """Whether those who reach the head can run what they like."""
    if not cluster.joined:
        return []
    reachable = sorted({machine.address for machine in cluster.machines if not _is_loopback(machine.address)})
    if reachable and not cluster.authenticated:
        return [
            Finding(
                "warning",
                "authentication",
                f"off, and the cluster listens on {', '.join(reachable[:3])}: whoever reaches it can run code there",
                "Start every node and driver with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN.",
            )
        ]
    return [Finding("ok", "authentication", "by token" if cluster.authenticated else "off, on loopback alone")]


def examine_state_api(request: Request | None, cluster: Cluster) -> list[Finding]:
    """Ray's State API, through which trials with workers are watched: without it those of a stopped one may stay."""
    needed = request is not None and request.needs_state_api
    if not (needed or cluster.joined):
        return []
    if cluster.state_api_error is None:
        return [Finding("ok", "State API", "answers")]
    level = "problem" if needed else "warning"
    return [
        Finding(
            level,
            "State API",
            f"does not answer ({cluster.state_api_error}); sweeps whose trials have workers need it",
            'Install "ray[default]" and start the head with its dashboard'
            + (", or set workers_per_trial to 0." if needed else "."),
        )
    ]


# ---- resources ------------------------------------------------------------------------------------------------------


def takes_gpu(request: Request, cluster: Cluster) -> bool:
    """Whether workers would take a GPU each, as a run decides it.

    Raises:
        ConfigError: it is not set, and the cluster does not tell; a run would be refused.
    """
    if not request.on_ray:
        wanted = request.config.runtime.use_gpu
        return bool(_gpus_of_torch(cluster.machines[0])) if wanted is None else wanted
    return wants_gpu(request.config.runtime.use_gpu, cluster.capacity)


def examine_resources(request: Request, cluster: Cluster) -> list[Finding]:
    """Whether the workers can ever start: what a run or a sweep refuses is refused here, in the same words."""
    if not request.on_ray:
        return []
    capacity = cluster.capacity
    try:
        gpu = takes_gpu(request, cluster)
        worker = worker_resources(request.config.runtime.cpus_per_worker, gpu)
        check_room(capacity, worker, request.fewest, "trial" if request.study else "run")
    except ConfigError as error:
        return from_error("resources", error)
    each = " and ".join(f"{value:g} {key}" for key, value in worker.items())
    room, most = capacity.room(worker), request.most * request.concurrent
    there = capacity.describe()
    if not capacity.limits_known:
        text = f"{_count(request.fewest, 'worker')} with {each} each may fit: {there}"
        remedy = (
            "See that a node type of the cluster's file holds a worker; a run waits runtime.start_timeout_s for it."
        )
        return [Finding("warning", "resources", text, remedy)]
    if room < most:
        wanted = f"{request.concurrent} trials at a time" if request.study else f"up to {most} workers"
        text = f"{wanted} are asked for; there is room for {room:g} workers with {each} each: {there}"
        key = "concurrent_trials" if request.study else "runtime.num_workers"
        return [Finding("warning", "resources", text, f"Lower {key}, or let the cluster have more nodes.")]
    up = capacity.room_now(worker)
    text = f"{_count(most, 'worker')} with {each} each: room on {there}"
    return [Finding("ok", "resources", text + (f"; {up} could start now" if up < most else ""))]


def examine_cpus(request: Request, cluster: Cluster, cpus: int) -> list[Finding]:
    """Ray that is started here is told of as many CPUs as are asked for, so that workers share those there are."""
    needed = request.most * request.config.runtime.cpus_per_worker * request.concurrent
    if cluster.joined or needed <= cpus:
        return []
    return [
        Finding(
            "warning",
            "CPUs",
            f"{needed} are asked for on a machine with {cpus}: they are shared, and all runs slower",
            "Ask for fewer workers, or a smaller runtime.cpus_per_worker.",
        )
    ]


def examine_gpus(request: Request | None, cluster: Cluster) -> list[Finding]:
    """Driver, torch, NCCL: what was tried on the nodes that are up, and whether what is asked for can be there."""
    wanted = None if request is None else request.config.runtime.use_gpu
    found, good = [], []
    for machine in cluster.machines:
        seen = (machine.facts or {}).get("gpus") or []
        told = (machine.computed or {}).get("torch")
        if told is None:
            continue
        if told["error"]:
            found.append(
                Finding(
                    "problem",
                    "GPU" if seen else "torch",
                    f"{machine.name}: {told['error']}",
                    "Install torch and the GPU's driver as constraints.txt has them; `nvidia-smi` tells of the driver.",
                )
            )
        elif (seen or machine.resources.get("GPU")) and not told["value"]["gpus"] and wanted is not False:
            names = ", ".join(gpu["name"] for gpu in seen) or "none that nvidia-smi tells of"
            cuda = told["value"]["cuda"]
            found.append(
                Finding(
                    "problem" if wanted or machine.resources.get("GPU") else "warning",
                    "GPU",
                    f"{machine.name}: torch sees no GPU ({names}; torch is built "
                    f"{'for CUDA ' + cuda if cuda else 'without CUDA'})",
                    "Install a torch with CUDA and a driver for it, or set runtime.use_gpu to false.",
                )
            )
        elif told["value"]["gpus"]:
            gpus, driver = told["value"]["gpus"], seen[0]["driver"] if seen else "unknown"
            good.append(
                f"{machine.name}: {len(gpus)} x {gpus[0]}, driver {driver}, CUDA {told['value']['cuda']}, "
                f"NCCL {told['value']['nccl']}"
            )
    if wanted is not False and not found and not good and (names := cluster.capacity.gpu_types()):
        return [
            Finding("ok", "GPU", f"no node with one is up, so none was tried; the autoscaler starts {', '.join(names)}")
        ]
    if wanted and not found and not good:
        return _no_gpu(request, cluster)
    if found or good:
        return found + [Finding("ok", "GPU", text) for text in good]
    return [Finding("ok", "GPU", "none, and none asked for: training is on CPUs")]


def _no_gpu(request: Request | None, cluster: Cluster) -> list[Finding]:
    """A GPU is asked for, and none was tried."""
    on_ray = request is not None and request.on_ray
    if on_ray and cluster.capacity.offers_gpu() is None:
        text = f"no node with one is up, so none was tried: {cluster.capacity.describe()}"
        return [Finding("warning", "GPU", text, "See that a node type of the cluster's file has GPUs.")]
    return [
        Finding(
            "problem",
            "GPU",
            "runtime.use_gpu is true, but no node has one" + (" and no autoscaler brings one" if on_ray else ""),
            "Set runtime.use_gpu to false, or run where there are GPUs.",
        )
    ]


def examine_faiss(cluster: Cluster) -> list[Finding]:
    """Whether K-means runs, and in what."""
    found, used = [], set()
    for machine in cluster.machines:
        computed = machine.computed or {}
        if computed.get("faiss_conflict"):
            found += [
                Finding("problem", "faiss", f"{machine.name}: {one.value}", one.remedy)
                for one in from_error("faiss", RuntimeError(computed["faiss_conflict"]))
            ]
        elif computed.get("kmeans") and computed["kmeans"]["error"]:
            remedy = (
                "Install it anew (pip install --force-reinstall faiss-cpu), or uninstall it: torch then does its work."
            )
            found.append(Finding("problem", "faiss", f"{machine.name}: {computed['kmeans']['error']}", remedy))
        elif computed.get("kmeans"):
            used.add(computed["kmeans"]["value"])
    return found or ([Finding("ok", "faiss", f"K-means runs in {' and '.join(sorted(used))}")] if used else [])


# ---- room -----------------------------------------------------------------------------------------------------------


def examine_memory(request: Request, cluster: Cluster, sizes: Sizes) -> list[Finding]:
    """Whether the workers fit into the memory of GPUs and nodes, by the estimates."""
    if sizes.model is None:
        return []
    try:
        gpu = takes_gpu(request, cluster)
    except ConfigError:
        return []  # found among the resources
    shards = held_shards(request.config.train, request.fewest) * request.fewest
    need = worker_memory(sizes.model, shards, request.fewest, gpu=gpu)
    model = need.weights + need.gradients + need.optimizer + need.buckets
    parts = f"{size_text(model)} weights, gradients and AdamW, {size_text(need.activations)} activations"
    bank = bank_bytes(sizes.model, request.config)
    if bank:
        parts += f", {size_text(bank)} bank"
    total = need.total + bank
    each = f"at most {size_text(total)} {'of GPU memory ' if gpu else ''}a worker ({parts})"
    remedy = (
        "Set train.cache_chunk, lower train.global_batch_size or encoder.max_length, use more workers"
        + (", set train.precision to bf16" if gpu else "")
        + ", or larger machines."
    )
    if gpu:
        sizes_there = [g["memory"] for m in cluster.machines for g in (m.facts or {}).get("gpus", []) if g["memory"]]
        if not sizes_there:
            return [Finding("ok", "memory", f"{each}; no GPU is up to compare it with")]
        return [_fits("memory", total, min(sizes_there), min(sizes_there), each, "the smallest GPU", remedy)]
    worker = {"CPU": float(request.config.runtime.cpus_per_worker)}
    running = request.fewest * request.concurrent
    found = []
    for machine in cluster.machines:
        memory = (machine.facts or {}).get("memory")
        here = min(running, workers_on(worker, machine.resources)) if request.on_ray else 1
        if memory is None or not here:
            continue
        text = each if here == 1 else f"{each}, {here} of them"
        found.append(_fits("memory", here * total, memory["total"], memory["free"], text, machine.name, remedy))
    return _worst(found)


def examine_disk(request: Request, cluster: Cluster, sizes: Sizes) -> list[Finding]:
    """Whether checkpoints, model and tokens fit onto the disk, by the estimates."""
    if sizes.model is None:
        return []
    config = request.config
    run = run_bytes(sizes.model, config) * request.concurrent
    one = checkpoint_bytes(sizes.model, config)
    parts = [f"{config.runtime.keep} + 1 checkpoints of {size_text(one)}"]
    tokens = 0.0
    if sizes.sample is not None and sizes.rows is not None:
        tokens = sizes.rows * sizes.sample.row_bytes
        parts.append(f"{size_text(tokens)} of tokens")
    else:
        parts.append("and the tokens, whose number is not known yet")
    needs = {"runtime.storage_path": run, "runtime.local_path": run}
    tokens_key = "data.cache_dir" if config.data.cache_dir else "runtime.storage_path"
    found = []
    for machine in cluster.machines or [Machine("this machine", facts=cluster.driver)]:
        for key, told in ((machine.facts or {}).get("directories") or {}).items():
            need = needs.get(key, 0) + (tokens if key in (tokens_key, "runtime.local_path") else 0)
            if told["error"] or not need:
                continue
            text = f"at most {size_text(need)} ({', '.join(parts)})"
            remedy = f"Free some, lower runtime.keep ({config.runtime.keep}), or choose another {key}."
            where = f"{machine.name}, {told['path']}"
            found.append(_fits("disk", need, told["free"], told["free"], text, where, remedy))
    return _worst(found)


def _fits(what: str, need: float, total: float, free: float, text: str, where: str, remedy: str) -> Finding:
    if need > total:
        return Finding("problem", what, f"{text}, but {where} has {size_text(total)}", remedy)
    if need > NEARLY * free:
        return Finding("warning", what, f"{text}, and {where} has {size_text(free)} free", remedy)
    return Finding("ok", what, f"{text}; {where} has {size_text(free)} free")


def _worst(found: list[Finding]) -> list[Finding]:
    """What is not ok, else one that stands for all."""
    return [finding for finding in found if finding.level != "ok"] or found[:1]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}"


def _gpus_of_torch(machine: Machine) -> list[str]:
    told = (machine.computed or {}).get("torch") or {}
    return (told.get("value") or {}).get("gpus", [])


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return address == "localhost"
