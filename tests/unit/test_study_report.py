"""The page of a study: what it warns of, what mattered, and that every figure shows the trials it should."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.files import write_atomic
from clusterns_ray.report import study_charts as charts
from clusterns_ray.report.page import Table, color
from clusterns_ray.report.study import advise, read_result, study_page, write_study_report
from clusterns_ray.tuning.analysis import StudyRecord, Trial, at_the_edge, read_study, rungs
from clusterns_ray.tuning.job import Evaluation, Finished
from clusterns_ray.tuning.optuna_study import OptunaStudy
from clusterns_ray.tuning.selection import Candidate, choose, summary
from clusterns_ray.tuning.study import Study, check_study, dump_study

RATE, START, SCHEDULE = "train.learning_rate", "clustering.start_cosine", "train.schedule"
SPACE = {
    "clustering.num_clusters": {"type": "choice", "choices": [0, 16, 32], "role": "scientific"},
    START: {
        "type": "float", "low": 0.2, "high": 0.6, "step": 0.1, "role": "scientific",
        "when": {"clustering.num_clusters": {"not": 0}},
    },
    RATE: {"type": "float", "low": 1e-5, "high": 1e-3, "log": True, "role": "nuisance"},
    SCHEDULE: {"type": "choice", "choices": ["linear", "cosine"], "role": "nuisance"},
    "loss.temperature": {"role": "fixed", "value": 0.05},
}  # fmt: skip
STEPS = (2, 4, 6, 8)
OTHER = optuna.distributions.IntDistribution(0, 9)


def final_score(overrides: dict[str, Any]) -> float:
    """The rate matters most, the schedule not at all."""
    rate = 4 * abs(math.log10(overrides[RATE]) + 4)
    clusters = {0: 0.0, 16: 1.0, 32: 0.6}[overrides["clustering.num_clusters"]]
    return 70 - rate + clusters - 2 * abs(overrides.get(START, 0.4) - 0.4)


def run_trials(study: Study) -> OptunaStudy:
    optuna_study = OptunaStudy(study)
    while not optuna_study.budget_spent():
        proposal = optuna_study.propose()
        if proposal.number == 5:
            optuna_study.fail(5, "out of <memory>", 3.0)
            continue
        score = final_score(proposal.overrides)
        curve = [(step, score - (8 - step) / 2) for step in STEPS]
        for step, value in curve:
            if optuna_study.report(proposal.number, Evaluation(step, value, step == 8, step * 1.5)):
                break
        else:
            optuna_study.complete(proposal.number, Finished(score, 8, tuple(curve), 12.0))
    optuna_study.remember("scores_before", {"x": 55.0})
    return optuna_study


def write_result(
    study: Study, optuna_study: OptunaStudy, scores: dict[int, dict[int, float]] | None = None
) -> dict[str, Any]:
    """A result as ``tune`` writes it; by default of three seeds around each trial's score."""
    finished = sorted((t for t in optuna_study.trials() if t.state.name == "COMPLETE"), key=lambda t: -t.value)[:3]
    found = [
        Candidate(
            t.number,
            dict(t.params),
            t.value,
            {s: t.value - 0.5 + s / 10 for s in (1, 2, 3)} if scores is None else scores.get(t.number, {}),
        )
        for t in finished
    ]
    winner, alike = choose(found, 3 if scores is None else len(next(iter(scores.values()), {})))
    result = {
        "dev": "STSB/dev",
        "best": "runs/pages/best.yaml",
        "sts_dev_before": 55.0,
        "winner": summary(winner),
        "not_told_apart": [candidate.number for candidate in alike],
        "candidates": [summary(candidate) for candidate in found],
        "confirmation_failures": {},
    }
    (study.directory / "result.json").write_text(json.dumps(result))
    return result


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = tmp_path_factory.mktemp("report")
    base = {"data": {"corpus": "demo"}, "evaluation": {"sts": "structure", "every_steps": 2}, "train": {"max_steps": 8}}
    (path / "base.yaml").write_text(yaml.safe_dump({**base, "runtime": {"storage_path": str(path / "runs")}}))
    values: dict[str, Any] = {"name": "pages", "base": "base.yaml", "space": SPACE, "budget": {"trials": 40}}
    values |= {"scheduler": {"name": "asha", "min_steps": 2, "reduction_factor": 2}, "storage": "journal"}
    made = check_study({**values, "sampler": {"name": "tpe", "startup_trials": 8}}, path / "study.yaml")
    optuna_study = run_trials(made)
    write_atomic(made.directory / "study.yaml", dump_study(made))
    write_result(made, optuna_study)
    return made


@pytest.fixture(scope="module")
def record(study: Study) -> StudyRecord:
    return read_study(study.directory)


