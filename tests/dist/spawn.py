"""Functions run on several ranks at once: real processes, gloo over loopback, a deadline that kills what is left.

A server process imports the package once and every rank is forked from it, so that a fresh process costs little.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clusterns_ray.config import Config, make_config

_PRELOADED = [
    "clusterns_ray.training.loop",
    "clusterns_ray.data.prepare",
    "clusterns_ray.evaluation.sts",
    "pandas",
    "pyarrow.compute",
    "scipy.stats",
    "torch._dynamo",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.modeling_utils",
    "transformers.models.encoder_decoder",
    "transformers.tokenization_utils_sentencepiece",
    "transformers.tokenization_utils_tokenizers",
]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(_PRELOADED)


class RanksFailed(Exception):
    """A rank raised, died or did not end in time."""


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, deadline_s: float = 240.0) -> list[Any]:
    """What ``function(*arguments)`` returns on each of ``ranks`` processes, in order of rank.

    One rank has no process group, as a run without Ray has none. ``function`` is a module's own function.

    Raises:
        RanksFailed: with the traceback, or the exit code, of the ranks that failed first. The others are killed.
    """
    with TemporaryDirectory() as name:
        scratch = Path(name)
        processes = [
            _processes.Process(target=_rank, args=(scratch, rank, ranks, function, arguments), daemon=True)
            for rank in range(ranks)
        ]
        deadline = time.monotonic() + deadline_s
        try:
            for process in processes:
                process.start()
            waiting = list(processes)
            while waiting:
                if not wait([process.sentinel for process in waiting], timeout=deadline - time.monotonic()):
                    raise RanksFailed(f"{len(waiting)} of {ranks} ranks were not done after {deadline_s:.0f} s")
                waiting = [process for process in waiting if process.exitcode is None]
                _raise_failures(processes, scratch)
            return [_load(scratch / f"{rank}.pt") for rank in range(ranks)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                process.join(10)


def _raise_failures(processes: list[Any], scratch: Path) -> None:
    failed = [rank for rank, process in enumerate(processes) if process.exitcode not in (None, 0)]
    if failed:
        texts = [scratch / f"{rank}.error" for rank in failed]
        tracebacks = [text.read_text() for text in texts if text.exists()]
        codes = {rank: processes[rank].exitcode for rank in failed}
        raise RanksFailed(f"exit codes by rank {codes}\n" + "\n".join(tracebacks))


def _load(path: Path) -> Any:
    import torch

    return torch.load(path, weights_only=False)


def _rank(scratch: Path, rank: int, ranks: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    try:
        if ranks > 1:
            rendezvous, patience = f"file://{scratch / 'rendezvous'}", timedelta(seconds=30)
            dist.init_process_group("gloo", rendezvous, patience, rank=rank, world_size=ranks)
        result = function(*arguments)
        torch.save(result, scratch / f"{rank}.pt")
        if ranks > 1:
            dist.barrier()  # A rank that leaves early takes down connections that others still read from.
            dist.destroy_process_group()
    except BaseException:
        (scratch / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.exit(1)


def small_config(model: Path, corpus: Path, sts: Path | None, storage: Path, **sections: dict[str, Any]) -> Config:
    """20 steps of 32 sentences in 4 shards, fp32, everything logged; ``sections`` are laid over it."""
    values: dict[str, dict[str, Any]] = {
        "encoder": {"name": str(model), "num_layers": 2, "dropout": 0.1},
        "data": {"corpus": str(corpus), "cache_dir": str(storage / "cache")},
        "loss": {"bml_weight": 0.1, "bml_alpha": 0.05, "bml_beta": 0.2},
        "clustering": {"num_clusters": 6, "start_cosine": 0.8, "rate": 0.1},
        "train": {
            "global_batch_size": 32,
            "shards": 4,
            "epochs": 3,
            "max_steps": 20,
            "learning_rate": 4e-3,
            "precision": "fp32",
        },
        "evaluation": {"sts": str(sts) if sts else None, "every_steps": 5, "patience": None},
        "runtime": {"storage_path": str(storage), "name": "run", "use_gpu": False, "log_every_steps": 1},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    return make_config(values)
