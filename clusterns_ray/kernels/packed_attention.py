"""A batch as one sequence of its real tokens: nothing is computed for padding.

Linear layers, norms and dropout of a transformer treat each token by itself, so they take the tokens of all rows as
one row. Attention alone has to know which of them belong together: it takes them apart by a :class:`Packing`. Several
batches can stand one after the other, each with a packing of its own.

Shape suffixes: B rows, T tokens of the longest row, N real tokens of all rows, H heads, D width, d = D / H, M = B x H.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clusterns_ray.kernels.dropout import dropout_scale, drops, keep_mask
from clusterns_ray.kernels.transfer import to_device

VECTOR_BYTES = 64
"""Bytes of a CPU's widest vectors: torch's softmax takes several times as long for a row that does not fill them
(measured: experiments/LOG.md)."""

FUSED_FROM = 64
"""Tokens of the longest row above which torch's fused attention is taken where nothing is trained: it is about as fast
from there on, and keeps no scores."""


def filled_columns(tokens: int, dtype: torch.dtype) -> int:
    """T': the columns of scores of T tokens, whole vectors of numbers of this type."""
    fill = VECTOR_BYTES // dtype.itemsize
    return -(-tokens // fill) * fill


class Packing(NamedTuple):
    """Where the tokens of a padded batch stand in the packed one."""

    rows: int
    longest: int
    at_N: Tensor
    """int64, the place of each real token in the padded batch, read row by row"""

    @classmethod
    def of(cls, real_BT: np.ndarray, device: torch.device) -> Packing:
        """The packing of a batch on ``device`` by where its real tokens are: bool, at least one in each row."""
        rows, longest = real_BT.shape
        return cls(rows, longest, to_device(np.flatnonzero(real_BT), device))

    def times(self, n: int) -> Packing:
        """The packing of ``n`` copies of the batch, one after the other."""
        if n == 1:
            return self
        steps_n1 = torch.arange(n, device=self.at_N.device)[:, None] * (self.rows * self.longest)
        return Packing(n * self.rows, self.longest, (self.at_N + steps_n1).flatten())

    def __len__(self) -> int:
        """N, real tokens of all rows."""
        return len(self.at_N)

    @property
    def positions_N(self) -> Tensor:
        """int64, the place of each token in its row."""
        return self.at_N % self.longest

    def pack(self, x_BTD: Tensor) -> Tensor:
        """Real tokens alone: (B, T, D) to (N, D)."""
        return _Take.apply(x_BTD.flatten(0, 1), self.at_N)  # type: ignore[return-value]

    def unpack(self, x_ND: Tensor) -> Tensor:
        """The padded batch again, zeros at padding: (N, D) to (B, T, D)."""
        padded = x_ND.new_zeros(self.rows * self.longest, x_ND.shape[1]).index_copy(0, self.at_N, x_ND)
        return padded.view(self.rows, self.longest, -1)

    def find(self, column_B: Tensor) -> Tensor:
        """Where the token in the given column of each row stands among the N: int64 (B)."""
        at_B = torch.arange(self.rows, device=self.at_N.device) * self.longest + column_B
        return torch.searchsorted(self.at_N, at_B)


class _Take(torch.autograd.Function):
    """Rows of a matrix, each at most once: what comes back is then copied and not added up."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, rows_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.shape = x_MD.shape
        return x_MD.index_select(0, rows_N)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None]:
        (rows_N,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape).index_copy_(0, rows_N, gradients[0]), None


class UnpackIndex(NamedTuple):
    """How to read queries, keys and values of a packed batch by row and head, and back; the same for all layers.

    Queries are T a row, keys and values T' >= T. Padding reads token 0, as no one looks at what comes of it.
    """

    tokens: int
    longest: int
    filled: int
    """T'"""
    bias_M1T: Tensor
    """added to the scores: -inf at padding"""
    take: Tensor
    """int64, M (T + 2 T') rows of (N x 3 x H) x d"""
    back_N3H: Tensor
    """int64, where each of these is among what was taken"""

    @classmethod
    def of(cls, packing: Packing, heads: int, dtype: torch.dtype) -> UnpackIndex:
        """The index of a packing, with keys and values filled up to whole vectors, for scores of ``dtype``."""
        rows, longest = packing.rows, packing.longest
        filled, device = filled_columns(longest, dtype), packing.at_N.device
        row_N, position_N = packing.at_N // longest, packing.positions_N
        token_BT = torch.full((rows, filled), -1, device=device)
        token_BT[row_N, position_N] = torch.arange(len(packing), device=device)
        bias_BT = torch.zeros(rows, filled, dtype=dtype, device=device).masked_fill_(token_BT < 0, -torch.inf)

        head_H1 = torch.arange(heads, device=device)[:, None]
        first_BHT = token_BT.clamp_(min=0)[:, None] * 3 * heads + head_H1
        parts = (first_BHT[:, :, :longest], first_BHT + heads, first_BHT + 2 * heads)

        at_NH = row_N[:, None] * heads + head_H1.T
        queries, keys = rows * heads * longest, rows * heads * filled
        query_NH, key_NH = at_NH * longest + position_N[:, None], queries + at_NH * filled + position_N[:, None]
        return cls(
            len(packing),
            longest,
            filled,
            bias_BT[:, None].repeat_interleave(heads, dim=0),
            torch.cat([part.flatten() for part in parts]),
            torch.stack([query_NH, key_NH, key_NH + keys], dim=1),
        )

    def split(self, taken: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (M, T, d), keys and values (M, T', d), as views of ``M (T + 2 T') x d``."""
        sizes = [len(self.bias_M1T) * t for t in (self.longest, self.filled, self.filled)]
        query, key, value = (part.view(len(self.bias_M1T), -1, taken.shape[1]) for part in torch.split(taken, sizes))
        return query, key, value


def packed_attention(
    qkv_N3D: Tensor,
    parts: Sequence[UnpackIndex],
    p: float,
    scaling: float,
    keys: Sequence[Tensor] | None = None,
    site: int = 0,
) -> Tensor:
    """Attention of each row with itself, with dropout ``p`` of its weights: (N, D), in the dtype of ``qkv_N3D``.

    Args:
        qkv_N3D: (N, 3 D): queries, keys and values of the packed batches, one batch after the other.
        keys: of dropout, for each batch those of its queries by row and head: int64 (M, T).
        site: the number of this dropout in the model.
    """
    return _Attention.apply(qkv_N3D, parts, p, scaling, keys, site)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    """Forward and backward by hand: no score leaves the dtype of the queries, and rows are taken apart in one go.

    With S the scores, P = softmax(S), M the kept weights and c = 1 / (1 - p): out = c (M P) V, so that
    dV = c (M P)' dO, dP = c M (dO V'), dS = P (dP - sum(P dP)), dQ = s dS K, dK = s dS' Q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv_N3D: Tensor,
        parts: Sequence[UnpackIndex],
        p: float,
        scaling: float,
        keys: Sequence[Tensor] | None,
        site: int,
    ) -> Tensor:
        heads = parts[0].back_N3H.shape[2]
        width = qkv_N3D.shape[1] // 3 // heads
        out_ND = qkv_N3D.new_empty(len(qkv_N3D), heads * width)
        sizes = [part.tokens for part in parts]
        keeps: Sequence[Tensor | None] = [None] * len(parts)
        if keys is not None and drops(p):
            keeps = [
                keep_mask(keys_MT, part.filled, p, site, dtype=qkv_N3D.dtype)
                for part, keys_MT in zip(parts, keys, strict=True)
            ]
        saved: list[Tensor | None] = []
        for part, keep, qkv, out in zip(
            parts, keeps, torch.split(qkv_N3D, sizes), torch.split(out_ND, sizes), strict=True
        ):
            taken = qkv.view(-1, width).index_select(0, part.take)
            query, key, value = part.split(taken)
            if not ctx.needs_input_grad[0] and keep is None and part.longest > FUSED_FROM:
                real = slice(part.longest)
                read = F.scaled_dot_product_attention(
                    query[:, None],
                    key[:, None, real],
                    value[:, None, real],
                    part.bias_M1T[:, None, :, real],
                    scale=scaling,
                )
            else:
                weights = torch.softmax(torch.baddbmm(part.bias_M1T, query, key.transpose(1, 2), alpha=scaling), dim=-1)
                if keep is None:
                    read = torch.bmm(weights, value)
                else:
                    read = torch.bmm(weights * keep, value).mul_(dropout_scale(p))
                saved += [taken, weights, keep]
            torch.index_select(read.view(-1, width), 0, part.back_N3H[:, 0].flatten(), out=out.view(-1, width))
        ctx.save_for_backward(*saved)
        ctx.parts, ctx.scaling = parts, scaling
        ctx.dropout_scale = 1.0 if keeps[0] is None else dropout_scale(p)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        sizes = [part.tokens for part in ctx.parts]
        d_out_ND = gradients[0] * ctx.dropout_scale
        d_qkv_N3D = d_out_ND.new_empty(len(d_out_ND), 3 * d_out_ND.shape[1])
        for part, d_out, d_qkv in zip(ctx.parts, d_out_ND.split(sizes), d_qkv_N3D.split(sizes), strict=True):
            taken, weights, keep = next(saved), next(saved), next(saved)
            width = taken.shape[1]
            query, key, value = part.split(taken)
            d_taken = torch.empty_like(taken)
            d_query, d_key, d_value = part.split(d_taken)
            d_read = torch.zeros_like(query)
            d_read.view(-1, width).index_copy_(0, part.back_N3H[:, 0].flatten(), d_out.view(-1, width))
            d_weights = torch.bmm(d_read, value.transpose(1, 2))
            if keep is None:
                torch.bmm(weights.transpose(1, 2), d_read, out=d_value)
            else:
                torch.bmm((weights * keep).transpose(1, 2), d_read, out=d_value)
                d_weights.mul_(keep)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
            torch.bmm(d_scores, key, out=d_query)
            torch.bmm(d_scores.transpose(1, 2), query, out=d_key)
            torch.index_select(d_taken, 0, part.back_N3H.flatten(), out=d_qkv.view(-1, width))
        return d_qkv_N3D, None, None, None, None, None
