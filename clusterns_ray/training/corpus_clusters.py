"""Clusters of the whole corpus (``clustering.scope: corpus``): the bank that they are made of, filled by all workers
together, kept fresh by the batches, and clustered anew every ``recluster_every_steps``.

Shape suffixes: B rows of the global batch, b rows of a block of it, D width, K clusters, M negatives of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clusterns_ray.clustering.bank import Bank, draw_negatives
from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import Config
from clusterns_ray.data.sampler import random_draws, stream_key
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.errors import ConfigError
from clusterns_ray.io.events import OnNote
from clusterns_ray.losses import BankNegatives, bank_negative_logits, row_blocks, similar_mask
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.training.batch_layout import to_device
from clusterns_ray.training.hard_negatives import BatchNegatives
from clusterns_ray.training.kmeans_init import sample_rows, token_ids
from clusterns_ray.training.validation import embed_together

FILLED_AT_ONCE = 4096
"""Rows that are encoded between two checks of whether a note on the progress is due."""

NOTE_EVERY_S = 5.0


class CorpusClusters:
    """The bank and its centroids over a run; equal on every worker. The centroids are those of ``clustering``."""

    def __init__(
        self,
        config: Config,
        clustering: Clustering,
        tokens: TokenStore,
        encoder: Encoder,
        directory: Path,
        note: OnNote = lambda text: None,
    ) -> None:
        """
        Args:
            directory: where the bank's file may be.

        Raises:
            ConfigError: the corpus has fewer sentences than ``clustering.num_clusters``.
        """
        c = config.clustering
        rows = sample_rows(tokens, c.bank_rows, "bank", config.seed)
        if c.num_clusters > len(rows):
            raise ConfigError(
                f"clustering.num_clusters is {c.num_clusters}, but the corpus has {len(rows)} sentences, and each "
                f"cluster needs one. Use at most {len(rows)} clusters, or more text."
            )
        self.seed, self.settings, self.loss = config.seed, c, config.loss
        self.clustering, self.tokens, self.encoder, self.note = clustering, tokens, encoder, note
        self.bank = Bank(rows, encoder.width, c.num_clusters, directory, encoder.device)
        self.age = 0
        """steps taken with the bank"""

    def start(self) -> None:
        """Fill the bank and cluster it, on all workers together."""
        self.bank.allocate()
        self.note(f"Filling the bank of the corpus: {len(self.bank):,} sentences")
        noted = time.monotonic()
        for first in range(0, len(self.bank), FILLED_AT_ONCE):
            self._encode(np.arange(first, min(first + FILLED_AT_ONCE, len(self.bank))))
            if time.monotonic() - noted > NOTE_EVERY_S:
                noted = time.monotonic()
                self.note(f"  {min(first + FILLED_AT_ONCE, len(self.bank)):,} sentences")
        self._cluster()

    def start_if_due(self, mean_cosine: Tensor, z1_BD: Tensor, z2_BD: Tensor) -> None:
        if self.clustering.should_start(mean_cosine, len(self.bank)):
            self.start()

    def of_batch(self, z1_BD: Tensor, z2_BD: Tensor, rows_B: np.ndarray) -> BatchNegatives:
        """Terms from sentences that are drawn from the bank; then the batch goes into the bank."""
        loss, lowest = self.loss, self.settings.false_negative_cosine
        drawn = self.draw(z1_BD.detach(), rows_B)

        def mask(rows: slice, cos_bB: Tensor, positive_b: Tensor) -> Tensor:
            return similar_mask(cos_bB, drawn.nearest_B[rows], drawn.nearest_B, positive_b, lowest)

        def of_rows(rows: slice, cos_bB: Tensor, positive_b: Tensor) -> tuple[Tensor | None, Tensor | None]:
            logits_bn = None
            if loss.hard_negatives:
                cos_bn = cosine_matrix(z1_BD[rows], drawn.z_nD)
                columns, weight = loss.hard_negative_columns, loss.hard_negative_weight
                own = drawn._replace(nearest_b=drawn.nearest_B[rows], own_b=drawn.own_b[rows])
                logits_bn = bank_negative_logits(cos_bn, positive_b, own, loss.temperature, columns, weight)
            return logits_bn, mask(rows, cos_bB, positive_b)

        pairs = self._count_pairs(z1_BD, z2_BD, mask)
        own_Bn = F.cosine_similarity(z1_BD.detach()[drawn.row_n], drawn.z_nD) * (drawn.slot_n >= 0)
        counts_K = cluster_sizes(drawn.nearest_B, self.clustering.num_clusters)
        self.refresh(z1_BD.detach(), rows_B)
        return BatchNegatives(of_rows, pairs, counts_K, own_Bn.mean(), pairs)

    def draw(self, z1_BD: Tensor, rows_B: np.ndarray) -> BankNegatives:
        """Cluster the batch's rows and draw their hard negatives; every ``recluster_every_steps`` the bank is clustered
        first."""
        if self.age and self.age % self.settings.recluster_every_steps == 0:
            self._cluster()
        bank, centroids_KD = self.bank, self.clustering.centroids_KD
        assert bank.members is not None and bank.z_ND is not None and centroids_KD is not None
        cos_BK = cosine_matrix(z1_BD, centroids_KD)
        own_B = to_device(bank.slots(rows_B), z1_BD.device)
        drawn_BM = draw_negatives(cos_BK, own_B, to_device(self._draws(len(rows_B)), z1_BD.device), bank.members)
        nearest_B, slot_n = cos_BK.argmax(dim=1), drawn_BM.flatten()
        row_n = torch.arange(len(rows_B), device=slot_n.device).repeat_interleave(self.loss.bank_negatives)
        there_n = slot_n.clamp(min=0)
        return BankNegatives(
            nearest_B, nearest_B, own_B, bank.z_ND[there_n], slot_n, row_n, bank.members.cluster_N[there_n]
        )

    def refresh(self, z1_BD: Tensor, rows_B: np.ndarray) -> None:
        """Write the batch's embeddings over those of its rows; then encode the next ``refresh_rows`` anew.

        One exchange of the rows that are encoded.
        """
        slots_B = self.bank.slots(rows_B)
        known = np.flatnonzero(slots_B >= 0)
        self.bank.write(to_device(slots_B[known], z1_BD.device), z1_BD[to_device(known, z1_BD.device)])
        count = min(self.settings.refresh_rows, len(self.bank))
        if count:
            self._encode((self.age * count + np.arange(count)) % len(self.bank))
        self.age += 1

    @staticmethod
    @torch.no_grad()
    def _count_pairs(z1_BD: Tensor, z2_BD: Tensor, mask: Callable[[slice, Tensor, Tensor], Tensor]) -> Tensor:
        """How many false negatives the batch has."""
        pairs = torch.zeros((), dtype=torch.int64, device=z1_BD.device)
        for rows in row_blocks(len(z1_BD)):
            positive_b = torch.arange(rows.start, rows.stop, device=z1_BD.device)
            pairs = pairs + mask(rows, cosine_matrix(z1_BD[rows], z2_BD), positive_b).sum()
        return pairs

    def _draws(self, batch: int) -> np.ndarray:
        """int64 (B, M): a pure function of the seed, the step and the row's place in the global batch."""
        counters = np.arange(batch * self.loss.bank_negatives).reshape(batch, -1)
        return random_draws(counters, "bank_negatives", self.seed, self.age)

    def _encode(self, slots: np.ndarray) -> None:
        z_nD = embed_together(self.encoder, token_ids(self.tokens, self.bank.rows_N[slots]), project=True)
        self.bank.write(to_device(slots, self.encoder.device), z_nD)

    def _cluster(self) -> None:
        seed = stream_key("bank_clusters", self.seed, self.age)
        self.clustering.set_centroids(self.bank.cluster(seed, self.clustering.centroids_KD))

    def state_dict(self) -> dict[str, Any]:
        return {"age": self.age, **self.bank.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.age = state["age"]
        self.bank.load_state_dict(state)
