"""The page of several runs: groups of one configuration, their differences, and what is warned of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from report_runs import Html, make_run
from typer.testing import Result

from clusterns_ray.report.compare import compare_page, group_runs, mean_curve
from clusterns_ray.report.page import render_page
from clusterns_ray.report.places import default_output
from clusterns_ray.report.record import RunRecord, read_run
from clusterns_ray.tuning.comparison import difference_over_seeds


def test_mean_curve_where_all_have_a_value() -> None:
    assert mean_curve([{0: 1.0, 2: 2.0, 4: None}, {0: 3.0, 2: 5.0, 4: 1.0, 6: 9.0}]) == ([0, 2], [2.0, 3.5])


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    made, place = [], tmp_path_factory.mktemp("six")
    for seed in (1, 2, 3):
        for k in (32, 0):
            made.append(make_run(place, f"k{k}-seed{seed}", seed, gain=9 + seed / 2, clustering={"num_clusters": k}))
    return [read_run(path) for path in made]


def test_runs_that_differ_in_their_seed_are_one_group(six: list[RunRecord]) -> None:
    first, second = group_runs(six)
    assert [run.name for run in first.runs] == ["k32-seed1", "k32-seed2", "k32-seed3"]
    assert [run.config.seed for run in second.runs] == [1, 2, 3]
    assert (first.differences, second.differences) == ({"clustering.num_clusters": 32}, {"clustering.num_clusters": 0})
    assert (first.label, second.label) == ("A: num_clusters 32", "B: num_clusters 0")
    (alone,) = group_runs(six[::2])
    assert alone.differences == {} and alone.label == "A"


def test_what_a_comparison_holds(six: list[RunRecord]) -> None:
    (six[0].path / "report.html").write_text("")
    page = compare_page(six, six[0].path.parent)
    html = Html(render_page(page))
    text = " ".join(html.text.split())
    groups = [six[::2], six[1::2]]
    for runs in groups:
        for values in (
            [run.best[1] for run in runs if run.best],
            [run.last for run in runs if run.last is not None],
            [run.sts_average for run in runs if run.sts_average is not None],
        ):
            assert len(values) == 3
            assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in text.replace("\u202f", " ")
    assert page.title == "6 runs compared" and "(runs that differ in their seed alone are one)" in page.headline[0]
    interval = difference_over_seeds(*([run.last or 0.0 for run in runs] for runs in groups))
    assert (
        interval
        and interval["low"] <= 0 <= interval["high"]
        and "these seeds do not tell them apart" in page.headline[1]
    )
    assert "clustering.num_clusters" in text and "k0-seed2" in text
    assert html.loads.count("k32-seed1/report.html") == 1 and "k0-seed2/report.html" not in html.loads
    dev = html.plots()[0]["data"]
    assert [trace["line"]["width"] for trace in dev] == [1, 1, 1, 3, 1, 1, 1, 3]
    assert dev[3]["y"] == pytest.approx(np.mean([trace["y"] for trace in dev[:3]], axis=0).tolist())
    assert {trace["line"]["color"] for trace in dev[:4]}.isdisjoint(trace["line"]["color"] for trace in dev[4:])


def test_a_difference_that_seeds_can_tell(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path, f"k{k}-{seed}", seed, gain=gain, clustering={"num_clusters": k}))
        for seed in (1, 2, 3)
        for k, gain in ((32, 12), (0, 6))
    ]
    assert "which excludes 0" in compare_page(runs, tmp_path).headline[1]


def test_a_comparison_warns(tmp_path: Path) -> None:
    runs = [
        read_run(make_run(tmp_path, "a", 1)),
        read_run(make_run(tmp_path, "b", 1, finished=False)),
        read_run(make_run(tmp_path, "c", 1, evaluation={"dev": "OTHER/dev"})),
    ]
    texts = [warning.text for warning in compare_page(runs, tmp_path).warnings]
    assert texts[0].startswith("The runs have different dev sets (OTHER/dev, STSB/dev)")
    assert "several runs of seed 1" in texts[1] and texts[2].startswith("b: This run is not finished")
    assert "B has one seed" in texts[3] and len(texts) == 4
    assert len(compare_page(runs, tmp_path).headline) == 1, "no winner across dev sets"


def test_one_configuration(six: list[RunRecord], tmp_path: Path) -> None:
    page = compare_page(six[::2], tmp_path)
    assert page.title == "3 runs of one configuration" and "What differs" not in [s.title for s in page.sections]
    assert [fact.label for fact in page.facts][:2] == ["Dev, before training", "Dev, best step"]
    assert page.facts[0].value == "63.00\u202f±\u202f0.00"


def test_where_the_page_of_several_goes(six: list[RunRecord], tmp_path: Path, clusterns: Callable[..., Result]) -> None:
    assert default_output([tmp_path / "x" / "a", tmp_path / "y" / "b"]) == tmp_path / "report.html"
    result = clusterns("report", six[0].path, six[1].path)
    assert result.exit_code == 0 and result.output.splitlines()[-1] == f"Wrote {six[0].path.parent / 'report.html'}"
    result = clusterns("report", six[0].path, "-o", tmp_path / "mine.html")
    assert result.output.splitlines()[-1] == f"Wrote {tmp_path / 'mine.html'}" and (tmp_path / "mine.html").is_file()
