"""Gradients, weights and embeddings that are NaN or infinite: what is skipped, and what ends a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tiny_model
from training_runs import Lab, weights

from clusterns_ray.errors import NonFiniteError
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.training.checkpoint import list_checkpoints
from clusterns_ray.training.metrics import read_metrics
from clusterns_ray.training.optim import Optimizer


def test_one_bad_gradient_is_skipped_and_counted(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = Optimizer.scale, []

    def scale(self: Optimizer, loss: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return original(self, loss * math.nan if len(count) == 2 else loss)

    monkeypatch.setattr(Optimizer, "scale", scale)
    result = lab.run(tmp_path, lab.config(evaluation={"every_steps": 1}, train={"max_steps": 4}))
    assert result["steps"] == 4
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 1]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    states = [weights(tmp_path, step) for step in (1, 2, 3)]
    encoders = [{k: v for k, v in state.items() if k.startswith("encoder.")} for state in states]
    assert all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0]) and len(encoders[0]) > 20
    assert any(not torch.equal(encoders[1][name], encoders[2][name]) for name in encoders[1])


# The first step whose gradient is bad, what is changed of the run, and what is said of its end.
ENDS: dict[str, tuple[int, dict[str, Any], str]] = {
    "ten in a row": (3, {"train": {"max_steps": 30, "epochs": 3}}, "last 10 gradients before step 12"),
    "seldom logged": (
        1,
        {"train": {"max_steps": 14, "epochs": 2}, "runtime": {"log_every_steps": 7}},
        "before step 14",
    ),
    "a short run": (1, {"train": {"max_steps": 3}}, "last 3 gradients before step 3"),
}


@pytest.mark.parametrize("case", ENDS)
def test_gradients_that_stay_bad_end_the_run(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    first, sections, said = ENDS[case]
    original, count = Optimizer.scale, []

    def scale(self: Optimizer, loss: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return original(self, loss * math.nan if len(count) >= first else loss)

    monkeypatch.setattr(Optimizer, "scale", scale)
    config = lab.config(**sections, evaluation={"sts": None})
    with pytest.raises(NonFiniteError, match=said) as caught:
        lab.run(tmp_path, config)
    for part in ("train.learning_rate (0.001)", "loss.temperature (0.05)", "fp32"):
        assert part in str(caught.value)
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "model").exists()
    if case == "ten in a row":
        assert len(count) == 12
        before, after = weights(tmp_path, 2), weights(tmp_path, 10)
        assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))
        assert all(value.isfinite().all() for value in after.values())


# ---- nothing that is not finite is kept ---------------------------------------------------------------------------


def assert_all_is_finite(run_dir: Path) -> None:
    """Every exported weight and every checkpoint."""
    for path in list_checkpoints(run_dir / "checkpoints"):
        assert all(value.isfinite().all() for value in weights(run_dir, int(path.name[-8:])).values())
    if (run_dir / "model").exists():
        state = Encoder.load(run_dir / "model").backbone.state_dict()
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize(("rate", "with_dev"), [(1e30, True), (1e25, False)])
def test_weights_that_leave_the_finite_end_the_run(lab: Lab, tmp_path: Path, rate: float, with_dev: bool) -> None:
    """In fewer steps than ten, and before any is logged."""
    every = {"log_every_steps": 50, "checkpoint_every_steps": 50}
    evaluation = {"every_steps": 50} | ({} if with_dev else {"sts": None})
    config = lab.config(train={"max_steps": 3, "learning_rate": rate}, evaluation=evaluation, runtime=every)
    with pytest.raises(NonFiniteError, match=r"Lower train\.learning_rate \(1e\+"):
        lab.run(tmp_path, config)
    assert not (tmp_path / "result.json").exists()
    assert (tmp_path / "model").exists() == with_dev, "the untrained encoder"
    assert_all_is_finite(tmp_path)
    with pytest.raises(NonFiniteError):  # given again, it is not taken for finished
        lab.run(tmp_path, config)


def test_an_encoder_that_is_not_finite_is_refused_before_training(lab: Lab, tmp_path: Path) -> None:
    damaged = make_tiny_model(tmp_path / "damaged", layers=2)
    model = Encoder.load(damaged)
    next(p for p in model.backbone.parameters() if p.ndim == 2).data[3, 1] = math.nan
    model.backbone.save_pretrained(damaged)
    config = lab.config(encoder={"name": str(damaged)})
    with pytest.raises(NonFiniteError, match=r"not finite \(NaN or infinity\): embeddings.word_embed"):
        lab.run(tmp_path / "run", config)
    assert not (tmp_path / "run" / "config.yaml").exists() and not (tmp_path / "run" / "model").exists()
