"""What the machines answered (``inspection.py``), judged: plain facts in, findings out."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.io.object_store import is_url
from clusterns_ray.launch.capacity import ClusterCapacity, check_room, wants_gpu, worker_resources, workers_on
from clusterns_ray.launch.estimates import checkpoint_bytes, run_bytes, step_memory
from clusterns_ray.ops.doctor.findings import Finding, count_text, from_error, ok, problem, size_text, warning
from clusterns_ray.ops.doctor.request import Request, Sizes

NEARLY = 0.8
"""The share of what is free above which a need gives a warning."""

TOKENS = 2.5
"""Approximate bytes of prepared text (tokens, and the text itself) for each byte of the corpus."""

SWEEP_MEMORY = 1.4e9
"""Bytes that a sweep and Ray's own processes take where the command runs (measured, docs/clusters.md)."""

TRIAL_MEMORY = 1.3e9
"""Bytes of the processes there that drive one trial with workers of its own (likewise)."""

LOOK_AT_HEAD = "Look whether the head is up (`ray status`), can be reached from here, and has this version and token."


@dataclass
class Machine:
    """A node that is up, or this machine where no Ray is needed."""

    name: str
    address: str = "127.0.0.1"
    resources: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What ``node.describe`` and ``node.compute`` returned there; empty where neither did."""
    failures: list[str] = field(default_factory=list)
    """Why it could not answer."""


@dataclass
class Cluster:
    """The answers of all machines."""

    driver: dict[str, Any]
    machines: list[Machine]
    capacity: ClusterCapacity = field(default_factory=lambda: ClusterCapacity(()))
    """What its nodes hold, and what its autoscaler may start."""
    authenticated: bool = True
    state_api_error: str | None = None
    joined: bool = False
    """Whether through RAY_ADDRESS; else Ray was started here, or is not needed."""
    on_ray: bool = False
    """Whether Ray answered."""
    error: ClusterNSError | None = None
    """Why Ray did not."""


def read_facts(lines: Iterable[Mapping[str, Any]], joined: bool) -> Cluster | None:
    """Put the answers together; None before the first one."""
    cluster: Cluster | None = None
    by_id: dict[str, Machine] = {}
    for fact in lines:
        kind = fact["kind"]
        if kind == "driver":
            by_id["driver"] = Machine("this machine", facts=dict(fact))
            cluster = Cluster(dict(fact), list(by_id.values()), joined=joined)
        elif cluster is None:
            continue
        elif kind == "cluster":
            by_id = {
                node["id"]: Machine(f"node {node['id'][:8]} ({node['address']})", node["address"], node["resources"])
                for node in fact["nodes"]
            }
            cluster.machines, cluster.on_ray = list(by_id.values()), True
            cluster.authenticated = fact["authenticated"]
            cluster.capacity = ClusterCapacity.from_values(fact["capacity"])
        elif kind == "cluster_error":
            cluster.error = ClusterNSError(fact["error"], fact["remedy"])
        elif kind == "state_api":
            cluster.state_api_error = fact["error"]
        elif fact.get("node") in by_id:
            machine = by_id[fact["node"]]
            machine.facts |= {} if "error" in fact else fact
            machine.failures += [fact["error"]] if "error" in fact else []
    return cluster


def check_facts(
    request: Request | None, facts: Iterable[Mapping[str, Any]], sizes: Sizes, joined: bool
) -> Iterator[Finding]:
    """All findings about the machines; none where not even this one answered."""
    cluster = read_facts(facts, joined)
    if cluster is None:
        return
    if (joined or (request is not None and request.on_ray)) and not cluster.on_ray:
        where = f"Ray at RAY_ADDRESS ({os.environ.get('RAY_ADDRESS')})" if joined else "Ray, started on this machine,"
        error = cluster.error or ClusterNSError(f"{where} did not answer in time, or its process ended.", LOOK_AT_HEAD)
        yield from from_error("cluster", error)
        cluster.machines = []  # what it would run on was not seen
    yield from check_answers(cluster)
    yield from check_versions(cluster)
    if cluster.on_ray:
        yield from check_security(cluster)
        yield from check_state_api(request, cluster)
    if cluster.machines:
        yield from check_gpus(request, cluster)
        yield from check_faiss(cluster)
    if request is not None and cluster.machines:
        yield from check_storage(request, cluster)
        yield from check_models(cluster)
        request, findings = check_sharing(request, cluster, sizes)
        yield from findings
        yield from check_resources(request, cluster)
        yield from check_memory(request, cluster, sizes)
        yield from check_driver_memory(request, cluster)
    if request is not None:
        yield from check_disk(request, cluster, sizes)


def check_answers(cluster: Cluster) -> Iterator[Finding]:
    """Nodes that did not answer, or failed to."""
    remedy = "Look at that node (`ray status`, its logs in /tmp/ray), or remove it from the cluster."
    silent = False
    for machine in cluster.machines:
        answers = [f"failed: {failure}" for failure in machine.failures]
        missing = not machine.failures and not {"versions", "torch"} <= machine.facts.keys()
        for answer in [*answers, *["did not answer in time"] * missing]:
            silent = True
            yield problem("nodes", f"{machine.name} {answer}", remedy)
    if cluster.joined and cluster.machines and not silent:
        text = f"{len(cluster.machines)} up and answering: {cluster.capacity.describe()}"
        yield Finding("warning" if cluster.capacity.failure else "ok", "nodes", text)


def check_versions(cluster: Cluster) -> Iterator[Finding]:
    """Whether every node has what the driver has."""
    own, same = cluster.driver["versions"], True
    for machine in cluster.machines:
        theirs = machine.facts.get("versions", own)
        for name in (name for name, version in own.items() if theirs.get(name) != version):
            same = False
            yield problem(
                "versions",
                f"{machine.name} has {name} {theirs.get(name) or 'not at all'}, and the driver {own[name]}",
                "Install the same on every node: pip install -c constraints.txt '.[cpu]' or '.[gpu]'.",
            )
    if same:
        nodes = f" on {count_text(len(cluster.machines), 'node')} and the driver" if cluster.joined else ""
        yield ok("versions", ", ".join(f"{name} {version}" for name, version in own.items()) + nodes)


def _failed(what: str, machine: Machine, outcome: Mapping[str, Any] | None, remedy: str = "") -> list[Finding]:
    """The problem that a node has reported, see ``node.outcome``."""
    if not outcome or not outcome["error"]:
        return []
    return [problem(what, f"{machine.name}: {outcome['error']}", outcome["remedy"] or remedy)]


def check_storage(request: Request, cluster: Cluster) -> list[Finding]:
    """Whether every node writes and reads where the run lives, and sees there what the driver wrote."""
    path = request.config.runtime.storage_path
    findings = []
    for machine in cluster.machines:
        for key, place in machine.facts.get("directories", {}).items():
            where = f"{machine.name}: {key} is {place['path']!r}, where"
            if place["error"]:
                remedy = "Choose a directory that can be written on every node."
                findings.append(problem("storage", f"{where} nothing can be written ({place['error']})", remedy))
            elif place["shared"] is False:
                remedy = "Mount one file system there on every node, or set runtime.storage_path to s3://BUCKET/PREFIX."
                findings.append(problem("storage", f"{where} it does not see what the driver wrote", remedy))
        findings += _failed("storage", machine, machine.facts.get("store"))
    answered = [machine for machine in cluster.machines if machine.facts]
    if findings or not answered:
        return findings
    several = f" on all of {len(answered)} nodes" if len(answered) > 1 else ""
    kind = "object store, " if is_url(path) else "one directory, " if several else ""
    return [ok("storage", f"{path}: {kind}written and read{several}")]


def check_models(cluster: Cluster) -> list[Finding]:
    """Whether every node finds the encoder, where it is not staged to them."""
    return [each for machine in cluster.machines for each in _failed("encoder", machine, machine.facts.get("model"))]


def check_security(cluster: Cluster) -> Iterator[Finding]:
    """Whether anyone who reaches the head can run code."""
    reachable = sorted({machine.address for machine in cluster.machines if not _is_loopback(machine.address)})
    if cluster.joined and reachable and not cluster.authenticated:
        value = f"off, and the cluster listens on {', '.join(reachable[:3])}: whoever reaches it can run code there"
        remedy = "Start every node and driver with RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN."
        yield warning("authentication", value, remedy)
    elif cluster.joined:
        yield ok("authentication", "by token" if cluster.authenticated else "off, on loopback alone")


def check_state_api(request: Request | None, cluster: Cluster) -> Iterator[Finding]:
    """Ray's State API, through which trials with workers are watched: without it those of a stopped one may stay."""
    needed = request is not None and request.needs_state_api
    if cluster.state_api_error is not None and (needed or cluster.joined):
        value = f"does not answer ({cluster.state_api_error}); sweeps whose trials have workers need it"
        remedy = 'Install "ray[default]" and start the head with its dashboard, or set workers_per_trial to 0.'
        yield (problem if needed else warning)("State API", value, remedy)
    elif needed or cluster.joined:
        yield ok("State API", "answers")


