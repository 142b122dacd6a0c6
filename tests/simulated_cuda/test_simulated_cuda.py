"""Training, evaluation and encoding on a simulated CUDA device, where no GPU is.

All of it runs in one other process (see ``modes.py``), as the simulation changes torch for good. Where an operator gets
operands of two devices, the mode fails. The host may wait for the device in steps that are logged, evaluated or saved,
and in the one that starts clustering: no such step is looked at here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ALLOWED_WAITS = {
    "clusters have not started": ["a number is read, clustering/state.py"],  # the mean cosine, by which they start
}
MODES = [
    "plain",
    "mean, first centroids by K-means",
    "roberta, first_last",
    "prompts",
    "longer second prompt",
    "masked language modelling",
    "teacher, no clusters",
    "cached, fp16",
    "corpus",
    "clusters have not started",
    "neighbours",
    "crops",
    "12 layers, shards: 1",
    "12 layers, shards: 2",
    "12 layers, shards: 8",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def results(shared_directory: Path, made_once: Callable[[str, Callable[[], Any]], Any]) -> dict[str, Any]:
    """What ``modes.py`` recorded, by mode."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA, beside which none can be simulated")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++, which builds the simulated device, is not installed")
    directory = shared_directory / "simulated_cuda"

    def record() -> dict[str, Any]:
        directory.mkdir()
        library, home = directory / "device.so", Path(torch.__file__).parent
        link = [f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"]
        build = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", str(HERE / "device.cpp"), "-o", str(library)]
        subprocess.run([*build, f"-I{home / 'include'}", *link], check=True, timeout=300)
        path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": path}
        subprocess.run([sys.executable, HERE / "modes.py", directory], env=environment, check=True, timeout=800)
        return json.loads((directory / "results.json").read_text())

    return made_once("simulated_cuda", record)


def test_the_simulation_shows_what_it_is_for(results: dict[str, Any]) -> None:
    shown = results["read and mix"]
    assert "Expected all tensors to be on the same device" in shown["refused"]
    assert shown["launches"] == 1 and [count for _, count in shown["waits"].items()] == [1]


def recorded(results: dict[str, Any], mode: str) -> dict[str, Any]:
    assert "error" not in results[mode], results[mode]["error"]
    assert results[mode]["launches"] > 100, "nothing was done on the device"
    return results[mode]


@pytest.mark.parametrize("mode", MODES)
def test_training_runs_without_mixing_devices(results: dict[str, Any], mode: str) -> None:
    score = recorded(results, mode)["score"]
    assert score is None if "12 layers" in mode else -100 < score <= 100


@pytest.mark.parametrize("mode", MODES)
def test_the_host_does_not_wait_in_an_ordinary_step(results: dict[str, Any], mode: str) -> None:
    waits = recorded(results, mode)["waits"]
    allowed = ALLOWED_WAITS.get(mode, [])
    assert [place for place in waits if place.rsplit(":", 1)[0] not in allowed] == []
    assert all(count == 1 for count in waits.values())


def test_launches_of_a_step_of_twelve_layers(results: dict[str, Any]) -> None:
    """Whatever the number of shards: 54 a layer, and those of indices, masks, loss, clusters and optimiser."""
    one, two, eight = (recorded(results, f"12 layers, shards: {n}")["launches"] for n in (1, 2, 8))
    assert one == two == eight and one <= 960


def test_a_drained_run_is_resumed_to_the_bit(results: dict[str, Any]) -> None:
    resumed = recorded(results, "resume")
    assert resumed["tensors"] > 100 and resumed["differ"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_embeddings_are_those_of_the_cpu(results: dict[str, Any], model: str, precision: str) -> None:
    encoded = recorded(results, f"encode {model}, {precision}")
    assert encoded["difference"] <= (1e-5 if precision == "fp32" else 0.05)
    copies = [count for place, count in encoded["waits"].items() if place.startswith("it is copied to the host")]
    assert copies == [2], "one of each batch"
