"""A batch as one sequence of its real tokens, for training on a CPU: nothing is computed for padding.

Linear layers, norms and dropout of a transformer treat each token by itself, so they take the tokens of all rows as
one row. Attention alone has to know which of them belong together: it takes them apart by a :class:`Packing`, which
transformers hands through to it. On a GPU, where attention has kernels of its own, rows stay padded.

Shape suffixes: B rows, T tokens of the longest row, N real tokens of all rows, H heads, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clusterns_ray.dropout import dropout_scale, kept


class Packing(NamedTuple):
    """Where the tokens of a padded batch stand in the packed one."""

    rows: int
    longest: int
    at_N: Tensor
    """int64, the place of each real token in the padded batch, read row by row"""
    bias_B1T: Tensor | None
    """float32 that is added to attention scores: -inf at padding; None where there is none"""

    @classmethod
    def of(cls, mask_BT: Tensor) -> Packing:
        """By the attention mask: 1 or True at real tokens, of which every row has one at least."""
        real_BT = mask_BT.bool()
        rows, longest = real_BT.shape
        bias_B1T = None
        if not bool(real_BT.all()):
            bias_B1T = torch.zeros(rows, 1, longest).masked_fill_(~real_BT[:, None], -torch.inf)
        return cls(rows, longest, real_BT.flatten().nonzero().squeeze(1), bias_B1T)

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

    def by_head(self, heads: int) -> tuple[Tensor, Tensor]:
        """How to read (N x H) rows as (B x H x T) and back: two lists of row numbers, int64.

        Padding reads token 0, as no one looks at what comes of it.
        """
        head_H = torch.arange(heads)
        token_BT = torch.zeros(self.rows * self.longest, dtype=torch.int64)
        token_BT[self.at_N] = torch.arange(len(self.at_N))
        apart_BHT = token_BT.view(self.rows, 1, self.longest) * heads + head_H[:, None]
        row_N, position_N = self.at_N // self.longest, self.positions_N
        back_NH = (row_N[:, None] * heads + head_H) * self.longest + position_N[:, None]
        return apart_BHT.flatten(), back_NH.flatten()


class _Take(torch.autograd.Function):
    """Rows of a matrix, each at most once: what comes back is then copied and not added up."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, rows_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.shape = x_MD.shape
        return x_MD.index_select(0, rows_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (rows_N,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape).index_copy_(0, rows_N, gradients[0]), None


def packed_attention(
    query_1HNd: Tensor, key_1HNd: Tensor, value_1HNd: Tensor, packing: Packing, p: float, scaling: float
) -> Tensor:
    """Attention of each row with itself, with dropout ``p`` of its weights; (1, N, H, d), in the queries' dtype."""
    q_NHd, k_NHd, v_NHd = (x.squeeze(0).transpose(0, 1) for x in (query_1HNd, key_1HNd, value_1HNd))
    return _Attention.apply(q_NHd, k_NHd, v_NHd, packing, p, scaling).unsqueeze(0)  # type: ignore[union-attr]


class _Attention(torch.autograd.Function):
    """Forward and backward by hand: no score leaves the dtype of the queries, and rows are taken apart in one go.

    With S the scores, P = softmax(S), M the kept weights and c = 1 / (1 - p): out = c (M P) V, so that
    dV = c (M P)' dO, dP = c M (dO V'), dS = P (dP - sum(P dP)), dQ = s dS K, dK = s dS' Q.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHd: Tensor, k_NHd: Tensor, v_NHd: Tensor, packing: Packing, p: float, scaling: float
    ) -> Tensor:
        heads, width = q_NHd.shape[1:]
        apart, back = packing.by_head(heads)

        def by_head(x_NHd: Tensor) -> Tensor:
            return x_NHd.reshape(-1, width).index_select(0, apart).view(packing.rows * heads, packing.longest, width)

        q, k, v = by_head(q_NHd), by_head(k_NHd), by_head(v_NHd)
        with torch.autocast("cpu", enabled=False):
            if packing.bias_B1T is None:
                scores = torch.bmm(q, k.transpose(1, 2)).mul_(scaling)
            else:
                bias = packing.bias_B1T.to(q.dtype).repeat_interleave(heads, dim=0)
                scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scaling)
            weights = torch.softmax(scores, dim=-1)
            keep = kept(weights, p)
            out = torch.bmm(weights * keep, v).mul_(dropout_scale(p))
        ctx.save_for_backward(q, k, v, weights, keep, back)
        ctx.p, ctx.scaling, ctx.heads = p, scaling, heads
        return out.view(-1, width).index_select(0, back).view(q_NHd.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, keep, back = ctx.saved_tensors
        width = q.shape[-1]
        with torch.autocast("cpu", enabled=False):
            d_out = q.new_zeros(q.shape)
            d_out.view(-1, width).index_copy_(0, back, gradients[0].reshape(-1, width) * dropout_scale(ctx.p))
            d_v = torch.bmm((weights * keep).transpose(1, 2), d_out)
            d_weights = torch.bmm(d_out, v.transpose(1, 2)).mul_(keep)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scaling)
            d_q, d_k = torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q)

        def together(x: Tensor) -> Tensor:
            return x.view(-1, width).index_select(0, back).view(-1, ctx.heads, width)

        return together(d_q), together(d_k), together(d_v), None, None, None
