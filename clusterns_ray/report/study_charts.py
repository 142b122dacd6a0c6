"""Plotly figures of a study's trials, in the page's colours, as JSON; most of them are Optuna's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optuna.visualization
import plotly.graph_objects as go

from clusterns_ray.report.charts import add_level, add_moment, page_figure, plain
from clusterns_ray.report.page import color
from clusterns_ray.tuning.analysis import Importance, StudyRecord, Trial, front
from clusterns_ray.tuning.objectives import UNITS

DOTS = {"color": color("blue"), "size": 8}
SCORE = "dev score (Spearman × 100)"
SCALE = [[0, color("orange")], [0.5, color("muted")], [1, color("blue")]]
"""The colours of scores, from low to high."""
LOOKS = {
    "COMPLETE": ("finished", "blue", "circle"),
    "PRUNED": ("pruned, at its last score", "orange", "x"),
    "RUNNING": ("runs", "green", "diamond"),
}
"""The name, colour and symbol of the trials of each state."""


def history(study: StudyRecord) -> dict[str, Any]:
    """Scores in the order of the trials, pruned ones at their last, and the best so far."""
    figure = optuna.visualization.plot_optimization_history(study.optuna_study)
    figure.update_traces(selector={"name": "Objective Value"}, name="finished", marker=DOTS)
    line = {"color": color("blue"), "shape": "hv", "width": 2}
    figure.update_traces(selector={"name": "Best Value"}, name="best so far", line=line)
    figure.update_traces(hovertemplate="trial %{x}: %{y:.2f}<extra></extra>")
    _add_trials(figure, study.trials, "PRUNED", lambda trial: trial.number)
    if study.before is not None:
        add_level(figure, study.before, f"untrained encoder, {study.before:.2f}")
    return page_figure(figure, "trial", SCORE)


def learning_curves(study: StudyRecord, rungs: Sequence[int], winner: int | None) -> dict[str, Any]:
    """Every trial over its own steps; pruned ones end where they were stopped."""
    figure = optuna.visualization.plot_intermediate_values(study.optuna_study)
    for trial in study.trials:
        chosen = trial.number == winner
        figure.update_traces(
            selector={"name": f"Trial{trial.number}"},
            line={
                "color": color("green" if chosen else LOOKS.get(trial.state, LOOKS["COMPLETE"])[1]),
                "width": 3 if chosen else 1.5,
            },
            marker={"size": 5},
            opacity=1 if chosen else 0.6,
            hovertemplate=f"trial {trial.number}, step %{{x}}: %{{y:.2f}}<extra></extra>",
        )
    last = max((step for trial in study.trials for step, _ in trial.curve), default=0)
    for step in rungs:
        add_moment(figure, step, f"rung {step:,}", last)
    return page_figure(figure, "training step", SCORE)


def slice_chart(study: StudyRecord, key: str) -> dict[str, Any]:
    """Scores over the values of one key; the later a finished trial, the bluer it is."""
    figure = optuna.visualization.plot_slice(study.optuna_study, [key])
    figure.update_traces(hovertemplate="trial %{marker.color}: %{y:.2f}<extra></extra>")
    scale = [[0, color("rule")], [1, color("blue")]]
    figure.update_traces(
        marker={"size": 8, "colorscale": scale, "line_color": color("muted"), "colorbar": _bar("trial")}
    )
    choice = study.varied[key]["type"] == "choice"
    having = [trial for trial in study.trials if key in trial.values]
    _add_trials(figure, having, "PRUNED", lambda trial: repr(trial.values[key]) if choice else trial.values[key])
    return _as_text(page_figure(figure, key, SCORE))


def contour(study: StudyRecord, x: str, y: str) -> dict[str, Any] | None:
    """Scores of finished trials over two keys, interpolated between them; None where there are too few."""
    values = [(trial.values[x], trial.values[y]) for trial in study.finished if {x, y} <= set(trial.values)]
    if len(values) < 4 or any(len(set(map(str, column))) < 2 for column in zip(*values)):
        return None
    figure = optuna.visualization.plot_contour(study.optuna_study, [x, y])
    figure.update_traces(selector={"type": "contour"}, colorscale=SCALE, reversescale=False, opacity=0.75)
    figure.update_traces(
        selector={"type": "contour"}, colorbar=_bar("dev"), line={"color": color("muted"), "width": 0.5}
    )
    figure.update_traces(selector={"type": "scatter"}, marker={"color": color("ink"), "size": 7, "line_width": 0})
    first, second = sorted((x, y))
    return _as_text(page_figure(figure, first, second))


def importance_chart(importances: Sequence[Importance]) -> dict[str, Any]:
    """Shares of the variance with their deviation over resampled trials, the largest on top."""
    rows = list(reversed(importances))
    deviations = [row.deviation for row in rows]
    figure = go.Figure(
        go.Bar(
            orientation="h",
            y=[plain(row.key) for row in rows],
            x=[row.share for row in rows],
            error_x={"type": "data", "array": deviations, "color": color("ink"), "thickness": 1.5},
            marker={"color": color("blue")},
            customdata=[[row.deviation, row.trials] for row in rows],
            hovertemplate="%{x:.2f} ± %{customdata[0]:.2f}, from %{customdata[1]} trials<extra></extra>",
        )
    )
    return page_figure(figure, "share of the score's variance", "", x_axis={"rangemode": "tozero"})


def cost(study: StudyRecord) -> dict[str, Any]:
    """Score over the time a trial took, or the memory where that is minimised, with the Pareto front where there are
    two objectives; of pruned trials their last score."""
    minimize = study.config.get("minimize")
    unit, size = UNITS[minimize or "seconds"]
    figure = go.Figure()
    for state in LOOKS:
        _add_trials(figure, study.trials, state, lambda trial: trial.cost(minimize) / size)
    best = front(study.trials, minimize)
    if best:
        figure.add_scatter(
            x=[trial.cost(minimize) / size for trial in best],
            y=[trial.score for trial in best],
            mode="lines",
            name="Pareto front",
            line={"color": color("green"), "shape": "hv", "width": 2},
            hoverinfo="skip",
        )
    title = "memory of a worker, by the estimate" if minimize == "memory" else "time of the trial"
    return page_figure(figure, f"{title} ({unit})", SCORE)


def _add_trials(figure: go.Figure, trials: Sequence[Trial], state: str, place: Callable[[Trial], Any]) -> None:
    """A dot for each trial of a state at its last score."""
    name, hue, symbol = LOOKS[state]
    rows = [trial for trial in trials if trial.state == state and trial.score is not None]
    figure.add_scatter(
        x=[place(trial) for trial in rows],
        y=[trial.score for trial in rows],
        mode="markers",
        name=name,
        showlegend=bool(rows),
        marker={"color": color(hue), "size": 8, "symbol": symbol},
        text=[f"trial {trial.number}: {trial.score:.2f}" for trial in rows],
        hovertemplate="%{text}<extra></extra>",
        cliponaxis=False,
    )


def _bar(title: str) -> dict[str, Any]:
    return {"title": {"text": title}, "outlinewidth": 0, "tickfont": {"color": color("muted")}, "x": 1, "xpad": 10}


def _as_text(figure: dict[str, Any]) -> dict[str, Any]:
    """A figure of Optuna's whose choices plotly shows as they are, where it would read tags and entities."""

    def escaped(values: Any) -> Any:
        return (
            [plain(value) if isinstance(value, str) else value for value in values]
            if isinstance(values, list)
            else values
        )

    axes = figure["layout"]["xaxis"], figure["layout"]["yaxis"]
    for axis in axes:
        if axis.get("type") == "log":
            axis["dtick"] = "D2"  # at 1, 2 and 5
    for part in (*figure["data"], *axes):
        part.update({key: escaped(part[key]) for key in ("x", "y", "categoryarray") if key in part})
    return figure
