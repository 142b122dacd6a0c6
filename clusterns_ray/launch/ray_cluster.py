"""Ray for as long as a job needs it: joined where there is a cluster, else started on this machine."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from clusterns_ray.config import RuntimeConfig
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.yaml_text import load_foreign_yaml
from clusterns_ray.launch.capacity import (
    ANY,
    HEAD,
    ClusterCapacity,
    check_room,
    node_types,
    wants_gpu,
    worker_resources,
)

log = logging.getLogger("cluster")

ANSWER_TIMEOUT_S = 10.0
REPORT_TIMEOUT_S = 20.0
"""How long an autoscaler that is no process of this machine may take until its first report; KubeRay starts it after
the head."""

_MONITORS = {1: "autoscaler/_private/monitor.py", 2: "autoscaler/v2/monitor.py"}
_NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"


@contextmanager
def connect(cpus: int, note: OnNote, *, dashboard: bool = False) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine; leave it as it was.

    Args:
        cpus: how many the job asks for; a Ray that is started here has at least that many, even where they are shared.
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
    check_ray_directory()
    _start(cpus, note, dashboard)
    try:
        yield
    finally:
        ray.shutdown()


SOCKET_BYTES = 107
"""Linux's limit on the path of a Unix socket."""


def check_ray_directory() -> None:
    """Refuse a temporary directory whose path is too long for the sockets of a Ray that is started in it.

    Raises:
        ConfigError: Ray would fail there; it names the environment variable.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if variable is None:
        return
    directory = os.environ[variable]
    session = f"session_2000-01-01_00-00-00_000000_{os.getpid()}"
    length = len(os.fsencode(os.path.join(directory, "ray", session, "sockets", "plasma_store")))
    if length > SOCKET_BYTES:
        raise ConfigError(
            f"{variable} is {directory!r}, in which the paths of Ray's sockets would take {length} characters; Linux "
            f"takes {SOCKET_BYTES}.",
            "Set the environment variable RAY_TMPDIR to a short directory of your own: "
            "export RAY_TMPDIR=$(mktemp -d /tmp/rXXXXXX)",
        )


def check_workers(
    runtime: RuntimeConfig, count: int, job: Literal["run", "trial"], *, begun: bool, note: OnNote
) -> bool:
    """Refuse workers that the cluster that was joined can never hold.

    Args:
        count: the fewest workers with which the job starts.
        begun: whether the job was begun before. Where no autoscaler is in charge, nodes that it had may come back, so
            that it waits for them.

    Returns:
        Whether each worker takes a GPU.

    Raises:
        ConfigError: they do not fit (:func:`check_room`), or whether they take GPUs is not known (:func:`wants_gpu`).
    """
    capacity = cluster_capacity(runtime.label_selector)
    use_gpu = wants_gpu(runtime.use_gpu, capacity)
    worker = worker_resources(runtime.cpus_per_worker, use_gpu)
    try:
        check_room(capacity, worker, count, job)
    except ConfigError:
        if not (begun and capacity.autoscaler == 0 and os.environ.get("RAY_ADDRESS")):
            raise
        note(
            f"The cluster has {capacity.describe()}: too little for {count} worker{'s'[: count != 1]}. Waiting up to "
            f"{runtime.start_timeout_s:.0f} s (runtime.start_timeout_s) for nodes to come back."
        )
    return use_gpu


def cluster_capacity(label_selector: Mapping[str, str] = ANY) -> ClusterCapacity:
    """What the cluster that was joined has and may get, of nodes that have the labels.

    Neither version of the autoscaler publishes its node types through Ray. They are in the file that it was given,
    which is read where this process runs beside it, on the head; KubeRay's are in the RayCluster resource.
    """
    import ray

    up = [node for node in ray.nodes() if node["Alive"]]
    nodes = tuple(node["Resources"] for node in up if label_selector.items() <= node["Labels"].items())
    here = ray.get_runtime_context().get_node_id()
    on_head = any(HEAD in node["Resources"] for node in up if node["NodeID"] == here)
    version, config, failure = _autoscaler(on_head)
    types, most = (None if version else (), None) if config is None else node_types(config, label_selector)
    return ClusterCapacity(nodes, version, types, most, failure, dict(label_selector))


def _autoscaler(on_head: bool) -> tuple[int, Mapping[str, Any] | None, str | None]:
    """The version of the cluster's autoscaler (0: none), its configuration where it can be read, and its failure."""
    monitor = _monitor_process() if on_head else None
    if monitor is not None:
        version, path = monitor
        # Ray starts a monitor on every head; without a file it only watches.
        return (version, _read_yaml(path), None) if path is not None else (0, None, None)
    kuberay = _kuberay_resource() if on_head else None
    if kuberay is not None and not kuberay["spec"].get("enableInTreeAutoscaling"):
        return 0, None, None
    version, failure = _reported_version(REPORT_TIMEOUT_S if kuberay is None else 0)
    if kuberay is None:
        return version, None, failure
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    return version or 2, _derive_autoscaling_config_from_ray_cr(dict(kuberay)), failure


def _monitor_process() -> tuple[int, Path | None] | None:
    """The autoscaler of this cluster's head, if it is a process of this machine: its version, and its file."""
    import ray
    import psutil  # isort: skip  # Ray carries it

    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            program = next((part for part in command[:4] if part.endswith("monitor.py")), "")
            version = next((number for number, end in _MONITORS.items() if program.endswith(end)), None)
            given = dict(part.removeprefix("--").split("=", 1) for part in command if re.match(r"--[\w-]+=", part))
            if version is None or given.get("gcs-address", "").rpartition(":")[2] != port:
                continue
            path = given.get("autoscaling-config")
            return version, Path(process.cwd(), os.path.expanduser(path)) if path else None
        except psutil.Error:
            continue
    return None


