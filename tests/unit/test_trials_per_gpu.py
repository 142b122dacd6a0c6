"""``trials_per_gpu: auto``: how many trials share a GPU, and who says so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from clusterns_ray.launch.capacity import ClusterCapacity
from clusterns_ray.launch.estimates import model_size, step_memory
from clusterns_ray.ops.doctor import machines
from clusterns_ray.ops.doctor.examine import read_request
from clusterns_ray.ops.doctor.machines import Cluster, Machine
from clusterns_ray.ops.doctor.request import Sizes
from clusterns_ray.tuning import packing, resources
from clusterns_ray.tuning.job import GpuShare
from clusterns_ray.tuning.optuna_study import PER_GPU, OptunaStudy, workers_held
from clusterns_ray.tuning.packing import GIB, SHARE, choose_trials_per_gpu, largest_trial, trial_bytes
from clusterns_ray.tuning.study import Study, load_study

SPACE = {
    "clustering.num_clusters": {"type": "choice", "choices": [4, 0]},
    "encoder.max_length": {"type": "int", "low": 16, "high": 48},
    "train.global_batch_size": {"type": "int", "low": 16, "high": 64, "step": 16},
    "train.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
}
AUTO: dict[str, Any] = {"trials_per_gpu": "auto", "concurrent_trials": 8}
ONE_GPU = ClusterCapacity(({"CPU": 16.0, "GPU": 1.0},))


@pytest.fixture(scope="module")
def study(write_study: Callable[..., Path]) -> Study:
    return load_study(write_study(space=SPACE, **AUTO))


def test_the_trial_that_needs_the_most(study: Study) -> None:
    need, overrides = largest_trial(study)
    ends = {name: parameter.ends() for name, parameter in study.space.parameters.items()}
    assert need == max(trial_bytes(study.space.config(point), gpu=True) for point in study.space.points(ends))
    assert overrides == {"encoder.max_length": 48, "train.global_batch_size": 64}, "these alone, over the base"
    config = study.space.config(overrides)
    assert need == step_memory(model_size(config), config, 1, gpu=True)["total"], "as `clusterns plan` has it"


@pytest.mark.parametrize(
    ("fits", "nodes", "number", "why"),
    [
        (3.5, ONE_GPU, 3, "90% of the smallest GPU's "),
        (99, ONE_GPU, 8, "no more run at a time (concurrent_trials)"),
        (99, ClusterCapacity(({"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0})), 4, "no more CPUs beside a GPU"),
        (99, ClusterCapacity(({"CPU": 2.0},)), 8, "concurrent_trials"),
        (0.5, ONE_GPU, 1, "not even one fits"),
    ],
)
def test_as_many_as_fit(
    study: Study, monkeypatch: pytest.MonkeyPatch, fits: float, nodes: ClusterCapacity, number: int, why: str
) -> None:
    need = 3 * GIB
    monkeypatch.setattr(packing, "largest_trial", lambda study: (need, {"train.global_batch_size": 64}))
    chosen, reason = choose_trials_per_gpu(study, int(fits * need / SHARE), nodes)
    assert chosen == number and why in reason
    assert f"auto is {number}, as a trial with train.global_batch_size 64 needs at most 3.0 GiB of GPU memory" in reason


@pytest.mark.parametrize("gpu", [True, False])
def test_a_sweep_chooses_when_it_has_its_cluster(study: Study, monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    need, _ = largest_trial(study)
    monkeypatch.setattr(resources, "connect", lambda *_, **__: nullcontext())
    monkeypatch.setattr(resources, "check_workers", lambda *_, **__: gpu)
    monkeypatch.setattr(resources, "cluster_capacity", lambda: ONE_GPU)
    monkeypatch.setattr(resources, "least_gpu_memory", lambda timeout_s: int(4.1 * need / SHARE))
    notes: list[str] = []
    with resources.cluster(study, notes.append, begun=False) as share:
        assert share == GpuShare(gpu, 4 if gpu else 1)
        assert resources.trial_resources(study, share) == {"CPU": 1.0, **({"GPU": 0.25} if gpu else {})}
    assert [note.split(",")[0] for note in notes] == ["trials_per_gpu: auto is 4"] * gpu


def test_worker_hours_count_the_part_that_was_chosen(study: Study) -> None:
    optuna_study = OptunaStudy(study)
    assert workers_held(study.config, optuna_study.optuna) == 1
    optuna_study.remember(PER_GPU, 4)
    assert workers_held(study.config, OptunaStudy(study).optuna) == 0.25


def test_the_doctor_says_what_a_sweep_would_choose(write_study: Callable[..., Path]) -> None:
    asked = read_request(write_study(space=SPACE, **AUTO), ["runtime.use_gpu=true"], load_study)
    need, _ = largest_trial(load_study(write_study(space=SPACE, **AUTO)))
    cluster = Cluster({}, [Machine("one", facts={"gpus": []})], ONE_GPU)
    sizes = Sizes(model_size(asked.config))
    assert "none is" in machines.check_sharing(asked, cluster, sizes)[1][0].value
    cluster.machines[0].facts["gpus"] = [{"name": "A10G", "memory": int(2.2 * need / SHARE), "driver": "570"}]
    chosen, (finding,) = machines.check_sharing(asked, cluster, sizes)
    assert chosen.shared_by == 2 and finding.level == "ok" and finding.value.startswith("auto is 2, as a trial with")
    (memory,) = machines.check_memory(chosen, cluster, sizes)
    assert "2 of them on a GPU" in memory.value
    on_cpus = read_request(write_study(space=SPACE, **AUTO), (), load_study)
    assert "auto is 1" in machines.check_sharing(on_cpus, cluster, sizes)[1][0].value
