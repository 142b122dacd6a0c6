"""``clusterns push`` against a stand-in of the hub on loopback that keeps what it is given."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.utils import disable_progress_bars
from report_runs import make_run
from typer.testing import CliRunner, Result

from clusterns_ray.cli import app
from clusterns_ray.config import make_config
from clusterns_ray.io.files import DIRECTORY_MANIFEST, write_manifest
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.report.push import model_card
from clusterns_ray.report.record import read_run

TOKEN = "hf_good"


class Hub(BaseHTTPRequestHandler):
    """The account ``me``, whose token is ``TOKEN``; ``other/taken`` is someone else's."""

    repositories: dict[str, dict[str, Any]]
    large: dict[str, bytes]
    fails: set[str]

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4])
        if parts[:2] != ["api", "models"] or name not in self.repositories:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        held = self.repositories[name]
        if "tree" in parts:
            return self.answer(
                200,
                [{"type": "file", "oid": "0" * 40, "size": len(data), "path": p} for p, data in held["files"].items()],
            )
        siblings = [{"rfilename": path} for path in held["files"]]
        return self.answer(200, {"id": name, "sha": "c" * 40, "private": held["private"], "siblings": siblings})

    def do_PUT(self) -> None:
        if "upload" in self.fails:
            return self.answer(507, {"error": "no room"})
        self.large[self.path.rpartition("/")[2]] = self.body()
        return self.answer(200, {})

    def do_POST(self) -> None:
        body, path = self.body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---")[1]) or {}
            wrong = re.search("[:.]|^/", head.get("base_model", ""))
            return self.answer(
                400 if wrong else 200, {"warnings": [], "errors": [{"message": "base_model"}] * bool(wrong)}
            )
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if not name.startswith("me/"):
                return self.answer(403, {"error": "You don't have the rights to create a model under the namespace"})
            url = {"url": f"{self.address}/{name}", "name": name}
            if name in self.repositories:
                return self.answer(409, {"error": "You already created this model repo", **url})
            self.repositories[name] = {"private": asked.get("visibility") == "private", "files": {}}
            return self.answer(200, url)
        name = "/".join(path.strip("/").split("/")[2:4] if path.startswith("/api/") else path.strip("/").split("/")[:2])
        name = name.removesuffix(".git")
        if not name.startswith("me/"):
            return self.answer(403, {"error": "Forbidden: pass create_pr=1 to open a pull request"})
        if "/preupload/" in path:
            modes = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            actions = [
                {**each, "actions": {"upload": {"href": f"{self.address}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": actions})
        assert "/commit/" in path, path
        files = self.repositories[name]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return self.answer(200, {"commitUrl": f"{self.address}/{name}/commit/{'c' * 40}", "commitOid": "c" * 40})

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    taken = {"other/taken": {"private": False, "files": {}}, "me/public": {"private": False, "files": {"a": b"1"}}}
    kind = type("HubWithState", (Hub,), {"repositories": taken, "large": {}, "fails": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    kind.port = server.server_port
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    """A run with an encoder that loads."""
    run = make_run(tmp_path)
    head = "---\nlibrary_name: sentence-transformers\nbase_model: package:some/model\n---\n\n"
    shutil.rmtree(run / "model", ignore_errors=True)
    shutil.copytree(tiny_model, run / "model")
    (run / "model/README.md").write_text(f"{head}# A title\n\nLoad PATH_OF_THIS_DIRECTORY.\n")
    write_manifest(run / "model")
    return run


@pytest.fixture
def push(hub: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, which asks the stand-in."""
    settings = {"ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in settings.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    disable_progress_bars()
    return lambda *words: CliRunner().invoke(app, ["push", *map(str, words)])


def test_a_run_is_pushed_as_it_is_and_again_without_old_files(
    run: Path, tmp_path: Path, hub: Any, push: Callable[..., Result]
) -> None:
    done = push(run, "mine", "--private")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Wrote http://127.0.0.1:{hub.port}/me/mine (commit {'c' * 12})"
    held = hub.repositories["me/mine"]
    assert held["private"] is True
    local = {path.name: path.read_bytes() for path in (run / "model").iterdir() if path.is_file()}
    del local[DIRECTORY_MANIFEST]
    card = held["files"].pop("README.md").decode()
    del local["README.md"]
    assert held["files"] == local, "each file, and none of ours"
    weights = local["model.safetensors"]
    assert list(hub.large) == [hashlib.sha256(weights).hexdigest()]
    assert "Load me/mine." in card and "## Scores" in card and "clusterns train" in card

    held["files"]["old.bin"] = b"of another model"
    (run / "model/README.md").unlink()
    write_manifest(run / "model")
    done = push(run / "model", "me/mine")
    assert done.exit_code == 0, done.stderr
    assert "old.bin" not in held["files"] and held["files"]["README.md"].decode().count("# me/mine") == 1
    for name, content in held["files"].items():
        (tmp_path / "back").mkdir(exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    texts = ["A ship at sea.", "the river"]
    assert (Encoder.load(tmp_path / "back").encode(texts) == Encoder.load(run / "model").encode(texts)).all()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("other/new",), 2, "may not write to 'other/new', which may be someone else's (403"),
        (("other/taken",), 2, "may not write to 'other/taken'"),
        (("public", "--private"), 2, "me/public already exists and is public, but --private"),
        (("bad-token",), 2, "does not accept the token (401"),
        (("no-network",), 2, "http://127.0.0.1:1 cannot be reached"),
        (("full",), 1, "the upload failed"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    run: Path,
    hub: Any,
    push: Callable[..., Result],
    words: tuple[str, ...],
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if words == ("bad-token",):
        monkeypatch.setenv("HF_TOKEN", "hf_bad")
    if words == ("no-network",):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    hub.fails |= {"upload"} if words == ("full",) else set()
    done = push(run, *words)
    assert done.exit_code == code and says in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and "internal error" not in done.stderr
    assert hub.repositories["other/taken"]["files"] == {} and hub.repositories["me/public"]["files"] == {"a": b"1"}


@pytest.mark.parametrize(
    ("model", "name", "says"),
    [
        ("none/at/all", "mine", "there is no such directory"),
        ("RUN", "a/b/c", "NAME is 'a/b/c'"),
        ("RUN", "mine", "No token for the Hugging Face hub was found."),
        ("bert-base-uncased", "mine", "names a model on the hub and no directory here"),
        ("s3://bucket/run", "mine", "Give a path on this machine"),
    ],
)
def test_a_wrong_request_is_refused_before_the_hub_is_asked(
    run: Path, model: str, name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    result = CliRunner().invoke(app, ["push", str(run) if model == "RUN" else model, name])
    assert result.exit_code == 2 and says in result.stderr, result.stderr


def test_an_unfinished_run_is_not_pushed(run: Path) -> None:
    (run / "result.json").unlink()
    result = CliRunner().invoke(app, ["push", str(run / "model"), "mine"])
    assert result.exit_code == 2 and f"The run '{run}' is not finished." in result.stderr


def test_a_damaged_model_is_not_pushed(run: Path) -> None:
    (run / "model/model.safetensors").write_bytes(b"x")
    result = CliRunner().invoke(app, ["push", str(run), "mine"])
    assert result.exit_code == 1 and "model.safetensors" in result.stderr


def test_the_card_has_scores_with_intervals_their_protocol_and_the_command(run: Path) -> None:
    from huggingface_hub import ModelCard

    result = json.loads((run / "result.json").read_text())
    result["also"] = {"LEE50/test": {"before": 40.0, "after": 50.5, "low": 7.25, "high": 13.0}}
    (run / "result.json").write_text(json.dumps(result))
    model = {
        "tasks": {"STS12": {"spearman": 61.25}},
        "extra": {"MINE/dev": 55.0},
        "average": None,
        "data": {"protocol": {"SICKR": "all 9,927 pairs"}},
    }
    interval = {"difference": -1.0, "low": -2.0, "high": 0.5, "inside_noise": True}
    compared = {"models": [model, model], "differences": [{"model": "a", "against": "b", "sts": {"STS12": interval}}]}
    (run / "evaluation.json").write_text(json.dumps(compared))
    text = model_card(run / "model", "me/mine", read_run(run))
    assert "| LEE50/test | 40.00 | 50.50 | +10.50 (+7.25 to +13.00) | selected nothing |" in text
    assert "| STS12 | 62.25 | 61.25 | -1.00 (-2.00 to +0.50) | tested after training, against b |" in text
    assert "| MINE/dev |  | 55.00 |  | tested after training |" in text
    assert "SICKR: all 9,927 pairs." in text and "clusterns train night.yaml" in text and "/usr/bin" not in text
    saved = text.partition("```yaml\n")[2].partition("```")[0]
    assert make_config(yaml.safe_load(saved)).fingerprint() == read_run(run).config.fingerprint()
    assert "runtime:" not in saved, "where a run is kept is nobody's business"
    (scores,) = [r for r in ModelCard(text).data.eval_results or () if r.dataset_name == "STS12"]
    assert scores.metric_value == 0.6125 and scores.metric_type == "spearman_cosine"
