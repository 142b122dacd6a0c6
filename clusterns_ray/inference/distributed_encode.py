"""``encode`` in this process, or spread over Ray workers."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clusterns_ray.config import MAX_WORKERS
from clusterns_ray.errors import ClusterNSError, ConfigError, first_line
from clusterns_ray.inference.encode import Encoded, EncodedPart, OnProgress, Part, encode_files, encode_part
from clusterns_ray.io.events import OnEvent, OnNote, notes_to
from clusterns_ray.io.paths import CORPORA, Named, check_path, names
from clusterns_ray.launch.capacity import check_room
from clusterns_ray.launch.ray_cluster import check_ray_directory, cluster_capacity, connect
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.models.settings import read_settings

if TYPE_CHECKING:
    import numpy as np

    from clusterns_ray.models.encoder import Encoder

START_TIMEOUT_S = 300.0
"""How long to wait for a first worker, or for another one when the last has died."""

PART_TIMEOUT_S = 3600.0
"""How long to wait for any one of the parts at work."""

GO_ON = "The same command goes on from the parts that are done."

ATTEMPTS = 4
"""How many workers may die over the same part."""


def encode(
    model: Named,
    files: Named | Sequence[Named],
    output: Named,
    *,
    text_column: str = "text",
    limit: int | None = None,
    dtype: str = "float32",
    workers: int = 0,
    batch_size: int = 64,
    pooling: str | None = None,
    max_length: int | None = None,
    normalize: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = lambda event: None,
) -> Encoded:
    """Write sentences and their embeddings to a parquet file, as ``clusterns encode`` does, whose options these are.

    The file has the columns ``text`` and ``embedding``, in the order read. The same call again goes on from the parts
    that an interrupted one finished, and leaves a finished file as it is. Embeddings of sentences in memory are those
    of :meth:`clusterns_ray.Encoder.encode`.

    Args:
        model: an encoder as of :meth:`clusterns_ray.Encoder.load`.
        files: text, csv, jsonl or parquet; paths, globs, s3://, gs:// or hf://.
        output: the file to write, which ends in .parquet.
        text_column: the column or field that holds the sentence.
        limit: at most this many sentences.
        dtype: of the values that are written, ``float32`` or ``float16``.
        workers: 0 works in this process; N on N Ray workers of one CPU each, and a GPU where the cluster has some.
            This process reads and writes, so that nodes need to share no disk. The result is the same.
        batch_size: sentences encoded at once.
        pooling: in place of the model's own.
        max_length: tokens a sentence is cut to, in place of the model's own limit.
        normalize: to length 1; a model that does so by itself does so in any case.
        overwrite: replace a file, or parts, that something else made.
        on_event: called with notes, and with :class:`~clusterns_ray.io.events.RowsDone`.

    Raises:
        ConfigError, DataError: the request cannot work.
        ClusterNSError: the work failed; finished parts are kept.
    """
    model = os.fspath(model)
    files = [check_path("FILE", file, CORPORA) for file in names(files)]
    output = check_path("--output", output, ())
    if not 0 <= workers <= MAX_WORKERS:
        raise ConfigError(f"--workers is {workers}; it must be 0, for this process, or up to {MAX_WORKERS:,}.")
    note, encode_parts = notes_to(on_event), None
    if workers:
        check_ray_directory()
        encode_parts = partial(encode_on_ray, workers=workers, note=note)
    result = encode_files(
        model,
        files,
        output,
        text_column=text_column,
        limit=limit,
        dtype=dtype,
        batch_size=batch_size,
        pooling=pooling,
        max_length=max_length,
        normalize=normalize,
        overwrite=overwrite,
        encode_parts=encode_parts,
        on_event=on_event,
    )
    if similarity := read_settings(resolve_model(model)).other_similarity:
        with_cosine = "--normalize made that the cosine" if normalize else "compare these so, too"
        note(f"{model} is meant to be compared by {similarity}; {with_cosine}.")
    return result


def encode_on_ray(
    encoder: Encoder,
    parts: Iterable[Part],
    batch_size: int,
    on_progress: OnProgress = lambda rows: None,
    *,
    workers: int,
    note: OnNote = lambda text: None,
) -> Iterator[EncodedPart]:
    """Encode parts on Ray workers, one part at a time each; the part of a worker that dies goes to another.

    Yields:
        Each part as it is done.

    Raises:
        ClusterNSError: no worker starts, or none finishes, in time; or one part ends worker after worker.
    """
    waiting = iter(parts)
    first = next(waiting, None)
    if first is None:  # all is done already, without Ray
        return
    with connect(workers, note):
        yield from _Workers(encoder, batch_size, workers, note).encode(first, waiting)


class _Worker:
    """An actor that holds an encoder."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def ready(self) -> None:
        """Bring the encoder to this worker's device."""
        import ray
        import torch

        from clusterns_ray.launch.workers import check_gpu

        check_gpu()
        self.encoder = self.encoder.to("cuda" if ray.get_gpu_ids() else "cpu")
        if self.encoder.device.type == "cpu":
            torch.set_num_threads(1)

    def encode(self, part: Part, batch_size: int) -> tuple[np.ndarray, int]:
        """Embeddings, and how many of the texts were cut."""
        done = encode_part(self.encoder, part, batch_size)
        return done.z_ND, done.truncated


