"""What a person sees of a study: a table on a terminal, plain lines elsewhere, and the same from another terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from clusterns_ray.console.progress import Lines, View, clock, describe_trial, show_values
from clusterns_ray.errors import DamagedError
from clusterns_ray.io.events import Event, Note
from clusterns_ray.io.files import is_locked
from clusterns_ray.io.terminal import printable
from clusterns_ray.tuning.analysis import STATES, Trial, front, read_trial
from clusterns_ray.tuning.comparison import paired, seed_interval
from clusterns_ray.tuning.events import StudyChecked, TrialEvent
from clusterns_ray.tuning.objectives import show_cost
from clusterns_ray.tuning.optuna_study import enqueued_points, worker_hours, workers_held
from clusterns_ray.tuning.previous import about_earlier, begun, earlier_trials
from clusterns_ray.tuning.racing import merge_seeds
from clusterns_ray.tuning.result import study_lines
from clusterns_ray.tuning.selection import check_result
from clusterns_ray.tuning.study_file import FILES, read_optuna_study, readable_directory

if TYPE_CHECKING:
    import optuna
    from rich.console import RenderableType

    from clusterns_ray.tuning.study import Study

ROWS = 12
"""Ended trials that the table shows: the best; those that run are all shown."""


@dataclass(frozen=True)
class Progress:
    """A study at one moment, read from its storage alone."""

    name: str
    rows: list[Trial]
    runs: int
    """the trials, and their runs with further seeds"""
    planned: int | None
    """how many of them the budget allows; None where it is in hours"""
    seconds: float
    """of the study, over all resumptions"""
    seconds_left: float | None
    """by the mean trial so far; None before the first has ended, and for budgets without end"""
    before: float | None
    """dev score of the untrained encoder; the best, where the space has several"""
    confirms: bool
    """whether the best configurations are run again with other seeds"""
    cost: float | None
    """of all runs by now; None without a price"""
    ended_by: str
    """why no further trial begins, in a sentence; empty while one does"""
    earlier: list[Trial]
    """of the studies under ``previous``"""
    about_earlier: list[str]
    """what has to be said of them"""
    minimize: str | None
    """what trials should take little of, besides a high score"""

    @property
    def best(self) -> Trial | None:
        return min((row for row in self.rows if row.state == "COMPLETE"), key=lambda row: row.order, default=None)

    def count(self, state: str) -> int:
        return sum(row.state == state for row in self.rows)


def read_progress(study: Study, optuna_study: optuna.Study) -> Progress:
    """How a study stands, with the time that its budget leaves by the mean trial so far."""
    runs, earlier = (list(map(read_trial, trials(optuna_study))) for trials in (begun, earlier_trials))
    rows = list(map(read_trial, merge_seeds(begun(optuna_study), study.base.seed)))
    attrs, budget, concurrent = optuna_study.user_attrs, study.config.budget, study.config.concurrent_trials
    seconds = attrs.get("seconds", 0.0)
    ended = [run.seconds for run in runs if run.state != "RUNNING"]
    left = []
    if budget.trials is not None and ended:
        mean = sum(ended) / len(ended)
        running = sum(run.seconds for run in runs if run.state == "RUNNING")
        left.append(max((budget.trials - len(ended)) * mean - running, 0.0) / concurrent)
    if budget.hours is not None:
        left.append(max(budget.hours * 3600 - seconds, 0.0))
    price = budget.price or 0.0
    hours = [budget.worker_hours, budget.cost and budget.cost / price]
    spent = worker_hours(study.config, optuna_study)
    left += [
        max(limit - spent, 0.0) * 3600 / workers_held(study.config, optuna_study) / concurrent
        for limit in hours
        if limit is not None
    ]
    before = max(attrs.get("scores_before", {}).values(), default=None)
    cost = worker_hours(study.config, optuna_study, confirmations=True) * price if price else None
    return Progress(
        study.config.name,
        rows,
        len(runs),
        budget.trials,
        seconds,
        min(left, default=None),
        before,
        study.confirms,
        cost,
        attrs.get("ended_by", ""),
        earlier,
        about_earlier(optuna_study),
        study.config.minimize,
    )


def render(progress: Progress) -> RenderableType:
    """A table of the trials that run and of the best that ended, with one line on the whole beneath it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"study {progress.name}")
    races = any(row.scores for row in progress.rows)
    memory, on_front = progress.minimize == "memory", front(progress.rows, progress.minimize)
    more = ("seeds", "beside the best") if races else ("memory",) if memory else ()
    for column in ("trial", "state", "dev", *more, "step", "time"):
        table.add_column(column, justify="left" if column == "state" else "right", no_wrap=True)
    table.add_column("settings")
    running = [row for row in progress.rows if row.state == "RUNNING"]
    ended = sorted(
        (row for row in [*progress.rows, *progress.earlier] if row.state != "RUNNING"),
        key=lambda row: row.order,
    )
    best = progress.best
    for row in [*running, *ended[:ROWS]]:
        table.add_row(
            row.name,
            "front" if row in on_front else "best" if row is best else _state(row),
            "" if row.score is None else f"{row.score:.2f}",
            *((str(len(row.scores) or ""), beside(row, best)) if races else ()),
            *((show_cost("memory", row.cost("memory")),) if memory else ()),
            "" if row.steps is None else str(row.steps),
            "" if row.study else clock(row.seconds),
            show_values(row.values),
            style="bold" if row is best else ("" if row.state in ("RUNNING", "COMPLETE") and not row.study else "dim"),
        )
    lines: list[RenderableType] = [table, Text(summary_line(progress))]
    if len(ended) > ROWS:
        lines.insert(1, Text(f"... and {len(ended) - ROWS} more that ended"))
    lines += [Text(f"trial {row.number} failed: {row.reason}") for row in progress.rows if row.state == "FAIL"][-3:]
    return Group(*lines, *map(Text, progress.about_earlier))


