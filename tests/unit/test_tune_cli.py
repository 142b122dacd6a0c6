"""``clusterns tune`` without Ray: what is refused, what is shown, what is run next, and the end."""

from __future__ import annotations

import io
import json
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest
import yaml
from helpers import write_pairs
from local_jobs import drive
from rich.console import Console
from typer.testing import Result

from clusterns_ray.console.study import Lines, clock, read_progress, render, summary_line
from clusterns_ray.errors import ClusterNSError, ConfigError, DataError, DiskError, GpuError, StorageError
from clusterns_ray.evaluation.sts import TASKS
from clusterns_ray.io.files import write_manifest
from clusterns_ray.io.object_store import Place
from clusterns_ray.launch.staging import run_directory
from clusterns_ray.report import study_charts as charts
from clusterns_ray.report.study import study_page
from clusterns_ray.tuning import distributed_trial
from clusterns_ray.tuning.analysis import read_study
from clusterns_ray.tuning.job import Evaluation, Failed, Finished, Job
from clusterns_ray.tuning.objectives import pareto_front
from clusterns_ray.tuning.optuna_study import OptunaStudy
from clusterns_ray.tuning.outcome import write_outcome
from clusterns_ray.tuning.packing import trial_bytes
from clusterns_ray.tuning.result import StudyResult, study_lines
from clusterns_ray.tuning.study import Study, check_study, dump_study, load_study
from clusterns_ray.tuning.study_file import read_optuna_study
from clusterns_ray.tuning.sweep import Sweep, owner, tune
from clusterns_ray.tuning.trial import TrialRun, failure, train_here

pytestmark = pytest.mark.slow


def refused(result: Result, *parts: str) -> None:
    assert isinstance(result.exception, SystemExit), f"a traceback: {result.exception!r}"
    assert result.exit_code == 2, result.output
    assert result.stderr.count("error: ") == 1 and result.stderr.startswith("error: ")
    assert [part for part in parts if part not in result.stderr] == [], result.stderr


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.corpus=none.txt"], "none.txt"),
        (["--set", "train.learning_rate=1"], "train.learning_rate is in the study's space"),
        (["--set", "evaluation.dev=STSB/none"], "STSB/none"),
        (["--status"], "holds no study yet"),
        (["--finalize"], "is not finished"),
        (["--status", "--finalize"], "exclude each other"),
    ],
)
def test_wrong_requests(
    clusterns: Callable[..., Result], write_study: Callable[..., Path], arguments: list[str], message: str
) -> None:
    study = write_study()
    refused(clusterns("tune", study, *arguments), message)
    assert not (study.parent / "runs" / "tiny" / "study.db").exists()


def test_an_encoder_of_the_space_is_looked_at_before_anything_starts(write_study: Callable[..., Path]) -> None:
    layers = {"encoder.num_layers": {"type": "int", "low": 1, "high": 9, "role": "scientific"}}
    with pytest.raises(ConfigError, match=r"encoder\.num_layers is 9"):
        tune(load_study(write_study(space=layers)))


def test_one_process_a_study(clusterns: Callable[..., Result], write_study: Callable[..., Path]) -> None:
    file = write_study()
    with owner(load_study(file)):
        result = clusterns("tune", file)
    refused(result, "The study 'tiny' is being run by another process", "--status")


def test_a_study_does_not_compare_trials_over_different_data(write_study: Callable[..., Path]) -> None:
    file = write_study()
    for _ in range(2):
        sweep_of(load_study(file)).prepare()
    write_pairs(file.parent / "sts/STSB/dev.jsonl", count=20, seed=9)
    with pytest.raises(DataError, match=r"study 'tiny' was begun with other data: the digest of the dev set was"):
        sweep_of(load_study(file)).prepare()


# ---- which run is next, on a pool of this process -------------------------------------------------------------------


class Invented(TrialRun):
    """A run whose scores are invented from its values, with the files that a run leaves."""

    def _run(self) -> None:
        config, directory = self.job.config, run_directory(self.job.config)
        curve = [
            (step, 60 - abs(config.train.learning_rate - 1e-3) * 1e3 + config.seed % 7 / 10 + step / 100)
            for step in (2, 4)
        ]
        (directory / "model").mkdir(exist_ok=True)
        (directory / "result.json").write_text(json.dumps({"sts_dev": curve[-1][1]}))
        for step, score in [(0, 50.0), *curve]:
            self.results.put(Evaluation(step, score, last=step == 4))
            if not self.verdicts.get():
                return
        self.results.put(Finished(curve[-1][1], 4, tuple(curve)))


