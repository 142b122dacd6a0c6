"""Seeds inside a search: who gets one more, who is behind, what the sampler sees; and a study in which they race."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from local_jobs import LocalJobs, drive
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import ttest_rel
from test_tune_cli import sweep_of
from typer.testing import Result

from clusterns_ray.launch.staging import run_directory
from clusterns_ray.report.study import study_page
from clusterns_ray.tuning import racing
from clusterns_ray.tuning.analysis import read_study
from clusterns_ray.tuning.job import Evaluation, Finished
from clusterns_ray.tuning.optuna_study import OptunaStudy
from clusterns_ray.tuning.outcome import write_outcome
from clusterns_ray.tuning.previous import earlier_trials
from clusterns_ray.tuning.result import study_lines
from clusterns_ray.tuning.runs import is_finished
from clusterns_ray.tuning.study import Study, dump_study, load_study
from clusterns_ray.tuning.study_file import read_optuna_study
from clusterns_ray.tuning.trial import TrialRun

SEEDS = (0, 1, 2, 3, 4)
Score = Callable[[int, int], float]
"""Of a trial's number and a seed."""


def run(number: int, *curve: float, of: tuple[int, int] | None = None, state: str = "COMPLETE") -> FrozenTrial:
    """A run, evaluated at steps 10, 20 ...; of a trial and a further seed if ``of``."""
    made = create_trial(
        state=TrialState[state],
        value=max(curve) if state == "COMPLETE" else None,
        intermediate_values={10 * step: value for step, value in enumerate(curve, start=1)},
        user_attrs={"seconds": 2.0, **({racing.RACE: list(of)} if of else {})},
    )
    made.number = number
    return made


def race(score: Score, trials: int, runs: int) -> list[FrozenTrial]:
    """Runs of one evaluation: of so many trials, and of further seeds wherever one is due."""
    done: list[FrozenTrial] = []
    new = 0
    while len(done) < runs:
        due = racing.next_run(done, SEEDS)
        if due is not None:
            done.append(run(len(done), score(due[0].number, due[1]), of=(due[0].number, due[1])))
        elif new < trials:
            done.append(run(len(done), score(len(done), SEEDS[0])))
            new += 1
        else:
            break
    return done


def test_the_right_trial_wins_though_the_first_seed_says_otherwise() -> None:
    """All but the third are favoured by the first seed; seeds move all alike by far more than trials differ."""
    draw = random.Random(3)
    of_seed = {seed: draw.gauss(0, 2.0) for seed in SEEDS}

    def score(number: int, seed: int) -> float:
        true = 75.0 if number == 2 else 74.0
        lucky = 0.8 if seed == SEEDS[0] and number != 2 else 0.0
        return true + lucky + of_seed[seed] + random.Random(100 * number + seed).gauss(0, 0.03)

    runs = race(score, trials=12, runs=60)
    field = racing.racers(runs, SEEDS[0])
    first = racing.leader(field)
    assert first is not None and first.trial.number == 2 and len(first.scores) >= 3
    merged = {trial.number: trial.value or 0.0 for trial in racing.merge_seeds(runs, SEEDS[0])}
    assert max(merged, key=lambda number: merged[number]) == 2 and racing.next_run(runs, SEEDS) is None


def test_seeds_go_to_the_best_third_of_those_that_have_as_many() -> None:
    runs = race(lambda number, seed: 70.0 - number / 100 + number * seed % 5, trials=30, runs=99)
    field = racing.racers(runs, SEEDS[0])
    count = [sum(len(racer.runs) >= seeds for racer in field) for seeds in range(1, 6)]
    assert count == [30, 10, 3, 1, 0], "each is worse than those before"
    better = race(lambda number, seed: 70.0 + number / 100, trials=30, runs=99)
    assert len(racing.racers(better, SEEDS[0])) > 20, "where each is the best so far, there are new ones all the same"


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_a_tie_is_not_decided(pairs: int) -> None:
    """Looked at once with so many seeds, one in twenty is decided wrongly at most; with the looks of a race, fewer."""
    draw = random.Random(pairs)
    ties = [[draw.gauss(0, 0.03) for _ in range(pairs)] for _ in range(2000)]
    assert sum(racing.is_behind(tie, 1) for tie in ties) / len(ties) < 0.065
    assert sum(racing.is_behind(tie, 16) for tie in ties) / len(ties) < 0.008


