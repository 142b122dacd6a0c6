"""The report as a reader sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import make_run, write_json

from clusterns_ray.report import write_report
from clusterns_ray.report.page import COLORS

HOSTILE = """</script><script>hacked = 1</script><!-- <img src=x onerror="hacked = 1">"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose corpus means harm, and whose paths are long."""
    directory = make_run(tmp_path_factory.mktemp("run"), data={"corpus": f"/{'a-very-long-directory/' * 6}{HOSTILE}"})
    clusters = json.loads((directory / "clusters.json").read_text())
    clusters["clusters"][0]["examples"] = [HOSTILE, "x" * 300]
    write_json(directory / "clusters.json", clusters)
    return write_report([directory])[0]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("runs")
    made = [
        make_run(storage, f"k{k}-seed{seed}", seed, clustering={"num_clusters": k}) for k in (0, 32) for seed in (1, 2)
    ]
    return write_report(made)[0]


@pytest.fixture(params=["run_page", "comparison"])
def page_file(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def rgb(color: str) -> str:
    return "rgb(" + ", ".join(str(int(color[at : at + 2], 16)) for at in (1, 3, 5)) + ")"


def colors(page: Any) -> tuple[str, str, str]:
    """Of the page, of a plot's figures, and of its first curve."""
    return page.evaluate(
        """() => {
            const of = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
            return [of("body", "backgroundColor"), of(".plot .xtick text", "fill"),
                    of(".plot .scatterlayer .js-line", "stroke")];
        }"""
    )


def test_plots_are_drawn_and_nothing_is_loaded(page_file: Path, open_page: Callable[..., Any]) -> None:
    opened = open_page(page_file)
    drawn = opened.page.evaluate(
        """() => [...document.querySelectorAll(".plot")].map((box) =>
            [box.querySelectorAll("svg.main-svg").length, box.querySelectorAll(".scatterlayer .trace path").length,
             box.querySelector("svg").getBoundingClientRect().width, box.getBoundingClientRect().width])"""
    )
    assert len(drawn) >= 8
    assert all(svgs and paths and abs(width - room) < 2 for svgs, paths, width, room in drawn), drawn
    assert opened.complaints == [] and opened.requests == [page_file.as_uri()]
    assert opened.page.evaluate("typeof hacked") == "undefined"
    assert not opened.page.is_visible("#notice")
    assert page_file.stat().st_size < 5_000_000


@pytest.mark.parametrize("width", [360, 390, 768, 1440])
def test_the_page_does_not_scroll_sideways(page_file: Path, open_page: Callable[..., Any], width: int) -> None:
    phone = {"is_mobile": True, "has_touch": True} if width < 500 else {}
    page = open_page(page_file, width=width, **phone).page
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    if width < 500:
        scrolling = page.evaluate(
            "[...document.querySelectorAll('.table')].filter((box) => box.scrollWidth > box.clientWidth).length"
        )
        assert scrolling >= 1, "the wide table of tests scrolls in its own box"
        assert page.evaluate("getComputedStyle(document.querySelector('.plot .drag')).touchAction") == "pan-y"


def test_the_theme_is_the_readers_and_follows_him(page_file: Path, open_page: Callable[..., Any]) -> None:
    expected = [tuple(rgb(COLORS[name][theme]) for name in ("paper", "ink", "blue")) for theme in (0, 1)]
    page = open_page(page_file, theme="dark").page
    assert tuple(colors(page)) == expected[1]
    page.emulate_media(color_scheme="light")
    page.wait_for_selector("html[data-drawn=light]", state="attached")
    assert tuple(colors(page)) == expected[0]


def test_words_and_tables_without_javascript(run_page: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(run_page, java_script_enabled=False).page
    assert "The plots need JavaScript" in page.inner_text("main")
    assert page.locator("table").count() >= 5 and "78.72" in page.inner_text("#STS-tests, #sts-tests")


def test_a_browser_that_cannot_unpack_says_so(run_page: Path, open_page: Callable[..., Any]) -> None:
    opened = open_page(run_page, before="delete window.DecompressionStream")
    assert "cannot be drawn in this browser" in opened.page.inner_text("#notice")
    assert opened.complaints == []


def test_on_paper_a_dark_page_is_light(page_file: Path, open_page: Callable[..., Any]) -> None:
    light = tuple(rgb(COLORS[name][0]) for name in ("ink", "blue"))
    page = open_page(page_file, theme="dark").page
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_selector("html[data-drawn=light]", state="attached")
    assert tuple(colors(page)[1:]) == light
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == light[0]
    page.emulate_media(media="screen", color_scheme="dark")
    page.wait_for_selector("html[data-drawn=dark]", state="attached")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert colors(page)[2] == light[1], "drawn at once, as the browser prints when the event returns"
