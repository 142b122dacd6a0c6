"""The copies of metrics.jsonl: TensorBoard's really read back; one that fails does not end a run."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

from clusterns_ray.config import Config, make_config
from clusterns_ray.errors import ConfigError
from clusterns_ray.launch.preflight import check_trackers
from clusterns_ray.training import trackers as module
from clusterns_ray.training.trackers import Trackers


def config(*names: str) -> Config:
    return make_config({"data": {"corpus": "x.txt"}, "runtime": {"trackers": list(names), "name": "tracked"}})


def warnings_of(names: tuple[str, ...], run_dir: Path, records: list[dict[str, Any]], step: int = 0) -> list[str]:
    """Run the trackers over some records; what they warned of."""
    warnings: list[str] = []
    trackers = Trackers()
    trackers.begin(config(*names), run_dir, step, warnings.append)
    for record in records:
        trackers.log(record)
    trackers.close()
    return warnings


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    records = [{"step": n, "loss": 1 / n, "best": True, "sizes": [1, 2], "bml": math.nan} for n in (1, 2, 3)]
    assert warnings_of(("tensorboard",), tmp_path, records) == []
    found = scalars(tmp_path)
    assert set(found) == {"loss", "best"}, "no step, no list, nothing that is not finite"
    assert found["loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_a_resumed_run_goes_on_in_the_same_chart(tmp_path: Path) -> None:
    warnings_of(("tensorboard",), tmp_path, [{"step": n, "loss": 10.0 + n} for n in (1, 2, 3, 4)])
    warnings_of(("tensorboard",), tmp_path, [{"step": n, "loss": 20.0 + n} for n in (3, 4)], step=2)
    assert scalars(tmp_path)["loss"] == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]


def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, config: Config, run_dir: Path, step: int):
            self.logged = 0

        def log(self, values: dict[str, float], step: int) -> None:
            self.logged += 1
            if step == 2:
                raise OSError("no network")
            assert step < 2, "it was asked again"

        def close(self) -> None:
            raise AssertionError("it was closed, though left out")

    monkeypatch.setitem(module.KINDS, "wandb", Broken)
    warnings = warnings_of(("wandb", "tensorboard"), tmp_path, [{"step": n, "loss": 1.0} for n in (1, 2, 3)])
    assert len(warnings) == 1 and "wandb is left out" in warnings[0] and "no network" in warnings[0]
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3]


def test_one_that_is_not_installed_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PACKAGES, "mlflow", "no_such_package_at_all")
    with pytest.raises(ConfigError, match="no_such_package_at_all is not installed"):
        check_trackers(config("tensorboard", "mlflow"))
    check_trackers(config("tensorboard"))
    check_trackers(config())
    with pytest.raises(ConfigError, match="trackers"):
        config("excel")


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert warnings_of(("wandb",), tmp_path, [{"step": n, "loss": 1 / n} for n in (1, 2)]) == []
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 1000


@pytest.mark.slow
def test_mlflow_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setattr(os, "environ", {**os.environ})
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert warnings_of(("mlflow",), tmp_path, [{"step": n, "loss": 1 / n} for n in (1, 2)]) == []
    assert warnings_of(("mlflow",), tmp_path, [{"step": 3, "loss": 1 / 3}], step=2) == []
    client = mlflow.MlflowClient()
    run_id = (tmp_path / "mlflow-run-id").read_text().strip()
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    run = client.get_run(run_id)
    assert run.data.params["loss.temperature"] == "0.05" and run.data.params["seed"] == "42"
    assert run.info.status == "FINISHED"
