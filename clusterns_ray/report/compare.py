"""The page of several runs: those that differ only in their seed are one configuration, with mean and deviation."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusterns_ray.report.advice import advise
from clusterns_ray.report.charts import Line, line_chart
from clusterns_ray.report.page import HUES, Cell, Fact, Figure, Link, Page, Section, Table, Warning, footer
from clusterns_ray.report.record import RunRecord, number
from clusterns_ray.report.sts_table import sts_row, sts_section
from clusterns_ray.report.words import (
    NONE,
    count,
    duration,
    fixed,
    listing,
    plain_value,
    signed,
    spread,
)
from clusterns_ray.tuning.comparison import difference_over_seeds
from clusterns_ray.tuning.space import flatten

SCORES: tuple[tuple[str, Callable[[RunRecord], float | None]], ...] = (
    ("before", lambda run: run.before),
    ("best step", lambda run: run.best[1] if run.best else None),
    ("last step", lambda run: run.last),
    ("STS average", lambda run: run.sts_average),
)
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, of any seeds."""

    letter: str
    runs: Sequence[RunRecord]
    differences: dict[str, Any]
    """the keys that not all groups have alike, and their values here"""

    @property
    def label(self) -> str:
        """``A: num_clusters 32``; the letter alone where that would be long."""
        text = ", ".join(f"{key.rpartition('.')[2]} {plain_value(value)}" for key, value in self.differences.items())
        return f"{self.letter}: {text}" if text and len(text) <= 40 else self.letter

    def values(self, of: Callable[[RunRecord], float | None]) -> list[float | None]:
        return [of(run) for run in self.runs]


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Runs by configuration but for the seed, in the order of their first run."""
    flat = [flatten({key: value for key, value in run.config.identity().items() if key != "seed"}) for run in runs]
    alike: dict[str, list[int]] = {}
    for at, values in enumerate(flat):
        alike.setdefault(json.dumps(values, sort_keys=True), []).append(at)
    firsts = [flat[members[0]] for members in alike.values()]
    differing = [key for key in firsts[0] if len({json.dumps(values.get(key)) for values in firsts}) > 1]
    return [
        Group(_letter(at), [runs[member] for member in members], {key: firsts[at].get(key) for key in differing})
        for at, members in enumerate(alike.values())
    ]


def compare_page(runs: Sequence[RunRecord], where: Path) -> Page:
    """Groups side by side, their curves over one another, and every run.

    Args:
        where: the directory of the page, from which the runs' own reports are linked.
    """
    groups = group_runs(runs)
    runs = [run for group in groups for run in group.runs]
    names = _names(runs)
    sections = [
        group_section(groups),
        difference_section(groups),
        curve_section(groups),
        _sts(groups),
        run_section(groups, names, where),
    ]
    sections = [section for section in sections if section]
    return Page(
        title=f"{len(runs)} runs compared" if len(groups) > 1 else f"{len(runs)} runs of one configuration",
        subtitle=listing(names) if len(names) <= 8 else f"{', '.join(names[:7])} and {len(names) - 7} more",
        headline=_headline(groups),
        facts=_facts(groups),
        warnings=_warnings(groups, names),
        sections=sections,
        footer=footer(),
    )


# ---- in words ---------------------------------------------------------------------------------------------------


def _headline(groups: Sequence[Group]) -> list[str]:
    total = sum(len(group.runs) for group in groups)
    text = f"{count(total, 'run')} of one configuration, which differ in their seed alone."
    if len(groups) > 1:
        text = f"{count(total, 'run')} of {len(groups)} configurations (runs that differ in their seed alone are one)."
    best = sorted(filter(_last, groups), key=lambda group: -statistics.fmean(_last(group) or [0.0]))
    if not best or len({run.dev for group in groups for run in group.runs}) > 1:
        return [text]
    first = best[0]
    words = f"{first.label} ends highest, at" if len(best) > 1 else "The last score is"
    words += f" {spread(_last(first) or [])} on {first.runs[0].dev} ({count(len(first.runs), 'run')})."
    if len(best) > 1:
        words += " " + difference_in_words(first, best[1])
    return [text, words]


def difference_in_words(first: Group, second: Group) -> str:
    """Whether the last dev scores of two groups can be told apart, by Welch's interval of their difference."""
    a, b = _last(first), _last(second)
    assert a and b
    gap = statistics.fmean(a) - statistics.fmean(b)
    text = f"That is {signed(gap)} to {second.label}"
    interval = difference_over_seeds(a, b)
    if interval is None or len(b) < 2 or len({*a}) == len({*b}) == 1:
        return f"{text}; without several seeds of both, nobody can tell whether that is noise."
    low, high = interval["low"], interval["high"]
    verdict = "which includes 0, so these seeds do not tell them apart" if low <= 0 <= high else "which excludes 0"
    return f"{text}, with a 95\u00a0% interval from {signed(low)} to {signed(high)}, {verdict}."


