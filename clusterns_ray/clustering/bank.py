"""A bank of embeddings of the corpus, its clusters, and the sentences that are drawn from them as hard negatives.

Equal on every worker: what is written into it has been gathered, and what worker 0 clusters is broadcast.
Shape suffixes: N rows of the bank, n some of them, b rows of this worker, D width, K clusters, M negatives of a row.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clusterns_ray import distributed
from clusterns_ray.clustering.backend import AT_ONCE, spherical_kmeans
from clusterns_ray.clustering.kmeans import COSINE_EPS, cluster_sizes, cosine_matrix
from clusterns_ray.errors import ClusterNSError

FIRST_ITERATIONS, LATER_ITERATIONS = 25, 10
"""Iterations of K-means from random rows, and from the centroids of the time before."""


class Members(NamedTuple):
    """Which rows of the bank each cluster holds, since K-means last ran."""

    cluster_N: Tensor
    """int64, cluster of each row"""
    by_cluster_N: Tensor
    """int64, the rows of cluster 0, then those of cluster 1, ...; each cluster's in ascending order"""
    place_N: Tensor
    """int64, where each row stands in ``by_cluster_N``"""
    starts_K: Tensor
    """int64, where each cluster begins in ``by_cluster_N``"""
    sizes_K: Tensor
    """int64"""


def list_members(cluster_N: Tensor, k: int) -> Members:
    """The rows of each of ``k`` clusters, from the cluster of each row (int64)."""
    by_cluster_N = cluster_N.argsort(stable=True)
    place_N = torch.empty_like(by_cluster_N)
    place_N[by_cluster_N] = torch.arange(len(cluster_N), device=cluster_N.device)
    sizes_K = cluster_sizes(cluster_N, k)
    return Members(cluster_N, by_cluster_N, place_N, sizes_K.cumsum(0) - sizes_K, sizes_K)


def draw_negatives(cos_bK: Tensor, own_b: Tensor, draws_bM: Tensor, members: Members) -> Tensor:
    """Rows of the bank from each row's second nearest cluster; of empty ones the next nearest that is not.

    A cluster counts as empty for a row if it holds nothing, or only that row itself, which is never drawn. The nearest
    cluster, empty or not, is left out. Waits for no device.

    Args:
        cos_bK: ``cos(z_i, c_k)``.
        own_b: int64, each row's own place in the bank, -1 where it has none.
        draws_bM: int64, not negative: number m of the s rows of a cluster is drawn by ``draw % s``.

    Returns:
        int64 (b, M), with replacement; -1 where every other cluster is empty.
    """
    known_b, slot_b = own_b >= 0, own_b.clamp(min=0)
    own_cluster_b = members.cluster_N[slot_b]
    sizes_bK = members.sizes_K.repeat(len(cos_bK), 1)
    sizes_bK.scatter_add_(1, own_cluster_b[:, None], -known_b.long()[:, None])
    open_bK = cos_bK.masked_fill(sizes_bK <= 0, -torch.inf).scatter(1, cos_bK.argmax(dim=1, keepdim=True), -torch.inf)
    best_b, second_b = open_bK.max(dim=1)
    size_b = sizes_bK.gather(1, second_b[:, None])
    place_bM = members.starts_K[second_b][:, None] + draws_bM % size_b.clamp(min=1)
    # The row itself is stepped over.
    own_place_b = torch.where(known_b & (own_cluster_b == second_b), members.place_N[slot_b], len(members.place_N))
    place_bM = place_bM + (place_bM >= own_place_b[:, None])
    drawn_bM = members.by_cluster_N[place_bM.clamp(max=len(members.by_cluster_N) - 1)]
    return torch.where(best_b.isfinite()[:, None], drawn_bM, -1)


