"""Every `clusterns` command in README, in a shipped file's comments and in a job's entrypoint is one that would be
understood: verb, options, configuration files, and the keys and values of ``--set``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from clusterns_ray.cli import app
from clusterns_ray.config import load_config
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.tuning.study import load_study

ROOT = Path(__file__).parents[2]
FILES = sorted(
    [
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        ROOT / "cluster.yaml",
        *ROOT.glob("experiments/**/*.yaml"),
        ROOT / "experiments/LOG.md",
    ]
)
UsageError = typer.BadParameter.__bases__[0]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMAND = re.compile(rf"(?<![\w./-])clusterns (?:{'|'.join(VERBS)})\b[^`'\n#&|]*")
NAMES = ("CONFIG", "STUDY", "CONFIG_OR_STUDY", "mine.yaml")
"""What stands for a file of the reader's."""


def commands_of(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        for document in yaml.safe_load_all(text):
            spec = document.get("spec") if isinstance(document, dict) else None
            if isinstance(spec, dict) and "entrypoint" in spec:
                yield spec["entrypoint"]
        text = "\n".join(line.strip(" #") for line in text.splitlines() if line.strip().startswith("#"))
    for match in COMMAND.finditer(text):
        yield match[0].strip()


COMMANDS = [
    pytest.param(command, id=f"{path.name}: {command}")
    for path in FILES
    for command in dict.fromkeys(commands_of(path))
]


def understand(command: str) -> None:
    """Raise where the command line would be refused as it is written, on any machine."""
    _, verb, *words = shlex.split(command.replace("s3://BUCKET", "s3://bucket"))
    if verb not in VERBS:
        raise LookupError(verb)
    if not words or any(word.startswith("[") for word in words) or "FILE..." in words:
        return  # the name of a command, or its usage
    parameters = VERBS[verb].make_context(verb, [word for word in words if word != "..."]).params
    name = parameters.get("study") or parameters.get("config")
    overrides = parameters.get("set") or ()
    if verb == "doctor" and (file := parameters.get("cluster")) is not None:
        assert (ROOT / file).is_file(), file
    if name is None:
        return
    file = ROOT / re.sub(r"^(~|/home/\w+)/clusterns/", "", str(name))
    if str(name) in NAMES:
        file = ROOT / "experiments/quickstart.yaml" if verb != "tune" else ROOT / "experiments/studies/smoke.yaml"
    (load_study if "studies" in file.parts else load_config)(file, overrides)


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLUSTERNS_DATA", str(tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_written_down_is_understood(command: str) -> None:
    understand(command)


def test_they_are_found() -> None:
    found = [command.values[0] for command in COMMANDS]
    assert len(found) > 30
    assert any("--set runtime.use_gpu=true --set runtime.storage_path=s3://my-bucket" in command for command in found)
    assert {verb for verb in VERBS if not any(command.split()[1] == verb for command in found)} == set()


@pytest.mark.parametrize(
    "command",
    [
        "clusterns train experiments/missing.yaml",
        "clusterns train experiments/quickstart.yaml --workers 2",
        "clusterns train experiments/quickstart.yaml --set runtime.workers=2",
        "clusterns tune ~/clusterns/experiments/studies/smoke.yaml --set concurrent_trials=none",
        "clusterns tune experiments/studies/smoke.yaml --set runtime.num_gpus=1",
        "clusterns learn experiments/quickstart.yaml",
        "clusterns doctor --cluster missing.yaml",
    ],
)
def test_mistakes_would_be_found(command: str) -> None:
    with pytest.raises((UsageError, LookupError, ClusterNSError, AssertionError)):
        understand(command)
