"""A few real steps of a configuration in this process, timed: what ``plan`` takes a worker's speed from."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from clusterns_ray import distributed
from clusterns_ray.config import Config, make_config
from clusterns_ray.data.prepare import Prepared
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.io.object_store import local_copy
from clusterns_ray.ops.estimates import checkpoint_bytes
from clusterns_ray.ops.plan.quantities import duration_text
from clusterns_ray.ops.plan.step import Speed
from clusterns_ray.ops.plan.workload import Workload

if TYPE_CHECKING:
    from clusterns_ray.training.loop import Run

WARM_UP_STEPS = 2
"""Not counted: the first one creates the centroids, and allocators and caches fill."""


class Timed(NamedTuple):
    """Seconds of a step on one worker; medians."""

    step: float
    """all of it"""
    each_worker: float
    """of that, what does not shrink with more workers: choosing the rows, clipping, AdamW"""


def measure(
    config: Config, work: Workload, prepared: Prepared, *, steps: int, gpu: bool, note: Callable[[str], None]
) -> Speed:
    """Train a few steps, and write one checkpoint, in a directory that is removed again.

    Raises:
        ClusterNSError: the steps could not be run.
    """
    import torch

    from clusterns_ray.training.loop import Run

    # Clustering is on from the first step: nearly all steps of a run are after it has started.
    values = config.resolved()
    values["clustering"] |= {"start_cosine": 1.0, "init": "farthest_chain"}
    if config.clustering.scope == "corpus":  # what a step takes does not depend on how large the bank is
        few = max(config.clustering.num_clusters, 1024)
        values["clustering"]["bank_rows"] = min(config.clustering.bank_rows, few)
        values["clustering"] |= {"refresh_rows": 0, "recluster_every_steps": WARM_UP_STEPS + steps + 1}  # left out
    values["runtime"] |= {"num_workers": 0, "log_rows": False}
    settled = make_config(values)
    place = local_copy(config.runtime.storage_path, config.runtime.local_path)
    place.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if gpu else "cpu")
    threads_before = torch.get_num_threads()
    with (
        tempfile.TemporaryDirectory(prefix=".plan-", dir=place) as scratch,
        torch.random.fork_rng(devices=[device] if gpu else []),
    ):
        if not gpu:
            torch.set_num_threads(config.runtime.cpus_per_worker)
        try:
            run = Run(settled, prepared.tokens_dir, None, Path(scratch), device, lambda event: None, lambda _: None)
            note(f"Timing {WARM_UP_STEPS} + {steps} steps of {config.train.global_batch_size} sentences")
            timed = timed_steps(run, steps, lambda done: note(f"  {done} steps"))
            began = time.perf_counter()
            run.save()
            checkpoint_s = time.perf_counter() - began
            checkpoint_s *= checkpoint_bytes(work.size, config) / checkpoint_bytes(work.size, settled)
        except torch.OutOfMemoryError as error:
            raise ClusterNSError(
                f"--measure: the memory of this GPU is not enough for one worker ({str(error).splitlines()[0]}). "
                "Set train.cache_chunk, or give --tflops."
            ) from error
        finally:
            torch.set_num_threads(threads_before)
    flops = work.flops(1) / (timed.step - timed.each_worker)
    threads = config.runtime.cpus_per_worker
    where = "one GPU" if gpu else f"a CPU by {threads} thread{'s' if threads > 1 else ''}"
    return Speed(
        flops,
        f"Measured here on {where}, median of {steps} steps: {duration_text(timed.step)} a step, of which "
        f"{duration_text(timed.each_worker)} choosing rows, clipping and AdamW; {duration_text(checkpoint_s)} for a "
        f"checkpoint, to this disk: {flops / 1e12:.3g} TFLOP/s.",
        timed.each_worker,
        checkpoint_s,
    )


def timed_steps(run: Run, steps: int, progress: Callable[[int], None] = lambda done: None) -> Timed:
    """Take steps as ``training/loop.py`` does, on all workers together, and time those after the warm-up."""
    import torch

    from clusterns_ray.training.optim import learning_rate

    def now() -> float:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return time.perf_counter()

    whole, chosen, updated = [], [], []
    progressed = time.monotonic()
    for step in range(WARM_UP_STEPS + steps):
        distributed.barrier()
        times = [now()]
        layout, shards = run.batch(step % run.total_steps)
        times.append(now())
        views = run.encode(shards)
        loss = run.objective(views.z1_bD, views.z2_bD, layout, views.mlm, run.teacher_embeddings(shards))
        rate = learning_rate(step % run.total_steps, run.total_steps, run.config.train)
        run.optimizer.step(loss.scaled_loss, rate, views.backward)
        times.append(now())
        # The same update once more, alone, as that of the step is behind the backward pass.
        torch.nn.utils.clip_grad_norm_(run.optimizer.parameters, run.optimizer.max_grad_norm)
        run.optimizer.adamw.step()
        times.append(now())
        run.state.step = step + 1
        if step >= WARM_UP_STEPS:
            whole.append(times[2] - times[0])
            chosen.append(times[1] - times[0])
            updated.append(times[3] - times[2])
        if time.monotonic() - progressed > 5:
            progressed = time.monotonic()
            progress(step + 1)
    return Timed(statistics.median(whole), statistics.median(chosen) + statistics.median(updated))
