"""Names of encoders as users write them; found without importing torch, so that a wrong one is refused at once."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from clusterns_ray.errors import ConfigError

staged: dict[str, str] = {}
"""Encoders by name that this machine has a copy of, made from another machine's directory."""


def resolve_model(name: str) -> str:
    """A name as users write it to what transformers loads: a directory or a hub id.

    Raises:
        ConfigError: the directory or the package is not there.
    """
    if name in staged:
        return staged[name]
    if name.startswith("package:"):
        package, _, subdir = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"encoder {name!r}: the Python package {package!r} is not installed. Install it "
                f"(pip install {package.replace('_', '-')}), or name a directory or a hub id."
            )
        path = Path(next(iter(spec.submodule_search_locations))) / subdir
    elif name.startswith(("/", ".", "~")) or os.path.isdir(name):
        path = Path(name).expanduser()
    elif name.count("/") > 1:
        raise ConfigError(
            f"encoder {name!r}: there is no such directory, and a hub id has at most one slash. Mend the path."
        )
    else:
        return name
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"encoder {name!r}: {str(path)!r} holds no config.json, so it is not a transformer. Name the directory "
            "that a save_pretrained wrote, a hub id, or package:PYTHON_PACKAGE/SUBDIR."
        )
    return str(path.resolve())


def local_model_config(source: str) -> dict[str, Any] | None:
    """``config.json`` of a resolved model that is a directory; None for a hub id."""
    path = Path(source) / "config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"encoder: {str(path)!r} cannot be read ({error}), so the model is damaged. Copy or download it again."
        ) from None
