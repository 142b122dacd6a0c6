"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import uuid
from pathlib import Path
from typing import Any

from clusterns_ray.errors import ConfigError


def write_atomic(path: Path, text: str) -> None:
    """Replace a UTF-8 text file in one step, flushed to disk first."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(value: Any, indent: int | None = 2) -> str:
    """JSON that any reader takes, ending in a newline: NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step (see :func:`json_text`)."""
    write_atomic(path, json_text(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that could not be written in the end, before the work that it is for.

    Raises:
        ConfigError: its directory is not there or does not take files, or it is a directory itself.
    """
    reason = "it is a directory" if path.is_dir() else None
    if reason is None:
        probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            reason = error.strerror
    if reason:
        raise ConfigError(f"{option} {str(path)!r} cannot be written: {reason}. Choose another file.")


def follow_umask(directory: Path) -> None:
    """Give the weights in a directory the mode of any new file there: safetensors writes them for their owner alone."""
    probe = directory / f".{uuid.uuid4().hex[:8]}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)


def flush(path: Path) -> None:
    """Bring a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal; read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
