"""Memory, exchanges, time, efficiency and cost for each number of workers.

Memory and disk are those of ``launch/estimates.py``, the formulas of a step those of ``step.py``; here they meet what
there is to do (``workload.py``) and the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from clusterns_ray.config import Config
from clusterns_ray.errors import ConfigError
from clusterns_ray.ops.estimates import FLOAT, bank_bytes, checkpoint_bytes, held_shards, worker_memory
from clusterns_ray.ops.plan import step as model
from clusterns_ray.ops.plan.quantities import bytes_text, read_quantity, read_workers
from clusterns_ray.ops.plan.step import Exchange, Machine, Network, Speed, StepSeconds
from clusterns_ray.ops.plan.workload import Workload, workload

MAX_PRICE = 1e12


def plan_for(
    config: Config,
    workers: str,
    *,
    bandwidth: str | None = None,
    latency: str = "50us",
    tflops: float | None = None,
    measured_steps: int = 0,
    sentences: int | None = None,
    price: float | None = None,
    cores: int | None = None,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """:func:`plan` from what is asked on the command line.

    Args:
        workers: as of :func:`read_workers`.
        bandwidth, latency: as of :func:`read_quantity`.
        tflops: matrix products of one worker, in 10^12 FLOPs a second.
        measured_steps: times so many steps in this process instead; 0 does not.
        on_event: called with what is done (see ``clusterns_ray.training.loop.OnEvent``).

    Raises:
        ConfigError, DataError: the request is wrong, or the encoder cannot be read.
        ClusterNSError: the steps could not be run.
    """

    def note(text: str) -> None:
        on_event({"event": "note", "text": text})

    counts = read_workers(workers)
    if tflops is not None and (measured_steps or not (1e-9 <= tflops <= 1e9)):
        raise ConfigError(
            "--tflops and --measure exclude each other, as both tell a worker's speed. Give one."
            if measured_steps
            else f"--tflops is {tflops:g}: give what a worker gets done, above 0, or --measure."
        )
    if price is not None and not 0 <= price <= MAX_PRICE:
        raise ConfigError(f"--price is {price:g}: give what a worker costs for an hour, from 0 to {MAX_PRICE:g}.")
    latency_s = read_quantity("--latency", latency)
    bytes_a_s = read_quantity("--bandwidth", bandwidth) if bandwidth is not None else None
    speed = prepared = None
    if tflops is not None:
        speed = Speed(
            tflops * 1e12,
            f"A worker gets {tflops:g} TFLOP/s of matrix products done, as given. Choosing rows, clipping, AdamW and "
            "writing checkpoints are not in the times; --measure counts them.",
        )
    import torch

    gpu = config.runtime.use_gpu if config.runtime.use_gpu is not None else torch.cuda.is_available()
    if measured_steps:
        from clusterns_ray.data.prepare import prepare
        from clusterns_ray.launch.preflight import check_data, check_encoder, check_storage

        if gpu and not torch.cuda.is_available():
            raise ConfigError("--measure: runtime.use_gpu is true, but torch sees no GPU here. Give --tflops instead.")
        check_data(config)
        config = check_encoder(config)
        check_storage(config)
        prepared = prepare(config, note, lambda rows: on_event({"event": "tokenised", "rows": rows}))
    work = workload(config, sentences, prepared)
    if prepared is not None:
        from clusterns_ray.ops.plan.measure import measure

        speed = measure(config, work, prepared, steps=measured_steps, gpu=gpu, note=note)
    network = Network(bytes_a_s, latency_s, trees=gpu) if bytes_a_s else None
    return plan(work, counts, Machine(gpu, speed, network, price, cores))


def plan(work: Workload, workers: Sequence[int], machine: Machine) -> dict[str, Any]:
    """Predictions for each number of workers.

    Returns:
        Plain values: ``workers`` (one object a number of workers that is possible), ``impossible`` (number to the
        nearest that are not), ``assumptions`` (in words). Bytes, seconds and FLOPs; what was not given leaves None.
    """
    shards = work.config.train.shards
    possible = [n for n in workers if shards % n == 0]
    return {
        "global_batch_size": work.config.train.global_batch_size,
        "shards": shards,
        "sentences": work.sentences,
        "steps_per_epoch": work.steps_per_epoch,
        "parameters": work.size.all,
        "trained_parameters": work.size.trained,
        "checkpoint_bytes": checkpoint_bytes(work.size, work.config),
        "model_bytes": work.size.exported_bytes,
        "workers": [predict(work, n, machine) for n in possible],
        "impossible": {str(n): model.nearest_possible(n, shards) for n in workers if shards % n},
        "assumptions": [*work.assumptions, *_assumptions(work, machine)],
    }


def predict(work: Workload, workers: int, machine: Machine) -> dict[str, Any]:
    """What one worker needs and does, and how long a step and an epoch take, on ``workers`` of them."""
    config = work.config
    batch = config.train.global_batch_size
    exchanges = work.exchanges()
    step = step_seconds(work, workers, machine)
    every = config.runtime.checkpoint_every_steps or config.evaluation.every_steps
    checkpoint = checkpoint_bytes(work.size, config)
    found: dict[str, Any] = {
        "workers": workers,
        "sentences_per_worker": batch / workers,
        "memory": memory(work, workers, gpu=machine.gpu),
        "flops": work.flops(workers),
        "sent_bytes": {exchange.what: exchange.sent(workers) for exchange in exchanges},
        "seconds": None,
        "step_seconds": None,
        "sentences_per_second": None,
        "efficiency": None,
        "evaluation_share": None,
        "checkpoint_bytes_per_hour": None,
        "epoch_hours": None,
        "epoch_cost": None,
    }
    if step is None:
        return found
    alone = step_seconds(work, 1, machine)
    assert alone is not None
    steps = work.steps_per_epoch
    hours = steps and steps * step.total / 3600
    return {
        **found,
        "seconds": asdict(step),
        "step_seconds": step.total,
        "sentences_per_second": batch / step.total,
        "efficiency": model.efficiency(alone.total, step.total, workers),
        "evaluation_share": step.evaluation / step.total,
        "checkpoint_bytes_per_hour": checkpoint * 3600 / (every * step.total),
        "epoch_hours": hours,
        "epoch_cost": None if hours is None or machine.price is None else hours * workers * machine.price,
    }


def memory(work: Workload, workers: int, *, gpu: bool) -> dict[str, int]:
    """Bytes of a worker where it computes: those of ``estimates.worker_memory``, and what is of the whole batch.

    ``keys``: B x D float32 in three copies, as gathered, in canonical order, and normalised; one worker has only the
    last. ``clusters``: K x D float32 in four: centroids, those at the last evaluation, the sums, and where they go.
    ``bank``: that of the corpus, where there is one; on a CPU a memory-mapped file.
    """
    train, width = work.config.train, work.size.width
    found = asdict(worker_memory(work.size, held_shards(train, workers) * workers, workers, gpu=gpu))
    found["keys"] = FLOAT * train.global_batch_size * width * (3 if workers > 1 else 1)
    found["clusters"] = 4 * FLOAT * work.config.clustering.num_clusters * width
    found["bank"] = bank_bytes(work.size, work.config)
    return {**found, "total": sum(found.values())}


def step_seconds(work: Workload, workers: int, machine: Machine) -> StepSeconds | None:
    """None where the speed is not known, or with several workers the network."""
    speed, network = machine.speed, machine.network
    if speed is None or (network is None and workers > 1):
        return None
    config = work.config
    longer = model.shared_cores(workers, config.runtime.cpus_per_worker, machine.cores) / speed.flops
    compute = work.flops(workers) * longer
    exchange = evaluation = 0.0
    if work.evaluation:
        evaluation = model.busiest_evaluator(work.evaluation, workers) * longer
    if network is not None:
        share = model.BACKWARD / (2 + model.BACKWARD if work.encoder.cached else 1 + model.BACKWARD)
        exchange = model.exposed_seconds(
            work.exchanges(),
            workers,
            network,
            backward_s=share * compute * workers / config.train.shards,
            last=work.encoder.embeddings / work.size.trained,
            overlaps=machine.gpu,
        )
        gathered = Exchange("embeddings", "all_reduce", FLOAT * work.evaluated * work.size.width)
        evaluation += gathered.seconds(workers, network) if work.evaluated else 0.0
    every = config.runtime.checkpoint_every_steps or config.evaluation.every_steps
    return StepSeconds(
        compute=compute,
        each_worker=speed.each_worker_s * longer * speed.flops,
        exchange=exchange,
        evaluation=evaluation / config.evaluation.every_steps,
        checkpoint=speed.checkpoint_s / every,
    )


def _assumptions(work: Workload, machine: Machine) -> list[str]:
    config = work.config
    found = [
        "The global batch is the same for any number of workers, as the result depends on it; they divide its shards.",
        "Memory is for rows of the greatest length; a step is one after clustering has started. Start-up is left out.",
    ]
    if machine.speed is None:
        found.append("No times: give --tflops (what a worker gets done), or --measure to time steps here.")
        return found
    found.append(machine.speed.source)
    if machine.network is None:
        found.append("No times for several workers: give --bandwidth, and --latency.")
    else:
        path = "NCCL" if machine.gpu else "gloo"
        found.append(
            f"Between any two workers {bytes_text(machine.network.bandwidth)}/s and "
            f"{1e6 * machine.network.latency:g} us a message, by {path}'s paths; "
            + (
                "gradients go out while the last shard's backward pass runs."
                if machine.gpu
                else "nothing is exchanged while a CPU computes."
            )
        )
    if machine.cores is not None:
        found.append(f"All workers share {machine.cores} cores; that memory bandwidth is shared too is not counted.")
    if bank_bytes(work.size, config):
        found.append("Left out: filling the bank of the corpus, K-means over it, and encoding its rows anew.")
    if config.train.max_steps is not None:
        found.append(f"An epoch is a whole pass; train.max_steps ends a run after {config.train.max_steps:,} steps.")
    if machine.price is not None:
        found.append(f"Cost: {machine.price:g} a worker and hour, as given.")
    return found
