"""The errors a user can meet. Each message says what failed, the value received, why, and the remedy."""

from __future__ import annotations

import errno


class ClusterNSError(Exception):
    """Base class: the job failed (exit code 1 on the command line)."""

    def __init__(self, message: str = "", remedy: str = "") -> None:
        """
        Args:
            message: what failed, the value received, and why.
            remedy: what to do about it, in whole sentences; ``str()`` has it after the message.
        """
        super().__init__(f"{message} {remedy}".strip())
        self.message, self.remedy = message, remedy


class ConfigError(ClusterNSError, ValueError):
    """The request itself is wrong (exit code 2): an unknown key, an impossible value, a missing file."""


class DataError(ClusterNSError):
    """Input data cannot be used: bad encoding, a missing column, an empty corpus (exit code 2)."""


class CheckpointError(ClusterNSError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


class NonFiniteError(ClusterNSError):
    """Weights, gradients or embeddings are NaN or infinite, or all equal, so that there is no model or no score."""


class StorageError(ClusterNSError):
    """An object store cannot be reached, or what it holds is damaged."""


class DiskError(StorageError):
    """The disk is full, read-only, failing, or over its quota."""


class DamagedError(StorageError):
    """A file or an object was read, and what it holds is damaged."""


class GpuError(ClusterNSError):
    """The GPU that Ray has given to a process cannot be used there."""


class Drained(ClusterNSError):
    """A machine of the group is about to be taken away; what was done is in a checkpoint."""


REASONS = {
    errno.ENOSPC: ("the disk is full", "Free some space."),
    errno.EDQUOT: ("your disk quota is used up", "Free some space."),
    errno.EROFS: ("the file system is read-only", "Choose a directory that can be written."),
    errno.EACCES: ("permission denied", "Change its permissions, or choose another path."),
    errno.EPERM: ("not permitted", "Change its permissions, or choose another path."),
    errno.EMFILE: ("too many files are open", "Raise the limit with `ulimit -n 65536`."),
    errno.ENFILE: ("too many files are open on this machine", "End other programs."),
    errno.ENOMEM: ("there is not enough memory", "Free some memory."),
    errno.EIO: ("the disk reports an error", "Check the disk, or use another one."),
}
UNREACHED = "Check that it exists and can be reached."
OUT_OF_MEMORY = "there is not enough memory. Use smaller batches, or a machine with more memory."


def first_line(error: BaseException) -> str:
    """The first line of an exception's text; its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def describe_unexpected(error: BaseException, again: str = "") -> str:
    """One line on an exception that is not one of ours, for a user: the reason and, where it is known, a remedy.

    Args:
        again: a sentence on how to go on once the remedy has been applied.
    """
    text = " ".join(str(error).split())[:500]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_MEMORY + again
    if isinstance(error, ImportError):
        return f"a Python package cannot be imported ({text}). Install it again with pip."
    if isinstance(error, OSError):
        what, remedy = REASONS.get(error.errno or 0, (error.strerror or text or "a file cannot be used", UNREACHED))
        where = f"{error.filename!r}: " if error.filename is not None else ""
        return f"{where}{what}. {remedy}{again}"
    if text.startswith("Symlink loop from "):  # pathlib's RuntimeError, before Python 3.13
        return (
            f"{text.removeprefix('Symlink loop from ')}: a link leads back to itself. Correct it, or remove it.{again}"
        )
    return (
        f"internal error, {type(error).__name__}: {text.rstrip('.')}. Please report it, with what the same command "
        "shows if the environment variable CLUSTERNS_TRACEBACK is 1."
    )