def _state(row: Trial) -> str:
    return "earlier" if row.study else row.race or STATES[row.state]


def beside(row: Trial, best: Trial | None) -> str:
    """The mean difference of a trial that races from the best, over the seeds of both, with its 95 % interval."""
    if best is None or row is best or not (differences := paired(row.scores, best.scores)):
        return ""
    mean, span = sum(differences) / len(differences), seed_interval(differences)
    return f"{mean:+.2f}" + (f" ({span['low']:+.2f} to {span['high']:+.2f})" if span else "")


def summary_line(progress: Progress) -> str:
    best, count = progress.best, len(progress.rows)
    parts = [
        f"{progress.runs}{f' of {progress.planned}' if progress.planned else ''} "
        + ("trials" if progress.runs == count else f"runs of {count} trials"),
        *(f"{progress.count(state)} {word}" for state, word in STATES.items() if progress.count(state)),
    ]
    if best is not None and best.score is not None:
        parts.append(f"best {best.score:.2f} of trial {best.number}{_beside_untrained(best.score, progress.before)}")
    parts.append(f"{clock(progress.seconds)} spent")
    if progress.cost is not None:
        parts.append(f"cost {progress.cost:.2f}")
    if progress.seconds_left:
        then = ", before confirmation" if progress.confirms else ""
        parts.append(f"about {clock(progress.seconds_left)} left{then}")
    return ", ".join(parts) + (f". {progress.ended_by}" if progress.ended_by else "")


def _beside_untrained(score: float, before: float | None) -> str:
    if before is None:
        return ""
    if score > before:
        return f" ({score - before:+.2f} over the untrained encoder, {before:.2f})"
    return f" (NO BETTER than the untrained encoder, {before:.2f}: {score - before:+.2f})"


def study_view(study: Study) -> View:
    """An ``on_event`` callback for this process: :class:`LiveTable` if stdout is a terminal, else :class:`Lines`."""
    return LiveTable(study) if sys.stdout.isatty() else Lines()


class LiveTable(View):
    """The table, in place; notes scroll above it."""

    def __init__(self, study: Study) -> None:
        from rich.live import Live

        self.study = study
        self.live = Live(auto_refresh=False)
        self.confirming: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        from rich.console import Group
        from rich.text import Text

        match event:
            case Note(text):
                self.live.console.print(printable(text), highlight=False, markup=False)
            case TrialEvent(name) if "-seed" in name:
                self.confirming[name] = describe_trial(event)
            case StudyChecked(optuna_study):
                if not self.live.is_started:
                    self.live.start()
                table = render(read_progress(self.study, optuna_study))
                self.live.update(Group(table, *map(Text, self.confirming.values())), refresh=True)

    def close(self) -> None:
        self.live.stop()


def read_result(study: Study) -> dict[str, Any]:
    """What ``result.json`` of a finished study holds.

    Raises:
        DataError: it is damaged.
    """
    text = None
    with suppress(DamagedError):
        text = study.home.read("result.json")
    return check_result(text, (study.home / "result.json").address)


def show_status(study: Study) -> None:
    """Print how a study stands, from its storage alone.

    Raises:
        ConfigError: nothing has been written yet.
        DataError: ``result.json`` is damaged.
    """
    from rich.console import Console

    console, store = Console(highlight=False), study.home.store
    here, names = readable_directory(study.home), []
    if store is None:
        files = [*here.glob("*.json"), *here.glob("confirmation/*/result.json")]
        names = [path.relative_to(here).as_posix() for path in files]
    else:
        times = store.times()
        names = list(times)
        newest = max((time for name, time in times.items() if name in FILES.values()), default=None)
        if newest is not None:
            console.print(f"As of the snapshot of {datetime.fromtimestamp(newest):%H:%M:%S} in {store.address}.")
    optuna_study = read_optuna_study(here, study.config.name)
    console.print(render(read_progress(study, optuna_study)))
    waiting = enqueued_points(study.home, study.space, optuna_study, partial(console.print, markup=False))
    if waiting:
        console.print(f"Enqueued, and tried next: {len(waiting)} {'point' if len(waiting) == 1 else 'points'}.")
    confirming = [name for name in names if name.startswith("confirmation/") and name.endswith("/result.json")]
    base = sum(name.startswith("confirmation/base-") for name in confirming)
    if len(confirming) > base:
        console.print(f"{len(confirming) - base} confirming runs finished.")
    if base:
        console.print(f"The base configuration was run {'once' if base == 1 else f'with {base} seeds'}.")
    if "result.json" in names:
        for line in study_lines(read_result(study)):
            console.print(line, soft_wrap=True, markup=False)
    elif store is None and not is_locked(here / ".lock"):
        console.print("No process of this machine runs the study now; the command without --status goes on with it.")
    for name, text in (("result.json", "Finished"), ("final.json", "Finalized")):
        if name in names:
            console.print(f"{text}: {(study.home / name).address}", soft_wrap=True)
