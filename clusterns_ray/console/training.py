"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from clusterns_ray.io.terminal import printable

if TYPE_CHECKING:
    from rich.progress import Progress


def training_view():
    """An ``on_event`` callback for this process: :class:`Bar` if stdout is a terminal, else :class:`Lines`."""
    return Bar() if sys.stdout.isatty() else Lines()


class Lines:
    """One line an event, for logs."""

    def __init__(self) -> None:
        self.total_steps = 0
        self.started = time.monotonic()
        self.first_step = 0
        self.clusters = 0
        self.before: float | None = None
        self.last_tokenised = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        text = self.describe(event)
        if text:
            print(printable(text), flush=True)

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
            self.clusters, self.before = event["num_clusters"], event.get("sts_dev_before")
            where = f" from step {event['step']}" if event["step"] else ""
            return f"Training{where}: {event['total_steps']} steps over {event['rows']:,} sentences."
        if kind == "step":
            text = step_text(event, self.clusters)
            return f"step {event['step']}/{self.total_steps}  {text}  {self.time_left(event['step'])} left"
        if kind == "evaluation":
            if event["step"] == 0:
                self.before = event["sts_dev"]
            return f"step {event['step']}  {evaluation_text(event, self.before)}"
        return None

    def time_left(self, step: int) -> str:
        done = step - self.first_step
        seconds = (time.monotonic() - self.started) / max(done, 1) * (self.total_steps - step)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


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


def step_text(event: dict[str, Any], clusters: int = 0) -> str:
    return "  ".join(f"{name} {value}" for name, value in step_facts(event, clusters).items())


def evaluation_text(event: dict[str, Any], before: float | None) -> str:
    """A dev score, and how it compares: with the best, and with that of the untrained encoder (``before``)."""
    score = event["sts_dev"]
    if event["step"] == 0:
        return f"dev {score:.2f} before training"
    if event.get("best"):
        return f"dev {score:.2f}  (best so far)"
    return f"dev {score:.2f}" + (f"  (untrained: {before:.2f})" if before is not None and score <= before else "")


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

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console()
        self.live: Live | None = None
        self.progress: Progress | None = None
        self.clusters = 0
        self.facts: dict[str, str] = {}
        self.dev: dict[str, str] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "note":
            self.console.print(printable(event["text"]), highlight=False, markup=False)
        elif kind == "tokenised":
            if self.live is None:
                self._begin("tokenising", None, 0)
            self._update(event["rows"])
        elif kind == "start":
            self.close()
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

    def _begin(self, description: str, total: int | None, completed: int) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left" if total else "sentences"),
            console=self.console,
        )
        self.progress.add_task(description, total=total, completed=completed)
        self.live = Live(get_renderable=self.view, console=self.console, refresh_per_second=4)
        self.live.start()

    def _update(self, completed: int) -> None:
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=completed)

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = self.progress = None