def test_no_trial_that_is_as_good_is_put_out_more_often_than_the_level_says() -> None:
    """Looked at again with every further seed, and at four evaluations of each."""
    draw, out = random.Random(7), 0
    for _ in range(1000):
        ends: list[float] = []
        for _ in SEEDS:
            steps = [draw.gauss(0, 0.03) for _ in range(4)]
            out += any(racing.is_behind([*ends, value], 16) for value in steps)
            ends.append(steps[-1])
    assert out / 1000 < racing.LEVEL


def test_the_test_is_the_paired_one() -> None:
    ours, best = [74.1, 73.2, 75.0, 74.4], [74.3, 73.45, 75.1, 74.7]
    p = float(ttest_rel(ours, best, alternative="less").pvalue)
    gaps = [a - b for a, b in zip(ours, best)]
    looks = racing.LEVEL / p
    assert racing.is_behind(gaps, int(looks)) and not racing.is_behind(gaps, int(looks) + 2)
    assert not racing.is_behind([-9.0], 1), "one pair says nothing of its spread"
    assert racing.is_behind([-0.50, -0.51], 4), "two pairs may suffice"
    assert racing.is_behind([-0.1, -0.1], 4) and not racing.is_behind([0.0, 0.0], 4)


def test_inside_a_seed_a_run_stops_at_a_step_where_all_of_its_seeds_are_behind() -> None:
    leader = [run(0, 70.0, 74.0), *(run(n, 70.0 + n, 74.0 + n, of=(0, n)) for n in SEEDS[1:])]

    def judged(first: tuple[float, float], present: float) -> bool:
        late = run(8, 70.001 + 3 + present, of=(5, 3), state="RUNNING")
        before = [run(6, first[0] + 1.0, first[1] + 1.0, of=(5, 1)), run(7, first[0] + 2.01, first[1] + 2, of=(5, 2))]
        return racing.stops([*leader, run(5, *first), *before, late], SEEDS, late, 10)

    assert judged((69.0, 73.0), -1.0)
    assert not judged((69.0, 74.5), -1.0), "it begins low and ends high"
    assert not judged((69.0, 73.0), -0.1), "in this seed it is as good by now"
    assert not judged((70.0, 74.0), 0.0)
    own = run(9, 60.0, of=(0, 4), state="RUNNING")
    assert not racing.stops([*leader[:4], own], SEEDS, own, 10), "the leader is not compared with itself"


def test_what_the_sampler_sees() -> None:
    """The first seed is a lucky one, by a point, for all: who has it alone does not stand above the others for it."""
    runs = [
        run(0, 75.0),
        run(1, 75.5),
        run(2, 74.0, of=(1, 1)),
        run(3, 74.5, of=(1, 2)),
        run(4, 75.2),
        run(5, 73.9, of=(0, 1)),
        run(6, 60.0, state="PRUNED"),
    ]
    merged = racing.merge_seeds(runs, SEEDS[0])
    assert [trial.number for trial in merged] == [0, 1, 4, 6]
    mean = statistics.fmean([75.5, 74.0, 74.5])
    expected = [mean + statistics.fmean([-0.5, -0.1]), mean, mean - 0.3, None]
    assert [trial.value for trial in merged] == pytest.approx(expected)
    assert (
        merged[1].user_attrs[racing.RACER].scores == {0: 75.5, 1: 74.0, 2: 74.5}
        and merged[1].user_attrs["seconds"] == 6.0
    )
    assert runs[0].value == 75.0 and racing.RACER not in runs[1].user_attrs, "the study itself stays"
    alone = [trial for trial in runs if racing.RACE not in trial.user_attrs]
    assert racing.merge_seeds(alone, SEEDS[0]) == alone


def test_noise_is_that_of_one_seed() -> None:
    """Of pairs of equal trials one in twenty lies further above the other."""
    draw, further = random.Random(5), []
    for _ in range(300):
        runs = [run(number, draw.gauss(70, 0.1)) for number in range(4)]
        for number in range(3):
            for seed in SEEDS[1:]:
                runs.append(run(len(runs), draw.gauss(70 + seed, 0.1), of=(number, seed)))
        limit = racing.noise(runs, SEEDS)
        further.append(sum(draw.gauss(0, 0.1 * 2**0.5) > limit for _ in range(20)) / 20)
    assert 0.03 < statistics.fmean(further) < 0.07
    assert racing.noise(runs[:4], SEEDS) == 0.0, "nothing was repeated"


