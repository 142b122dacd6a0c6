"""Plotly figures in the colours of the page, as JSON."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

from clusterns_ray.report.page import color

MAX_POINTS = 1000
"""Longer curves are drawn as means of neighbours: a screen shows no more, and the file stays small."""

Values = Sequence[float | None]

SMALL = {"color": color("muted"), "size": 12}
DOTTED = {"color": color("muted"), "width": 1, "dash": "dot"}
DASHED = {**DOTTED, "dash": "dash"}


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


def line_chart(
    lines: Sequence[Line],
    *,
    y: str,
    x: str = "step",
    may_be_logarithmic: bool = False,
    from_zero: bool = False,
    shown: str = ",.2f",
    start: int | None = None,
    levels: Sequence[tuple[float, str]] = (),
    mark: tuple[float, float, str] | None = None,
) -> dict[str, Any]:
    """Curves over training steps.

    Args:
        y: title of the axis, with the unit.
        may_be_logarithmic: the axis is, where :func:`spans_decades` says so; not with levels.
        shown: the format of a value under the pointer, which Python and d3 read alike.
        start: the step at which clustering started, marked by a vertical line.
        levels: heights of horizontal lines, and their names.
        mark: a point that stands out, and its name.
    """
    figure = go.Figure()
    for line in lines:
        line_x, line_y = thin(line.x, line.y)
        figure.add_scatter(
            x=line_x,
            y=line_y,
            name=plain(line.name),
            mode="lines+markers" if line.points or len(line_x) == 1 else "lines",
            line={"color": color(line.hue), "dash": line.dash, "width": line.width},
            marker={"size": 6},
            opacity=line.opacity,
            cliponaxis=False,
            showlegend=line.legend and len(lines) > 1,
            hovertemplate=f"%{{y:{shown}}}",
        )
    steps = [step for line in lines for step in line.x]
    if mark is not None:
        x_mark, y_mark, text = mark
        star = {"symbol": "star", "size": 14, "color": color("orange")}
        figure.add_scatter(x=[x_mark], y=[y_mark], mode="markers", marker=star, cliponaxis=False)
        figure.data[-1].update(showlegend=False, hoverinfo="skip")
        font, anchor = {"color": color("orange")}, _anchor(x_mark, steps)
        figure.add_annotation(
            x=x_mark, y=y_mark, text=plain(text), yshift=18, xanchor=anchor, font=font, showarrow=False
        )
    for height, name in levels:
        add_level(figure, height, name)
    known = [value for line in lines for value in line.y if value is not None]
    y_axis: dict[str, Any] = {"rangemode": "tozero" if from_zero else "normal"}
    if may_be_logarithmic and spans_decades(known):
        y_axis |= {"type": "log", "dtick": "D2" if max(known) < 300 * min(known) else 1}
    return _over_steps(figure, x, y, steps, start, y_axis)


def size_bands(steps: Sequence[int], sizes: Sequence[Sequence[int]], start: int | None = None) -> dict[str, Any]:
    """How the sentences between two evaluations spread over the clusters: quantiles of the clusters' shares.

    Args:
        sizes: of each step, the sentences in each of the K clusters.
    """
    shares = [[100 * size / sum(row) for size in row] for row in sizes]
    levels = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    quantiles = dict(zip(levels, np.quantile(shares, levels, axis=1).tolist(), strict=True))
    figure = go.Figure()
    for low, high, opacity, name in ((0, 1, 0.13, "all"), (0.1, 0.9, 0.2, "80 %"), (0.25, 0.75, 0.3, "half")):
        band: dict[str, Any] = {"x": steps, "mode": "lines", "line": {"width": 0, "color": color("blue")}}
        figure.add_scatter(**band, y=quantiles[low], showlegend=False, hoverinfo="skip")
        figure.add_scatter(
            **band,
            y=quantiles[high],
            name=name,
            fill="tonexty",
            fillcolor=color("blue", opacity),
            customdata=quantiles[low],
            hovertemplate="%{customdata:.2f} to %{y:.2f} %",
        )
    middle = {"color": color("blue"), "width": 2}
    figure.add_scatter(x=steps, y=quantiles[0.5], mode="lines+markers", name="median", line=middle)
    figure.data[-1].hovertemplate = "%{y:.2f} %"
    even = 100 / len(sizes[0])
    add_level(figure, even, f"even, {even:.2g} %")
    return _over_steps(figure, "step", "share of the sentences (%)", steps, start, {"rangemode": "tozero"})


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


def add_level(figure: go.Figure, height: float, name: str) -> None:
    """A horizontal line with its name at the right."""
    figure.add_shape(type="line", x0=0, x1=1, xref="x domain", y0=height, y1=height, yref="y", line=DASHED)
    place = {"x": 1, "xref": "x domain", "xanchor": "right", "y": height, "yref": "y", "yanchor": "bottom"}
    figure.add_annotation(text=plain(name), font=SMALL, showarrow=False, **place)


def add_moment(figure: go.Figure, at: float, name: str, last: float) -> None:
    """A vertical line with its name above the plot, which reaches from 0 to ``last``."""
    figure.add_shape(type="line", x0=at, x1=at, xref="x", y0=0, y1=1, yref="y domain", line=DOTTED)
    place = {"x": at, "xref": "x", "xanchor": _anchor(at, [0, last]), "y": 1, "yref": "y domain", "yanchor": "bottom"}
    figure.add_annotation(text=name, font=SMALL, showarrow=False, **place)


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


def spans_decades(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows more of these values."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def plain(text: str) -> str:
    """A text that plotly shows as it is, where it would read tags and entities."""
    return html.escape(text, quote=False)


def _over_steps(
    figure: go.Figure, x: str, y: str, steps: Sequence[float], start: int | None, y_axis: dict[str, Any]
) -> dict[str, Any]:
    last = max(steps, default=1)
    if start is not None:
        add_moment(figure, start, f"clustering starts at {start:,}", last)
    x_axis = {"range": [0, last * 1.01 or 1], "tickformat": ",d", "nticks": 7, "showgrid": False}
    if x == "step":
        x_axis["unifiedhovertitle"] = {"text": "step %{x:,d}"}
    return page_figure(figure, x, y, x_axis=x_axis, y_axis={"nticks": 8, **y_axis}, hovermode="x unified")


def page_figure(
    figure: go.Figure,
    x: str,
    y: str,
    *,
    x_axis: Mapping[str, Any] = MappingProxyType({}),
    y_axis: Mapping[str, Any] = MappingProxyType({}),
    hovermode: str = "closest",
) -> dict[str, Any]:
    """A figure in the look that all plots share, as plain JSON; NaN becomes null.

    The look is laid over the JSON: Plotly's ``update_layout`` takes more time than all the rest of a page.
    """
    axis = {"automargin": True, "gridcolor": color("rule"), "linecolor": color("muted"), "zeroline": False}
    axis |= {"ticks": "", "exponentformat": "e"}
    title = {"standoff": 8, "font": {"size": 13, "color": color("muted")}}
    pointer = {"spikecolor": color("muted"), "spikethickness": 1, "spikedash": "dot"}
    axes = {
        "xaxis": {**axis, **pointer, **x_axis, "showline": True, "title": {"text": plain(x), **title}},
        "yaxis": {**axis, **y_axis, "title": {"text": plain(y), **title}},
    }
    made = json.loads(str(figure.to_json()))
    layout = made["layout"]
    for name, look in axes.items():
        _lay_over(layout.setdefault(name, {}), look)
    layout.pop("title", None)
    look = {
        "template": pio.templates["none"].to_plotly_json(),
        "font": {"family": "ui-sans-serif, system-ui, sans-serif", "size": 13, "color": color("ink")},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": color("paper"),  # the line under the pointer is drawn on it
        "margin": {"l": 8, "r": 12, "t": 26, "b": 8},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": color("raised"), "bordercolor": color("rule"), "font": {"color": color("ink")}},
        "hovermode": hovermode,
    }
    layout.pop("template", None)
    _lay_over(layout, look)
    return made


def _lay_over(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Set ``more`` in ``values``, dictionaries key by key."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _lay_over(values[key], value)
        else:
            values[key] = value
