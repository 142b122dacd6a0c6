"""What ``train.precision: auto`` means on the machines of a run."""

from __future__ import annotations

import torch

from clusterns_ray import distributed

FAST_BF16 = ("avx512_bf16", "amx_bf16")
"""Instructions with which a processor multiplies in bfloat16 at least as fast as in float32."""


def agreed_precision(asked: str, device: torch.device) -> str:
    """``auto``: bf16 where the devices of all workers multiply in it, else fp32. One exchange of one number."""
    if asked != "auto":
        return asked
    without = distributed.all_reduce_sum(torch.tensor(0 if multiplies_bf16(device) else 1, device=device))
    return "fp32" if without else "bf16"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for it; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # A torch without this function is taken to run on a processor without these instructions.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name) for name in FAST_BF16)
