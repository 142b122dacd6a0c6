"""What a person sees of work that takes its time: a bar on a terminal, plain lines elsewhere.

Both are ``on_event`` callbacks, and pass over events that they do not know.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self, TextIO

from clusterns_ray.io.events import Evaluated, Event, Note, RowsDone, RunDone, RunStarted, StepLogged
from clusterns_ray.io.terminal import printable
from clusterns_ray.tuning.events import TrialBegan, TrialEvent, TrialFailed, TrialScored

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY_S = 5.0
"""Seconds between two lines on the rows that are done."""
DOING = {"tokenised": "tokenising", "encoded": "encoding", "indexed": "indexing"}
"""What has been done to rows, and the work that does it."""


class View(ABC):
    """An ``on_event`` callback that shows events to a person, for the length of a ``with`` block."""

    @abstractmethod
    def __call__(self, event: Event) -> None:
        """Show one event."""

    def close(self) -> None:  # noqa: B027  (most views draw nothing in place)
        """End what is drawn in place."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def progress_view(stream: TextIO | None = None) -> View:
    """Show events as they happen: as a bar on a terminal, as plain lines in a notebook, a file or a pipe.

    >>> with progress_view() as on_event:
    ...     train(config, on_event)

    Args:
        stream: where to write; stdout if not given.
    """
    return Bar(stream) if (stream or sys.stdout).isatty() else Lines(stream)


class Lines(View):
    """One line an event, for logs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self.total_steps = self.first_step = self.clusters = 0
        self.before: float | None = None
        self.started = self.last = time.monotonic()

    def __call__(self, event: Event) -> None:
        text = self.describe(event)
        if text:
            print(printable(text), file=self.stream, flush=True)

    def describe(self, event: Event) -> str | None:
        """An event as a line; None where it is not worth one."""
        match event:
            case Note(text):
                return text
            case RowsDone():
                if time.monotonic() - self.last < EVERY_S:
                    return None
                self.last = time.monotonic()
                of = f" of {event.total:,}" if event.total else ""
                return "  ".join([f"  {event.rows:,}{of} sentences {event.what}", *speed(event)])
            case TrialEvent():
                return describe_trial(event)
            case RunStarted():
                self.total_steps, self.first_step, self.started = event.total_steps, event.step, time.monotonic()
                self.clusters, self.before = event.num_clusters, event.score_before
                where = f" from step {event.step}" if event.step else ""
                return f"Training{where}: {event.total_steps} steps over {event.rows:,} sentences."
            case StepLogged(step):
                facts = "  ".join(f"{name} {value}" for name, value in step_facts(event, self.clusters).items())
                return f"step {step}/{self.total_steps}  {facts}  {self.time_left(step)} left"
            case Evaluated(step, score):
                if step == 0:
                    self.before = score
                also = "".join(f"  {name} {value}" for name, value in also_scores(event).items())
                return f"step {step}  {evaluation_text(event, self.before)}{also}"
        return None

    def time_left(self, step: int) -> str:
        done = step - self.first_step
        return clock((time.monotonic() - self.started) / max(done, 1) * (self.total_steps - step))


def clock(seconds: float) -> str:
    """``1:05``, ``1:02:05``"""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def speed(event: RowsDone) -> list[str]:
    """Sentences a second, and the time left, where they are known."""
    parts = [f"{event.sentences_per_second:,.0f} sentences/s"] if event.sentences_per_second else []
    return parts + ([f"{clock(event.seconds_left)} left"] if event.seconds_left is not None else [])


def show_values(values: Mapping[str, Any]) -> str:
    """Keys without their section, so that a narrow terminal holds them."""
    from clusterns_ray.tuning.comparison import show_value

    return "  ".join(f"{key.rpartition('.')[2]} {show_value(value)}" for key, value in values.items())


def describe_trial(event: TrialEvent) -> str:
    """What has become of a trial, with the time of day."""
    trial = f"{datetime.now():%H:%M:%S}  {event.name}"
    match event:
        case TrialBegan():
            return f"{trial} begins  {show_values(event.overrides)}"
        case TrialScored(state="evaluated"):
            return f"{trial}   step {event.step}  dev {event.score:.2f}"
        case TrialScored():
            return f"{trial} {event.state} at step {event.step} with dev {event.score:.2f}"
        case TrialFailed():
            return f"{trial} failed: {event.reason}"
    return trial


def step_facts(event: StepLogged, clusters: int = 0) -> dict[str, str]:
    """The figures of a logged step, by name."""
    record, facts = event.record, {"loss": f"{event.loss:.4f}"}
    if "clusters_used" in record:
        facts["clusters"] = f"{record['clusters_used']}" + (f"/{clusters}" if clusters else "")
        facts["false neg."] = f"{100 * record['false_negative_rate']:.1f} %"
    facts["sent/s"] = f"{event.sentences_per_second:,.0f}"
    if record.get("skipped_steps"):
        facts["steps skipped (gradient not finite)"] = str(record["skipped_steps"])
    return facts


def evaluation_text(event: Evaluated, before: float | None) -> str:
    """A dev score, and how it compares: with the best, and with that of the untrained encoder (``before``)."""
    score = event.score
    if event.step == 0:
        return f"dev {score:.2f} before training"
    if event.best:
        return f"dev {score:.2f}  (best so far)"
    return f"dev {score:.2f}" + (f"  (untrained: {before:.2f})" if before is not None and score <= before else "")


def also_scores(event: Evaluated) -> dict[str, str]:
    """An evaluation's scores on the sets that select nothing, by the name of the set."""
    also = {key.removeprefix("also "): score for key, score in event.record.items() if key.startswith("also ")}
    return {name: f"{score:.2f}" for name, score in also.items() if score is not None}


