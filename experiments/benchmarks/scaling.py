"""Seconds a step with 1, 2 and 4 processes on this machine, beside what `clusterns plan` expects of them.

    CLUSTERNS_DATA=/data python experiments/benchmarks/scaling.py experiments/minilm-cpu.yaml --json scaling.json

The same global batch each time, one thread a process, gloo over loopback; medians of several interleaved rounds. The
plan is given the step of one process, how fast gloo sums on loopback (timed here, with nothing else to do), and how
many cores all share. A third figure shows what it leaves out: the workers' shares side by side, each a run of its own
that exchanges nothing. Where that is more than the plan's computing, processes wait for one another's memory and
caches; where the step is more than both, exchanges and computing share the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from racing import quiet_run, take_step
from torch.multiprocessing.spawn import ProcessException, start_processes

from clusterns_ray.config import Config, load_config, make_config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.io.files import check_writable, write_atomic
from clusterns_ray.ops.plan.predict import Machine, step_seconds
from clusterns_ray.ops.plan.quantities import read_workers
from clusterns_ray.ops.plan.step import Network, gradient_exchange
from clusterns_ray.ops.plan.workload import Workload, workload

WARM_UP_STEPS = 2
"""Not counted: the first one creates the centroids, and allocators and caches fill."""
TRIES = 7
"""Times that a sum over all workers is taken; the median counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--workers", default="1,2,4", help="1 is always among them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed in each round, after a warm-up")
    parser.add_argument("--threads", type=int, default=1, help="above 1: also time one process with this many")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="that all workers share")
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds for each start of processes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.json is not None:
        check_writable(arguments.json, "--json")
    counts = sorted({1, *read_workers(arguments.workers)})
    settings = [*arguments.set, "evaluation.sts=null", "evaluation.also=[]", "runtime.num_workers=0"]
    config = load_config(arguments.config, settings)
    for workers in counts:
        share_of(config, workers)
    with tempfile.TemporaryDirectory(prefix="scaling-") as storage:
        config = changed(config, "runtime", storage_path=storage, trackers=[], use_gpu=False, cpus_per_worker=1)
        config = changed(config, "clustering", start_cosine=1.0, init="farthest_chain")
        prepared = prepare(config, lambda text: print(text, file=sys.stderr, flush=True))
        outcomes = measure(config, prepared.tokens_dir, counts, arguments)
        result = compare(workload(config), outcomes, arguments)
    print_result(result)
    if arguments.json is not None:
        write_atomic(arguments.json, json.dumps(result, indent=2) + "\n")
        print(f"Wrote {arguments.json}")


def changed(config: Config, section: str, **values: Any) -> Config:
    tree = config.resolved()
    tree[section] |= values
    return make_config(tree)


