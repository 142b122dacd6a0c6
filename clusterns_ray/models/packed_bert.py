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

from clusterns_ray.kernels.dropout import (
    drop,
    drop_by,
    dropout_scale,
    drops,
    head_keys,
    keep_mask,
    keep_masks,
    token_keys,
)
from clusterns_ray.kernels.packed_attention import AttentionIndex, Packing, packed_attention
from clusterns_ray.kernels.transfer import to_device
from clusterns_ray.models.backbone import first_position

PACKABLE = ("bert", "roberta", "xlm-roberta", "camembert")
"""Architectures of transformers whose modules are those of BERT, by name and by what they do."""

FILL = 32
"""Where oneDNN multiplies, the number of tokens of a pass is a multiple of it."""


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

    @staticmethod
    def of_groups(groups: Sequence[Sequence[nn.Linear]], dtype: torch.dtype) -> list[Linear]:
        """Join the weights of layers that read the same states, so that one product computes them all."""
        lists: list[list[Tensor]] = [
            [getattr(layer, name) for layer in layers] for layers in groups for name in ("weight", "bias")
        ]
        if dtype == torch.float32:
            joined = [tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in lists]
        else:
            joined = _Cast.apply(dtype, [len(tensors) for tensors in lists], *(t for tensors in lists for t in tensors))
        linears = [Linear(weight, bias_O) for weight, bias_O in zip(joined[::2], joined[1::2], strict=True)]
        if not torch.is_grad_enabled() and linears[0].bias_O.device.type == "cpu" and onednn_multiplies(dtype):
            return [Linear(torch.ops.mkldnn._reorder_linear_weight(each.weight), each.bias_O) for each in linears]
        return linears

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


def filler_tokens(tokens: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many tokens that no one reads follow so many real ones: from 1 to :data:`FILL`, up to a multiple of it.

    oneDNN compiles each product for its shapes, 3 ms a time, and keeps what it compiled (measured:
    experiments/LOG.md). Without them each batch would have shapes of its own.
    """
    return FILL - tokens % FILL if device.type == "cpu" and onednn_multiplies(dtype) else 0


class _Cast(torch.autograd.Function):
    """Parameters in a narrower dtype, those of a list joined: in one operation for all, and one for their gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, counts: Sequence[int], *parameters: Tensor) -> tuple[Tensor, ...]:
        """``counts`` of the parameters, one after the other, are joined."""
        ctx.parameters, ctx.counts = [torch.empty_like(p, device="meta") for p in parameters], counts
        cast, parts = [], []
        for some in _lists(parameters, counts):
            cast.append(some[0].new_empty(sum(map(len, some)), *some[0].shape[1:], dtype=dtype))
            parts += cast[-1].split([len(parameter) for parameter in some])
        torch._foreach_copy_(parts, list(parameters))  # pyright: ignore[reportPrivateImportUsage]
        return tuple(cast)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        parts: list[Tensor] = []
        for gradient, some in zip(gradients, _lists(ctx.parameters, ctx.counts), strict=True):
            parts += gradient.split([len(parameter) for parameter in some])
        wide = [torch.empty_like(p, device=part.device) for p, part in zip(ctx.parameters, parts, strict=True)]
        torch._foreach_copy_(wide, parts)  # pyright: ignore[reportPrivateImportUsage]
        return None, None, *wide


def _lists(values: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    ends = np.cumsum(counts)
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]


class Layer(NamedTuple):
    queries_keys_values: Linear
    attended: Linear
    up: Linear
    down: Linear
    module: Any
    """of transformers: its norms, activation and probabilities"""


def masks_at_once(device: torch.device) -> bool:
    """Whether it is the number of operations that takes a device's time, and not their size."""
    return device.type != "cpu"


