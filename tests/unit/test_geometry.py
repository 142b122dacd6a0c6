from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterns_ray.evaluation import geometry as module
from clusterns_ray.evaluation.geometry import alignment, effective_rank, geometry, mean_cosine, uniformity
from clusterns_ray.evaluation.sts import Pairs


def draw(rows: int, width: int, seed: int = 0, shift: float = 0.5) -> np.ndarray:
    """Rows of different lengths that lean to one side."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, width)) + shift) * rng.uniform(0.1, 9, size=(rows, 1))


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.sqrt((row**2).sum())


def uniformity_by_loop(z: np.ndarray, t: float) -> float:
    each = [np.exp(-t * ((unit(a) - unit(b)) ** 2).sum()) for a, b in combinations(z, 2)]
    return float(np.log(np.mean(each)))


def mean_cosine_by_loop(z: np.ndarray) -> float:
    return float(np.mean([unit(a) @ unit(b) for a, b in combinations(z, 2)]))


@given(rows=st.integers(2, 30), width=st.integers(1, 8), seed=st.integers(0, 99), t=st.sampled_from([0.5, 2, 3]))
@settings(max_examples=40, deadline=None)
def test_uniformity_and_mean_cosine_are_the_loops_over_pairs(rows: int, width: int, seed: int, t: float) -> None:
    z = draw(rows, width, seed)
    assert uniformity(z, t) == pytest.approx(uniformity_by_loop(z, t), abs=1e-9)
    assert mean_cosine(z) == pytest.approx(mean_cosine_by_loop(z), abs=1e-9)


@pytest.mark.parametrize("block", [1, 7, 40, 100])
def test_blocks_do_not_change_uniformity(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    z = draw(40, 5)
    assert uniformity(z) == pytest.approx(uniformity_by_loop(z, 2), abs=1e-12)


def test_known_answers() -> None:
    corners = np.array([[1, 0], [0, 2], [-3, 0], [0, -4.0]])
    assert mean_cosine(corners) == pytest.approx((4 * 0 + 2 * -1) / 6)
    assert uniformity(corners) == pytest.approx(np.log((4 * np.exp(-4) + 2 * np.exp(-8)) / 6))
    assert effective_rank(corners) == pytest.approx(2)
    assert effective_rank(np.eye(7) * np.arange(1, 8)[:, None]) == pytest.approx(7)
    assert alignment(corners, corners * 5) == pytest.approx(0)
    assert alignment(corners, corners[[1, 2, 3, 0]]) == pytest.approx(2)
    assert alignment(corners, -corners) == pytest.approx(4)
    collapsed = np.tile([[3.0, 4.0]], (5, 1))
    assert (mean_cosine(collapsed), effective_rank(collapsed)) == (pytest.approx(1), pytest.approx(1))
    assert uniformity(collapsed) == pytest.approx(0, abs=1e-12)


def test_alignment_is_the_mean_squared_distance() -> None:
    a, b = draw(20, 4, 1), draw(20, 4, 2)
    by_hand = np.mean([2 - 2 * unit(x) @ unit(y) for x, y in zip(a, b)])
    assert 0.1 < by_hand < 3.9
    assert alignment(a, b) == pytest.approx(by_hand)


def test_effective_rank_is_of_singular_values_not_of_their_squares() -> None:
    z = draw(50, 6, 3)
    gram = np.stack([unit(row) for row in z])
    values = np.sqrt(np.linalg.eigvalsh(gram.T @ gram))
    shares = values / values.sum()
    assert effective_rank(z) == pytest.approx(np.prod(shares**-shares))
    assert 1 < effective_rank(z) < 6
    # rows are not centred: a common direction lowers it
    assert effective_rank(draw(50, 6, 3, shift=5)) < effective_rank(draw(50, 6, 3, shift=0)) - 1


def test_rows_of_large_sets_stay_exact() -> None:
    z = draw(2500, 3, 5).astype(np.float32)
    n = z / np.linalg.norm(z, axis=1, keepdims=True)
    upper = np.triu_indices(len(z), 1)
    cosines = (n.astype(np.float64) @ n.astype(np.float64).T)[upper]
    assert mean_cosine(z) == pytest.approx(cosines.mean(), abs=1e-7)
    assert uniformity(z) == pytest.approx(np.log(np.exp(-4 * (1 - cosines)).mean()), abs=1e-6)


def test_what_cannot_be_told_is_nan() -> None:
    nothing, broken = np.zeros((0, 3)), np.full((4, 3), np.nan)
    one = np.ones((1, 3))
    assert np.isnan([alignment(nothing, nothing), alignment(broken, broken)]).all()
    assert np.isnan([uniformity(one), uniformity(nothing), uniformity(broken)]).all()
    assert np.isnan([mean_cosine(one), mean_cosine(nothing), mean_cosine(broken)]).all()
    assert np.isnan([effective_rank(nothing), effective_rank(broken), effective_rank(np.zeros((3, 3)))]).all()
    assert effective_rank(one) == pytest.approx(1)


def embed(sentences: Sequence[str]) -> np.ndarray:
    """Directions in the plane, by their degrees."""
    angle = np.radians([float(sentence) for sentence in sentences])
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_geometry_takes_positive_pairs_by_their_grade() -> None:
    pairs = Pairs("A/b", ["0", "0", "10", "90"], ["60", "90", "40", "0"], np.array([4.0, 3.99, 5, 0]))
    found = geometry(pairs, embed)
    assert (found["alignment_pairs"], found["sentences"]) == (2, 5)
    assert found["alignment"] == pytest.approx(2 - np.cos(np.radians(60)) - np.cos(np.radians(30)))
    z = embed(["0", "10", "90", "60", "40"])
    assert found["uniformity"] == pytest.approx(uniformity_by_loop(z, 2))
    assert found["mean_cosine"] == pytest.approx(mean_cosine_by_loop(z))
    assert found["effective_rank"] == pytest.approx(effective_rank(z))
    other_scale = Pairs("A/b", pairs.sentences1, pairs.sentences2, np.array([2.0, 1, 3, 0]))
    assert geometry(other_scale, embed)["alignment_pairs"] == 1
