"""The doctor's command, its findings, and its checks of a configuration and a study."""

from __future__ import annotations

import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import write_corpus
from typer.testing import CliRunner, Result

from clusterns_ray.cli import app
from clusterns_ray.config import Config
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.io.files import write_atomic
from clusterns_ray.models.base_model import complete
from clusterns_ray.ops.doctor import inspection, machines, request
from clusterns_ray.ops.doctor.examine import as_json, examine, read_request, verdict
from clusterns_ray.ops.doctor.findings import Check, Finding, from_error, size_text
from clusterns_ray.ops.doctor.request import Sizes
from clusterns_ray.tuning.study import load_study


@pytest.fixture
def doctor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sound_values: Callable[..., dict[str, Any]]
) -> Callable[..., tuple[Result, dict[str, Finding]]]:
    """The command on ``sound_values`` with changes; its findings by what was looked at, the worst of each."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str, **sections: dict[str, Any]) -> tuple[Result, dict[str, Finding]]:
        file, findings = tmp_path / "asked.yaml", tmp_path / "findings.json"
        file.write_text(yaml.safe_dump(sound_values(**sections)))
        result = CliRunner().invoke(app, ["doctor", str(file), "--json", str(findings), *arguments])
        found: dict[str, Finding] = {}
        order = ("ok", "warning", "problem")
        for each in json.loads(findings.read_text())["findings"]:
            finding = Finding(**each)
            before = found.get(finding.what)
            if before is None or order.index(finding.level) >= order.index(before.level):
                found[finding.what] = finding
        return result, found

    return call


def levels(findings: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in findings]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_a_sound_request(doctor: Callable[..., Any], tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result, found = doctor()
    assert result.exit_code == 0, result.output
    assert {finding.level for finding in found.values()} == {"ok"}, result.output
    assert set(found) == {
        *("configuration", "name", "trackers", "corpus", "dev set", "encoder"),
        *("versions", "GPU", "faiss", "storage", "memory", "disk"),
    }
    assert "batch 16 in 4 shards of 4 rows" in found["configuration"].value
    assert "the first 300 sentences were read" in found["corpus"].value
    assert f"python {sys.version.split()[0]}" in found["versions"].value
    assert "0 problems, 0 warnings, 12 fine" in result.output.splitlines()[-2]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([*before, "asked.yaml", "findings.json"]), "it left something behind"


def test_five_mistakes_at_once(doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What one process sees of the machine, with what is wrong in the data beside it."""
    for wheel, version in (("faiss_cpu", "1.15.1"), ("faiss_gpu", "1.14.0")):
        info = tmp_path / "wheels" / f"{wheel}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: {version}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "wheels"))
    result, found = doctor(
        data={"corpus": str(tmp_path / "nowhere.txt")},
        evaluation={"dev": "STSB/test"},
        encoder={"max_length": 64},
        train={"global_batch_size": 1 << 20},
        runtime={"storage_path": "/proc/runs"},
    )
    assert result.exit_code == 1
    problems = {what for what, finding in found.items() if finding.level == "problem"}
    assert problems == {"corpus", "dev set", "memory", "storage", "faiss"}, result.output
    assert all(found[what].remedy for what in ("memory", "storage", "faiss")), result.output
    assert "no such file" in found["corpus"].value
    assert "has no STSB/test.jsonl" in found["dev set"].value
    assert "activations" in found["memory"].value and "GiB" in found["memory"].value
    assert "'/proc/runs', where nothing can be written" in found["storage"].value
    assert "faiss-cpu 1.15.1 and faiss-gpu 1.14.0 are both installed" in found["faiss"].value
    assert "5 problems" in result.output and "internal error" not in result.output, result.output


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"clustering": {"num_clusters": 17}}, "clustering.num_clusters is 17, more than train.global_batch_size (16)"),
        ({"train": {"batch": 3}}, "unknown key train.batch"),
    ],
)
def test_what_the_configuration_refuses_is_a_finding(
    sound_values: Callable[..., dict[str, Any]], tmp_path: Path, sections: dict[str, dict[str, Any]], says: str
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sound_values(**sections)))
    finding = next(examine(tmp_path / "run.yaml", load_study=load_study))
    assert (finding.level, finding.what) == ("problem", "configuration")
    assert says in finding.value


