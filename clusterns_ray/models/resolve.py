"""Names of encoders as users write them; found without importing torch, so that a wrong one is refused at once."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.object_store import MANIFEST, Store, is_url, local_copy, split_url
from clusterns_ray.io.paths import check_path, check_regular_file

staged: dict[str, str] = {}
"""Models by name that this process has a copy of, made from another machine's directory or from an object store."""


_READ = (".json", ".txt", ".model", ".safetensors", ".bin")
"""Endings of the files of a model that are read."""


def resolve_model(name: str, note: OnNote = lambda text: None) -> str:
    """A name as users write it to what transformers loads: a directory or a hub id.

    A model in an object store is copied to this machine, verified, where it stays; within a process it is looked at
    once, so that all that is done with it is done with the same.

    Args:
        note: called with a sentence on each copy that is made.

    Raises:
        ConfigError: the directory or the package is not there.
        StorageError: the object store cannot be read, or what it holds is damaged.
    """
    if name in staged:
        return staged[name]
    if name.startswith("hf://"):
        raise ConfigError(f"encoder {name!r}: a model of the hub is named by its id alone.", f"Write {name[5:]!r}.")
    name = check_path("encoder", name)
    if is_url(name):
        path = _fetch(name, note)
    elif name.startswith("package:"):
        path = _in_package(name)
    elif name.startswith(("/", ".", "~")) or os.path.isdir(name):
        path = Path(name).expanduser()
    elif name.count("/") > 1:
        raise ConfigError(
            f"encoder {name!r}: there is no such directory, and a hub id has at most one slash.", "Correct the path."
        )
    elif not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) or os.path.exists(name):
        raise ConfigError(
            f"encoder {name!r} is neither a directory nor a hub id (NAME or OWNER/NAME).",
            "Name the directory that a save_pretrained wrote, a hub id, or package:PYTHON_PACKAGE/SUBDIR.",
        )
    else:
        return name
    _check_directory(name, path)
    if is_url(name):
        staged[name] = str(path)
    return str(path.resolve())


def model_of(path: Path) -> Path:
    """The exported encoder of a run, or the directory itself where it is no run."""
    return path / "model" if (path / "config.yaml").is_file() else path


def _in_package(name: str) -> Path:
    package, _, subdir = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"encoder {name!r}: the Python package {package!r} is not installed.",
            f"Install it (pip install {package.replace('_', '-')}), or name a directory or a hub id.",
        )
    return Path(next(iter(spec.submodule_search_locations))) / subdir


def _check_directory(name: str, path: Path) -> None:
    """Refuse what is not a directory of a transformer, and one in which a read could wait for ever."""
    if not os.path.lexists(path / "config.json"):
        remedy = "Name the directory that a save_pretrained wrote, a hub id, or package:PYTHON_PACKAGE/SUBDIR."
        if (path / "model" / "config.json").is_file():
            remedy = f"It is a run: give {name.rstrip('/')}/model."
        elif (path / "adapter_config.json").is_file():
            remedy = (
                "It is an adapter: merge it into its model (merge_and_unload of the peft library), and save the model "
                "that comes out with save_pretrained."
            )
        raise ConfigError(f"encoder {name!r}: {str(path)!r} holds no config.json, so it is not a transformer.", remedy)
    try:
        files = [entry.name for entry in os.scandir(path) if entry.name.endswith(_READ)]
    except OSError as error:
        raise ConfigError(
            f"encoder {name!r}: {str(path)!r} cannot be read ({error.strerror}).", "Name a directory that can."
        ) from None
    for file in files:
        check_regular_file(f"encoder {name!r}: its", path / file)


def _fetch(url: str, note: OnNote) -> Path:
    """A copy of a model in an object store, beneath where this machine keeps copies of its run."""
    holder, name = split_url(url)
    path = local_copy(holder) / (name or ".")
    if name and Store(holder).pull_directory(name, path, note):
        return path
    remedy = "Give the model/ of a run that has come to its first evaluation, or copy the files here."
    if Store(url).manifest("model") is not None:
        remedy = f"It is a run: give {url.rstrip('/')}/model."
    raise ConfigError(
        f"encoder {url!r}: there is no whole directory, as {name or 'the bucket'}{MANIFEST} is missing.", remedy
    )


def local_model_config(source: str) -> dict[str, Any] | None:
    """``config.json`` of a resolved model that is a directory; None for a hub id.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    path = Path(source) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        reason = f"cannot be read ({error})"
    else:
        if isinstance(config, dict):
            return config
        reason = f"holds a {type(config).__name__} and not a JSON object"
    raise ConfigError(
        f"encoder: {str(path)!r} {reason}, so the model is damaged.", "Copy or download it again."
    ) from None
