"""What a machine answers to the doctor, and what it makes of the answers of several."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clusterns_ray.config import Config
from clusterns_ray.launch.capacity import ClusterCapacity, NodeType
from clusterns_ray.ops.doctor import machines, node, request
from clusterns_ray.ops.doctor.findings import Finding
from clusterns_ray.ops.doctor.machines import Cluster
from clusterns_ray.ops.doctor.request import Request, Sizes


def levels(findings: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in findings]


# ---- one machine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    return {
        "directories": {"runtime.storage_path": str(tmp_path / "a" / "b")},
        "tokens": {},
        "store": None,
        "local_path": None,
        "model": None,
    }


def test_what_a_machine_tells(asked: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    (whole,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    asked["model"] = {"name": str(tiny_model), "revision": None}
    answer = node.describe(asked)
    assert json.loads(json.dumps(answer)) == answer
    assert answer["versions"]["python"] == sys.version.split()[0] and answer["versions"]["ray"]
    assert 0 < answer["memory"]["free"] <= answer["memory"]["total"] <= int(whole.split()[1]) << 10
    place = answer["directories"]["runtime.storage_path"]
    assert (place["error"], place["shared"]) == (None, None) and place["free"] > 0
    assert list(tmp_path.iterdir()) == [], "it left something behind"
    assert answer["model"]["error"] is None


def test_places_that_cannot_be_written(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("/proc/runs", str(tmp_path / "file" / "runs")):
        asked["directories"]["runtime.storage_path"] = path
        assert node.describe(asked)["directories"]["runtime.storage_path"]["error"]


def test_what_the_driver_wrote_is_seen(asked: dict[str, Any], tmp_path: Path) -> None:
    for name, seen in (("there", True), ("elsewhere", False)):
        asked["tokens"] = {"runtime.storage_path": str(tmp_path / name)}
        (tmp_path / "there").touch()
        assert node.describe(asked)["directories"]["runtime.storage_path"]["shared"] is seen


def test_a_store(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path / "local"))
    asked |= {"store": f"file://{tmp_path}/store", "directories": {"runtime.local_path": None}}
    answer = node.describe(asked)
    assert answer["store"]["error"] is None
    assert answer["directories"]["runtime.local_path"]["path"].startswith(str(tmp_path / "local"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "file").touch()
    assert "file" in node.describe(asked | {"store": f"file://{tmp_path}/file"})["store"]["error"]


def test_what_only_trying_tells() -> None:
    answer = node.compute()
    assert answer["kmeans"] == {"value": "faiss", "error": None, "remedy": ""}
    assert answer["torch"]["error"] is None


def test_gpus_that_the_driver_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node.nvidia_smi() == []
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "NVIDIA A10G, 23028, 570.1"\necho "NVIDIA A10G, [N/A], 570.1"\n')
    program.chmod(0o755)
    first, second = node.nvidia_smi()
    assert first == {"name": "NVIDIA A10G", "memory": 23028 << 20, "driver": "570.1"} and second["memory"] is None
    program.write_text("#!/bin/sh\necho broken, and, so\nexit 9\n")
    assert node.nvidia_smi() == []


# ---- several machines -----------------------------------------------------------------------------------------------


FIXED = ClusterCapacity(({"CPU": 4.0}, {"CPU": 4.0}))


@pytest.fixture
def two(asked: dict[str, Any]) -> Cluster:
    """Two nodes that tell what this machine tells, and nothing is wrong with them."""
    facts = node.describe(asked)
    computed = {"kmeans": {"value": "faiss", "error": None, "remedy": ""}}
    computed["torch"] = {"value": {"cuda": None, "gpus": [], "nccl": None}, "error": None, "remedy": ""}
    nodes = [{"id": f"{number}abcdef01", "address": f"10.0.0.{number}", "resources": {"CPU": 4.0}} for number in (1, 2)]
    lines = [
        {"kind": "driver", **facts},
        {"kind": "cluster", "nodes": nodes, "capacity": FIXED.values(), "authenticated": True},
        {"kind": "state_api", "error": None},
        *({"kind": "node", "node": n["id"], **facts} for n in nodes),
        *({"kind": "node", "node": n["id"], **computed} for n in nodes),
    ]
    cluster = machines.read_facts(json.loads(json.dumps(lines)), joined=True)
    assert cluster is not None and len(cluster.machines) == 2
    return cluster


def test_no_gpu_where_nothing_is_asked_for(two: Cluster) -> None:
    for on_ray, text in ((True, "none on the nodes that are up"), (False, "none on this machine")):
        (found,) = machines.check_gpus(None, replace(two, on_ray=on_ray))
        assert (found.level, found.value) == ("ok", text)


def test_two_sound_nodes(two: Cluster, run_config: Callable[..., Config]) -> None:
    asked = Request(run_config(runtime={"num_workers": 2}))
    for found in map(
        list,
        (
            machines.check_answers(two),
            machines.check_versions(two),
            machines.check_security(two),
            machines.check_state_api(asked, two),
            machines.check_gpus(asked, two),
            machines.check_faiss(two),
            machines.check_storage(asked, two),
            machines.check_resources(asked, two),
        ),
    ):
        assert levels(found) == ["ok"], found
    assert machines.check_models(two) == []


def test_nodes_that_do_not_answer(two: Cluster) -> None:
    del two.machines[0].facts["torch"]
    two.machines[1].failures.append("The worker died.")
    found = list(machines.check_answers(two))
    assert levels(found) == ["problem", "problem"]
    assert "10.0.0.1" in found[0].value and "in time" in found[0].value and "The worker died." in found[1].value


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_another_version_on_a_node(two: Cluster, version: str | None) -> None:
    two.machines[1].facts["versions"]["torch"] = version
    (finding,) = machines.check_versions(two)
    assert finding.level == "problem" and "10.0.0.2" in finding.value and "torch" in finding.value


@pytest.mark.parametrize(
    ("address", "on", "level"), [("10.0.0.2", False, "warning"), ("127.0.0.1", False, "ok"), ("10.0.0.2", True, "ok")]
)
def test_authentication(two: Cluster, address: str, on: bool, level: str) -> None:
    two.authenticated = on
    for machine in two.machines:
        machine.address = address
    assert levels(machines.check_security(two)) == [level]


def test_state_api(two: Cluster, run_config: Callable[..., Config]) -> None:
    two.state_api_error = "connection refused"
    study = Request(run_config(runtime={"num_workers": 1}), study=True)
    assert levels(machines.check_state_api(study, two)) == ["problem"]
    assert levels(machines.check_state_api(Request(study.config), two)) == ["warning"]
    two.joined = False
    assert list(machines.check_state_api(Request(study.config), two)) == []


def test_storage_of_nodes(two: Cluster, run_config: Callable[..., Config]) -> None:
    asked = Request(run_config(runtime={"num_workers": 2}))
    place = two.machines[1].facts["directories"]["runtime.storage_path"]
    place["shared"] = False
    (finding,) = machines.check_storage(asked, two)
    assert finding.level == "problem" and "does not see what the driver wrote" in finding.value
    assert "s3://" in finding.remedy
    place["error"] = "Read-only file system"
    assert "Read-only file system" in machines.check_storage(asked, two)[0].value
    place.update(error=None, shared=True)
    two.machines[0].facts["store"] = {"value": None, "error": "access denied", "remedy": "Check the rights."}
    (finding,) = machines.check_storage(asked, two)
    assert finding.remedy == "Check the rights." and "access denied" in finding.value
    two.machines[0].facts["model"] = {"value": None, "error": "no such model", "remedy": "Copy it."}
    assert levels(machines.check_models(two)) == ["problem"]


def test_resources(two: Cluster, run_config: Callable[..., Config]) -> None:
    def asked_for(use_gpu: bool | None) -> Request:
        return Request(run_config(runtime={"num_workers": 2, "use_gpu": use_gpu}))

    def of(study: bool = False, concurrent: int = 1, shards: int = 16, batch: int = 16, **runtime: Any) -> Finding:
        config = run_config(train={"shards": shards, "global_batch_size": batch}, runtime={"use_gpu": None} | runtime)
        (finding,) = machines.check_resources(Request(config, study, concurrent), two)
        return finding

    def autoscaled(version: int, resources: dict[str, float], most: int) -> ClusterCapacity:
        return ClusterCapacity(FIXED.nodes, version, (NodeType("spot", resources, most),), most)

    assert of(num_workers=8).level == "ok"
    assert of(num_workers=16).level == "problem"
    assert of(num_workers=8, cpus_per_worker=3).level == "problem"
    finding = of(num_workers=2, use_gpu=True)
    assert finding.level == "problem" and "the cluster has room for 0" in finding.value
    assert finding.remedy == "Set runtime.use_gpu to false, or start more nodes before the job."
    for version in (1, 2):
        two.capacity = autoscaled(version, {"CPU": 8, "GPU": 1}, 2)
        assert of(num_workers=2, use_gpu=True).level == "ok" and "0 could start now" in of(num_workers=2).value
        finding = of(num_workers=4)
        assert finding.level == "problem", "GPUs are taken where an autoscaler brings them"
        assert f"version {version}" in finding.value and "use_gpu to false" in finding.remedy
        assert of(num_workers=4, use_gpu=False).level == "ok"
        assert of(num_workers=16, cpus_per_worker=8, use_gpu=True).level == "problem"
        two.capacity = ClusterCapacity(({"memory": 1.0},), version, None)
        finding = of(num_workers=2)
        assert finding.level == "problem", "a run is refused too"
        assert "runtime.use_gpu is not set" in finding.value and "--set runtime.use_gpu=true" in finding.remedy
        for use_gpu in (True, False):
            assert of(num_workers=2, use_gpu=use_gpu).level == "warning"
            assert levels(machines.check_gpus(asked_for(use_gpu), two)) == (["warning"] if use_gpu else ["ok"])
    two.capacity = ClusterCapacity(FIXED.nodes)
    assert of(num_workers=2, study=True, concurrent=5).level == "warning"
    two.capacity = ClusterCapacity(FIXED.nodes[:1])
    assert of(num_workers=[4, 8], shards=840, batch=840).level == "warning", "elastic: the fewest fit"
    assert machines.check_resources(Request(run_config()), two) == []


def test_gpus(two: Cluster, run_config: Callable[..., Config]) -> None:
    def of(use_gpu: bool | None, workers: int = 2) -> list[Finding]:
        return machines.check_gpus(Request(run_config(runtime={"num_workers": workers, "use_gpu": use_gpu})), two)

    torch = two.machines[1].facts["torch"]
    assert levels(of(True)) == ["problem"] and levels(of(None)) == ["ok"]
    two.capacity = ClusterCapacity(FIXED.nodes, 1, (NodeType("spot-gpu", {"GPU": 1}, 2),))
    assert levels(of(True)) == levels(of(None)) == ["ok"] and "spot-gpu" in of(True)[0].value
    assert "spot-gpu" not in of(False)[0].value
    two.machines[1].facts["gpus"] = [{"name": "A10G", "memory": 1 << 34, "driver": "570"}]
    assert levels(of(None)) == ["warning"] and levels(of(True)) == ["problem"] and levels(of(False)) == ["ok"]
    assert "torch is built without CUDA" in of(True)[0].value
    torch["value"] = {"cuda": "12.8", "gpus": ["A10G"], "nccl": "2.27"}
    assert levels(of(None)) == ["ok"] and "driver 570, CUDA 12.8, NCCL 2.27" in of(None)[0].value
    torch["error"] = "NCCL adds up wrongly over 4 GPUs"
    assert "NCCL adds up wrongly" in of(None)[0].value and levels(of(None)) == ["problem"]


def test_faiss_of_nodes(two: Cluster) -> None:
    two.machines[1].facts["kmeans"] = {"value": None, "error": "undefined symbol", "remedy": ""}
    (finding,) = machines.check_faiss(two)
    assert finding.level == "problem" and "undefined symbol" in finding.value


@pytest.fixture
def sized(run_config: Callable[..., Config]) -> Sizes:
    sizes = Sizes()
    list(request.check_model(run_config(), sizes))
    return sizes


def test_memory_of_nodes(two: Cluster, run_config: Callable[..., Config], sized: Sizes) -> None:
    asked = Request(run_config(runtime={"num_workers": 4}))
    assert levels(machines.check_memory(asked, two, sized)) == ["ok"]
    two.machines[1].facts["memory"] = {"total": 4 << 30, "free": 3 << 30}
    found = machines.check_memory(asked, two, sized)
    assert levels(found) == ["warning"] and "4 of them" in found[0].value, "4 workers of 0.7 GiB"
    two.machines[1].facts["memory"] = {"total": 2 << 30, "free": 2 << 30}
    assert levels(machines.check_memory(asked, two, sized)) == ["problem"]
    two.machines[1].resources = {"CPU": 1.0}
    assert levels(machines.check_memory(asked, two, sized)) == ["ok"], "one worker is there"


def test_memory_of_what_drives_trials(two: Cluster, run_config: Callable[..., Config]) -> None:
    two.driver["memory"] = {"total": 16 << 30, "free": 15 << 30}
    asked = Request(run_config(runtime={"num_workers": 2}), study=True, concurrent=4)
    assert levels(machines.check_driver_memory(asked, two)) == ["ok"]
    assert levels(machines.check_driver_memory(replace(asked, concurrent=10), two)) == ["warning"]
    (finding,) = machines.check_driver_memory(replace(asked, concurrent=16), two)
    assert finding.level == "problem" and "concurrent_trials to 12 at most" in finding.remedy
    assert levels(machines.check_driver_memory(replace(asked, concurrent=12), two)) != ["problem"], "the remedy"
    assert machines.check_driver_memory(replace(asked, study=False), two) == []


def test_memory_of_gpus(two: Cluster, run_config: Callable[..., Config], sized: Sizes) -> None:
    asked = Request(run_config(runtime={"num_workers": 2, "use_gpu": True}))
    assert "no GPU is up" in machines.check_memory(asked, two, sized)[0].value
    two.machines[0].facts["gpus"] = [{"name": "A10G", "memory": 24 << 30, "driver": "570"}]
    assert levels(machines.check_memory(asked, two, sized)) == ["ok"]
    two.machines[0].facts["gpus"][0]["memory"] = 3 << 30
    shared = replace(asked, study=True, concurrent=4, shared_by=4)
    (finding,) = machines.check_memory(shared, two, sized)
    assert finding.level == "problem" and "4 of them on a GPU" in finding.value
    assert levels(machines.check_memory(replace(shared, shared_by=1), two, sized)) == ["ok"]
    two.machines[1].facts["gpus"] = [{"name": "MX", "memory": 1 << 29, "driver": "570"}]
    (finding,) = machines.check_memory(asked, two, sized)
    assert finding.level == "problem" and "of GPU memory" in finding.value


def test_disk_of_nodes(two: Cluster, run_config: Callable[..., Config], sized: Sizes) -> None:
    asked = Request(run_config())
    assert levels(machines.check_disk(asked, two, sized)) == ["ok"]
    assert sized.model is not None
    much = Request(run_config(runtime={"keep": 10**9}))
    (finding,) = machines.check_disk(much, two, sized)[:1]
    assert (
        finding.level == "problem"
        and "1000000000 + 1 checkpoints" in finding.value
        and "runtime.keep" in finding.remedy
    )
    sized.text_bytes = 1 << 40
    (finding,) = machines.check_disk(asked, two, sized)[:1]
    assert finding.level == "problem" and "2,560.0 GiB of prepared text" in finding.value
    sized.text_bytes = None
    two.machines[0].facts["directories"]["runtime.storage_path"]["free"] = 1000
    assert levels(machines.check_disk(asked, two, sized)) == ["problem"]
