"""A batch as one sequence of its real tokens: nothing is computed for padding.

Linear layers, norms and dropout of a transformer treat each token by itself, so they take the tokens of all rows as
one row. Attention alone has to know which of them belong together: it takes them apart by an :class:`AttentionIndex`,
in groups of rows of about the same length. Several batches can stand one after the other, each with a
:class:`Packing` of its own.

Shape suffixes: B rows of a batch, R rows of a group, T tokens of the longest row, N real tokens of all rows, H heads,
D width, d = D / H, M = R x H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clusterns_ray.kernels.dropout import masked
from clusterns_ray.kernels.transfer import to_device

VECTOR_BYTES = 64
"""Bytes of a CPU's widest vectors: torch's softmax takes several times as long for a row that does not fill them
(measured: experiments/LOG.md)."""

FUSED_FROM = 64
"""Tokens of the longest row above which torch's fused attention is taken where nothing is trained: it is about as fast
from there on, and keeps no scores."""


GROUPS = 2 ** np.arange(5, 21)
"""Tokens of the longest row that a group takes: more groups would be more launches, fewer more work on padding."""


def filled_columns(tokens: int, dtype: torch.dtype) -> int:
    """T': the columns of scores of T tokens, whole vectors of numbers of this type."""
    fill = VECTOR_BYTES // dtype.itemsize
    return -(-tokens // fill) * fill


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch stand in the packed one."""

    rows: int
    longest: int
    places_N: np.ndarray
    """int64, on the host: the place of each real token in the padded batch, read row by row"""
    device: torch.device

    @classmethod
    def of(cls, real_BT: np.ndarray, device: torch.device) -> Packing:
        """The packing of a batch on ``device`` by where its real tokens are: bool, at least one in each row."""
        rows, longest = real_BT.shape
        return cls(rows, longest, np.flatnonzero(real_BT), device)

    def times(self, n: int) -> Packing:
        """The packing of ``n`` copies of the batch, one after the other."""
        steps_n1 = np.arange(n)[:, None] * (self.rows * self.longest)
        return self if n == 1 else Packing(n * self.rows, self.longest, (self.places_N + steps_n1).ravel(), self.device)

    def __len__(self) -> int:
        """N, real tokens of all rows."""
        return len(self.places_N)

    @cached_property
    def at_N(self) -> Tensor:
        """``places_N`` on the device."""
        return to_device(self.places_N, self.device)

    @property
    def columns_N(self) -> np.ndarray:
        """int64, on the host: the place of each token in its row."""
        return self.places_N % self.longest

    def pack(self, x_BT: Tensor) -> Tensor:
        """Real tokens alone: (B, T, ...) to (N, ...)."""
        return x_BT.flatten(0, 1)[self.at_N]

    def unpack(self, x_ND: Tensor) -> Tensor:
        """The padded batch again, zeros at padding: (N, D) to (B, T, D)."""
        padded = x_ND.new_zeros(self.rows * self.longest, x_ND.shape[1]).index_copy(0, self.at_N, x_ND)
        return padded.view(self.rows, self.longest, -1)

    def find(self, column_B: Tensor) -> Tensor:
        """Where the token in the given column of each row stands among the N: int64 (B)."""
        at_B = torch.arange(self.rows, device=self.device) * self.longest + column_B
        return torch.searchsorted(self.at_N, at_B)


class Group(NamedTuple):
    """Rows of about the same length. Queries are T a row, keys and values T' >= T."""

    longest: int
    """T"""
    filled: int
    """T'"""
    sizes: tuple[int, int]
    """queries (M T), and keys (M T')"""
    bias_M1T: Tensor
    """added to the scores: -inf at padding"""
    token_RT: np.ndarray
    """int64, on the host: the token at each place, 0 at padding"""


class AttentionIndex(NamedTuple):
    """How to read queries, keys and values of packed batches by group, row and head, and back; the same for all layers.

    What is read are the queries of all groups, then the keys and values of each. Padding reads token 0, as no one looks
    at what comes of it.
    """

    groups: list[Group]
    heads: int
    take: Tensor
    """int64: which rows of (N x 3 x H) x d are read"""
    back: Tensor
    """int64, where each row of (N x 3 x H) x d is among what was read"""
    queries: Tensor
    """int64, where each row of (N x H) x d is, a query"""

    @classmethod
    def of(cls, packings: Sequence[Packing], heads: int, dtype: torch.dtype) -> AttentionIndex:
        """The index of batches that stand one after the other, with keys and values filled up to whole vectors, for
        scores of ``dtype``."""
        device = packings[0].device
        first_rows = np.cumsum([0, *(packing.rows for packing in packings)])
        rows = [packing.places_N // packing.longest + first for packing, first in zip(packings, first_rows)]
        row_N, column_N = np.concatenate(rows), np.concatenate([packing.columns_N for packing in packings])
        longest_B = np.zeros(first_rows[-1], np.int64)
        longest_B[row_N] = column_N + 1  # the last token of a row comes last
        group_B = np.searchsorted(GROUPS, longest_B)

        place_B = np.empty_like(group_B)
        members = [np.flatnonzero(group_B == number) for number in np.unique(group_B)]
        groups, tokens = list[Group](), list[Tensor]()
        query_N, key_N, value_N, query_step_N, key_step_N = np.empty((5, len(row_N)), np.int64)
        queries, keys = 0, heads * sum(len(of_group) * int(longest_B[of_group].max()) for of_group in members)
        for of_group in members:
            longest = int(longest_B[of_group].max())
            filled, count = filled_columns(longest, dtype), heads * len(of_group)
            place_B[of_group] = np.arange(len(of_group))
            of_N = slice(None) if len(members) == 1 else np.flatnonzero(group_B[row_N] == group_B[of_group[0]])
            first_N, column = heads * place_B[row_N[of_N]], column_N[of_N]
            token_RT = np.full((len(of_group), filled), -1)
            token_RT[place_B[row_N[of_N]], column] = np.arange(len(row_N))[of_N]
            bias_RT = to_device(np.where(token_RT < 0, np.float32(-np.inf), np.float32(0)), device).to(dtype)
            token_RT = np.maximum(token_RT, 0)
            query_N[of_N], query_step_N[of_N] = queries + first_N * longest + column, longest
            key_N[of_N], key_step_N[of_N] = keys + first_N * filled + column, filled
            value_N[of_N] = key_N[of_N] + count * filled
            queries, keys = queries + count * longest, keys + 2 * count * filled
            bias_M1T = bias_RT[:, None].repeat_interleave(heads, dim=0)
            groups.append(Group(longest, filled, (count * longest, count * filled), bias_M1T, token_RT[:, :longest]))
            tokens.append(to_device(token_RT * (3 * heads), device))

        head_H = torch.arange(heads, device=device)
        first_RHT = [token_RT[:, None] + head_H[:, None] for token_RT in tokens]
        parts = [first[:, :, : group.longest] for first, group in zip(first_RHT, groups, strict=True)]
        parts += [first + n * heads for first in first_RHT for n in (1, 2)]
        steps = np.stack([[query_N, key_N, value_N], [query_step_N, key_step_N, key_step_N]])
        base_3N, step_3N = to_device(steps, device)
        back_N3H = base_3N.T[:, :, None] + step_3N.T[:, :, None] * head_H
        return cls(
            groups,
            heads,
            torch.cat([part.flatten() for part in parts]),
            back_N3H.flatten(),
            back_N3H[:, 0].flatten(),
        )

    @property
    def num_queries(self) -> int:
        """Of all groups, rows and heads."""
        return sum(group.sizes[0] for group in self.groups)

    def of_queries(self, x: Tensor) -> list[Tensor]:
        """A row of ``x`` for each query, (., d), as views: those of each group (M, T, d)."""
        parts = torch.split(x, [group.sizes[0] for group in self.groups])
        return [part.view(-1, group.longest, x.shape[1]) for part, group in zip(parts, self.groups, strict=True)]

    def split(self, taken: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of what was read, as views, each group's queries (M, T, d), keys and values (M, T', d)."""
        sizes = [g.sizes[0] for g in self.groups] + [g.sizes[1] for g in self.groups for _ in (1, 2)]
        parts = torch.split(taken, sizes)
        n, width = len(self.groups), taken.shape[1]
        return [
            (
                parts[at].view(-1, group.longest, width),
                parts[n + 2 * at].view(-1, group.filled, width),
                parts[n + 2 * at + 1].view(-1, group.filled, width),
            )
            for at, group in enumerate(self.groups)
        ]


def packed_attention(
    qkv_N3D: Tensor,
    index: AttentionIndex,
    scaling: float,
    masks: Sequence[Tensor] | None = None,
    kept: float = 1.0,
) -> Tensor:
    """Attention of each row with itself, with dropout of its weights: (N, D), in the dtype of ``qkv_N3D``.

    Args:
        qkv_N3D: (N, 3 D): queries, keys and values of the packed batches, one batch after the other.
        masks: of dropout, for each group (M, T, T'), see :func:`~clusterns_ray.kernels.dropout.masked`.
        kept: what the weights that stay are multiplied by.
    """
    return _Attention.apply(qkv_N3D, index, scaling, masks, kept)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    """Forward and backward by hand: no score leaves the dtype of the queries, and rows are taken apart in one go.

    With S the scores, P = softmax(S), M the mask and c what is kept: out = c (M P) V, so that
    dV = c (M P)' dO, dP = c M (dO V'), dS = P (dP - sum(P dP)), dQ = s dS K, dK = s dS' Q.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv_N3D: Tensor,
        index: AttentionIndex,
        scaling: float,
        masks: Sequence[Tensor] | None,
        kept: float,
    ) -> Tensor:
        width = qkv_N3D.shape[1] // 3 // index.heads
        taken = qkv_N3D.view(-1, width).index_select(0, index.take)
        read = taken.new_empty(index.num_queries, width)
        # A narrow mask of a CPU cannot hold the scale, and what is read is smaller than the weights.
        ctx.last = 1.0 if masks is None or masks[0].dtype == torch.bool else kept
        saved: list[Tensor | None] = [taken]
        for number, (group, (query, key, value), out) in enumerate(
            zip(index.groups, index.split(taken), index.of_queries(read), strict=True)
        ):
            if not ctx.needs_input_grad[0] and masks is None and group.longest > FUSED_FROM:
                real = slice(group.longest)
                out[:, None] = F.scaled_dot_product_attention(
                    query[:, None],
                    key[:, None, real],
                    value[:, None, real],
                    group.bias_M1T[:, None, :, real],
                    scale=scaling,
                )
                continue
            weights = torch.softmax(torch.baddbmm(group.bias_M1T, query, key.transpose(1, 2), alpha=scaling), dim=-1)
            mask = None if masks is None else masks[number]
            torch.bmm(weights if mask is None else masked(weights, mask, kept / ctx.last), value, out=out)
            saved += [weights, mask]
        if ctx.last != 1.0:
            read.mul_(ctx.last)
        ctx.save_for_backward(*saved)
        ctx.index, ctx.scaling, ctx.kept = index, scaling, kept
        return read.index_select(0, index.queries).view(len(qkv_N3D), -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        index: AttentionIndex = ctx.index
        taken, *saved = ctx.saved_tensors
        width = taken.shape[1]
        d_taken = torch.empty_like(taken)
        d_out_ND = gradients[0] if ctx.last == 1.0 else gradients[0] * ctx.last
        d_read = taken.new_zeros(index.num_queries, width)
        d_read.index_copy_(0, index.queries, d_out_ND.reshape(-1, width))
        for (query, key, value), (d_query, d_key, d_value), d_out, weights, mask in zip(
            index.split(taken), index.split(d_taken), index.of_queries(d_read), saved[::2], saved[1::2], strict=True
        ):
            d_weights = torch.bmm(d_out, value.transpose(1, 2))
            read_by = weights
            if mask is not None:
                read_by = masked(weights, mask, ctx.kept / ctx.last)
                d_weights = masked(d_weights, mask, ctx.kept / ctx.last, in_place=True)
            torch.bmm(read_by.transpose(1, 2), d_out, out=d_value)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_query.baddbmm_(d_scores, key, beta=0, alpha=ctx.scaling)
            d_key.baddbmm_(d_scores.transpose(1, 2), query, beta=0, alpha=ctx.scaling)
        return d_taken.index_select(0, index.back).view(len(d_out_ND), -1), None, None, None, None
