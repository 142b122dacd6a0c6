"""Plotly figures of a study's trials, in the page's colours, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from clusterns_ray.report.charts import plain
from clusterns_ray.report.page import color
from clusterns_ray.tuning.analysis import Importance, Trial
from clusterns_ray.tuning.comparison import show_value

LOOKS = {
    "COMPLETE": ("finished", "blue", "circle"),
    "PRUNED": ("pruned, at its last score", "orange", "x"),
    "RUNNING": ("runs", "green", "diamond"),
}
SCALE = [[0, color("orange")], [0.5, color("muted")], [1, color("blue")]]
"""Of scores: low to high."""
GRID = 40
"""Cells of the contour along each axis."""


def history(trials: Sequence[Trial], before: float | None) -> dict[str, Any]:
    """Scores in the order of the trials, and the best so far."""
    data = [_points(trials, state, lambda trial: trial.number) for state in LOOKS]
    best: list[float] = []
    finished = [trial for trial in trials if trial.state == "COMPLETE" and trial.score is not None]
    for trial in finished:
        best.append(max([*best[-1:], trial.score or 0.0]))
    data.append(
        {
            "x": [trial.number for trial in finished],
            "y": best,
            "mode": "lines",
            "name": "best so far",
            "line": {"color": color("blue"), "shape": "hv", "width": 2},
            "hovertemplate": "best so far %{y:.2f}<extra></extra>",
        }
    )
    shapes, notes = _level(before, "untrained encoder") if before is not None else ([], [])
    return _figure(data, "trial", "dev score (Spearman × 100)", shapes=shapes, annotations=notes)


def learning_curves(trials: Sequence[Trial], rungs: Sequence[int], winner: int | None) -> dict[str, Any]:
    """Every trial over its own steps; pruned ones end where they were stopped."""
    data = []
    for trial in trials:
        if not trial.curve:
            continue
        chosen = trial.number == winner
        hue = "green" if chosen else {"PRUNED": "orange"}.get(trial.state, "blue")
        data.append(
            {
                "x": [step for step, _ in trial.curve],
                "y": [score for _, score in trial.curve],
                "mode": "lines+markers",
                "name": f"trial {trial.number}",
                "line": {"color": color(hue), "width": 3 if chosen else 1.5},
                "marker": {"size": 5},
                "opacity": 1 if chosen else 0.6,
                "showlegend": False,
                "hovertemplate": f"trial {trial.number}, step %{{x}}: %{{y:.2f}}<extra></extra>",
            }
        )
    line = {"color": color("muted"), "dash": "dot", "width": 1}
    shapes = [
        {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "line": line} for step in rungs
    ]
    notes = [_note(f"rung {step:,}", x=step, y=1, yref="paper", yanchor="bottom") for step in rungs]
    return _figure(data, "training step", "dev score (Spearman × 100)", shapes=shapes, annotations=notes)


def parallel(
    trials: Sequence[Trial], space: Mapping[str, Mapping[str, Any]], winner: int | None = None
) -> dict[str, Any]:
    """One line a finished trial through its values, each axis from the low to the high end of its key, to its score.

    A line has a gap where a key did not matter. The best quarter is blue, the winner green.
    """
    ranked = sorted(trials, key=lambda trial: trial.score or 0.0)
    scores = [trial.score or 0.0 for trial in ranked]
    best = {trial.number for trial in ranked[-max(len(ranked) // 4, 1) :]}
    names = [plain(key.rpartition(".")[2]) for key in space] + ["dev score"]
    axes = {key: _axis([t.values[key] for t in ranked if key in t.values], space[key]) for key in space}
    columns: list[list[float | None]] = []
    for key, (places, ticks, _) in axes.items():
        found = iter(places)
        low, high = ticks[0], ticks[-1]
        columns.append([(next(found) - low) / ((high - low) or 1) if key in t.values else None for t in ranked])
    columns.append([(score - scores[0]) / ((scores[-1] - scores[0]) or 1) for score in scores])
    data = []
    for row, trial in enumerate(ranked):
        chosen = trial.number == winner
        hue = "green" if chosen else "blue" if trial.number in best else "muted"
        values = [f"{name} {_text(trial.values.get(key))}" for key, name in zip(space, names)]
        data.append(
            {
                "x": list(range(len(names))),
                "y": [column[row] for column in columns],
                "mode": "lines+markers",
                "line": {"color": color(hue), "width": 3 if chosen else 1.5},
                "marker": {"size": 5},
                "opacity": 1 if chosen else 0.7 if trial.number in best else 0.3,
                "showlegend": False,
                "text": "<br>".join([f"trial {trial.number}: {trial.score:.2f}", *map(plain, values)]),
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    ends = [(labels[0], labels[-1]) for _, _, labels in axes.values()] + [(f"{scores[0]:.2f}", f"{scores[-1]:.2f}")]
    line = {"color": color("rule"), "width": 1}
    shapes = [{"type": "line", "x0": n, "x1": n, "y0": 0, "y1": 1, "line": line} for n in range(len(names))]
    notes = [_note(low, x=n, y=0, yanchor="top", yshift=-4) for n, (low, _) in enumerate(ends)]
    notes += [_note(high, x=n, y=1, yanchor="bottom", yshift=4) for n, (_, high) in enumerate(ends)]
    figure = _figure(data, "", "", shapes=shapes, annotations=notes)
    figure["layout"]["xaxis"] |= {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False}
    figure["layout"]["xaxis"] |= {"range": [-0.3, len(names) - 0.7], "showline": False, "ticklabelstandoff": 18}
    figure["layout"]["yaxis"] |= {"visible": False, "range": [-0.12, 1.12]}
    return figure


def slice_chart(trials: Sequence[Trial], key: str, parameter: Mapping[str, Any]) -> dict[str, Any]:
    """Scores over the values of one key."""
    having = [trial for trial in trials if key in trial.values]
    data = [_points(having, state, lambda trial: _shown(trial.values[key], parameter)) for state in LOOKS]
    figure = _figure(data, key, "dev score (Spearman × 100)")
    figure["layout"]["xaxis"] |= _axis_type(parameter)
    return figure


def contour(trials: Sequence[Trial], x: str, y: str, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Scores of finished trials over two keys, interpolated between them; None where there are too few."""
    import numpy as np
    from scipy.interpolate import LinearNDInterpolator
    from scipy.spatial import QhullError

    having = [trial for trial in trials if x in trial.values and y in trial.values]
    if len(having) < 4:
        return None
    xs, x_ticks, x_labels = _axis([trial.values[x] for trial in having], space[x])
    ys, y_ticks, y_labels = _axis([trial.values[y] for trial in having], space[y])
    scores = [trial.score for trial in having]
    data: list[dict[str, Any]] = []
    try:
        surface = LinearNDInterpolator(np.column_stack([xs, ys]), scores, rescale=True)
    except QhullError:  # all on one line
        return None
    grid_x, grid_y = np.linspace(min(xs), max(xs), GRID), np.linspace(min(ys), max(ys), GRID)
    z = surface(*np.meshgrid(grid_x, grid_y))
    data.append(
        {
            "type": "contour",
            "x": grid_x.tolist(),
            "y": grid_y.tolist(),
            "z": [[None if np.isnan(value) else float(value) for value in row] for row in z],
            "colorscale": SCALE,
            "opacity": 0.75,
            "hoverinfo": "skip",
            "colorbar": {"title": {"text": "dev"}, "outlinewidth": 0, "tickfont": {"color": color("muted")}},
        }
    )
    data.append(
        {
            "x": xs,
            "y": ys,
            "mode": "markers",
            "showlegend": False,
            "marker": {"color": color("ink"), "size": 7},
            "text": [f"trial {trial.number}: {trial.score:.2f}" for trial in having],
            "hovertemplate": "%{text}<extra></extra>",
        }
    )
    figure = _figure(data, x, y)
    figure["layout"]["xaxis"] |= {"tickvals": x_ticks, "ticktext": x_labels}
    figure["layout"]["yaxis"] |= {"tickvals": y_ticks, "ticktext": y_labels}
    return figure


