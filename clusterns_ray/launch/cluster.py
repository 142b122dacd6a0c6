"""Ray for as long as a job needs it: joined where there is a cluster, else started on this machine."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from clusterns_ray.config import RuntimeConfig
from clusterns_ray.errors import ClusterNSError, ConfigError

ANSWER_TIMEOUT_S = 10.0


@contextmanager
def connect(cpus: int, note: Callable[[str], None], *, dashboard: bool = False) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine; leave it as it was found.

    Args:
        cpus: how many the job asks for; a Ray that is started here has at least so many, be they shared.
        dashboard: whether a Ray that is started here serves its State API.

    Raises:
        ClusterNSError: nothing answers at RAY_ADDRESS.
    """
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default for a local start, said without its warning.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    _start(cpus, note, dashboard)
    try:
        yield
    finally:
        ray.shutdown()


def uses_gpu(runtime: RuntimeConfig) -> bool:
    """One GPU a worker, unless it was said otherwise, where the cluster has them or its autoscaler may bring them.

    Raises:
        ConfigError: it was not said, no node has one, and the autoscaler does not tell what it may bring.
    """
    import ray

    if runtime.use_gpu is not None:
        return runtime.use_gpu
    limits = can_grow_to()
    found = ray.cluster_resources().get("GPU", 0) > 0 or (limits or {}).get("GPU", 0) > 0
    if not found and limits is None and autoscales():
        raise ConfigError(
            "runtime.use_gpu is not set, and this cluster may yet start nodes with GPUs, or without: it does not tell. "
            "Set it to true or false."
        )
    return found


def autoscales() -> bool:
    """Whether an autoscaler may add nodes, be its limits known or not."""
    if can_grow_to() is not None:
        return True
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    # The second version of the autoscaler publishes its state, though not its limits; without one the count stays 0.
    reply = GetClusterStatusReply()
    client = GcsClient(ray.get_runtime_context().gcs_address)
    reply.ParseFromString(client.get_cluster_status(timeout_s=ANSWER_TIMEOUT_S))
    return reply.autoscaling_state.autoscaler_state_version > 0


def can_grow_to() -> Mapping[str, float] | None:
    """The most of each resource that the cluster's autoscaler may bring it to; None without one."""
    # The one place that knows an autoscaler's limits; the public API tells of nodes that are there.
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config()


def places(worker: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many workers a node with such resources holds."""
    return min(int(resources.get(key, 0) / value + 1e-9) for key, value in worker.items() if value)


def _start(cpus: int, note: Callable[[str], None], dashboard: bool) -> None:
    import ray

    # The driver's directory is not shipped to the workers: the package is installed where they run.
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
        ray.init(**options)
        return
    there = os.cpu_count() or 1
    if cpus > there:
        note(f"{cpus} CPUs are asked for on a machine with {there}: they are shared, and all runs slower.")
    # Said, as without an address Ray would look for one that an earlier `ray start` left behind.
    ray.init("local", num_cpus=max(there, cpus), include_dashboard=dashboard, **options)


def on_this_node() -> dict[str, Any]:
    """Options of an actor that belongs to the driver, and must not be lost with another node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


def head_answers() -> bool:
    """Whether the cluster that was joined is there still."""
    try:
        _check_answers(os.environ.get("RAY_ADDRESS", "auto"))
    except ClusterNSError:
        return False
    return True


def _check_answers(address: str) -> None:
    """Whether anything listens there: Ray itself would try for a quarter of an hour."""
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if not found:  # "auto"
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterNSError(
            f"RAY_ADDRESS is {address!r}, where nothing answers ({error}). Mend it, or unset it to start Ray on this "
            "machine."
        ) from error