def _facts(groups: Sequence[Group]) -> list[Fact]:
    if len(groups) > 1:
        return []
    dev = groups[0].runs[0].dev or ""
    labels = (
        ("Dev, before training", dev),
        ("Dev, best step", "chosen on it"),
        ("Dev, last step", dev),
        ("Average of the STS tests", "of all seven"),
    )
    facts = [
        Fact(label, spread(groups[0].values(of)), note) for (label, note), (_, of) in zip(labels, SCORES, strict=True)
    ]
    return [fact for fact in facts if fact.value != NONE]


def _warnings(groups: Sequence[Group], names: Sequence[str]) -> list[Warning]:
    runs = [run for group in groups for run in group.runs]
    warnings = []
    devs = sorted({run.dev or "none" for run in runs})
    if len(devs) > 1:
        warnings.append(Warning(f"The runs have different dev sets ({', '.join(devs)}); scores are not comparable."))
    for group in groups:
        seeds = [run.config.seed for run in group.runs]
        again = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if again:
            warnings.append(
                Warning(
                    f"{group.label} holds several runs of seed {listing([str(seed) for seed in again])}. They are the "
                    "same run again, so the deviation here is smaller than that over seeds."
                )
            )
    if any(len(group.runs) == 1 for group in groups) and len(groups) > 1:
        single = [group.letter for group in groups if len(group.runs) == 1]
        warnings.append(
            Warning(
                f"{listing(single)} {'has' if len(single) == 1 else 'have'} one seed: differences of this size are "
                "often noise. Run three seeds or more.",
                level="note",
            )
        )
    by_text: dict[tuple[str, str], list[str]] = {}
    for at, run in enumerate(runs):
        for warning in advise(run):
            by_text.setdefault((warning.level, warning.text), []).append(names[at])
    for (level, text), whose in by_text.items():
        prefix = "All runs" if len(whose) == len(runs) else listing(whose)
        warnings.append(Warning(f"{prefix}: {text}", level="problem" if level == "problem" else "note"))
    return sorted(warnings, key=lambda warning: warning.level != "problem")


# ---- sections ---------------------------------------------------------------------------------------------------


def group_section(groups: Sequence[Group]) -> Section:
    columns = [(name, of) for name, of in SCORES if any(v is not None for group in groups for v in group.values(of))]
    rows: list[list[Cell]] = []
    for group in groups:
        steps = [run.last_step for run in group.runs]
        seconds = [number(run.result or {}, "seconds") for run in group.runs]
        known = [value for value in seconds if value is not None]
        rows.append(
            [
                group.label,
                ", ".join(str(run.config.seed) for run in group.runs),
                *(spread(group.values(of)) for _, of in columns),
                " – ".join(f"{step:,}" for step in sorted({min(steps), max(steps)})),
                duration(statistics.fmean(known) if known else None),
            ]
        )
    return Section(
        "Mean and deviation over seeds",
        words=[
            "Spearman × 100; mean ± standard deviation over the runs (n − 1). The best step was chosen on the dev set, "
            "the last step was not."
        ],
        tables=[
            Table(
                ["configuration", "seeds", *(name for name, _ in columns), "steps", "mean time"],
                rows,
                text_columns=(0, 1),
            )
        ],
    )


def difference_section(groups: Sequence[Group]) -> Section | None:
    if len(groups) == 1:
        return None
    keys = list(groups[0].differences)
    return Section(
        "What differs",
        words=["Every key of the configuration that the groups do not have alike; seed and machine apart."],
        tables=[
            Table(
                ["key", *(group.letter for group in groups)],
                [[key, *(plain_value(group.differences[key]) for group in groups)] for key in keys],
                text_columns=range(len(groups) + 1),
            )
        ],
    )


