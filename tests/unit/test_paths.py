"""Paths and URLs that users give: what is taken, what is refused, and that no secret is repeated."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import yaml
from helpers import write_pairs
from typer.testing import CliRunner

from clusterns_ray.cli import app
from clusterns_ray.errors import ConfigError
from clusterns_ray.io.paths import CORPORA, check_outlasts_job, check_path, check_regular_file, job_package, redact


def refusal(value: str, *schemes: str) -> str:
    with pytest.raises(ConfigError, match=r"^some\.key ") as raised:
        check_path("some.key", value, *([schemes] if schemes else []))
    message = str(raised.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize(
    "value",
    [
        "runs",
        "a:b",
        "data/*.txt",
        "~/texts",
        "/a b/ü.csv",
        "s3://bucket/a%20b/*.parquet?region=eu-west-1",
        "gs://anonymous@bucket/x",
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://bucket/user@home",
    ],
)
def test_what_can_be_meant_is_taken_as_it_is(value: str) -> None:
    assert check_path("some.key", value) == value


def test_what_is_written_differently_becomes_one() -> None:
    assert check_path("k", "file:///a%20b/c") == "/a b/c" == check_path("k", "file://localhost/a%20b/c")
    assert check_path("k", "s3://b/x//") == "s3://b/x" and check_path("k", "s3://b/x/?region=a") == "s3://b/x?region=a"
    assert check_path("k", Path("a/b")) == "a/b" and check_path("k", "hf://a/b:test", CORPORA) == "hf://a/b:test"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "names nothing"),
        ("  \t", "names nothing"),
        ("a\0b", "control character"),
        ("a\x1b[2Jb", "control character"),
        ("a\x9bb", "control character"),
        ("b\udcffad", "not UTF-8"),
        ("~nobody-of-that-name/x", "no user 'nobody-of-that-name'"),
        ("x/" + "y" * 256, "256 bytes"),
        ("ü" * 128 + "/x", "256 bytes"),
        ("ab/" * 1400, "at most 4,095"),
        ("s3://b/" + "%41" * 256, "256 bytes"),
        ("file://host/x", "file:///ABSOLUTE"),
        ("file:x", "file:///ABSOLUTE"),
        ("file:///~x/%00", "control character"),
        ("S3://b/x", "Write 's3://b/x'"),
        ("s3:/b/x", "Write 's3://b/x'"),
        ("s3:b", "Write 's3://b'"),
        ("gs//b/x", "Write 'gs://b/x'"),
        ("s3a://b/x", "Write 's3://b/x'"),
        (" gs://b", "Write 'gs://b'"),
        ("s3:///x", "names no bucket"),
        ("gs://", "names no bucket"),
        ("s3://b:9000/x", "AWS_ENDPOINT_URL"),
        ("s3://b//x", "empty part"),
        ("s3://b/../c", "empty part"),
        ("s3://b/x y", "'s3://b/x%20y'"),
        ("s3://b/x#y", "'s3://b/x%23y'"),
        ("s3://b/x%0Ay", "control character"),
        ("hf://owner/name", "hf:// is not possible here"),
        ("ssh://host/x", "ssh:// is not possible here"),
        ("https://host/x", "Download it"),
    ],
)
def test_what_can_name_nothing_is_refused(value: str, reason: str) -> None:
    assert reason in refusal(value)


def test_a_url_is_refused_where_only_a_path_makes_sense() -> None:
    with pytest.raises(ConfigError, match=r"^--index 's3://b/x': s3:// is not possible here. Give a path on this mach"):
        check_path("--index", "s3://b/x", ())


@pytest.mark.parametrize(
    "value",
    [
        "s3://AKIA1:q7w8@bucket/x",
        "s3://AKIA1:q7/w8@bucket/x",
        "s3://AKIA1:q7w8",
        "S3:/AKIA1:q7w8@b",
        "s3a://AKIA1:q7w8@b",
        "s3://b/x?access_key=AKIA1&region=a&secret_key=q7w8",
        "s3://b/x?endpoint_override=http%3A%2F%2Fme:q7w8%40host",
        "abfs://container:q7w8@account/x",
        "abfs://container@account/x?sig=q7w8",
        "gs://q7w8@bucket/x",
        "https://me:q7w8@host/x",
    ],
)
def test_credentials_are_refused_and_not_repeated(value: str) -> None:
    message = refusal(value)
    assert "q7" not in message and "w8" not in message and "AKIA1" not in message
    assert value.startswith("https") or "environment" in message


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("no s3://k:q/7@b/x here", "no s3://***@b/x here"),
        ("s3://b/x?secret_key=q7&region=a", "s3://b/x?secret_key=***&region=a"),
        ("s3://b/u@x and 3:4@5", "s3://b/u@x and 3:4@5"),
    ],
)
def test_redact(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_what_is_no_regular_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    check_regular_file("k", tmp_path / "file")
    monkeypatch.setenv("HOME", str(tmp_path))
    check_regular_file("k", "~/file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for name, reason in {
        "absent": "No such file",
        "fifo": "is a FIFO",
        "socket": "is a socket",
        "/dev/zero": "is a device",
        ".": "is a directory",
        "loop": "symbolic links",
        "a\0b": "null byte",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(ConfigError, match=reason):
            check_regular_file("corpus", name)


# ---- Ray's copy of a job's working directory ------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory in which `ray job submit --working-dir .` runs a command."""
    path = tmp_path / "session_2026-01-01_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"
    path.mkdir(parents=True)
    monkeypatch.chdir(path)
    return path