def sweep_of(study: Study) -> Sweep:
    """What a new process makes of the study on disk."""
    return Sweep(study, OptunaStudy(study), Lines())


def begun(sweep: Sweep, stop_after: int | None = None) -> list[str]:
    """Run a sweep with invented scores; the names of its runs in the order they were begun."""
    return drive(sweep, Invented, stop_after).names


@pytest.fixture(scope="module")
def done(write_study: Callable[..., Path]) -> tuple[Path, Study, list[str], dict[str, Any]]:
    """A finished study: its file, itself, the order of its runs, its result."""
    file = write_study()
    sweep = sweep_of(load_study(file))
    names = drive(sweep, TrialRun).names
    return file, sweep.study, names, write_outcome(sweep.study, sweep.optuna_study)


def test_trials_then_the_best_again_with_new_seeds(done: Any) -> None:
    _, study, names, result = done
    assert names[:3] == ["0000", "0001", "0002"]
    best = sorted(read_optuna_study(study.directory).trials, key=lambda trial: (-(trial.value or 0), trial.number))[:2]
    again = [f"{trial.number:04d}-seed{seed}" for trial in best for seed in (1, 2)]
    assert names[3:] == ["base-seed1", "base-seed2", *again]
    assert result["trials"] == {"COMPLETE": 3, "PRUNED": 0, "FAIL": 0}
    plain = optuna.load_study(study_name="tiny", storage=f"sqlite:///{study.directory}/study.db")
    assert plain.best_trial.params == best[0].params, "Optuna alone opens it"
    for trial in best:
        config = yaml.safe_load((study.directory / f"confirmation/{trial.number:04d}-seed2/config.yaml").read_text())
        assert config["seed"] == 2
        assert config["train"]["learning_rate"] == trial.params["train.learning_rate"]


def test_the_untrained_encoder_is_scored_once(done: Any) -> None:
    _, study, _, result = done
    first = [json.loads((path / "metrics.jsonl").read_text().splitlines()[0]) for path in study.directory.glob("*/0*")]
    assert len(first) == 7
    assert {(record["step"], record["sts_dev"]) for record in first} == {(0, result["sts_dev_before"])}
    # only a score that is measured comes with what else is measured of the embeddings
    assert sum(len(record) > 3 for record in first) == 1


def first_job(sweep: Sweep) -> Job:
    sweep.prepare()
    job = sweep.next_job()
    assert job is not None and job.score_before is None
    assert sweep.next_job() is None, "it scores the untrained encoder, for all"
    assert not sweep.prunes(job, Evaluation(0, 55.5, last=False))
    return job


def test_a_pool_of_two_waits_for_the_score_of_the_untrained_encoder(write_study: Callable[..., Path]) -> None:
    sweep = sweep_of(load_study(write_study(concurrent_trials=2)))
    first_job(sweep)
    second = sweep.next_job()
    assert second is not None and second.score_before == 55.5 and sweep.next_job() is None


def test_confirmations_wait_for_the_last_trial(write_study: Callable[..., Path]) -> None:
    sweep = sweep_of(load_study(write_study(budget={"trials": 1}, concurrent_trials=2)))
    job = first_job(sweep)
    assert not sweep.is_complete() and sweep.next_job() is None
    sweep.close(job, Failed("why not", 1.0))
    assert sweep.is_complete(), "nothing to confirm"
    with pytest.raises(ClusterNSError, match="None of the 1 trials of 'tiny' finished; the last: why not"):
        write_outcome(sweep.study, sweep.optuna_study)


def test_a_half_done_trial_comes_first_and_with_the_same_values(write_study: Callable[..., Path]) -> None:
    study = load_study(write_study())
    assert begun(sweep_of(study), stop_after=1) == ["0000", "0001"]
    params = read_optuna_study(study.directory).trials[1].params
    again = sweep_of(study)
    assert begun(again)[:2] == ["0001", "0002"]
    assert again.optuna_study.trials()[1].params == params and len(again.optuna_study.trials()) == 3


