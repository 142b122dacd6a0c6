"""Runs of a tiny encoder in this process, and what tests of the training loop ask of them.

The fixtures over them are in ``unit/conftest.py``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from helpers import make_tiny_model, sentences

from clusterns_ray.config import Config, make_config
from clusterns_ray.data.prepare import Prepared, prepare
from clusterns_ray.io.events import Evaluated, Event, Note, OnEvent, StepLogged
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.loop import train_worker

CPU = torch.device("cpu")
NO_SECONDS = {"seconds": 0, "checkpoint_seconds": 0, "checksum": ""}

PROMPT = 'this sentence of "{sentence}" means [MASK].'
SECOND_PROMPT = 'this sentence : "{sentence}" means [MASK].'
TWO_PROMPTS: dict[str, dict[str, Any]] = {
    "encoder": {"pooling": "mask", "prompt": PROMPT, "second_prompt": SECOND_PROMPT, "denoise": True}
}

Kind = TypeVar("Kind", bound=Event)


@dataclass
class Lab:
    """Makes configurations of tiny runs, and runs them."""

    base: dict[str, Any]
    prepared: Prepared
    events: list[Event] = field(default_factory=list)
    reports: list[Evaluated] = field(default_factory=list)

    def config(self, **sections: dict[str, Any]) -> Config:
        values: dict[str, Any] = copy.deepcopy(self.base)
        for name, section in sections.items():
            values.setdefault(name, {}).update(section)
        return make_config(values)

    def run(
        self,
        run_dir: Path,
        config: Config,
        on_event: OnEvent = lambda event: None,
        score_before: float | None = None,
    ) -> dict:
        self.events, self.reports = [], []

        def see(event: Event) -> None:
            self.events.append(event)
            on_event(event)

        run_dir.mkdir(parents=True, exist_ok=True)
        return train_worker(
            RunContext(
                config,
                prepare(config).tokens_dir,
                config.evaluation.sts,
                run_dir,
                command=("clusterns", "train", "x.yaml"),
            ),
            CPU,
            see,
            on_evaluation=self.reports.append,
            score_before=score_before,
        )

    def seen(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def notes(self) -> list[str]:
        return [note.text for note in self.seen(Note)]


@dataclass(frozen=True)
class WholeRun:
    """The undisturbed run of a module's configuration, for tests that only read what it left."""

    directory: Path
    result: dict[str, Any]
    lab: Lab


class Killed(BaseException):
    """What no handler of errors sees."""


def kill_at(step: int) -> OnEvent:
    def on_event(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == step:
            raise Killed

    return on_event


def write_documents(path: Path) -> Path:
    """Documents of five sentences each, blank lines between them."""
    lines = sentences(300)
    path.write_text("\n\n".join("\n".join(lines[i : i + 5]) for i in range(0, len(lines), 5)) + "\n")
    return path


def placed(sections: dict[str, dict[str, Any]], directory: Path) -> dict[str, dict[str, Any]]:
    """The sections of a case, with the teacher or the documents that they name made in ``directory``."""
    made = {
        "TEACHER": lambda: make_tiny_model(directory / "teacher", layers=1),
        "DOCUMENTS": lambda: write_documents(directory / "documents.txt"),
    }
    return {
        name: {key: str(made[value]()) if value in list(made) else value for key, value in section.items()}
        for name, section in sections.items()
    }


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that is a tensor in the checkpoint of a step."""
    state = torch.load(run_dir / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)
    found = {f"encoder.{name}": value for name, value in state["encoder"].items()}
    for number, values in state["optimizer"]["adamw"]["state"].items():
        found |= {f"adamw.{number}.{name}": value for name, value in values.items()}
    found["centroids"] = state["clustering"]["centroids_KD"]
    found["skipped"] = state["optimizer"]["skipped"]
    found |= {f"corpus.{name}": value for name, value in state.get("corpus", {}).items() if torch.is_tensor(value)}
    return found


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], least: int = 50) -> None:
    assert set(a) == set(b) and len(a) > least
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
