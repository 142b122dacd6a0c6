"""The Optuna study on disk: what it says after anything that can happen to the one who writes it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from helpers import quick_first
from optuna.trial import TrialState

from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.tuning.job import Evaluation, Finished
from clusterns_ray.tuning.objectives import pareto_front
from clusterns_ray.tuning.optuna_study import OptunaStudy, Proposal
from clusterns_ray.tuning.previous import about_earlier, earlier_trials
from clusterns_ray.tuning.study import Study, check_study
from clusterns_ray.tuning.study_file import read_optuna_study

STEPS = (2, 4, 6, 8)
SPACE = {
    "clustering.num_clusters": {"type": "choice", "choices": [0, 16, 32], "role": "scientific"},
    "clustering.start_cosine": {
        "type": "float", "low": 0.2, "high": 0.6, "step": 0.1, "role": "scientific",
        "when": {"clustering.num_clusters": {"not": 0}},
    },
    "train.learning_rate": {"type": "float", "low": 1e-5, "high": 1e-3, "log": True, "role": "nuisance"},
}  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """``make("name", key=value, ...)``: a study in a directory of its own."""

    def make(name: str = "s", **values: Any) -> Study:
        base = {
            "data": {"corpus": "demo"},
            "evaluation": {"sts": "structure", "every_steps": 2},
            "train": {"max_steps": 8},
            "runtime": {"storage_path": str(tmp_path / "runs")},
        }
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        study = {"name": name, "base": "base.yaml", "space": SPACE, "budget": {"trials": 12}, "storage": "journal"}
        study["sampler"] = {"name": "tpe", "startup_trials": 4}
        study["scheduler"] = {"name": "asha", "min_steps": 2, "reduction_factor": 2}
        return check_study({**study, **values}, tmp_path / "study.yaml")

    return make


def score(overrides: dict[str, Any], step: int) -> float:
    """A made-up dev score with one best point."""
    clusters = {0: 0.0, 16: 1.0, 32: 0.5}[overrides["clustering.num_clusters"]]
    away = abs(math.log10(overrides["train.learning_rate"]) + 4) + abs(
        overrides.get("clustering.start_cosine", 0) - 0.4
    )
    return 60 + clusters - away + step / 10


def run(optuna_study: OptunaStudy, proposal: Proposal) -> None:
    for step in STEPS:
        value = score(proposal.overrides, step)
        if optuna_study.report(proposal.number, Evaluation(step, value, step == STEPS[-1], float(step))):
            return
    curve = [(step, score(proposal.overrides, step)) for step in STEPS]
    optuna_study.complete(proposal.number, Finished(curve[-1][1], STEPS[-1], tuple(curve), float(STEPS[-1])))


def drive(optuna_study: OptunaStudy) -> None:
    for trial in optuna_study.running():
        run(optuna_study, optuna_study.resume(trial.number))
    while not optuna_study.budget_spent():
        run(optuna_study, optuna_study.propose())


def story(optuna_study: OptunaStudy) -> list[tuple[Any, ...]]:
    return [(t.number, t.state.name, t.params, t.value, t.intermediate_values) for t in optuna_study.trials()]


def test_a_study_prunes_completes_and_is_spent(make: Any) -> None:
    optuna_study = OptunaStudy(make())
    drive(optuna_study)
    states = [trial.state for trial in optuna_study.trials()]
    assert len(states) == 12 and set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    assert states[0] == TrialState.COMPLETE, "nothing to compare with"
    for trial in optuna_study.trials():
        reached = sorted(trial.intermediate_values)
        assert trial.user_attrs["steps"] == reached[-1]
        if trial.state == TrialState.PRUNED:
            assert reached == list(STEPS[: len(reached)]) and reached[-1] < STEPS[-1], "never at its last step"
            assert trial.value == trial.intermediate_values[reached[-1]]
            assert trial.user_attrs["reason"] == f"pruned at step {reached[-1]}"
        else:
            assert reached == list(STEPS) and trial.value == trial.intermediate_values[8]


def test_a_trial_is_pruned_on_its_own_steps_if_the_better_part_at_that_rung_is_better(make: Any) -> None:
    """Rungs at 2, 4, 8 steps; of two at a rung one goes on."""
    optuna_study = OptunaStudy(make())
    first, second, third = (optuna_study.propose().number for _ in range(3))
    assert not optuna_study.report(first, Evaluation(2, 60.0, False, 1))
    assert optuna_study.report(second, Evaluation(2, 59.0, False, 1))
    assert not optuna_study.report(third, Evaluation(3, 61.0, False, 1)), "rung 2 at its step 3"
    assert optuna_study.report(first, Evaluation(4, 60.5, False, 1)) is False, "the first at rung 4"
    assert optuna_study.report(third, Evaluation(4, 60.4, False, 1))


@pytest.mark.parametrize("scheduler", ["none", {"name": "median", "startup_trials": 2, "warmup_steps": 4}])
def test_other_schedulers(make: Any, scheduler: Any) -> None:
    optuna_study = OptunaStudy(make(scheduler=scheduler))
    drive(optuna_study)
    pruned = [max(t.intermediate_values) for t in optuna_study.trials() if t.state == TrialState.PRUNED]
    assert (scheduler == "none") == (pruned == [])
    assert all(step >= 4 for step in pruned), "before the warm-up"


@pytest.mark.parametrize("sampler", quick_first(["tpe", "random", "qmc", "gp"], 3))
def test_the_same_seed_proposes_the_same(make: Any, sampler: str) -> None:
    def params(name: str, seed: int) -> list[dict[str, Any]]:
        settings = {"name": sampler, "seed": seed} | ({"startup_trials": 3} if sampler in ("tpe", "gp") else {})
        optuna_study = OptunaStudy(make(name, sampler=settings, budget={"trials": 6}))
        drive(optuna_study)
        return [trial.params for trial in optuna_study.trials()]

    first = params("a", 0)
    assert first == params("b", 0)
    assert first != params("c", 1)
    assert len({str(point) for point in first}) == 6, "a point was proposed twice"


def test_cmaes_moves_towards_the_best_and_is_the_same_after_every_kill(make: Any) -> None:
    pytest.importorskip("cmaes")
    space = {RATE: SPACE[RATE], "loss.temperature": {"type": "float", "low": 0.01, "high": 1.0, "log": True}}
    values = {"space": space, "scheduler": "none", "sampler": {"name": "cmaes", "startup_trials": 4}}

    def driven(name: str, trials: int, each: int) -> list[tuple[float, dict[str, Any]]]:
        """A new process takes over after every few trials."""
        for budget in range(each, trials + 1, each):
            optuna_study = OptunaStudy(make(name, budget={"trials": budget}, **values))
            while not optuna_study.budget_spent():
                proposal = optuna_study.propose()
                away = [
                    math.log10(proposal.overrides[key]) - best
                    for key, best in ((RATE, -4.2), ("loss.temperature", -1.3))
                ]
                optuna_study.complete(proposal.number, Finished(-sum(x * x for x in away), 8, (), 1.0))
        return [(trial.value or 0.0, trial.params) for trial in optuna_study.trials()]

    whole = driven("whole", 60, 60)
    assert driven("killed", 60, 1) == whole
    early, late = ([value for value, _ in whole[at : at + 20]] for at in (0, 40))
    assert sum(late) > sum(early) / 4, (sum(late), sum(early))


# ---- two objectives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", quick_first(["tpe", "gp"], 1))
def test_two_objectives_find_more_of_the_front_than_one(make: Any, sampler: str) -> None:
    """The higher the rate the better, and the longer it takes: the front is all of one number of clusters."""

    def drive_costs(name: str, **changes: Any) -> list[tuple[float, float]]:
        settings = {"name": sampler, "startup_trials": 6}
        optuna_study = OptunaStudy(make(name, sampler=settings, scheduler="none", budget={"trials": 30}, **changes))
        while not optuna_study.budget_spent():
            proposal = optuna_study.propose()
            rate = math.log10(proposal.overrides[RATE]) + 5
            worse = {0: 0.0, 16: 1.0, 32: 2.0}[proposal.overrides["clustering.num_clusters"]]
            optuna_study.complete(proposal.number, Finished(70 + rate - worse, 8, (), 10 + 10 * rate))
        return [(trial.value or 0.0, trial.user_attrs["seconds"]) for trial in optuna_study.trials()]

    def covered(points: list[tuple[float, float]]) -> float:
        """The area that the front dominates, of scores from 68 and of seconds up to 30."""
        best = [points[n] for n in pareto_front(points)]
        edges = [*(seconds for _, seconds in best[1:]), 30.0]
        return sum((value - 68) * (edge - seconds) for (value, seconds), edge in zip(best, edges))

    two = drive_costs("two", minimize="seconds")
    assert covered(two) > covered(drive_costs("one"))
    with pytest.raises(ConfigError, match="minimize was 'seconds' and is now None"):
        OptunaStudy(make("two", sampler={"name": sampler, "startup_trials": 6}, scheduler="none"))


def test_the_pareto_front() -> None:
    points = [(70.0, 5.0), (71.0, 5.0), (71.0, 6.0), (69.0, 4.0), (69.0, 4.0), (72.0, 9.0), (60.0, 9.0)]
    assert pareto_front(points) == [3, 1, 5] and pareto_front([]) == []


@pytest.mark.slow
def test_tpe_proposes_better_points_than_chance(make: Any) -> None:
    def late_mean(sampler: str, seed: int) -> float:
        study = make(
            f"{sampler}{seed}", budget={"trials": 30}, scheduler="none", sampler={"name": sampler, "seed": seed}
        )
        optuna_study = OptunaStudy(study)
        drive(optuna_study)
        return sum(trial.value or 0.0 for trial in optuna_study.trials()[15:]) / 15

    gains = [late_mean("tpe", seed) - late_mean("random", seed) for seed in range(3)]
    assert sum(gains) / 3 > 0.2, gains


def test_the_grid_is_visited_once_first_points_first(make: Any) -> None:
    space = {name: SPACE[name] for name in ("clustering.num_clusters", "clustering.start_cosine")}
    first = [{"clustering.num_clusters": 32, "clustering.start_cosine": 0.5}, {"clustering.num_clusters": 0}]
    study = make(space=space, sampler="grid", budget={}, first_points=first)
    optuna_study, seen = OptunaStudy(study), []
    while not optuna_study.budget_spent():
        proposal = optuna_study.propose()
        seen.append(proposal.overrides)
        optuna_study.complete(proposal.number, Finished(1.0, 8, (), 1.0))
    assert seen[:2] == first
    assert len(seen) == 1 + 2 * 5
    assert sorted(map(str, seen)) == sorted(map(str, study.space.grid()))


def test_first_points_come_first_and_whole(make: Any) -> None:
    points = [{"clustering.num_clusters": 16, "clustering.start_cosine": 0.4}, {"train.learning_rate": 2e-4}]
    optuna_study = OptunaStudy(make(first_points=points))
    a, b, c = (optuna_study.propose().overrides for _ in range(3))
    assert points[0].items() <= a.items() and "train.learning_rate" in a
    assert b["train.learning_rate"] == 2e-4 and "clustering.num_clusters" in b
    assert c["train.learning_rate"] != 2e-4

    # More of them may come later, and role is a label: the study goes on with what was not tried.
    points = [{"train.learning_rate": 3e-4}, *points, {"train.learning_rate": 5e-4}]
    space = {key: {name: value for name, value in p.items() if name != "role"} for key, p in SPACE.items()}
    later = OptunaStudy(make(first_points=points, space=space))
    assert [later.propose().overrides["train.learning_rate"] for _ in range(2)] == [3e-4, 5e-4]
    assert later.trials()[2].params == c


def test_a_study_of_an_earlier_version_is_read(make: Any) -> None:
    """Its identity holds the roles and the first points."""
    study = make(first_points=[{"train.learning_rate": 2e-4}])
    optuna_study = OptunaStudy(study)
    first = optuna_study.propose().overrides
    old = {**study.identity(), "first_points": study.config.first_points, "space": SPACE}
    optuna_study.remember("identity", old)
    again = OptunaStudy(study)
    assert first["train.learning_rate"] == 2e-4 != again.propose().overrides["train.learning_rate"]
    with pytest.raises(ConfigError, match=r"space\.train\.learning_rate\.high was 0\.001 and is now 0\.002"):
        OptunaStudy(make(space={**SPACE, "train.learning_rate": {**SPACE["train.learning_rate"], "high": 2e-3}}))


# ---- earlier studies ------------------------------------------------------------------------------------------------

RATE = "train.learning_rate"


def run_earlier(make: Any) -> OptunaStudy:
    """A study of six trials, all of which finish."""
    earlier = OptunaStudy(make("earlier", budget={"trials": 6}, scheduler="none"))
    earlier.remember("data", {"x": {"corpus": "0f"}})
    drive(earlier)
    return earlier


def test_a_warm_start_counts_no_trial_of_an_earlier_study(make: Any) -> None:
    earlier = run_earlier(make)
    rates = sorted(trial.params[RATE] for trial in earlier.trials())
    narrower = {**SPACE, RATE: {**SPACE[RATE], "high": (rates[-2] + rates[-1]) / 2}}
    values = {"previous": ["earlier"], "space": narrower, "budget": {"trials": 3}, "scheduler": "none"}
    study = make(**values)
    optuna_study = OptunaStudy(study)
    assert optuna_study.trials() == [] and not optuna_study.budget_spent()
    assert optuna_study.recall("data") == {"x": {"corpus": "0f"}}
    inside = [(t.params, t.value) for t in earlier.trials() if t.params[RATE] < rates[-1]]
    assert [(t.params, t.value) for t in earlier_trials(optuna_study.optuna)] == inside and len(inside) == 5
    assert about_earlier(optuna_study.optuna)[0].endswith(
        "does not count: 5 of earlier; 1 outside this space were left out."
    )
    drive(optuna_study)
    assert [trial.number for trial in optuna_study.trials()] == [5, 6, 7]
    assert all(
        trial.distributions[RATE] == optuna_study.trials()[0].distributions[RATE]
        for trial in earlier_trials(optuna_study.optuna)
    ), "or the model would leave them out"

    more = OptunaStudy(make("earlier", budget={"trials": 8}, scheduler="none"))
    drive(more)
    assert len(earlier_trials(OptunaStudy(study).optuna)) == 5, "they are taken over once"
    names = ["earlier", str(more.path.parent)]
    assert len(earlier_trials(OptunaStudy(make(**{**values, "previous": names})).optuna)) > 5, "also later"


def test_a_warm_start_is_that_of_the_sampler(make: Any) -> None:
    run_earlier(make)
    values = {"sampler": {"name": "tpe", "startup_trials": 6}, "scheduler": "none"}
    proposals = {}
    for name, previous in (("cold", []), ("warm", ["earlier"])):
        optuna_study = OptunaStudy(make(name, previous=previous, **values))
        best = max(earlier_trials(optuna_study.optuna), key=lambda t: t.value or 0.0, default=None)
        proposals[name] = [optuna_study.propose().overrides for _ in range(8)]
    assert best is not None
    near = {name: sum(score(point, 8) for point in points) for name, points in proposals.items()}
    assert near["warm"] > near["cold"], "the model proposes from the first trial on"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"previous": ["none"]}, "previous: none: "),
        ({"previous": ["s"]}, "previous: s is this study itself. Correct that, or leave s out of `previous`."),
        ({"set": {"train.max_steps": 4}}, "do not compare with this study's: train.max_steps was 8 and is now 4. Corr"),
        ({"set": {"seed": 7}}, "seed was 42 and is now 7"),
        ({"space": {**SPACE, "loss.temperature": {"type": "float", "low": 0.1, "high": 1.0}}},
         "space.loss.temperature was 'held fixed' and is now ['float']"),
        ({"space": {**SPACE, "clustering.start_cosine": {**SPACE["clustering.start_cosine"], "when": {}}}},
         "space.clustering.start_cosine was ['float', "),
        ({"space": {**SPACE, RATE: {**SPACE[RATE], "low": 1e-9, "high": 1e-8}}},
         "has no finished trial in this study's"),
        ({"sampler": "random"}, "previous is of no use to the sampler random"),
    ],
)  # fmt: skip
def test_earlier_studies_that_do_not_compare(make: Any, changes: dict[str, Any], message: str) -> None:
    earlier = run_earlier(make)
    with pytest.raises(ConfigError, match=re.escape(message)):
        OptunaStudy(make(**{"previous": ["earlier"], **changes}))
    earlier.remember("data", None)
    with pytest.raises(ConfigError, match="does not say which data its scores are of"):
        OptunaStudy(make(previous=["earlier"]))


# ---- kills ----------------------------------------------------------------------------------------------------------

WRITES = (
    "create_new_study", "set_study_user_attr", "set_study_system_attr", "create_new_trial", "set_trial_param",
    "set_trial_state_values", "set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr",
)  # fmt: skip


class Killed(BaseException):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """The process is no more after this many writes to the storage: before, or after the last one is on disk."""
    left = [writes]

    def dying(method: Any) -> Any:
        def write(*arguments: Any, **options: Any) -> Any:
            if left[0] <= 0:
                raise Killed
            left[0] -= 1
            return method(*arguments, **options)

        return write

    for storage in (optuna.storages._CachedStorage, optuna.storages.JournalStorage):
        for name in WRITES:
            if name in vars(storage):
                monkeypatch.setattr(storage, name, dying(vars(storage)[name]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "every", "sampler"),
    quick_first([("journal", 8, "tpe"), ("sqlite", 29, "tpe"), ("journal", 8, "qmc"), ("journal", 11, "tpe")], 1),
)
def test_killed_after_every_few_writes_it_comes_to_the_same_end(
    make: Any, monkeypatch: pytest.MonkeyPatch, storage: str, every: int, sampler: str
) -> None:
    first = [{"clustering.num_clusters": 16, "clustering.start_cosine": 0.4, "train.learning_rate": 1e-4}]
    values: dict[str, Any] = {"storage": storage, "first_points": first, "budget": {"trials": 7}}
    values |= {"scheduler": "none", "sampler": {"name": "tpe", "startup_trials": 4} if sampler == "tpe" else sampler}
    if sampler == "tpe":
        run_earlier(make)
        values["previous"] = ["earlier"]
    for name in ("whole", "killed"):  # `clusterns enqueue` was given
        (make(name, **values).home / "enqueued").write("1.json", '{"train.learning_rate": 2e-4}')
    whole = OptunaStudy(make("whole", **values))
    drive(whole)
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            kill_after(patch, every)
            try:
                drive(OptunaStudy(make("killed", **values)))
                break
            except Killed:
                kills += 1
        assert kills < 300, "it comes to no end"
    assert kills > 3
    assert [trial.params["train.learning_rate"] == 2e-4 for trial in whole.trials()].count(True) == 1
    assert story(OptunaStudy(make("killed", **values))) == story(whole)


def test_a_trial_that_was_noted_and_not_judged_is_judged_when_it_comes_back(make: Any) -> None:
    optuna_study = OptunaStudy(make())
    first, second = optuna_study.propose(), optuna_study.propose()
    optuna_study.report(first.number, Evaluation(2, 60.0, False, 1))
    optuna_study._live[second.number].report(50.0, 2)
    again = OptunaStudy(make())
    assert [trial.number for trial in again.running()] == [0, 1]
    assert again.resume(1) == second
    assert again.report(1, Evaluation(2, 50.0, False, 1))


def test_a_resumed_trial_is_not_judged_again_at_steps_it_had_passed(make: Any) -> None:
    optuna_study = OptunaStudy(make())
    number = optuna_study.propose().number
    for step in (2, 4):
        assert not optuna_study.report(number, Evaluation(step, 60.0 + step, False, 1))
    again = OptunaStudy(make())
    again.resume(number)
    other = again.propose().number
    assert not again.report(other, Evaluation(2, 70.0, False, 1))
    assert not again.report(number, Evaluation(2, 62.0, False, 1)), "it would be the worse of two now"
    assert again.trials()[number].intermediate_values == {2: 62.0, 4: 64.0}


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_a_process_killed_while_it_writes(make: Any, tmp_path: Path, storage: str) -> None:
    """A real SIGKILL amid real writes, some times over."""
    values = {"storage": storage, "budget": {"trials": 200}, "scheduler": "none"}
    code = (
        "import sys; sys.path[:0] = sys.argv[1], sys.argv[1] + '/..'\n"
        "import test_optuna_study as t, yaml\nfrom pathlib import Path\n"
        "from clusterns_ray.tuning.study import check_study\n"
        "study = check_study(yaml.safe_load(Path(sys.argv[2]).read_text()), Path(sys.argv[2]))\n"
        "print('begun', flush=True); t.drive(t.OptunaStudy(study))\n"
    )
    study = make(**values)
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(study.config.model_dump(by_alias=True, exclude_unset=True)))
    counts = []
    for _ in range(3):
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "killed.yaml")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"begun\n"
            for _ in range(6000):
                try:
                    process.wait(0.01)
                    break
                except subprocess.TimeoutExpired:
                    if len(begun_trials(study)) > (counts[-1] if counts else 0) + 5:
                        break
            process.kill()
        counts.append(len(begun_trials(study)))
    assert 5 < counts[0] < counts[1] < counts[2] < 200
    optuna_study = OptunaStudy(study)
    assert len(optuna_study.running()) <= 1
    for trial in optuna_study.running():
        run(optuna_study, optuna_study.resume(trial.number))
    assert [trial.number for trial in optuna_study.trials()] == list(range(counts[2]))
    assert all(
        trial.state == TrialState.COMPLETE and len(trial.intermediate_values) == 4 for trial in optuna_study.trials()
    )
    assert len({str(trial.params) for trial in optuna_study.trials()}) == counts[2], "a point was proposed twice"


def begun_trials(study: Study) -> list[Any]:
    try:
        return read_optuna_study(study.directory).get_trials(deepcopy=False)
    except (ConfigError, ClusterNSError, KeyError):
        return []


def test_a_journal_whose_last_line_was_cut_off(make: Any) -> None:
    study = make(storage="journal")
    drive(OptunaStudy(study))
    before = story(OptunaStudy(study))
    path = study.directory / "study.journal"
    path.write_bytes(path.read_bytes() + b'{"op_code": 4, "work')
    (study.directory / "study.journal.lock").touch()
    assert story(OptunaStudy(study)) == before
    assert path.read_bytes().endswith(b"\n")


# ---- budgets, identity, time ----------------------------------------------------------------------------------------


def test_hours_are_those_of_all_sessions(make: Any) -> None:
    values = {"budget": {"hours": 1.0}}
    now = [0.0]
    first = OptunaStudy(make(**values), clock=lambda: now[0])
    proposal = first.propose()
    now[0] = 2000.0
    first.complete(proposal.number, Finished(60.0, 8, (), 1.0))
    assert not first.budget_spent()
    now[0] = 100_000.0  # between two sessions no time is counted
    second = OptunaStudy(make(**values), clock=lambda: now[0])
    assert second.recall("seconds") == 2000.0 and not second.budget_spent()
    now[0] += 1600.0
    second.add_elapsed_time()
    assert second.budget_spent()


def test_worker_hours_count_every_worker(make: Any) -> None:
    def spent(workers: int, seconds: float, **changes: Any) -> bool:
        study = make(f"w{workers}-{seconds}", budget={"worker_hours": 1.0}, workers_per_trial=workers, **changes)
        optuna_study = OptunaStudy(study)
        optuna_study.fail(optuna_study.propose().number, "why not", seconds)
        return optuna_study.budget_spent()

    assert not spent(1, 3599.0) and spent(1, 3600.0)
    assert not spent(0, 3599.0) and spent(2, 1800.0) and not spent(2, 1799.0)
    shared = {"trials_per_gpu": 4, "concurrent_trials": 4}
    assert not spent(0, 14_399.0, **shared) and spent(0, 14_400.0, **shared), "a quarter of a GPU each"


def test_money_is_worker_hours_times_the_price(make: Any) -> None:
    study = make(budget={"cost": 3.0, "price": 1.5, "trials": 9}, workers_per_trial=2)
    optuna_study = OptunaStudy(study)
    first, second = optuna_study.propose(), optuna_study.propose()
    optuna_study.report(first.number, Evaluation(2, 60.0, False, 3590.0))
    assert optuna_study.ended_by() is None
    optuna_study.fail(second.number, "why not", 10.0)
    assert optuna_study.ended_by() == "budget.cost (3) is used up", "with what the one that runs has taken"
    assert OptunaStudy(make(budget={"cost": 4.5, "price": 1.5}, workers_per_trial=2)).ended_by() is None


def test_a_study_stops_where_trials_bring_no_gain_and_goes_on_with_a_larger_number(make: Any) -> None:
    def study(**stop: Any) -> OptunaStudy:
        return OptunaStudy(make(scheduler={"name": "median", "startup_trials": 1}, stop=stop))

    optuna_study = study(after=3, gain=0.5)
    for value in (60.0, 61.0, 61.4, 61.3):
        optuna_study.complete(optuna_study.propose().number, Finished(value, 8, ((2, value),), 1.0))
    optuna_study.fail(optuna_study.propose().number, "why not")
    assert optuna_study.ended_by() is None, "one that failed says nothing"
    pruned, running = (optuna_study.propose().number for _ in range(2))
    assert optuna_study.report(pruned, Evaluation(2, 50.0, False, 1.0))
    assert (
        optuna_study.ended_by() == "3 trials in a row did not exceed the 61.00 of trial 1 by more than 0.5 (stop.after)"
    )
    assert study(after=3, gain=0.3).ended_by() is None, "61.4 was one"
    assert study(after=4, gain=0.5).ended_by() is None and study().ended_by() is None
    optuna_study.complete(running, Finished(61.6, 8, (), 1.0))
    assert optuna_study.ended_by() is None, "one that ran was a gain"


def test_seconds_of_a_resumed_trial_add_up(make: Any) -> None:
    optuna_study = OptunaStudy(make())
    number = optuna_study.propose().number
    optuna_study.report(number, Evaluation(2, 60.0, False, 5.0))
    again = OptunaStudy(make())
    again.resume(number)
    again.report(number, Evaluation(4, 60.0, False, 3.0))
    assert again.trials()[number].user_attrs["seconds"] == 8.0
    again.report(number, Evaluation(6, 60.0, False, 2.0))  # a process that took over from one that died after 3 s
    assert again.trials()[number].user_attrs["seconds"] == 10.0
    again.fail(number, "died again")
    assert again.trials()[number].user_attrs["seconds"] == 10.0


def test_a_larger_budget_goes_on_and_another_space_is_refused(make: Any) -> None:
    drive(OptunaStudy(make(budget={"trials": 2})))
    more = OptunaStudy(make(budget={"trials": 3}))
    assert not more.budget_spent() and len(more.trials()) == 2
    with pytest.raises(ConfigError, match=r"sampler\.seed was 0 and is now 5") as error:
        OptunaStudy(make(sampler={"name": "tpe", "seed": 5, "startup_trials": 4}))
    assert "Choose another name" in str(error.value)


def test_failed_trials_count_and_say_why(make: Any) -> None:
    optuna_study = OptunaStudy(make(budget={"trials": 2}))
    optuna_study.fail(optuna_study.propose().number, "out of memory", 3.0)
    run(optuna_study, optuna_study.propose())
    failed = optuna_study.trials()[0]
    assert (failed.state, failed.value, failed.user_attrs["reason"]) == (TrialState.FAIL, None, "out of memory")
    assert optuna_study.budget_spent() and optuna_study.trials()[1].state == TrialState.COMPLETE


def test_evaluations_that_the_study_lacks_are_added_at_the_end(make: Any) -> None:
    optuna_study = OptunaStudy(make())
    number = optuna_study.propose().number
    optuna_study.report(number, Evaluation(2, 60.0, False, 1.0))
    optuna_study.complete(number, Finished(63.0, 6, ((2, 60.0), (4, 61.0), (6, 63.0)), 9.0))
    assert optuna_study.trials()[number].intermediate_values == {2: 60.0, 4: 61.0, 6: 63.0}
