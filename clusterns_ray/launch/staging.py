"""Where a run's files are: the local copy, the object store they belong to, and what other machines need of both."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from clusterns_ray.config import Config
from clusterns_ray.data.prepare import Prepared, cache_directory
from clusterns_ray.errors import StorageError
from clusterns_ray.io.object_store import Place, Store, is_url, local_copy, place
from clusterns_ray.models import resolve as models


def run_place(config: Config) -> Place:
    """``STORAGE_PATH/NAME``; absolute, as a worker's working directory is not the caller's."""
    return place(config.runtime.storage_path, config.runtime.name, config.runtime.local_path)


def run_directory(config: Config) -> Path:
    """The run's files on this machine: ``STORAGE_PATH/NAME``, or the copy of it."""
    return local_copy(config.runtime.storage_path, config.runtime.local_path) / config.runtime.name


def run_url(config: Config) -> str | None:
    """``STORAGE_PATH/NAME`` where that is in an object store."""
    store = run_place(config).store
    return store.url if store else None


def read_run_file(config: Config, name: str) -> str | None:
    """A small file of the run from where it belongs; None where there is none."""
    return run_place(config).read(name)


def stage(config: Config, prepared: Prepared) -> dict[str, Any]:
    """Copy to the object store what workers on other machines read: tokens, dev set, and an encoder and a teacher that
    are directories here. What is there already is not copied again.

    Returns:
        What :func:`unstage` takes; plain values.
    """
    staged: dict[str, Any] = {
        "tokens_dir": str(prepared.tokens_dir),
        "sts_dir": prepared.sts_dir,
        "storage_path": config.runtime.storage_path,
        # A worker's working directory is not the caller's.
        "directories": {name: models.resolve_model(name) for name in named_models(config) if os.path.isdir(name)},
    }
    if not is_url(config.runtime.storage_path):
        return staged
    cache = Store(config.runtime.storage_path) / "cache"
    staged["tokens"] = prepared.tokens_dir.name
    cache.push_directory(prepared.tokens_dir, staged["tokens"])
    if prepared.sts_dir is not None:
        local = _dev_set_alone(config, prepared.sts_dir)
        staged["sts"] = local.name
        cache.push_directory(local, local.name)
    staged["models"] = {}
    for name in named_models(config):
        source = models.resolve_model(name)
        if os.path.isdir(source):
            staged["models"][name] = f"encoder-{_hash(source)}"
            cache.push_directory(Path(source), staged["models"][name])
    return staged


def named_models(config: Config) -> list[str]:
    """The encoders that workers load."""
    return [name for name in (config.encoder.name, config.loss.teacher) if name is not None]


def unstage(config: Config, staged: dict[str, Any]) -> tuple[Path, str | None]:
    """On a worker: the directories of the tokens and of the dev set, copied to this machine if they are not there.

    Where they were staged, `config` may have a storage path of its own, as a trial of a study has.

    Raises:
        StorageError: what was staged is gone, damaged, or cannot be read.
    """
    models.staged.update(staged["directories"])
    if "tokens" not in staged:
        return Path(staged["tokens_dir"]), staged["sts_dir"]
    store = Store(staged["storage_path"]) / "cache"
    cache = local_copy(staged["storage_path"], config.runtime.local_path) / "staged"

    def here(name: str) -> Path:
        local = cache / name
        if not store.pull_directory(name, local):
            raise StorageError(
                f"{store.address}/{name} is gone, which this run needs. Give the same command again: it is made anew."
            )
        return local

    models.staged.update({name: str(here(copy)) for name, copy in staged["models"].items()})
    return here(staged["tokens"]), str(here(staged["sts"])) if "sts" in staged else None


def _dev_set_alone(config: Config, sts_dir: str) -> Path:
    """A directory of the files that workers read, the dev set and those scored besides it, and no other: an STS
    directory may hold much more."""
    names = [config.evaluation.dev, *config.evaluation.also]
    files = {name: Path(sts_dir) / f"{name}.jsonl" for name in names}
    # What a package carries, each worker reads from its own.
    files = {name: file for name, file in files.items() if file.is_file() or name == config.evaluation.dev}
    local = cache_directory(config) / (
        f"sts-{_hash([part for name, file in files.items() for part in (name, file.read_text(encoding='utf-8'))])}"
    )
    for name, file in files.items():
        target = local / f"{name}.jsonl"
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
    return local


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
