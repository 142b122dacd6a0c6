"""One step's computation: the two views of this worker's shards, and the loss of the whole batch.

Shape suffixes: B rows of the global batch, b rows of this worker, D width, K clusters, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clusterns_ray import distributed
from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix, nearest_two
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import LossConfig
from clusterns_ray.losses import (
    ClusterNSLoss,
    Clusters,
    bank_negative_logits,
    clusterns_loss_share,
    info_nce_share,
    rank_distillation_share,
    similar_mask,
    weighed_share,
)
from clusterns_ray.models.encoder import Encoder, TokenBatch, autocast
from clusterns_ray.training.batch_layout import BatchLayout
from clusterns_ray.training.collate import Shard
from clusterns_ray.training.corpus_clusters import CorpusClusters
from clusterns_ray.training.mlm import prediction_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TwoViews(nn.Module):
    """Both views of every shard: two dropout draws of one batch, or a batch of each where their tokens differ. The part
    with gradients, so DDP wraps it."""

    def __init__(self, encoder: Encoder, precision: str, language_model: nn.Module | None = None):
        super().__init__()
        self.encoder = encoder
        self.language_model = language_model
        self.dtype = DTYPES[precision]

    def forward(self, shards: list[Shard]) -> tuple[Tensor, Tensor, Tensor]:
        """``(z1_bD, z2_bD)`` in float32, the shards' rows one after the other; and of masked language modelling the
        sum of the losses and the number of tokens (2), zeros where it is off."""
        mlm = torch.zeros(2, device=shards[0].input_ids_BT.device)
        # One context for all shards, as it casts each weight once.
        with autocast(shards[0].input_ids_BT.device, self.dtype):
            batches = [self._batches(shard, words) for shard, words in zip(shards, self._look_up(shards), strict=True)]
            found = iter(self.encoder.embed([batch for both in batches for batch in both]))
            # First the embeddings of the first view, then those of the second.
            pairs = [torch.cat([next(found) for _ in both]) for both in batches]
            views = [self.encoder.project(pair_BD).float().chunk(2) for pair_BD in pairs]
            for shard in shards:
                if self.language_model is not None and shard.masked is not None:
                    ids_BT, labels_BT = shard.masked
                    torch.manual_seed(shard.dropout_keys[2])
                    mlm = mlm + prediction_loss(self.language_model, ids_BT, shard.attention_mask_BT, labels_BT)
        return torch.cat([z1 for z1, _ in views]), torch.cat([z2 for _, z2 in views]), mlm

    def _look_up(self, shards: list[Shard]) -> list[list[Tensor]]:
        """The word embeddings of each shard's views, read at once: the gradient of a lookup is as large as the whole
        vocabulary, and would be made anew, mostly of zeros, for each of them."""
        ids = [[shard.input_ids_BT] + ([shard.second[0]] if shard.second else []) for shard in shards]
        token_embeds_ND = self.encoder.backbone.get_input_embeddings()(
            torch.cat([part.flatten() for row in ids for part in row])
        )
        parts = iter(token_embeds_ND.split([part.numel() for row in ids for part in row]))
        return [[next(parts).view(*part.shape, -1) for part in row] for row in ids]

    def _batches(self, shard: Shard, words: list[Tensor]) -> list[TokenBatch]:
        """Both views as one batch, or as one each."""
        ids_BT, mask_BT, keys = shard.input_ids_BT, shard.attention_mask_BT, shard.dropout_keys
        if shard.second is None:
            return [TokenBatch(ids_BT, mask_BT, 0, words[0], keys[0], draws=2)]
        return [
            TokenBatch(ids_BT, mask_BT, 0, words[0], keys[0]),
            TokenBatch(*shard.second, 1, words[1], keys[1]),
        ]


class StepLoss(NamedTuple):
    """Everything is a tensor on the device, so that an ordinary step does not wait for it."""

    scaled_loss: Tensor
    """scalar whose gradient, averaged over the workers, is that of the global loss"""
    shares: Tensor
    """this worker's shares of the values named in ``SHARE_NAMES``; over all workers they add up to them"""
    counts_K: Tensor | None
    """rows of the global batch in each cluster, or None before clustering has started"""
    false_negatives: Tensor | None = None
    """this worker's share of the number of false negatives, where the clusters alone do not tell it"""


