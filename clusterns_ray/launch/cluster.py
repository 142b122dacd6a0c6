"""Ray for as long as a job needs it: joined where there is a cluster, else started on this machine."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clusterns_ray.errors import ClusterNSError

ANSWER_TIMEOUT_S = 10.0


@contextmanager
def connect(cpus: int, note: Callable[[str], None]) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine; leave it as it was found.

    Args:
        cpus: how many the job asks for; a Ray that is started here has at least so many, be they shared.

    Raises:
        ClusterNSError: nothing answers at RAY_ADDRESS.
    """
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default for a local start, said without its warning.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    _start(cpus, note)
    try:
        yield
    finally:
        ray.shutdown()


def _start(cpus: int, note: Callable[[str], None]) -> None:
    import ray

    # The driver's directory is not shipped to the workers: the package is installed where they run.
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_answers(address)
        ray.init(**options)
        return
    there = os.cpu_count() or 1
    if cpus > there:
        note(f"{cpus} CPUs are asked for on a machine with {there}: the workers share them and run slower.")
    ray.init(num_cpus=max(there, cpus), include_dashboard=False, **options)


def _check_answers(address: str) -> None:
    """Whether anything listens there: Ray itself would try for a quarter of an hour."""
    found = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if not found:  # "auto"
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterNSError(
            f"RAY_ADDRESS is {address!r}, where nothing answers ({error}). Mend it, or unset it to start Ray on this "
            "machine."
        ) from error
