"""Fused AdamW: clipping, a schedule that is a function of the step, no update from a gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clusterns_ray.config import TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step ``step`` (0-based): a linear rise over ``warmup_ratio`` of the steps, then a fall to 0.

    As in transformers' schedules, the first step after the warm-up has the peak rate and the last step 1/n of it.
    """
    warmup = round(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate


class Optimizer:
    """AdamW whose step is skipped, on the device, when the gradient is not finite on any worker.

    DDP averages gradients, so one worker's NaN is every worker's NaN, and all skip together without asking.
    fp16 scales the loss up and halves the scale after such a step; other precisions count it (`skipped`).
    """

    def __init__(self, module: nn.Module, config: TrainConfig, precision: str, device: torch.device) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.max_grad_norm = config.max_grad_norm
        self.adamw: torch.optim.Optimizer = torch.optim.AdamW(
            decay_groups(module.named_parameters(), config.weight_decay), lr=config.learning_rate, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.not_finite = torch.zeros((), device=device)
        """1 where the gradients last clipped were not finite, else 0"""
        self.skipped: Tensor = torch.zeros(2, device=device)
        """steps skipped since the run began, and in a row up to now"""

    def zero_grad(self) -> None:
        """Forget the gradients of the step before."""
        self.adamw.zero_grad(set_to_none=True)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward()`` on: in fp16 it is scaled up, so that small gradients do not vanish."""
        return self.scaler.scale(loss)

    def clip_gradients(self) -> Tensor:
        """Scale the gradients back, and down to ``train.max_grad_norm``; record on the device if they are finite.

        Returns:
            The gradient norm before clipping, 0-d, on the device.
        """
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.adamw)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.not_finite = (~norm.isfinite()).float()
        self.skipped = (self.skipped + self.not_finite) * torch.stack(
            [torch.ones_like(self.not_finite), self.not_finite]
        )
        return norm

    def step(self, rate: float) -> None:
        """Update the weights with learning rate ``rate``, unless the gradients of :meth:`clip_gradients` are not
        finite."""
        for group in self.adamw.param_groups:
            group["lr"] = rate
        if self.scaler.is_enabled():
            self.scaler.step(self.adamw)
            self.scaler.update()
        else:
            # As a gradient scaler sets them for a fused optimiser, but without its wait for the device.
            self.adamw.found_inf = self.not_finite  # type: ignore[attr-defined]
            self.adamw.grad_scale = None  # type: ignore[attr-defined]
            self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "adamw": self.adamw.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"].to(self.skipped.device)


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for biases and the scales of norms, which are vectors."""
    trainable = [parameter for _, parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
