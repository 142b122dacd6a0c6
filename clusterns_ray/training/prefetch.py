"""The batch of the next step, read by a thread while this step is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetcher(Generic[Batch]):
    """Reads batches in the order of steps, each once, so that a GPU need not wait for the host to read the next."""

    def __init__(self, read: Callable[[int], Batch], total_steps: int, thread: ThreadPoolExecutor | None) -> None:
        """
        Args:
            read: the batch of a step; it must not depend on what training does meanwhile.
            total_steps: steps of the run: nothing is read beyond them.
            thread: reads ahead; None to read each batch when it is asked for.
        """
        self.read, self.total_steps, self.thread = read, total_steps, thread
        self._next: Future[Batch] | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of ``step``, which is the one after the step before, and raises what reading it raised."""
        batch = self.read(step) if self._next is None else self._next.result()
        self._next = None
        if self.thread is not None and step + 1 < self.total_steps:
            self._next = self.thread.submit(self.read, step + 1)
        return batch