def share_of(config: Config, workers: int) -> Config:
    """A run of as many sentences a step as one of ``workers`` has; ConfigError where they cannot share the shards."""
    config = changed(config, "runtime", num_workers=workers)
    train = config.train
    batch = train.global_batch_size // workers
    values = config.resolved()
    values["clustering"]["num_clusters"] = min(config.clustering.num_clusters, batch)
    values["train"] |= {"global_batch_size": batch, "shards": train.shards // workers}
    values["runtime"]["num_workers"] = 0
    return make_config(values)


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(
    config: Config, tokens_dir: Path, counts: list[int], arguments: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """The outcomes of every round, by what was run: ``together 2``, ``apart 2``, ``threads 2``."""
    cases = {f"together {n}": (config, n, 1, True) for n in counts}
    cases |= {f"apart {n}": (share_of(config, n), n, 1, False) for n in counts if n > 1}
    if arguments.threads > 1:
        cases[f"threads {arguments.threads}"] = config, 1, arguments.threads, True
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for number in range(arguments.rounds):
        for name, (settings, workers, threads, grouped) in cases.items():
            began = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="scaling-") as scratch:
                job = (settings.resolved(), str(tokens_dir), workers, threads, grouped, arguments.steps, scratch)
                run_processes(job, workers, arguments.deadline)
                outcome = json.loads((Path(scratch) / "0.json").read_text())
            outcomes[name].append(outcome)
            print(
                f"round {number + 1} of {arguments.rounds}, {name}: {outcome['step']:.3f} s a step "
                f"({time.perf_counter() - began:.0f} s in all)",
                file=sys.stderr,
                flush=True,
            )
    return outcomes


def run_processes(job: tuple[object, ...], workers: int, deadline_s: float) -> None:
    """Run :func:`rank` on each of ``workers`` processes; none is left behind."""
    context = start_processes(rank, job, nprocs=workers, join=False, start_method="spawn")
    assert context is not None
    ends = time.monotonic() + deadline_s
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > ends:
                raise ClusterNSError(
                    f"{workers} processes were not done after {deadline_s:.0f} s. Is the machine busy? Raise "
                    "--deadline."
                )
    finally:
        for process in filter(None, context.processes):
            if process.is_alive():
                process.kill()
            process.join(10)


def rank(
    number: int,
    values: dict[str, Any],
    tokens_dir: str,
    workers: int,
    threads: int,
    grouped: bool,
    steps: int,
    scratch: str,
) -> None:
    """One process: take steps, alone or with the others, and write what they took."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(threads)
    config = make_config(values)
    if grouped and workers > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", f"file://{scratch}/rendezvous", timedelta(seconds=300), rank=number, world_size=workers
        )
    run = quiet_run(config, Path(tokens_dir), Path(scratch))
    run.warm_up_reducer()
    timed = timed_steps(run, steps)
    sums = {}
    if dist.is_initialized():
        size = sum(p.numel() for p in run.encoder.parameters() if p.requires_grad)
        sums = {"small_s": seconds_of_a_sum(1), "large_s": seconds_of_a_sum(size)}
    outcome = {**timed, **sums}
    (Path(scratch) / f"{number}.json").write_text(json.dumps(outcome))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def timed_steps(run: Any, steps: int) -> dict[str, float]:
    """Medians of the seconds of a step, and of what does not shrink with more workers: choosing the rows, clipping and
    AdamW, which are done once more, alone, after each step."""
    times = []
    for number in range(WARM_UP_STEPS + steps):
        if dist.is_initialized():
            dist.barrier()
        times.append([time.perf_counter()])
        take_step(run, number % run.total_steps)
        times[-1].append(time.perf_counter())
        run.batch(number % run.total_steps)
        torch.nn.utils.clip_grad_norm_(run.optimizer.parameters, run.optimizer.max_grad_norm)
        run.optimizer.adamw.step()
        times[-1].append(time.perf_counter())
    step, each_worker = np.median(np.diff(times[WARM_UP_STEPS:]), axis=0).tolist()
    return {"step": step, "each_worker": each_worker}


def seconds_of_a_sum(numbers: int) -> float:
    """Seconds of a sum of ``numbers`` float32 numbers over all workers."""
    tensor = torch.zeros(numbers)
    taken = []
    for _ in range(TRIES):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def loopback(small_s: float, large_s: float, size: float, workers: int) -> Network:
    """Latency and bandwidth that explain a sum of one number and one of ``size`` bytes around a ring."""
    turns = 2 * (workers - 1)
    return Network(turns / workers * size / max(large_s - small_s, 1e-9), small_s / turns, trees=False)


# ---- comparing ------------------------------------------------------------------------------------------------------


def compare(work: Workload, outcomes: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    def median(case: str, key: str = "step") -> float:
        return statistics.median(outcome[key] for outcome in outcomes[case])

    alone = median("together 1")
    each_worker = median("together 1", "each_worker")
    flops = work.flops(1) / (alone - each_worker)
    rows = []
    for case in outcomes:
        kind, count = case.split()
        if kind != "together":
            continue
        workers = int(count)
        network = None
        if workers > 1:
            sizes = median(case, "small_s"), median(case, "large_s")
            network = loopback(*sizes, gradient_exchange(work.size.trained).size, workers)
        longer = max(1.0, workers / arguments.cores)  # as they share the cores
        expected = step_seconds(work, workers, Machine(flops=flops / longer, network=network))
        assert expected is not None
        compute = expected["compute"] + longer * each_worker
        planned = compute + expected["exchange"]
        apart = median(f"apart {workers}") if workers > 1 else alone
        measured = median(case)
        rows.append(
            {
                "workers": workers,
                "measured_s": measured,
                "rounds_s": [outcome["step"] for outcome in outcomes[case]],
                "planned_s": planned,
                "planned_compute_s": compute,
                "planned_exchange_s": expected["exchange"],
                "apart_s": apart,
                "with_apart_s": apart + expected["exchange"],
                "efficiency": alone / (workers * measured),
                "planned_efficiency": alone / (workers * planned),
                "loopback": network and {"bytes_per_second": network.bandwidth, "latency_s": network.latency},
            }
        )
    threads = {case.split()[1]: median(case) for case in outcomes if case.startswith("threads")}
    return {
        "config": {"file": Path(arguments.config).name, "set": arguments.set},  # its paths are this machine's
        "cores": arguments.cores,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "flops": work.flops(1),
        "flops_per_second": flops,
        "each_worker_s": each_worker,
        "one_process_with_threads_s": threads,
        "workers": rows,
    }


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['flops_per_second'] / 1e9:.1f} GFLOP/s by one process; {result['cores']} cores; seconds a step:")
    print("workers  measured  planned  (computing + exchange)  shares side by side, no exchange  efficiency  planned")
    for row in result["workers"]:
        print(
            f"{row['workers']:7d}  {row['measured_s']:8.3f}  {row['planned_s']:7.3f}  "
            f"({row['planned_compute_s']:9.3f} + {row['planned_exchange_s']:8.3f})  {row['apart_s']:32.3f}  "
            f"{100 * row['efficiency']:8.0f} %  {100 * row['planned_efficiency']:5.0f} %"
        )
    for threads, seconds in result["one_process_with_threads_s"].items():
        print(f"One process with {threads} threads: {seconds:.3f} s a step")


if __name__ == "__main__":
    try:
        main()
    except (ClusterNSError, ProcessException) as error:
        sys.exit(f"error: {error}")
