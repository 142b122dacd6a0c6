"""Whether tensors hold NaN or infinity; cheap enough for every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None where none does.

    Sums are looked at first, as they read each value once; their device is waited for once.
    """
    named = [(name, tensor.detach()) for name, tensor in tensors]
    if not named or bool(torch.stack([tensor.sum().isfinite() for _, tensor in named]).all()):
        return None
    # A sum of large finite values may overflow.
    return next((name for name, tensor in named if not bool(tensor.isfinite().all())), None)