def test_what_mattered_is_found_and_how_sure_that_is(record: StudyRecord) -> None:
    shares = {importance.key: importance for importance in record.importances}
    assert record.importances[0].key == RATE
    assert shares[RATE].share > 5 * shares[SCHEDULE].share
    assert all(0 <= importance.share <= 1 and importance.deviation > 0 for importance in record.importances)
    assert shares[RATE].deviation < shares[RATE].share
    finished = [trial for trial in record.trials if trial.state == "COMPLETE"]
    assert shares[RATE].trials == len(finished)
    if START in shares:
        assert shares[START].trials == sum(START in trial.values for trial in finished) < len(finished)


@pytest.mark.parametrize(
    ("parameter", "value", "side"),
    [
        ({"type": "float", "low": 0.0, "high": 1.0}, 0.96, "high"),
        ({"type": "float", "low": 0.0, "high": 1.0}, 0.9, None),
        ({"type": "float", "low": 1e-5, "high": 1e-3, "log": True}, 1.1e-5, "low"),
        ({"type": "float", "low": 1e-5, "high": 1e-3, "log": True}, 5e-4, None),
        ({"type": "int", "low": 2, "high": 6}, 6, "high"),
        ({"type": "choice", "choices": [1, 2]}, 2, None),
    ],
)
def test_the_edge_of_the_space(parameter: dict[str, Any], value: float, side: str | None) -> None:
    assert at_the_edge(parameter, value) == side


def test_rungs_are_powers_of_the_factor(record: StudyRecord) -> None:
    assert rungs(record.config, 8) == [2, 4]
    assert rungs({**record.config, "scheduler": {"name": "median"}}, 8) == []


def warnings_of(study: Study, record: StudyRecord, **changes: Any) -> list[str]:
    result = read_result(study.directory)
    assert result is not None
    return [warning.text for warning in advise(record, {**result, **changes})]


def test_failed_trials_are_told(study: Study, record: StudyRecord) -> None:
    assert any("1 trial failed; the last, trial 5: out of <memory>" in text for text in warnings_of(study, record))


def test_a_winner_at_the_edge_is_told(study: Study, record: StudyRecord) -> None:
    result = read_result(study.directory)
    assert result is not None
    inside = {"trial": 0, "values": {RATE: 1e-4}, "scores": {"1": 70.0}, "mean": 70.0}
    at = {**inside, "values": {RATE: 9.9e-4}}
    message = "lies at the high edge of the space (1e-5 to 0.001)"
    assert not any(message in text for text in warnings_of(study, record, winner=inside))
    assert any(f"The winner's {RATE} (9.9e-4) {message}" in text for text in warnings_of(study, record, winner=at))


def test_seed_noise_is_told(study: Study, record: StudyRecord) -> None:
    noise = "lies inside seed noise"
    assert any(noise in text and "trial 3" in text for text in warnings_of(study, record, not_told_apart=[3]))
    assert not any(noise in text for text in warnings_of(study, record, not_told_apart=[]))


def test_the_winners_curse_is_told(study: Study, record: StudyRecord) -> None:
    # means lie 0.3 below the scores that chose them
    assert any("lost 0.30 points on average" in text for text in warnings_of(study, record))


def test_nothing_confirmed_is_told(study: Study, record: StudyRecord) -> None:
    alone = {"trial": 0, "values": {}, "scores": {}, "mean": 70.0}
    assert any("Nothing was confirmed" in text for text in warnings_of(study, record, winner=alone, candidates=[]))


def test_no_gain_is_told(study: Study, record: StudyRecord) -> None:
    assert any("No configuration improved" in text for text in warnings_of(study, record, sts_dev_before=99.0))


def test_few_trials_are_told(study: Study, record: StudyRecord) -> None:
    finished = len(record.finished)
    assert (finished < 20) == any("are a hint at most" in text for text in warnings_of(study, record))
    few = StudyRecord(**{**vars(record), "trials": record.trials[:8]})
    texts = warnings_of(study, few)
    assert any("a hint at most" in text for text in texts)
    assert any("All 8 trials were drawn at random" in text for text in texts)


def test_figures_show_their_trials(record: StudyRecord) -> None:
    by_state = {state: [t for t in record.trials if t.state == state] for state in ("COMPLETE", "PRUNED")}
    traces = {trace["name"]: trace for trace in charts.history(record)["data"]}
    assert traces["pruned, at its last score"]["x"] == [t.number for t in by_state["PRUNED"]]
    assert traces["finished"]["y"] == [t.score for t in by_state["COMPLETE"]]
    best = traces["best so far"]["y"]
    assert best == sorted(best) and best[-1] == max(traces["finished"]["y"])

    winner = by_state["COMPLETE"][0].number
    curves = charts.learning_curves(record, [2, 4], winner)
    assert len(curves["data"]) == len(record.trials) - 1, "the one that failed has none"
    assert len(curves["layout"]["shapes"]) == 2
    hues = {trace["name"]: trace["line"]["color"] for trace in curves["data"]}
    assert hues[f"Trial{winner}"] == color("green")
    assert {hues[f"Trial{t.number}"] for t in by_state["PRUNED"]} == {color("orange")}

    slices = charts.slice_chart(record, START)
    assert len(slices["data"][0]["x"]) == sum(START in t.values for t in by_state["COMPLETE"])
    assert len(slices["data"][1]["x"]) == sum(START in t.values for t in by_state["PRUNED"])
    costs = {trace["name"]: trace for trace in charts.cost(record)["data"]}
    assert costs["pruned, at its last score"]["y"] == [t.score for t in by_state["PRUNED"]]
    surface = charts.contour(record, RATE, SCHEDULE)
    assert surface is not None and len(surface["data"][1]["x"]) == len(record.finished)
    few = StudyRecord(**{**vars(record), "trials": record.finished[:3]})
    assert charts.contour(few, RATE, SCHEDULE) is None
    alike = StudyRecord(**{**vars(record), "trials": [record.finished[0]] * 5})
    assert charts.contour(alike, RATE, SCHEDULE) is None, "all at one place"


