from __future__ import annotations

import itertools
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import write_corpus
from typer.testing import CliRunner, Result

from clusterns_ray.cli import app
from clusterns_ray.config import Config, make_config
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.io.files import write_atomic
from clusterns_ray.launch.capacity import ClusterCapacity, NodeType
from clusterns_ray.models.base_model import complete
from clusterns_ray.ops.doctor import machines, node, request
from clusterns_ray.ops.doctor.examine import as_json, examine, verdict
from clusterns_ray.ops.doctor.findings import Check, Finding, from_error, size_text
from clusterns_ray.ops.doctor.machines import Cluster
from clusterns_ray.ops.doctor.request import Request, Sizes
from clusterns_ray.tuning.study import load_study

Values = dict[str, Any]


@pytest.fixture
def values(tmp_path: Path, tiny_model: Path, corpus_file: Path, sts_dir: Path) -> Values:
    """A configuration in which nothing is wrong."""
    return {
        "encoder": {"name": str(tiny_model), "num_layers": 1, "dropout": 0.1},
        "data": {"corpus": str(corpus_file)},
        "clustering": {"num_clusters": 4},
        "train": {"global_batch_size": 16, "shards": 4, "max_steps": 2},
        "evaluation": {"sts": str(sts_dir)},
        "runtime": {"storage_path": str(tmp_path / "runs"), "name": "first", "use_gpu": False},
    }


def change(values: Values, **sections: Values) -> Config:
    return make_config({name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}})