class _Workers:
    """The workers, and which part is with which."""

    def __init__(self, encoder: Encoder, batch_size: int, count: int, note: OnNote) -> None:
        import ray

        self.batch_size, self.count, self.note = batch_size, count, note
        capacity = cluster_capacity()
        gpus = capacity.most("GPU")
        share = 1 / max(math.ceil(count / gpus), 1) if gpus else 0
        check_room(capacity, {"CPU": 1.0, **({"GPU": share} if share else {})}, 1, "encode")
        # The workers are sent the encoder itself: they may not see the directory it came from.
        encoder_ref = ray.put(encoder)
        worker = ray.remote(num_cpus=1, num_gpus=share, max_restarts=0)(_Worker)
        self.start = lambda: worker.remote(encoder_ref)
        self.starting: dict[Any, Any] = {}
        self.running: dict[Any, tuple[Any, Part]] = {}
        self.idle: deque[Any] = deque()
        self.again: deque[Part] = deque()
        self.deaths: dict[int, int] = {}
        self.failed_starts = 0

    def encode(self, first: Part, rest: Iterator[Part]) -> Iterator[EncodedPart]:
        import ray

        self.again.append(first)
        for _ in range(self.count):
            self._start_worker()
        last_news = time.monotonic()
        while True:
            while self.idle:
                part = self.again.popleft() if self.again else next(rest, None)
                if part is None:
                    break
                worker = self.idle.popleft()
                self.running[worker.encode.remote(part, self.batch_size)] = (worker, part)
            if not self.running and not self.again and self.idle:
                return
            limit = PART_TIMEOUT_S if self.running else START_TIMEOUT_S
            patience = last_news + limit - time.monotonic()
            done, _ = ray.wait([*self.running, *self.starting], timeout=max(patience, 0))
            if not done:
                raise ClusterNSError(self._too_late(limit))
            last_news = time.monotonic()
            for ref in done:
                result = self._take(ref)
                if result is not None:
                    yield result

    def _start_worker(self) -> None:
        worker = self.start()
        self.starting[worker.ready.remote()] = worker

    def _take(self, ref: Any) -> EncodedPart | None:
        """What a worker has done; where it has died, its part is put back and another worker started."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

        starts = ref in self.starting
        worker, part = (self.starting.pop(ref), None) if starts else self.running.pop(ref)
        try:
            value: Any = ray.get(ref, timeout=PART_TIMEOUT_S)
        except GetTimeoutError:
            raise ClusterNSError(
                f"Embeddings did not arrive from a worker within {PART_TIMEOUT_S:.0f} s.",
                f"Check the network between the nodes. {GO_ON}",
            ) from None
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, ClusterNSError):
                raise cause from None
            raise ClusterNSError(f"A worker failed: {type(cause).__name__}: {first_line(cause)}") from error
        except RayError as error:
            if not isinstance(error, RayActorError) and starts:
                raise ClusterNSError(f"A worker cannot start: {first_line(error)}") from error
            self._died(part, error)
            return None
        self.idle.append(worker)
        if part is None:
            self.failed_starts = 0
            return None
        return EncodedPart(*part, *value)

    def _died(self, part: Part | None, error: Exception) -> None:
        if part is None:
            self.failed_starts += 1
            if self.failed_starts >= ATTEMPTS:
                raise ClusterNSError(
                    f"{self.failed_starts} workers one after the other ended while they started. Is clusterns_ray "
                    f"installed on every node, with memory enough for the model? {first_line(error)}"
                ) from error
        else:
            number = part[0]
            self.deaths[number] = self.deaths.get(number, 0) + 1
            if self.deaths[number] >= ATTEMPTS:
                raise ClusterNSError(
                    f"{ATTEMPTS} workers ended over part {number + 1}, of {len(part[1])} sentences. Is there memory "
                    f"enough for a batch of {self.batch_size}? Use a smaller --batch-size. {first_line(error)}"
                ) from error
            self.note(f"A worker ended; part {number + 1} goes to another.")
            self.again.append(part)
        self._start_worker()

    def _too_late(self, limit: float) -> str:
        import ray

        if self.running:
            late = f"None of the {len(self.running)} parts at work was done within {limit:.0f} s."
            return f"{late} Check that the nodes are up. {GO_ON}"
        cpus = ray.cluster_resources().get("CPU", 0)
        return (
            f"No worker started within {limit:.0f} s. Asked for {self.count} workers with 1 CPU each; the cluster has "
            f"{cpus:.0f} CPUs, {ray.available_resources().get('CPU', 0):.0f} of them free. Ask for fewer --workers, or "
            "add nodes."
        )
