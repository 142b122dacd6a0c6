"""The walls of the house: which module may import what, read from the sources and not by running them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import clusterns_ray

PACKAGE = "clusterns_ray"
ROOT = Path(clusterns_ray.__file__).parent

LAYERS: list[set[str]] = [
    {"errors", "distributed"},
    {"io"},
    {"kernels"},
    {"clustering"},
    {"config", "losses"},
    {"models"},
    {"evaluation", "data"},
    {"training"},
    {"launch"},
    {"inference"},
    {"tuning"},
    {"ops"},
    {"report"},
    {"console"},
    {"cli", "__init__"},
]
"""From low to high, by the first name below the package. A module imports its own layer and lower ones."""

LEAVES = {"errors", "distributed"}
"""They import nothing of the package."""

ONLY_IN: dict[str, tuple[str, ...]] = {
    "ray": ("launch", "inference", "tuning", "ops"),
    **dict.fromkeys(("onnx", "onnxruntime", "openvino", "nncf"), ("inference.export", "inference.exported")),
    "faiss": ("clustering.backend", "inference.faiss_index", "ops.doctor"),
    "torch.distributed": ("distributed",),
    "torch.nn.parallel": ("distributed",),
    "optuna": ("tuning", "console.study", "report.study_charts"),
    "plotly": ("report",),
    "typer": ("cli",),
}
"""Where a module outside the package may be imported: a module of ours, or all below it."""


def module_name(path: Path, root: Path = ROOT) -> str:
    """``training.loop`` for training/loop.py, ``data`` for data/__init__.py, ``__init__`` for the package's own."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


@cache
def imports(source: str, module: str = "", is_package: bool = False) -> set[str]:
    """Every module or name that a source imports, wherever it stands in it, as dotted names.

    ``from a import b`` counts as ``a.b``, since ``b`` may be a module; ``import_module("a")`` counts as ``a``.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
                here = here[: len(here) - node.level + is_package]
                base = ".".join([*here, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                found.add(str(first.value))
    return found


def is_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def layer(module: str) -> int:
    first = module.split(".")[0]
    for number, names in enumerate(LAYERS):
        if first in names:
            return number
    raise AssertionError(f"{module} is in no layer: give it a place in LAYERS")


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What a module imports across a wall."""
    found = []
    for name in sorted(imports(source, module, is_package)):
        if is_below(name, PACKAGE):
            inner = name.removeprefix(PACKAGE).lstrip(".")
            if not inner:
                continue
            # `from clusterns_ray import __version__` names no module
            if inner.split(".")[0] not in set().union(*LAYERS):
                inner = "__init__"
            own = inner.split(".")[0] == module.split(".")[0]
            if module.split(".")[0] in LEAVES or (layer(inner) > layer(module) and not own):
                found.append(f"{module} imports {name}")
        for outside, homes in ONLY_IN.items():
            if is_below(name, outside) and not any(is_below(module, home) for home in homes):
                found.append(f"{module} imports {name}")
    return found


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def test_all_modules_are_read() -> None:
    assert len(SOURCES) > 30
    assert {"__init__", "cli", "config", "training.loop", "data.demo", "clustering.backend", "launch.trainer"} <= set(
        SOURCES
    )


@pytest.mark.parametrize("module", SOURCES)
def test_walls(module: str) -> None:
    path = SOURCES[module]
    assert violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def test_only_the_api_and_what_all_share_is_loose_at_the_top() -> None:
    loose = {path.stem for path in ROOT.glob("*.py")}
    assert loose == {"__init__", "cli", "config", "distributed", "errors", "losses"}


def test_no_circles() -> None:
    """No module imports itself by way of others, not even inside a function."""
    imported = {
        module: {
            name
            for dotted in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
            if (name := home_of(dotted)) and name != module
        }
        for module, path in SOURCES.items()
    }
    assert sum(map(len, imported.values())) > 100
    assert circles(imported) == []


def home_of(dotted: str) -> str | None:
    """The module of ours that a dotted name is, or is in."""
    parts = dotted.removeprefix(PACKAGE + ".").split(".") if is_below(dotted, PACKAGE) else []
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in candidates if name in SOURCES), None)


def circles(imported: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(imported[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += imported.get(name, ())
        return seen

    return [module for module in imported if module in reached(module)]


def test_a_circle_is_noticed() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_every_import_is_from_somewhere_that_is_there() -> None:
    """So that a name in this file does not outlive a module that was renamed."""
    for homes in ONLY_IN.values():
        assert any(home.split(".")[0] in {name.split(".")[0] for name in SOURCES} for home in homes) or homes == (
            "tuning",
        )
    used = {name for module, path in SOURCES.items() for name in imports(path.read_text(encoding="utf-8"), module)}
    assert any(is_below(name, "ray") for name in used)
    assert any(is_below(name, "faiss") for name in used)
    assert any(is_below(name, "torch.distributed") for name in used)


WRONG = [
    ("losses", "from clusterns_ray.training.loop import train_worker"),
    ("config", "from clusterns_ray.models import encoder"),
    ("models.encoder", "def f():\n    from clusterns_ray.data import corpus\n"),
    ("training.loop", "if TYPE_CHECKING:\n    from clusterns_ray.launch.trainer import train\n"),
    ("training.loop", "import ray"),
    ("training.loop", "def f():\n    import ray.train\n"),
    ("models.encoder", "from ray import train"),
    ("clustering.state", "import faiss"),
    ("clustering.state", "import torch.distributed as dist"),
    ("clustering.state", "from torch import distributed"),
    ("training.loop", "from torch.nn.parallel import DistributedDataParallel"),
    ("distributed", "from clusterns_ray.errors import ConfigError"),
    ("errors", "import clusterns_ray.config"),
    ("data.corpus", "from clusterns_ray.cli import app"),
    ("data.corpus", "from ..training import loop"),
    ("launch.trainer", "from ..tuning.study import study"),
    ("data.corpus", "import importlib\nimportlib.import_module('clusterns_ray.launch')"),
    ("data.corpus", "from clusterns_ray import __version__"),
]


@pytest.mark.parametrize(("module", "source"), WRONG)
def test_the_check_sees_a_wrong_import(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


RIGHT = [
    ("training.loop", "from clusterns_ray import distributed\nfrom clusterns_ray.errors import ConfigError"),
    ("clustering.state", "from clusterns_ray import distributed\nfrom .kmeans import assign"),
    (
        "data.token_store",
        "from clusterns_ray.models.tokenization import tokenize\nfrom clusterns_ray.models import resolve",
    ),
    ("launch.trainer", "def f():\n    import ray\n    from ray.train import RunConfig\n"),
    ("clustering.backend", "def f():\n    import faiss\n"),
    ("distributed", "import torch.distributed as dist"),
    ("cli", "from clusterns_ray.report import html\nfrom clusterns_ray.tuning.study import x\nimport typer"),
    ("data.corpus", "import raylike\nimport arrayfaiss"),
]


@pytest.mark.parametrize(("module", "source"), RIGHT)
def test_the_check_lets_a_right_import_pass(module: str, source: str) -> None:
    assert imports(source, module)
    assert violations(module, source) == []


def test_a_module_without_a_layer_is_noticed() -> None:
    with pytest.raises(AssertionError, match="in no layer"):
        layer("somewhere.new")