class PassDropout:
    """Dropout of one pass: states draw by the keys of their tokens, weights of attention by those of their queries.

    A CPU makes each mask where it is read; other devices make all of them at the beginning, in a few operations. The
    masks have the same bits.
    """

    def __init__(
        self,
        backbone: Any,
        row_keys: Sequence[np.ndarray],
        packings: Sequence[Packing],
        index: AttentionIndex,
        dtype: torch.dtype,
    ) -> None:
        keys_N = np.concatenate(
            [token_keys(keys_B, p.longest).ravel()[p.places_N] for keys_B, p in zip(row_keys, packings, strict=True)]
        )
        device = packings[0].device
        width, layers = backbone.config.hidden_size, backbone.encoder.layer
        self.dtype, self.index = dtype, index
        self.at_once = masks_at_once(device)
        self.keys_N = to_device(keys_N, device)
        self.query_keys = [
            head_keys(to_device(keys_N[group.token_RT], device), index.heads).flatten(0, 1) for group in index.groups
        ]
        if self.at_once:
            of_states = [backbone.embeddings.dropout]
            of_states += [part.output.dropout for layer in layers for part in (layer.attention, layer)]
            of_weights = [layer.attention.self.dropout for layer in layers]
            states, weights = (
                {module.dropout_site: module.p for module in modules if drops(module.p)}
                for modules in (of_states, of_weights)
            )
            self.masks_of_states = keep_masks(self.keys_N, width, states)
            self.masks_of_weights = [
                keep_masks(keys_MT, group.filled, weights)
                for group, keys_MT in zip(index.groups, self.query_keys, strict=True)
            ]

    def states(self, x: Tensor, module: Any, read_R: Tensor | None = None) -> Tensor:
        """Dropout of the states of all tokens (N, D), or of those that are read (R, D)."""
        if not self.at_once or not drops(module.p):
            keys = self.keys_N if read_R is None else self.keys_N[read_R]
            return drop(x, module.p, keys, module.dropout_site)
        mask_ND = self.masks_of_states[module.dropout_site]
        return drop_by(x, module.p, mask_ND if read_R is None else mask_ND[read_R])

    def weights(self, module: Any) -> tuple[list[Tensor] | None, float]:
        """The masks of the groups, and the factor of the weights that stay."""
        if not drops(module.p):
            return None, 1.0
        site = module.dropout_site
        if self.at_once:
            return [masks[site] for masks in self.masks_of_weights], dropout_scale(module.p)
        return [
            keep_mask(keys_MT, group.filled, module.p, site, dtype=self.dtype)
            for group, keys_MT in zip(self.index.groups, self.query_keys, strict=True)
        ], dropout_scale(module.p)


class PackedBert:
    """The layers of a model that :func:`can_pack`, its weights in ``dtype``; they follow the model's no further."""

    def __init__(self, backbone: Any, dtype: torch.dtype) -> None:
        self.backbone, self.dtype, self.first = backbone, dtype, first_position(backbone)
        self.heads = backbone.config.num_attention_heads
        self.layers = []
        for module in backbone.encoder.layer:
            heads, attended, up, down = Linear.of_groups(_linears(module), dtype)
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
        device = token_embeds_ND.device
        positions_N = to_device(np.concatenate([packing.columns_N for packing in packings]) + self.first, device)
        x_ND = (
            token_embeds_ND + embeddings.token_type_embeddings.weight[0] + embeddings.position_embeddings(positions_N)
        )
        x_ND = embeddings.LayerNorm(x_ND)
        if draws is not None and max(draws) > 1:
            parts = zip(x_ND.split([len(packing) for packing in packings]), draws, strict=True)
            x_ND = torch.cat([x for x, n in parts for _ in range(n)])
            packings = [packing.times(n) for packing, n in zip(packings, draws, strict=True)]
        tokens = len(x_ND)
        filler = filler_tokens(tokens, device, self.dtype)
        if filler:
            # One row more, always, as products of attention are compiled for their number of rows.
            x_ND = F.pad(x_ND, (0, 0, 0, filler))
            packings = [*packings, Packing(1, filler, np.arange(filler), device)]
            row_keys = None if row_keys is None else [*row_keys, np.zeros(1, np.int64)]

        index = AttentionIndex.of(packings, self.heads, self.dtype)
        dropout = None if row_keys is None else PassDropout(self.backbone, row_keys, packings, index, self.dtype)

        def dropped(x: Tensor, module: Any, read_R: Tensor | None = None) -> Tensor:
            return x if dropout is None else dropout.states(x, module, read_R)

        x_ND = dropped(x_ND, embeddings.dropout)
        states = [x_ND]
        for layer in self.layers:
            attention, output = layer.module.attention, layer.module.output
            qkv_N3D = layer.queries_keys_values(x_ND.to(self.dtype))
            masks, kept = (None, 1.0) if dropout is None else dropout.weights(attention.self.dropout)
            attended_ND = packed_attention(qkv_N3D, index, attention.self.scaling, masks, kept)
            read = None
            if layer is self.layers[-1] and read_R is not None:
                read, x_ND, attended_ND = read_R, x_ND[read_R], attended_ND[read_R]
            attended_ND = dropped(layer.attended(attended_ND), attention.output.dropout, read)
            x_ND = attention.output.LayerNorm(x_ND + attended_ND)
            wide_NI = layer.module.intermediate.intermediate_act_fn(layer.up(x_ND.to(self.dtype)))
            x_ND = output.LayerNorm(x_ND + dropped(layer.down(wide_NI), output.dropout, read))
            states = [*states, x_ND] if all_layers else [x_ND]
        return [x_ND[:tokens] for x_ND in states]
