from __future__ import annotations

import importlib.metadata
import importlib.util
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clusterns_ray.clustering import backend
from clusterns_ray.clustering.backend import faiss_conflict, spherical_kmeans
from clusterns_ray.errors import DataError

CPU = torch.device("cpu")
HAS_FAISS = importlib.util.find_spec("faiss") is not None


@pytest.fixture(params=["faiss", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing; the second as if faiss were not installed."""
    if request.param == "faiss" and not HAS_FAISS:
        pytest.skip("faiss is not installed")
    used: list[str] = []
    for name in ("faiss", "torch"):
        original = getattr(backend, f"_{name}_kmeans")

        def spy(*args: Any, original: Any = original, name: str = name) -> Any:
            used.append(name)
            return original(*args)

        monkeypatch.setattr(backend, f"_{name}_kmeans", spy)
    find_spec = importlib.util.find_spec
    if request.param == "torch":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else find_spec(name))
    request.addfinalizer(lambda: pytest.fail("the other library was used") if set(used) - {request.param} else None)
    return request.param


def blobs(k: int = 5, members: int = 40, width: int = 16, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Rows of random length around ``k`` orthogonal directions, and which of them each belongs to."""
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(k), members))
    directions = np.linalg.qr(rng.normal(size=(width, k)))[0].T
    rows = directions[truth] + noise * rng.normal(size=(len(truth), width))
    return (rows * rng.uniform(0.1, 10, size=(len(truth), 1))).astype(np.float32), truth


def nearest(z: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return (z @ centroids.T).argmax(axis=1)


def objective(z: np.ndarray, centroids: np.ndarray) -> float:
    return float((z / np.linalg.norm(z, axis=1, keepdims=True) @ centroids.T).max(axis=1).mean())


def test_it_goes_on_from_given_centroids(library: str) -> None:
    z, _ = blobs(noise=0.4)
    first = spherical_kmeans(z, 7, seed=1, iterations=2)
    again = spherical_kmeans(z, 7, seed=99, iterations=5, initial_KD=first)
    assert objective(z, again) >= objective(z, first) - 1e-5
    assert float(np.median((first * again).sum(axis=1))) > 0.85, "it began elsewhere"


def test_the_size_of_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    z, _ = blobs(noise=0.4)
    whole = backend._torch_kmeans(z, 7, 3, 5, None, CPU)
    monkeypatch.setattr(backend, "AT_ONCE", 13)
    np.testing.assert_allclose(backend._torch_kmeans(z, 7, 3, 5, None, CPU), whole, atol=1e-6)


@pytest.mark.parametrize(("device", "expected"), [("cpu", "faiss"), ("cuda", "torch")])
def test_torch_computes_where_the_embeddings_are_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: str
) -> None:
    used: list[str] = []
    for name in ("faiss", "torch"):
        monkeypatch.setattr(backend, f"_{name}_kmeans", lambda *args, name=name: used.append(name))
    spherical_kmeans(blobs()[0], 5, seed=0, device=torch.device(device))
    assert used == [expected if HAS_FAISS else "torch"]


def test_separable_clusters_are_found(library: str) -> None:
    z, truth = blobs()
    # Lloyd's iterations may stop in a local optimum; of some seeds one finds the best.
    best = max((spherical_kmeans(z, 5, seed=seed) for seed in range(8)), key=lambda c: objective(z, c))
    assert best.shape == (5, 16) and best.dtype == np.float32
    pairs = set(zip(nearest(z, best).tolist(), truth.tolist()))
    assert len(pairs) == 5, "a cluster is split, or two are one"


def test_centroids_are_unit_and_better_than_rows(library: str) -> None:
    z, _ = blobs(noise=0.4)
    before = z.copy()
    centroids = spherical_kmeans(z, 7, seed=1)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    assert np.array_equal(z, before), "the caller's embeddings were changed"
    rows = z[:7] / np.linalg.norm(z[:7], axis=1, keepdims=True)
    assert objective(z, centroids) > objective(z, rows) + 0.02


def test_the_length_of_rows_does_not_matter(library: str) -> None:
    z, _ = blobs()
    scaled = z * np.float32(4)
    np.testing.assert_allclose(spherical_kmeans(z, 5, seed=1), spherical_kmeans(scaled, 5, seed=1), atol=1e-5)


def test_the_result_is_a_function_of_the_seed(library: str) -> None:
    z, _ = blobs(noise=0.5)
    first = spherical_kmeans(z, 8, seed=3)
    assert np.array_equal(first, spherical_kmeans(z, 8, seed=3))
    assert any(not np.allclose(first, spherical_kmeans(z, 8, seed=seed)) for seed in range(4, 8))


def test_seeds_of_any_size(library: str) -> None:
    z, _ = blobs()
    assert np.isfinite(spherical_kmeans(z, 5, seed=2**63 - 1)).all()


def test_as_many_clusters_as_rows(library: str) -> None:
    z = np.eye(6, dtype=np.float32)
    centroids = spherical_kmeans(z, 6, seed=0)
    assert sorted(nearest(z, centroids).tolist()) == list(range(6))


def test_copies_and_zeros_do_no_harm(library: str) -> None:
    z = np.concatenate([np.zeros((2, 4)), np.tile(np.eye(4)[:2], (10, 1))]).astype(np.float32)
    centroids = spherical_kmeans(z, 4, seed=0)
    assert centroids.shape == (4, 4) and np.isfinite(centroids).all()


def test_too_few_rows(library: str) -> None:
    with pytest.raises(DataError, match=r"9 clusters asked from 8 embeddings\. Use at most 8"):
        spherical_kmeans(np.ones((8, 4), dtype=np.float32), 9, seed=0)


# ---- two wheels of faiss ------------------------------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, **wheels: str) -> None:
    found = [
        SimpleNamespace(metadata={"Name": name.replace("__", "-")}, version=version) for name, version in wheels.items()
    ]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(found))


def test_two_wheels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, numpy="2.0", faiss_gpu="1.14", faiss__cpu="1.10")
    text = faiss_conflict()
    assert text is not None
    assert "faiss-cpu 1.10 and faiss-gpu 1.14 are both installed" in text
    assert text.endswith("Uninstall both, then install one: pip install faiss-cpu.")


@pytest.mark.parametrize("wheels", [{}, {"faiss_cpu": "1.10"}, {"faiss_gpu": "1.14", "faissimilar": "1"}])
def test_one_wheel_or_none_is_fine(monkeypatch: pytest.MonkeyPatch, wheels: dict[str, str]) -> None:
    install(monkeypatch, **wheels)
    assert faiss_conflict() is None


def test_a_distribution_without_a_name_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = SimpleNamespace(metadata={"Name": None}, version="0")
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter([nameless]))
    assert faiss_conflict() is None


def test_one_wheel_that_is_seen_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same directory may be on sys.path twice."""
    wheel = SimpleNamespace(metadata={"Name": "faiss-cpu"}, version="1.10")
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter([wheel, wheel]))
    assert faiss_conflict() is None


def test_what_is_installed_here_is_read() -> None:
    wheels = [name for name in ("faiss-cpu", "faiss-gpu") if any(importlib.metadata.distributions(name=name))]
    assert (faiss_conflict() is not None) is (len(wheels) == 2)


def test_every_row_is_trained_on() -> None:
    """faiss by itself takes a sample of 256 rows a centroid. A single centroid tells, as it is the mean."""
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2000, 8)).astype(np.float32) + 1
    n = z / np.linalg.norm(z, axis=1, keepdims=True)
    mean = n.mean(axis=0)
    found = backend.spherical_kmeans(z, 1, seed=3)
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-5)
