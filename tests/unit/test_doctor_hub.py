"""Whether the hub is asked, and what the doctor makes of its answers; a stand-in on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


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


@pytest.mark.slow
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
