"""Studies in an object store: machines that are lost, what others see of them, and what is there in the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_jobs import LocalJobs, drive
from test_racing import RACE, raced
from test_racing import story as story_of_race
from test_tune_cli import refused, sweep_of
from typer.testing import Result

from clusterns_ray.errors import StorageError
from clusterns_ray.evaluation.sts import TASKS
from clusterns_ray.io.object_store import Store
from clusterns_ray.models import resolve as models
from clusterns_ray.tuning import study_file
from clusterns_ray.tuning.job import Evaluation, Finished
from clusterns_ray.tuning.optuna_study import OptunaStudy
from clusterns_ray.tuning.outcome import write_outcome
from clusterns_ray.tuning.study import Study, dump_study, load_study
from clusterns_ray.tuning.study_file import read_optuna_study
from clusterns_ray.tuning.sweep import owner
from clusterns_ray.tuning.trial import TrialRun

pytestmark = pytest.mark.slow

ASHA = {"name": "asha", "min_steps": 1, "reduction_factor": 2}
OFTEN = "evaluation.every_steps=1"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """Called: from now on this is another machine, and of the one before nothing is left."""
    count = 0

    def another() -> None:
        nonlocal count
        shutil.rmtree(tmp_path / f"machine{count}", ignore_errors=True)
        count += 1
        monkeypatch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path / f"machine{count}"))
        models.staged.clear()

    another()
    return another


def story(study: Study) -> list[tuple[Any, ...]]:
    """What has to be the same, whatever happened to machines."""
    trials = read_optuna_study(study.directory).get_trials(deepcopy=False)
    return [(t.number, t.state.name, t.params, t.value, t.intermediate_values) for t in trials]


def lose(study: Study, evaluations: int) -> None:
    """Run real trials until the machine is lost; what they had copied by then is in the store."""
    drive(sweep_of(study), TrialRun, lose_after=evaluations)


def finish(study: Study) -> tuple[LocalJobs, dict[str, Any]]:
    sweep = sweep_of(study)
    study.home.write("study.yaml", dump_study(study))
    return drive(sweep, TrialRun), write_outcome(study, sweep.optuna_study)


def outcome_of(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("trials", "winner", "candidates", "not_told_apart", "sts_dev_before")}


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_study_whose_machines_are_lost_is_the_undisturbed_one(
    write_study: Callable[..., Path],
    store: Store,
    machine: Callable[[], None],
    kind: str,
) -> None:
    changes = {"scheduler": ASHA, "budget": {"trials": 4}, "confirmation": {"top": 1, "seeds": [1, 2]}, "storage": kind}
    whole = load_study(write_study(**changes), [OFTEN])
    _, expected = finish(whole)
    assert expected["trials"]["PRUNED"] >= 1, "no verdict would be missed"

    file = write_study(**changes)
    where = [OFTEN, f"runtime.storage_path={store.url}", f"evaluation.sts={whole.base.evaluation.sts}"]
    # After the score of the untrained encoder, in the middle of trials, and between them.
    for evaluations in (1, 4, 3, 3, 2):
        lose(load_study(file, where), evaluations)
        machine()
    study = load_study(file, where)
    jobs, result = finish(study)
    begun = jobs.names
    assert story(study) == story(whole) and outcome_of(result) == outcome_of(expected)
    assert begun[-1] == f"{result['winner']['trial']:04d}-seed2" and len(begun) < 8, "what was finished was kept"

    # What is there in the end.
    names = (store / "tiny").names()
    for name in (
        "study.yaml",
        "best.yaml",
        "trials.parquet",
        "result.json",
        "model.manifest.json",
        study_file.FILES[kind],
    ):
        assert name in names, name
    assert not [name for name in names if "/checkpoints/" in name]
    assert not [name for name in names if name.startswith("trials/") and "/model/" in name]
    assert result["best"] == f"{store.url}/tiny/best.yaml" and result["model"] == f"{store.url}/tiny/model"
    models_there = {name.rpartition("/")[0] for name in names if name.endswith("model.safetensors")}
    assert models_there == {
        "model",
        *(f"confirmation/{result['winner']['trial']:04d}-seed{seed}/model" for seed in (1, 2)),
        *(f"confirmation/base-seed{seed}/model" for seed in (1, 2)),
    }
    copies = Path(study.directory).parent.parent
    assert not list(copies.glob("*/0*/metrics.jsonl")), "copies of runs that ended are not kept on the machine"


def test_evaluations_that_no_snapshot_has_are_told_again(
    write_study: Callable[..., Path], store: Store, machine: Callable[[], None]
) -> None:
    file = write_study(budget={"trials": 1})
    where = [OFTEN, f"runtime.storage_path={store.url}"]
    lose(load_study(file, where), 4)  # with the score of step 3; there is a checkpoint of step 2
    machine()
    study = load_study(file, where)
    optuna_study = OptunaStudy(study)
    assert optuna_study.known_step(0) == 1 and optuna_study.recall("scores_before"), "the test shows nothing otherwise"
    jobs, _ = finish(study)
    repeated = [(evaluation.step, evaluation.last) for evaluation in jobs.evaluations[:3]]
    assert repeated == [(2, False), (3, False), (4, True)], "each once, and the untrained encoder's not again"
    assert sorted(OptunaStudy(study).trials()[0].intermediate_values) == [1, 2, 3, 4]


def test_snapshots_come_with_a_trials_beginning_and_end_and_meanwhile_in_time(
    write_study: Callable[..., Path],
    store: Store,
    machine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = load_study(write_study(), [f"runtime.storage_path={store.url}"])
    optuna_study = OptunaStudy(study)

    def elsewhere() -> list[tuple[str, int]]:
        place = study_file.Place(study.directory / "elsewhere", study.home.store)
        study_file.pull_snapshot(place, "sqlite")
        return [(t.state.name, len(t.intermediate_values)) for t in read_optuna_study(place.local).trials]

    assert elsewhere() == []
    first = optuna_study.propose().number
    assert elsewhere() == [("RUNNING", 0)]
    optuna_study.report(first, Evaluation(1, 50.0, False, 1.0))
    assert elsewhere() == [("RUNNING", 1)], "the first, as its attempt came to an evaluation"
    optuna_study.report(first, Evaluation(2, 50.0, False, 1.0))
    optuna_study.save_if_due()
    assert elsewhere() == [("RUNNING", 1)], "the last one is not long ago"
    monkeypatch.setattr("clusterns_ray.tuning.optuna_study.SNAPSHOT_S", 0.0)
    optuna_study.save_if_due()
    assert elsewhere() == [("RUNNING", 2)]
    pushes: list[str] = []
    monkeypatch.setattr(Store, "upload", lambda self, path, name: pushes.append(name))
    optuna_study.save_if_due()
    assert pushes == [], "nothing has changed"
    monkeypatch.undo()
    optuna_study.complete(first, Finished(51.0, 4, (), 2.0))
    assert elsewhere() == [("COMPLETE", 2)]


def test_a_point_enqueued_on_another_machine_is_taken_once(
    write_study: Callable[..., Path],
    store: Store,
    machine: Callable[[], None],
    clusterns: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = write_study(budget={"trials": 3}, confirmation={"top": 1})
    where = ("--set", f"runtime.storage_path={store.url}")
    study = load_study(file, [where[1]])
    optuna_study = OptunaStudy(study)
    optuna_study.fail(optuna_study.propose().number, "why not")
    monkeypatch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path / "elsewhere"))
    said = clusterns("enqueue", file, "train.learning_rate=2e-3", *where)
    assert said.exit_code == 0, said.output
    assert "Enqueued, and tried next: 1 point." in clusterns("tune", file, *where, "--status").stdout
    (name,) = (store / "tiny/enqueued").names()
    content = (store / "tiny/enqueued").read(name) or b""
    assert optuna_study.propose().overrides["train.learning_rate"] == 2e-3
    assert (store / "tiny/enqueued").names() == []
    (store / "tiny/enqueued").write(name, content)  # as if that machine was lost before it was removed
    machine()
    again = OptunaStudy(load_study(file, [where[1]]))
    assert again.resume(1).overrides["train.learning_rate"] == 2e-3 != again.propose().overrides["train.learning_rate"]
    assert (store / "tiny/enqueued").names() == []


def test_nothing_is_written_once_another_process_has_taken_over(
    write_study: Callable[..., Path], store: Store, machine: Callable[[], None]
) -> None:
    study = load_study(write_study(), [f"runtime.storage_path={store.url}"])

    def permit() -> None:
        raise StorageError("now written by another")

    with pytest.raises(StorageError, match="now written by another"):
        OptunaStudy(study, permit=permit)
    assert (store / "tiny").names() == []


def test_a_journal_is_copied_without_a_line_that_is_half_there(tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_bytes(b'{"a": 1}\n{"b"')
    study_file._copy_journal(tmp_path / "study.journal", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b'{"a": 1}\n'


def test_one_driver_among_all_machines(
    write_study: Callable[..., Path],
    store: Store,
    machine: Callable[[], None],
    clusterns: Callable[..., Result],
    tmp_path: Path,
) -> None:
    file = write_study()
    where = f"runtime.storage_path={store.url}"
    with owner(load_study(file, [where])) as permit:
        permit()
        machine()  # another local path: the lock of this machine does not tell
        said = clusterns("tune", file, "--set", where)
    refused(said, "The study 'tiny' is being run by process ", " since 20", "--status")


def test_a_trial_that_a_store_fails_is_begun_again_and_not_failed(
    write_study: Callable[..., Path],
    store: Store,
    machine: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = load_study(write_study(budget={"trials": 1}), [f"runtime.storage_path={store.url}"])
    sweep = sweep_of(study)
    sweep.prepare()
    job = sweep.next_job()
    assert job is not None
    original = Store.push_directory

    def fail(self: Store, local: Path, name: str) -> None:
        raise StorageError("the network is down")

    monkeypatch.setattr(Store, "push_directory", fail)
    run = TrialRun(job)
    with pytest.raises(StorageError, match="the network is down"):
        while True:
            assert isinstance(run.next(), Evaluation)
    run.stop()
    monkeypatch.setattr(Store, "push_directory", original)
    run = TrialRun(job)  # as Ray does
    while isinstance(result := run.next(), Evaluation):
        pass
    assert isinstance(result, Finished) and [step for step, _ in result.curve] == [2, 4]


# ---- what others see ------------------------------------------------------------------------------------------------


def test_a_study_is_looked_at_from_another_machine(
    write_study: Callable[..., Path],
    store: Store,
    machine: Callable[[], None],
    clusterns: Callable[..., Result],
    tmp_path: Path,
) -> None:
    file = write_study(budget={"trials": 2}, confirmation={"top": 1, "seeds": [1, 2]})
    url = f"{store.url}/tiny"
    where = ("--set", f"runtime.storage_path={store.url}")
    refused(clusterns("tune", file, *where, "--status"), "holds no study yet")
    refused(clusterns("report", url), f"'{url}' is not a run: it has no config.yaml. Give STORAGE_PATH/NAME")
    study = load_study(file, [where[1]])
    lose(study, 4)
    machine()
    said = clusterns("tune", file, *where, "--status")
    assert said.exit_code == 0, said.output
    assert f"in {url}." in said.stdout and "2 of 2 trials, 1 finished, 1 runs" in said.stdout
    study.home.write("study.yaml", dump_study(study))
    assert clusterns("status", url).stdout == said.stdout

    _, result = finish(load_study(file, [where[1]]))
    machine()
    said = clusterns("tune", file, *where, "--status")
    assert "2 confirming runs finished." in said.stdout and f"Finished: {url}/result.json" in said.stdout
    said = clusterns("report", url)
    assert said.exit_code == 0, said.output
    here = said.stdout.splitlines()[-1].removeprefix(f"Wrote {url}/report.html (here: ").removesuffix(")")
    assert Path(here).read_bytes() == Store(url).read("report.html") and f"clusterns train {result['best']}" in Path(
        here
    ).read_text(encoding="utf-8")

    run = f"{url}/confirmation/{result['winner']['trial']:04d}-seed1"
    said = clusterns("report", run, "-o", tmp_path / "run.html")
    assert said.exit_code == 0 and said.stdout.splitlines()[-1] == f"Wrote {tmp_path / 'run.html'}", said.output

    machine()
    said = clusterns("tune", file, *where, "--finalize")
    assert said.exit_code == 0, said.output
    final = json.loads(Store(url).read("final.json") or b"")
    assert set(final["tasks"]) == set(TASKS) and final["seeds"] == [1, 2]
    assert said.stdout.splitlines()[-1] == f"Wrote {url}/final.json"
    machine()
    refused(clusterns("tune", file, *where, "--set", "budget.trials=3"), "was finalized at")


# ---- models and runs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(s3: str, write_study: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the store has two finished runs, ``a`` and ``b``, of a machine that is gone."""
    from clusterns_ray import load_config, train

    base = write_study().parent / "base.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path_factory.mktemp("gone")))
        for name, seed in (("a", 1), ("b", 2)):
            train(load_config(base, [f"runtime.storage_path={s3}/trained", f"runtime.name={name}", f"seed={seed}"]))
    return f"{s3}/trained"


