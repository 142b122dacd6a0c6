"""The errors a user can meet. Each message says what failed, the value received, why, and the remedy."""

from __future__ import annotations


class ClusterNSError(Exception):
    """Base class: the job failed (exit code 1 on the command line)."""


class ConfigError(ClusterNSError, ValueError):
    """The request itself is wrong (exit code 2): an unknown key, an impossible value, a missing file."""


class DataError(ClusterNSError):
    """Input data cannot be used: bad encoding, a missing column, an empty corpus (exit code 2)."""


class CheckpointError(ClusterNSError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


class NonFiniteError(ClusterNSError):
    """Weights, gradients or embeddings are NaN or infinite, or all alike, so that there is no model or no score."""


class StorageError(ClusterNSError):
    """An object store cannot be reached, or what it holds is damaged."""


class DiskError(StorageError):
    """The disk is full, read-only, failing, or over its quota."""


class Drained(ClusterNSError):
    """A machine of the group is about to be taken away; what was done is in a checkpoint."""
