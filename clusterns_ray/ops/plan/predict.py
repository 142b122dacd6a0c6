"""Memory, exchanges, time, efficiency and cost for each number of workers.

Memory and disk are those of ``launch/estimates.py``, the formulas of a step those of ``step.py``; here they meet what
there is to do (``workload.py``) and the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clusterns_ray.config import Config
from clusterns_ray.errors import ConfigError
from clusterns_ray.launch.estimates import bank_bytes, checkpoint_bytes, step_memory
from clusterns_ray.ops.plan.quantities import bytes_text, read_quantity, read_workers
from clusterns_ray.ops.plan.step import BACKWARD, Network, exposed_seconds, nearest_possible
from clusterns_ray.ops.plan.workload import Workload, workload

MAX_PRICE = 1e12


@dataclass(frozen=True)
class Machine:
    """The machine of each worker; where a value is None, the plan leaves out what follows from it."""

    gpu: bool = False
    flops: float | None = None
    """Matrix products that a worker gets done, in FLOPs a second."""
    network: Network | None = None
    price: float | None = None
    """The price of a worker for an hour."""


def plan_for(
    config: Config,
    workers: str,
    *,
    bandwidth: str | None = None,
    latency: str = "50us",
    tflops: float | None = None,
    sentences: int | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """:func:`plan` from what is asked on the command line.

    Args:
        workers: what :func:`read_workers` reads.
        bandwidth, latency: what :func:`read_quantity` reads.
        tflops: matrix products of one worker, in 10^12 FLOPs a second.

    Raises:
        ConfigError, DataError: the request is wrong, or the encoder cannot be read.
    """
    counts = read_workers(workers)
    if tflops is not None and not 1e-9 <= tflops <= 1e9:
        raise ConfigError(f"--tflops is {tflops:g}.", "Give what a worker gets done, above 0.")
    if price is not None and not 0 <= price <= MAX_PRICE:
        raise ConfigError(f"--price is {price:g}.", f"Give what a worker costs for an hour, from 0 to {MAX_PRICE:g}.")
    latency_s = read_quantity("--latency", latency)
    bytes_a_s = read_quantity("--bandwidth", bandwidth) if bandwidth is not None else None
    import torch

    gpu = config.runtime.use_gpu if config.runtime.use_gpu is not None else torch.cuda.is_available()
    network = Network(bytes_a_s, latency_s, trees=gpu) if bytes_a_s else None
    return plan(workload(config, sentences), counts, Machine(gpu, tflops and tflops * 1e12, network, price))


def plan(work: Workload, workers: Sequence[int], machine: Machine) -> dict[str, Any]:
    """Predictions for each number of workers.

    Returns:
        Plain values: ``workers`` (one object for each number of workers that is possible), ``impossible`` (number to
        the nearest that are not), ``assumptions`` (in words). Bytes, seconds and FLOPs; what was not given leaves None.
    """
    shards = work.config.train.shards
    return {
        "global_batch_size": work.config.train.global_batch_size,
        "shards": shards,
        "sentences": work.sentences,
        "steps_per_epoch": work.steps_per_epoch,
        "parameters": work.size.all,
        "trained_parameters": work.size.trained,
        "checkpoint_bytes": checkpoint_bytes(work.size, work.config),
        "model_bytes": work.size.exported_bytes,
        "workers": [predict(work, n, machine) for n in workers if shards % n == 0],
        "impossible": {str(n): nearest_possible(n, shards) for n in workers if shards % n},
        "assumptions": [*work.assumptions, *_assumptions(work, machine)],
    }


def predict(work: Workload, workers: int, machine: Machine) -> dict[str, Any]:
    """What one worker needs and does, and how long a step and an epoch take, on ``workers`` of them.

    Efficiency is that of strong scaling, at the same global batch: ``t(1) / (n t(n))``.
    """
    batch = work.config.train.global_batch_size
    seconds = step_seconds(work, workers, machine)
    alone = step_seconds(work, 1, machine)
    step = None if seconds is None else sum(seconds.values())
    hours = None if step is None or work.steps_per_epoch is None else work.steps_per_epoch * step / 3600
    return {
        "workers": workers,
        "sentences_per_worker": batch / workers,
        "memory": step_memory(work.size, work.config, workers, gpu=machine.gpu),
        "flops": work.flops(workers),
        "sent_bytes": {exchange.what: exchange.sent(workers) for exchange in work.exchanges(workers, gpu=machine.gpu)},
        "seconds": seconds,
        "step_seconds": step,
        "sentences_per_second": step and batch / step,
        "efficiency": step and alone and sum(alone.values()) / (workers * step),
        "epoch_hours": hours,
        "epoch_cost": None if hours is None or machine.price is None else hours * workers * machine.price,
    }


def step_seconds(work: Workload, workers: int, machine: Machine) -> dict[str, float] | None:
    """Seconds of a step: ``compute``, of the busiest worker, and ``exchange``, in which it waits; None where the speed
    is not known, or with several workers the network."""
    network = machine.network
    if machine.flops is None or (network is None and workers > 1):
        return None
    compute, exchange = work.flops(workers) / machine.flops, 0.0
    if network is not None:
        share = BACKWARD / (2 + BACKWARD if work.encoder.cached else 1 + BACKWARD)
        exchange = exposed_seconds(
            work.exchanges(workers, gpu=machine.gpu),
            workers,
            network,
            backward_s=share * compute * workers / work.config.train.shards,
            last=work.encoder.embeddings / work.size.trained,
            overlaps=machine.gpu and not work.config.train.adds_in_tree(gpu=True),
        )
    return {"compute": compute, "exchange": exchange}


def _assumptions(work: Workload, machine: Machine) -> list[str]:
    config, network = work.config, machine.network
    lines = [
        "The global batch is the same for any number of workers, as the result depends on it; they divide its shards.",
        "Memory is for rows of the greatest length; a step is one after clustering has started.",
    ]
    if machine.flops is None:
        return [*lines, "No times: give --tflops, what a worker gets done."]
    lines.append(
        f"A worker gets {machine.flops / 1e12:g} TFLOP/s of matrix products done, as given. Left out: start-up, "
        "choosing rows, clipping, AdamW, dev evaluations and checkpoints."
    )
    if network is None:
        lines.append("No times for several workers: give --bandwidth, and --latency.")
    else:
        lines.append(
            f"Between any two workers {bytes_text(network.bandwidth)}/s and {1e6 * network.latency:g} us a message, by "
            + (
                "NCCL's paths; gradients go out while the last shard's backward pass runs."
                if machine.gpu
                else "gloo's paths; nothing is exchanged while a CPU computes."
            )
        )
    if bank_bytes(work.size, config):
        lines.append("Left out: filling the bank of the corpus, K-means over it, and encoding its rows anew.")
    if config.train.max_steps is not None:
        lines.append(f"An epoch is a whole pass; train.max_steps ends a run after {config.train.max_steps:,} steps.")
    if machine.price is not None and work.steps_per_epoch is None:
        lines.append("No cost: how many sentences the corpus has is not known; give --sentences.")
    elif machine.price is not None:
        lines.append(f"Cost: {machine.price:g} a worker and hour, as given.")
    return lines
