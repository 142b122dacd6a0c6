"""What both kinds of cluster file are checked for, pinned versions, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clusterns_ray.ops.doctor.findings import Finding, problem

WATCHER = "clusterns_ray.launch.preemption"
"""The module that drains a node before its machine is taken away."""

CONSTRAINTS = "constraints.txt"

_PINNED = re.compile(r"(?<![\w.-])([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([\w.+!-]+)")
_RAY_IMAGE = re.compile(r"(?:^|/)rayproject/ray(?:-ml|-llm)?:([\w.-]+)")


def pinned_versions(path: Path) -> dict[str, str]:
    """The versions in the ``constraints.txt`` beside a file or above it; empty where there is none."""
    for directory in path.resolve().parents:
        constraints = directory / CONSTRAINTS
        if constraints.is_file():
            return dict(_pins(constraints.read_text(encoding="utf-8")))
    return {}


def check_versions(what: str, commands: Iterable[str], pinned: Mapping[str, str]) -> Iterable[Finding]:
    """A problem for each version that a command asks for and that is not the tested one."""
    for command in commands:
        for name, asked in _pins(command):
            wanted = pinned.get(name) or _installed(name)
            if wanted and asked != wanted:
                yield _differs(what, f"{name}=={asked}", name, wanted)


def check_image(what: str, image: str, pinned: Mapping[str, str]) -> Iterable[Finding]:
    """A problem where an image may change between the starts of two nodes, or holds another Ray."""
    tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
    ray, match = pinned.get("ray") or _installed("ray"), _RAY_IMAGE.search(image)
    if "@sha256:" not in image and tag in ("", "latest", "nightly"):
        value = f"image {image!r} names no version, so two nodes may differ"
        yield problem(what, value, "Give it a tag that stays, or a digest.")
    elif match and ray and match[1].partition("-")[0] != ray:
        yield _differs(what, f"image {image!r}", "ray", ray)


def _differs(what: str, value: str, name: str, wanted: str) -> Finding:
    remedy = f"Use {wanted}, with which this release was tested and which the other nodes have."
    return problem(what, f"{value}, but {CONSTRAINTS} has {name}=={wanted}", remedy)


def _pins(text: str) -> list[tuple[str, str]]:
    return [(re.sub(r"[-_.]+", "-", name).lower(), value) for name, value in _PINNED.findall(text)]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping in place of anything else, which Ray's schema refuses."""
    return value if isinstance(value, Mapping) else {}


def listing(value: Any) -> list[Any]:
    """The value, or an empty list in place of anything else."""
    return value if isinstance(value, list) else []


def is_count(value: Any, least: int = 0) -> bool:
    """Whether ``value`` is a whole number, ``least`` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
