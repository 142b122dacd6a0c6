"""Whether the files of a run belong to a configuration and are whole; read without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clusterns_ray.config import Config, Plain, parse_saved_config
from clusterns_ray.errors import ConfigError, StorageError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.files import changed_file, checksum_holds, read_manifest

WRITTEN = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "clusters.json",
    "centroids.npy",
    "result.json",
    "error.txt",
)
"""The single files that the writer of a run replaces in one step."""


def check_config(text: str, config: Config, where: str) -> None:
    """Refuse a run that another configuration began.

    Args:
        text: the run's ``config.yaml``.
        where: the run's address, for the message.

    Raises:
        ConfigError: the configurations differ, or the saved one cannot be read.
    """
    try:
        saved = parse_saved_config(text, "it")
    except ConfigError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{where}/config.yaml, which says with what configuration the run was begun, cannot be read ({reason}), so "
            "it is damaged. Restore it from a copy.",
            "If you are sure of the configuration, remove that file and give the same command: checkpoints of another "
            "configuration are refused.",
        ) from None
    if saved.fingerprint() == config.fingerprint():
        return
    changes = differences(saved.identity(), config.identity())
    raise ConfigError(
        f"runtime.name is {config.runtime.name!r}, which {where!r} holds already with another config: "
        + "; ".join(f"{key} was {before!r} and is now {after!r}" for key, before, after in changes[:5])
        + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
        + ". Choose another runtime.name, or go back to those values to resume it."
    )


def differences(
    before: Mapping[str, Plain], after: Mapping[str, Plain], prefix: str = ""
) -> list[tuple[str, object, object]]:
    """Dotted key, old and new value of everything that differs between two trees of values."""
    changes: list[tuple[str, object, object]] = []
    for key, new in after.items():
        old = before.get(key)
        if isinstance(new, Mapping):
            changes += differences(old if isinstance(old, Mapping) else {}, new, f"{prefix}{key}.")
        elif old != new:
            changes.append((prefix + key, old, new))
    return changes


def read_result(text: str, config: Config, where: str, note: OnNote) -> dict[str, Any] | None:
    """The result of a finished run; None, with a note, where ``result.json`` is damaged and has to be written anew.

    Raises:
        ConfigError: the result is that of another configuration.
    """
    try:
        result: Plain = json.loads(text)
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict) or "fingerprint" not in result or not checksum_holds(result):
        note(f"{where}/result.json is damaged: the run is finished anew from its newest checkpoint.")
        return None
    if result["fingerprint"] != config.fingerprint():
        raise ConfigError(
            f"runtime.name is {config.runtime.name!r}, but {where}/result.json is that of another config "
            f"({result['fingerprint']}, not {config.fingerprint()}).",
            "Choose another runtime.name.",
        )
    return result


def model_damage(model: Path, fingerprint: str, best_step: int, last_step: int) -> str | None:
    """What is wrong with an exported model; None where it is whole.

    Args:
        best_step: the step that it should be of. One that was exported after ``last_step``, the newest step that is
            known to be done, is right too: those steps are done again.
    """
    if not model.is_dir():
        return "model/ is missing"
    try:
        manifest = read_manifest(model)
        if manifest is None:
            return "model/ has no manifest"
        if manifest.get("fingerprint") != fingerprint:
            return "model/ belongs to another configuration"
        step = manifest.get("step")
        if step != best_step and not (isinstance(step, int) and step > last_step):
            return f"model/ is of step {step}, and the best step is {best_step}"
        wrong = changed_file(model, manifest)
    except StorageError as error:
        return str(error)
    except OSError as error:
        return f"model/ cannot be read ({error.strerror})"
    return None if wrong is None else f"model/{wrong}"