@pytest.mark.parametrize("path", ["runs", "./a/../runs", ".", "{package}/runs", "{home}/link/runs"])
def test_what_is_written_into_a_jobs_package_is_refused(package: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to(package)
    path = path.format(package=package, home=tmp_path)
    with pytest.raises(ConfigError) as error:
        check_outlasts_job("runtime.storage_path", path)
    text = str(error.value)
    assert f"runtime.storage_path {path!r} is in {str(package)!r}, Ray's copy of the job's working directory" in text
    assert "absolute path on a disk that stays" in text and "s3://" in text


def test_what_outlasts_a_job_is_not_refused(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "out").symlink_to(tmp_path)
    for path in (tmp_path / "runs", "out/runs", "../../runs"):
        check_outlasts_job("-o", path)
    monkeypatch.chdir(tmp_path)
    check_outlasts_job("-o", "runs")
    assert job_package(package) == job_package(package / "a/b") == str(package) and job_package(tmp_path) is None


def commands(package: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    (package / "a.txt").write_text("A boat.\nA river.\n")
    base = {"encoder": {"name": "package:nowhere"}, "data": {"corpus": "a.txt"}, "evaluation": {"sts": None}}
    (package / "run.yaml").write_text(yaml.safe_dump(base))
    away = f"runtime.storage_path={tmp_path}"
    return {
        "train": (["train", "run.yaml"], "runtime.storage_path 'runs'"),
        "prepare": (["prepare", "run.yaml"], "runtime.storage_path 'runs'"),
        "cache": (["train", "run.yaml", "--set", away, "--set", "data.cache_dir=cache"], "data.cache_dir 'cache'"),
        "encode": (["encode", "MODEL", "a.txt", "-o", "a.parquet"], "-o '"),
        "search": (["search", "MODEL", "a.txt", "boat", "--index", "here"], "--index '"),
        "evaluate": (["evaluate", "MODEL", "--sts", "a.txt", "--json", "out.json"], "--json 'out.json'"),
    }


@pytest.mark.parametrize("name", ["train", "prepare", "cache", "encode", "search", "evaluate"])
def test_commands_in_a_job(package: Path, tmp_path: Path, tiny_model: Path, name: str) -> None:
    arguments, says = commands(package, tmp_path)[name]
    arguments = [str(tiny_model) if part == "MODEL" else part for part in arguments]
    if name in ("train", "prepare", "cache"):
        arguments += ["--set", f"encoder.name={tiny_model}"]
    if name == "evaluate":
        write_pairs(package / "sts" / "STSB" / "test.jsonl")
        arguments[3] = "sts"
    before = sorted(package.rglob("*"))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output and "Ray's copy of the job's working directory" in result.output
    assert sorted(package.rglob("*")) == before, "something was written before"


def test_an_index_beside_a_corpus_in_a_job_is_kept_elsewhere(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterns_ray.inference.search import default_directory

    monkeypatch.setenv("XDG_CACHE_HOME", str(package.parents[3] / "cache"))
    (package / "a.txt").write_text("A boat.\n")
    assert package not in default_directory(str(package / "a.txt")).parents
