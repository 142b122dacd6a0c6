"""The winner over seeds, what cannot be told apart from it, and the files that say so."""

from __future__ import annotations

import math
import statistics
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
from optuna.trial import TrialState, create_trial
from scipy.stats import t as student

from clusterns_ray.tuning.selection import Candidate, choose, copy_model, differ, summary, top_trials, write_trials

RATE = optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True)
KIND = optuna.distributions.CategoricalDistribution([0, 16, "auto"])


def trial(value: float, state: TrialState = TrialState.COMPLETE, rate: float = 1e-3, kind: Any = 0) -> Any:
    made = create_trial(
        state=state,
        value=value if state != TrialState.FAIL else None,
        params={"train.learning_rate": rate, "kind": kind},
        distributions={"train.learning_rate": RATE, "kind": KIND},
        intermediate_values={20: value, 10: value - 1},
        user_attrs={"steps": 20, "seconds": 3.5, "reason": "why"} if state == TrialState.FAIL else {"steps": 20},
    )
    return made


def numbered(*trials: Any) -> list[Any]:
    for number, each in enumerate(trials):
        each.number = number
    return list(trials)


def candidate(number: int, *scores: float, trial_score: float = 0.0) -> Candidate:
    return Candidate(number, {}, trial_score, dict(enumerate(scores, start=1)))


def test_the_top_is_of_finished_trials_each_set_of_values_once() -> None:
    trials = numbered(
        trial(70, rate=1e-3),
        trial(72, rate=2e-3),
        trial(99, TrialState.PRUNED, rate=3e-3),
        trial(72, rate=2e-3),
        trial(72, rate=4e-3),
        trial(98, TrialState.FAIL, rate=5e-3),
    )
    assert [t.number for t in top_trials(trials, 2)] == [1, 4]
    assert [t.number for t in top_trials(trials, 9)] == [1, 4, 0]
    assert top_trials(trials[2:3], 3) == []


def test_the_winner_has_the_best_mean_not_the_best_single_score() -> None:
    lucky, steady = candidate(0, 75.0, 70.0, 70.0, trial_score=80.0), candidate(1, 72.0, 72.1, 72.2, trial_score=74.0)
    assert choose([lucky, steady], 3)[0] is steady
    assert steady.mean == pytest.approx(72.1) and steady.deviation == pytest.approx(0.1)


def test_a_candidate_whose_seeds_did_not_all_finish_does_not_win() -> None:
    partial, whole = candidate(0, 90.0), candidate(1, 70.0, 71.0)
    winner, alike = choose([partial, whole], 2)
    assert winner is whole
    assert alike == [partial], "one score tells nothing"


def test_without_seeds_the_best_trial_wins_and_nothing_is_told_apart() -> None:
    best, next_ = candidate(0, trial_score=72.0), candidate(1, trial_score=71.0)
    assert choose([next_, best], 0) == (best, [next_])
    assert best.mean == 72.0 and best.deviation is None


def paired_p(x: list[float], y: list[float]) -> float:
    """By the book: Student's t of the differences."""
    gaps = [a - b for a, b in zip(x, y, strict=True)]
    value = statistics.mean(gaps) / math.sqrt(statistics.variance(gaps) / len(gaps))
    return float(2 * student.sf(abs(value), len(gaps) - 1))


@pytest.mark.parametrize("gap", [0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0])
def test_what_can_be_told_apart_is_the_paired_test_at_five_percent(gap: float) -> None:
    """Over the seeds that both have, which move both alike."""
    x, y = [70.0, 75.2, 64.1, 69.9], [70.05 + gap, 75.1 + gap, 64.4 + gap]
    assert differ(dict(enumerate(x)), dict(enumerate(y))) == (paired_p(x[:3], y) < 0.05)


def test_both_answers_occur_and_equal_scores_are_compared_as_they_are() -> None:
    assert differ({1: 70.0, 2: 70.1}, {1: 75.0, 2: 75.1})
    assert not differ({1: 70.0, 2: 70.1}, {1: 70.05, 2: 70.05})
    assert differ({1: 70.0, 2: 70.0}, {1: 71.0, 2: 71.0})
    assert not differ({1: 70.0, 2: 70.0}, {1: 70.0, 2: 70.0})
    assert not differ({1: 70.0}, {1: 90.0, 2: 91.0})


def test_the_summary_holds_every_score() -> None:
    values = summary(Candidate(3, {"train.epochs": 2}, 74.0, {1: 72.0, 5: 73.0}))
    assert values == {
        "trial": 3,
        "values": {"train.epochs": 2},
        "mean": 72.5,
        "deviation": pytest.approx(math.sqrt(0.5)),
        "scores": {"1": 72.0, "5": 73.0},
        "trial_score": 74.0,
    }


def test_trials_as_a_table(tmp_path: Path) -> None:
    trials = numbered(trial(70, kind="auto"), trial(60, TrialState.PRUNED), trial(0, TrialState.FAIL, kind=16))
    path = tmp_path / "trials.parquet"
    write_trials(path, trials, ["train.learning_rate", "kind", "never"], 3)
    rows = pq.read_table(path).to_pylist()
    assert [row["state"] for row in rows] == ["COMPLETE", "PRUNED", "FAIL"]
    assert [row["score"] for row in rows] == [70, 60, None]
    assert [row["kind"] for row in rows] == ["auto", "0", "16"], "choices of several kinds become text"
    assert [row["train.learning_rate"] for row in rows] == [1e-3] * 3
    assert rows[0]["never"] is None and rows[2]["reason"] == "why"
    assert rows[0]["evaluated_steps"] == [10, 20] and rows[0]["evaluated_scores"] == [69, 70]
    assert isinstance(rows[0]["ended"], datetime)
    write_trials(path, [], ["kind"], 3)
    assert pq.read_table(path).num_rows == 0
    assert [file.name for file in tmp_path.iterdir()] == ["trials.parquet"]


def test_a_model_is_put_in_place_whole(tmp_path: Path) -> None:
    (tmp_path / "new/sub").mkdir(parents=True)
    (tmp_path / "new/sub/weights").write_text("new")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    copy_model(tmp_path / "new", tmp_path / "model")
    assert [str(path.relative_to(tmp_path / "model")) for path in sorted((tmp_path / "model").rglob("*"))] == [
        "sub",
        "sub/weights",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
