"""What every kind of cluster file is checked for: pinned versions, and secrets; and how its values are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from clusterns_ray.ops.doctor.findings import Finding

WATCHER = "clusterns_ray.launch.preemption"
"""The module that drains a node before its machine is taken away."""

CONSTRAINTS = "constraints.txt"

SECRETS: dict[str, re.Pattern[str]] = {
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "an AWS secret key": re.compile(r"(?i)secret_?access_?key[\"']?\s*[:=]\s*[\"']?([A-Za-z0-9/+]{40})\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a Ray token": re.compile(r"RAY_AUTH_TOKEN\s*[:=]\s*[\"']?([^\s\"'$<{][^\s\"']+)"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}"),
    "a Google API key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "a W&B key": re.compile(r"WANDB_API_KEY\s*[:=]\s*[\"']?([0-9a-f]{40})"),
    "a password": re.compile(r"(?i)\bpassword[\"']?\s*[:=]\s*[\"']?([^\s\"'$<{]{6,})"),
}
_PINNED = re.compile(r"(?<![\w.-])([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([\w.+!-]+)")
_RAY_IMAGE = re.compile(r"(?:^|/)rayproject/ray(?:-ml|-llm)?:([\w.-]+)")


def check_secrets(text: str) -> list[Finding]:
    """What looks like a secret, by its line; of the secret itself only the beginning is told."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in SECRETS.items():
            if match := pattern.search(line):
                begin = match[match.lastindex or 0][:4]
                found.append(
                    Finding(
                        "problem",
                        "secrets",
                        f"line {number} holds what looks like {what} ({begin}...)",
                        "Take it out, and make it invalid where it came from: the file is copied to the head and ends "
                        "in repositories. Use roles, a mounted file, or a Kubernetes Secret.",
                    )
                )
    return found


def pinned_versions(path: Path) -> dict[str, str]:
    """The versions in the ``constraints.txt`` beside a file or above it; where there is none, nothing."""
    for directory in path.resolve().parents:
        constraints = directory / CONSTRAINTS
        if constraints.is_file():
            return dict(_pins(constraints.read_text(encoding="utf-8")))
    return {}


def check_versions(what: str, commands: Iterable[str], pinned: Mapping[str, str]) -> list[Finding]:
    """Versions that a command asks for, and that are not the tested ones."""
    found = []
    for command in commands:
        for name, asked in _pins(command):
            wanted = pinned.get(name) or _installed(name)
            if wanted and asked != wanted:
                found.append(_differs(what, f"{name}=={asked}", name, wanted))
    return found


def check_image(what: str, image: str, pinned: Mapping[str, str]) -> list[Finding]:
    """An image whose content may change between two nodes, or that holds another Ray."""
    tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest", "nightly"):
        return [
            Finding(
                "problem",
                what,
                f"image {image!r} names no version, so two nodes may differ",
                "Give it a tag that stays, or a digest.",
            )
        ]
    ray = pinned.get("ray") or _installed("ray")
    match = _RAY_IMAGE.search(image)
    if match and ray and match[1].partition("-")[0] != ray:
        return [_differs(what, f"image {image!r}", "ray", ray)]
    return []


def _differs(what: str, value: str, name: str, wanted: str) -> Finding:
    return Finding(
        "problem",
        what,
        f"{value}, but {CONSTRAINTS} has {name}=={wanted}",
        f"Use {wanted}, with which this release was tested and which the other nodes have.",
    )


def _pins(text: str) -> list[tuple[str, str]]:
    return [(re.sub(r"[-_.]+", "-", name).lower(), value) for name, value in _PINNED.findall(text)]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping in place of anything else: what is wrong is told elsewhere."""
    return value if isinstance(value, Mapping) else {}


def listing(value: Any) -> list[Any]:
    """The value, or an empty list in place of anything else."""
    return value if isinstance(value, list) else []


def is_count(value: Any, least: int = 0) -> bool:
    """Whether it is a whole number, ``least`` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
