"""Packed batches: nothing but the padding's cost changes, forward and backward."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn

import clusterns_ray.kernels.packed_attention
from clusterns_ray.kernels.dropout import dropout_scale, head_keys, keep_mask, keep_masks, token_keys
from clusterns_ray.kernels.packed_attention import FUSED_FROM, AttentionIndex, Packing, packed_attention

LENGTHS = [5, 1, 7, 7, 3]
SECOND = [2, 9]


def mask_of(lengths: list[int]) -> torch.Tensor:
    return (torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]).long()


def packing_of(lengths: list[int]) -> Packing:
    return Packing.of(mask_of(lengths).numpy().astype(bool), torch.device("cpu"))


def index_of(batches: list[list[int]], heads: int, dtype: torch.dtype) -> AttentionIndex:
    return AttentionIndex.of([packing_of(lengths) for lengths in batches], heads, dtype)


def masks_of(
    index: AttentionIndex, row_keys: list[int], lengths: list[int], p: float, dtype: torch.dtype, at_once: bool = False
):
    """Of rows one after the other, whatever batches they are in."""
    keys_N = np.concatenate([token_keys(np.array([key]), n)[0] for key, n in zip(row_keys, lengths, strict=True)])
    masks = []
    for group in index.groups:
        keys_MT = head_keys(torch.from_numpy(keys_N[group.token_RT]), index.heads).flatten(0, 1)
        made = (
            keep_masks(keys_MT, group.filled, {0: p})[0]
            if at_once
            else keep_mask(keys_MT, group.filled, p, 0, dtype=dtype)
        )
        masks.append(made)
    return masks


def test_real_tokens_in_order_and_back():
    packing = packing_of(LENGTHS)
    x_BTD = torch.randn(5, 7, 4, requires_grad=True)
    x_ND = packing.pack(x_BTD)
    rows = [x_BTD[row, :length] for row, length in enumerate(LENGTHS)]
    torch.testing.assert_close(x_ND, torch.cat(rows))
    assert packing.columns_N.tolist() == [position for length in LENGTHS for position in range(length)]
    back_BTD = packing.unpack(x_ND)
    real = mask_of(LENGTHS).bool()
    assert torch.equal(back_BTD[real], x_BTD[real]) and not back_BTD[~real].any()
    weights = torch.randn_like(back_BTD)
    (back_BTD * weights).sum().backward()
    assert x_BTD.grad is not None
    torch.testing.assert_close(x_BTD.grad, weights * real[:, :, None])


def test_one_token_of_each_row_is_found():
    packing = packing_of(LENGTHS)
    columns = torch.tensor([4, 0, 6, 2, 1])
    x_BTD = torch.randn(5, 7, 3)
    torch.testing.assert_close(packing.pack(x_BTD)[packing.find(columns)], x_BTD[torch.arange(5), columns])


def test_a_batch_several_times():
    once, thrice = packing_of(LENGTHS), packing_of(LENGTHS * 3)
    found = once.times(3)
    assert (found.rows, found.longest) == (thrice.rows, thrice.longest) == (15, 7)
    assert np.array_equal(found.places_N, thrice.places_N) and once.times(1) is once


def torchs(qkv_N3D: torch.Tensor, lengths: list[int], heads: int, scaling: float) -> torch.Tensor:
    """Row by row."""
    n, width = len(qkv_N3D), qkv_N3D.shape[1] // 3
    query, key, value = qkv_N3D.view(n, 3, heads, -1).permute(1, 2, 0, 3)
    pieces = zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
    rows = [nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in pieces]
    return torch.cat(rows, dim=1).transpose(0, 1).reshape(n, width)


@pytest.mark.parametrize("batches", [[LENGTHS], [[4, 4, 4]], [LENGTHS, SECOND, [1]], [[40, 2, 33], [1, 70, 64, 32]]])
def test_attention_and_its_gradients_are_torchs_row_by_row(batches: list[list[int]]):
    lengths = [length for batch in batches for length in batch]
    heads, width = 3, 8
    qkv_N3D = torch.randn(sum(lengths), 3 * heads * width, dtype=torch.float64, requires_grad=True)
    index = index_of(batches, heads, torch.float64)
    assert len(index.groups) == (3 if max(lengths) == 70 else 1)
    ours = packed_attention(qkv_N3D, index, 0.4)
    expected = torchs(qkv_N3D, lengths, heads, 0.4)
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(ours)
    (found,) = torch.autograd.grad((ours * weights).sum(), qkv_N3D)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), qkv_N3D)[0])


@pytest.mark.parametrize("longest", [FUSED_FROM, FUSED_FROM + 1, FUSED_FROM + 40])
def test_long_rows_without_gradient_are_the_same(longest: int):
    lengths = [longest, 3, longest - 5]
    qkv_N3D = torch.randn(sum(lengths), 3 * 2 * 8)
    ours = packed_attention(qkv_N3D, index_of([lengths], 2, torch.float32), 0.4)
    torch.testing.assert_close(ours, torchs(qkv_N3D, lengths, 2, 0.4), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("at_once", [False, True])
def test_gradients_with_dropout_are_those_of_finite_differences(at_once: bool, monkeypatch: pytest.MonkeyPatch):
    """In two groups, by the masks of a CPU and by those of other devices."""
    monkeypatch.setattr(clusterns_ray.kernels.packed_attention, "GROUPS", np.array([3, 100]))
    index = index_of([[3, 1, 4], [2, 2]], 2, torch.float64)
    assert [group.longest for group in index.groups] == [3, 4]
    masks = masks_of(index, [5, 6, 7, 8, 9], [3, 1, 4, 2, 2], 0.3, torch.float64, at_once)

    def attend(qkv_N3D: torch.Tensor, dropout: bool = True) -> torch.Tensor:
        return packed_attention(qkv_N3D, index, 0.5, masks if dropout else None, dropout_scale(0.3) if dropout else 1.0)

    qkv_N3D = torch.randn(12, 3 * 2 * 3, dtype=torch.float64, requires_grad=True)
    assert not torch.allclose(attend(qkv_N3D), attend(qkv_N3D, dropout=False))
    assert torch.autograd.gradcheck(attend, [qkv_N3D])


def test_each_row_draws_by_its_own_key():
    """Whatever batches stand before and behind it, and however long their rows are."""
    qkv_N3D = torch.randn(23 + 11, 3 * 2 * 4)

    def attend(batches: list[list[int]], keys: list[list[int]], rows: slice) -> torch.Tensor:
        index = index_of(batches, 2, torch.float32)
        masks = masks_of(index, [*chain(*keys)], [*chain(*batches)], 0.4, torch.float32)
        return packed_attention(qkv_N3D[rows], index, 0.5, masks, dropout_scale(0.4))

    first, second = [1, 2, 3, 4, 5], [6, 7]
    both = attend([LENGTHS, SECOND], [first, second], slice(0, 34))
    joined = attend([[*LENGTHS, *SECOND]], [first + second], slice(0, 34))
    torch.testing.assert_close(joined, both, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(both[:23], attend([LENGTHS], [first], slice(0, 23)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(both[23:], attend([SECOND], [second], slice(23, 34)), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(both[23:], attend([SECOND], [[8, 9]], slice(23, 34)), atol=1e-3)


def test_dropout_of_weights_keeps_their_mean():
    qkv_N3D = torch.zeros(20_000, 3 * 2 * 4)
    qkv_N3D[:, 16:] = 1.0
    index = index_of([[40] * 500], 2, torch.float32)
    masks = masks_of(index, list(range(500)), [40] * 500, 0.2, torch.float32)
    out = packed_attention(qkv_N3D, index, 1.0, masks, dropout_scale(0.2))
    assert float(out.mean()) == pytest.approx(1.0, abs=5 * (0.25 / 40 / 40_000) ** 0.5)
    assert float(out[:, 0].var()) == pytest.approx(0.25 / 40, rel=0.05)


def test_no_score_of_two_sentences_is_made():
    """The scores of a batch are as many as its rows are long, squared; of a packed row they would be N squared."""
    index = index_of([[30] * 100], 2, torch.bfloat16)
    assert [group.bias_M1T.shape for group in index.groups] == [(200, 1, 32)]
    assert len(index.take) == 200 * (30 + 2 * 32) and len(index.back) == 3000 * 3 * 2


def test_long_rows_do_not_widen_the_scores_of_short_ones():
    index = index_of([[5] * 10, [32, 33, 64]], 2, torch.float32)
    assert [(len(group.bias_M1T), group.longest, group.filled) for group in index.groups] == [(22, 32, 32), (4, 64, 64)]