@pytest.mark.slow
def test_a_head_that_never_answers(doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A port that takes connections and says nothing: Ray by itself tries for minutes."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        found = list(examine(None, load_study=load_study, deadline_s=8))
        took = time.monotonic() - began
    assert took < 8 + 15, "it waited for Ray"
    (finding,) = (finding for finding in found if finding.what == "cluster")
    assert finding.level == "problem" and "did not answer in time" in finding.value
    assert [finding.level for finding in found if finding.what == "versions"] == ["ok"]


@pytest.mark.parametrize(
    ("address", "says", "remedy"),
    [
        ("127.0.0.1:1", "nothing answers", "unset it to start Ray"),
        ("http://127.0.0.1:1", "the address of Ray's dashboard", "ray job submit"),
    ],
)
def test_a_cluster_that_cannot_be_joined(monkeypatch: pytest.MonkeyPatch, address: str, says: str, remedy: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    node = {"directories": {}, "tokens": {}, "store": None, "local_path": None, "model": None}
    facts: list[dict[str, Any]] = []
    request = {"node": node, "ray": True, "cpus": 1, "label_selector": {}, "state_api": False, "seconds": 5.0}
    inspection.inspect(request, facts.append)
    (finding,) = (each for each in machines.check_facts(None, facts, Sizes(), joined=True) if each.what == "cluster")
    assert finding.level == "problem" and says in finding.value and remedy in finding.remedy


def test_a_wrong_request(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2 and "No such file" in result.output
    result = CliRunner().invoke(app, ["doctor", "s3://bucket/run.yaml"])
    assert result.exit_code == 2 and "error: CONFIG 's3:" in result.output and "--cluster" not in result.output
    result = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "no" / "where.json")])
    assert result.exit_code == 2 and "--json" in result.output


def test_a_cluster_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clusterns_ray.ops.doctor.examine._inspect", lambda *given: [])
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster_name: x\nprovider: {type: aws, region: eu-west-1}\nmax_workers: -1\n")
    found = list(examine(None, load_study=load_study, cluster_file=file))
    assert {finding.level for finding in found} >= {"problem"} and all(finding.remedy for finding in found)


def test_verdict_and_json() -> None:
    ok, warning, problem = (Finding(level, "x", "v", "r") for level in ("ok", "warning", "problem"))  # type: ignore[arg-type]
    assert verdict([ok, ok], 3.4) == "0 problems, 0 warnings, 2 fine, in 3 s. Nothing here stops a run."
    assert verdict([ok, warning], 1).endswith("Nothing here stops a run; read the warnings.")
    assert verdict([problem, warning], 1).startswith("1 problem, 1 warning, 0 fine")
    answer = json.loads(as_json([problem, ok], 2.04))
    assert answer["problems"] == 1 and answer["findings"][0] == {
        "level": "problem",
        "what": "x",
        "value": "v",
        "remedy": "r",
    }


# ---- findings -------------------------------------------------------------------------------------------------------


def test_a_refusal_is_a_finding_with_its_remedy() -> None:
    error = ConfigError("a is 3 (why. Because.), and so.", "Use 4, or 5.")
    assert str(error) == "a is 3 (why. Because.), and so. Use 4, or 5."
    assert from_error("x", error) == [Finding("problem", "x", "a is 3 (why. Because.), and so.", "Use 4, or 5.")]
    found = from_error("x", ConfigError("first is wrong\n  second is wrong."))
    assert [(each.value, each.remedy) for each in found] == [("first is wrong", ""), ("second is wrong.", "")]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.message, again.remedy) == (str(error), error.message, error.remedy)


