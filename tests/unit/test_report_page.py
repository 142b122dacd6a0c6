"""The HTML page of a report: texts are texts, only its own scripts run, and every colour has a dark one."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import Html, make_run, write_json

from clusterns_ray.report.charts import Line, line_chart
from clusterns_ray.report.page import COLORS, HUES, Examples, Figure, Link, Page, Section, Table, render_page
from clusterns_ray.report.record import read_run
from clusterns_ray.report.run import run_page

HOSTILE = """</script><script>hacked = 1</script><!-- "quoted" & 'so' <img src=x onerror="hacked = 1">"""


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_lines_stand_out_from_the_paper(theme: int) -> None:
    def luminance(color: str) -> float:
        channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    paper = luminance(COLORS["paper"][theme])
    for name in ("ink", "muted", *HUES):
        for ground in (paper, luminance(COLORS["raised"][theme])):
            light, dark = sorted((luminance(COLORS[name][theme]), ground), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def hostile_page() -> Page:
    figure = Figure(HOSTILE, line_chart([Line(HOSTILE, [1], [2]), Line("b", [1], [3])], y=HOSTILE), HOSTILE)
    table = Table([HOSTILE, "x"], [[HOSTILE, Examples([HOSTILE])], [Link(HOSTILE, "#a"), "1"]], HOSTILE, cards=True)
    return Page(HOSTILE, HOSTILE, [HOSTILE], [Section(HOSTILE, [HOSTILE], [figure], [table], code=HOSTILE, anchor="a")])


def test_texts_are_texts() -> None:
    html = Html(render_page(hostile_page()))
    kinds = [(kind, name) for kind, name, _ in html.scripts]
    assert kinds == [
        ("application/json", None), ("application/json", "colors"), ("application/gzip;base64", "plotly"), (None, None)
    ]  # fmt: skip
    assert "img" not in html.tags and html.text.count("hacked = 1</script><!-- \"quoted\" & 'so'") >= 9
    (plot,) = html.plots()
    assert "<" not in plot["data"][0]["name"], "plotly reads tags and entities in names"


def test_a_corpus_cannot_write_into_the_page(tmp_path: Path) -> None:
    directory = make_run(tmp_path, data={"corpus": HOSTILE})
    clusters = json.loads((directory / "clusters.json").read_text())
    clusters["clusters"][0]["examples"] = [HOSTILE]
    write_json(directory / "clusters.json", clusters)
    environment = json.loads((directory / "environment.json").read_text())
    write_json(directory / "environment.json", environment | {"command": ["clusterns", HOSTILE], "started": HOSTILE})
    html = Html(render_page(run_page(read_run(directory))))
    assert "img" not in html.tags and [kind for kind, _, _ in html.scripts].count(None) == 1
    assert html.text.count("hacked = 1") >= 4


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return run_page(read_run(make_run(tmp_path_factory.mktemp("runs"))))


def test_nothing_is_loaded_and_only_its_own_scripts_run(page: Page) -> None:
    from plotly.offline import get_plotlyjs

    html = Html(render_page(page))
    assert all(value.startswith(("#", "data:,")) for value in html.loads) and len(html.loads) > 5
    assert "default-src 'none'" in html.csp and "unsafe-eval" not in html.csp
    assert "script-src 'unsafe-inline'" not in html.csp
    packed = next(text for _, name, text in html.scripts if name == "plotly")
    plotly = gzip.decompress(base64.b64decode(packed)).decode()
    assert plotly == get_plotlyjs()
    (script,) = [text for kind, _, text in html.scripts if kind is None]
    for source in (script, plotly):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" in html.csp


def test_the_same_run_gives_the_same_page(page: Page, tmp_path: Path) -> None:
    assert render_page(run_page(read_run(make_run(tmp_path)))) == render_page(page)


def test_every_colour_of_a_plot_has_a_dark_one(page: Page) -> None:
    light = {pair[0] for pair in COLORS.values()}
    tints = {", ".join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5)) for color in light}

    def colors(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [color for item in value.values() for color in colors(item)]
        if isinstance(value, list):
            return [color for item in value for color in colors(item)]
        return [value] if isinstance(value, str) and value.startswith(("#", "rgb")) else []

    found = {color for section in page.sections for figure in section.figures for color in colors(figure.figure)}
    assert len(found) > 6
    for color in found - {"rgba(0,0,0,0)"}:
        assert color in light or color.removeprefix("rgba(").rpartition(", ")[0] in tints, color
