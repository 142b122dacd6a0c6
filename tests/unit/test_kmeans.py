"""K-means against the literal formulas of tests/golden/reference.py, and what must hold for any input."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clusterns_ray.clustering.kmeans import assign, farthest_chain, member_statistics, update_centroids

GOLDEN_DIR = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN_DIR))
import reference  # noqa: E402  # pyright: ignore[reportMissingImports]

TOLERANCE = 1e-10
GOLDEN = json.loads((GOLDEN_DIR / "clusterns_float64.json").read_text())["cases"]
every_case = pytest.mark.parametrize("case", GOLDEN.values(), ids=GOLDEN.keys())
every_rule = pytest.mark.parametrize("rule", reference.RULES)
few = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def tensor(array, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=dtype)


def assert_close(actual, expected, tolerance: float = TOLERANCE):
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


def draw_rows(seed: int, B: int, D: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and centroids without ties; the last centroid lies opposite the rows: an empty cluster."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(B, D)) + 2
    centroids = rng.normal(size=(K, D)) + 1
    centroids[-1] = -10 * z.mean(axis=0)
    gaps = [-np.diff(sorted((reference.cos(row, c) for c in centroids), reverse=True))[:2].min() for row in z]
    assume(min(gaps) > 1e-6 and K - 1 not in reference.assign(z, centroids)[0])
    return z, centroids


sizes = {"seed": seeds, "B": st.integers(3, 12), "D": st.integers(4, 8), "K": st.integers(3, 6)}


# --- the package against the golden file --------------------------------------------------------------------


@every_case
def test_chain_matches_the_golden_file(case):
    scores = reference.cosines(case["z1"], case["z2"])
    np.testing.assert_allclose(scores.mean(), case["expected"]["mean_cosine"], rtol=TOLERANCE)
    chain = case["expected"]["chain"]
    assert len(chain) == len(case["centroids"]) and chain[0] == case["first"]
    assert reference.farthest_chain(scores, len(chain), case["first"]) == chain
    assert farthest_chain(tensor(scores), len(chain), case["first"]).tolist() == chain


@every_case
def test_update_matches_the_golden_file(case):
    z1, centroids, expected = tensor(case["z1"]), tensor(case["centroids"]), case["expected"]
    nearest, _ = assign(z1, centroids)
    sums, counts = member_statistics(z1, nearest, len(centroids))
    assert counts.tolist() == expected["counts"]
    assert_close(sums, expected["sums"])
    updated = update_centroids(centroids, sums, counts, case["rate"], case["rule"])
    assert (updated - centroids).norm() > 1e-6
    assert_close(updated, expected["updated_centroids"])
    nearest, second = assign(z1, updated)
    assert (nearest.tolist(), second.tolist()) == (expected["nearest"], expected["second"])


# --- farthest chain -----------------------------------------------------------------------------------------


@few
@given(seeds, st.integers(2, 12), st.data())
def test_chain_matches_the_loops(seed, B, data):
    scores = np.random.default_rng(seed).uniform(-1, 1, size=(B, B))
    k, first = data.draw(st.integers(1, B)), data.draw(st.integers(0, B - 1))
    cos_BB = tensor(scores)
    order = farthest_chain(cos_BB, k, first)
    assert order.dtype == torch.int64 and order.shape == (k,)
    assert order.tolist() == reference.farthest_chain(scores, k, first)
    assert len(set(order.tolist())) == k
    assert torch.equal(cos_BB, tensor(scores))  # the caller's scores are left alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, 1.0000005])
def test_chain_never_takes_a_row_twice_even_if_all_are_equal(value, dtype):
    order = farthest_chain(torch.full((6, 6), value, dtype=dtype), 6, 4)
    assert order[0] == 4 and sorted(order.tolist()) == list(range(6))


def test_chain_uses_the_row_of_the_last_chosen_one():
    cos_BB = tensor(
        [
            [0.9, -0.5, 0.0, 0.1, -0.4],  # from 0 to 1; staying in this row would go on to 4
            [-0.9, 0.9, 0.3, -0.2, 0.5],  # from 1 to 3, since 0 is taken
            [
                0.1,
                -0.8,
                0.9,
                0.2,
                0.6,
            ],  # column 1 of all others is smallest here: the row, not the column, counts
            [0.2, 0.4, 0.1, 0.9, 0.0],  # from 3 to 4
            [0.5, 0.6, 0.7, -0.6, 0.9],  # from 4 to 2, all that is left
        ]
    )
    order = farthest_chain(cos_BB, 5, 0).tolist()
    assert order == [0, 1, 3, 4, 2]
    from_first_row = [0, *(j for j in cos_BB[0].argsort().tolist() if j != 0)]
    assert order != from_first_row
    assert order != farthest_chain(cos_BB.T.contiguous(), 5, 0).tolist()


def test_chain_accepts_scores_that_carry_gradients():
    scores = np.random.default_rng(0).uniform(-1, 1, size=(5, 5))
    order = farthest_chain(tensor(scores).requires_grad_(), 4, 2)
    assert order.tolist() == reference.farthest_chain(scores, 4, 2)


def test_chain_longer_than_the_batch_is_an_error():
    with pytest.raises(ValueError, match=r"(?s)\b5\b.*\b4\b|\b4\b.*\b5\b"):
        farthest_chain(torch.eye(4), 5, 0)
    assert len(farthest_chain(torch.eye(4), 4, 0)) == 4


# --- assignment ---------------------------------------------------------------------------------------------


@few
@given(**sizes)
def test_assign_matches_the_loops(seed, B, D, K):
    z, centroids = draw_rows(seed, B, D, K)
    nearest, second = assign(tensor(z), tensor(centroids))
    assert nearest.dtype == second.dtype == torch.int64
    assert nearest.shape == second.shape == (B,)
    assert (nearest.tolist(), second.tolist()) == reference.assign(z, centroids)
    assert (nearest != second).all()


@few
@given(**sizes)
def test_assign_looks_at_directions_only(seed, B, D, K):
    z, centroids = draw_rows(seed, B, D, K)
    rng = np.random.default_rng(seed)
    scaled = (x * rng.uniform(0.01, 100, size=(len(x), 1)) for x in (z, centroids))
    for actual, expected in zip(assign(*map(tensor, scaled)), assign(tensor(z), tensor(centroids)), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assign_of_zero_vectors_and_of_equal_centroids(dtype):
    z = torch.tensor([[0.0, 0.0], [1.0, 0.1], [-1.0, 0.0]], dtype=dtype)
    centroids = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], dtype=dtype)
    nearest, second = assign(z, centroids)
    assert (nearest != second).all() and nearest.min() >= 0 and max(nearest.max(), second.max()) < 3
    assert {nearest[1].item(), second[1].item()} == {0, 1}
    assert nearest[2] == 2  # cosine 0 with the zero centroid is more than -1 with the others


def test_second_centroid_of_a_row_that_has_only_opposite_ones():
    nearest, second = assign(tensor([[2.0, 0.0], [3.0, 0.0]]), tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert nearest.tolist() == [0, 0] and second.tolist() == [1, 1]


# --- statistics and update ----------------------------------------------------------------------------------


@few
@given(**sizes)
def test_member_statistics_match_the_loops(seed, B, D, K):
    z, centroids = draw_rows(seed, B, D, K)
    nearest = reference.assign(z, centroids)[0]
    sums, counts = member_statistics(tensor(z), torch.tensor(nearest), K)
    expected_sums, expected_counts = reference.member_statistics(z, nearest, K)
    assert sums.shape == (K, D) and counts.shape == (K,)
    assert_close(sums, expected_sums)
    assert_close(counts, expected_counts)
    assert counts.sum() == B
    assert counts[-1] == 0 and not sums[-1].any()
    assert_close(sums.sum(0), z.sum(0))


@few
@given(**sizes)
def test_member_statistics_of_parts_add_up(seed, B, D, K):
    """This is what lets the workers all-reduce them."""
    z, centroids = draw_rows(seed, B, D, K)
    nearest = torch.tensor(reference.assign(z, centroids)[0])
    whole = member_statistics(tensor(z), nearest, K)
    order = torch.tensor(np.random.default_rng(seed).permutation(B))
    parts = [member_statistics(tensor(z)[rows], nearest[rows], K) for rows in (order[:2], order[2:])]
    for n in range(2):
        assert whole[n].any()
        assert_close(parts[0][n] + parts[1][n], whole[n].numpy())


@every_rule
@few
@given(rate=st.floats(1e-4, 1), **sizes)
def test_update_matches_the_loops(rule, rate, seed, B, D, K):
    z, centroids = draw_rows(seed, B, D, K)
    nearest = reference.assign(z, centroids)[0]
    sums, counts = reference.member_statistics(z, nearest, K)
    before = tensor(centroids)
    updated = update_centroids(before, tensor(sums), tensor(counts), rate, rule)
    assert updated.shape == (K, D)
    assert_close(updated, reference.update_centroids(centroids, sums, counts, rate, rule))
    assert counts[-1] == 0 and torch.equal(updated[-1], tensor(centroids)[-1])  # empty: kept to the last bit
    assert not torch.equal(updated, tensor(centroids))
    integers = update_centroids(tensor(centroids), tensor(sums), tensor(counts).long(), rate, rule)
    assert_close(integers, updated.numpy())


@every_rule
def test_update_with_all_clusters_empty_changes_nothing(rule):
    centroids = tensor(np.random.default_rng(0).normal(size=(3, 4)))
    updated = update_centroids(centroids.clone(), torch.zeros(3, 4).double(), torch.zeros(3).double(), 0.5, rule)
    assert torch.equal(updated, centroids) and centroids.any()


def test_update_by_hand():
    centroids, sums, counts = (
        tensor([[1.0, 2.0], [5.0, 6.0]]),
        tensor([[6.0, 0.0], [0.0, 0.0]]),
        tensor([3.0, 0.0]),
    )
    expected = {"mean": [1.25, 1.5], "sum": [2.25, 1.5], "replace_sum": [6.0, 0.0]}
    for rule in reference.RULES:
        updated = update_centroids(centroids.clone(), sums, counts, 0.25, rule)
        assert_close(updated, [expected[rule], [5.0, 6.0]])


def test_unknown_update_rule_is_an_error():
    with pytest.raises(ValueError, match="nonsense"):
        update_centroids(tensor([[1.0, 2.0]]), tensor([[6.0, 0.0]]), tensor([3.0]), 0.25, "nonsense")  # pyright: ignore


@every_rule
@few
@given(**sizes)
def test_float32_is_close_to_float64(rule, seed, B, D, K):
    z, centroids = (x.astype(np.float32) for x in draw_rows(seed, B, D, K))
    nearest = reference.assign(z.astype(float), centroids.astype(float))[0]
    sums, counts = member_statistics(torch.tensor(z), torch.tensor(nearest), K)
    updated = update_centroids(torch.tensor(centroids), sums, counts, 0.3, rule)
    assert updated.dtype == torch.float32
    expected = reference.member_statistics(z.astype(float), nearest, K)
    assert_close(sums, expected[0], 1e-5)
    assert_close(updated, reference.update_centroids(centroids.astype(float), *expected, 0.3, rule), 1e-5)


@few
@given(**sizes)
def test_centroids_made_of_rows_with_gradients_are_the_same(seed, B, D, K):
    z, centroids = draw_rows(seed, B, D, K)
    live = tensor(z).requires_grad_()
    nearest, second = assign(live, tensor(centroids))
    assert not nearest.requires_grad and not second.requires_grad
    sums, _ = member_statistics(live, nearest, K)
    assert_close(sums, reference.member_statistics(z, nearest.tolist(), K)[0])
