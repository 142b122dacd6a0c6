"""What a cluster can give: the nodes that are up, and those that its autoscaler may start.

Training, sweeps, `prepare`, `encode` and the doctor all judge by it. Nothing here asks Ray:
:func:`clusterns_ray.launch.ray_cluster.cluster_capacity` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from clusterns_ray.errors import ConfigError

Resources = Mapping[str, float]

HEAD = "node:__internal_head__"
"""The resource by which Ray marks the head."""

ANY: Mapping[str, str] = {}
"""The label selector that every node meets."""


@dataclass(frozen=True)
class NodeType:
    """A kind of node that an autoscaler may start."""

    name: str
    resources: Resources
    max_count: int | None
    """None: as many as the cluster may have"""


@dataclass(frozen=True)
class ClusterCapacity:
    """The nodes of a cluster, as they are and as they may become."""

    nodes: tuple[Resources, ...]
    """the resources of each node that is up"""
    autoscaler: int = 0
    """the version of the autoscaler; 0 where there is none"""
    node_types: tuple[NodeType, ...] | None = ()
    """what the autoscaler may start; None where that is not known"""
    max_nodes: int | None = None
    """of all types together, without the head"""
    failure: str | None = None
    """why the autoscaler starts nothing more, where it has failed"""
    label_selector: Mapping[str, str] = field(default_factory=dict[str, str])
    """labels that all of these nodes have; others are left out"""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> ClusterCapacity:
        """The capacity that :meth:`values` was called on."""
        types = values["node_types"]
        return cls(
            **{
                **values,
                "nodes": tuple(values["nodes"]),
                "node_types": None if types is None else tuple(NodeType(**each) for each in types),
            }
        )

    def values(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    @property
    def limits_known(self) -> bool:
        """Whether it is known what may be added."""
        return self.autoscaler == 0 or self.failure is not None or self.node_types is not None

    def startable(self) -> list[tuple[NodeType, float]]:
        """The node types of which nodes can be started, as far as they are known, and the most of each."""
        if self.autoscaler == 0 or self.failure is not None:
            return []
        cap = math.inf if self.max_nodes is None else self.max_nodes
        counts = ((t, min(cap, math.inf if t.max_count is None else t.max_count)) for t in self.node_types or ())
        return [(node_type, count) for node_type, count in counts if count > 0]

    def room(self, worker: Resources) -> float:
        """How many such workers fit at once, as the cluster is or as it may become; infinite where no limit is known.

        Workers of a GPU or CPU each never span two nodes, so that each node is counted alone.
        """
        return self._largest_sum(lambda node: workers_on(worker, node)) if self.limits_known else math.inf

    def room_now(self, worker: Resources) -> int:
        """How many such workers fit onto the nodes that are up."""
        return sum(workers_on(worker, node) for node in self.nodes)

    def most(self, resource: str) -> float:
        """The most of a resource that the cluster may have, as far as it is known."""
        return self._largest_sum(lambda node: node.get(resource, 0))

    def _largest_sum(self, value: Callable[[Resources], float]) -> float:
        """The largest sum of a value over the nodes: over those that are up, or the head and what may be started."""
        left = math.inf if self.max_nodes is None else self.max_nodes
        grown = sum(value(node) for node in self.nodes if HEAD in node)
        for each, count in sorted(((value(kind.resources), count) for kind, count in self.startable()), reverse=True):
            taken = min(count, left)
            grown += each * taken if each and taken else 0
            left -= taken
        return max(grown, sum(value(node) for node in self.nodes))

    def gpu_types(self) -> list[str]:
        """The names of the node types with GPUs that may be started."""
        return [node_type.name for node_type, _ in self.startable() if node_type.resources.get("GPU", 0) > 0]

    def offers_gpu(self) -> bool | None:
        """Whether the cluster has GPUs, or its autoscaler brings some; None where that cannot be known."""
        if any(node.get("GPU", 0) > 0 for node in self.nodes) or self.gpu_types():
            return True
        return False if self.limits_known else None

    def describe(self) -> str:
        """Say, for messages, what is up, which autoscaler there is, and what it may start."""
        has = ", ".join(f"{sum(node.get(key, 0) for node in self.nodes):g} {key}" for key in ("CPU", "GPU"))
        labels = "".join(f"{key}={value}, " for key, value in self.label_selector.items())
        text = f"{_count(len(self.nodes), 'node')} with {labels}{has}"
        if self.autoscaler == 0:
            return f"{text}, and no autoscaler"
        text += f", and an autoscaler (version {self.autoscaler})"
        if self.failure is not None:
            return f"{text} that has failed: {self.failure}"
        if self.node_types is None:
            return f"{text} that does not say what it may start"
        types = " and ".join(_type_text(node_type, count) for node_type, count in self.startable())
        if self.max_nodes is not None and len(self.startable()) > 1:
            types += f", {self.max_nodes} nodes in all"
        return f"{text} that may start {types or 'nothing'}"


def node_types(
    config: Mapping[str, Any], label_selector: Mapping[str, str] = ANY
) -> tuple[tuple[NodeType, ...], int | None]:
    """The worker types of an autoscaler's configuration that have the labels, and the most workers that it allows
    together.

    Args:
        config: as Ray's autoscaler reads it, of the cluster launcher or derived from a RayCluster.
    """
    most = config.get("max_workers")
    types = []
    for name, kind in (config.get("available_node_types") or {}).items():
        if name != config.get("head_node_type") and label_selector.items() <= (kind.get("labels") or {}).items():
            resources = {
                key: float(value)
                for key, value in (kind.get("resources") or {}).items()
                if isinstance(value, (int, float))
            }
            types.append(NodeType(str(name), resources, kind.get("max_workers", most)))
    return tuple(types), most


def workers_on(worker: Resources, node: Resources) -> int:
    """How many workers a node with such resources holds."""
    return min(int(node.get(key, 0) / value + 1e-9) for key, value in worker.items() if value)


def worker_resources(cpus: int, gpu: bool, shared_by: int = 1) -> dict[str, float]:
    """What Ray reserves for one training worker: its CPUs, and its GPU or the part of one that ``shared_by`` share.

    Ray counts in ten-thousandths, so parts are rounded down to these.
    """
    return {"CPU": float(cpus), **({"GPU": 10_000 // shared_by / 10_000} if gpu else {})}


def wants_gpu(use_gpu: bool | None, capacity: ClusterCapacity) -> bool:
    """Whether each worker takes a GPU: as ``runtime.use_gpu`` says, else where the cluster offers GPUs.

    Raises:
        ConfigError: it is not set, no node that is up has a GPU, and the autoscaler does not say what it may start.
    """
    if use_gpu is not None:
        return use_gpu
    offered = capacity.offers_gpu()
    if offered is None:
        raise ConfigError(
            f"runtime.use_gpu is not set, and whether this cluster will have GPUs cannot be known: it has "
            f"{capacity.describe()}.",
            "Add --set runtime.use_gpu=true where its workers have GPUs, else --set runtime.use_gpu=false.",
        )
    return offered


_JOBS = {
    "run": ("The run", "runtime.num_workers", "the run could never start"),
    "trial": ("A trial", "workers_per_trial", "no trial could ever start"),
    "encode": ("encode", "--workers", "no worker could ever start"),
    "prepare": ("prepare", "--workers", "no worker could ever start"),
}
"""Who asks for workers, the setting that says how many, and what comes of it where there is no room."""


def check_room(
    capacity: ClusterCapacity, worker: Resources, count: int, job: Literal["run", "trial", "encode", "prepare"] = "run"
) -> None:
    """Refuse workers that the cluster can never hold at once.

    Args:
        worker: the resources of one (:func:`worker_resources`).
        count: the fewest workers with which the job starts.

    Raises:
        ConfigError: with what the cluster has, and what to change.
    """
    room = capacity.room(worker)
    if room >= count:
        return
    each = " and ".join(f"{value:g} {name}" for name, value in worker.items())
    who, setting, outcome = _JOBS[job]
    raise ConfigError(
        f"{who} asks for {_count(count, 'worker')} with {each} each, but the cluster has room for {room:g}: it has "
        f"{capacity.describe()}, so {outcome}.",
        _remedy(capacity, worker, count, setting),
    )


def _remedy(capacity: ClusterCapacity, worker: Resources, count: int, setting: str) -> str:
    """What makes them fit, the settings of the job first."""
    ways = []
    room = int(capacity.room(worker))
    if room:
        ways.append(f"set {setting} to {room} at most")
    without_gpu = {name: value for name, value in worker.items() if name != "GPU"}
    if "GPU" in worker and capacity.room(without_gpu) >= count:
        ways.append("set runtime.use_gpu to false")
    if worker.get("CPU", 0) > 1 and capacity.room({**worker, "CPU": 1.0}) >= count:
        ways.append("lower runtime.cpus_per_worker")
    if capacity.label_selector:
        ways.append("ask for other labels (runtime.label_selector)")
    if capacity.failure is not None:
        ways.append("start the autoscaler again")
    elif capacity.autoscaler:
        ways.append("let the cluster's file allow more or larger workers (max_workers, resources; maxReplicas)")
    else:
        ways.append("start more nodes before the job")
    text = ", or ".join(ways)
    return text[0].upper() + text[1:] + "."


def _type_text(node_type: NodeType, count: float) -> str:
    resources = ", ".join(f"{node_type.resources[key]:g} {key}" for key in ("CPU", "GPU") if key in node_type.resources)
    most = "any number of" if math.isinf(count) else f"at most {count:g}"
    return f"{most} {node_type.name} with {resources or 'neither CPU nor GPU'}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s'[: number != 1]}"
