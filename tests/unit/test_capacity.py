"""What a cluster can give: pure judgments over capacities of every shape, and how capacities are read."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from clusterns_ray.config import RuntimeConfig
from clusterns_ray.errors import ConfigError
from clusterns_ray.launch import ray_cluster as cluster
from clusterns_ray.launch.capacity import (
    HEAD,
    ClusterCapacity,
    NodeType,
    check_room,
    node_types,
    wants_gpu,
    worker_resources,
    workers_on,
)

ROOT = Path(__file__).resolve().parents[2]
HEAD_NODE = {HEAD: 1.0, "memory": 1e9}
"""A head without CPUs, as the shipped cluster files have it."""
CPU_NODE = {"CPU": 4.0}
GPU_NODE = {"CPU": 8.0, "GPU": 1.0}
SPOT = NodeType("gpu_spot", {"CPU": 8, "GPU": 1}, 8)
ON_DEMAND = NodeType("gpu_on_demand", {"CPU": 8, "GPU": 1}, 2)
CPUS = NodeType("cpus", {"CPU": 16}, 3)
ONE_CPU, ONE_GPU = worker_resources(1, False), worker_resources(1, True)


def autoscaled(version: int, *types: NodeType, nodes: tuple = (HEAD_NODE,), most: int | None = 8) -> ClusterCapacity:
    return ClusterCapacity(nodes, version, types, most)


def untold(version: int) -> ClusterCapacity:
    return ClusterCapacity((HEAD_NODE,), version, None)


FIXED = ClusterCapacity((HEAD_NODE, CPU_NODE, CPU_NODE))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("types", "unset"),
    [((SPOT,), True), ((CPUS,), False), ((CPUS, SPOT), True), ((NodeType("no", {"GPU": 1}, 0),), False)],
)
def test_what_the_node_types_promise_decides_where_use_gpu_is_unset(
    version: int, types: tuple[NodeType, ...], unset: bool
) -> None:
    capacity = autoscaled(version, *types)
    assert wants_gpu(None, capacity) is unset
    assert wants_gpu(True, capacity) is True and wants_gpu(False, capacity) is False


@pytest.mark.parametrize("version", [1, 2])
def test_an_autoscaler_that_does_not_tell(version: int) -> None:
    capacity = untold(version)
    with pytest.raises(ConfigError) as error:
        wants_gpu(None, capacity)
    assert f"an autoscaler (version {version}) that does not say what it may start" in str(error.value)
    assert "--set runtime.use_gpu=true" in str(error.value) and "--set runtime.use_gpu=false" in str(error.value)
    assert wants_gpu(True, capacity) and not wants_gpu(False, capacity)
    check_room(capacity, worker_resources(64, True), 1000)
    up = ClusterCapacity((HEAD_NODE, GPU_NODE), version, None)
    assert wants_gpu(None, up), "a GPU that is up is known of"


def test_clusters_of_a_fixed_size() -> None:
    assert wants_gpu(None, FIXED) is False
    assert wants_gpu(None, ClusterCapacity((HEAD_NODE, GPU_NODE))) is True
    assert wants_gpu(None, ClusterCapacity(())) is False


@pytest.mark.parametrize(
    ("worker", "node", "count"),
    [
        ({"CPU": 2.0, "GPU": 1.0}, {"CPU": 7.0, "GPU": 4.0}, 3),
        ({"CPU": 2.0, "GPU": 1.0}, {"CPU": 8.0}, 0),
        ({"CPU": 1.0, "GPU": 1 / 3}, {"CPU": 8.0, "GPU": 1.0}, 3),
        ({"CPU": 1.0}, {}, 0),
    ],
)
def test_workers_on_a_node(worker: dict[str, float], node: dict[str, float], count: int) -> None:
    assert workers_on(worker, node) == count


ROOM: list[tuple[ClusterCapacity, dict[str, float], float]] = [
    (FIXED, ONE_CPU, 8),
    (FIXED, worker_resources(3, False), 2),  # a node's CPUs are not another's
    (FIXED, ONE_GPU, 0),
    (autoscaled(1, SPOT), ONE_GPU, 8),
    (autoscaled(2, SPOT), ONE_CPU, 64),
    (autoscaled(1, SPOT, ON_DEMAND), ONE_GPU, 8),  # max_workers caps all types together
    (autoscaled(1, SPOT, ON_DEMAND, most=None), ONE_GPU, 10),
    (autoscaled(2, SPOT, CPUS), ONE_CPU, 3 * 16 + 5 * 8),  # the larger nodes first
    (autoscaled(1, SPOT), worker_resources(16, True), 0),
    (autoscaled(1, NodeType("any", GPU_NODE, None)), ONE_GPU, 8),
    (autoscaled(1, NodeType("any", GPU_NODE, None), most=None), ONE_GPU, float("inf")),
    (autoscaled(1, NodeType("any", CPU_NODE, None), most=None), ONE_GPU, 0),
    (autoscaled(2, nodes=(HEAD_NODE, GPU_NODE)), ONE_GPU, 1),  # what is up counts, types or not
    (autoscaled(1, SPOT, nodes=(HEAD_NODE, *[GPU_NODE] * 8)), ONE_GPU, 8),  # those that are up are of the eight
    (autoscaled(1, SPOT, nodes=({HEAD: 1.0, "CPU": 4.0},)), ONE_CPU, 68),  # a head with CPUs holds workers too
    (ClusterCapacity((HEAD_NODE,), 1, (SPOT,), 8, failure="no credentials"), ONE_GPU, 0),
]


@pytest.mark.parametrize(("capacity", "worker", "room"), ROOM)
def test_room(capacity: ClusterCapacity, worker: dict[str, float], room: float) -> None:
    assert capacity.room(worker) == room
    if room < float("inf"):
        with pytest.raises(ConfigError, match=rf"but the cluster has room for {room:g}: it has"):
            check_room(capacity, worker, int(room) + 1)
    if room:
        check_room(capacity, worker, int(min(room, 1e6)))


@pytest.mark.parametrize("version", [1, 2])
def test_a_refusal_names_the_autoscaler_and_a_remedy_that_works(version: int) -> None:
    def refusal(worker: dict[str, float], count: int, capacity: ClusterCapacity, job: Any = "run") -> str:
        with pytest.raises(ConfigError) as error:
            check_room(capacity, worker, count, job)
        return str(error.value)

    text = refusal(ONE_GPU, 9, autoscaled(version, SPOT))
    assert f"an autoscaler (version {version}) that may start at most 8 gpu_spot with 8 CPU, 1 GPU" in text
    assert "The run asks for 9 workers with 1 CPU and 1 GPU each" in text and "1 node with 0 CPU, 0 GPU" in text
    assert "Set runtime.num_workers to 8 at most, or set runtime.use_gpu to false" in text
    text = refusal(worker_resources(16, True), 1, autoscaled(version, SPOT), "trial")
    assert "no trial could ever start" in text and "lower runtime.cpus_per_worker" in text.lower()
    assert "use_gpu" not in text.partition("could ever start")[2], "without GPUs it would fit no better"
    text = refusal(ONE_GPU, 1, FIXED)
    assert "and no autoscaler" in text and "Set runtime.use_gpu to false, or start more nodes before the job." in text
    text = refusal(ONE_CPU, 1, ClusterCapacity((HEAD_NODE,), version, (SPOT,), 8, failure="no credentials"))
    assert "that has failed: no credentials" in text and "Start the autoscaler again." in text


@pytest.mark.parametrize("shared_by", range(1, 65))
def test_trials_that_share_a_gpu(shared_by: int) -> None:
    assert workers_on(worker_resources(1, True, shared_by), {"CPU": 128.0, "GPU": 2.0}) == 2 * shared_by
    assert worker_resources(1, False, shared_by) == {"CPU": 1.0}


def test_capacities_survive_json() -> None:
    for capacity, *_ in ROOM:
        again = ClusterCapacity.from_values(json.loads(json.dumps(capacity.values())))
        assert again == capacity and again.describe() == capacity.describe()
    assert ClusterCapacity.from_values(untold(2).values()) == untold(2)


# ---- the autoscaler's configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["cluster.yaml", "experiments/clusters/gcp.yaml"])
def test_the_shipped_files_offer_gpus(file: str) -> None:
    types, most = node_types(yaml.safe_load((ROOT / file).read_text()))
    capacity = ClusterCapacity((HEAD_NODE,), 1, types, most)
    assert wants_gpu(None, capacity) and capacity.room(ONE_GPU) == most
    assert len(types) == 4 and "head" not in {node_type.name for node_type in types}, "the head is no worker"


@pytest.mark.parametrize("file", ["cluster.yaml", "experiments/clusters/gcp.yaml"])
def test_labels_choose_among_the_types_of_the_shipped_files(file: str) -> None:
    config = yaml.safe_load((ROOT / file).read_text())
    names = lambda **labels: [kind.name for kind in node_types(config, labels)[0]]  # noqa: E731
    assert names(gpu="L4") == ["l4_spot", "l4_on_demand"]
    assert len(names(market="spot")) == 2
    assert names(gpu="H100") == []
    capacity = ClusterCapacity((HEAD_NODE,), 2, *node_types(config, {"gpu": "H100"}), label_selector={"gpu": "H100"})
    with pytest.raises(ConfigError, match=r"1 node with gpu=H100, 0 CPU, 0 GPU, .* that may start nothing") as error:
        check_room(capacity, ONE_GPU, 1)
    assert "runtime.label_selector" in error.value.remedy


def test_the_shipped_ray_clusters_offer_gpus() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    documents = list(yaml.safe_load_all((ROOT / "experiments/clusters/kuberay.yaml").read_text()))
    for spec in (documents[0]["spec"], documents[1]["spec"]["rayClusterSpec"]):
        metadata = {"name": "clusterns", "namespace": "default"}
        types, most = node_types(_derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec}))
        assert wants_gpu(None, ClusterCapacity((HEAD_NODE,), 2, types, most))


def test_counts_that_a_configuration_leaves_out() -> None:
    config = {
        "max_workers": 5,
        "head_node_type": "head",
        "available_node_types": {"head": {"resources": {"CPU": 4}}, "a": {"resources": {"CPU": 2}}, "b": {}},
    }
    assert node_types(config) == ((NodeType("a", {"CPU": 2.0}, 5), NodeType("b", {}, 5)), 5)
    assert node_types({"available_node_types": None}) == ((), None)


# ---- where it is read -----------------------------------------------------------------------------------------------


class FakeClient:
    """What Ray's GcsClient tells: values by key, and the version of the autoscaler's state."""

    def __init__(self, values: dict[str, Any], state_version: int = 0):
        self.values, self.state_version = values, state_version

    def internal_kv_get(self, key: bytes, namespace: bytes | None = None) -> bytes | None:
        value = self.values.get(key.decode())
        return None if value is None else value.encode()

    def get_cluster_status(self, timeout_s: float) -> bytes:
        from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

        reply = GetClusterStatusReply()
        reply.autoscaling_state.autoscaler_state_version = self.state_version
        return reply.SerializeToString()


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeClient], None]:
    import ray
    import ray._raylet

    def use(client: FakeClient) -> None:
        context = SimpleNamespace(gcs_address="10.0.0.1:6379", get_node_id=lambda: "a")
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(ray._raylet, "GcsClient", lambda address: client)

    return use


def status(**types: str) -> str:
    return json.dumps({"autoscaler_report": {"node_type_mapping": types}})


STATUS, ERROR = "__autoscaling_status", "__autoscaling_error"


@pytest.mark.parametrize(
    ("client", "version", "failure"),
    [
        (FakeClient({}), 0, None),
        (FakeClient({STATUS: json.dumps({"time": 1})}), 0, None),
        (FakeClient({STATUS: status(abc="node_abc")}), 0, None),  # version 1, which watches a fixed cluster
        (FakeClient({STATUS: status(abc="head")}), 1, None),
        (FakeClient({}, state_version=3), 2, None),
        (FakeClient({STATUS: status(abc="head"), ERROR: "it failed:\nNoCredentialsError"}), 1, "NoCredentialsError"),
    ],
)
def test_what_autoscalers_report(
    gcs: Callable[[FakeClient], None], client: FakeClient, version: int, failure: str | None
) -> None:
    gcs(client)
    seen, why = cluster._reported_version(0)
    assert seen == version and (failure in why if failure and why else why is failure)


def test_a_first_report_is_waited_for(gcs: Callable[[FakeClient], None], monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient({})
    gcs(client)
    monkeypatch.setattr(time, "sleep", lambda seconds: client.values.update({STATUS: status(abc="head")}))
    assert cluster._reported_version(5) == (1, None)


MONITORS = {
    1: "ray/autoscaler/_private/monitor.py",
    2: "ray/autoscaler/v2/monitor.py",
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("given", ["absolute", "relative", "none", "unreadable"])
def test_the_monitor_on_the_head_tells_of_its_file(
    gcs: Callable[[FakeClient], None], tmp_path: Path, version: int, given: str
) -> None:
    """A process with the monitor's command line, as Ray starts one on every head."""
    gcs(FakeClient({}))
    program = tmp_path / MONITORS[version]
    program.parent.mkdir(parents=True)
    program.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    config = {"max_workers": 2, "head_node_type": "head", "available_node_types": {"gpu": {"resources": {"GPU": 1}}}}
    (tmp_path / "bootstrap.yaml").write_text("[" if given == "unreadable" else yaml.safe_dump(config))
    path = "bootstrap.yaml" if given == "relative" else str(tmp_path / "bootstrap.yaml")
    for port in (6379, 6380):  # another cluster's on the same machine
        command = [sys.executable, "-u", str(program), f"--gcs-address=127.0.0.1:{port}", "--logs-dir=/tmp"]
        command += [] if given == "none" else [f"--autoscaling-config={path}"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None and process.stdout.readline() == b"up\n"
            if port == 6379:
                expected = {"none": (0, None, None), "unreadable": (version, None, None)}
                assert cluster._autoscaler(True) == expected.get(given, (version, config, None))
            else:
                assert cluster._monitor_process() is None
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("autoscaling", [True, False])
def test_a_ray_cluster_on_kubernetes(
    gcs: Callable[[FakeClient], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, autoscaling: bool
) -> None:
    from ray.autoscaler._private.kuberay import node_provider

    document = next(yaml.safe_load_all((ROOT / "experiments/clusters/kuberay.yaml").read_text()))
    document["metadata"]["namespace"] = "training"
    document["spec"]["enableInTreeAutoscaling"] = autoscaling
    asked = []

    class Client:
        def __init__(self, namespace: str):
            self.namespace = namespace

        def get(self, path: str) -> dict[str, Any]:
            asked.append((self.namespace, path))
            return document

    (tmp_path / "namespace").write_text("training\n")
    monkeypatch.setattr(cluster, "_NAMESPACE", str(tmp_path / "namespace"))
    monkeypatch.setattr(node_provider, "KubernetesHttpApiClient", Client)
    monkeypatch.setenv("RAY_CLUSTER_NAME", "clusterns-abc")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    gcs(FakeClient({}))
    version, config, failure = cluster._autoscaler(True)
    assert asked == [("training", "rayclusters/clusterns-abc")] and failure is None
    assert version == (2 if autoscaling else 0)
    if autoscaling:
        assert config is not None
        assert {t.name for t in node_types(config)[0]} == {"gpu-spot", "gpu-on-demand"}
    monkeypatch.setattr(Client, "get", lambda self, path: 1 / 0)
    monkeypatch.setattr(cluster, "REPORT_TIMEOUT_S", 0.0)
    gcs(FakeClient({}, state_version=1))
    assert cluster._autoscaler(True) == (2, None, None), "without the right to read it, the reports tell the version"


# ---- what a command does with it ------------------------------------------------------------------------------------


@pytest.fixture
def capacity(monkeypatch: pytest.MonkeyPatch) -> Callable[[ClusterCapacity], None]:
    return lambda value: monkeypatch.setattr(cluster, "cluster_capacity", lambda labels: value)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("use_gpu", [True, False, None])
def test_a_head_without_cpus_whose_autoscaler_brings_gpus(
    capacity: Callable[[ClusterCapacity], None], version: int, use_gpu: bool | None
) -> None:
    capacity(autoscaled(version, SPOT))
    runtime = RuntimeConfig(num_workers=2, use_gpu=use_gpu)
    for job in ("run", "trial"):
        assert cluster.check_workers(runtime, 2, job, begun=False, note=print) is (use_gpu is not False)


def test_a_job_that_was_begun_waits_for_its_nodes(
    capacity: Callable[[ClusterCapacity], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, notes = RuntimeConfig(num_workers=9, start_timeout_s=77), []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")

    def check(begun: bool) -> bool:
        return cluster.check_workers(runtime, 9, "run", begun=begun, note=notes.append)

    capacity(FIXED)
    with pytest.raises(ConfigError, match="The run asks for 9 workers"):
        check(begun=False)
    assert check(begun=True) is False
    assert "Waiting up to 77 s" in notes[0] and "3 nodes with 8 CPU" in notes[0]
    capacity(autoscaled(1, CPUS, most=0))
    with pytest.raises(ConfigError, match="may start nothing"):
        check(begun=True)
    capacity(FIXED)
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConfigError):
        check(begun=True)  # this machine gets no further nodes
