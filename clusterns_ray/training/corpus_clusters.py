"""Clusters of the whole corpus (``clustering.scope: corpus``): the bank that they are made of, filled by all workers
together, kept fresh by the batches, and clustered anew every ``recluster_every_steps``.

Shape suffixes: B rows of the global batch, b rows of this worker, D width, K clusters, M negatives of a row.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clusterns_ray import distributed
from clusterns_ray.clustering.bank import Bank, draw_negatives
from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import Config
from clusterns_ray.data.sampler import random_draws, stream_key
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.errors import ConfigError
from clusterns_ray.io.events import OnNote
from clusterns_ray.losses import BankNegatives, bank_negative_logits, similar_mask
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.training.batch_layout import BatchLayout, to_device
from clusterns_ray.training.hard_negatives import StepNegatives
from clusterns_ray.training.kmeans_init import sample_rows, token_ids
from clusterns_ray.training.validation import encode_together

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

    def start_if_due(self, mean_cosine: Tensor, z1_bD: Tensor, z2_BD: Tensor, layout: BatchLayout) -> None:
        if self.clustering.should_start(mean_cosine, len(self.bank)):
            self.start()

    def of_batch(self, z1_bD: Tensor, cos_bB: Tensor, positive_b: Tensor, layout: BatchLayout) -> StepNegatives:
        """Terms from sentences that are drawn from the bank; then the batch goes into the bank."""
        loss = self.loss
        negatives = self.draw(z1_bD.detach(), layout)
        cos_bn = cosine_matrix(z1_bD, negatives.z_nD)
        logits_bn = None
        if loss.hard_negatives:
            columns, weight = loss.hard_negative_columns, loss.hard_negative_weight
            logits_bn = bank_negative_logits(cos_bn, positive_b, negatives, loss.temperature, columns, weight)
        lowest = self.settings.false_negative_cosine
        mask_bB = similar_mask(cos_bB, negatives.nearest_b, negatives.nearest_B, positive_b, lowest)
        own_pairs = mask_bB.sum()
        pairs = own_pairs
        if loss.bml_reduction == "false_negatives":
            pairs = distributed.all_reduce_sum(own_pairs.clone())
        own_bn = (negatives.row_n == positive_b[:, None]) & (negatives.slot_n >= 0)
        hard_negative_cosine = (cos_bn.detach() * own_bn).sum() / len(negatives.row_n)
        counts_K = cluster_sizes(negatives.nearest_B, self.clustering.num_clusters)
        self.refresh(z1_bD.detach(), layout)
        return StepNegatives(logits_bn, mask_bB, pairs, counts_K, hard_negative_cosine, own_pairs)

    def draw(self, z1_bD: Tensor, layout: BatchLayout) -> BankNegatives:
        """Cluster this worker's rows and draw the hard negatives of the whole batch; every ``recluster_every_steps``
        the bank is clustered first.

        One exchange of B x (1 + M) int64 numbers.
        """
        if self.age and self.age % self.settings.recluster_every_steps == 0:
            self._cluster()
        bank, centroids_KD = self.bank, self.clustering.centroids_KD
        assert bank.members is not None and bank.z_ND is not None and centroids_KD is not None
        cos_bK = cosine_matrix(z1_bD, centroids_KD)
        canonical_b = layout.canonical(layout.rank)
        own_b = to_device(bank.slots(layout.rows_B[canonical_b]), z1_bD.device)
        drawn_bM = draw_negatives(cos_bK, own_b, to_device(self._draws(canonical_b), z1_bD.device), bank.members)
        nearest_b = cos_bK.argmax(dim=1)
        gathered_BX = layout.gather(torch.cat([nearest_b[:, None], drawn_bM], dim=1))
        slot_n = gathered_BX[:, 1:].flatten()
        row_n = torch.arange(layout.size, device=slot_n.device).repeat_interleave(self.loss.bank_negatives)
        there_n = slot_n.clamp(min=0)
        return BankNegatives(
            nearest_b, gathered_BX[:, 0], own_b, bank.z_ND[there_n], slot_n, row_n, bank.members.cluster_N[there_n]
        )

    def refresh(self, z1_bD: Tensor, layout: BatchLayout) -> None:
        """Write the batch's embeddings over those of its rows; then encode the next ``refresh_rows`` anew.

        One exchange of B x D float32 numbers, and one of the rows that are encoded.
        """
        slots_B = self.bank.slots(layout.rows_B)
        known = np.flatnonzero(slots_B >= 0)
        z1_BD = layout.gather(z1_bD)
        self.bank.write(to_device(slots_B[known], z1_BD.device), z1_BD[to_device(known, z1_BD.device)])
        count = min(self.settings.refresh_rows, len(self.bank))
        if count:
            self._encode((self.age * count + np.arange(count)) % len(self.bank))
        self.age += 1

    def _draws(self, canonical_b: np.ndarray) -> np.ndarray:
        """int64 (b, M): a pure function of the seed, the step and the row's place in the global batch."""
        counters_bM = canonical_b[:, None] * self.loss.bank_negatives + np.arange(self.loss.bank_negatives)
        return random_draws(counters_bM, "bank_negatives", self.seed, self.age)

    def _encode(self, slots: np.ndarray) -> None:
        z_nD = encode_together(self.encoder, token_ids(self.tokens, self.bank.rows_N[slots]), project=True)
        device = self.encoder.device
        self.bank.write(to_device(slots, device), to_device(z_nD, device))

    def _cluster(self) -> None:
        seed = stream_key("bank_clusters", self.seed, self.age)
        self.clustering.set_centroids(self.bank.cluster(seed, self.clustering.centroids_KD))

    def state_dict(self) -> dict[str, Any]:
        return {"age": self.age, **self.bank.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.age = state["age"]
        self.bank.load_state_dict(state)
