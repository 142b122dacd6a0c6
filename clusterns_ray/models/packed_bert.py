"""BERT and its like over packed tokens: what transformers computes of a padded batch, without the padding.

Several batches go through in one pass. The residual stream and the norms are float32, products are in the dtype asked
for, each weight is cast once a pass. For all other architectures transformers' own forward pass is taken.

Shape suffixes: N tokens of all rows of all batches, R of these, D width, I and O in- and outputs of a layer.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clusterns_ray.kernels.dropout import drop, head_keys, token_keys
from clusterns_ray.kernels.packed_attention import Packing, UnpackIndex, packed_attention
from clusterns_ray.kernels.transfer import to_device
from clusterns_ray.models.backbone import first_position

PACKABLE = ("bert", "roberta", "xlm-roberta", "camembert")
"""Architectures of transformers whose modules are those of BERT, by name and by what they do."""


def can_pack(backbone: Any) -> bool:
    """Whether :class:`PackedBert` computes what this model would: it is one of these, with nothing added to it."""
    config = backbone.config
    if getattr(config, "model_type", "") not in PACKABLE:
        return False
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return False
    read = [*backbone.embeddings.modules(), *backbone.encoder.modules()]
    if any(module._forward_hooks or module._forward_pre_hooks for module in read):
        return False
    # An adapter or a quantised layer is another type.
    linears = [linear for layer in backbone.encoder.layer for group in _linears(layer) for linear in group]
    return all(type(linear) is nn.Linear and linear.weight.dtype == torch.float32 for linear in linears)


def _linears(layer: Any) -> tuple[list[nn.Linear], ...]:
    """Those that :class:`Layer` names, together what reads the same."""
    attention = layer.attention
    heads = [attention.self.query, attention.self.key, attention.self.value]
    return heads, [attention.output.dense], [layer.intermediate.dense], [layer.output.dense]


class Linear(NamedTuple):
    """Weights as they are multiplied."""

    weight: Tensor
    """(O, I); where nothing is trained perhaps in a layout of oneDNN's own"""
    bias_O: Tensor

    @classmethod
    def of(cls, layers: Sequence[nn.Linear], dtype: torch.dtype) -> Linear:
        """Join the weights of layers that read the same states, so that one product computes them all."""
        weights: list[Tensor] = [layer.weight for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers]
        weight = (weights[0] if len(layers) == 1 else torch.cat(weights)).to(dtype)
        bias_O = (biases[0] if len(layers) == 1 else torch.cat(biases)).to(dtype)
        if not torch.is_grad_enabled() and weight.device.type == "cpu" and onednn_multiplies(dtype):
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        return cls(weight, bias_O)

    def __call__(self, x_NI: Tensor) -> Tensor:
        return _Linear.apply(x_NI, self.weight, self.bias_O)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    """``torch.nn.functional.linear`` by :func:`multiply`, where the weight's gradient alone is torch's own product."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return multiply(x_NI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_NI, weight_OI = ctx.saved_tensors
        (d_NO,) = gradients
        return multiply(d_NO, weight_OI.t(), None), d_NO.t() @ x_NI, d_NO.sum(dim=0)


def multiply(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """``x W' + b``: (N, O), by oneDNN where it can, in the way of torch's compiler.

    In float32 it is faster than MKL; in bfloat16 torch's own product copies the bias first (measured:
    experiments/LOG.md).
    """
    if x_NI.device.type == "cpu" and onednn_multiplies(x_NI.dtype):
        return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
    return F.linear(x_NI, weight_OI, bias_O)


@cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN, and that multiplies numbers of this kind on this processor."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class Layer(NamedTuple):
    queries_keys_values: Linear
    attended: Linear
    up: Linear
    down: Linear
    module: Any
    """of transformers: its norms, activation and probabilities"""


class PackedBert:
    """The layers of a model that :func:`can_pack`, its weights in ``dtype``; they follow the model's no further."""

    def __init__(self, backbone: Any, dtype: torch.dtype) -> None:
        self.backbone, self.dtype, self.first = backbone, dtype, first_position(backbone)
        self.heads = backbone.config.num_attention_heads
        self.layers = []
        for module in backbone.encoder.layer:
            heads, attended, up, down = (Linear.of(group, dtype) for group in _linears(module))
            self.layers.append(Layer(heads, attended, up, down, module))

    def __call__(
        self,
        token_embeds_ND: Tensor,
        packings: Sequence[Packing],
        row_keys: Sequence[np.ndarray] | None = None,
        *,
        draws: Sequence[int] | None = None,
        read_R: Tensor | None = None,
        all_layers: bool = False,
    ) -> list[Tensor]:
        """float32 states of the last layer, or of all of them, that of the embeddings first; each (N, D).

        Args:
            token_embeds_ND: word embeddings of the packed batches, one batch after the other.
            row_keys: of dropout, of each batch's rows in every draw, the first draw first; no dropout without.
            draws: how many times each batch goes in, once unless said. It is dropout that makes them differ, and
                what comes before the first is computed once.
            read_R: the tokens whose states in the last layer are read: it computes nothing but its keys and values for
                the others, and its states are (R, D).
        """
        embeddings = self.backbone.embeddings
        positions_N = torch.cat([packing.positions_N for packing in packings]) + self.first
        x_ND = (
            token_embeds_ND + embeddings.token_type_embeddings.weight[0] + embeddings.position_embeddings(positions_N)
        )
        x_ND = embeddings.LayerNorm(x_ND)
        if draws is not None and max(draws) > 1:
            parts = zip(x_ND.split([len(packing) for packing in packings]), draws, strict=True)
            x_ND = torch.cat([x for x, n in parts for _ in range(n)])
            packings = [packing.times(n) for packing, n in zip(packings, draws, strict=True)]

        apart = [UnpackIndex.of(packing, self.heads, self.dtype) for packing in packings]
        keys_N, query_keys = None, None
        if row_keys is not None:
            keys = [
                to_device(token_keys(keys_B, packing.longest), x_ND.device)
                for keys_B, packing in zip(row_keys, packings, strict=True)
            ]
            keys_N = torch.cat([keys_BT.flatten()[packing.at_N] for keys_BT, packing in zip(keys, packings)])
            query_keys = [head_keys(keys_BT, self.heads).flatten(0, 1) for keys_BT in keys]

        def dropped(x: Tensor, module: Any) -> Tensor:
            return x if keys_N is None else drop(x, module.p, keys_N, module.dropout_site)

        x_ND = dropped(x_ND, embeddings.dropout)
        states = [x_ND]
        for layer in self.layers:
            attention, output = layer.module.attention, layer.module.output
            qkv_N3D = layer.queries_keys_values(x_ND.to(self.dtype))
            weights_dropout = attention.self.dropout
            attended_ND = packed_attention(
                qkv_N3D, apart, weights_dropout.p, attention.self.scaling, query_keys, weights_dropout.dropout_site
            )
            if layer is self.layers[-1] and read_R is not None:
                x_ND, attended_ND = x_ND[read_R], attended_ND[read_R]
                keys_N = None if keys_N is None else keys_N[read_R]
            x_ND = attention.output.LayerNorm(x_ND + dropped(layer.attended(attended_ND), attention.output.dropout))
            wide_NI = layer.module.intermediate.intermediate_act_fn(layer.up(x_ND.to(self.dtype)))
            x_ND = output.LayerNorm(x_ND + dropped(layer.down(wide_NI), output.dropout))
            states = [*states, x_ND] if all_layers else [x_ND]
        return states
