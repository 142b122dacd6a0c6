"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import TaskID


def progress_watch():
    """A ``watch`` for this process: :class:`Bar` if stdout is a terminal, else :class:`Lines`."""
    return Bar() if sys.stdout.isatty() else Lines()


class Lines:
    """One line an event, for logs."""

    def __init__(self) -> None:
        self.total_steps = 0
        self.started = time.monotonic()
        self.first_step = 0
        self.last_tokenised = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        text = self.describe(event)
        if text:
            print(text, flush=True)

    def close(self) -> None:
        pass

    def describe(self, event: dict[str, Any]) -> str | None:
        kind = event["event"]
        if kind == "note":
            return event["text"]
        if kind == "tokenised":
            if time.monotonic() - self.last_tokenised < 5:
                return None
            self.last_tokenised = time.monotonic()
            return f"  {event['rows']:,} sentences tokenised"
        if kind == "start":
            self.total_steps, self.first_step, self.started = event["total_steps"], event["step"], time.monotonic()
            where = f" from step {event['step']}" if event["step"] else ""
            return f"Training{where}: {event['total_steps']} steps over {event['rows']:,} sentences."
        if kind == "step":
            return f"step {event['step']}/{self.total_steps}  {step_text(event)}  {self.time_left(event['step'])} left"
        if kind == "evaluation":
            return f"step {event['step']}  {evaluation_text(event)}"
        return None

    def time_left(self, step: int) -> str:
        done = step - self.first_step
        seconds = (time.monotonic() - self.started) / max(done, 1) * (self.total_steps - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def step_text(event: dict[str, Any]) -> str:
    parts = [f"loss {event['loss']:.4f}", f"{event['sentences_per_second']:,.0f} sent/s"]
    if "clusters_used" in event:
        parts.insert(1, f"clusters {event['clusters_used']}")
    if event.get("skipped_steps"):
        parts.append(f"{event['skipped_steps']} steps skipped (gradient not finite)")
    return "  ".join(parts)


def evaluation_text(event: dict[str, Any]) -> str:
    if event["step"] == 0:
        return f"dev {event['sts_dev']:.2f} before training"
    return f"dev {event['sts_dev']:.2f}" + ("  (best so far)" if event.get("best") else "")


class Bar:
    """A rich progress bar with loss, dev score, sentences a second and time left; notes scroll above it."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.task: TaskID | None = None
        self.dev = ""
        self.text = ""

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "note":
            self.progress.console.print(event["text"], highlight=False, markup=False)
        elif kind == "tokenised":
            if self.task is None:
                self._begin("tokenising", None, 0)
            self._update(completed=event["rows"])
        elif kind == "start":
            self.close()
            self._begin("training", event["total_steps"], event["step"])
        elif kind == "step":
            self.text = step_text(event)
            self._update(completed=event["step"], text=f"{self.text}  {self.dev}")
        elif kind == "evaluation":
            self.dev = f"dev {event['sts_dev']:.2f}"
            self._update(text=f"{self.text}  {self.dev}")
        elif kind == "done":
            self.close()

    def _begin(self, description: str, total: int | None, completed: int) -> None:
        self.task = self.progress.add_task(description, total=total, completed=completed, text="")
        self.progress.start()

    def _update(self, **values: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, **values)

    def close(self) -> None:
        if self.task is not None:
            self.progress.stop()
            self.progress.remove_task(self.task)
            self.task = None
