"""Runs in half precision, and which precision a run takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import quick_first
from training_runs import CPU, Killed, Lab, kill_at, weights

from clusterns_ray.config import TrainConfig
from clusterns_ray.data.prepare import prepare
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.metrics import read_metrics
from clusterns_ray.training.parts import TrainingParts
from clusterns_ray.training.precision import agreed_precision
from clusterns_ray.training.validation import DevSet


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(lab: Lab, tmp_path: Path, precision: str) -> None:
    records = {}
    for name in ("fp32", precision):
        lab.run(tmp_path / name, lab.config(train={"precision": name}, evaluation={"sts": None}))
        records[name] = read_metrics(tmp_path / name / "metrics.jsonl")
        tensors = weights(tmp_path / name, 6)
        assert all(value.dtype == torch.float32 for key, value in tensors.items() if value.is_floating_point()), name
        assert all(value.isfinite().all() for value in tensors.values())
    losses = {name: [record["loss"] for record in found] for name, found in records.items()}
    assert losses[precision][0] == pytest.approx(losses["fp32"][0], rel=0.01)
    assert losses[precision][0] != losses["fp32"][0], "it was computed in fp32"
    skipped = [record["skipped_steps"] for record in records[precision]]
    if precision == "bf16":
        assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05) and skipped == [0] * 6
    else:  # the first scales are too large for these gradients; it settles
        assert skipped[-1] == skipped[-2] < 5 and records[precision][-1]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False, "avx2": True}, "fp32")],
)
def test_auto_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert agreed_precision("auto", CPU) == expected
    assert agreed_precision("fp32", CPU) == "fp32" and agreed_precision("bf16", CPU) == "bf16"


def test_auto_precision_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert agreed_precision("auto", CPU) == "fp32"


@pytest.mark.slow
@pytest.mark.parametrize("began", quick_first([True, False], 1))
def test_a_resumed_run_keeps_its_precision(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: bool
) -> None:
    """What the first machine chose stays, on one that would choose otherwise."""
    config = lab.config(train={"precision": "auto"}, evaluation={"sts": None})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": began})
    whole = lab.run(tmp_path / "whole", config)
    with pytest.raises(Killed):
        lab.run(tmp_path / "halves", config, on_event=kill_at(4))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not began})
    halves = lab.run(tmp_path / "halves", config)
    assert whole["precision"] == halves["precision"] == ("bf16" if began else "fp32")
    ours, theirs = weights(tmp_path / "halves", 6), weights(tmp_path / "whole", 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert began == any("only emulates" in note for note in lab.notes)


@pytest.mark.parametrize("began", quick_first(["all_reduce", "tree"], 1))
def test_a_resumed_run_keeps_its_reduction(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: str
) -> None:
    """What ``auto`` was on the machine that began stays, on one where it is the other."""
    config = lab.config(evaluation={"sts": None})
    monkeypatch.setattr(TrainConfig, "adds_in_tree", lambda self, gpu: began == "tree")
    whole = lab.run(tmp_path / "whole", config)
    with pytest.raises(Killed):
        lab.run(tmp_path / "halves", config, on_event=kill_at(4))
    monkeypatch.setattr(TrainConfig, "adds_in_tree", lambda self, gpu: began != "tree")
    halves = lab.run(tmp_path / "halves", config)
    environment = json.loads((tmp_path / "halves" / "environment.json").read_text())
    assert whole["reduction"] == halves["reduction"] == environment["reduction"] == began
    ours, theirs = weights(tmp_path / "halves", 6), weights(tmp_path / "whole", 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_dev_set_is_encoded_in_the_precision_of_training(lab: Lab, tmp_path: Path, precision: str) -> None:
    config = lab.config(train={"precision": precision})
    prepared = prepare(config)
    run = TrainingParts(RunContext(config, prepared.tokens_dir, prepared.sts_dir, tmp_path), CPU)
    dev = DevSet(str(prepared.sts_dir), config.evaluation.dev, run.encoder)
    found = dev.encode(run.encoder)
    run.encoder.save(tmp_path / "model")
    finished = Encoder.load(tmp_path / "model")
    finished.max_length = run.encoder.max_length
    texts = dev.pairs.sentences()
    np.testing.assert_allclose(found, finished.encode(texts, bf16=precision == "bf16"), atol=1e-6)
    error = np.abs(found - finished.encode(texts)).max()
    assert (error < 1e-6) if precision == "fp32" else (1e-4 < error < 0.05)
