"""One step's computation: the two views of this worker's shards, and the loss of the whole batch.

Shape suffixes: B rows of the global batch, b rows of this worker, D width, K clusters, T tokens.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from clusterns_ray import distributed
from clusterns_ray.clustering.kmeans import cosine_matrix
from clusterns_ray.config import LossConfig
from clusterns_ray.losses import clusterns_loss_share, rank_distillation_share
from clusterns_ray.models.encoder import Encoder, TokenBatch, autocast
from clusterns_ray.models.sdpa import keyed_dropout
from clusterns_ray.training.batch_layout import BatchLayout
from clusterns_ray.training.collate import Shard
from clusterns_ray.training.hard_negatives import HardNegatives
from clusterns_ray.training.mlm import prediction_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TwoViews(nn.Module):
    """Both views of every shard: two dropout draws of one batch, or a batch of each where their tokens differ. The part
    with gradients, so DDP wraps it."""

    def __init__(self, encoder: Encoder, precision: str, language_model: nn.Module | None = None) -> None:
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
            batches = [
                self._batches(shard, token_embeds)
                for shard, token_embeds in zip(shards, self._token_embeds(shards), strict=True)
            ]
            embeddings = iter(self.encoder.embed([batch for both in batches for batch in both]))
            # First the embeddings of the first view, then those of the second.
            pairs = [torch.cat([next(embeddings) for _ in both]) for both in batches]
            views = [self.encoder.project(pair_BD).float().chunk(2) for pair_BD in pairs]
            for shard in shards:
                if self.language_model is not None and shard.masked is not None:
                    ids_BT, labels_BT = shard.masked
                    with keyed_dropout(shard.dropout_keys.masked_B, ids_BT.device):
                        mlm = mlm + prediction_loss(self.language_model, ids_BT, shard.attention_mask_BT, labels_BT)
        return torch.cat([z1 for z1, _ in views]), torch.cat([z2 for _, z2 in views]), mlm

    def _token_embeds(self, shards: list[Shard]) -> list[list[Tensor]]:
        """The word embeddings of each shard's views, read at once: the gradient of a lookup is as large as the whole
        vocabulary, and would be made anew, mostly of zeros, for each of them."""
        ids = [[shard.input_ids_BT] + ([shard.second[0]] if shard.second else []) for shard in shards]
        token_embeds_ND = self.encoder.backbone.get_input_embeddings()(
            torch.cat([part.flatten() for row in ids for part in row])
        )
        parts = iter(token_embeds_ND.split([part.numel() for row in ids for part in row]))
        return [[next(parts).view(*part.shape, -1) for part in row] for row in ids]

    def _batches(self, shard: Shard, token_embeds: list[Tensor]) -> list[TokenBatch]:
        """Both views as one batch, or as one each."""
        ids_BT, mask_BT, keys = shard.input_ids_BT, shard.attention_mask_BT, shard.dropout_keys
        if shard.second is None:
            both_B = np.concatenate([keys.first_B, keys.second_B])
            return [TokenBatch(ids_BT, mask_BT, 0, token_embeds[0], both_B, keys.templates[0], draws=2)]
        return [
            TokenBatch(ids_BT, mask_BT, 0, token_embeds[0], keys.first_B, keys.templates[0]),
            TokenBatch(*shard.second, 1, token_embeds[1], keys.second_B, keys.templates[1]),
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
    """this worker's share of the number of false negatives, where the clusters alone do not determine it"""


SHARE_NAMES = ("loss", "info_nce", "bml", "mean_cosine", "hard_negative_cosine", "distillation", "mlm")


class Objective:
    """The loss of a step, and the centroids it moves."""

    def __init__(self, loss: LossConfig, hard_negatives: HardNegatives | None = None) -> None:
        """
        Args:
            hard_negatives: where they come from; None for plain SimCSE.
        """
        self.loss, self.hard_negatives = loss, hard_negatives

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
        are taken from the moved ones.
        """
        positive_b = layout.positive_b(z1_bD.device)
        z2_BD = layout.gather(z2_bD)
        cos_bB = cosine_matrix(z1_bD, z2_BD)
        mean_cosine = cos_bB.detach().sum() / layout.size**2
        zero = torch.zeros_like(mean_cosine)

        source, negatives = self.hard_negatives, None
        if source is not None and source.clustering.started:
            negatives = source.of_batch(z1_bD, cos_bB, positive_b, layout)
        elif source is not None:
            source.start_if_due(distributed.all_reduce_sum(mean_cosine.clone()), z1_bD, z2_BD, layout)

        terms = clusterns_loss_share(
            cos_bB,
            negatives and negatives.hard_logits_bH,
            positive_b,
            negatives and negatives.mask_bB,
            negatives.pairs if negatives else 0.0,
            temperature=self.loss.temperature,
            bml_weight=self.loss.bml_weight,
            bml_alpha=self.loss.bml_alpha,
            bml_beta=self.loss.bml_beta,
            bml_reduction=self.loss.bml_reduction,
        )
        loss, distillation, mlm_share = terms.loss, zero, zero
        if teacher_bD is not None:
            teacher_cos_bB = cosine_matrix(teacher_bD, layout.gather(teacher_bD))
            temperatures = (self.loss.temperature, self.loss.teacher_temperature)
            distillation = rank_distillation_share(cos_bB, teacher_cos_bB, positive_b, *temperatures)
            loss = loss + self.loss.distillation_weight * distillation
        if self.loss.mlm_weight and mlm is not None:
            tokens = distributed.all_reduce_sum(mlm[1].detach().clone())
            mlm_share = mlm[0] / tokens.clamp(min=1)
            loss = loss + self.loss.mlm_weight * mlm_share
        hard_negative_cosine = negatives.hard_negative_cosine if negatives else zero
        shares = [loss, terms.info_nce, terms.bml, mean_cosine, hard_negative_cosine, distillation, mlm_share]
        return StepLoss(
            loss * distributed.world_size(),
            torch.stack([share.detach() for share in shares]),
            negatives and negatives.counts_K,
            negatives and negatives.false_negatives,
        )

    def unused_terms(self) -> list[str]:
        """Names of ``SHARE_NAMES`` whose terms the configuration leaves out."""
        used = {"distillation": self.loss.teacher is not None, "mlm": self.loss.mlm_weight > 0}
        return [name for name, on in used.items() if not on]