def importance_chart(found: Sequence[Importance]) -> dict[str, Any]:
    """Shares of the variance with their deviation over resampled trials, the largest on top."""
    rows = list(reversed(found))
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [plain(row.key) for row in rows],
        "x": [row.share for row in rows],
        "error_x": {"type": "data", "array": [row.deviation for row in rows], "color": color("ink"), "thickness": 1.5},
        "marker": {"color": color("blue")},
        "customdata": [[row.deviation, row.trials] for row in rows],
        "hovertemplate": "%{x:.2f} ± %{customdata[0]:.2f}, from %{customdata[1]} trials<extra></extra>",
    }
    figure = _figure([trace], "share of the score's variance", "")
    figure["layout"]["xaxis"] |= {"rangemode": "tozero"}
    return figure


def cost(trials: Sequence[Trial]) -> dict[str, Any]:
    """Score over the time a trial took."""
    data = [_points(trials, state, lambda trial: trial.seconds) for state in LOOKS]
    return _figure(data, "seconds of the trial", "dev score (Spearman × 100)")


def _points(trials: Sequence[Trial], state: str, place: Any) -> dict[str, Any]:
    name, hue, symbol = LOOKS[state]
    rows = [trial for trial in trials if trial.state == state and trial.score is not None]
    return {
        "x": [place(trial) for trial in rows],
        "y": [trial.score for trial in rows],
        "mode": "markers",
        "name": name,
        "showlegend": bool(rows),
        "marker": {"color": color(hue), "symbol": symbol, "size": 8},
        "text": [f"trial {trial.number}: {trial.score:.2f}" for trial in rows],
        "hovertemplate": "%{text}<extra></extra>",
        "cliponaxis": False,
    }


