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
    """Rows of all workers, in order of rank: ``(b, ...)`` on each -> ``(workers * b, ...)``; gradients flow back.

    Every worker must bring the same number of rows. The gradient of a row is the *sum* of its gradients over
    all workers, so each worker's loss may use every row.
    """
    if world_size() == 1:
        return rows
    return _AllGatherRows.apply(rows)  # type: ignore[return-value]


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
        # Torch 2.13 calls it all_gather_single; this name is known to every version that is supported.
        dist.all_gather_into_tensor(gathered, rows.contiguous())  # pyright: ignore[reportDeprecated]
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # gloo has no reduce-scatter in every version: the all-reduce costs more bytes, and is B x D alone.
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()].contiguous()


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