@pytest.fixture
def run_url(trained: str, machine: Callable[[], None]) -> str:
    return f"{trained}/a"


def test_a_model_in_the_store(
    run_url: str,
    clusterns: Callable[..., Result],
    machine: Callable[[], None],
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from clusterns_ray import Encoder

    model, sts = f"{run_url}/model", write_study().parent / "sts"
    said = clusterns("evaluate", model, "--sts", sts, "--dev", "STSB/dev", "--json", f"{run_url}/evaluation.json")
    assert said.exit_code == 0, said.output
    assert f"Copying {model} to this machine (" in said.stdout and f"Wrote {run_url}/evaluation.json" in said.stdout
    scores = json.loads(Store(run_url).read("evaluation.json") or b"")
    Store(run_url).delete("evaluation.json")  # other tests have the run, too
    result = json.loads(Store(run_url).read("result.json") or b"")
    assert scores["model"] == model and len(scores["tasks"]) == 7 and result["model"] == model

    models.staged.clear()
    downloads: list[str] = []
    original = Store.download
    monkeypatch.setattr(
        Store, "download", lambda self, name, local: (downloads.append(name), original(self, name, local))[1]
    )
    first = Encoder.load(model).encode(["a lamp"])
    assert downloads == [], "the copy is as the store says, and is used again"
    copy = Path(models.resolve_model(model))
    (copy / "config.json").write_text("{}")
    models.staged.clear()
    assert (Encoder.load(model).encode(["a lamp"]) == first).all() and downloads, "a copy that was changed is not"

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("a lamp\nan iron key\n")
    said = clusterns("encode", model, corpus, "-o", tmp_path / "out.parquet")
    assert said.exit_code == 0 and "(2 sentences" in said.stdout, said.output
    said = clusterns("search", model, corpus, "a lamp", "-k", "1", "--index", tmp_path / "index")
    assert said.exit_code == 0 and "a lamp" in said.stdout.splitlines()[-1], said.output


def test_models_that_are_not_there(
    trained: str, run_url: str, clusterns: Callable[..., Result], write_study: Callable[..., Path]
) -> None:
    sts_dir, run = write_study().parent / "sts", Store(run_url)
    refused(clusterns("evaluate", run_url, "--sts", sts_dir), "is no whole directory", f"give {run_url}/model")
    refused(clusterns("evaluate", f"{trained}/none/model", "--sts", sts_dir), "model.manifest.json is missing")
    refused(clusterns("evaluate", "s3://bucket", "--sts", sts_dir), "the bucket.manifest.json is missing")
    whole = run.read("model/config.json") or b""
    run.write("model/config.json", b"{}")
    models.staged.clear()
    said = clusterns("evaluate", f"{run_url}/model", "--sts", sts_dir)
    run.write("model/config.json", whole)
    assert said.exit_code == 1 and "is damaged: its checksum" in said.stderr


def test_runs_in_the_store_are_reported(
    trained: str, run_url: str, clusterns: Callable[..., Result], tmp_path: Path
) -> None:
    store = Store(trained)
    said = clusterns("report", run_url, f"{trained}/b/")
    assert said.exit_code == 0, said.output
    assert f"Wrote {trained}/report.html (here: " in said.stdout.splitlines()[-1]
    text = (store.read("report.html") or b"").decode()
    assert "<td" in text and "clusterns evaluate" in text and f"{run_url}/model" in text.replace("<wbr>", "")
    refused(clusterns("report", trained), "is not a run", "It holds the runs a, b: name those")
    refused(clusterns("report", run_url, run_url), "is named twice")
    refused(clusterns("report", run_url, tmp_path), "lie in different places", "-o FILE.html")
    refused(clusterns("report", run_url, "s3://other/b"), "lie in different places")
    said = clusterns("report", run_url, "-o", f"{trained}/pages/a.html")
    assert said.exit_code == 0 and "pages/a.html" in store.names(), said.output


def test_a_page_that_cannot_be_copied_is_still_here(
    run_url: str, clusterns: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Store, local: Path, name: str) -> None:
        raise StorageError("access denied.")

    monkeypatch.setattr(Store, "upload", fail)
    said = clusterns("report", run_url)
    assert said.exit_code == 1 and "access denied. The page is in" in said.stderr and "-o FILE.html" in said.stderr


@pytest.mark.slow
def test_a_race_whose_machines_are_lost_is_the_undisturbed_one(
    write_study: Callable[..., Path], store: Store, machine: Callable[[], None]
) -> None:
    """Before a further seed, inside one, and after its last evaluation."""
    file = write_study(**{**RACE, "budget": {"trials": 5}})
    whole = story_of_race(raced(file)[0])
    assert whole[3][4] is not None
    where = f"runtime.storage_path={store.url}"
    for evaluations in (9, 5, 3):
        raced(file, where, lose_after=evaluations)
        machine()
    study, _ = raced(file, where)
    assert story_of_race(study) == whole