def _shown(value: Any, parameter: Mapping[str, Any]) -> Any:
    return plain(str(value)) if parameter["type"] == "choice" else value


def _text(value: Any) -> str:
    return "-" if value is None else show_value(value)


def _axis_type(parameter: Mapping[str, Any]) -> dict[str, Any]:
    if parameter["type"] == "choice":
        names = [plain(str(choice)) for choice in parameter["choices"]]
        return {"type": "category", "categoryorder": "array", "categoryarray": names}
    if not parameter.get("log"):
        return {}
    low, high = parameter["low"], parameter["high"]
    ticks = log_ticks(low, high)
    room = 0.04 * math.log10(high / low)
    return {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [show_value(tick) for tick in ticks],
        "range": [math.log10(low) - room, math.log10(high) + room],
    }


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends of a logarithmic axis, or the ends themselves where there are fewer than two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        inside = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) >= 3:
            return inside[:: -(-len(inside) // 8)]
    return [float(low), *[tick for tick in inside if low < tick < high], float(high)]


def _axis(values: Sequence[Any], parameter: Mapping[str, Any]) -> tuple[list[float], list[float], list[str]]:
    """Places on a linear axis for values of any kind: choices by number, logarithms, or as they are; and ticks."""
    if parameter["type"] == "choice":
        choices = parameter["choices"]
        places = [float(next(n for n, choice in enumerate(choices) if choice == value)) for value in values]
        return places, list(map(float, range(len(choices)))), [plain(str(choice)) for choice in choices]
    low, high = parameter["low"], parameter["high"]
    log = bool(parameter.get("log"))
    places = [math.log10(value) if log else float(value) for value in values]
    first, last = (math.log10(low), math.log10(high)) if log else (float(low), float(high))
    ticks = [first + (last - first) * part / 4 for part in range(5)]
    return places, ticks, [show_value(10**tick if log else tick) for tick in ticks]


def _level(y: float, text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    line = {"color": color("muted"), "dash": "dash", "width": 1}
    shape = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": y, "y1": y, "line": line}
    return [shape], [_note(f"{text}, {y:.2f}", x=1, xref="paper", xanchor="right", y=y, yanchor="bottom")]


def _note(text: str, **place: Any) -> dict[str, Any]:
    return {"text": plain(text), "showarrow": False, "font": {"color": color("muted"), "size": 12}, **place}


def _figure(data: Sequence[dict[str, Any]], x: str, y: str, **more: Any) -> dict[str, Any]:
    """Traces and axes in the look of the page, checked by plotly, as plain JSON."""
    import plotly.graph_objects as go

    axis = {"automargin": True, "gridcolor": color("rule"), "linecolor": color("muted"), "zeroline": False, "ticks": ""}
    title = {"standoff": 8, "font": {"size": 13, "color": color("muted")}}
    layout = {
        "template": "none",
        "font": {"family": "ui-sans-serif, system-ui, sans-serif", "size": 13, "color": color("ink")},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 26, "b": 8},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": color("raised"), "bordercolor": color("rule"), "font": {"color": color("ink")}},
        "xaxis": {**axis, "title": {"text": plain(x), **title}, "showline": True},
        "yaxis": {**axis, "title": {"text": plain(y), **title}},
        **more,
    }
    return json.loads(str(go.Figure([{"type": "scatter", **trace} for trace in data], layout).to_json()))
