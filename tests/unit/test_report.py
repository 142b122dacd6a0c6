"""The report of a run: what is read, warned of and shown, of runs made up for the purpose and of a real small one."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from report_runs import Html, make_run, page_text, run_config, sts_scores, write_json, write_records
from typer.testing import Result

from clusterns_ray.config import dump_config
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.evaluation.sts import TASKS
from clusterns_ray.report import advice, write_report
from clusterns_ray.report.advice import advise
from clusterns_ray.report.charts import MAX_POINTS, size_bands, thin
from clusterns_ray.report.page import Examples, render_page
from clusterns_ray.report.record import RunRecord, read_records, read_run
from clusterns_ray.report.run import changed_keys, run_page
from clusterns_ray.report.sts_table import PUBLISHED
from clusterns_ray.report.words import duration, spread

if TYPE_CHECKING:
    from training_runs import WholeRun

CLUSTERED = {
    "clusters_used", "hard_negative_cosine", "largest_cluster", "false_negative_rate", "empty_clusters",
    "cluster_sizes", "centroid_drift",
}  # fmt: skip


def warnings_of(run: RunRecord) -> list[str]:
    return [warning.text for warning in advise(run)]


def change_records(directory: Path, change: Callable[[dict[str, Any]], None]) -> RunRecord:
    records = read_records(directory / "metrics.jsonl")
    for record in records:
        change(record)
    write_records(directory, records)
    return read_run(directory)


# ---- numbers ------------------------------------------------------------------------------------------------------


def test_mean_and_deviation() -> None:
    assert spread([73.0, 74.0]) == "73.50\u202f±\u202f0.71"
    assert spread([73.0]) == "73.00" and spread([73.0, None]) == "–" and spread([]) == "–"


def test_durations() -> None:
    assert [duration(value) for value in (0.4, 59.6, 125, 7260, None)] == [
        "0\u00a0s", "1\u00a0min 0\u00a0s", "2\u00a0min 5\u00a0s", "2\u00a0h 1\u00a0min", "–"
    ]  # fmt: skip


def test_thinned_curves_keep_their_mean_and_their_gaps() -> None:
    y: list[float | None] = np.random.default_rng(0).random(4 * MAX_POINTS).tolist()
    x, thinned = thin(range(len(y)), y)
    assert len(x) == len(thinned) == MAX_POINTS and x[-1] == len(y) - 1
    assert np.mean([v for v in thinned if v is not None]) == pytest.approx(np.mean([v for v in y if v is not None]))
    y[8:12] = [None] * 4
    assert thin(range(len(y)), y)[1][2] is None
    assert thin([1, 2], [3.0, None]) == ([1, 2], [3.0, None])


def test_published_averages_are_those_of_their_rows() -> None:
    assert [item.average for item in PUBLISHED] == [76.25, 77.55, 78.54, 78.72]
    for item in PUBLISHED:
        assert len(item.scores) == len(TASKS)
        # PromptBERT's average is a mean over runs that was rounded later than its tasks
        assert statistics.fmean(item.scores) == pytest.approx(item.average, abs=0.02)


# ---- reading ------------------------------------------------------------------------------------------------------


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(run_config("early")))
    run = read_run(tmp_path)
    assert (run.finished, run.last_step, run.best, run.before, run.last, run.dev_scores) == (
        False,
        0,
        None,
        None,
        None,
        [],
    )
    text = page_text(run_page(run))
    assert "not finished" in text and "There is no score on STSB/dev after a step." in text


def test_a_line_that_a_crash_cut_off_is_left_out(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    whole = read_records(path)
    path.write_text(path.read_text() + '{"step": 405, "lo')
    assert read_records(path) == whole


@pytest.mark.parametrize("line", ['{"step": 405, "lo', "[]", '{"loss": 1}', '{"step": "4"}', '{"step": true}'])
def test_a_broken_line_is_named(run_dir: Path, line: str, clusterns: Callable[..., Result]) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace("\n", f"\n{line}\n", 1))
    with pytest.raises(DataError, match=r"metrics.jsonl:2: .* is not a JSON object with a step"):
        read_run(run_dir)
    result = clusterns("report", run_dir)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (run_dir / "report.html").exists()


def test_what_is_not_finite_is_a_gap(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 0.5, "bml": "x"}\n')
    run = read_run(run_dir)
    assert run.curve("loss") == ([1, 2, 3], [None, None, 0.5]) and run.curve("bml") == ([3], [None])


@pytest.mark.parametrize("name", ["result.json", "clusters.json", "environment.json", "evaluation.json"])
@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_file_is_named(run_dir: Path, name: str, text: str) -> None:
    (run_dir / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}.*JSON"):
        read_run(run_dir)


def test_older_runs_lack_parts(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, complete=False))
    assert run.environment is None and run.clusters is None and run.sts is None
    page = run_page(run)
    titles = [section.title for section in page.sections]
    assert "What the clusters hold" not in titles and "Cluster health" in titles
    text = page_text(page)
    assert (
        "clusterns evaluate" in text
        and "--sts sts --json" in text
        and str(tmp_path / "night" / "evaluation.json") in text
    )
    assert "2.13.0" in text, "result.json has the versions of torch and python"


# ---- warnings in words --------------------------------------------------------------------------------------------


def test_a_healthy_run_has_no_warnings(run_dir: Path) -> None:
    assert warnings_of(read_run(run_dir)) == []


def test_the_bounds_are_those_of_the_collapse_monitor() -> None:
    from clusterns_ray.clustering.health import EMPTY_AFTER
    from clusterns_ray.report import record
    from clusterns_ray.training import collapse_monitor, evaluator

    assert (advice.COLLAPSED_COSINE, advice.EMPTY_SHARE) == (
        collapse_monitor.COLLAPSED_COSINE,
        collapse_monitor.EMPTY_SHARE,
    )
    assert (advice.EMPTY_AFTER, record.COLLAPSED) == (EMPTY_AFTER, evaluator.COLLAPSED)


Change = Callable[[int, Any], Any]
SAID: dict[str, tuple[dict[str, Change], list[str]]] = {
    "collapse": ({"mean_cosine": lambda step, v: 0.93 if step >= 300 else v}, ["Collapse: from step 300 | (0.93)"]),
    "a mean cosine that wavers": ({"mean_cosine": lambda step, v: 0.93 if step >= 300 else 0.85}, []),
    "a score that is none": (
        {"sts_dev": lambda step, v: None if step > 300 else v}, ["at steps 325, 350, 375 and 1 more"]
    ),
    "a score of a collapse": ({"sts_dev": lambda step, v: -100.0 if step == 350 else v}, ["computed at step 350: "]),
    "a score that fell": (
        {"sts_dev": lambda step, v: v - 8 if step > 350 else v}, ["fell from 73.17 at step 300 to 64.77"]
    ),
    "dead clusters": (
        {"empty_clusters": lambda step, v: 10}, ["10 of 32 clusters had no sentence in the last 50 steps"]
    ),
    "few or early empty ones": ({"empty_clusters": lambda step, v: 20 if step < 80 else 9}, []),
    "dead ones that came back": (
        {"empty_clusters": lambda step, v: 12 if step == 200 else 1}, ["at step 200 12 of 32 | and at step 400 1."]
    ),
    "an oversized cluster": (
        {"cluster_sizes": lambda step, v: [320] + [10] * 31},
        ["held 50.8\u00a0% of the sentences before the evaluation at step 400"],
    ),
    "a large cluster": ({"cluster_sizes": lambda step, v: [300] + [10] * 31}, []),
    "an oversized one in the batch": (
        {"cluster_sizes": lambda step, v: None, "largest_cluster": lambda step, v: 96},
        ["held 75.0\u00a0% of the sentences of the batch of step 400"],
    ),
    "skipped steps, and a loss that is none": (
        {"skipped_steps": lambda step, v: 3 if step >= 390 else v, "loss": lambda step, v: None if step == 390 else v},
        ["not finite at step 390.", "3 steps moved nothing"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_is_said_of_a_run(run_dir: Path, case: str) -> None:
    changes, expected = SAID[case]

    def change(record: dict[str, Any]) -> None:
        if "loss" in record:
            record.setdefault("skipped_steps", 0)
        record.update({key: of(record["step"], record[key]) for key, of in changes.items() if key in record})

    texts = warnings_of(change_records(run_dir, change))
    assert len(texts) == len(expected)
    for text, parts in zip(texts, expected):
        assert all(part in text for part in parts.split(" | ")), text


def test_embeddings_that_never_spread_have_not_collapsed(run_dir: Path) -> None:
    from clusterns_ray.training.collapse_monitor import SPREAD_COSINE

    assert advice.SPREAD_COSINE == SPREAD_COSINE
    run = change_records(run_dir, lambda record: record.update(mean_cosine=0.95))
    assert not any("Collapse" in text for text in warnings_of(run))


def test_a_last_score_that_is_none(run_dir: Path) -> None:
    run = change_records(run_dir, lambda record: record.update({"sts_dev": None} if record["step"] == 400 else {}))
    page = run_page(run)
    assert run.last is None and "at the last evaluation there was none" in page_text(page)
    assert None not in page.sections[0].figures[0].figure["data"][0]["y"][:16]


def test_warns_where_training_did_not_help(tmp_path: Path) -> None:
    (text,) = warnings_of(read_run(make_run(tmp_path, gain=-4)))
    assert text.startswith("Training did not improve the dev score: 63.00 before")


def test_says_where_the_untrained_encoder_was_kept(tmp_path: Path) -> None:
    directory = make_run(tmp_path, gain=-4)
    page = page_text(run_page(read_run(directory)))
    assert "untrained encoder" not in page and "the one that was exported" in page
    result = json.loads((directory / "result.json").read_text())
    write_json(directory / "result.json", result | {"best_step": 0})
    page = page_text(run_page(read_run(directory)))
    assert "not kept: no better than the untrained encoder" in page and "so that one was exported" in page
    assert "chosen on this set" not in page and "No step beat the untrained encoder, so model/ holds" in page


def test_warns_where_clustering_never_started(run_dir: Path) -> None:
    def strip(record: dict[str, Any]) -> None:
        for key in set(record) & CLUSTERED:
            del record[key]
        if "loss" in record:
            record["mean_cosine"] = 0.5 + record["step"] / 1e4

    result = json.loads((run_dir / "result.json").read_text())
    write_json(run_dir / "result.json", result | {"clustering_started_at": None})
    run = change_records(run_dir, strip)
    (text,) = warnings_of(run)
    assert (
        "never started" in text and "clustering.start_cosine (0.4)" in text and "lowest that was logged is 0.50" in text
    )
    assert "Cluster health" not in [section.title for section in run_page(run).sections]


def test_notes_a_score_that_still_rises(run_dir: Path) -> None:
    def rise(record: dict[str, Any]) -> None:
        if "sts_dev" in record:
            record["sts_dev"] = 60 + record["step"] / 100

    run = change_records(run_dir, rise)
    (warning,) = advise(run)
    assert warning.level == "note" and "+0.25 at the last evaluation (step 400)" in warning.text
    assert "at step 400, the last." in page_text(run_page(run))
    (run_dir / "result.json").unlink()
    assert [warning.level for warning in advise(read_run(run_dir))] == ["problem"], (
        "it goes on, so rising is as it should"
    )


def test_says_what_the_dev_set_is(tmp_path: Path) -> None:
    documents = {"data": {"documents": "docs"}, "evaluation": {"sts": "structure"}}
    (warning,) = advise(read_run(make_run(tmp_path, "docs", **documents)))
    assert warning.level == "note" and "not by people" in warning.text
    run = read_run(make_run(tmp_path, "none", evaluation={"sts": None}))
    assert "No dev set was given" in warnings_of(run)[0]
    assert "Dev score" not in [section.title for section in run_page(run).sections]


# ---- the page of a run --------------------------------------------------------------------------------------------


def test_what_the_page_of_a_run_holds(run_dir: Path) -> None:
    run = read_run(run_dir)
    page = run_page(run)
    source = render_page(page)
    html = Html(source)
    text = " ".join(html.text.split())
    assert "73.17, +10.17 from 63.00 before training, at step 300; the last score is 72.77." in text
    assert "clusterns train night.yaml --set seed=1" in text and "1 March 2026, 21:04 UTC" in text
    assert "Linux-6.1-x86_64" in text and "31.2 GiB" in text and "clusterns-ray" in text
    assert [s.title for s in page.sections] == [
        "Dev score", "Loss", "Cluster health", "Shape of the space", "What the clusters hold", "STS tests",
        "Throughput", "What was run",
    ]  # fmt: skip
    plots = html.plots()
    assert len(plots) == sum(len(section.figures) for section in page.sections) == 17
    for plot in plots:
        assert plot["layout"]["yaxis"]["title"]["text"] and plot["layout"]["xaxis"]["title"]["text"]
    dev = plots[0]["data"]
    assert dev[0]["x"] == list(range(0, 401, 25)) and dev[0]["y"] == [r["sts_dev"] for r in run.evaluations]
    assert (dev[1]["x"], dev[1]["marker"]["symbol"]) == ([300], "star")
    assert any(shape["x0"] == 30 for shape in plots[0]["layout"]["shapes"]), "the start of clustering"
    for name, row in [("night", run.sts), *((item.name, None) for item in PUBLISHED)]:
        assert name in text and (row is None or f"{row['average']:.2f}" in text)
    assert sum(f"{item.average:.2f}" in text for item in PUBLISHED) == 4
    assert "STS_DIRECTORY" not in text and "clusterns evaluate" not in text
    assert len(source) < 3_000_000


def test_a_run_with_a_teacher_shows_the_distance_from_it(tmp_path: Path) -> None:
    directory = make_run(tmp_path, loss={"teacher": "runs/first/model", "distillation_weight": 3.0, "mlm_weight": 0.1})
    records = read_records(directory / "metrics.jsonl")
    write_records(directory, [{**r, "distillation": 1.0 / r["step"]} if "loss" in r else r for r in records])
    section = next(s for s in run_page(read_run(directory)).sections if s.title == "Loss")
    figures = {figure.title: figure for figure in section.figures}
    assert "plus 3 times the distance from the teacher's ranking plus 0.1 times masked" in figures["Loss"].words
    assert "runs/first/model" in figures["Distance from the teacher"].words


def test_examples_of_the_largest_and_the_tightest(run_dir: Path) -> None:
    clusters = read_run(run_dir).clusters
    assert clusters is not None
    section = next(s for s in run_page(read_run(run_dir)).sections if s.title == "What the clusters hold")
    largest, tightest = section.tables
    order = sorted(clusters["clusters"], key=lambda c: -c["size"])
    assert [row[0] for row in largest.rows] == [str(c["cluster"]) for c in order[:6]]
    assert largest.rows[0][3] == Examples(order[0]["examples"])
    big = sorted((c for c in order if c["size"] >= 5), key=lambda c: -c["tightness"])
    assert [row[0] for row in tightest.rows] == [str(c["cluster"]) for c in big[:6]]


def test_changed_keys_are_those_that_are_not_the_default() -> None:
    rows = {key: (value, standard) for key, value, standard in changed_keys(run_config("x", 42))}
    assert rows["clustering.num_clusters"] == ("32", "128") and rows["evaluation.patience"] == ("null", "3")
    assert rows["data.corpus"] == ("texts/*.txt", "null")
    assert "seed" not in rows and "train.learning_rate" not in rows


def test_simcse_has_no_clusters(tmp_path: Path) -> None:
    page = run_page(read_run(make_run(tmp_path, clustering={"num_clusters": 0})))
    titles = [section.title for section in page.sections]
    assert "Cluster health" not in titles and "What the clusters hold" not in titles and "Shape of the space" in titles
    assert page.subtitle.startswith("SimCSE") and not page.warnings


def test_a_partial_average_is_not_one(run_dir: Path) -> None:
    write_json(run_dir / "evaluation.json", sts_scores(missing=("STS13", "SICKR")))
    section = next(s for s in run_page(read_run(run_dir)).sections if s.title == "STS tests")
    assert section.tables[0].rows[0][-1] == "–" and section.tables[0].rows[0][2] == "–"
    assert any("(SICKR, STS13)" in words for words in section.words)


def test_what_an_evaluation_may_hold(run_dir: Path) -> None:
    whole = sts_scores()
    for value, scored in (
        ({"models": [whole, sts_scores(seed=9)], "differences": []}, True),
        ({"model": "model", "transfer": {}}, False),
    ):
        write_json(run_dir / "evaluation.json", value)
        run = read_run(run_dir)
        assert run.sts == (whole if scored else None)
        assert ("clusterns evaluate" in page_text(run_page(run))) is not scored
    write_json(run_dir / "evaluation.json", whole | {"data": {"sts": "hf", "protocol": {"SICKR": "all 9,927 pairs"}}})
    assert "not those of the papers (SICKR: all 9,927 pairs)" in page_text(run_page(read_run(run_dir)))


@pytest.mark.slow
def test_long_runs_stay_small(run_dir: Path) -> None:
    records = read_records(run_dir / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "sts_dev" in record]
    many = [steps[at % len(steps)] | {"step": at} for at in range(1, 20_000)]
    many += [evaluations[at % len(evaluations)] | {"step": 25 * at} for at in range(800)]
    write_records(run_dir, many)
    page = run_page(read_run(run_dir))
    assert max(len(trace["x"]) for s in page.sections for f in s.figures for trace in f.figure["data"]) <= MAX_POINTS
    assert len(render_page(page)) < 3_000_000
    assert len(page.sections[0].tables[0].rows) <= 201


def test_size_bands_hold_what_they_say() -> None:
    sizes = [[10, 20, 30, 40], [0, 0, 0, 100]]
    figure = size_bands([5, 10], sizes)
    named = {trace["name"]: trace for trace in figure["data"] if trace.get("name")}
    assert named["all"]["y"] == [40, 100] and named["all"]["customdata"] == [10, 0]
    assert named["median"]["y"] == [25, 0] and named["half"]["y"] == pytest.approx([32.5, 25])


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command(run_dir: Path, clusterns: Callable[..., Result]) -> None:
    result = clusterns("report", run_dir)
    assert result.exit_code == 0 and result.output.splitlines()[-1] == f"Wrote {run_dir / 'report.html'}"
    assert (run_dir / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "at step 300" in result.output
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".")] == []


def test_requests_that_are_refused(tmp_path: Path, run_dir: Path, clusterns: Callable[..., Result]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.html").mkdir()
    cases = [
        ([tmp_path / "nowhere"], "is not there"),
        ([run_dir / "config.yaml"], "is a file"),
        ([tmp_path / "empty"], "is not a run: it has no config.yaml. Give STORAGE_PATH/NAME"),
        ([tmp_path], "It holds the runs night: name those"),
        ([run_dir, run_dir / ".." / "night"], "is named twice"),
        ([run_dir, "-o", run_dir / "metrics.jsonl"], "ends in .html"),
        ([run_dir, "-o", tmp_path / "no" / "page.html"], "cannot be written: No such file or directory"),
        ([run_dir, "-o", tmp_path / "taken.html"], "cannot be written: it is a directory"),
    ]
    before = (run_dir / "metrics.jsonl").read_text()
    for arguments, message in cases:
        result = clusterns("report", *arguments)
        assert isinstance(result.exception, SystemExit) and result.exit_code == 2, arguments
        assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_a_report_that_fails_leaves_the_one_before(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report([run_dir]).path
    before = path.read_text(encoding="utf-8")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError):
        write_report([run_dir])
    assert path.read_text(encoding="utf-8") == before


def test_no_run_at_all() -> None:
    with pytest.raises(ConfigError, match="No run is named"):
        write_report([])


def test_it_loads_nothing_heavy(run_dir: Path) -> None:
    code = (
        "import sys; from clusterns_ray.report import write_report; write_report([sys.argv[1]]); "
        "print([name for name in ('torch', 'ray', 'transformers', 'datasets', 'faiss') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ---- a real small run ---------------------------------------------------------------------------------------------


def test_a_real_small_run(whole: WholeRun, corpus_file: Path, sts_dir: Path) -> None:
    run, result = whole.directory, whole.result
    path, page, _ = write_report([run])
    html = Html(path.read_text(encoding="utf-8"))
    text = " ".join(html.text.split())
    records = read_records(run / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    scores = [record["sts_dev"] for record in records if "sts_dev" in record]
    assert len(losses) == 6 and len(scores) == 4

    facts = {fact.label: fact.value for fact in page.facts}
    assert facts["Dev, best step"] == f"{result['sts_dev']:.2f}".replace("-", "−")
    assert facts["Dev, last step"] == f"{result['sts_dev_last']:.2f}".replace("-", "−") and facts["Steps"] == "6"
    traces = [trace for plot in html.plots() for trace in plot["data"]]
    assert [trace["y"] for trace in traces if trace.get("name") == "loss"] == [losses]
    assert [trace["y"] for trace in traces if trace.get("name") == "STSB/dev"] == [scores]
    titles = {figure.title for section in page.sections for figure in section.figures}
    assert {
        "Loss", "Bidirectional Margin Loss", "Clusters in use", "The largest cluster", "Sizes over time",
        "Sizes, sorted", "Centroid drift", "False negatives", "Hard negatives", "Mean cosine", "Alignment",
        "Uniformity", "Effective rank", "Sentences per second",
    } <= titles  # fmt: skip
    clusters = json.loads((run / "clusters.json").read_text())["clusters"]
    assert clusters[0]["examples"][0] in text, "a sentence of the corpus"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"] in text and environment["machine"]["platform"] in text
    assert f"clusterns evaluate {run / 'model'} --sts {sts_dir}" in text
    assert "clustering.num_clusters" in text and str(corpus_file) in text
