"""What the benchmarks compute from what they measure; and that each of them runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

import parts
import profile_step
import racing
import train_speed

from clusterns_ray.config import Config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.ops.plan.workload import encoder_work


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Caches of the runs are beneath the working directory."""
    monkeypatch.chdir(tmp_path)


def tiny_config(model: Path, corpus: Path, *settings: str) -> Config:
    return racing.step_config(
        layers=2,
        batch=16,
        corpus=str(corpus),
        precision="fp32",
        clusters=4,
        settings=[f"encoder.name={model}", *settings],
    )


def tiny_steps(config: Config, directory: Path) -> racing.ClusterNS:
    torch.manual_seed(5)
    return racing.ClusterNS(config, prepare(config).tokens_dir, directory)


# ---- ratios ---------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_true_ratio_nearly_as_often_as_they_say():
    draw = np.random.default_rng(0)
    held = clear = 0
    for _ in range(200):
        machine = draw.lognormal(sigma=0.1, size=15)  # slow rounds are slow for all
        ours, theirs = (value * machine * draw.lognormal(sigma=0.03, size=15) for value in (1.3, 1.0))
        found = racing.ratio(ours.tolist(), theirs.tolist())
        assert found.low <= found.value <= found.high
        held += found.low <= 1.3 <= found.high
        clear += found.low > 1
    assert held >= 180
    assert clear == 200


def test_a_race_gives_all_the_same_batches_and_leaves_the_first_round_out():
    seen: dict[str, list[list[int]]] = {"a": [], "b": []}

    def contestant(name: str) -> racing.Contestant:
        def contest(batches) -> float:
            seen[name].append(list(batches))
            return float(len(seen[name]))

        return contest

    assert racing.race({name: contestant(name) for name in seen}, rounds=3, steps=2) == {
        "a": [2.0, 3.0, 4.0],
        "b": [2.0, 3.0, 4.0],
    }
    assert seen["a"] == seen["b"] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_command_tells_no_place_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLUSTERNS_DATA", "/somewhere/data")
    monkeypatch.setattr(sys, "argv", ["/home/me/parts.py", "--corpus", "/somewhere/data/corpus/corpus.txt"])
    found = racing.environment("scikit-learn")
    assert found["command"][1:] == [
        "experiments/benchmarks/parts.py",
        "--corpus",
        "$CLUSTERNS_DATA/corpus/corpus.txt",
    ]
    assert {"torch", "scikit-learn"} <= found["versions"].keys()


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_kept_bytes_are_those_of_each_storage_once():
    x = torch.randn(10, 20, requires_grad=True)
    assert parts.kept_bytes(lambda: x.exp()) == 800  # its result
    assert parts.kept_bytes(lambda: (x * x).sum()) == 800  # x, twice
    assert parts.kept_bytes(lambda: x * x.detach().clone()) == 800  # x itself needs no gradient of the other
    assert parts.kept_bytes(lambda: (x @ torch.randn(20, 5)).tanh()) == 4 * (20 * 5 + 10 * 5)


@pytest.mark.slow
def test_the_largest_tensor_is_found_forward_and_backward():
    x = torch.randn(30, 2, requires_grad=True)
    assert parts.largest_bytes(lambda: x.detach().expand(9, 30, 2)) == 4 * 60  # nothing is copied
    assert parts.largest_bytes(lambda: x @ x.T) == 4 * 900
    assert parts.largest_bytes(lambda: x[0].sum().backward()) == 4 * 60


def test_the_loss_makes_no_tensor_beyond_rows_times_columns():
    batch, k, width = 256, 64, 32
    rows = batch // parts.WORKERS
    largest = parts.largest_bytes(parts.loss_work(batch, k, width))
    assert largest == 4 * rows * (batch + k)

    def broadcast() -> Tensor:
        z = torch.randn(rows, width)
        return torch.nn.functional.cosine_similarity(z[:, None], torch.randn(batch, width)[None], dim=-1)

    assert parts.largest_bytes(broadcast) >= 4 * rows * batch * width