class Bank:
    """``z_ND``, float32, and the clusters of its rows; None until it is filled.

    On a CPU the embeddings are a memory-mapped file without a name, which goes with the process; else GPU memory.
    """

    def __init__(
        self, rows_N: np.ndarray, width: int, num_clusters: int, directory: Path, device: torch.device
    ) -> None:
        """
        Args:
            rows_N: int64, the rows of the corpus that it keeps, in ascending order.
            directory: where the file is.
        """
        self.rows_N = rows_N
        self.width, self.num_clusters = width, num_clusters
        self.directory, self.device = directory, device
        self.z_ND: Tensor | None = None
        self.members: Members | None = None

    def __len__(self) -> int:
        return len(self.rows_N)

    def slots(self, rows: np.ndarray) -> np.ndarray:
        """Where rows of the corpus (int64, any number) are in the bank: int64, -1 for those that are not."""
        place = np.searchsorted(self.rows_N, rows).clip(max=len(self) - 1)
        return np.where(self.rows_N[place] == rows, place, -1)

    def allocate(self) -> Tensor:
        """Make room for all rows, zeros, on all workers together.

        Raises:
            ClusterNSError: on every worker, where one has no room: none waits for the others.
        """
        shape, refused = (len(self), self.width), None
        try:
            on_cpu = self.device.type == "cpu"
            self.z_ND = mapped_zeros(self.directory, *shape) if on_cpu else torch.zeros(shape, device=self.device)
        except ClusterNSError as error:
            refused = error
        if bool(distributed.all_reduce_sum(torch.tensor(float(refused is not None), device=self.device))):
            raise refused or ClusterNSError(
                f"The bank of embeddings needs {4 * len(self) * self.width / 1e6:,.0f} MB on the machine of each "
                "worker, and that of another has no room for it. Free some, or lower clustering.bank_rows."
            )
        assert self.z_ND is not None
        return self.z_ND

    @torch.no_grad()
    def write(self, slots_n: Tensor, z_nD: Tensor) -> None:
        """Replace some rows (different ones), as given: not normalised; one that is not finite stays as it was."""
        assert self.z_ND is not None
        kept_nD = torch.where(z_nD.isfinite().all(dim=1, keepdim=True), z_nD.float(), self.z_ND[slots_n])
        self.z_ND.index_copy_(0, slots_n, kept_nD)

    @torch.no_grad()
    def cluster(self, seed: int, initial_KD: Tensor | None) -> Tensor:
        """Spherical K-means over all rows, on worker 0 for all.

        Args:
            initial_KD: the centroids of the time before, if there were any.

        Returns:
            float32 (K, D), unit rows.
        """
        assert self.z_ND is not None
        directions_KD = torch.zeros(self.num_clusters, self.width, device=self.device)
        cluster_N = torch.zeros(len(self), dtype=torch.int64, device=self.device)
        if distributed.rank() == 0:
            unit_KD = spherical_kmeans(
                self.z_ND.cpu().numpy(),
                self.num_clusters,
                seed=seed,
                iterations=FIRST_ITERATIONS if initial_KD is None else LATER_ITERATIONS,
                initial_KD=None if initial_KD is None else F.normalize(initial_KD, eps=COSINE_EPS).cpu().numpy(),
                device=self.device,
            )
            directions_KD = torch.as_tensor(unit_KD).to(self.device)
            parts = torch.split(self.z_ND, AT_ONCE)
            cluster_N = torch.cat([cosine_matrix(part, directions_KD).argmax(dim=1) for part in parts])
        directions_KD = distributed.broadcast(directions_KD)
        self.members = list_members(distributed.broadcast(cluster_N), self.num_clusters)
        return directions_KD

    def empty(self) -> int:
        """Clusters without a row."""
        return 0 if self.members is None else int((self.members.sizes_K == 0).sum())

    def state_dict(self) -> dict[str, Any]:
        """What is not a function of the configuration; tensors of the bank itself, not copies."""
        return {"z_ND": self.z_ND, "cluster_N": None if self.members is None else self.members.cluster_N}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.z_ND = self.members = None
        if state["z_ND"] is not None:
            self.allocate().copy_(state["z_ND"])
            self.members = list_members(state["cluster_N"].to(self.device), self.num_clusters)


def mapped_zeros(directory: Path, *shape: int) -> Tensor:
    """A float32 tensor of zeros in a memory-mapped file of ``directory``, which is gone when the process is.

    Raises:
        ClusterNSError: the file cannot be made, or there is no room for it.
    """
    count = int(np.prod(shape))
    name = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".bank-", dir=directory)
        try:
            # Taken now, as a mapped file that finds the disk full later kills the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, 4 * count)
            else:
                os.truncate(handle, 4 * count)
        finally:
            os.close(handle)
        return torch.from_file(name, shared=True, size=count, dtype=torch.float32).view(shape)
    except (OSError, RuntimeError) as error:  # torch's, where the file system maps no files
        raise ClusterNSError(
            f"The bank of embeddings needs {4 * count / 1e6:,.0f} MB in {str(directory)!r}, which are not available "
            f"({getattr(error, 'strerror', None) or error}). Free some, or lower clustering.bank_rows."
        ) from error
    finally:
        if name is not None:
            os.unlink(name)