def test_a_trial_that_always_takes_the_sweep_down_is_given_up(write_study: Callable[..., Path]) -> None:
    study = load_study(write_study())
    for attempt in range(5):
        assert begun(sweep_of(study), stop_after=0) == ["0000"], attempt
    sweep = sweep_of(study)
    assert begun(sweep)[:2] == ["0001", "0002"]
    failed = sweep.optuna_study.trials()[0]
    assert failed.state.name == "FAIL" and failed.user_attrs["reason"].startswith("was begun 5 times")


@pytest.mark.parametrize(("fault", "kind"), [("gpu", GpuError), ("storage", DiskError)])
def test_what_fails_on_a_machine_ends_the_sweep_and_no_trial(
    write_study: Callable[..., Path], fault: Literal["gpu", "storage"], kind: type[ClusterNSError]
) -> None:
    study = load_study(write_study())
    for _ in range(2):
        sweep = sweep_of(study)
        sweep.prepare()
        job = sweep.next_job()
        assert job is not None
        with pytest.raises(kind, match=r"stopped in 0000: why not\. .*the same command goes on, and no trial is lost"):
            sweep.close(job, Failed("why not", fault=fault))
        (trial,) = read_optuna_study(study.directory).trials
        assert trial.state.name == "RUNNING"


def test_a_confirmation_that_fails_is_not_tried_for_ever(write_study: Callable[..., Path]) -> None:
    sweep = sweep_of(load_study(write_study(budget={"trials": 1}, confirmation={"top": 1, "seeds": [1, 2]})))

    class Failing(Invented):
        def _run(self) -> None:
            self.results.put(Failed("why not")) if self.job.name == "0000-seed1" else super()._run()

    assert drive(sweep, Failing).names == ["0000", "base-seed1", "base-seed2", "0000-seed1", "0000-seed2"]
    again = sweep_of(sweep.study)
    assert begun(again) == []
    result = write_outcome(again.study, again.optuna_study)
    assert result["confirmation_failures"] == {"0000-seed1": "why not"}
    assert list(result["winner"]["scores"]) == ["2"]


def test_a_winner_whose_model_was_changed_is_refused(write_study: Callable[..., Path]) -> None:
    sweep = sweep_of(load_study(write_study(budget={"trials": 1}, confirmation={"top": 1, "seeds": [1]})))
    begun(sweep)
    model = sweep.study.directory / "confirmation" / "0000-seed1" / "model"
    (model / "modules.json").write_text("[]")
    write_manifest(model)
    (model / "modules.json").write_text("{}")
    with pytest.raises(StorageError, match=r"0000-seed1/model' was changed or damaged .*modules\.json"):
        write_outcome(sweep.study, sweep.optuna_study)
    assert not (sweep.study.directory / "result.json").exists()


def test_a_killed_study_ends_as_the_whole_one(write_study: Callable[..., Path]) -> None:
    """Its driver is lost after each number of runs."""

    def end(*stops: int) -> list[Any]:
        study = load_study(write_study())
        for stop_after in stops:
            begun(sweep_of(study), stop_after)
        sweep = sweep_of(study)
        begun(sweep)
        result = write_outcome(study, sweep.optuna_study)
        return [result[key] for key in ("winner", "candidates", "trials")]

    assert end(0, 1, 2, 1) == end()


