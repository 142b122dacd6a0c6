"""Who may write a run, and what worker 0 does for all workers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from clusterns_ray import distributed
from clusterns_ray.config import Config
from clusterns_ray.errors import ClusterNSError, StorageError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.files import remove_partial_files, storage_error
from clusterns_ray.io.lease import exclusive
from clusterns_ray.io.uploader import LocalFiles
from clusterns_ray.training.run_files import WRITTEN, check_config, read_result


def on_worker_0(work: Callable[[], object], directory: Path) -> None:
    """Do on worker 0 what it does for all. Where it fails, all workers raise, so that none waits for the others.

    Raises:
        StorageError: ``work`` could not read or write its files, which are in ``directory``.
        ClusterNSError: what else ``work`` raises of this kind.
    """
    failed: ClusterNSError | None = None
    if distributed.rank() == 0:
        try:
            work()
        except ClusterNSError as error:
            failed = error
        except Exception as error:
            failed = as_storage_error(error, directory)
            failed.__cause__ = error
    raise_on_all(failed)


def raise_on_all(failed: ClusterNSError | None) -> None:
    """Raise worker 0's error, if it has one, on every worker."""
    reason = distributed.broadcast_object(str(failed) if failed else None)
    if reason is not None:
        raise failed or ClusterNSError(reason)


@contextmanager
def one_writer(run_dir: Path, uploader: LocalFiles, note: OnNote) -> Generator[None]:
    """Worker 0 takes the run for itself alone; where it may not, all workers raise, and none waits for the others."""
    is_main = distributed.rank() == 0
    refused: ClusterNSError | None = None
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(run_dir, is_main))
            held.enter_context(uploader.writer_lease(is_main, note))
        except ClusterNSError as error:
            refused = error
        raise_on_all(refused)
        yield


def take_over(run_dir: Path, config: Config, address: str, note: OnNote) -> None:
    """Make sure that the run is of this configuration, and remove what a killed writer left half written.

    Args:
        address: where a person finds the run, for messages.

    Raises:
        ConfigError: the run belongs to another configuration, or its own cannot be read.
    """
    remove_partial_files(run_dir, WRITTEN)
    for name in ("config.yaml", "result.json"):
        path = run_dir / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        check_config(text, config, address) if name == "config.yaml" else read_result(text, config, address, note)


@contextmanager
def storage_errors(directory: Path) -> Generator[None]:
    """Raise errors of the operating system as StorageError.

    Where there are several workers they are raised as they are: a worker that ends so is started again with the
    others, which would otherwise wait for it.
    """
    try:
        yield
    except OSError as error:
        if distributed.world_size() > 1:
            raise
        raise as_storage_error(error, directory) from error


def as_storage_error(error: Exception, directory: Path) -> StorageError:
    """The error as one of storage; raises it as it is where it is none."""
    converted = storage_error(
        error, directory, "Then give the same command again: it goes on from the newest checkpoint."
    )
    if converted is None:
        raise error
    return converted