SHARE_NAMES = ("loss", "info_nce", "bml", "mean_cosine", "hard_negative_cosine", "distillation", "mlm")


class Objective:
    """The loss of a step, and the centroids it moves."""

    def __init__(
        self,
        loss: LossConfig,
        clustering: Clustering,
        first_centroid: int,
        initial_centroids: Callable[[], Tensor] | None = None,
        corpus: CorpusClusters | None = None,
    ):
        """
        Args:
            first_centroid: where the chain of first centroids begins, a number taken modulo the batch's rows.
            initial_centroids: makes them otherwise, on all workers together, in place of the chain.
            corpus: clusters of the whole corpus, in place of those that follow the batches.
        """
        self.loss = loss
        self.clustering = clustering
        self.first_centroid = first_centroid
        self.initial_centroids = initial_centroids
        self.corpus = corpus

    def __call__(
        self,
        z1_bD: Tensor,
        z2_bD: Tensor,
        layout: BatchLayout,
        mlm: Tensor | None = None,
        teacher_bD: Tensor | None = None,
    ) -> StepLoss:
        """Loss of this worker's rows against the whole batch; ``mlm`` as :class:`TwoViews` gives it, ``teacher_bD`` as
        :class:`~clusterns_ray.training.teacher.Teacher` does.

        Order: keys are gathered; until clustering has started the loss is InfoNCE, also in the very step that
        creates the centroids; after that the centroids move first, and hard negatives, false negatives and loss
        are taken from the moved ones. With clusters of the corpus, the batch goes into the bank at the end.
        """
        positive_b = layout.positive_b(z1_bD.device)
        z2_BD = layout.gather(z2_bD)
        cos_bB = cosine_matrix(z1_bD, z2_BD)
        mean_cosine = cos_bB.detach().sum() / layout.size**2

        counts_K = false_negatives = None
        hard_negative_cosine = torch.zeros_like(mean_cosine)
        if self.clustering.started and self.corpus is not None:
            found = self._with_corpus(self.corpus, z1_bD, cos_bB, positive_b, layout)
            terms, counts_K, hard_negative_cosine, false_negatives = found
        elif self.clustering.centroids_KD is not None:
            counts_K = self.clustering.update(z1_bD.detach())
            cos_bK = cosine_matrix(z1_bD, self.clustering.centroids_KD)
            clusters = self._assign(cos_bK.detach(), layout)
            terms = self._clusterns(cos_bB, cos_bK, positive_b, clusters)
            own_b = cos_bK.detach().gather(1, clusters.second_b[:, None])
            hard_negative_cosine = own_b.sum() / layout.size
        else:
            info_nce = info_nce_share(cos_bB, positive_b, self.loss.temperature)
            terms = ClusterNSLoss(info_nce, info_nce, torch.zeros_like(info_nce))
            if self.clustering.num_clusters:
                self._start_clustering(mean_cosine, z1_bD, z2_BD, layout)

        loss, distillation, mlm_share = terms.loss, torch.zeros_like(mean_cosine), torch.zeros_like(mean_cosine)
        if teacher_bD is not None:
            teacher_cos_bB = cosine_matrix(teacher_bD, layout.gather(teacher_bD))
            temperatures = (self.loss.temperature, self.loss.teacher_temperature)
            distillation = rank_distillation_share(cos_bB, teacher_cos_bB, positive_b, *temperatures)
            loss = loss + self.loss.distillation_weight * distillation
        if self.loss.mlm_weight and mlm is not None:
            tokens = distributed.all_reduce_sum(mlm[1].detach().clone())
            mlm_share = mlm[0] / tokens.clamp(min=1)
            loss = loss + self.loss.mlm_weight * mlm_share
        shares = [loss, terms.info_nce, terms.bml, mean_cosine, hard_negative_cosine, distillation, mlm_share]
        shares = torch.stack([share.detach() for share in shares])
        return StepLoss(loss * distributed.world_size(), shares, counts_K, false_negatives)

    def unused_terms(self) -> list[str]:
        """Names of ``SHARE_NAMES`` whose terms the configuration leaves out."""
        used = {"distillation": self.loss.teacher is not None, "mlm": self.loss.mlm_weight > 0}
        return [name for name, on in used.items() if not on]

    def _assign(self, cos_bK: Tensor, layout: BatchLayout) -> Clusters:
        nearest_b, second_b = nearest_two(cos_bK)
        nearest_B, second_B = layout.gather(torch.stack([nearest_b, second_b], dim=1)).unbind(dim=1)
        return Clusters(nearest_b, second_b, nearest_B, cluster_sizes(second_B, cos_bK.shape[1]))

    def _clusterns(self, cos_bB: Tensor, cos_bK: Tensor, positive_b: Tensor, clusters: Clusters) -> ClusterNSLoss:
        return clusterns_loss_share(
            cos_bB,
            cos_bK,
            positive_b,
            clusters,
            temperature=self.loss.temperature,
            hard_negatives=self.loss.hard_negatives,
            hard_negative_columns=self.loss.hard_negative_columns,
            hard_negative_weight=self.loss.hard_negative_weight,
            bml_weight=self.loss.bml_weight,
            bml_alpha=self.loss.bml_alpha,
            bml_beta=self.loss.bml_beta,
            bml_reduction=self.loss.bml_reduction,
        )

    def _with_corpus(
        self, corpus: CorpusClusters, z1_bD: Tensor, cos_bB: Tensor, positive_b: Tensor, layout: BatchLayout
    ) -> tuple[ClusterNSLoss, Tensor, Tensor, Tensor]:
        """The loss, rows in each cluster, and shares of the hard negatives' mean cosine and of the false negatives."""
        loss = self.loss
        negatives = corpus.draw(z1_bD.detach(), layout)
        cos_bn = cosine_matrix(z1_bD, negatives.z_nD)
        logits_bn = None
        if loss.hard_negatives:
            columns, weight = loss.hard_negative_columns, loss.hard_negative_weight
            logits_bn = bank_negative_logits(cos_bn, positive_b, negatives, loss.temperature, columns, weight)
        lowest = corpus.settings.false_negative_cosine
        mask_bB = similar_mask(cos_bB, negatives.nearest_b, negatives.nearest_B, positive_b, lowest)
        pairs = mask_bB.sum()
        terms = weighed_share(
            cos_bB,
            logits_bn,
            positive_b,
            mask_bB,
            distributed.all_reduce_sum(pairs.clone()) if loss.bml_reduction == "false_negatives" else pairs,
            temperature=loss.temperature,
            bml_weight=loss.bml_weight,
            bml_alpha=loss.bml_alpha,
            bml_beta=loss.bml_beta,
            bml_reduction=loss.bml_reduction,
        )
        own_bn = (negatives.row_n == positive_b[:, None]) & (negatives.slot_n >= 0)
        hard_negative_cosine = (cos_bn.detach() * own_bn).sum() / len(negatives.row_n)
        corpus.refresh(z1_bD.detach(), layout)
        counts_K = cluster_sizes(negatives.nearest_B, self.clustering.num_clusters)
        return terms, counts_K, hard_negative_cosine, pairs

    def _start_clustering(self, mean_cosine_share: Tensor, z1_bD: Tensor, z2_BD: Tensor, layout: BatchLayout) -> None:
        mean_cosine = distributed.all_reduce_sum(mean_cosine_share.clone())
        rows = layout.size if self.corpus is None else len(self.corpus.bank)
        if not self.clustering.should_start(mean_cosine, rows):
            return
        if self.corpus is not None:
            self.corpus.start()
        elif self.initial_centroids is not None:
            self.clustering.set_centroids(self.initial_centroids())
        else:
            z1_BD = layout.gather(z1_bD.detach())
            self.clustering.create_from_batch(z1_BD, z2_BD.detach(), self.first_centroid)