# ---- resources ------------------------------------------------------------------------------------------------------


def takes_gpu(request: Request, cluster: Cluster) -> bool:
    """Whether workers would take a GPU each, as a run decides it.

    Raises:
        ConfigError: it is not set, and cannot be derived from the cluster; a run would be refused.
    """
    if not request.on_ray:
        wanted = request.config.runtime.use_gpu
        torch = (cluster.machines[0].facts.get("torch") or {}).get("value") or {}
        return bool(torch.get("gpus")) if wanted is None else wanted
    return wants_gpu(request.config.runtime.use_gpu, cluster.capacity)


def check_resources(request: Request, cluster: Cluster) -> list[Finding]:
    """Whether the workers can ever start; a request that a run or a sweep refuses is refused here in the same words."""
    if not request.on_ray:
        return []
    capacity = cluster.capacity
    try:
        gpu = takes_gpu(request, cluster)
        worker = worker_resources(request.config.runtime.cpus_per_worker, gpu, request.shared_by)
        check_room(capacity, worker, request.fewest, "trial" if request.study else "run")
    except ConfigError as error:
        return from_error("resources", error)
    each = " and ".join(f"{value:g} {key}" for key, value in worker.items())
    room, most, there = capacity.room(worker), request.most * request.concurrent, capacity.describe()
    if not capacity.limits_known:
        text = f"{count_text(request.fewest, 'worker')} with {each} each may fit: {there}"
        remedy = "See that a node type of the cluster's file holds a worker; a run waits runtime.start_timeout_s."
        return [warning("resources", text, remedy)]
    if room < most:
        key = "concurrent_trials" if request.study else "runtime.num_workers"
        text = f"{most} workers in all are asked for; there is room for {room:g} with {each} each: {there}"
        return [warning("resources", text, f"Lower {key}, or let the cluster have more nodes.")]
    now = capacity.room_now(worker)
    text = f"{count_text(most, 'worker')} with {each} each: room on {there}"
    return [ok("resources", text + (f"; {now} could start now" if now < most else ""))]