CURVES: tuple[tuple[str, str, str, bool, dict[str, Any]], ...] = (
    ("sts_dev", "Dev score", "Spearman × 100", True, {"shown": ",.2f"}),
    ("loss", "Loss", "nats", False, {"shown": ".3g", "may_be_logarithmic": True}),
    ("mean_cosine", "Mean cosine of the batch", "mean cosine", False, {"shown": ".3g", "from_zero": True}),
    ("clusters_used", "Clusters used in a batch", "clusters", False, {"shown": ",.1f", "from_zero": True}),
    ("false_negative_rate", "False negatives", "share of the pairs", False, {"shown": ".3g", "from_zero": True}),
    ("hard_negative_cosine", "Hard negatives", "mean cosine", False, {"shown": ".3g", "from_zero": True}),
    ("uniformity", "Uniformity on the dev set", "log of the mean potential", True, {"shown": ".3g"}),
    ("sentences_per_second", "Throughput", "sentences per second", False, {"shown": ",.0f", "from_zero": True}),
)


def curve_section(groups: Sequence[Group]) -> Section | None:
    figures = []
    for key, title, y, evaluated, look in CURVES:
        lines = [line for at, group in enumerate(groups) for line in _curves(group, at, key, evaluated)]
        if lines:
            figures.append(Figure(title, line_chart(lines, y=y, **look), wide=key == "sts_dev"))
    if not figures:
        return None
    return Section(
        "Curves",
        words=["Thin lines are runs, thick ones the mean of a configuration where all its runs have a value."],
        figures=figures,
    )


def _curves(group: Group, at: int, key: str, evaluated: bool) -> list[Line]:
    """The runs of a group, thin, and their mean."""
    hue, dash = HUES[at % len(HUES)], DASHES[at % len(DASHES)]
    curves = [
        dict(run.dev_scores if key == "sts_dev" else zip(*run.curve(key, evaluated), strict=True)) for run in group.runs
    ]
    curves = [curve for curve in curves if any(value is not None for value in curve.values())]
    if not curves:
        return []
    if len(curves) == 1:
        return [Line(group.label, list(curves[0]), list(curves[0].values()), hue, dash, width=2.5)]
    thin = [
        Line(group.label, list(curve), list(curve.values()), hue, dash, width=1, opacity=0.6, legend=False)
        for curve in curves
    ]
    return [*thin, Line(f"{group.label}, mean", *mean_curve(curves), hue, dash, width=3)]


def mean_curve(curves: Sequence[dict[int, float | None]]) -> tuple[list[int], list[float | None]]:
    """The mean at every step at which all curves have a value."""
    known = [{step: value for step, value in curve.items() if value is not None} for curve in curves]
    steps = sorted(set.intersection(*map(set, known)))
    return steps, [statistics.fmean(curve[step] for curve in known) for step in steps]


def _sts(groups: Sequence[Group]) -> Section:
    """Means over those runs of a group that have been scored."""
    rows = []
    for group in groups:
        scored = [run for run in group.runs if run.sts is not None]
        part = f" ({len(scored)} of {len(group.runs)} runs)" if len(scored) < len(group.runs) else ""
        if scored:
            rows.append(sts_row(group.label + part, scored))
    return sts_section([run for group in groups for run in group.runs], rows)


def run_section(groups: Sequence[Group], names: Sequence[str], where: Path) -> Section:
    runs = [(group, run) for group in groups for run in group.runs]
    rows: list[list[Cell]] = []
    for name, (group, run) in zip(names, runs, strict=True):
        own = run.path / "report.html"
        rows.append(
            [
                Link(name, _relative(own, where)) if own.is_file() else name,
                group.letter,
                str(run.config.seed),
                fixed(run.before),
                fixed(run.best[1] if run.best else None),
                f"{run.best[0]:,}" if run.best else NONE,
                fixed(run.last),
                fixed(run.sts_average),
                f"{run.last_step:,}",
                duration(number(run.result or {}, "seconds")) if run.finished else "unfinished",
            ]
        )
    columns = ["run", "configuration", "seed", "before", "best", "best step", "last", "STS average", "steps", "time"]
    return Section(
        "Every run",
        words=["A name that is a link leads to the run's own page, which clusterns report RUN makes."],
        tables=[Table(columns, rows, text_columns=(0, 1))],
    )


# ---- small things -----------------------------------------------------------------------------------------------


def _last(group: Group) -> list[float] | None:
    """The last dev scores of a group, or None if a run has none."""
    values = group.values(lambda run: run.last)
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _letter(at: int) -> str:
    return chr(ord("A") + at) if at < 26 else f"G{at + 1}"


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Names of the runs; with their directory where two have the same."""
    names = [run.name for run in runs]
    where = [run.address or str(run.path) for run in runs]
    return [name if names.count(name) == 1 else place for name, place in zip(names, where, strict=True)]


def _relative(path: Path, where: Path) -> str:
    from urllib.parse import quote

    return quote(Path(os.path.relpath(path.resolve(), where.resolve())).as_posix())
