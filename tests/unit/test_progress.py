"""What a person sees of a run: lines in a log, a live view on a terminal."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import pytest
from rich.console import Console

from clusterns_ray.console.progress import Bar, Lines, progress_view
from clusterns_ray.io.events import Evaluated, Event, Note, RowsDone, RunDone, RunStarted, StepLogged

START = RunStarted(step=0, total_steps=40, rows=1234, num_clusters=32)
BEFORE = Evaluated(0, 56.85, {})
EARLY = StepLogged(10, 0.5, 1234.5, {})
STEP = StepLogged(20, 0.12345, 91.2, {"clusters_used": 30, "false_negative_rate": 0.0421, "skipped_steps": 0})
BEST = Evaluated(20, 61.0, {}, best=True)
WORSE = Evaluated(30, 60.5, {})
ALARM = Note("Collapse at step 30: [all] alike")


@dataclass(frozen=True)
class Unknown(Event):
    """An event that a later version, or a user's own code, may send."""


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for event in (START, BEFORE, EARLY, STEP, BEST, WORSE, ALARM, RunDone({}), Unknown()):
        lines(event)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Training: 40 steps over 1,234 sentences."
    assert lines[1] == "step 0  dev 56.85 before training"
    assert lines[2].startswith("step 10/40  loss 0.5000  sent/s 1,234  ") and lines[2].endswith(" left")
    assert "loss 0.1235  clusters 30/32  false neg. 4.2 %  sent/s 91" in lines[3]
    assert lines[4:] == ["step 20  dev 61.00  (best so far)", "step 30  dev 60.50", "Collapse at step 30: [all] alike"]


def test_lines_say_that_steps_were_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines(START)
    lines(replace(EARLY, record={"skipped_steps": 2}))
    assert "steps skipped (gradient not finite) 2" in capsys.readouterr().out


def terminal(*events: Event, width: int = 100) -> tuple[Bar, str]:
    """The bar after some events, and what it shows."""
    bar = Bar()
    bar.console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    for event in events:
        bar(event)
    page = Console(file=io.StringIO(), width=width, color_system=None)
    if bar.progress is not None:
        page.print(bar.view())
    assert isinstance(page.file, io.StringIO)
    return bar, page.file.getvalue()


def test_the_live_view() -> None:
    bar, shown = terminal(START, BEFORE, EARLY, STEP, BEST, WORSE, Unknown())
    bar.close()
    flat = " ".join(shown.split())
    for fact in (
        "30/40",
        "loss 0.1235",
        "clusters 30/32",
        "false neg. 4.2 %",
        "sent/s 91",
        "dev 60.50",
        "dev before 56.85",
        "best 61.00 at step 20",
    ):
        assert fact in flat, fact


def test_a_note_stands_above_the_live_view_as_it_is() -> None:
    bar, _ = terminal(START, STEP, ALARM)
    bar.close()
    assert isinstance(bar.console.file, io.StringIO)
    assert "Collapse at step 30: [all] alike" in bar.console.file.getvalue()


def test_a_narrow_terminal_loses_nothing() -> None:
    bar, shown = terminal(START, BEFORE, STEP, BEST, width=40)
    bar.close()
    flat = " ".join(shown.split())
    assert "false neg. 4.2 %" in flat and "best 61.00 at step 20" in flat
    assert all(len(line) <= 40 for line in shown.splitlines())


def test_the_view_is_gone_when_the_run_is_done() -> None:
    bar, shown = terminal(RowsDone("tokenised", 5), START, STEP, RunDone({}))
    assert bar.live is None and bar.progress is None and shown == ""
    bar.close()


def test_no_terminal_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(progress_view(), Lines)
