"""What README, the documentation and shipped files ask people to type is accepted, and what they name exists.

Commands: verb, options, configuration files, and the keys and values of ``--set``; blocks of YAML; keys that are named
in passing; targets of make, and paths of scripts and tests.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from clusterns_ray.cli import app
from clusterns_ray.config import Config, known_keys, load_config, make_config
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.tuning.study import StudyConfig, load_study

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
FILES = sorted([*PAGES, ROOT / "cluster.yaml", *ROOT.glob("experiments/**/*.yaml"), ROOT / "experiments/LOG.md"])
UsageError = typer.BadParameter.__bases__[0]
VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMAND = re.compile(rf"(?<![\w./-])clusterns (?:{'|'.join(VERBS)})\b[^`'\n#&|]*")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.M | re.S)
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(Config.model_fields)})\.[a-z]\w*\b(?![/(])")
REFUSED = re.compile(r"^\$ (clusterns .*)\nerror: (?:.*\n)*?(?=\$ |\Z)", re.M)
"""An example of a request that is wrong, and what is said."""
NAMES = ("CONFIG", "STUDY", "CONFIG_OR_STUDY", "mine.yaml", "mystudy.yaml")
"""What stands for a file of the reader's."""


def blocks_of(path: Path, language: str) -> list[str]:
    return [match[3] for match in FENCE.finditer(path.read_text(encoding="utf-8")) if match[2] == language]


def code_of(path: Path) -> list[str]:
    """The code of a Markdown file, each block and each span by itself; a line that goes on is one line."""
    text = path.read_text(encoding="utf-8")
    blocks = [re.sub(r"\\\n\s*", "", REFUSED.sub("", match[3])) for match in FENCE.finditer(text)]
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
    return [*blocks, *(" ".join(span.split()) for span in spans)]


def commands_of(path: Path) -> Iterator[str]:
    if path.suffix == ".yaml":
        text = path.read_text(encoding="utf-8")
        for document in yaml.safe_load_all(text):
            spec = document.get("spec") if isinstance(document, dict) else None
            if isinstance(spec, dict) and "entrypoint" in spec:
                yield spec["entrypoint"]
        code = ["\n".join(line.strip(" #") for line in text.splitlines() if line.strip().startswith("#"))]
    else:
        code = code_of(path)
    for text in code:
        for match in COMMAND.finditer(text):
            yield match[0].strip()


COMMANDS = [
    pytest.param(command, id=f"{name}: {command}")
    for command, name in {command: path.name for path in FILES for command in commands_of(path)}.items()
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
        file = ROOT / f"experiments/{'studies/smoke' if verb in ('tune', 'enqueue') else 'quickstart'}.yaml"
    read(load_study if "studies" in file.parts else load_config, file, tuple(overrides))


@cache
def read(load: Callable[..., Any], file: Path, overrides: tuple[str, ...]) -> None:
    """Once, as a study tries thousands of combinations."""
    load(file, overrides)


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLUSTERNS_DATA", str(tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_written_down_is_understood(command: str) -> None:
    understand(command)


def test_they_are_found() -> None:
    commands = [command.values[0] for command in COMMANDS]
    assert len(commands) > 30
    assert any("runtime.use_gpu=true --set runtime.storage_path=s3://my-bucket" in command for command in commands)
    assert {verb for verb in VERBS if not any(command.split()[1] == verb for command in commands)} == set()
    assert sum(len(blocks_of(path, "yaml")) for path in PAGES) > 3


@pytest.mark.parametrize(
    "command",
    [
        *(match for path in PAGES for match in REFUSED.findall(path.read_text(encoding="utf-8")) if "--set" in match),
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


def merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(values.get(key) or {}, new) for key, new in changes.items() if isinstance(new, dict)}
    return {**values, **changes, **both}


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"{p.name}-{i}") for p in PAGES for i, b in enumerate(blocks_of(p, "yaml"))]
)
def test_a_block_of_yaml_is_a_configuration_or_a_study(block: str, tmp_path: Path) -> None:
    """One without an encoder or a corpus is read as changes of the quickstart's, one without a space as changes of the
    smoke study's."""
    values = yaml.safe_load(block)
    if "space" not in values and values.keys() <= StudyConfig.model_fields.keys():
        smoke = yaml.safe_load((ROOT / "experiments/studies/smoke.yaml").read_text())
        values = {**smoke, "base": f"experiments/studies/{smoke['base']}", **values}
    if "space" in values:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({**values, "base": str(ROOT / values["base"])}))
        load_study(tmp_path / "study.yaml")
    elif {"encoder", "data"} <= values.keys():
        make_config(values)
    else:
        make_config(merged(yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text()), values))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Keys of the configuration, targets of make, scripts, tests and modules."""
    code = "\n".join(code_of(page))
    keys = {key for key in KEY.findall(code) if not key.endswith((".py", ".json", ".yaml"))}
    assert keys - set(known_keys()) == set()
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", code)) - make_targets() == set()
    paths = re.findall(r"(?<![\w./-])(?:clusterns_ray|experiments|tests|docs)/[\w./-]*\w", code)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))


def test_what_runs_on_every_change_is_what_the_pages_name() -> None:
    lines = re.findall(r"^make (.*)", (ROOT / ".ci/run").read_text(encoding="utf-8"), flags=re.M)
    called = {word for line in lines for word in line.partition("#")[0].split() if word != "-o"}
    assert called == {"check", "test"}
    assert called <= make_targets()


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    texts = [path.read_text(encoding="utf-8") for path in (*FILES, ROOT / "CHANGELOG.md")]
    assert [line for text in texts for line in text.splitlines() if len(line) > 120] == []
    assert max(picture.stat().st_size for picture in ROOT.glob("docs/images/*")) <= 200_000
