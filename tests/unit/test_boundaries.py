"""What a library or the system raises at a boundary reaches a user as one line with a reason, never as a traceback."""

from __future__ import annotations

import errno
import importlib
import io
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import clusterns_ray
from clusterns_ray import cli
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.io import object_store as storage
from clusterns_ray.launch import ray_cluster as cluster

CONFIG = "data: {corpus: demo}\n"
FAULTS = [
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), "'a/b': the disk is full. Free some space."),
    (OSError(errno.EACCES, "Permission denied", "a/b"), "'a/b': permission denied. Change its permissions"),
    (OSError(errno.EROFS, "Read-only file system"), "read-only. Choose a directory"),
    (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    (OSError("AWS Error NETWORK_CONNECTION during HeadObject"), "AWS Error NETWORK_CONNECTION"),
    (MemoryError(), "not enough memory. Use smaller batches"),
    (RecursionError("maximum recursion depth exceeded"), "internal error, RecursionError"),
    (KeyError("gelu\nfast"), "internal error, KeyError"),
    (ModuleNotFoundError("No module named 'x'"), "No module named 'x'"),
]
# Each verb, and what of it fails.
BOUNDARIES = {
    "a configuration is read": ("clusterns_ray.config.read_yaml_text", ["train", "c.yaml"]),
    "a corpus is listed": ("clusterns_ray.launch.preflight.check_data", ["prepare", "c.yaml"]),
    "a run is trained": ("clusterns_ray.launch.trainer.train", ["train", "c.yaml"]),
    "a study is opened": ("clusterns_ray.tuning.study.load_study", ["tune", "c.yaml"]),
    "a model is loaded": ("clusterns_ray.evaluation.suite.evaluate_models", ["evaluate", "c", "--suite", "geometry"]),
    "text is encoded": (
        "clusterns_ray.inference.distributed_encode.encode",
        ["encode", "bert", "c.yaml", "-o", "o.parquet"],
    ),
    "an index is built": ("clusterns_ray.inference.search.SemanticIndex.build", ["search", "bert", "c.yaml", "x"]),
    "a report is rendered": ("clusterns_ray.report.write_report", ["report", "run"]),
    "a plan is made": ("clusterns_ray.ops.plan.predict.plan_for", ["plan", "c.yaml"]),
    "machines are examined": ("clusterns_ray.ops.doctor.examine.examine", ["doctor", "c.yaml"]),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    for where, _ in BOUNDARIES.values():
        owner_of(where)  # imported now: what is imported under the patches below would keep them
    monkeypatch.setattr("clusterns_ray.models.resolve.resolve_model", lambda *given: "bert")
    monkeypatch.setattr("clusterns_ray.evaluation.suite.check_suite", lambda suite: suite)
    return tmp_path


def test_a_link_that_leads_back_to_itself_is_one_line(here: Path) -> None:
    (here / "loop").symlink_to("loop")
    said = CliRunner().invoke(cli.app, ["report", "loop", "other"])
    assert said.exit_code in (1, 2) and "'" + str(here / "loop") + "': a link leads back" in said.output
    assert "internal error" not in said.output


def owner_of(where: str) -> object:
    """The module or class that a dotted name is in."""
    home, _, _ = where.rpartition(".")
    try:
        return importlib.import_module(home)
    except ImportError:
        module, _, kind = home.rpartition(".")
        return getattr(importlib.import_module(module), kind)


def inject(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    def fail(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(owner_of(where), where.rpartition(".")[2], fail)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_no_traceback_at_any_boundary(boundary: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, arguments = BOUNDARIES[boundary]
    for error, reason in FAULTS[:1] if boundary != "a run is trained" else FAULTS:
        with monkeypatch.context() as patched:
            inject(patched, where, error)
            result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (boundary, error, result.output)
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
        assert reason in line and "Traceback" not in result.output


def test_the_traceback_can_be_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERNS_TRACEBACK", "1")
    inject(monkeypatch, "clusterns_ray.launch.trainer.train", KeyError("gelu"))
    assert isinstance(CliRunner().invoke(cli.app, ["train", "c.yaml"]).exception, KeyError)


def test_what_ray_raises_at_its_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    inject(monkeypatch, "ray.init", RuntimeError("The node\nwas not\nfound"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    message = r"^Ray could not be started on this machine: The node was not found. Is there room"
    with pytest.raises(ClusterNSError, match=message), cluster.connect(1, lambda text: None):
        pass


def test_a_temporary_directory_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/scratch/" + "n" * 60)
    remedy = r"RAY_TMPDIR=\$\(mktemp -d /tmp/rXXXXXX\)$"
    with pytest.raises(ConfigError, match=rf"^TMPDIR is '/scratch/n+', .* takes 107.*{remedy}"):
        cluster.check_ray_directory()
    result = CliRunner().invoke(cli.app, ["train", "c.yaml", "--set", "runtime.num_workers=1"])
    assert result.exit_code == 2 and "RAY_TMPDIR=$(mktemp" in result.stderr
    arguments = ["encode", "bert", "c.yaml", "-o", "o.parquet", "--workers", "1"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and "RAY_TMPDIR=$(mktemp" in result.stderr and "o.parquet" not in result.stderr
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/rXXXXXX")
    cluster.check_ray_directory()
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/" + "ü" * 30)
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR is"):
        cluster.check_ray_directory()
    monkeypatch.setenv("RAY_ADDRESS", "host:6379")
    cluster.check_ray_directory()


def test_the_folder_for_temporary_files_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CLUSTERNS_LOCAL_PATH", raising=False)
    path = tmp_path / f"clusterns-{os.getuid()}"
    assert storage.local_copy("s3://b/x").parent == path and stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o777)
    storage.local_copy("s3://b/x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.rmdir()
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"is a link, a file, or another user's.*CLUSTERNS_LOCAL_PATH"):
        storage.local_copy("s3://b/x")
    path.unlink()
    path.mkdir()
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    path.rename(tmp_path / f"clusterns-{os.getuid()}")
    with pytest.raises(ConfigError, match="another user's"):
        storage.local_copy("s3://b/x")


@pytest.mark.parametrize("terminal", [True, False])
def test_text_that_the_locale_cannot_show(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """As under LC_ALL=C or latin-1: sentences of a corpus are printed, and JSON for a file stays JSON."""

    class Raw(io.BytesIO):
        def isatty(self) -> bool:
            return terminal

    raw = Raw()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(cli, "app", lambda: print("caf\u00e9"))
    with pytest.raises(SystemExit):
        cli.main()
    stream.flush()
    assert raw.getvalue() == (b"caf\\xe9\n" if terminal else "caf\u00e9\n".encode())


def test_version_and_names() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and result.stdout == f"clusterns {clusterns_ray.__version__}\n"
    assert set(clusterns_ray.__all__) <= set(dir(clusterns_ray))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["plan", "c.yaml", "--workers", "1,,2"], "--workers is '1,,2'"),
        (["plan", "c.yaml", "--workers", "²"], "--workers is '²'"),
        (["plan", "c.yaml", "--workers", "9" * 5000], "--workers"),
        (["plan", "c.yaml", "--price", "inf"], "--price is inf"),
        (["plan", "c.yaml", "--price", "nan"], "--price"),
        (["plan", "c.yaml", "--bandwidth", "1e400Gbit/s"], "--bandwidth is '1e400Gbit/s'"),
        (["plan", "c.yaml", "--latency", "1e-400s"], "--latency"),
        (["plan", "c.yaml", "--tflops", "inf"], "--tflops is inf"),
        (["plan", "c.yaml", "--json", "s3://b/x"], "--json 's3:/b/x'"),
        (["report", "S3://b/run"], "RUN 'S3://b/run'"),
        (["report", "run", "-o", "~nobody-of-that-name/x.html"], "--output"),
        (["search", "bert", "hf:/x", "q"], "CORPUS 'hf:/x'"),
        (["search", "bert", "c.yaml", "q", "--index", "s3://b/i"], "--index"),
        (["encode", "bert", "foo://x", "-o", "o.parquet"], "FILE 'foo://x'"),
        (["encode", "bert", "c.yaml", "-o", "s3://b/o"], "--output"),
        (["evaluate", "bert", "--sts", "s3://b/o"], "--sts"),
        (["evaluate", "bert", "--clusters", "s3://k:q7@b/o"], "--clusters"),
        (["evaluate", "bert", "--json", "s3:/b/o"], "--json"),
        (["doctor", "--cluster", "/dev/null"], "--cluster '/dev/null' is a device"),
        (["doctor", "/dev/null"], "CONFIG '/dev/null' is a device"),
        (["tune", "s3:x"], "STUDY 's3:x'"),
    ],
)
def test_impossible_arguments_are_refused(arguments: list[str], reason: str, here: Path) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2 and reason in result.stderr.replace("\n", " "), result.output
    assert "q7" not in result.output
