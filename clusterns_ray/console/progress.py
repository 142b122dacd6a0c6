"""What a person sees of work that takes its time: a bar on a terminal, plain lines elsewhere.

Both are ``on_event`` callbacks. Events are those of training (``start``, ``step``, ``evaluation``, ``done``), of a
sweep (``trial``), of rows that are worked through (``tokenised``, ``encoded``, ``indexed``), and ``note``, a text.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

from clusterns_ray.io.terminal import printable

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY_S = 5.0
"""Seconds between two lines on the rows that are done."""
DOING = {"tokenised": "tokenising", "encoded": "encoding", "indexed": "indexing"}
"""Events that count rows, and what is being done to them."""


def progress_view(stream: TextIO | None = None) -> Lines | Bar:
    """:class:`Bar` if ``stream`` (stdout if not given) is a terminal, else :class:`Lines`."""
    return Bar(stream) if (stream or sys.stdout).isatty() else Lines(stream)


class Lines:
    """One line an event, for logs."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self.total_steps = self.first_step = self.clusters = 0
        self.before: float | None = None
        self.started = self.last = time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        text = self.describe(event)
        if text:
            print(printable(text), file=self.stream, flush=True)

    def close(self) -> None:
        pass

    def describe(self, event: dict[str, Any]) -> str | None:
        """An event as a line; None where it is not worth one."""
        kind = event["event"]
        if kind == "note":
            return event["text"]
        if kind in DOING:
            if time.monotonic() - self.last < EVERY_S:
                return None
            self.last = time.monotonic()
            of = f" of {event['total']:,}" if event.get("total") else ""
            return "  ".join([f"  {event['rows']:,}{of} sentences {kind}", *speed(event)])
        if kind == "trial":
            return describe_trial(event)
        if kind == "start":
            self.total_steps, self.first_step, self.started = event["total_steps"], event["step"], time.monotonic()
            self.clusters, self.before = event["num_clusters"], event.get("sts_dev_before")
            where = f" from step {event['step']}" if event["step"] else ""
            return f"Training{where}: {event['total_steps']} steps over {event['rows']:,} sentences."
        if kind == "step":
            facts = "  ".join(f"{name} {value}" for name, value in step_facts(event, self.clusters).items())
            return f"step {event['step']}/{self.total_steps}  {facts}  {self.time_left(event['step'])} left"
        if kind == "evaluation":
            if event["step"] == 0:
                self.before = event["sts_dev"]
            also = "".join(f"  {name} {score}" for name, score in also_scores(event).items())
            return f"step {event['step']}  {evaluation_text(event, self.before)}{also}"
        return None

    def time_left(self, step: int) -> str:
        done = step - self.first_step
        return clock((time.monotonic() - self.started) / max(done, 1) * (self.total_steps - step))


def clock(seconds: float) -> str:
    """``1:05``, ``1:02:05``"""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def speed(event: dict[str, Any]) -> list[str]:
    """Sentences a second, and the time left, where they are known."""
    parts = [f"{event['sentences_per_second']:,.0f} sentences/s"] if event.get("sentences_per_second") else []
    return parts + ([f"{clock(event['seconds_left'])} left"] if event.get("seconds_left") is not None else [])


def show_values(values: Mapping[str, Any]) -> str:
    """Keys without their section, so that a narrow terminal holds them."""
    from clusterns_ray.tuning.comparison import show_value

    return "  ".join(f"{key.rpartition('.')[2]} {show_value(value)}" for key, value in values.items())


def describe_trial(event: dict[str, Any]) -> str:
    """What has become of a trial, with the time of day."""
    name, what = f"{datetime.now():%H:%M:%S}  {event['id']}", event["what"]
    if what == "begins":
        return f"{name} begins  {show_values(event['values'])}"
    if what == "evaluated":
        return f"{name}   step {event['step']}  dev {event['score']:.2f}"
    if what == "failed":
        return f"{name} failed: {event['reason']}"
    return f"{name} {what} at step {event['step']} with dev {event['score']:.2f}"


def step_facts(event: dict[str, Any], clusters: int = 0) -> dict[str, str]:
    """What a logged step has to say, by name."""
    facts = {"loss": f"{event['loss']:.4f}"}
    if "clusters_used" in event:
        facts["clusters"] = f"{event['clusters_used']}" + (f"/{clusters}" if clusters else "")
        facts["false neg."] = f"{100 * event['false_negative_rate']:.1f} %"
    facts["sent/s"] = f"{event['sentences_per_second']:,.0f}"
    if event.get("skipped_steps"):
        facts["steps skipped (gradient not finite)"] = str(event["skipped_steps"])
    return facts


def evaluation_text(event: dict[str, Any], before: float | None) -> str:
    """A dev score, and how it compares: with the best, and with that of the untrained encoder (``before``)."""
    score = event["sts_dev"]
    if event["step"] == 0:
        return f"dev {score:.2f} before training"
    if event.get("best"):
        return f"dev {score:.2f}  (best so far)"
    return f"dev {score:.2f}" + (f"  (untrained: {before:.2f})" if before is not None and score <= before else "")


def also_scores(event: dict[str, Any]) -> dict[str, str]:
    """An evaluation's scores on the sets that select nothing, by the name of the set."""
    also = {key.removeprefix("also "): score for key, score in event.items() if key.startswith("also ")}
    return {name: f"{score:.2f}" for name, score in also.items() if score is not None}


def outcome_lines(result: dict[str, Any]) -> list[str]:
    """What came of a run, from its ``result.json``."""
    lines = []
    if result["stopped_early"]:
        lines.append(f"Training stopped early, after step {result['steps']} of {result['total_steps']}.")
    if result["sts_dev"] is None:
        return lines
    before, after = result["sts_dev_before"], result["sts_dev"]
    if result["best_step"]:
        step = f"at step {result['best_step']} of {result['steps']}"
        lines.append(
            f"{result['dev']} (Spearman x 100): {before:.2f} before, {after:.2f} {step} ({after - before:+.2f})."
        )
        for name, also in result.get("also", {}).items():
            lines.append(
                f"{name}, which selects nothing: {also['before']:.2f} before, {also['after']:.2f} at that step "
                f"({also['after'] - also['before']:+.2f}; 95 % interval {also['low']:+.2f} to {also['high']:+.2f})."
            )
        return lines
    trained = result["sts_dev_trained"]
    lines.append(
        f"{result['dev']} (Spearman x 100): {before:.2f} before, {trained:.2f} at best in {result['steps']} steps "
        f"({trained - before:+.2f})."
    )
    lines.append(
        "No step beat the untrained encoder, so model/ holds that one. Is the text of the dev set's kind? Try a lower "
        "train.learning_rate, or more text."
    )
    return lines


class Bar:
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

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "note":
            self.console.print(printable(event["text"]), highlight=False, markup=False, soft_wrap=True)
        elif kind in DOING:
            if self.doing != kind:
                self._begin(kind, event.get("total"), 0)
            self.facts = dict.fromkeys(speed(event), "")
            self._update(event["rows"])
        elif kind == "start":
            self.clusters = event["num_clusters"]
            self._begin("training", event["total_steps"], event["step"])
        elif kind == "step":
            self.facts = step_facts(event, self.clusters)
            self._update(event["step"])
        elif kind == "evaluation":
            score = f"{event['sts_dev']:.2f}"
            if event["step"] == 0:
                self.dev = {"dev before": score}
            else:
                self.dev["dev"] = score
                if event.get("best"):
                    self.dev["best"] = f"{score} at step {event['step']}"
            self.dev |= also_scores(event)
            self._update(event["step"])
        elif kind == "done":
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