def test_a_larger_budget_goes_on_and_confirms_anew(write_study: Callable[..., Path]) -> None:
    file = write_study(budget={"trials": 1}, confirmation={"top": 1, "seeds": [1]})
    assert begun(sweep_of(load_study(file))) == ["0000", "base-seed1", "0000-seed1"]
    assert OptunaStudy(load_study(file)).recall("ended_by") == "No further trial begins: budget.trials (1) is used up."
    more = sweep_of(load_study(file, ["budget.trials=9", "stop.after=2", "stop.gain=50"]))
    names = begun(more)
    assert more.optuna_study.recall("ended_by").startswith("No further trial begins: 2 trials in a row did not")
    best = max(more.optuna_study.trials(), key=lambda trial: trial.value or 0).number
    assert names == ["0001", "0002", *([f"{best:04d}-seed1"] if best else [])]


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_an_enqueued_point_is_tried_next_and_once(
    write_study: Callable[..., Path], clusterns: Callable[..., Result], kind: str
) -> None:
    """Whether the study runs or stands still, and wherever its driver is lost."""
    file = write_study(budget={"trials": 4}, confirmation={"top": 1}, storage=kind)
    study = load_study(file)
    point = ("clustering.num_clusters=4", "train.learning_rate=2e-3")
    refused(clusterns("enqueue", file, *point), "holds no study yet")
    assert begun(sweep_of(study), stop_after=1) == ["0000", "0001"]
    said = clusterns("enqueue", file, *point)
    assert said.exit_code == 0 and "next trial of the study tiny: clustering.num_clusters 4, train.l" in said.stdout
    refused(clusterns("enqueue", file, *point), "That very point is enqueued")
    assert "Enqueued, and tried next: 1 point." in clusterns("tune", file, "--status").stdout
    (waiting,) = (study.directory / "enqueued").iterdir()

    class Running(Invented):
        """In its first run, another point is enqueued."""

        def _run(self) -> None:
            if self.job.name == "0001":
                assert clusterns("enqueue", file, "train.learning_rate=5e-3").exit_code == 0
            super()._run()

    text = waiting.read_text()
    drive(sweep_of(study), Running, stop_after=1)  # lost after trial 2 was begun with the point, which goes on
    waiting.write_text(text)  # as if it had been lost before the file was removed
    assert begun(sweep_of(study)) == ["0002", "0003", "base-seed42"]
    trials = read_optuna_study(study.directory).trials
    values = {"clustering.num_clusters": 4, "train.learning_rate": 2e-3}
    assert trials[2].params == values and trials[3].params["train.learning_rate"] == 5e-3
    assert list((study.directory / "enqueued").iterdir()) == []
    refused(clusterns("enqueue", file, *point), "Trial 2 of the study 'tiny' has that very point")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.learning_rat=1e-3"], "train.learning_rat is not a key that the space varies: did you mean"),
        (["train.learning_rate=1"], "train.learning_rate is 1, but the space has numbers from 0.0001 to 0.01"),
        (["train.learning_rate"], "'train.learning_rate' is not KEY=VALUE, such as"),
        (["train.learning_rate=1e-3", "train.learning_rate=2e-3"], "train.learning_rate is given twice"),
        (["train.learning_rate=1e-3", "--set", "train.max_steps=2"], "train.max_steps was 4 and is now 2"),
        (["train.learning_rate=1e-3", "--set", "name=other"], "holds no study yet"),
    ],
)
def test_points_that_cannot_be_enqueued(
    done: Any, clusterns: Callable[..., Result], arguments: list[str], message: str
) -> None:
    refused(clusterns("enqueue", done[0], *arguments), message)
    assert not list((done[1].directory / "enqueued").glob("*"))


def test_an_enqueued_point_that_was_damaged_is_passed_over(write_study: Callable[..., Path]) -> None:
    study, notes = load_study(write_study()), []
    for name, text in (("1.json", "{"), ("2.json", '{"train.learning_rate": 3}'), ("3.json", "[1]")):
        (study.home / "enqueued").write(name, text)
    assert OptunaStudy(study).propose(notes.append).number == 0
    assert [note.count("An enqueued point is passed over") for note in notes] == [1, 1, 1]
    assert "1.json is damaged" in notes[0] and "2.json: train.learning_rate is 3, but" in notes[1]