def _read_yaml(path: Path) -> Mapping[str, Any] | None:
    """The autoscaler's own file, which Ray has read already; None where it cannot be read."""
    try:
        (values,) = load_foreign_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _kuberay_resource() -> Mapping[str, Any] | None:
    """The RayCluster resource of this pod; None outside Kubernetes, and where it may not be read."""
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), Path(_NAMESPACE)
    if not (name and "KUBERNETES_SERVICE_HOST" in os.environ and namespace.is_file()):
        return None
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    try:
        return KubernetesHttpApiClient(namespace.read_text().strip()).get(f"rayclusters/{name}")
    except Exception as error:  # no right to read it, another version of the interface: the reports say less
        log.info("The RayCluster %s cannot be read: %s", name, error)
        return None


def _reported_version(wait_s: float) -> tuple[int, str | None]:
    """The version of an autoscaler that reports to Ray, and why it has failed; 0 if none reports in time."""
    import ray
    from ray._private import ray_constants
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    client = GcsClient(ray.get_runtime_context().gcs_address)
    deadline = time.monotonic() + wait_s
    while True:
        error = client.internal_kv_get(ray_constants.DEBUG_AUTOSCALING_ERROR.encode(), namespace=None)
        if error:
            return 1, " ".join(error.decode().split())[-300:]
        status = json.loads(
            client.internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS.encode(), namespace=None) or "{}"
        )
        if "autoscaler_report" in status:
            # One that only watches names its types after the nodes.
            types = status["autoscaler_report"]["node_type_mapping"] or {}
            if types:
                return int(any(name != f"node_{node}" for node, name in types.items())), None
        reply = GetClusterStatusReply()
        reply.ParseFromString(client.get_cluster_status(timeout_s=ANSWER_TIMEOUT_S))
        if reply.autoscaling_state.autoscaler_state_version > 0:
            return 2, None
        if time.monotonic() > deadline:
            return 0, None
        time.sleep(0.25)


def _start(cpus: int, note: OnNote, dashboard: bool) -> None:
    # The driver's directory is not shipped to the workers: the package is installed where they run.
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
        _init(f"The cluster at RAY_ADDRESS ({address}) could not be joined", LOOK_AT_CLUSTER, **options)
        return
    there = os.cpu_count() or 1
    if cpus > there:
        note(f"{cpus} CPUs are asked for on a machine with {there}: they are shared, and all runs slower.")
    # Named, as without an address Ray would look for one that an earlier `ray start` left behind.
    options |= {"address": "local", "num_cpus": max(there, cpus), "include_dashboard": dashboard}
    _init("Ray could not be started on this machine", LOOK_AT_MACHINE, **options)


LOOK_AT_CLUSTER = "Look at it with `ray status`; Ray and Python must have the versions that this machine has."
LOOK_AT_MACHINE = (
    "Is there room on the disk and in memory? Its logs are in ray/session_latest/logs of RAY_TMPDIR, or of /tmp if it "
    "is not set."
)


def _init(failure: str, remedy: str, **options: Any) -> None:
    """``ray.init``; what it raises, of many kinds, becomes one line."""
    import ray

    try:
        ray.init(**options)
    except Exception as error:
        ray.shutdown()
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ClusterNSError(f"{failure}: {reason.rstrip('.')}.", remedy) from error


def on_this_node() -> dict[str, Any]:
    """Options of an actor that belongs to the driver, and must not be lost with another node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


def state_api_error(timeout_s: float) -> str | None:
    """Why Ray's State API does not answer in time; None where it does."""
    import ray
    from ray.util.state import list_nodes

    try:
        # By address, as another Ray may run on this machine.
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=int(timeout_s))
    except Exception as error:
        return " ".join(str(error).split())
    return None


def least_gpu_memory(timeout_s: float) -> int:
    """Bytes of memory of the smallest GPU of the nodes that are up; where none has one, of the first that is started.

    Raises:
        ClusterNSError: none says so in time, or torch cannot use one.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= 1]
    ask = ray.remote(num_cpus=0, num_gpus=1)(_gpu_memory)
    strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes] or ["DEFAULT"]
    try:
        return min(ray.get([ask.options(scheduling_strategy=each).remote() for each in strategies], timeout=timeout_s))
    except RayError as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ClusterNSError(
            f"How much memory a GPU here has could not be found out within {timeout_s:.0f} s ({reason[:200]}).",
            "Set trials_per_gpu to a number, or look at the GPUs with `clusterns doctor`.",
        ) from error


def _gpu_memory() -> int:
    """Bytes of memory of the one GPU that Ray lets this process see."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def head_answers() -> bool:
    """Whether the cluster that was joined is there still."""
    try:
        _check_answers(os.environ.get("RAY_ADDRESS", "auto"))
    except ClusterNSError:
        return False
    return True


def _check_answers(address: str) -> None:
    """Check that something listens there: Ray itself would try for a quarter of an hour."""
    if re.match("https?://", address):
        raise ClusterNSError(
            f"RAY_ADDRESS is {address!r}, the address of Ray's dashboard: it takes jobs, and nothing else joins by it.",
            "Submit the command (`ray job submit -- clusterns ...`), or run it on a node with the address HEAD:6379.",
        )
    parts = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if not parts:  # "auto"
        return
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterNSError(
            f"RAY_ADDRESS is {address!r}, where nothing answers ({error}).",
            "Correct it, or unset it to start Ray on this machine.",
        ) from error
