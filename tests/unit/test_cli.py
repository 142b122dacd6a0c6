from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import sentences, write_pairs
from typer.testing import Result

from clusterns_ray.config import load_config
from clusterns_ray.evaluation.sts import TASKS
from clusterns_ray.io.files import with_checksum, write_json, write_manifest
from clusterns_ray.models.base_model import complete


def check_refusal(result: Result, *parts: str) -> None:
    """Exit code 2, one message, no traceback, and the message holds every part."""
    assert isinstance(result.exception, SystemExit), f"a traceback: {result.exception!r}"
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("error: ") == 1 and result.stderr.startswith("error: ")
    assert result.stdout == "", "something was begun before it was refused"
    assert [part for part in parts if part not in result.stderr] == [], result.stderr


def test_public_names_are_found_where_they_are() -> None:
    import clusterns_ray
    from clusterns_ray.models.encoder import Encoder

    assert clusterns_ray.Encoder is Encoder
    for name in clusterns_ray.__all__:
        assert callable(getattr(clusterns_ray, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = clusterns_ray.nothing


# ---- train: what is refused ---------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[list[str], list[str]]] = {  # what the configuration alone refuses is in test_config.py
    "unknown key": (["encoder.pooolling=cls"], ["unknown key encoder.pooolling", "did you mean encoder.pooling?"]),
    "clusters beyond the batch": (["clustering.num_clusters=17"], ["num_clusters is 17", "(16)", "Use at most 16"]),
    "missing corpus": (["data.corpus=/none/at/all.txt"], ["/none/at/all.txt", "no such file", "check the path"]),
    "glob without match": (["data.corpus=/none/*.txt"], ["/none/*.txt", "no file matches", "check the path"]),
    "one of several": (["data.corpus=[/none/a.txt, /none/b.txt]"], ["/none/a.txt", "no such file"]),
    "a directory as corpus": (["data.corpus=."], ["directory", "name its files"]),
    "missing documents": (
        ["data.documents=/none/docs", "evaluation.sts=structure"],
        ["'/none/docs'", "Check the path"],
    ),
    "missing STS directory": (["evaluation.sts=/none/sts"], ["'/none/sts'", "is not there", "TASK/SUBSET.jsonl"]),
    "dev set that the hub has not": (
        ["evaluation.sts=hf", "evaluation.dev=STSB/train"],
        ["evaluation.dev is 'STSB/train'", "evaluation.sts hf", "STSB/dev"],
    ),
    "package": (["encoder.name=package:nobody_has_this/m"], ["'nobody_has_this'", "pip install nobody-has-this"]),
    "directory without a model": (["encoder.name=."], ["config.json", "save_pretrained"]),
    "path without a model": (["encoder.name=runs/old/model"], ["'runs/old/model'", "no such directory"]),
    "too many layers": (["encoder.num_layers=9"], ["encoder.num_layers is 9", "has 3 layers", "Use at most 3"]),
    "object store": (
        ["runtime.storage_path=nosuch://b/x"],
        ["storage_path", "'nosuch://b/x'", "Give a path"],
    ),
    "file as storage": (["runtime.storage_path=run.yaml/x"], ["'run.yaml/x'", "Not a directory", "Choose a directory"]),
}


@pytest.mark.parametrize("verb", ["train", "prepare"])
@pytest.mark.parametrize("case", REFUSED)
def test_train_and_prepare_refuse(clusterns: Callable[..., Result], config_file: Path, case: str, verb: str) -> None:
    overrides, parts = REFUSED[case]
    options = [part for override in overrides for part in ("--set", override)]
    check_refusal(clusterns(verb, config_file, *options), *parts)
    assert sorted(path.name for path in config_file.parent.iterdir()) == ["run.yaml"], "it left something behind"


@pytest.mark.parametrize("value", ["[]", "''"])
def test_an_empty_corpus_names_its_key(clusterns: Callable[..., Result], config_file: Path, value: str) -> None:
    """And is not taken for the current directory."""
    check_refusal(clusterns("train", config_file, "--set", f"data.corpus={value}"), "data.corpus")


def test_dev_set_that_is_not_there(clusterns: Callable[..., Result], config_file: Path, sts_dir: Path) -> None:
    options = ["--set", f"evaluation.sts={sts_dir}", "--set", "evaluation.dev=STSB/test"]
    check_refusal(clusterns("train", config_file, *options), str(sts_dir), "STSB/test.jsonl", "It holds: STSB/dev")


def test_no_such_configuration(clusterns: Callable[..., Result]) -> None:
    check_refusal(clusterns("train", "none.yaml"), "'none.yaml'", "No such file", "quickstart.yaml")


def test_configuration_that_is_not_yaml(clusterns: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train: {shards: [}\n")
    check_refusal(clusterns("train", "bad.yaml"), "bad.yaml is not YAML", "line 1", "Correct that place")
    (tmp_path / "bad.yaml").write_text("just words\n")
    check_refusal(clusterns("train", "bad.yaml"), "bad.yaml holds the value 'just words'", "section: {key: value}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_storage_that_cannot_be_written(clusterns: Callable[..., Result], config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    result = clusterns("train", config_file, "--set", "runtime.storage_path=locked/runs")
    check_refusal(result, "'locked/runs'", str(tmp_path / "locked"), "Choose another")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
@pytest.mark.parametrize("key", ["runtime.storage_path", "data.cache_dir"])
def test_storage_that_fails_when_it_is_written(clusterns: Callable[..., Result], config_file: Path, key: str) -> None:
    """/proc looks writable to root, and is not."""
    result = clusterns("train", config_file, "--set", f"{key}=/proc/none")
    assert result.exit_code == 2, f"a traceback: {result.exception!r}"
    assert "/proc/none" in result.stderr and "Traceback" not in result.output


def test_a_gpu_that_is_not_there(
    clusterns: Callable[..., Result], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = clusterns("train", config_file, "--set", "runtime.use_gpu=true")
    assert result.exit_code == 2
    assert "runtime.use_gpu is true" in result.stderr and "Set it to false" in result.stderr


def test_a_hub_name_without_a_network(clusterns: Callable[..., Result], config_file: Path) -> None:
    result = clusterns("train", config_file, "--set", "encoder.name=nobody-here/no-such-model")
    assert result.exit_code == 2
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.output
    assert "'nobody-here/no-such-model' cannot be loaded" in result.stderr and "without a network" in result.stderr


def test_bad_text_is_refused_with_its_line(clusterns: Callable[..., Result], config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"A good line here.\nA caf\xe9 line.\n")
    result = clusterns("train", config_file, "--set", "data.corpus=latin.txt")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "latin.txt:2" in result.stderr and "0xe9" in result.stderr and "re-encode" in result.stderr
    (tmp_path / "few.csv").write_text("a,b\n1,2\n")
    result = clusterns("train", config_file, "--set", "data.corpus=few.csv")
    assert result.exit_code == 2 and "'text'" in result.stderr
    (tmp_path / "empty.txt").write_text("\n\n")
    result = clusterns("train", config_file, "--set", "data.corpus=empty.txt")
    assert result.exit_code == 2 and result.stderr.startswith("error: ")


def test_a_corpus_smaller_than_a_batch_has_shards(clusterns: Callable[..., Result], config_file: Path) -> None:
    result = clusterns("train", config_file, "--set", "data.limit=3")
    assert result.exit_code == 2
    assert "3 sentences" in result.stderr and "train.shards (4)" in result.stderr


@pytest.mark.parametrize("arguments", [["train"], ["frobnicate"], ["train", "a.yaml", "--nothing"]])
def test_misuse_of_the_command(clusterns: Callable[..., Result], arguments: list[str]) -> None:
    result = clusterns(*arguments)
    assert result.exit_code == 2 and "Usage:" in result.output and "Traceback" not in result.output


# ---- names --------------------------------------------------------------------------------------------------------


def test_a_name_in_use_by_another_configuration(
    clusterns: Callable[..., Result], config_file: Path, begun_run: Path
) -> None:
    before = (begun_run / "config.yaml").read_text()
    options = ["--set", "loss.temperature=0.1", "--set", "train.max_steps=3"]
    result = clusterns("train", config_file, *options)
    check_refusal(
        result,
        "runtime.name is 'first'",
        str(begun_run),
        "loss.temperature was 0.05 and is now 0.1",
        "train.max_steps was 2 and is now 3",
        "Choose another runtime.name",
    )
    assert (begun_run / "config.yaml").read_text() == before
    options = [
        part
        for value in ("epochs=2", "max_steps=9", "shards=2", "weight_decay=1", "max_grad_norm=3", "warmup_ratio=0.5")
        for part in ("--set", f"train.{value}")
    ]
    check_refusal(clusterns("train", config_file, *options), "and 1 more")


def test_another_machine_is_not_another_configuration(
    clusterns: Callable[..., Result], config_file: Path, begun_run: Path
) -> None:
    fingerprint = complete(load_config(config_file)).fingerprint()
    (begun_run / "model").mkdir()
    (begun_run / "model" / "config.json").write_text("{}")
    write_manifest(begun_run / "model", step=2, fingerprint=fingerprint)
    facts = {"best_step": 2, "steps": 2, "stopped_early": False, "sts_dev": None, "model": str(begun_run / "model")}
    write_json(begun_run / "result.json", with_checksum({**facts, "fingerprint": fingerprint}))
    done = clusterns("train", config_file, "--set", "runtime.num_workers=2", "--set", "runtime.keep=5")
    assert done.exit_code == 0, done.output


def test_train_then_the_finished_name_is_left_as_it_is(
    clusterns: Callable[..., Result], config_file: Path, sts_dir: Path, tmp_path: Path
) -> None:
    options = ["--set", f"evaluation.sts={sts_dir}", "--set", "evaluation.every_steps=1"]
    first = clusterns("train", config_file, *options)
    assert first.exit_code == 0, (first.output, first.exception)
    run = tmp_path / "runs" / "first"
    assert first.stdout.rstrip().endswith(f"Wrote {run}/model")
    assert "STSB/dev (Spearman x 100)" in first.stdout and "before" in first.stdout
    assert (run / "model" / "config.json").is_file() and (run / "config.yaml").is_file()
    stamps = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert len(stamps) > 5
    second = clusterns("train", config_file, *options)
    assert second.exit_code == 0
    assert "'first' is finished, and left as it is" in second.stdout and "another runtime.name" in second.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    run.rename(tmp_path / "runs" / "moved")
    moved = clusterns("train", config_file, *options, "--set", "runtime.name=moved")
    assert moved.stdout.rstrip().endswith(f"Wrote {tmp_path}/runs/moved/model"), "it names the place before"


def test_prepare_refuses_workers_that_cannot_be(clusterns: Callable[..., Result], config_file: Path) -> None:
    result = clusterns("prepare", config_file, "--workers", "-1")
    assert result.exit_code == 2 and "--workers is -1; it must be 0, for this process, or up to" in result.stderr


def test_prepare_writes_once(clusterns: Callable[..., Result], config_file: Path, tmp_path: Path) -> None:
    first = clusterns("prepare", config_file)
    assert first.exit_code == 0, first.output
    assert "64 sentences" in first.stdout
    *_, last = first.stdout.splitlines()
    assert last.startswith("Wrote ") and Path(last.removeprefix("Wrote ")).is_dir()
    again = clusterns("prepare", config_file).stdout.splitlines()
    assert again[-1] == last.replace("Wrote", "Found")
    assert not (tmp_path / "runs" / "first").exists()


# ---- evaluate -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seven")
    for number, (task, subset) in enumerate(TASKS.items()):
        write_pairs(path / task / f"{subset or 'one'}.jsonl", count=12, seed=number)
    write_pairs(path / "STSB" / "dev.jsonl", count=12, seed=20)
    return path


def test_evaluate_all_seven(
    clusterns: Callable[..., Result], tiny_model: Path, seven_tests: Path, tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    result = clusterns("evaluate", tiny_model, "--sts", seven_tests, "--dev", "STSB/dev", "--json", out)
    assert result.exit_code == 0, (result.output, result.exception)
    values: dict[str, Any] = json.loads(out.read_text())
    assert list(values["tasks"]) == list(TASKS) and values["missing"] == []
    each = [task["spearman"] for task in values["tasks"].values()]
    assert len(set(each)) == 7, "the tests are the same one"
    assert values["average"] == pytest.approx(sum(each) / 7)
    assert list(values["extra"]) == ["STSB/dev"]
    assert (values["pooling"], values["max_length"]) == ("mean", 64)
    (line,) = [line for line in result.stdout.splitlines() if "average of the seven" in line]
    assert f"{values['average']:.2f}" in line
    for task, score in values["tasks"].items():
        assert any(task in line and f"{score['spearman']:.2f}" in line for line in result.stdout.splitlines())
    assert result.stdout.rstrip().endswith(f"Wrote {out}")


def test_missing_tasks_are_named_and_there_is_no_average(
    clusterns: Callable[..., Result], tiny_model: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path / "some" / "STS13" / "a.jsonl", count=12)
    write_pairs(tmp_path / "some" / "SICKR" / "test.jsonl", count=12)
    write_pairs(tmp_path / "some" / "STSB" / "dev.jsonl", count=12)  # the dev set is not the test
    options = ["--json", tmp_path / "x.json", "--pooling", "cls", "--max-length", "9"]
    result = clusterns("evaluate", tiny_model, "--sts", tmp_path / "some", *options)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "average of the seven" not in result.stdout
    assert "STS is partial, 2 of the seven tasks" in result.stdout
    assert "No average: STS12, STS14, STS15, STS16, STSB missing" in result.stdout
    values = json.loads((tmp_path / "x.json").read_text())
    assert values["average"] is None
    assert values["missing"] == ["STS12", "STS14", "STS15", "STS16", "STSB"]
    assert (values["pooling"], values["max_length"]) == ("cls", 9)


def test_evaluate_refuses(clusterns: Callable[..., Result], tiny_model: Path, sts_dir: Path, tmp_path: Path) -> None:
    check_refusal(clusterns("evaluate", tiny_model, "--sts", "none"), "--sts 'none'", "not a directory", "Give one")
    check_refusal(clusterns("evaluate", tiny_model, "--sts", sts_dir), str(sts_dir), "holds none of STS12", "SICKR")
    check_refusal(
        clusterns("evaluate", tiny_model, "--sts", sts_dir, "--dev", "STSB/x"), "STSB/x.jsonl", "It holds: STSB/dev"
    )
    check_refusal(
        clusterns("evaluate", "./none", "--sts", sts_dir, "--dev", "STSB/dev"), "'./none'", "config.json", "hub id"
    )
    check_refusal(
        clusterns("evaluate", tiny_model, "--sts", sts_dir, "--dev", "STSB/dev", "--suite", "no"), "'no'", "must be"
    )
    check_refusal(
        clusterns("evaluate", tiny_model, "--sts", sts_dir, "--dev", "STSB/dev", "--pooling", "max"),
        "'max'",
        "cls, mean",
    )
    check_refusal(
        clusterns("evaluate", tiny_model, "--sts", sts_dir, "--dev", "STSB/dev", "--max-length", "2"),
        "is 2",
        "3 or more",
    )
    (tmp_path / "bad" / "STS12").mkdir(parents=True)
    (tmp_path / "bad" / "STS12" / "a.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\nnonsense\n')
    check_refusal(clusterns("evaluate", tiny_model, "--sts", tmp_path / "bad"), "a.jsonl:2", "invalid JSON")


def test_evaluate_that_cannot_write_is_refused_before_it_starts(
    clusterns: Callable[..., Result], tiny_model: Path, sts_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clusterns_ray.models.encoder import Encoder

    monkeypatch.setattr(Encoder, "load", lambda *_, **__: pytest.fail("it was begun"))
    options = ["--sts", sts_dir, "--dev", "STSB/dev", "--json"]
    result = clusterns("evaluate", tiny_model, *options, "no/such/dir/x.json")
    check_refusal(result, "--json 'no/such/dir/x.json' cannot be written", "No such file", "Choose another")
    check_refusal(clusterns("evaluate", tiny_model, *options, tmp_path), str(tmp_path), "it is a directory")


def test_evaluate_other_suites(
    clusterns: Callable[..., Result], tiny_model: Path, sts_dir: Path, tmp_path: Path
) -> None:
    topics = tmp_path / "topics.tsv"
    topics.write_text("".join(f"{n % 3}\t{text}\n" for n, text in enumerate(sentences(30))))
    out = tmp_path / "scores.json"
    options = ["--suite", "clustering,geometry", "--sts", sts_dir, "--clusters", topics, "--seed", "5", "--json", out]
    result = clusterns("evaluate", tiny_model, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    values = json.loads(out.read_text())
    assert values["suite"] == ["clustering", "geometry"] and "tasks" not in values
    assert values["clustering"]["topics"]["seeds"] == 10 and values["geometry"]["set"] == "STSB/dev"
    assert "topics (K 3) accuracy" in result.stdout and "effective rank" in result.stdout
    again = clusterns("evaluate", tiny_model, *options[:-3], "5", "--json", tmp_path / "again.json")
    assert again.exit_code == 0
    assert json.loads((tmp_path / "again.json").read_text()) == values


def test_evaluate_against(
    clusterns: Callable[..., Result], tiny_model: Path, tiny_models: Callable[[str], Path], seven_tests: Path
) -> None:
    other = tiny_models("roberta")
    result = clusterns("evaluate", tiny_model, "--sts", seven_tests, "--against", other, "--json", "both.json")
    assert result.exit_code == 0, (result.output, result.exception)
    values = json.loads(Path("both.json").read_text())
    assert [each["model"] for each in values["models"]] == [str(tiny_model), str(other)]
    average = values["differences"][0]["sts"]["average"]
    assert f"{average['difference']:+.2f}" in result.stdout
    assert f"{average['low']:+.2f} to {average['high']:+.2f}" in result.stdout
    assert "minus" in result.stdout and "95 % intervals" in result.stdout


def test_evaluate_on_the_hub_without_a_network(
    clusterns: Callable[..., Result], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = clusterns("evaluate", tiny_model, "--sts", "hf")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "mteb/sts12-sts" in result.stderr and "give a directory of TASK/SUBSET.jsonl" in result.stderr


# ---- failures while it runs ---------------------------------------------------------------------------------------


def test_a_failed_job_exits_with_1(
    clusterns: Callable[..., Result], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clusterns_ray.launch.trainer as trainer
    from clusterns_ray.errors import NonFiniteError

    def fail(*_: Any, **__: Any) -> None:
        raise NonFiniteError("it burnt down; use water")

    monkeypatch.setattr(trainer, "train", fail)
    result = clusterns("train", config_file)
    assert result.exit_code == 1
    assert result.stderr == "failed: it burnt down; use water\n"


def test_an_interrupted_job_says_how_to_go_on(
    clusterns: Callable[..., Result], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clusterns_ray.launch.trainer as trainer

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", interrupt)
    result = clusterns("train", config_file)
    assert result.exit_code == 1
    assert "newest checkpoint" in result.stderr and "Traceback" not in result.output
    monkeypatch.setattr("clusterns_ray.data.prepare.prepare", interrupt)
    result = clusterns("prepare", config_file)
    assert result.exit_code == 1 and result.stderr.splitlines()[-1] == "Interrupted.", "tokens may have been written"


def test_control_c_inside_a_callback_of_the_interpreter_still_stops_the_command() -> None:
    """Python swallows what is raised where an object is taken down; the command ends all the same."""
    script = """
        import os, signal, time, weakref
        from clusterns_ray import cli

        class Connection:
            pass

        @cli.app.command()
        def work() -> None:
            with cli.readable_errors():
                connection = Connection()
                reference = weakref.ref(connection, lambda _: signal.raise_signal(signal.SIGINT))
                del connection
                print("went on", flush=True)
                time.sleep(60)

        cli.main()
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), "work"],
        capture_output=True,
        text=True,
        timeout=30,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as from a shell
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "went on\n", "Interrupted.\n")


def test_invented_sentences_are_different() -> None:
    assert len(set(sentences(300))) == 300
