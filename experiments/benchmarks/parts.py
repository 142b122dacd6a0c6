"""The parts of a step alone: the loss by batch and clusters, K-means beside its peers, reading batches.

    python experiments/benchmarks/parts.py [--json FILE]

Medians of several rounds. The loss is that of one of eight workers, forward and backward, at width 768; its memory is
what autograd keeps for the backward pass, which grows with b x B and b x K and never holds a B x B x D.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clusterns_ray.clustering.backend import spherical_kmeans
from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix, nearest_two
from clusterns_ray.config import load_config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.losses import Clusters, clusterns_loss_share, info_nce_share
from clusterns_ray.training.loop import Run

WIDTH, WORKERS = 768, 8
QUICKSTART = Path(__file__).parents[1] / "quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--clusters", type=int, nargs="+", default=[0, 128, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "loss": losses(arguments.batches, arguments.clusters, arguments.rounds),
        "kmeans": kmeans(arguments.rounds),
        "reading": reading(arguments.rounds),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"Wrote {arguments.json}")


def median(work: Callable[[], Any], rounds: int) -> float:
    """Seconds; one round more comes first."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


# ---- the loss -------------------------------------------------------------------------------------------------------


def losses(batches: list[int], clusters: list[int], rounds: int) -> list[dict[str, Any]]:
    print(f"The loss of one of {WORKERS} workers, width {WIDTH}, forward and backward")
    print(f"{'B':>7}{'K':>7}{'ms':>10}{'MB kept':>10}{'without clusters':>20}")
    found = []
    for batch in batches:
        plain = None
        for k in (k for k in clusters if k <= batch):
            z1_bD, z2_BD = inputs(batch)
            centroids_KD = torch.randn(k, WIDTH) if k else None
            seconds = median(lambda z1=z1_bD, z2=z2_BD, c=centroids_KD: loss(z1, z2, c).backward(), rounds)
            kept = kept_bytes(lambda z1=z1_bD, z2=z2_BD, c=centroids_KD: loss(z1, z2, c))
            plain = plain or seconds
            found.append({"batch": batch, "clusters": k, "seconds": seconds, "kept_bytes": kept})
            print(f"{batch:>7}{k:>7}{1000 * seconds:>10.1f}{kept / 1e6:>10.1f}{seconds / plain:>19.2f}x", flush=True)
    return found


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch // WORKERS, WIDTH, requires_grad=True), torch.randn(batch, WIDTH, requires_grad=True)


def loss(z1_bD: Tensor, z2_BD: Tensor, centroids_KD: Tensor | None) -> Tensor:
    """What ``training/objective.py`` computes of a worker's rows, but for the exchanges."""
    b, positive_b = len(z1_bD), torch.arange(len(z1_bD))
    cos_bB = cosine_matrix(z1_bD, z2_BD)
    if centroids_KD is None:
        return info_nce_share(cos_bB, positive_b, 0.05)
    cos_bK = cosine_matrix(z1_bD, centroids_KD)
    nearest_b, second_b = nearest_two(cos_bK.detach())
    nearest_B, second_B = nearest_b.repeat(len(z2_BD) // b), second_b.repeat(len(z2_BD) // b)
    clusters = Clusters(nearest_b, second_b, nearest_B, cluster_sizes(second_B, len(centroids_KD)))
    return clusterns_loss_share(
        cos_bB, cos_bK, positive_b, clusters, temperature=0.05, bml_weight=1e-3, bml_alpha=0.0, bml_beta=0.3
    ).loss


def kept_bytes(work: Callable[[], Any]) -> int:
    """Of the storages that autograd keeps."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = work()  # noqa: F841  so that no storage is given to the next tensor
    return sum(storages.values())


# ---- K-means and reading --------------------------------------------------------------------------------------------


def kmeans(rounds: int) -> dict[str, dict[str, float]]:
    """20,000 rows of width 384 around 100 directions, 128 clusters, 25 iterations, from one seed."""
    import faiss
    from sklearn.cluster import KMeans

    draw = np.random.default_rng(0)
    directions = draw.normal(size=(100, 384))
    z_ND = (directions[draw.integers(100, size=20_000)] + 2 * draw.normal(size=(20_000, 384))).astype(np.float32)
    n_ND = z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True)

    def with_faiss() -> np.ndarray:
        found = faiss.Kmeans(384, 128, niter=25, seed=0, spherical=True, max_points_per_centroid=len(n_ND))
        found.train(n_ND)
        return np.asarray(found.centroids)

    def with_sklearn() -> np.ndarray:
        model = KMeans(128, n_init=1, max_iter=25, random_state=0)  # type: ignore[arg-type]
        return model.fit(n_ND).cluster_centers_

    contestants = {
        "spherical_kmeans": lambda: spherical_kmeans(z_ND, 128, seed=0),
        "faiss.Kmeans": with_faiss,
        "sklearn.KMeans (not spherical)": with_sklearn,
    }
    print("K-means of 20,000 x 384 into 128 clusters: seconds, and mean cosine of a row with its centroid")
    found = {}
    for name, work in contestants.items():
        centroids_KD = work()
        centroids_KD = centroids_KD / np.linalg.norm(centroids_KD, axis=1, keepdims=True)
        score = float((n_ND @ centroids_KD.T).max(axis=1).mean())
        found[name] = {"seconds": median(work, min(rounds, 3)), "mean_cosine": score}
        print(f"  {name:<32}{found[name]['seconds']:>8.2f} s {score:>8.4f}", flush=True)
    return found


def reading(rounds: int) -> dict[str, float]:
    """Rows a second: choosing a step's rows, reading their tokens, and laying them out in shards."""
    config = load_config(QUICKSTART, ["evaluation.sts=null", "train.global_batch_size=1024", "train.shards=8"])
    tokens_dir = prepare(config).tokens_dir
    run = Run(config, tokens_dir, None, Path("."), torch.device("cpu"), lambda event: None, lambda metrics: None)
    steps = range(run.order.steps_per_epoch)
    seconds = median(lambda: [run.batch(step) for step in steps], rounds)
    rows = len(steps) * 1024 / seconds
    print(f"Reading batches of 1,024 as tensors: {rows:,.0f} rows/s")
    return {"rows_per_second": rows}


if __name__ == "__main__":
    main()