def test_a_worker_gets_the_verdict_on_its_own_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that died may have left the answer to another one."""
    monkeypatch.setattr(distributed_trial, "Queue", lambda actor_options: queue.SimpleQueue())
    monkeypatch.setattr(distributed_trial, "on_this_node", dict)
    channel, verdicts = distributed_trial.Channel(), []
    channel.verdicts.put(("another question", False))
    worker = threading.Thread(target=lambda: verdicts.append(channel.ask(Evaluation(2, 60.0, last=False))))
    worker.start()
    assert channel.listen(lambda evaluation: evaluation.score == 60.0)
    worker.join(5)
    assert verdicts == [True]


@pytest.mark.parametrize("shared_by", [1, 3])
def test_a_trial_may_use_its_part_of_a_gpu(
    write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, shared_by: int
) -> None:
    parts: list[float] = []
    monkeypatch.setattr("clusterns_ray.launch.workers.check_gpu", lambda: None)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", parts.append)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("clusterns_ray.training.loop.train_worker", lambda context, device, *_, **__: {"on": device})
    job = sweep_of(load_study(write_study())).next_job()
    assert job is not None
    done = train_here(replace(job, use_gpu=True, trials_per_gpu=shared_by), lambda _: None)
    assert str(done["on"]) == "cuda" and parts == [1 / shared_by]


def test_why_a_trial_failed(tmp_path: Path) -> None:
    assert failure(ConfigError("that\n is wrong"), Place(tmp_path)) == "that is wrong"
    assert failure(ZeroDivisionError("by zero"), Place(tmp_path / "new")) == "ZeroDivisionError: by zero"
    assert "ZeroDivisionError: by zero" in (tmp_path / "new" / "error.txt").read_text()


# ---- what is shown --------------------------------------------------------------------------------------------------


def shown(renderable: Any, width: int = 200) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(renderable)
    return file.getvalue()


def test_the_table(write_study: Callable[..., Path]) -> None:
    study = load_study(
        write_study(budget={"trials": 9}, scheduler="asha", sampler={"name": "tpe", "startup_trials": 1})
    )
    optuna_study = OptunaStudy(study)
    optuna_study.remember("scores_before", {"x": 50.0})
    numbers = [optuna_study.propose().number for _ in range(4)]
    optuna_study.report(numbers[0], Evaluation(2, 60.0, False, 65.0))
    optuna_study.complete(numbers[0], Finished(61.5, 4, (), 130.0))
    assert optuna_study.report(numbers[1], Evaluation(2, 55.25, False, 30.0))
    optuna_study.fail(numbers[2], "out of memory", 20.0)
    optuna_study.report(numbers[3], Evaluation(2, 70.0, False, 40.0))
    progress = read_progress(study, read_optuna_study(study.directory))
    assert progress.best is not None and (progress.best.number, progress.best.score) == (0, 61.5)
    # three ended in 180 s: 60 s each; six to go, one of which has run for 40 s
    assert progress.seconds_left == pytest.approx(6 * 60 - 40)
    text = shown(render(progress))
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "best" in rows["0"] and "61.50" in rows["0"] and "2:10" in rows["0"]
    assert "pruned" in rows["1"] and "55.25" in rows["1"]
    assert "failed" in rows["2"] and "runs" in rows["3"] and "70.00" in rows["3"]
    assert text.index(rows["3"]) < text.index(rows["0"]), "those that run come first"
    assert "trial 2 failed: out of memory" in text
    assert "4 of 9 trials, 1 finished, 1 pruned, 1 failed, 1 runs, best 61.50 of trial 0 (+11.50 over" in text


@pytest.mark.parametrize("budget", [{"worker_hours": 1.0}, {"cost": 2.0, "price": 2.0}])
def test_the_time_left_of_other_budgets(write_study: Callable[..., Path], budget: dict[str, float]) -> None:
    study = load_study(write_study(budget=budget, workers_per_trial=2, concurrent_trials=2))
    optuna_study = OptunaStudy(study)
    optuna_study.complete(optuna_study.propose().number, Finished(60.0, 4, (), 600.0))
    progress = read_progress(study, read_optuna_study(study.directory))
    # 1200 worker seconds are spent; 2400 are left for two trials of two workers
    assert progress.seconds_left == pytest.approx(600.0) and progress.planned is None
    assert "1 trials" in summary_line(progress) and ("cost 0.67" in summary_line(progress)) == ("cost" in budget)


def test_clock() -> None:
    shown = "0:00 0:59 1:01 1:00:00 10:01:01"
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3600, 36_061)] == shown.split()


@pytest.mark.parametrize("seeds", [[1], []])
def test_status_says_whether_a_study_is_at_work(
    write_study: Callable[..., Path], clusterns: Callable[..., Result], seeds: list[int]
) -> None:
    file = write_study(confirmation={"seeds": seeds})
    begun(sweep_of(load_study(file)), stop_after=1)
    idle = "No process of this machine runs the study now"
    killed = clusterns("tune", file, "--status").stdout
    assert idle in killed and "left" in killed and ("before confirmation" in killed) == bool(seeds)
    with owner(load_study(file)):
        said = clusterns("tune", file, "--status")
    assert said.exit_code == 0 and idle not in said.stdout


def test_status_of_a_finished_study(done: Any, clusterns: Callable[..., Result]) -> None:
    file, study, _, result = done
    said = clusterns("tune", file, "--status")
    assert said.exit_code == 0, said.output
    study.home.write("study.yaml", dump_study(study))
    assert clusterns("status", study.directory).stdout == said.stdout
    assert (
        "3 of 3 trials, 3 finished" in said.stdout
        and "4 confirming runs finished." in said.stdout
        and "base configuration was run with 2 seeds" in said.stdout
    )
    assert f"Finished: {study.directory / 'result.json'}" in said.stdout
    assert f"of trial {max(result['candidates'], key=lambda c: c['trial_score'])['trial']}" in said.stdout


def test_the_result_in_words(done: Any) -> None:
    result = done[3]
    lines = study_lines(result)
    winner = result["winner"]
    assert (
        f"trial {winner['trial']}: {winner['mean']:.2f} +- {winner['deviation']:.2f} over 2 of 2 seeds"
        in lines[[candidate["trial"] for candidate in result["candidates"]].index(winner["trial"])]
    )
    assert any(line.startswith(f"Winner by STSB/dev: trial {winner['trial']}, ") for line in lines)
    assert ("Not to be told apart" in lines[-1]) == bool(result["not_told_apart"])
    said = " ".join(lines)
    assert "the untrained encoder (" in said and "the base configuration (" in said and "over the dev pairs" in said
    shown = StudyResult(result)
    assert repr(shown).splitlines() == [*lines, f"Model: {result['model']}"]
    assert (Path(shown.directory) / "result.json").is_file() and Path(shown.best).is_file()


@pytest.mark.parametrize("minimize", ["seconds", "memory"])
def test_what_is_shown_of_two_objectives(
    write_study: Callable[..., Path], clusterns: Callable[..., Result], minimize: str
) -> None:
    file = write_study(minimize=minimize, confirmation={"top": 1}, budget={"trials": 5}, sampler="random")
    sweep = sweep_of(load_study(file))
    drive(sweep, Invented)
    study, trials = sweep.study, sweep.optuna_study.trials()
    study.home.write("study.yaml", dump_study(study))
    result = write_outcome(study, sweep.optuna_study)
    if minimize == "memory":
        config = study.space.config(trials[1].params)
        assert trials[1].user_attrs["memory"] == trial_bytes(config, gpu=False) > 700 << 20
    taken = {trial.number: (trial.value or 0.0, trial.user_attrs[minimize]) for trial in trials}
    numbers = [point["trial"] for point in result["front"]]
    assert numbers == [list(taken)[n] for n in pareto_front(list(taken.values()))]
    assert [(p["score"], p[minimize]) for p in result["front"]] == [taken[number] for number in numbers]
    assert result["winner"]["trial"] == numbers[-1]
    (line,) = [line for line in study_lines(result) if line.startswith(f"Pareto front of score and {minimize}: ")]
    assert f"trial {numbers[0]} {taken[numbers[0]][0]:.2f} with " in line
    table = clusterns("tune", file, "--status").stdout
    assert table.count("front  ") == len(numbers) and ("GiB" in table) == (minimize == "memory")
    record = read_study(study.directory)
    traces = {trace["name"]: trace for trace in charts.cost(record)["data"]}
    assert traces["Pareto front"]["y"] == [taken[number][0] for number in numbers]
    page = study_page(record, result)
    (shown,) = [table for section in page.sections if section.anchor == "trials" for table in section.tables]
    assert [str(row[0]) for row in shown.rows if row[1] == "front"] == list(map(str, reversed(numbers)))


def test_what_is_said_of_earlier_studies(
    write_study: Callable[..., Path], clusterns: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study(budget={"trials": 2}, confirmation={"top": 1})
    first = load_study(file)
    begun(sweep_of(first))
    best = max(OptunaStudy(first).trials(), key=lambda trial: trial.value or 0.0)
    values = ["name=second", "previous=[tiny]"]
    study = load_study(file, values)
    assert begun(sweep_of(study)) == ["0002", "0003", "base-seed42"]
    known = "and the budget does not count: 2 of tiny."
    options = [argument for value in values for argument in ("--set", value)]
    said = clusterns("tune", file, *options, "--status").stdout
    assert known in said and f"tiny {best.number} " in said and "2 of 2 trials, 2 finished" in said
    notes: list[str] = []
    monkeypatch.setattr("clusterns_ray.tuning.sweep.write_outcome", lambda *_: {})
    tune(study, lambda event: notes.append(getattr(event, "text", "")))
    assert any(known in note for note in notes)
    own = max(OptunaStudy(study).trials(), key=lambda trial: trial.value or 0.0)
    assert any("No trial here has reached" in note for note in notes) == ((own.value or 0.0) < (best.value or 0.0))
    page = study_page(read_study(study.directory), None)
    (table,) = [table for section in page.sections if section.anchor == "trials" for table in section.tables]
    assert sorted(str(row[0]) for row in table.rows) == ["2", "3", "tiny 0", "tiny 1"]
    assert any(known in warning.text for warning in page.warnings)
    write_pairs(file.parent / "sts/STSB/dev.jsonl", count=20, seed=9)
    with pytest.raises(DataError, match=r"'third' \(or one under its `previous`\) was begun with other data"):
        sweep_of(load_study(file, ["name=third", "previous=[tiny]"])).prepare()


# ---- the same command again, and the tests --------------------------------------------------------------------------


def test_a_finished_study_is_left_as_it_is(done: Any, clusterns: Callable[..., Result]) -> None:
    file, study, _, result = done
    said = clusterns("tune", file)
    assert said.exit_code == 0, said.output
    assert "'tiny' is finished; raise the budget to go on with it." in said.stdout
    names = [f"{study.directory}/{name}" for name in ("best.yaml", "model", "report.html")]
    assert said.stdout.splitlines()[-1] == f"Wrote {names[0]}, {names[1]} and {names[2]}"
    assert json.loads((study.directory / "result.json").read_text()) == result


def test_tests_are_scored_once_and_nothing_is_chosen_after_that(done: Any, clusterns: Callable[..., Result]) -> None:
    file, study, _, result = done
    first = clusterns("tune", file, "--finalize")
    assert first.exit_code == 0, first.output
    final = json.loads((study.directory / "final.json").read_text())
    assert (
        set(final["tasks"]) == set(TASKS) and final["seeds"] == [1, 2] and final["trial"] == result["winner"]["trial"]
    )
    for value in [*final["tasks"].values(), final["average"]]:
        assert len(value["scores"]) == 2 and value["mean"] == pytest.approx(sum(value["scores"]) / 2)
    assert final["average"]["mean"] == pytest.approx(sum(v["mean"] for v in final["tasks"].values()) / 7)
    assert final["when"] in first.stdout and "STS12" in first.stdout and "average" in first.stdout

    written = (study.directory / "final.json").stat().st_mtime_ns
    again = clusterns("tune", file, "--finalize")
    assert again.exit_code == 0 and final["when"] in again.stdout
    assert (study.directory / "final.json").stat().st_mtime_ns == written

    refused(clusterns("tune", file, "--set", "budget.trials=9"), "was finalized at", "nothing more may be chosen")
    assert clusterns("tune", file).exit_code == 0, "to look at it again is no choice"
    assert "Finalized: " in clusterns("tune", file, "--status").stdout


def test_graded_by_structure_there_are_no_tests(write_study: Callable[..., Path], tmp_path: Path) -> None:
    from clusterns_ray.tuning.final import finalize

    values = yaml.safe_load(write_study().read_text())
    values["set"] = {"evaluation.sts": "structure", "data.documents": str(tmp_path)}
    base = write_study().parent / "base.yaml"
    with pytest.raises(ConfigError, match="structure, which has no test sets"):
        finalize(check_study({**values, "base": str(base)}, tmp_path / "study.yaml", ["evaluation.dev=STRUCTURE/dev"]))