def check_gpus(request: Request | None, cluster: Cluster) -> list[Finding]:
    """Driver, torch, NCCL: what was tried on the nodes that are up, and whether what is asked for can be there."""
    wanted = None if request is None else request.config.runtime.use_gpu
    findings = []
    for machine in cluster.machines:
        seen, torch = machine.facts.get("gpus") or [], machine.facts.get("torch")
        if torch is None:
            continue
        remedy = "Install the torch of constraints.txt, and for a GPU a driver that fits it, which `nvidia-smi` shows."
        findings += _failed("GPU" if seen else "torch", machine, torch, remedy)
        if torch["error"]:
            continue
        value = torch["value"]
        if value["gpus"]:
            driver = seen[0]["driver"] if seen else "unknown"
            text = f"{len(value['gpus'])} x {value['gpus'][0]}, driver {driver}, CUDA {value['cuda']}"
            findings.append(ok("GPU", f"{machine.name}: {text}, NCCL {value['nccl']}"))
        elif (seen or machine.resources.get("GPU")) and wanted is not False:
            names = ", ".join(gpu["name"] for gpu in seen) or "nvidia-smi lists none"
            built = f"for CUDA {value['cuda']}" if value["cuda"] else "without CUDA"
            text = f"{machine.name}: torch sees no GPU ({names}; torch is built {built})"
            remedy = "Install a torch with CUDA and a driver for it, or set runtime.use_gpu to false."
            findings.append((problem if wanted or machine.resources.get("GPU") else warning)("GPU", text, remedy))
    if findings:
        return findings
    if wanted is not False and (names := cluster.capacity.gpu_types()):
        text = f"no node with one is up, so none was tried; the autoscaler starts {', '.join(names)}"
        return [ok("GPU", text)]
    if request is None:
        return [ok("GPU", "none on the nodes that are up" if cluster.on_ray else "none on this machine")]
    if not wanted:
        return [ok("GPU", "none, and none asked for: training is on CPUs")]
    if request.on_ray and cluster.capacity.offers_gpu() is None:
        text = f"no node with one is up, so none was tried: {cluster.capacity.describe()}"
        return [warning("GPU", text, "See that a node type of the cluster's file has GPUs.")]
    text = "runtime.use_gpu is true, but no node has one, and no autoscaler brings one"
    return [problem("GPU", text, "Set runtime.use_gpu to false, or run where there are GPUs.")]