@pytest.fixture
def doctor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: Values
) -> Callable[..., tuple[Result, dict[str, Finding]]]:
    """The command with changes to :func:`values`; its findings by what was looked at, the worst of each."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str, **sections: Values) -> tuple[Result, dict[str, Finding]]:
        changed = {name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}}
        file, findings = tmp_path / "asked.yaml", tmp_path / "findings.json"
        file.write_text(yaml.safe_dump(changed))
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


def listed(check: Callable[..., Iterable[Finding]]) -> Callable[..., list[Finding]]:
    return lambda *arguments: list(check(*arguments))


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


def test_five_mistakes_at_once(
    doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, values: Values
) -> None:
    """What one process sees of the machine, with what is wrong in the data beside it."""
    for wheel, version in (("faiss_cpu", "1.15.1"), ("faiss_gpu", "1.14.0")):
        info = tmp_path / "wheels" / f"{wheel}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: {version}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "wheels"))
    result, found = doctor(
        data={"corpus": str(tmp_path / "nowhere.txt")},
        evaluation={"dev": "STSB/test"},
        train={"global_batch_size": 1 << 22},
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
        ({"train": {"shards": 3}}, "train.global_batch_size is 16, which train.shards (3) does not divide"),
        ({"runtime": {"num_workers": 3}}, "runtime.num_workers allows 3 workers"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate is 'fast'"),
        ({"train": {"batch": 3}}, "unknown key train.batch"),
    ],
)
def test_what_the_configuration_refuses_is_a_finding(
    values: Values, tmp_path: Path, sections: dict[str, Values], says: str
) -> None:
    changed = {name: {**values[name], **sections.get(name, {})} for name in values}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed))
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


def test_nothing_listens_at_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = list(examine(None, load_study=load_study))
    (finding,) = (finding for finding in found if finding.what == "cluster")
    assert finding.level == "problem" and "nothing answers" in finding.value


def test_a_wrong_request(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2 and "No such file" in result.output
    result = CliRunner().invoke(app, ["doctor", "s3://bucket/run.yaml"])
    assert result.exit_code == 2 and "error: CONFIG 's3:" in result.output and "--cluster" not in result.output
    result = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "no" / "where.json")])
    assert result.exit_code == 2 and "--json" in result.output


def test_a_cluster_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster_name: x\nprovider: {type: aws, region: eu-west-1}\nmax_workers: -1\n")
    findings = examine(None, load_study=load_study, cluster_file=file)
    found = list(itertools.takewhile(lambda finding: finding.what != "versions", findings))
    findings.close()  # type: ignore[attr-defined]
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
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/" + "n" * 60)
    result, found = doctor("--set", "runtime.num_workers=1")
    finding = found["Ray's directory"]
    assert result.exit_code == 1 and finding.level == "problem"
    assert "takes 107" in finding.value and finding.remedy.endswith("RAY_TMPDIR=$(mktemp -d /tmp/rXXXXXX)")
    assert "Ray's directory" not in doctor("--set", "runtime.num_workers=0")[1]


def test_sizes() -> None:
    assert [size_text(n) for n in (12, 5 << 10, 3 << 20, 5 << 39)] == ["12 bytes", "5 KiB", "3 MiB", "2,560.0 GiB"]


# ---- the request ----------------------------------------------------------------------------------------------------


def test_a_name_in_use(values: Values, tmp_path: Path) -> None:
    config = complete(change(values))
    assert levels(listed(request.check_run_name)(config)) == ["ok"]
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    write_atomic(run / "config.yaml", yaml.safe_dump(complete(change(values, train={"learning_rate": 0.5})).resolved()))
    with pytest.raises(ConfigError, match="holds already with another config"):
        listed(request.check_run_name)(config)
    write_atomic(run / "config.yaml", yaml.safe_dump(config.resolved()))
    assert "would go on" in listed(request.check_run_name)(config)[0].value
    write_atomic(run / "result.json", "{}")
    assert levels(listed(request.check_run_name)(config)) == ["warning"]


def test_text_that_cannot_be_read(values: Values, tmp_path: Path) -> None:
    def of(**data: Any) -> list[Finding]:
        return list(request.check_corpus(change(values, data=data), Sizes()))

    table = tmp_path / "table.csv"
    table.write_text("sentence,year\nSome text.,1999\n" + "More text.,2000\n" * 20)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    for corpus, says in ((table, "no column 'text'"), (tmp_path / "*.txt2", "no file matches"), (empty, "no text")):
        with pytest.raises((ConfigError, DataError), match=says):
            of(corpus=str(corpus))
    assert levels(of(corpus=str(table), text_column="sentence")) == ["ok"]


def test_dev_sets(values: Values, sts_dir: Path, tmp_path: Path) -> None:
    assert "40 graded pairs" in listed(request.check_dev_set)(change(values))[0].value
    assert levels(listed(request.check_dev_set)(change(values, evaluation={"sts": None}))) == ["warning"]
    broken = tmp_path / "STSB" / "dev.jsonl"
    broken.parent.mkdir()
    broken.write_text('{"sentence1": "a"}\n')
    (finding,) = Check(
        "dev set",
        lambda: listed(request.check_dev_set)(change(values, evaluation={"sts": str(tmp_path)})),
        time.monotonic() + 60,
    ).findings()
    assert finding.level == "problem" and "is not a graded pair" in finding.value
    with pytest.raises(ConfigError, match="must be one of"):
        listed(request.check_dev_set)(change(values, evaluation={"sts": "hf", "dev": "STSB/else"}))


def test_fewer_sentences_than_a_batch(values: Values, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "few.txt", 10)
    with pytest.raises(ConfigError, match="16, but the corpus has 10 sentences"):
        list(request.check_corpus(change(values, data={"corpus": str(corpus)}), Sizes()))


def test_an_encoder_without_weights(values: Values, tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="holds no weights"):
        listed(request.check_model)(change(values, encoder={"name": str(model)}), Sizes())


# ---- the hub --------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Knows one model and one data set."""

    model: Path
    commit = "c" * 40

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = sorted(file.name for file in self.model.iterdir())
        about = {"id": "org/there", "sha": self.commit, "siblings": [{"rfilename": name} for name in files]}
        known = ("/api/models/org/there", "/api/models/org/there/revision/main", "/api/datasets/org/text")
        if path in known:
            self.answer(200, json.dumps(about).encode())
        elif path == f"/api/models/org/there/tree/{self.commit}":
            tree = [{"type": "file", "oid": "d" * 40, "size": 1, "path": name} for name in files]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(f"/org/there/resolve/{self.commit}/"):
            self.answer(200, (self.model / Path(path).name).read_bytes())
        else:
            self.answer(404, b"{}")

    def answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        for header, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "ETag": f'"{hash(body):x}"',
            "X-Repo-Commit": self.commit,
            **({"X-Error-Code": "RepoNotFound"} if code == 404 else {}),
        }.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("KnowsOne", (Hub,), {"model": tiny_model}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


ASK = """
import json, os, socket, sys
called = []
connect = socket.socket.connect
def answer(self, address):
    called.append(str(address))
    return connect(self, address)
socket.socket.connect = answer
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.ops.doctor import hub
answers = []
for kind, name in json.loads(sys.argv[1]):
    try:
        if kind == "settings_of":
            with hub.settings_of(name) as directory:
                answers.append([directory, sorted(os.listdir(directory))])
            continue
        answers.append(getattr(hub, kind)(name))
    except ClusterNSError as error:
        answers.append("refused: " + str(error))
print(json.dumps({"answers": answers, "called": called}))
"""


def ask_hub(home: Path, questions: list[tuple[str, str]], **env: str) -> tuple[list[Any], list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        env={**os.environ, "HF_HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["answers"], answer["called"]


def cache_model(home: Path, name: str, *files: str) -> None:
    """As the hub's client keeps what it has downloaded."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for file in files:
        (snapshot / file).write_text("{}")


def test_offline_only_this_machine_is_asked(tmp_path: Path) -> None:
    cache_model(tmp_path, "org/whole", "config.json", "model.safetensors", "tokenizer.json")
    cache_model(tmp_path, "org/half", "config.json", "tokenizer.json")
    text = tmp_path / "hub" / "datasets--org--text" / "snapshots" / ("b" * 40)
    text.mkdir(parents=True)
    (text.parents[1] / "refs").mkdir()
    (text.parents[1] / "refs" / "main").write_text("b" * 40)
    (text / "a.txt").write_text("A sentence.\n")
    questions = [
        ("find_model", "org/whole"),
        ("find_model", "org/half"),
        ("find_model", "org/none"),
        ("find_dataset", "hf://org/text/a.txt"),
        ("find_dataset", "hf://org/text/b.txt"),
    ]
    answers, called = ask_hub(tmp_path, questions, HF_HUB_OFFLINE="1")
    assert called == [], "something calls out"
    whole, half, none, cached, absent = answers
    assert whole == "in the hub's cache here" and cached is None
    assert "no weights" in half and "HF_HUB_OFFLINE is set" in half
    assert "refused" in none and "hf download org/none" in none
    assert "refused" in absent and "HF_HUB_OFFLINE is set" in absent


def test_the_hub_is_asked_whether_it_has_them(tmp_path: Path, hub: str) -> None:
    questions = [
        ("find_model", "org/there"),
        ("find_model", "org/absent"),
        ("find_dataset", "hf://org/text:train"),
        ("find_dataset", "hf://org/absent"),
    ]
    answers, called = ask_hub(tmp_path, questions, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub)
    assert called, "the recorder records nothing"
    there, absent, text, no_text = answers
    assert there == "on the hub, to be downloaded" and "no such model" in absent
    assert text == "org/text is on the hub, to be downloaded" and "no data set 'org/absent'" in no_text
    (held,), _ = ask_hub(tmp_path, [("settings_of", "org/there")], HF_HUB_OFFLINE="0", HF_ENDPOINT=hub)
    directory, files = held
    assert "config.json" in files and "tokenizer.json" in files and "model.safetensors" not in files
    assert not Path(directory).exists() and not list(tmp_path.rglob("config.json")), "it left something behind"
    answers, _ = ask_hub(tmp_path, questions[:1], HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:1")
    assert "refused" in answers[0] and "does not answer" in answers[0]


# ---- one machine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> dict[str, Any]:
    return {
        "directories": {"runtime.storage_path": str(tmp_path / "a" / "b")},
        "tokens": {},
        "store": None,
        "local_path": None,
        "model": None,
    }


def test_what_a_machine_tells(asked: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    (whole,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    asked["model"] = {"name": str(tiny_model), "revision": None}
    answer = node.describe(asked)
    assert json.loads(json.dumps(answer)) == answer
    assert answer["versions"]["python"] == sys.version.split()[0] and answer["versions"]["ray"]
    assert 0 < answer["memory"]["free"] <= answer["memory"]["total"] <= int(whole.split()[1]) << 10
    place = answer["directories"]["runtime.storage_path"]
    assert (place["error"], place["shared"]) == (None, None) and place["free"] > 0
    assert list(tmp_path.iterdir()) == [], "it left something behind"
    assert answer["model"]["error"] is None


def test_places_that_cannot_be_written(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("/proc/runs", str(tmp_path / "file" / "runs")):
        asked["directories"]["runtime.storage_path"] = path
        assert node.describe(asked)["directories"]["runtime.storage_path"]["error"]


def test_what_the_driver_wrote_is_seen(asked: dict[str, Any], tmp_path: Path) -> None:
    for name, seen in (("there", True), ("elsewhere", False)):
        asked["tokens"] = {"runtime.storage_path": str(tmp_path / name)}
        (tmp_path / "there").touch()
        assert node.describe(asked)["directories"]["runtime.storage_path"]["shared"] is seen


def test_a_store(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path / "local"))
    asked |= {"store": f"file://{tmp_path}/store", "directories": {"runtime.local_path": None}}
    answer = node.describe(asked)
    assert answer["store"]["error"] is None
    assert answer["directories"]["runtime.local_path"]["path"].startswith(str(tmp_path / "local"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    (tmp_path / "file").touch()
    assert "file" in node.describe(asked | {"store": f"file://{tmp_path}/file"})["store"]["error"]


def test_what_only_trying_tells() -> None:
    answer = node.compute()
    assert answer["kmeans"] == {"value": "faiss", "error": None, "remedy": ""}
    assert answer["torch"]["error"] is None


def test_gpus_that_the_driver_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node.nvidia_smi() == []
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "NVIDIA A10G, 23028, 570.1"\necho "NVIDIA A10G, [N/A], 570.1"\n')
    program.chmod(0o755)
    first, second = node.nvidia_smi()
    assert first == {"name": "NVIDIA A10G", "memory": 23028 << 20, "driver": "570.1"} and second["memory"] is None
    program.write_text("#!/bin/sh\necho broken, and, so\nexit 9\n")
    assert node.nvidia_smi() == []


# ---- several machines -----------------------------------------------------------------------------------------------


FIXED = ClusterCapacity(({"CPU": 4.0}, {"CPU": 4.0}))


@pytest.fixture
def two(asked: dict[str, Any]) -> Cluster:
    """Two nodes that tell what this machine tells, and nothing is wrong with them."""
    facts = node.describe(asked)
    computed = {"kmeans": {"value": "faiss", "error": None, "remedy": ""}}
    computed["torch"] = {"value": {"cuda": None, "gpus": [], "nccl": None}, "error": None, "remedy": ""}
    nodes = [{"id": f"{number}abcdef01", "address": f"10.0.0.{number}", "resources": {"CPU": 4.0}} for number in (1, 2)]
    lines = [
        {"kind": "driver", **facts},
        {"kind": "cluster", "nodes": nodes, "capacity": FIXED.values(), "authenticated": True},
        {"kind": "state_api", "error": None},
        *({"kind": "node", "node": n["id"], **facts} for n in nodes),
        *({"kind": "node", "node": n["id"], **computed} for n in nodes),
    ]
    cluster = machines.read_facts(json.loads(json.dumps(lines)), joined=True)
    assert cluster is not None and len(cluster.machines) == 2
    return cluster


def test_two_sound_nodes(two: Cluster, values: Values) -> None:
    asked = Request(change(values, runtime={"num_workers": 2}))
    for found in map(
        list,
        (
            machines.check_answers(two),
            machines.check_versions(two),
            machines.check_security(two),
            machines.check_state_api(asked, two),
            machines.check_gpus(asked, two),
            machines.check_faiss(two),
            machines.check_storage(asked, two),
            machines.check_resources(asked, two),
        ),
    ):
        assert levels(found) == ["ok"], found
    assert machines.check_models(two) == []


def test_nodes_that_do_not_answer(two: Cluster) -> None:
    del two.machines[0].facts["torch"]
    two.machines[1].failures.append("The worker died.")
    found = list(machines.check_answers(two))
    assert levels(found) == ["problem", "problem"]
    assert "10.0.0.1" in found[0].value and "in time" in found[0].value and "The worker died." in found[1].value


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_another_version_on_a_node(two: Cluster, version: str | None) -> None:
    two.machines[1].facts["versions"]["torch"] = version
    (finding,) = machines.check_versions(two)
    assert finding.level == "problem" and "10.0.0.2" in finding.value and "torch" in finding.value


@pytest.mark.parametrize(
    ("address", "on", "level"), [("10.0.0.2", False, "warning"), ("127.0.0.1", False, "ok"), ("10.0.0.2", True, "ok")]
)
def test_authentication(two: Cluster, address: str, on: bool, level: str) -> None:
    two.authenticated = on
    for machine in two.machines:
        machine.address = address
    assert levels(machines.check_security(two)) == [level]


def test_state_api(two: Cluster, values: Values) -> None:
    two.state_api_error = "connection refused"
    study = Request(change(values, runtime={"num_workers": 1}), study=True)
    assert levels(machines.check_state_api(study, two)) == ["problem"]
    assert levels(machines.check_state_api(Request(study.config), two)) == ["warning"]
    two.joined = False
    assert list(machines.check_state_api(Request(study.config), two)) == []


def test_storage_of_nodes(two: Cluster, values: Values) -> None:
    asked = Request(change(values, runtime={"num_workers": 2}))
    place = two.machines[1].facts["directories"]["runtime.storage_path"]
    place["shared"] = False
    (finding,) = machines.check_storage(asked, two)
    assert finding.level == "problem" and "does not see what the driver wrote" in finding.value
    assert "s3://" in finding.remedy
    place["error"] = "Read-only file system"
    assert "Read-only file system" in machines.check_storage(asked, two)[0].value
    place.update(error=None, shared=True)
    two.machines[0].facts["store"] = {"value": None, "error": "access denied", "remedy": "Check the rights."}
    (finding,) = machines.check_storage(asked, two)
    assert finding.remedy == "Check the rights." and "access denied" in finding.value
    two.machines[0].facts["model"] = {"value": None, "error": "no such model", "remedy": "Copy it."}
    assert levels(machines.check_models(two)) == ["problem"]


def test_resources(two: Cluster, values: Values) -> None:
    def asked_for(use_gpu: bool | None) -> Request:
        return Request(change(values, runtime={"num_workers": 2, "use_gpu": use_gpu}))

    def of(study: bool = False, concurrent: int = 1, shards: int = 16, batch: int = 16, **runtime: Any) -> Finding:
        config = change(
            values, train={"shards": shards, "global_batch_size": batch}, runtime={"use_gpu": None} | runtime
        )
        (finding,) = machines.check_resources(Request(config, study, concurrent), two)
        return finding

    def autoscaled(version: int, resources: dict[str, float], most: int) -> ClusterCapacity:
        return ClusterCapacity(FIXED.nodes, version, (NodeType("spot", resources, most),), most)

    assert of(num_workers=8).level == "ok"
    assert of(num_workers=16).level == "problem"
    assert of(num_workers=8, cpus_per_worker=3).level == "problem"
    finding = of(num_workers=2, use_gpu=True)
    assert finding.level == "problem" and "the cluster has room for 0" in finding.value
    assert finding.remedy == "Set runtime.use_gpu to false, or start more nodes before the job."
    for version in (1, 2):
        two.capacity = autoscaled(version, {"CPU": 8, "GPU": 1}, 2)
        assert of(num_workers=2, use_gpu=True).level == "ok" and "0 could start now" in of(num_workers=2).value
        finding = of(num_workers=4)
        assert finding.level == "problem", "GPUs are taken where an autoscaler brings them"
        assert f"version {version}" in finding.value and "use_gpu to false" in finding.remedy
        assert of(num_workers=4, use_gpu=False).level == "ok"
        assert of(num_workers=16, cpus_per_worker=8, use_gpu=True).level == "problem"
        two.capacity = ClusterCapacity(({"memory": 1.0},), version, None)
        finding = of(num_workers=2)
        assert finding.level == "problem", "a run is refused too"
        assert "runtime.use_gpu is not set" in finding.value and "--set runtime.use_gpu=true" in finding.remedy
        for use_gpu in (True, False):
            assert of(num_workers=2, use_gpu=use_gpu).level == "warning"
            assert levels(machines.check_gpus(asked_for(use_gpu), two)) == (["warning"] if use_gpu else ["ok"])
    two.capacity = ClusterCapacity(FIXED.nodes)
    assert of(num_workers=2, study=True, concurrent=5).level == "warning"
    two.capacity = ClusterCapacity(FIXED.nodes[:1])
    assert of(num_workers=[4, 8], shards=840, batch=840).level == "warning", "elastic: the fewest fit"
    assert machines.check_resources(Request(change(values)), two) == []


def test_gpus(two: Cluster, values: Values) -> None:
    def of(use_gpu: bool | None, workers: int = 2) -> list[Finding]:
        return machines.check_gpus(Request(change(values, runtime={"num_workers": workers, "use_gpu": use_gpu})), two)

    torch = two.machines[1].facts["torch"]
    assert levels(of(True)) == ["problem"] and levels(of(None)) == ["ok"]
    two.capacity = ClusterCapacity(FIXED.nodes, 1, (NodeType("spot-gpu", {"GPU": 1}, 2),))
    assert levels(of(True)) == levels(of(None)) == ["ok"] and "spot-gpu" in of(True)[0].value
    assert "spot-gpu" not in of(False)[0].value
    two.machines[1].facts["gpus"] = [{"name": "A10G", "memory": 1 << 34, "driver": "570"}]
    assert levels(of(None)) == ["warning"] and levels(of(True)) == ["problem"] and levels(of(False)) == ["ok"]
    assert "torch is built without CUDA" in of(True)[0].value
    torch["value"] = {"cuda": "12.8", "gpus": ["A10G"], "nccl": "2.27"}
    assert levels(of(None)) == ["ok"] and "driver 570, CUDA 12.8, NCCL 2.27" in of(None)[0].value
    torch["error"] = "NCCL adds up wrongly over 4 GPUs"
    assert "NCCL adds up wrongly" in of(None)[0].value and levels(of(None)) == ["problem"]


def test_faiss_of_nodes(two: Cluster) -> None:
    two.machines[1].facts["kmeans"] = {"value": None, "error": "undefined symbol", "remedy": ""}
    (finding,) = machines.check_faiss(two)
    assert finding.level == "problem" and "undefined symbol" in finding.value


@pytest.fixture
def sized(values: Values) -> Sizes:
    sizes = Sizes()
    listed(request.check_model)(change(values), sizes)
    return sizes


def test_memory_of_nodes(two: Cluster, values: Values, sized: Sizes) -> None:
    asked = Request(change(values, runtime={"num_workers": 4}))
    assert levels(machines.check_memory(asked, two, sized)) == ["ok"]
    two.machines[1].facts["memory"] = {"total": 4 << 30, "free": 3 << 30}
    found = machines.check_memory(asked, two, sized)
    assert levels(found) == ["warning"] and "4 of them" in found[0].value, "4 workers of 0.7 GiB"
    two.machines[1].facts["memory"] = {"total": 2 << 30, "free": 2 << 30}
    assert levels(machines.check_memory(asked, two, sized)) == ["problem"]
    two.machines[1].resources = {"CPU": 1.0}
    assert levels(machines.check_memory(asked, two, sized)) == ["ok"], "one worker is there"


def test_memory_of_gpus(two: Cluster, values: Values, sized: Sizes) -> None:
    asked = Request(change(values, runtime={"num_workers": 2, "use_gpu": True}))
    assert "no GPU is up" in machines.check_memory(asked, two, sized)[0].value
    two.machines[0].facts["gpus"] = [{"name": "A10G", "memory": 24 << 30, "driver": "570"}]
    assert levels(machines.check_memory(asked, two, sized)) == ["ok"]
    two.machines[1].facts["gpus"] = [{"name": "MX", "memory": 1 << 29, "driver": "570"}]
    (finding,) = machines.check_memory(asked, two, sized)
    assert finding.level == "problem" and "of GPU memory" in finding.value


def test_disk_of_nodes(two: Cluster, values: Values, sized: Sizes) -> None:
    asked = Request(change(values))
    assert levels(machines.check_disk(asked, two, sized)) == ["ok"]
    assert sized.model is not None
    much = Request(change(values, runtime={"keep": 10**9}))
    (finding,) = machines.check_disk(much, two, sized)[:1]
    assert (
        finding.level == "problem"
        and "1000000000 + 1 checkpoints" in finding.value
        and "runtime.keep" in finding.remedy
    )
    sized.text_bytes = 1 << 40
    (finding,) = machines.check_disk(asked, two, sized)[:1]
    assert finding.level == "problem" and "2,560.0 GiB of prepared text" in finding.value
    sized.text_bytes = None
    two.machines[0].facts["directories"]["runtime.storage_path"]["free"] = 1000
    assert levels(machines.check_disk(asked, two, sized)) == ["problem"]


def test_a_study(tmp_path: Path, values: Values) -> None:
    from clusterns_ray.ops.doctor.examine import read_request

    (tmp_path / "base.yaml").write_text(yaml.safe_dump(values))
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
