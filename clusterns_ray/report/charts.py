"""Plotly figures of curves and cluster sizes, in the page's colours, as JSON."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clusterns_ray.report.page import color

MAX_POINTS = 1000
"""Longer curves are drawn as means of neighbours: a screen shows no more, and the file stays small."""

Values = Sequence[float | None]


@dataclass(frozen=True)
class Line:
    name: str
    x: Sequence[float]
    y: Values
    hue: str = "blue"
    dash: str = "solid"
    width: float = 2
    opacity: float = 1.0
    points: bool = False
    """a dot at each value"""
    legend: bool = True


@dataclass(frozen=True)
class Mark:
    """A point that is pointed at."""

    x: float
    y: float
    text: str
    hue: str = "orange"


@dataclass(frozen=True)
class Level:
    """A horizontal line with its name."""

    y: float
    text: str


def line_chart(
    lines: Sequence[Line],
    *,
    y: str,
    x: str = "step",
    may_be_logarithmic: bool = False,
    from_zero: bool = False,
    shown: str = ",.2f",
    start: int | None = None,
    levels: Sequence[Level] = (),
    marks: Sequence[Mark] = (),
) -> dict[str, Any]:
    """Curves over training steps.

    Args:
        y: title of the axis, with the unit.
        may_be_logarithmic: the axis is, where :func:`spans_decades` says so; not with levels.
        shown: a value that is pointed at, as Python and d3 format it.
        start: the step at which clustering started, marked by a vertical line.
    """
    data: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for line in lines:
        line_x, line_y = thin(line.x, line.y)
        data.append(
            {
                "x": line_x,
                "y": line_y,
                "name": plain(line.name),
                "mode": "lines+markers" if line.points or len(line_x) == 1 else "lines",
                "line": {"color": color(line.hue), "dash": line.dash, "width": line.width},
                "marker": {"size": 6},
                "opacity": line.opacity,
                "cliponaxis": False,
                "showlegend": line.legend and len(lines) > 1,
                "hovertemplate": f"%{{y:{shown}}}",
            }
        )
    steps = [step for line in lines for step in line.x]
    for mark in marks:
        look = {"symbol": "star", "size": 14, "color": color(mark.hue)}
        data.append({"x": [mark.x], "y": [mark.y], "mode": "markers", "marker": look, "cliponaxis": False})
        data[-1] |= {"showlegend": False, "hoverinfo": "skip"}
        notes.append(
            {"x": mark.x, "y": mark.y, "text": plain(mark.text), "yshift": 18, "xanchor": _anchor(mark.x, steps)}
        )
        notes[-1]["font"] = {"color": color(mark.hue)}
    for level in levels:
        notes.append({"x": 1, "xref": "paper", "xanchor": "right", "y": level.y, "yanchor": "bottom"})
        notes[-1] |= {"text": plain(level.text), "font": {"color": color("muted"), "size": 12}}
    rules = [_rule("dash", x0=0, x1=1, xref="paper", y0=level.y, y1=level.y) for level in levels]
    known = [value for line in lines for value in line.y if value is not None]
    logarithmic = may_be_logarithmic and spans_decades(known)
    yaxis: dict[str, Any] = {"rangemode": "tozero" if from_zero else "normal", "exponentformat": "e"}
    if logarithmic:
        yaxis |= {"type": "log", "dtick": "D2" if max(known) < 300 * min(known) else 1}
    return _figure(data, x, y, yaxis, steps, start, notes, rules)


def size_bands(steps: Sequence[int], sizes: Sequence[Sequence[int]], start: int | None = None) -> dict[str, Any]:
    """How the sentences between two evaluations spread over the clusters: quantiles of the clusters' shares.

    Args:
        sizes: of each step, the sentences in each of the K clusters.
    """
    shares = [[100 * size / sum(row) for size in row] for row in sizes]
    quantiles = {level: [quantile(row, level) for row in shares] for level in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)}
    data: list[dict[str, Any]] = []
    for low, high, opacity, name in ((0, 1, 0.13, "all"), (0.1, 0.9, 0.2, "80 %"), (0.25, 0.75, 0.3, "half")):
        band = {"x": steps, "mode": "lines", "line": {"width": 0, "color": color("blue")}}
        data.append({**band, "y": quantiles[low], "showlegend": False, "hoverinfo": "skip"})
        data.append(
            {**band, "y": quantiles[high], "name": name, "fill": "tonexty", "fillcolor": color("blue", opacity)}
        )
        data[-1] |= {"customdata": quantiles[low], "hovertemplate": "%{customdata:.2f} to %{y:.2f} %"}
    data.append({"x": steps, "y": quantiles[0.5], "mode": "lines+markers", "name": "median"})
    data[-1] |= {"line": {"color": color("blue"), "width": 2}, "hovertemplate": "%{y:.2f} %"}
    even = 100 / len(sizes[0])
    data.append({"x": [min(steps), max(steps)], "y": [even, even], "mode": "lines", "name": f"even, {even:.2g} %"})
    data[-1] |= {"line": {"color": color("muted"), "dash": "dash", "width": 1.5}, "hoverinfo": "skip"}
    return _figure(data, "step", "share of the sentences (%)", {"rangemode": "tozero"}, steps, start)


def sorted_sizes(rows: Sequence[tuple[str, Sequence[int]]]) -> dict[str, Any]:
    """Clusters from the largest to the smallest, at a few moments of a run."""
    looks = (("muted", "dot"), ("orange", "dash"), ("blue", "solid"))[-len(rows) :]
    lines = [
        Line(
            name,
            range(1, len(sizes) + 1),
            [100 * size / sum(sizes) for size in sorted(sizes, reverse=True)],
            hue=hue,
            dash=dash,
            points=len(sizes) <= 40,
        )
        for (name, sizes), (hue, dash) in zip(rows, looks, strict=True)
    ]
    return line_chart(lines, x="cluster, the largest first", y="share of the sentences (%)", from_zero=True)


def _anchor(x: float, steps: Sequence[float]) -> str:
    """Where a text stands on ``x``, so that it does not leave the plot."""
    at = (x - min(steps)) / max(max(steps) - min(steps), 1)
    return "left" if at < 0.15 else "right" if at > 0.85 else "center"


def thin(x: Sequence[float], y: Values) -> tuple[list[float], list[float | None]]:
    """At most ``MAX_POINTS`` points, each the mean of as many neighbours; a group without a value stays a gap."""
    width = -(-len(x) // MAX_POINTS)
    if width <= 1:
        return list(x), list(y)
    groups = [range(at, min(at + width, len(x))) for at in range(0, len(x), width)]
    known = [[value for at in group if (value := y[at]) is not None] for group in groups]
    return [x[group[-1]] for group in groups], [statistics.fmean(values) if values else None for values in known]


def quantile(values: Sequence[float], level: float) -> float:
    """The value below which a share ``level`` of the values lies, interpolated linearly."""
    ordered = sorted(values)
    at = level * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def spans_decades(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows more of these values."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def plain(text: str) -> str:
    """A text that plotly shows as it is, where it would read tags and entities."""
    return html.escape(text, quote=False)


def _rule(dash: str, **place: Any) -> dict[str, Any]:
    return {"type": "line", "line": {"color": color("muted"), "dash": dash, "width": 1}, **place}


def _figure(
    data: Sequence[dict[str, Any]],
    x: str,
    y: str,
    yaxis: dict[str, Any],
    steps: Sequence[float],
    start: int | None = None,
    notes: Sequence[dict[str, Any]] = (),
    rules: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Traces, axes and the look that all plots share, checked by plotly, as plain JSON; NaN becomes null."""
    import plotly.graph_objects as go

    last = max(steps, default=1)
    if start is not None:
        rules = [*rules, _rule("dot", x0=start, x1=start, y0=0, y1=1, yref="paper")]
        said = {"text": f"clustering starts at {start:,}", "font": {"color": color("muted"), "size": 12}}
        place = {"x": start, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": _anchor(start, [0, last])}
        notes = [*notes, said | place]
    axis = {"automargin": True, "gridcolor": color("rule"), "linecolor": color("muted"), "zeroline": False, "ticks": ""}
    title = {"standoff": 8, "font": {"size": 13, "color": color("muted")}}
    pointer = {"spikecolor": color("muted"), "spikethickness": 1, "spikedash": "dot"}
    if x == "step":
        pointer["unifiedhovertitle"] = {"text": "step %{x:,d}"}
    layout = {
        "template": "none",
        "font": {"family": "ui-sans-serif, system-ui, sans-serif", "size": 13, "color": color("ink")},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": color("paper"),  # the line under the pointer is drawn on it
        "margin": {"l": 8, "r": 12, "t": 26, "b": 8},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": color("raised"), "bordercolor": color("rule"), "font": {"color": color("ink")}},
        "dragmode": "zoom",
        "annotations": [{"showarrow": False, **note} for note in notes],
        "shapes": list(rules),
        "xaxis": {
            **axis,
            **pointer,
            "title": {"text": x, **title},
            "range": [0, last * 1.01 or 1],
            "tickformat": ",d",
            "nticks": 7,
            "showgrid": False,
            "showline": True,
        },
        "yaxis": {**axis, "title": {"text": y, **title}, "nticks": 8, **yaxis},
    }
    return json.loads(str(go.Figure([{"type": "scatter", **trace} for trace in data], layout).to_json()))
