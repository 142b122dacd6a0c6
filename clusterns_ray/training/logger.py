"""What a run records and says: ``metrics.jsonl``, trackers, and events for its caller. Worker 0 alone does."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from clusterns_ray import distributed
from clusterns_ray.io.events import Evaluated, OnEvent, StepLogged, notes_to
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.metrics import MetricsLog
from clusterns_ray.training.trackers import Trackers


class RunLogger:
    """Silent on workers but the first, so that all of them may call it."""

    def __init__(self, context: RunContext, on_event: OnEvent) -> None:
        self.context = context
        self.is_main = distributed.rank() == 0
        self.event: OnEvent = on_event if self.is_main else lambda event: None
        """Passes an event on to the caller of the run."""
        self.note = notes_to(self.event)
        self.metrics: MetricsLog | None = None
        self.trackers = Trackers()
        self._last_step, self._last_time = 0, time.perf_counter()

    def open(self, step: int | None) -> None:
        """Open the files of the run.

        Args:
            step: that of the checkpoint the run resumes from, after which all is recorded anew; None without one.
        """
        self._last_step, self._last_time = step or 0, time.perf_counter()
        if not self.is_main:
            return
        self.metrics = MetricsLog(self.context.run_dir / "metrics.jsonl", -1 if step is None else step)
        if self.metrics.damaged:
            self.note(f"metrics.jsonl was damaged: {self.metrics.damaged} of its lines are lost. Weights are whole.")
        self.trackers.begin(self.context.config, self.context.run_dir, step or 0, self.note)

    def log_step(self, step: int, batch_size: int, values: dict[str, Any]) -> None:
        """Record a step.

        Args:
            batch_size: sentences of a step, for the speed since the last record.
        """
        now = time.perf_counter()
        sentences = (step - self._last_step) * batch_size
        speed = round(sentences / (now - self._last_time), 2)
        self._last_step, self._last_time = step, now
        self.record(StepLogged(step, values["loss"], speed, {"step": step, **values, "sentences_per_second": speed}))

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leave the time that is spent within out of the speed of steps."""
        began = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - began

    def close(self) -> None:
        self.trackers.close()

    def record(self, event: StepLogged | Evaluated) -> None:
        """Write the record of an event to the run's files and trackers, and pass the event on."""
        if self.metrics is not None:
            self.metrics.append(event.record)
            self.trackers.log(event.record)
        self.event(event)
