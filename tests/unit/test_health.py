"""How clusters fare, how they are described, and what is said when they, or the embeddings, collapse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clusterns_ray.clustering.describe import LONGEST_EXAMPLE, describe_clusters
from clusterns_ray.clustering.health import EMPTY_AFTER, ClusterHealth
from clusterns_ray.training.collapse_monitor import CollapseMonitor

CENTROIDS = torch.eye(4)


def counts(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_nothing_is_seen_before_clustering() -> None:
    health = ClusterHealth()
    health.observe(None, None)
    assert health.empty() == 0 and health.steps == 0 and health.sizes_K is None


def test_sizes_add_up_from_one_look_to_the_next() -> None:
    health = ClusterHealth()
    health.observe(CENTROIDS, None)  # the step that creates the centroids
    health.observe(CENTROIDS, counts(3, 1, 0, 0))
    health.observe(CENTROIDS, counts(0, 4, 0, 0))
    assert health.take(CENTROIDS) == {"cluster_sizes": [3, 5, 0, 0], "centroid_drift": 0.0}
    health.observe(CENTROIDS, counts(0, 0, 2, 2))
    assert health.take(CENTROIDS)["cluster_sizes"] == [0, 0, 2, 2]


def test_sizes_stay_exact_where_float32_would_not() -> None:
    health = ClusterHealth()
    for _ in range(3):
        health.observe(CENTROIDS[:2], counts(2**24, 1))
    assert health.take(CENTROIDS[:2])["cluster_sizes"] == [3 * 2**24, 3]


def test_drift_is_one_minus_the_cosine_whatever_the_length() -> None:
    health = ClusterHealth()
    health.observe(CENTROIDS[:2], None)
    angle = 0.3
    turned = torch.tensor([[5.0, 0, 0, 0], [-np.sin(angle), np.cos(angle), 0, 0]], dtype=torch.float32)
    assert health.take(turned)["centroid_drift"] == pytest.approx((1 - np.cos(angle)) / 2, abs=1e-6)
    assert health.take(turned)["centroid_drift"] == pytest.approx(0, abs=1e-6), "it is taken from the last look"


def test_a_cluster_is_empty_after_so_many_steps_without_a_sentence() -> None:
    health = ClusterHealth()
    health.observe(CENTROIDS, None)
    health.observe(CENTROIDS, counts(1, 1, 1, 0))
    assert health.empty() == 1, "never filled"
    for step in range(2, EMPTY_AFTER + 2):
        health.observe(CENTROIDS, counts(1, 1, 0, 0))
        assert health.empty() == (2 if step == EMPTY_AFTER + 1 else 1), step
    health.observe(CENTROIDS, counts(0, 1, 0, 1))
    assert health.empty() == 1, "one sentence fills it"


def test_health_comes_back_from_a_checkpoint() -> None:
    health = ClusterHealth()
    for step in range(60):
        health.observe(CENTROIDS + 0.01 * step, counts(1, step % 2, 0, 2))
    other = ClusterHealth()
    other.load_state_dict(health.state_dict())
    for each in (health, other):
        each.observe(CENTROIDS, counts(0, 0, 0, 1))
    assert health.empty() == other.empty() == 1
    assert health.take(CENTROIDS) == other.take(CENTROIDS)


def test_clusters_are_described_by_their_most_typical_sentences() -> None:
    centroids = np.array([[1, 0], [0, 1], [-1, 0]], dtype=np.float32)
    angles = np.array([0.0, 0.3, 0.1, 1.5, 0.2])
    z = 7 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    texts = ["zero", "three", "one", "up", "two"]
    found = describe_clusters(z, centroids, lambda rows: [texts[row] for row in rows], examples=3)
    assert [(c["cluster"], c["size"]) for c in found] == [(0, 4), (1, 1)], "an empty one is left out"
    assert found[0]["examples"] == ["zero", "one", "two"]
    assert found[0]["tightness"] == pytest.approx(np.cos([0, 0.3, 0.1, 0.2]).mean(), abs=1e-4)
    long = describe_clusters(z[:1], centroids, lambda rows: ["x" * 9999])
    assert len(long[0]["examples"][0]) == LONGEST_EXAMPLE


# ---- collapse monitor ---------------------------------------------------------------------------------------------


def test_a_mean_cosine_that_comes_back_is_warned_of_once() -> None:
    monitor = CollapseMonitor(8)
    assert monitor(1, {"mean_cosine": 0.95}, 0) == [], "an encoder may begin there"
    assert monitor(1, {"mean_cosine": 0.88}, 0) == monitor(2, {"mean_cosine": 0.92}, 0) == [], "and waver"
    assert monitor(2, {"mean_cosine": 0.5}, 0) == []
    warnings = monitor(3, {"mean_cosine": 0.93}, 0)
    assert len(warnings) == 1 and "Collapse at step 3" in warnings[0] and "0.93" in warnings[0]
    assert monitor(4, {"mean_cosine": 0.95}, 0) == []
    assert monitor(5, {"mean_cosine": 0.4}, 0) == []
    assert len(monitor(6, {"mean_cosine": 0.91}, 0)) == 1, "it came back after it had passed"


def test_empty_clusters_are_warned_of_after_fifty_steps() -> None:
    monitor = CollapseMonitor(10)
    values = {"mean_cosine": 0.1, "empty_clusters": 3}
    assert monitor(40, values, EMPTY_AFTER - 1) == []
    warnings = monitor(50, values, EMPTY_AFTER)
    assert len(warnings) == 1 and "3 of 10 clusters" in warnings[0] and "clustering.num_clusters" in warnings[0]
    assert monitor(60, {**values, "empty_clusters": 5}, 60) == []
    assert CollapseMonitor(10)(60, {**values, "empty_clusters": 2}, 60) == []


def test_clusters_of_a_bank_are_warned_of_in_their_own_words() -> None:
    (text,) = CollapseMonitor(10, of_corpus=True)(60, {"mean_cosine": 0.1, "empty_clusters": 4}, 60)
    assert text.startswith("At step 60, 4 of 10 clusters hold no sentence of the bank.") and "bank_rows" in text