def check_faiss(cluster: Cluster) -> list[Finding]:
    """Whether K-means runs, and by which library."""
    remedy = "Install it again (pip install --force-reinstall faiss-cpu), or uninstall it: torch then does its work."
    outcomes = [(machine, machine.facts.get("kmeans")) for machine in cluster.machines]
    findings = [each for machine, outcome in outcomes for each in _failed("faiss", machine, outcome, remedy)]
    used = sorted({outcome["value"] for _, outcome in outcomes if outcome and not outcome["error"]})
    return findings or ([ok("faiss", f"K-means runs in {' and '.join(used)}")] if used else [])


# ---- room -----------------------------------------------------------------------------------------------------------


def check_sharing(request: Request, cluster: Cluster, sizes: Sizes) -> tuple[Request, list[Finding]]:
    """``trials_per_gpu: auto`` as a sweep would choose it; one that says how many runs share a GPU comes back."""
    if request.choose_shared_by is None or sizes.model is None:
        return request, []
    try:
        there = gpu_memories(cluster) if takes_gpu(request, cluster) else None
    except ConfigError:
        return request, []  # said among the resources
    if there is None:
        return request, [ok("trials_per_gpu", "auto is 1, as trials take no GPU here")]
    if not there:
        return request, [ok("trials_per_gpu", "auto is chosen when a GPU is up: none is")]
    number, reason = request.choose_shared_by(min(there), cluster.capacity)
    return replace(request, shared_by=number), [ok("trials_per_gpu", reason.removeprefix("trials_per_gpu: "))]


def gpu_memories(cluster: Cluster) -> list[int]:
    """Bytes of memory of the GPUs that are up, as far as they say so."""
    return [gpu["memory"] for m in cluster.machines for gpu in m.facts.get("gpus", []) if gpu["memory"]]


