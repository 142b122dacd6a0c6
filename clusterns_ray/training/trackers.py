"""A copy of ``metrics.jsonl`` to TensorBoard, Weights & Biases or MLflow. The copy may fail; the run goes on.

The step of a record is its x-axis, and a resumed run goes on in the same charts.
"""

# pyright: reportMissingImports=false, reportMissingTypeStubs=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from clusterns_ray.config import Config, Plain
from clusterns_ray.io.events import OnNote

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""The Python package that each tracker needs."""


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``, for ``tensorboard --logdir STORAGE_PATH``."""

    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        # What came after the checkpoint that the run resumes from will come again. By themselves the names of event
        # files resolve only whole seconds.
        self.writer = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=step + 1 if step else None, filename_suffix=f".step-{step:08d}"
        )

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; project and login as wandb's own environment variables say."""

    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        import wandb

        self.run = wandb.init(
            project=None if wandb.Settings().project else "clusterns_ray",
            name=config.runtime.name,
            id=f"{config.runtime.name}-{config.fingerprint()}",
            resume="allow",
            config=config.resolved(),
            dir=str(run_dir),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """An MLflow run; server and experiment as MLflow's own environment variables say."""

    def __init__(self, config: Config, run_dir: Path, step: int) -> None:
        import mlflow

        self.client = mlflow.MlflowClient()
        file = run_dir / "mlflow-run-id"
        if file.is_file():
            self.run_id: str = file.read_text().strip()
            self.client.update_run(self.run_id, status="RUNNING")
            return
        experiment = mlflow.get_experiment_by_name("clusterns_ray")
        experiment_id = experiment.experiment_id if experiment else mlflow.create_experiment("clusterns_ray")
        self.run_id = self.client.create_run(experiment_id, run_name=config.runtime.name).info.run_id
        file.write_text(self.run_id + "\n")
        resolved: dict[str, Plain] = config.resolved()
        for section, fields in resolved.items():
            for name, value in fields.items() if isinstance(fields, Mapping) else [("", fields)]:
                self.client.log_param(self.run_id, f"{section}.{name}".rstrip("."), value)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run_id, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


KINDS: dict[str, Callable[[Config, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def missing_packages(names: Sequence[str]) -> list[str]:
    """Packages that the named trackers need and that are not installed here."""
    return [PACKAGES[name] for name in names if importlib.util.find_spec(PACKAGES[name]) is None]


class Trackers:
    """All trackers of a run; none until :meth:`begin`. One that fails is left out from then on, with a warning."""

    def __init__(self) -> None:
        self.open: dict[str, Tracker] = {}
        self.warn: OnNote = lambda text: None

    def begin(self, config: Config, run_dir: Path, step: int, warn: OnNote) -> None:
        """Open what ``runtime.trackers`` names; ``step`` is that of the checkpoint resumed from, or 0."""
        self.warn = warn
        for name in config.runtime.trackers:
            self._guarded(name, lambda name=name: self.open.update({name: KINDS[name](config, run_dir, step)}))

    def log(self, record: Mapping[str, Any]) -> None:
        """The numbers of one record of ``metrics.jsonl``."""
        values = {
            name: float(value)
            for name, value in record.items()
            if isinstance(value, (int, float)) and name != "step" and math.isfinite(value)
        }
        for name, tracker in list(self.open.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(values, record["step"]))

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            self._guarded(name, tracker.close)
        self.open = {}

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # each library raises what it likes, and none is worth a run
            self.open.pop(name, None)
            self.warn(f"{name} is left out from here on ({type(error).__name__}: {error}); metrics.jsonl has it all.")