def test_choices_are_texts() -> None:
    """Plotly reads tags in names of categories, and Optuna hands it choices as they are."""
    study = optuna.create_study(direction="maximize")
    kinds = optuna.distributions.CategoricalDistribution(["<b>x</b>", "y"])
    trials = [optuna.trial.create_trial(value=n, params={"kind": ["<b>x</b>", "y"][n % 2], "other": n},
                                        distributions={"kind": kinds, "other": OTHER}) for n in range(6)]  # fmt: skip
    study.add_trials(trials)
    found = [Trial(t.number, "COMPLETE", t.value, t.params, [], 0.0, None) for t in study.trials]
    space = {key: {"type": kind, "role": "nuisance"} for key, kind in (("kind", "choice"), ("other", "int"))}
    record = StudyRecord(Path(), {"space": space}, found, None, 0.0, [], study)
    for figure in (charts.slice_chart(record, "kind"), charts.contour(record, "kind", "other")):
        text = json.dumps(figure)
        assert "&lt;b&gt;x" in text and "<b>" not in text


def test_the_page_is_whole(study: Study, record: StudyRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clusterns_ray.tuning.analysis.RESAMPLES", 2)
    path, page = write_study_report(study.directory, tmp_path / "study.html")
    html = path.read_text()
    assert path.parent == tmp_path and "<script src" not in html
    assert "out of &lt;memory&gt;" in html and "out of <memory>" not in html
    titles = [section.title for section in page.sections]
    assert titles == [
        "The best configurations, run again",
        "How the search went",
        "What mattered",
        "Scores over the values of each key",
        "All trials",
        "What was searched",
    ]
    tables: dict[str, Table] = {table.caption: table for section in page.sections for table in section.tables}
    assert len(tables["The finished ones by score, then the others"].rows) == 40
    space = {row[0]: row for row in tables["The space"].rows}
    assert space[START][2:] == ["0.2 to 0.6, in steps of 0.1", "clustering.num_clusters not 0"]
    assert space["loss.temperature"][1:3] == ["fixed", "0.05"]
    reached = [int(str(row[1])) for row in tables["Rungs of the scheduler"].rows]
    pruned = [int(str(row[2])) for row in tables["Rungs of the scheduler"].rows]
    trials = record.trials
    assert reached == [sum(bool(t.curve) and t.curve[-1][0] >= step for t in trials) for step in (2, 4)]
    assert sum(pruned) == sum(t.state == "PRUNED" for t in trials) > 0


def test_the_headline_is_the_answer(study: Study, record: StudyRecord) -> None:
    result = read_result(study.directory)
    assert result is not None
    number = result["winner"]["trial"]
    interval = {"winner": {"low": 68.5, "high": 69.25}, "base": None}
    ended = "No further trial begins: budget.trials (40) is used up."
    known = {"intervals": interval, "not_told_apart": [3, 9], "worker_hours": 1.5, "cost": 3.0, "ended_by": ended}
    first, apart, cost = study_page(record, {**result, **known}).headline
    assert first.startswith(f"The winner is trial {number} (") and f"{RATE} " in first
    assert first.endswith("the mean of 3 new seeds (95 % interval 68.50 to 69.25).")
    assert apart.endswith("trial 3 and trial 9.")
    assert cost.startswith("It took 40 trials over ") and cost.endswith(f"(1.50 worker-hours, cost 3.00). {ended}")
    alone = {**result["winner"], "scores": {}, "deviation": None}
    first, apart, _ = study_page(record, {**result, "winner": alone}).headline
    assert "a single run that no other seed confirmed." in first and "nothing tells it apart" in apart


def test_a_study_that_runs_has_a_page_too(study: Study, record: StudyRecord) -> None:
    page = study_page(record, None)
    assert "has not come to its end" in page.headline[0]
    assert "The best configurations, run again" not in [section.title for section in page.sections]
    empty = StudyRecord(**{**vars(record), "trials": [], "importances": []})
    assert [section.title for section in study_page(empty, None).sections] == ["All trials", "What was searched"]


def test_no_study(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no study yet"):
        write_study_report(tmp_path)