# ---- the step's profile ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mlp", "none"])
def test_flops_of_a_packed_step_are_those_that_torch_counts(
    head: str, tiny_model: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tiny_config(tiny_model, corpus_file, f"encoder.head={head}")
    steps = tiny_steps(config, tmp_path)
    run = steps.run
    # Torch does not count what oneDNN multiplies, nor products that are written into a part of another tensor.
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[-1]}  # of shapes
    monkeypatch.setattr("clusterns_ray.models.packed_bert.onednn_multiplies", lambda dtype: False)
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        steps([1])
    work = encoder_work(config)
    flops = profile_step.step_flops(run, work, 1)
    assert flops.total == counter.get_total_flops()

    once = 12 * work.head * 16
    products = profile_step.linear_products(run, [1])
    assert sum(product.flops * times for product, times in products.items()) + once == flops.linear


def test_products_alone_are_multiplied_as_within_a_step():
    room = torch.randn(2, 12)
    product = profile_step.Product(3, 4, 2, "nt")
    expected = room[0].view(3, 4) @ room[1][:8].view(2, 4).T
    torch.testing.assert_close(profile_step.take(product, room), expected)
    product = profile_step.Product(4, 3, 2, "tn")
    expected = room[0].view(3, 4).T @ room[1][:6].view(3, 2)
    torch.testing.assert_close(profile_step.take(product, room), expected)


# ---- all of them, tiny ----------------------------------------------------------------------------------------------


def run_script(script, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", [script.__file__, *options, "--threads", "1", "--json", "found.json"])
    script.main()
    return json.loads(Path("found.json").read_text())


@pytest.mark.nightly
def test_profile_runs(corpus_file: Path, monkeypatch: pytest.MonkeyPatch):
    options = ["--layers", "1", "--batch", "8", "--clusters", "4", "--rounds", "1", "--steps", "1"]
    found = run_script(profile_step, monkeypatch, *options, "--corpus", str(corpus_file), "--precision", "bf16")
    shares = found["profile_seconds"]
    assert {profile_step.REST, "aten::gelu", "aten::embedding"} <= shares.keys()
    assert any(shares.get(name, 0) > 0 for name in profile_step.PRODUCTS)
    assert found["share_of_the_bound"] == pytest.approx(
        found["sentences_per_second"] / found["bound_sentences_per_second"]["bf16"]
    )


@pytest.mark.nightly
def test_parts_run(monkeypatch: pytest.MonkeyPatch):
    options = ["--only", "loss", "--batches", "16", "32", "--clusters", "0", "4", "32", "--rounds", "1"]
    found = run_script(parts, monkeypatch, *options)
    assert [(row["batch"], row["clusters"]) for row in found["loss"]] == [(16, 0), (16, 4), (32, 0), (32, 4), (32, 32)]
    assert "step" not in found


@pytest.mark.nightly
def test_parts_with_steps_run(corpus_file: Path):
    found = parts.whole_step(str(corpus_file), 1, batch=16, clusters=4, width=32, layers=1)
    alone = {name: entry["median"] for name, entry in found["objective"].items()}
    added = alone["ClusterNS, K 4"] - alone["SimCSE"]
    assert found["share of SimCSE's step"] == pytest.approx(added / found["steps"]["SimCSE"]["median"])


@pytest.mark.nightly
def test_the_check_of_a_gpu_runs_in_miniature_on_a_cpu(tmp_path: Path):
    """With losses that are the carried ones, and runs that repeat to the bit."""
    script = Path(racing.__file__).parents[1] / "gpu_check.py"
    command = [sys.executable, str(script), "--device", "cpu", "--small", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["problems"] == [] and found["step"]["clusterns_ray, 8 shards"]["utilisation"] > 0
    peers = [
        f"{name}, {precision}" for name in ("clusterns_ray", "sentence-transformers") for precision in ("fp32", "bf16")
    ]
    assert {*peers, "seconds of a million, bf16"} < found["encode"].keys()


@pytest.mark.nightly
def test_train_speed_runs(corpus_file: Path, monkeypatch: pytest.MonkeyPatch):
    options = ["--layers", "1", "--batch", "32", "--rounds", "2", "--steps", "1", "--corpus", str(corpus_file)]
    found = run_script(train_speed, monkeypatch, *options)
    assert len(found["medians"]) == 6
    ratio = found["ratios"]["clusterns_ray, fp32"]["plain loop, fp32"]
    ours, theirs = (found["sentences_per_second"][name] for name in ("clusterns_ray, fp32", "plain loop, fp32"))
    assert ratio["value"] == pytest.approx(sum(ours) / sum(theirs), rel=1e-3)  # two rounds: the median is the mean
