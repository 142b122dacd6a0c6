"""Collectives: the only importer of torch.distributed. Everything works without a process group, as one worker."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import torch
import torch.cuda.nccl
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def grouped() -> bool:
    """Whether there is a process group (of one worker or more)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if grouped() else 0


def world_size() -> int:
    return dist.get_world_size() if grouped() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over workers, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Worker 0's values on every worker, in place; no gradient."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Worker 0's value (small, picklable) on every worker."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The values of all workers (small, picklable), in order of rank, on every worker."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_gather_rows(rows: Tensor) -> Tensor:
    """Rows of all workers, in order of rank: ``(b, ...)`` on each -> ``(workers * b, ...)``; no gradient.

    Every worker must bring the same number of rows.
    """
    if world_size() == 1:
        return rows
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    # Torch 2.13 calls it all_gather_single; this name is known to every version that is supported.
    dist.all_gather_into_tensor(gathered, rows.contiguous())  # pyright: ignore[reportDeprecated]
    return gathered


def exchange_slices(numbers_NP: Tensor, counts: list[int]) -> list[Tensor]:
    """Each worker's slice of the numbers of all workers, no gradient: ``(n, P)`` on each, where P is a multiple of the
    number of workers -> for every worker its ``(n, P / workers)``.

    Args:
        counts: the rows n that each worker brings.
    """
    workers = world_size()
    width = numbers_NP.shape[1] // workers
    sent = numbers_NP.view(len(numbers_NP), workers, width).transpose(0, 1).contiguous()
    received = numbers_NP.new_empty(sum(counts) * width)
    sizes = [count * width for count in counts]
    dist.all_to_all_single(received, sent.view(-1), sizes, [sent[0].numel()] * workers)
    return [part.view(-1, width) for part in torch.split(received, sizes)]


def nccl_version() -> str | None:
    """The version of the NCCL that torch exchanges by between GPUs; None where it has none."""
    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    """``module`` with its gradients averaged over workers; itself without a process group.

    Centroids and other state are kept equal by construction, so buffers are not broadcast.
    """
    if world_size() == 1:
        return module
    device = next(module.parameters()).device
    return DistributedDataParallel(
        module, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
    )
