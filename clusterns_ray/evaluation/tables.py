"""The results of ``evaluate_models`` as tables in text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from clusterns_ray.evaluation.clusters import MEASURES, SHORT_TEXTS

if TYPE_CHECKING:
    from rich.console import Console


def as_text(result: dict[str, Any]) -> str:
    """What :func:`render` prints, without colours and however wide."""
    from rich.console import Console

    stream = io.StringIO()
    # Otherwise a notebook would be shown the tables, and the stream nothing.
    render(result, Console(file=stream, width=120, color_system=None, force_jupyter=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().strip().splitlines())


def render(result: dict[str, Any], console: Console | None = None) -> None:
    """Print what ``suite.evaluate_models`` returns: a column a model, and the differences beneath.

    Args:
        console: stdout's if not given.
    """
    from rich.console import Console

    console = console or Console()
    models = result["models"]
    for title, rows in _sections(models):
        _print_table(console, title, models, rows)
    for line in _remarks(models):
        console.print(line, highlight=False, markup=False)
    for difference in result["differences"]:
        _print_differences(console, difference)


def _sections(models: list[dict[str, Any]]) -> Iterable[tuple[str, list[tuple[str, list[str]]]]]:
    """Titles of tables, with rows of a label and one cell a model."""
    first = models[0]

    def cells(text: Callable[[dict[str, Any]], str]) -> list[str]:
        return [text(model) for model in models]

    if "tasks" in first:
        rows = [(task, cells(lambda m, t=task: _number(m["tasks"][t]["spearman"]))) for task in first["tasks"]]
        rows += [(name, cells(lambda m, n=name: _number(m["extra"][n]))) for name in first["extra"]]
        if first["average"] is not None:
            rows.append(("average of the seven", cells(lambda m: _number(m["average"]))))
        yield "STS: Spearman x 100 over all pairs of a task", rows
    if "transfer" in first:
        rows = [
            (task, cells(lambda m, t=task: _number(m["transfer"]["tasks"][t]["accuracy"])))
            for task in first["transfer"]["tasks"]
        ]
        if "MRPC" in first["transfer"]["tasks"]:
            rows.append(("MRPC, F1", cells(lambda m: _number(m["transfer"]["tasks"]["MRPC"]["f1"]))))
        if first["transfer"]["average"] is not None:
            rows.append(("average of the seven", cells(lambda m: _number(m["transfer"]["average"]))))
        yield "Transfer: accuracy of a logistic regression, %", rows
    if "clustering" in first:
        rows = []
        for name, scores in first["clustering"].items():
            rows += [
                (
                    f"{name} (K {scores['clusters']}) {measure if measure == 'accuracy' else measure.upper()}",
                    cells(lambda m, n=name, k=measure: _mean_and_std(m["clustering"][n][k])),
                )
                for measure in MEASURES
            ]
        seeds = next(iter(first["clustering"].values()))["seeds"]
        yield f"Clustering: spherical K-means, x 100, mean +- deviation over {seeds} seeds", rows
    if "geometry" in first:
        shape = first["geometry"]
        rows = [
            (
                f"alignment of {shape['alignment_pairs']:,} pairs",
                cells(lambda m: _number(m["geometry"]["alignment"], 4)),
            ),
            ("uniformity", cells(lambda m: _number(m["geometry"]["uniformity"], 4))),
            ("mean cosine", cells(lambda m: _number(m["geometry"]["mean_cosine"], 4))),
            ("effective rank", cells(lambda m: _number(m["geometry"]["effective_rank"], 1))),
        ]
        yield f"Geometry of the {shape['sentences']:,} sentences of {shape['set']}", rows


def _remarks(models: list[dict[str, Any]]) -> Iterable[str]:
    first = models[0]
    for title, part in (("STS", first if "tasks" in first else None), ("Transfer", first.get("transfer"))):
        if part is not None and part["missing"] and not part["tasks"]:
            yield f"{title}: none of the seven tasks is there, so there is no average of them."
        elif part is not None and part["missing"]:
            count, missing = len(part["tasks"]), ", ".join(part["missing"])
            yield f"{title} is partial, {count} of the seven tasks. No average: {missing} missing."
    for tasks, protocol in first["data"].get("protocol", {}).items():
        yield f"Hub data, {tasks}: {protocol}."
    for name, scores in first.get("clustering", {}).items():
        if name in SHORT_TEXTS and scores["clusters"] != SHORT_TEXTS[name].labels:
            yield (
                f"{name} has {scores['clusters']} labels here and {SHORT_TEXTS[name].labels} as published: not "
                "the same set."
            )


def _print_table(console: Any, title: str, models: list[dict[str, Any]], rows: list[tuple[str, list[str]]]) -> None:
    from rich.table import Table

    names = [model["model"] for model in models]
    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold", min_width=8)
    for label, cells in rows:
        table.add_row(label, *cells)
    _print_titled(console, title, table)


def _print_differences(console: Any, difference: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table()
    for column in ("", "difference", "95 % interval", ""):
        table.add_column(column, justify="right" if column else "left")
    for suite, text in (("sts", "{}"), ("transfer", "{}"), ("clustering", "{}, accuracy")):
        for name, interval in difference.get(suite, {}).items():
            label = f"average of the seven {suite} tasks" if name == "average" else text.format(name)
            span = f"{interval['low']:+.2f} to {interval['high']:+.2f}"
            noise = "inside the noise" if interval["inside_noise"] else ""
            table.add_row(label, f"{interval['difference']:+.2f}", span, noise)
    title = f"{difference['model']} minus {difference['against']}, with 95 % intervals of a paired bootstrap"
    _print_titled(console, title, table)


def _print_titled(console: Any, title: str, table: Any) -> None:
    """A table's own title would be broken to its width."""
    console.print()
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _mean_and_std(value: dict[str, float]) -> str:
    return f"{_number(value['mean'])} +- {_number(value['std'])}"
