"""``clusterns status``: how a run or a study stands, from any machine, by what is in its directory or store alone."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from clusterns_ray.console.progress import clock
from clusterns_ray.io.files import is_locked
from clusterns_ray.io.lease import STALE_S, claims
from clusterns_ray.io.object_store import Store, is_url
from clusterns_ray.report.places import source
from clusterns_ray.report.record import RunRecord, number, read_run
from clusterns_ray.training.result import outcome_lines

SILENT_S = 3 * STALE_S
"""A claim whose heartbeat is older is of a process that is gone; clocks of machines may differ by seconds."""


def show_status(place: str) -> None:
    """Print how the run or the study at ``place`` stands.

    Args:
        place: ``STORAGE_PATH/NAME``, a directory or a URL.

    Raises:
        ConfigError: it is neither a run nor a study.
        DataError: a file of it is damaged.
        StorageError: the store cannot be read.
    """
    directory, address = source(place)
    if (directory / "study.yaml").is_file():
        from clusterns_ray.console.study import show_status as show_study
        from clusterns_ray.tuning.study import saved_study

        show_study(saved_study(directory, place))
        return
    run = read_run(directory, address)
    for line in [f"Run {run.name} in {address or directory}", *run_lines(run, Store(place) if is_url(place) else None)]:
        print(line)


def run_lines(run: RunRecord, store: Store | None) -> Iterator[str]:
    """What the files of a run say, a line each.

    Args:
        store: where they are, if ``run`` is a copy of them.
    """
    if run.environment:
        machine = run.environment.get("machine", {})
        workers = max(run.environment.get("num_workers") or 0, 1)
        on = machine.get("gpu") or f"{machine.get('cpus', '?')} CPUs, no GPU"
        command = " ".join(run.environment.get("command", []))
        yield (
            f"Started {_local(run.environment.get('started'))} by {command!r}, with "
            f"{workers} worker{'s'[: workers != 1]} ({on} where worker 0 ran)."
        )
    yield from _progress(run)
    yield from _scores(run)
    yield _checkpoints(run, store)
    if run.result is not None:
        yield from outcome_lines(run.result)
        yield "Finished."
    else:
        yield _writer(run, store)


def _progress(run: RunRecord) -> Iterator[str]:
    total = total_steps(run)
    text = f"Step {run.last_step:,}" + (f" of {total:,}" if total else "")
    newest = run.steps[-1] if run.steps else {}
    speed = number(newest, "sentences_per_second")
    if run.result is None and speed:
        text += f", {speed:,.0f} sentences/s"
        if total:
            left = (total - run.last_step) * run.config.train.global_batch_size / speed
            text += f", about {clock(left)} of training left, evaluations not counted"
    yield f"{text}."
    if newest:
        facts = [f"loss {newest['loss']:.4f}"]
        if "clusters_used" in newest:
            facts += [f"{newest['clusters_used']} of {run.num_clusters} clusters used"]
            facts += [f"{100 * newest['false_negative_rate']:.1f} % of the pairs of a batch false negatives"]
        yield f"At step {newest['step']:,}: {', '.join(facts)}."


def total_steps(run: RunRecord) -> int | None:
    """The steps that the run is to have; None before it has logged one, where only epochs are given."""
    if run.result:
        return int(run.result["total_steps"])
    if run.config.train.max_steps is not None:
        return run.config.train.max_steps
    epoch = number(run.steps[-1], "epoch") if run.steps else None
    return round(run.steps[-1]["step"] / epoch * run.config.train.epochs) if epoch else None


def _scores(run: RunRecord) -> Iterator[str]:
    if run.result is not None or not run.evaluations:
        return
    newest = run.evaluations[-1]
    parts = [f"{run.dev} {run.dev_scores[-1][1]:.2f}" if run.dev_scores[-1][1] is not None else f"{run.dev} collapsed"]
    parts += [f"{key.removeprefix('also ')} {value:.2f}" for key, value in newest.items() if key.startswith("also ")]
    best = f"; best {run.best[1]:.2f} at step {run.best[0]:,}" if run.best else ""
    before = f"; {run.before:.2f} before training" if run.before is not None and newest["step"] else ""
    yield f"Scores at step {newest['step']:,}: {', '.join(parts)}{best}{before}."


def _checkpoints(run: RunRecord, store: Store | None) -> str:
    if store is None:
        times = {path.name: path.stat().st_mtime for path in run.path.glob("checkpoints/step-*")}
    else:
        times = {}
        for name, written in (store / "checkpoints").times().items():
            folder = name.split("/")[0]
            times[folder] = max(written, times.get(folder, 0.0))
    newest = max((name for name in times if re.fullmatch(r"step-\d{8}", name)), default=None)
    if newest is None:
        return "No checkpoint yet."
    return f"Newest checkpoint: of step {int(newest[5:]):,}, {_ago(times[newest])}."


def _writer(run: RunRecord, store: Store | None) -> str:
    """Who writes the run now, and since when."""
    if store is None:
        if is_locked(run.path / ".lock"):
            return "A process of this machine is at work on it."
        return "No process of this machine is at work on it; the command that began it goes on with it."
    live = [claim for claim in claims(store) if claim.age < SILENT_S]
    if live:
        return f"At work on it: {live[0]}."
    return "No process is at work on it; the command that began it goes on with it, on any machine."


def _ago(when: float) -> str:
    return f"{clock(max(time.time() - when, 0.0))} ago ({datetime.fromtimestamp(when):%Y-%m-%d %H:%M:%S})"


def _local(text: Any) -> str:
    """A time of a file in this machine's time zone."""
    try:
        return f"{datetime.fromisoformat(str(text)).astimezone():%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return "at an unknown time"
