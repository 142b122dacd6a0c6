"""The hub's data sets, with local directories in their place: no test may need a network."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from clusterns_ray.errors import ConfigError
from clusterns_ray.evaluation import hub
from clusterns_ray.evaluation.hub import HUB, PROTOCOL, fetch_sts, hub_cache
from clusterns_ray.evaluation.sts import TASKS, read_pairs, read_tests


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory a data set, with its splits as files, as the hub has them; and an empty cache."""
    names = {}
    for number, (name, (dataset, split)) in enumerate(HUB.items()):
        path = tmp_path / "hub" / dataset
        path.mkdir(parents=True, exist_ok=True)
        rows = [
            {"split": "x", "sentence1": f"é {number} {n}", "sentence2": f"b {n}", "score": n % 4 + 0.25}
            for n in range(5 + number)
        ]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        names[name] = (str(path), split)
    monkeypatch.setattr(hub, "HUB", names)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "hub"


def test_the_public_names() -> None:
    assert [HUB[f"STS{year}/test"] for year in (12, 16)] == [("mteb/sts12-sts", "test"), ("mteb/sts16-sts", "test")]
    assert HUB["STSB/dev"] == ("mteb/stsbenchmark-sts", "validation")
    assert HUB["SICKR/test"] == ("mteb/sickr-sts", "test")
    assert {name.split("/")[0] for name in HUB} == set(TASKS)
    assert "9,927" in PROTOCOL["SICKR"] and "4,927" in PROTOCOL["SICKR"]


@pytest.mark.usefixtures("local_hub")
def test_all_of_them_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    directory = fetch_sts(tmp_path / "sts", note=notes.append)
    assert directory == tmp_path / "sts" and len(notes) == len(HUB) == 8
    tests = read_tests(directory, ["STSB/dev"])
    assert tests.missing == [] and list(tests.tasks) == list(TASKS)
    assert [[len(pairs) for pairs in parts] for parts in tests.tasks.values()] == [[5], [6], [7], [8], [9], [11], [12]]
    dev = tests.extra[0]
    assert dev.sentences1[:2] == ["é 5 0", "é 5 1"] and dev.scores[:3].tolist() == [0.25, 1.25, 2.25]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["protocol"] == PROTOCOL
    assert manifest["files"]["SICKR/test"]["rows"] == 12 and manifest["files"]["STSB/dev"]["split"] == "validation"
    assert sorted(path.name for path in directory.rglob(".*")) == [], "temporary files are left"

    stamps = {path: path.stat().st_mtime_ns for path in directory.rglob("*.jsonl")}

    def fail(*_: Any) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(hub, "_load", fail)
    monkeypatch.setattr(hub, "check_hub", fail)
    assert fetch_sts(directory) == directory
    assert stamps == {path: path.stat().st_mtime_ns for path in directory.rglob("*.jsonl")}


@pytest.mark.usefixtures("local_hub")
def test_only_what_is_asked_for_and_what_is_not_whole(tmp_path: Path) -> None:
    directory = tmp_path / "sts"
    fetch_sts(directory, ["STSB/dev"])
    assert [path.name for path in directory.rglob("*.jsonl")] == ["dev.jsonl"]
    notes: list[str] = []
    fetch_sts(directory, ["STSB/dev", "STS12/test"], notes.append)
    assert len(notes) == 1 and "sts12" in notes[0]
    path = directory / "STSB" / "dev.jsonl"
    whole = path.read_text()
    path.write_text(whole[:90])  # as a killed copy would leave it
    fetch_sts(directory, ["STSB/dev"])
    assert path.read_text() == whole
    path.unlink()
    fetch_sts(directory, ["STSB/dev"])
    assert len(read_pairs(directory, "STSB/dev")) == 10
    (directory / "manifest.json").write_text("{")
    fetch_sts(directory, ["STSB/dev"], notes.append)
    assert len(notes) == 2
    assert list(json.loads((directory / "manifest.json").read_text())["files"]) == ["STSB/dev"]


def test_no_such_set_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'hf' has no 'STSB/train'; it has STS12/test"):
        fetch_sts(tmp_path, ["STSB/train"])


def test_offline_is_told_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"mteb/sts12-sts.*give a directory of TASK/SUBSET.jsonl files \(--sts DIR"):
        fetch_sts(tmp_path / "sts")
    assert time.monotonic() - began < 10
    assert not (tmp_path / "sts").exists()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_hub_that_does_not_answer_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "_load", lambda *_: pytest.fail("the hub client was asked, which tries for half a minute"))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"{endpoint} does not answer within 5 s"):
        fetch_sts(tmp_path / "sts")
    assert time.monotonic() - began < 8


def test_a_server_that_never_ends_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection, and says nothing
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "TIMEOUT", 0.3)
        with pytest.raises(ConfigError, match="does not answer"):
            fetch_sts(tmp_path / "sts")


def test_wrong_columns_and_splits(local_hub: Path, tmp_path: Path) -> None:
    path = local_hub / "mteb" / "sts12-sts" / "test.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "similarity": 1}\n')
    with pytest.raises(ConfigError, match="has no column 'score'"):
        fetch_sts(tmp_path / "sts", ["STS12/test"])
    path.rename(path.with_name("train.jsonl"))
    with pytest.raises(ConfigError, match=r"\(test\) cannot be read"):
        fetch_sts(tmp_path / "sts", ["STS12/test"])
    assert not (tmp_path / "sts").exists()


@pytest.mark.usefixtures("local_hub")
def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        fetch_sts(tmp_path / "file" / "sts", ["STSB/dev"])


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/y")
    assert hub_cache() == Path("/x/y/clusterns/sts-hub")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub_cache().is_relative_to(Path.home())