def test_a_study_stops_where_gains_are_noise(write_study: Callable[..., Path]) -> None:
    file = write_study(**{**RACE, "budget": {"trials": 60}, "stop": {"after": 5, "gain": "noise"}})
    study, _ = raced(file)
    optuna_study = OptunaStudy(study)
    reason = optuna_study.ended_by() or ""
    limit = racing.noise(optuna_study.trials(), study.seeds)
    assert f"by more than {limit:.2g}, the noise of a seed (stop.after)" in reason and len(story(study)) < 60
    assert 0.05 < limit < 0.3, "differences of two scores with a deviation of 0.05 each"


@pytest.mark.parametrize("state", ["PRUNED", "FAIL", "RUNNING"])
def test_a_trial_without_its_last_run_gets_no_further_seed_and_does_not_lead(state: str) -> None:
    runs = [run(number, 70.0 - number) for number in range(9)]
    assert (due := racing.next_run(runs, SEEDS)) is not None and (due[0].number, due[1]) == (0, 1)
    runs += [run(9, 70.0, of=(0, 1), state=state)]
    assert (due := racing.next_run(runs, SEEDS)) is not None and due[0].number == 1
    runs += [run(10, 69.0, of=(1, 1)), run(11, 68.0, of=(2, 1))]
    leader = racing.leader(racing.racers(runs, SEEDS[0]))
    assert leader is not None and leader.trial.number == 1


# ---- a study in which they race -------------------------------------------------------------------------------------

RACE: dict[str, Any] = {
    "race": {"seeds": [5, 1, 2]},
    "confirmation": {"top": 3},
    "budget": {"trials": 12},
    "sampler": {"name": "tpe", "startup_trials": 4},
}


class Invented(TrialRun):
    """Its score is that of its values and its seed, with a little that belongs to both; it is 3 less after half."""

    def _run(self) -> None:
        config, directory = self.job.config, run_directory(self.job.config)
        own = random.Random(repr((config.seed, config.train.learning_rate, config.clustering.num_clusters)))
        score = 70 - 900 * abs(config.train.learning_rate - 1e-3) + config.seed % 5 + own.gauss(0, 0.05)
        curve = [(2, score - 3), (4, score)]
        (directory / "model").mkdir(parents=True, exist_ok=True)
        (directory / "result.json").write_text(json.dumps({"sts_dev": score}))
        for step, value in [(0, 50.0), *curve]:
            self.results.put(Evaluation(step, value, last=step == 4))
            if not self.verdicts.get():
                return
        self.results.put(Finished(score, 4, tuple(curve)))


def story(study: Study) -> list[tuple[Any, ...]]:
    trials = read_optuna_study(study.directory).get_trials(deepcopy=False)
    return [(t.number, t.state.name, t.params, t.value, t.user_attrs.get(racing.RACE)) for t in trials]


def raced(file: Path, *settings: str, **options: Any) -> tuple[Study, LocalJobs]:
    study = load_study(file, settings)
    study.directory.mkdir(parents=True, exist_ok=True)
    study.home.write("study.yaml", dump_study(study))
    return study, drive(sweep_of(study), Invented, **options)


@pytest.fixture(scope="module")
def whole(write_study: Callable[..., Path]) -> tuple[Path, Study, LocalJobs, dict[str, Any]]:
    """An undisturbed race: its file, itself, its jobs, its result."""
    file = write_study(**RACE)
    study, jobs = raced(file)
    return file, study, jobs, write_outcome(study, OptunaStudy(study))


def test_a_race_in_a_study(whole: Any) -> None:
    _, study, jobs, result = whole
    optuna_study = OptunaStudy(study)
    further = [tuple(run[4]) for run in story(study) if run[4]]
    assert len(story(study)) == 12 and is_finished(study, optuna_study), "the budget counts runs"
    assert len(further) >= 3 and len(set(further)) == len(further) and {seed for _, seed in further} >= {5, 1}
    assert jobs.names == [*(f"{number:04d}" for number in range(12)), *(f"base-seed{s}" for s in (42, 5, 1, 2)[:3])]
    for number, _, params, _, of in story(study):
        if of:
            assert params == story(study)[of[0]][2]
            assert f"seed: {of[1]}" in (study.directory / f"trials/{number:04d}/config.yaml").read_text()
    winner, merged = result["winner"], {trial.number: trial for trial in optuna_study.merged_trials()}
    racer = merged[winner["trial"]].user_attrs[racing.RACER]
    assert winner["scores"] == {str(seed): score for seed, score in racer.scores.items()}
    assert (
        result["raced"]
        and list(winner["scores"])[:2] == ["42", "5"]
        and winner["mean"] == pytest.approx(statistics.fmean(racer.scores.values()))
    )
    base = result["against"]["base"]
    gaps = [score - result["base"]["scores"][seed] for seed, score in winner["scores"].items()]
    assert base["difference"] == pytest.approx(statistics.fmean(gaps)) and base["over_seeds"]["low"] > 0
    rows = pq.read_table(study.directory / "trials.parquet").to_pylist()
    assert [[row["trial"], row["seed"]] for row in rows] == [run[4] or [run[0], 42] for run in story(study)]


