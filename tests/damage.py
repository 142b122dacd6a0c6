"""What may happen to a file, and how a model is known to be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    """In place of the middle third."""
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])


def flipped(path: Path) -> None:
    """One bit in the middle, the size as before."""
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


def not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x80" + path.read_bytes())


def removed(path: Path) -> None:
    path.unlink()


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    damage.__name__: damage for damage in (truncated, emptied, zeros, flipped, not_utf8, removed, a_directory)
}


def digest(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of a model but its card."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "README.md"
    }