def check_memory(request: Request, cluster: Cluster, sizes: Sizes) -> list[Finding]:
    """Whether the workers fit into the memory of GPUs and nodes, by the estimates."""
    if sizes.model is None:
        return []
    try:
        gpu = takes_gpu(request, cluster)
    except ConfigError:
        return []  # said among the resources
    config = request.config
    need = step_memory(sizes.model, config, request.fewest, gpu=gpu)
    total, activations = need["total"], size_text(need["activations"])
    each = f"at most {size_text(total)} {'of GPU memory ' if gpu else ''}a worker, {activations} of it "
    each += "activations"
    remedy = "Set train.cache_chunk, lower train.global_batch_size or encoder.max_length, use more workers"
    remedy += (", set train.precision to bf16" if gpu else "") + ", or larger machines."
    if gpu:
        there = gpu_memories(cluster)
        if not there:
            return [ok("memory", f"{each}; no GPU is up to compare it with")]
        shared_by = request.shared_by
        each += f", {shared_by} of them on a GPU" if shared_by > 1 else ""
        return [_fits("memory", shared_by * total, min(there), min(there), each, "the smallest GPU", remedy)]
    worker = {"CPU": float(config.runtime.cpus_per_worker)}
    findings = []
    for machine in cluster.machines:
        memory = machine.facts.get("memory")
        running = request.fewest * request.concurrent
        here = min(running, workers_on(worker, machine.resources)) if request.on_ray else 1
        if memory is not None and here:
            text = each if here == 1 else f"{each}, {here} of them"
            findings.append(_fits("memory", here * total, memory["total"], memory["free"], text, machine.name, remedy))
    return _worst(findings)


def check_driver_memory(request: Request, cluster: Cluster) -> list[Finding]:
    """Whether the processes that drive trials with workers of their own fit where the sweep's command runs."""
    memory = cluster.driver.get("memory")
    if not request.needs_state_api or memory is None:
        return []
    fitting = int(max(0, memory["total"] - SWEEP_MEMORY) // TRIAL_MEMORY)
    need = SWEEP_MEMORY + TRIAL_MEMORY * request.concurrent
    text = f"about {size_text(need)} to drive {count_text(request.concurrent, 'trial')} with workers at a time"
    lower = f"Set concurrent_trials to {fitting} at most" if fitting else "Set workers_per_trial to 0"
    remedy = f"{lower}, or run the command on a machine with more memory (the head)."
    return [_fits("driver", need, memory["total"], memory["free"], text, "this machine", remedy)]


def check_disk(request: Request, cluster: Cluster, sizes: Sizes) -> list[Finding]:
    """Whether checkpoints, model and tokens fit onto the disk, by the estimates."""
    if sizes.model is None:
        return []
    config = request.config
    run, tokens = run_bytes(sizes.model, config) * request.concurrent, int(TOKENS * (sizes.text_bytes or 0))
    kept = f"{config.runtime.keep} + 1 checkpoints of {size_text(checkpoint_bytes(sizes.model, config))}"
    tokens_key = "data.cache_dir" if config.data.cache_dir else "runtime.storage_path"
    findings = []
    for machine in cluster.machines or [Machine("this machine", facts=cluster.driver)]:
        for key, place in machine.facts.get("directories", {}).items():
            need = run * (key != "data.cache_dir") + tokens * (key in (tokens_key, "runtime.local_path"))
            if need and not place["error"]:
                text = f"about {size_text(need)} ({kept}, and {size_text(tokens)} of prepared text)"
                remedy = f"Free some, lower runtime.keep ({config.runtime.keep}), or choose another {key}."
                where = f"{machine.name}, {place['path']}"
                findings.append(_fits("disk", need, place["free"], place["free"], text, where, remedy))
    return _worst(findings)


def _fits(what: str, need: float, total: float, free: float, text: str, where: str, remedy: str) -> Finding:
    if need > total:
        return problem(what, f"{text}, but {where} has {size_text(total)}", remedy)
    if need > NEARLY * free:
        return warning(what, f"{text}, and {where} has {size_text(free)} free", remedy)
    return ok(what, f"{text}; {where} has {size_text(free)} free")


def _worst(findings: list[Finding]) -> list[Finding]:
    """The findings that are not ok, else the first one, which stands for all."""
    return [finding for finding in findings if finding.level != "ok"] or findings[:1]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return address == "localhost"