def test_a_race_that_is_killed_is_the_undisturbed_one(whole: Any, write_study: Callable[..., Path]) -> None:
    """As the run before the first further seed ends, inside the run of that seed, and after its last evaluation."""
    file, ran = write_study(**RACE), []
    for evaluations in (9, 5, 3):
        ran.append(raced(file, lose_after=evaluations)[1].names)
    assert ran == [["0000", "0001", "0002"], ["0002", "0003"], ["0003"]]
    study, jobs = raced(file)
    assert story(study)[3][4] and jobs.names[0] == "0003", "the moments are not where they were"
    assert story(study) == story(whole[1])


@pytest.mark.slow
def test_a_race_goes_on_with_a_larger_budget_and_with_more_seeds(whole: Any, write_study: Callable[..., Path]) -> None:
    file = write_study(**{**RACE, "budget": {"trials": 6}, "race": {"seeds": [5]}})
    raced(file)
    study, _ = raced(file, "race.seeds=[5]", "budget.trials=10")
    before = story(study)
    assert before[:6] == story(whole[1])[:6] and len(before) == 10
    study, _ = raced(file, "race.seeds=[5, 1, 2]", "budget.trials=14")
    assert story(study)[:10] == before and 1 in {run[4][1] for run in story(study)[10:] if run[4]}


def test_what_is_shown_of_a_race(whole: Any, clusterns: Callable[..., Result]) -> None:
    file, study, _, result = whole
    said = clusterns("tune", file, "--status")
    trials = sum(run[4] is None for run in story(study))
    assert said.exit_code == 0 and f"12 of 12 runs of {trials} trials" in said.stdout, said.output
    assert "beside the best" in said.stdout and "seeds" in said.stdout
    best = next(line for line in said.stdout.splitlines() if "best  " in line and "│" in line)
    assert best.split("│")[1].strip() == str(result["winner"]["trial"])
    assert best.split("│")[4].strip() == str(len(result["winner"]["scores"]))
    lines = study_lines(result)
    assert f"over {len(result['winner']['scores'])} of 4 seeds (with the first " in "\n".join(lines)
    page = study_page(read_study(study.directory), result)
    (table,) = [table for section in page.sections if section.anchor == "trials" for table in section.tables]
    assert len(table.rows) == trials and table.columns[3] == "over seeds"
    assert str(table.rows[0][0]) == str(result["winner"]["trial"]) and " to " in str(table.rows[0][3])


def test_the_best_of_a_race_may_be_confirmed_with_fresh_seeds(write_study: Callable[..., Path]) -> None:
    file = write_study(**{**RACE, "budget": {"trials": 4}, "confirmation": {"top": 1, "seeds": [11, 12]}})
    study, jobs = raced(file)
    leader = racing.leader(racing.racers(OptunaStudy(study).trials(), 42))
    assert leader is not None and jobs.names[-2:] == [f"{leader.trial.number:04d}-seed{seed}" for seed in (11, 12)]
    result = write_outcome(study, OptunaStudy(study))
    assert not result["raced"] and list(result["winner"]["scores"]) == ["11", "12"]


def test_every_point_of_a_grid_races_before_the_study_ends(write_study: Callable[..., Path]) -> None:
    space = {"train.learning_rate": {"type": "choice", "choices": [1e-4, 5e-4, 1e-3]}}
    file = write_study(space=space, sampler="grid", budget={}, race={"seeds": [5, 1]}, confirmation={})
    study, _ = raced(file)
    runs = story(study)
    assert [run[4] for run in runs[:3]] == [None] * 3 and len(runs) == 4 and runs[3][2] == {"train.learning_rate": 1e-3}


def test_a_later_study_learns_the_first_seed_of_a_race(whole: Any) -> None:
    file, study, _, _ = whole
    later = OptunaStudy(load_study(file, ["name=later", "previous=[tiny]"]))
    learnt = [trial.user_attrs["previous"][1] for trial in earlier_trials(later.optuna)]
    assert learnt == [run[0] for run in story(study) if run[4] is None and run[1] == "COMPLETE"]
