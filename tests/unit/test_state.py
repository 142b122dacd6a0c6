from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from clusterns_ray.clustering.kmeans import assign, cosine_matrix, farthest_chain, member_statistics, update_centroids
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import LossConfig
from clusterns_ray.losses import clusterns_loss, info_nce
from clusterns_ray.training.hard_negatives import CentroidNegatives
from clusterns_ray.training.objective import VALUE_NAMES, Objective, StepLoss

K, B, D = 4, 16, 6
CPU = torch.device("cpu")


def clustering(start: float = 0.4, rate: float = 0.1, rule: str = "mean", k: int = K) -> Clustering:
    return Clustering(k, start, rate, rule)  # type: ignore[arg-type]


def views(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z1_BD = torch.randn(B, D, generator=generator) + 0.5
    return z1_BD, z1_BD + 0.3 * torch.randn(B, D, generator=generator)


def objective_with(state: Clustering, loss: LossConfig | None = None, **settings: Any) -> Objective:
    loss = loss or LossConfig()
    return Objective(loss, CentroidNegatives(loss, state, first_centroid=3, **settings))


# ---- the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "opens"), [(0.40001, False), (0.4, True), (0.39, True), (-0.2, True), (1.0, False), (math.nan, False)]
)
def test_the_gate_opens_at_or_below_the_threshold(mean: float, opens: bool) -> None:
    # In float64, as 0.4 in float32 is a little more than 0.4.
    assert clustering(0.4).should_start(torch.tensor(mean, dtype=torch.float64), B) is opens


def test_the_gate_opens_once() -> None:
    state = clustering()
    assert state.should_start(torch.tensor(0.1), B)
    state.set_centroids(torch.eye(K, D))
    assert state.started and not state.should_start(torch.tensor(0.1), B)


def test_no_clusters_or_too_few_rows_never_start() -> None:
    assert not clustering(k=0).should_start(torch.tensor(-1.0), B)
    assert not clustering().should_start(torch.tensor(-1.0), K - 1)
    assert clustering().should_start(torch.tensor(-1.0), K)


def test_the_threshold_is_met_exactly_by_the_step_that_reaches_it() -> None:
    """Through the objective: the mean is over all B x B cosines, diagonal included."""
    z1_BD, z2_BD = views()
    mean = float(cosine_matrix(z1_BD, z2_BD).mean())
    without_diagonal = (mean * B * B - float(cosine_matrix(z1_BD, z2_BD).diagonal().sum())) / (B * B - B)
    assert 0 < without_diagonal < mean - 0.02 < 1, "with and without the diagonal cannot be told apart"
    for start, opens in ((mean + 1e-5, True), (mean - 1e-5, False)):
        state = clustering(start)
        step = objective_with(state)(z1_BD, z2_BD, np.arange(B))
        assert state.started is opens
        assert dict(zip(VALUE_NAMES, step.values.tolist()))["mean_cosine"] == pytest.approx(mean, abs=1e-6)


# ---- the first centroids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 5, B + 5, 2**62 + 1])
def test_first_centroids_are_the_chain_of_raw_rows(first: int) -> None:
    z1_BD, z2_BD = views()
    state = clustering()
    state.create_from_batch(z1_BD, z2_BD, first)
    order_K = farthest_chain(cosine_matrix(z1_BD, z2_BD), K, first % B)
    assert len(set(order_K.tolist())) == K
    assert state.centroids_KD is not None
    assert torch.equal(state.centroids_KD, z1_BD[order_K])
    assert state.centroids_KD.dtype == torch.float32


def test_centroids_are_a_copy_without_gradient() -> None:
    z1_BD, z2_BD = (z.requires_grad_() for z in views())
    state = clustering()
    state.create_from_batch(z1_BD, z2_BD, 0)
    assert state.centroids_KD is not None and not state.centroids_KD.requires_grad
    before = state.centroids_KD.clone()
    with torch.no_grad():
        z1_BD.zero_()
    assert torch.equal(state.centroids_KD, before) and before.abs().max() > 0


# ---- moving them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean", "sum", "replace_sum"])
def test_update_is_the_pure_functions(rule: str) -> None:
    state = clustering(rule=rule)
    start_KD = torch.randn(K, D, generator=torch.Generator().manual_seed(9))
    state.set_centroids(start_KD)
    z1_BD, _ = views(1)
    counts_K = state.update(z1_BD)
    nearest_B, _ = assign(z1_BD, start_KD)
    sums_KD, expected_K = member_statistics(z1_BD, nearest_B, K)
    assert torch.equal(counts_K, expected_K) and counts_K.sum() == B and (counts_K > 0).sum() > 1
    expected_KD = update_centroids(start_KD, sums_KD, expected_K, 0.1, rule)  # type: ignore[arg-type]
    assert torch.equal(state.centroids_KD, expected_KD)
    assert not torch.allclose(expected_KD, start_KD)