def test_lines_of_a_finding() -> None:
    text = Finding("problem", "storage", "word " * 40, "do " * 40).text(80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.split() == ["problem", "storage", *["word"] * 40, "->", *["do"] * 40]
    assert {line[:26] for line in text.splitlines()[1:]} == {" " * 26}, "the text hangs under itself"
    assert Finding("ok", "a", "b").text(10).split() == ["ok", "a", "b"]


def test_a_check_ends_at_its_deadline() -> None:
    stuck = threading.Event()
    began = time.monotonic()
    check = Check("x", lambda: [Finding("ok", "x", str(stuck.wait()))], began + 0.2)
    (finding,) = check.findings()
    assert time.monotonic() - began < 2 and finding.level == "problem" and "no answer within" in finding.value
    stuck.set()


def test_a_check_that_breaks_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise ZeroDivisionError("no")

    (finding,) = Check("x", broken, time.monotonic() + 5).findings()
    assert finding.level == "problem" and "ZeroDivisionError: no" in finding.value


def test_a_temporary_directory_too_long_for_rays_sockets(
    doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ray would be started; a run in this process has no sockets."""
    monkeypatch.setattr("clusterns_ray.ops.doctor.examine._inspect", lambda *given: [])
    monkeypatch.setattr(request, "check_model", lambda *given: [])
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/" + "n" * 60)
    result, found = doctor("--set", "runtime.num_workers=1")
    finding = found["Ray's directory"]
    assert result.exit_code == 1 and finding.level == "problem"
    assert "takes 107" in finding.value and finding.remedy.endswith("RAY_TMPDIR=$(mktemp -d /tmp/rXXXXXX)")
    assert "Ray's directory" not in doctor("--set", "runtime.num_workers=0")[1]


def test_sizes() -> None:
    assert [size_text(n) for n in (12, 5 << 10, 3 << 20, 5 << 39)] == ["12 bytes", "5 KiB", "3 MiB", "2,560.0 GiB"]


# ---- the request ----------------------------------------------------------------------------------------------------


def test_a_name_in_use(run_config: Callable[..., Config], tmp_path: Path) -> None:
    config = complete(run_config())
    assert levels(request.check_run_name(config)) == ["ok"]
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    write_atomic(run / "config.yaml", yaml.safe_dump(complete(run_config(train={"learning_rate": 0.5})).resolved()))
    with pytest.raises(ConfigError, match="holds already with another config"):
        list(request.check_run_name(config))
    write_atomic(run / "config.yaml", yaml.safe_dump(config.resolved()))
    (finding,) = request.check_run_name(config)
    assert "would go on" in finding.value
    write_atomic(run / "result.json", "{}")
    assert levels(request.check_run_name(config)) == ["warning"]


def test_text_that_cannot_be_read(run_config: Callable[..., Config], tmp_path: Path) -> None:
    def of(**data: Any) -> list[Finding]:
        return list(request.check_corpus(run_config(data=data), Sizes()))

    table = tmp_path / "table.csv"
    table.write_text("sentence,year\nSome text.,1999\n" + "More text.,2000\n" * 20)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    for corpus, says in ((table, "no column 'text'"), (tmp_path / "*.txt2", "no file matches"), (empty, "no text")):
        with pytest.raises((ConfigError, DataError), match=says):
            of(corpus=str(corpus))
    assert levels(of(corpus=str(table), text_column="sentence")) == ["ok"]


def test_dev_sets(run_config: Callable[..., Config], sts_dir: Path, tmp_path: Path) -> None:
    (finding,) = request.check_dev_set(run_config())
    assert "40 graded pairs" in finding.value
    assert levels(request.check_dev_set(run_config(evaluation={"sts": None}))) == ["warning"]
    broken = tmp_path / "STSB" / "dev.jsonl"
    broken.parent.mkdir()
    broken.write_text('{"sentence1": "a"}\n')
    (finding,) = Check(
        "dev set",
        lambda: list(request.check_dev_set(run_config(evaluation={"sts": str(tmp_path)}))),
        time.monotonic() + 60,
    ).findings()
    assert finding.level == "problem" and "is not a graded pair" in finding.value
    with pytest.raises(ConfigError, match="must be one of"):
        list(request.check_dev_set(run_config(evaluation={"sts": "hf", "dev": "STSB/else"})))


def test_fewer_sentences_than_a_batch(run_config: Callable[..., Config], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "few.txt", 10)
    with pytest.raises(ConfigError, match="16, but the corpus has 10 sentences"):
        list(request.check_corpus(run_config(data={"corpus": str(corpus)}), Sizes()))


def test_an_encoder_without_weights(run_config: Callable[..., Config], tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="holds no weights"):
        list(request.check_model(run_config(encoder={"name": str(model)}), Sizes()))


def test_a_study(tmp_path: Path, sound_values: Callable[..., dict[str, Any]]) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(sound_values()))
    study = {
        "name": "study",
        "base": "base.yaml",
        "space": {"train.learning_rate": {"type": "float", "low": 1e-5, "high": 1e-3, "role": "nuisance"}},
        "budget": {"trials": 2},
        "concurrent_trials": 3,
        "workers_per_trial": 2,
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    asked = read_request(tmp_path / "study.yaml", (), load_study)
    assert (asked.study, asked.concurrent, asked.most, asked.on_ray, asked.needs_state_api) == (True, 3, 2, True, True)
    asked = read_request(tmp_path / "study.yaml", ["workers_per_trial=0"], load_study)
    assert (asked.most, asked.on_ray, asked.needs_state_api) == (1, True, False)
    assert not read_request(tmp_path / "base.yaml", (), load_study).on_ray
