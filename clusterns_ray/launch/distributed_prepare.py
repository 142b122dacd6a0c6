"""``prepare --workers N``: the parts of a corpus tokenised by Ray Data, to the store that one process makes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import uuid
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from clusterns_ray.config import MAX_WORKERS, Config
from clusterns_ray.data import prepare as data
from clusterns_ray.data.prepare import Prepared, TokenJob
from clusterns_ray.data.token_parts import PartFiles
from clusterns_ray.data.token_store import MANIFEST, TokenPart, check_free, count_repeated, merge_parts, publish
from clusterns_ray.errors import ClusterNSError, ConfigError, DataError, first_line
from clusterns_ray.io.events import OnEvent, RowsDone, notes_to
from clusterns_ray.io.files import file_lock, json_text
from clusterns_ray.launch.capacity import check_room
from clusterns_ray.launch.ray_cluster import check_ray_directory, cluster_capacity, connect

ATTEMPTS = 4
"""How many workers may end over the same part. Ray Data itself gives a part to another worker without end."""

GO_ON = "The same command continues from the parts that are done."


def prepare(config: Config, on_event: OnEvent = lambda event: None, *, workers: int = 0) -> Prepared:
    """As :func:`clusterns_ray.data.prepare.prepare`, where a corpus of sentences is tokenised by Ray workers.

    They write to the cache: where ``runtime.storage_path`` is an object store, it alone has the tokens then.

    Args:
        workers: 0 works in this process; N on 1 to N Ray workers of one CPU each.

    Raises:
        ConfigError, DataError: as in one process.
        ClusterNSError: the work failed; finished parts are kept.
    """
    if not 0 <= workers <= MAX_WORKERS:
        raise ConfigError(f"--workers is {workers}; it must be 0, for this process, or up to {MAX_WORKERS:,}.")
    if not workers:
        return data.prepare(config, on_event)
    check_ray_directory()
    return data.prepare(config, on_event, lambda job, on_event: tokenise_on_ray(job, on_event, workers))


def tokenise_on_ray(job: TokenJob, on_event: OnEvent, workers: int) -> tuple[dict[str, Any], bool]:
    """Make a job's token store on Ray workers unless it exists.

    Returns:
        Its manifest, and whether it existed.
    """
    found = _stored(job)
    if found is not None:
        return found, True
    if job.cache.store is None:
        check_free(job.cache.local / job.name)
    files, note = PartFiles(job), notes_to(on_event)
    refusal = ClusterNSError(
        f"{str(files.records.local)!r} is being written by another process. Let it finish, or stop it; then run "
        "the same command."
    )
    parts: list[TokenPart] = []
    rows = 0
    with file_lock(files.records.local / ".lock", refusal):
        with connect(workers, note):
            check_room(cluster_capacity(), {"CPU": 1.0}, 1, "prepare")
            note(f"Tokenising {job.data.corpus} in {len(job.parts):,} parts on up to {workers} workers")
            try:
                with closing(_on_workers(files, workers)) as likely:
                    for part in files.in_order(likely):
                        parts.append(part)
                        rows += part.counts["kept"]
                        on_event(RowsDone("tokenised", rows))
                job.check_unchanged()
                manifest = merge_parts(parts, job.settings, job.fingerprint)
            except (ConfigError, DataError):  # corrected text is another corpus, for which the parts are of no use
                _discard(files)
                raise
        manifest["counts"]["repeated"] = count_repeated(manifest["files"], files.open)
        _complete(files, manifest)
    return manifest, False


def _on_workers(files: PartFiles, workers: int) -> Generator[TokenPart | None]:
    """What :meth:`PartFiles.make_likely` returns for each part in turn, made by tasks of Ray Data in a cluster that was
    joined.

    Raises:
        ClusterNSError: one part ends worker after worker, or what making it raises.
    """
    import ray.data
    from ray.exceptions import RayError

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    rows = [{"part": number} for number in range(len(files.job.parts))]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))  # a task a part
    dataset = dataset.map(_task(files), compute=ray.data.TaskPoolStrategy(size=workers), num_cpus=1)
    try:
        for row in dataset.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, Exception):
                raise result
            if result is not None and files.lacks(result):
                raise ClusterNSError(
                    f"A worker wrote {result.files[0]['name']}, but this process does not see it in "
                    f"{files.files.address!r}.",
                    "Put runtime.storage_path (or data.cache_dir) on a disk that all machines share, or in an object "
                    "store: s3://BUCKET/PREFIX.",
                )
            yield result
    except RayError as error:
        raise ClusterNSError(f"Ray failed: {first_line(error)}", f"Check the nodes. {GO_ON}") from error


def _task(files: PartFiles) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that makes the part of a row; it returns what is raised, which Ray would wrap."""
    command = uuid.uuid4().hex[:8]

    def work(number: int) -> TokenPart | None:
        if files.begin(number, command) > ATTEMPTS:
            raise ClusterNSError(
                f"Part {number + 1} of {len(files.job.parts)} failed: {ATTEMPTS} workers died while making it.",
                f"Check that the nodes have enough memory. {GO_ON}",
            )
        return files.make_likely(number)

    def call(row: dict[str, Any]) -> dict[str, Any]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each worker's tokenizer takes all cores of its machine
        try:
            return {"result": pickle.dumps(work(row["part"]))}
        except Exception as error:
            ours = isinstance(error, ClusterNSError | OSError)
            failed = error if ours else ClusterNSError(f"A worker failed: {type(error).__name__}: {first_line(error)}")
            return {"result": pickle.dumps(failed)}

    return call


def _stored(job: TokenJob) -> dict[str, Any] | None:
    """The manifest of a whole store of this job in the object store."""
    if job.cache.store is None or job.cache.store.manifest(job.name) is None:
        return None
    manifest = json.loads((job.cache.store / job.name).read(MANIFEST) or "{}")
    return manifest if manifest.get("fingerprint") == json.loads(json.dumps(job.fingerprint)) else None


def _complete(files: PartFiles, manifest: dict[str, Any]) -> None:
    """Give the store its manifest and its name, and remove what only its making needs."""
    name, cache, store, local = files.job.name, files.job.cache, files.files.store, files.files.local
    wanted = {file["name"]: {"bytes": file["size"], "sha256": file["sha256"]} for file in manifest["files"]}
    if store is None:
        for stray in set(os.listdir(local)) - set(wanted):
            (local / stray).unlink()
        publish(local, cache.local / name, manifest)
    else:
        for stray in set(store.names()) - set(wanted):
            store.delete(stray)
        text = json_text(manifest, indent=1).encode()
        store.write(MANIFEST, text)
        wanted[MANIFEST] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        assert cache.store is not None
        cache.store.complete_directory(name, wanted)
    cache.remove(files.records.local.name)


def _discard(files: PartFiles) -> None:
    if files.files.store is not None:
        files.job.cache.remove(files.job.name)
    files.job.cache.remove(files.records.local.name)