class Bar(View):
    """A live view: a bar with the time left, and beneath it the newest figures; notes scroll above them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(file=stream)
        self.live: Live | None = None
        self.progress: Progress | None = None
        self.doing = ""
        self.clusters = 0
        self.facts: dict[str, str] = {}
        self.dev: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case Note(text):
                self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
            case RowsDone():
                if self.doing != event.what:
                    self._begin(event.what, event.total, 0)
                self.facts = dict.fromkeys(speed(event), "")
                self._update(event.rows)
            case RunStarted():
                self.clusters = event.num_clusters
                self._begin("training", event.total_steps, event.step)
            case StepLogged(step):
                self.facts = step_facts(event, self.clusters)
                self._update(step)
            case Evaluated(step):
                score = f"{event.score:.2f}"
                if step == 0:
                    self.dev = {"dev before": score}
                else:
                    self.dev["dev"] = score
                    if event.best:
                        self.dev["best"] = f"{score} at step {step}"
                self.dev |= also_scores(event)
                self._update(step)
            case RunDone():
                self.close()

    def view(self) -> Any:
        """The bar, and the figures that are known, as many in a line as fit."""
        from rich.console import Group
        from rich.text import Text

        shown = {**self.facts, **self.dev}
        facts = [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in shown.items()]
        assert self.progress is not None
        return Group(self.progress, Text("   ").join(facts)) if facts else self.progress

    def _begin(self, doing: str, total: int | None, completed: int) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.close()
        training = doing == "training"
        columns = [TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeRemainingColumn(), TextColumn("left")] if training else [TextColumn("sentences")]
        self.doing, self.facts, self.progress = doing, {}, Progress(*columns, console=self.console)
        self.progress.add_task(DOING.get(doing, doing), total=total, completed=completed)
        self.live = Live(get_renderable=self.view, console=self.console, refresh_per_second=4, transient=not training)
        self.live.start()

    def _update(self, completed: int) -> None:
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=completed)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = self.progress = None
            self.doing = ""