def test_an_empty_cluster_keeps_its_centroid() -> None:
    state = clustering(rate=0.5)
    start_KD = torch.eye(K, D)
    state.set_centroids(start_KD)
    counts_K = state.update(torch.eye(K, D)[:2].repeat(4, 1) + 0.1)
    assert counts_K.tolist() == [4, 4, 0, 0]
    assert state.centroids_KD is not None
    assert torch.equal(state.centroids_KD[2:], start_KD[2:])
    assert not torch.equal(state.centroids_KD[:2], start_KD[:2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_moves_nothing(value: float) -> None:
    state = clustering(rate=0.5)
    state.set_centroids(torch.randn(K, D, generator=torch.Generator().manual_seed(9)))
    assert state.centroids_KD is not None
    before = state.centroids_KD.clone()
    z1_BD, _ = views(1)
    z1_BD[3, 2] = value
    state.update(z1_BD)
    assert torch.equal(state.centroids_KD, before)
    state.update(views(1)[0])
    assert not torch.equal(state.centroids_KD, before), "it never moves again"


def test_update_in_half_precision_is_done_in_float32() -> None:
    state = clustering(rate=1.0, rule="sum")
    state.set_centroids(torch.eye(K, D))
    state.update(torch.full((B, D), 1e4).half())
    assert state.centroids_KD is not None and state.centroids_KD.dtype == torch.float32
    assert state.centroids_KD.isfinite().all() and state.centroids_KD.max() == B * 1e4


# ---- keeping them -------------------------------------------------------------------------------------------------


def test_state_round_trip(tmp_path) -> None:
    state = clustering()
    state.create_from_batch(*views(), 0)
    state.update(views(1)[0])
    torch.save(state.state_dict(), tmp_path / "state.pt")
    again = clustering()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.started and torch.equal(again.centroids_KD, state.centroids_KD)
    state.update(views(2)[0])
    again.update(views(2)[0])
    assert torch.equal(again.centroids_KD, state.centroids_KD)


def test_state_before_the_start() -> None:
    again = clustering()
    again.set_centroids(torch.eye(K, D))
    again.load_state_dict(clustering().state_dict())
    assert not again.started and again.should_start(torch.tensor(0.0), B)


# ---- in a step ----------------------------------------------------------------------------------------------------


def step_of(objective: Objective, seed: int) -> tuple[StepLoss, torch.Tensor]:
    z1_BD, z2_BD = (z.requires_grad_() for z in views(seed))
    step = objective(z1_BD, z2_BD, np.arange(B))
    step.loss.backward()
    assert z1_BD.grad is not None and z1_BD.grad.abs().max() > 0
    return step, z1_BD.grad


def test_the_step_that_creates_the_centroids_is_plain_info_nce_and_the_next_is_not() -> None:
    loss = LossConfig(bml_weight=0.5, bml_alpha=0.1, bml_beta=0.3)
    state = clustering(1.0)
    objective = objective_with(state, loss)
    first, _ = step_of(objective, 0)
    z1_BD, z2_BD = views(0)
    assert first.loss.item() == pytest.approx(info_nce(z1_BD, z2_BD, loss.temperature).item(), rel=1e-6)
    assert first.counts_K is None and state.started
    created_KD = farthest_chain(cosine_matrix(z1_BD, z2_BD), K, 3)
    assert torch.equal(state.centroids_KD, z1_BD[created_KD]), "they moved in the step that created them"

    moved = clustering(1.0)
    moved.load_state_dict(state.state_dict())
    moved.update(views(1)[0])
    second, _ = step_of(objective, 1)
    assert torch.equal(state.centroids_KD, moved.centroids_KD)
    expected = clusterns_loss(
        *views(1), moved.centroids_KD, temperature=0.05, bml_weight=0.5, bml_alpha=0.1, bml_beta=0.3
    )
    values = dict(zip(VALUE_NAMES, second.values.tolist()))
    assert second.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert values["info_nce"] == pytest.approx(expected.info_nce.item(), rel=1e-6)
    assert values["bml"] == pytest.approx(expected.bml.item(), rel=1e-6) and values["bml"] > 0
    plain = info_nce(*views(1), 0.05).item()
    assert abs(second.loss.item() - plain) > 1e-3
    assert second.counts_K is not None and second.counts_K.sum() == B


def test_without_clusters_every_step_is_plain_info_nce() -> None:
    objective = Objective(LossConfig())
    for seed in range(3):
        step, _ = step_of(objective, seed)
        assert step.loss.item() == pytest.approx(info_nce(*views(seed), 0.05).item(), rel=1e-6)
        assert step.counts_K is None


def test_other_first_centroids_are_used_when_given() -> None:
    state = clustering(1.0)
    given_KD = torch.randn(K, D)
    objective_with(state, initial_centroids=lambda: given_KD)(*views(), np.arange(B))
    assert torch.equal(state.centroids_KD, given_KD)
