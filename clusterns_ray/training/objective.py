"""One step's computation: the two views of this worker's shards, and the loss of the whole batch.

Shape suffixes: B rows of the global batch, b rows of this worker or of a block, D width, K clusters, H hard negatives,
T tokens.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from clusterns_ray import distributed
from clusterns_ray.clustering.kmeans import cosine_matrix, mean_of_cosines
from clusterns_ray.config import LossConfig
from clusterns_ray.losses import clusterns_loss_share, rank_distillation_share, row_blocks
from clusterns_ray.models.encoder import Encoder, TokenBatch, autocast
from clusterns_ray.models.sdpa import keyed_dropout
from clusterns_ray.training.collate import Shard
from clusterns_ray.training.hard_negatives import BatchNegatives, HardNegatives
from clusterns_ray.training.mlm import packed_prediction_loss, prediction_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TwoViews(nn.Module):
    """Both views of every shard: two dropout draws of one batch, or a batch of each where their tokens differ. The part
    with gradients, so DDP wraps it."""

    def __init__(self, encoder: Encoder, precision: str, language_model: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.language_model = language_model
        self.dtype = DTYPES[precision]

    @contextmanager
    def same_weights(self) -> Generator[None]:
        """Inside, all passes multiply by the same casts of the weights, through which gradients flow."""
        with autocast(self.encoder.device, self.dtype), self.encoder.same_weights(self.dtype, frozen=False):
            yield

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
                    if shard.predicted_R is not None and self.encoder.can_pack():
                        lengths_B = (shard.lengths or [None])[0]
                        batch = TokenBatch(
                            ids_BT,
                            shard.attention_mask_BT,
                            row_keys_B=shard.dropout_keys.of_rows("masked"),
                            lengths_B=lengths_B,
                        )
                        mlm = mlm + packed_prediction_loss(
                            self.encoder, self.language_model, batch, shard.predicted_R, labels_BT
                        )
                        continue
                    mask_BT = self.encoder.attention_mask(shard.attention_mask_BT)
                    with keyed_dropout(shard.dropout_keys.of_rows("masked"), ids_BT.device):
                        mlm = mlm + prediction_loss(self.language_model, ids_BT, mask_BT, labels_BT)
        return torch.cat([z1 for z1, _ in views]), torch.cat([z2 for _, z2 in views]), mlm

    def _token_embeds(self, shards: list[Shard]) -> list[list[Tensor | None]]:
        """The word embeddings of each shard's views, read at once: the gradient of a lookup is as large as the whole
        vocabulary, and would be made anew, mostly of zeros, for each of them. A packed pass looks them up by itself."""
        if self.encoder.can_pack():
            return [[None, None]] * len(shards)
        ids = [[shard.input_ids_BT] + ([shard.second[0]] if shard.second else []) for shard in shards]
        token_embeds_ND = self.encoder.backbone.get_input_embeddings()(
            torch.cat([part.flatten() for row in ids for part in row])
        )
        parts = iter(token_embeds_ND.split([part.numel() for row in ids for part in row]))
        return [[next(parts).view(*part.shape, -1) for part in row] for row in ids]

    def _batches(self, shard: Shard, token_embeds: list[Tensor | None]) -> list[TokenBatch]:
        """Both views as one batch, or as one each."""
        ids_BT, mask_BT, keys = shard.input_ids_BT, shard.attention_mask_BT, shard.dropout_keys
        lengths, of_views = shard.lengths or (None, None), (keys.of_rows("first"), keys.of_rows("second"))
        batch = TokenBatch(ids_BT, mask_BT, 0, token_embeds[0], of_views[0], None, lengths[0])
        if shard.second is None:
            batches = [batch._replace(row_keys_B=np.concatenate(of_views), draws=2)]
        else:
            batches = [batch, TokenBatch(*shard.second, 1, token_embeds[1], of_views[1], None, lengths[1])]
        if not self.encoder.denoise:
            return batches
        return [b._replace(template_keys_B=keys.of_template(b.row_lengths_B(), b.view)) for b in batches]


class StepLoss(NamedTuple):
    """Of the global batch, the same on every worker. All are tensors on the device, so that an ordinary step does not
    wait for it."""

    loss: Tensor
    """scalar, with a gradient"""
    values: Tensor
    """the values named in ``VALUE_NAMES``"""
    counts_K: Tensor | None
    """rows in each cluster, or None before clustering has started"""
    false_negatives: Tensor | None = None
    """the number of false negatives, where the clusters alone do not determine it"""


VALUE_NAMES = ("loss", "info_nce", "bml", "mean_cosine", "hard_negative_cosine", "distillation", "mlm")


class Objective:
    """The loss of a step, and the centroids it moves.

    Every worker computes it, of the whole batch: that is little beside the encoder's work, and all have the same
    gradient of every row without exchanging it.
    """

    def __init__(self, loss: LossConfig, hard_negatives: HardNegatives | None = None) -> None:
        """
        Args:
            hard_negatives: where they come from; None for plain SimCSE.
        """
        self.loss, self.hard_negatives = loss, hard_negatives

    def __call__(
        self,
        z1_BD: Tensor,
        z2_BD: Tensor,
        rows_B: np.ndarray,
        mlm_N2: Tensor | None = None,
        teacher_BD: Tensor | None = None,
    ) -> StepLoss:
        """Loss of the global batch.

        Order: until clustering has started the loss is InfoNCE, also in the very step that creates the centroids; after
        that the centroids move first, and hard negatives, false negatives and loss are taken from the moved ones.

        Args:
            rows_B: the numbers of the rows in the corpus.
            mlm_N2: as :class:`~clusterns_ray.training.views.Views` gives it.
            teacher_BD: as :class:`~clusterns_ray.training.teacher.Teacher` gives it.
        """
        mean_cosine = mean_of_cosines(z1_BD.detach(), z2_BD.detach())
        source, negatives = self.hard_negatives, None
        if source is not None and source.clustering.started:
            negatives = source.of_batch(z1_BD, z2_BD, rows_B)
        elif source is not None:
            # Worker 0's, as all have to decide alike on unequal machines too.
            source.start_if_due(distributed.broadcast(mean_cosine.clone()), z1_BD.detach(), z2_BD.detach())

        blocks = row_blocks(len(z1_BD))
        if len(blocks) == 1:
            terms = self._terms(z1_BD, z2_BD, blocks[0], negatives, teacher_BD)
        else:
            of_blocks: list[Tensor] = [
                checkpoint(self._terms, z1_BD, z2_BD, rows, negatives, teacher_BD, use_reentrant=False)
                for rows in blocks
            ]
            terms = torch.stack(of_blocks).sum(dim=0)
        contrastive, info_nce, bml, distillation = terms.unbind()
        loss, mlm = contrastive, torch.zeros_like(contrastive)
        if teacher_BD is not None:
            loss = loss + self.loss.distillation_weight * distillation
        if self.loss.mlm_weight and mlm_N2 is not None:
            total, tokens = mlm_N2.sum(dim=0).unbind()
            mlm = total / tokens.detach().clamp(min=1)
            loss = loss + self.loss.mlm_weight * mlm
        hard_negative_cosine = negatives.hard_negative_cosine if negatives else torch.zeros_like(mean_cosine)
        values = [loss, info_nce, bml, mean_cosine, hard_negative_cosine, distillation, mlm]
        return StepLoss(
            loss,
            torch.stack([value.detach() for value in values]),
            negatives and negatives.counts_K,
            negatives and negatives.false_negatives,
        )

    def _terms(
        self, z1_BD: Tensor, z2_BD: Tensor, rows: slice, negatives: BatchNegatives | None, teacher_BD: Tensor | None
    ) -> Tensor:
        """The contrastive loss, its InfoNCE and BML, and the distillation (4): a block of rows' parts of them."""
        positive_b = torch.arange(rows.start, rows.stop, device=z1_BD.device)
        cos_bB = cosine_matrix(z1_BD[rows], z2_BD)
        hard_logits_bH, mask_bB = negatives.of_rows(rows, cos_bB, positive_b) if negatives else (None, None)
        terms = clusterns_loss_share(
            cos_bB,
            hard_logits_bH,
            positive_b,
            mask_bB,
            negatives.pairs if negatives else 0.0,
            temperature=self.loss.temperature,
            bml_weight=self.loss.bml_weight,
            bml_alpha=self.loss.bml_alpha,
            bml_beta=self.loss.bml_beta,
            bml_reduction=self.loss.bml_reduction,
        )
        distillation = torch.zeros_like(terms.loss)
        if teacher_BD is not None:
            teacher_cos_bB = cosine_matrix(teacher_BD[rows], teacher_BD)
            temperatures = (self.loss.temperature, self.loss.teacher_temperature)
            distillation = rank_distillation_share(cos_bB, teacher_cos_bB, positive_b, *temperatures)
        return torch.stack([terms.loss, terms.info_nce, terms.bml, distillation])

    def unused_terms(self) -> list[str]:
        """Names of ``VALUE_NAMES`` whose terms the configuration leaves out."""
        used = {"distillation": self.loss.teacher is not None, "mlm": self.loss.mlm_weight > 0}
        return [name for name, on in used.items() if not on]
