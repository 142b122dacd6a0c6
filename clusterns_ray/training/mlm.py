"""Masked language modelling beside the contrastive loss: which tokens are masked, and the head that predicts them.

Devlin et al., "BERT", NAACL 2019, section 3.1; as an auxiliary loss Gao et al., "SimCSE", EMNLP 2021, section 2.
Shape suffixes: B sentences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterns_ray.models.encoder import Encoder, TokenBatch

IGNORED = -100
"""The label of a token that is not predicted."""


def mask_tokens(
    ids_BT: Tensor,
    probability: float,
    *,
    mask_id: int,
    vocabulary: int,
    kept_ids: Sequence[int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Choose each token with ``probability``; of those 80 % become the mask token, 10 % a random one, 10 % stay.

    Args:
        ids_BT: int64, left as they are.
        kept_ids: special tokens and padding, never chosen.
        generator: the only source of randomness.

    Returns:
        ``(masked_BT, labels_BT)``, int64; a label is the true token, or ``IGNORED`` where nothing is predicted.
    """
    chance_BT = torch.rand(ids_BT.shape, generator=generator)
    how_BT = torch.rand(ids_BT.shape, generator=generator)
    random_BT = torch.randint(vocabulary, ids_BT.shape, generator=generator)
    special_BT = torch.isin(ids_BT, torch.tensor(sorted(kept_ids), dtype=ids_BT.dtype))
    chosen_BT = (chance_BT < probability) & ~special_BT
    masked_BT = torch.where(chosen_BT & (how_BT < 0.8), mask_id, ids_BT)
    masked_BT = torch.where(chosen_BT & (how_BT >= 0.9), random_BT, masked_BT)
    return masked_BT, torch.where(chosen_BT, ids_BT, IGNORED)


def prediction_loss(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of the cross-entropies of the predicted tokens, and their number: float32 (2)."""
    logits_BTV: Any = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    total = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return torch.stack([total, (labels_BT != IGNORED).sum().to(total.dtype)])


def packed_prediction_loss(
    encoder: Encoder, model: nn.Module, batch: TokenBatch, at_R: Tensor, labels_BT: Tensor
) -> Tensor:
    """The same, where the encoder packs its batches: the last layer and the head see the predicted tokens alone.

    Args:
        at_R: their places in the padded batch, read row by row: int64, one at least, and perhaps one that is ignored.
    """
    labels_R = labels_BT.flatten()[at_R]
    logits_RV = prediction_head(model)(encoder.states_at(batch, at_R))
    total = F.cross_entropy(logits_RV.float(), labels_R, ignore_index=IGNORED, reduction="sum")
    return torch.stack([total, (labels_R != IGNORED).sum().to(total.dtype)])


def prediction_head(model: Any) -> nn.Module:
    """What makes logits of the states of BERT's and RoBERTa's language models."""
    return model.cls if model.config.model_type == "bert" else model.lm_head


class LanguageModelHead:
    """What a masked language model has besides its backbone, as a part of a checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        prefix = f"{self.model.base_model_prefix}."
        return {name: value for name, value in self.model.state_dict().items() if not name.startswith(prefix)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state, strict=False)
