"""One lookup of the word embeddings for all shards changes nothing but the time it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES
from torch import Tensor, nn

from clusterns_ray.config import EncoderConfig
from clusterns_ray.models.encoder import Encoder, TokenBatch
from clusterns_ray.training.collate import DropoutKeys, Shard
from clusterns_ray.training.objective import TwoViews


def shards_of(seed: int = 0, second: bool = False) -> list[Shard]:
    """Three shards of different lengths; the last rows are padded."""
    generator = torch.Generator().manual_seed(seed)
    shards = []
    for number, (rows, tokens) in enumerate(((4, 5), (3, 9), (4, 12))):
        ids = torch.randint(10, 90, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        ids[-1, tokens - 2 :], mask[-1, tokens - 2 :] = 1, 0
        other = (ids.flip(1).clone(), mask.flip(1).clone()) if second else None
        if other:
            other[1][:], other[0][:] = 1, torch.randint(10, 90, ids.shape, generator=generator)
        keys = DropoutKeys(seed, 1, np.arange(10 * number, 10 * number + rows))
        shards.append(Shard(ids, mask, keys, other))
    return shards


def outputs_and_gradients(views: TwoViews, shards: list[Shard]) -> tuple[Tensor, dict[str, Tensor]]:
    views.zero_grad(set_to_none=True)
    z1, z2, _ = views(shards)
    (z1 @ z2.T).logsumexp(dim=1).sum().backward()
    return torch.cat([z1, z2]).detach(), {n: p.grad.clone() for n, p in views.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_values_and_gradients(tiny_models: Callable[[str], Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.for_training(EncoderConfig(name=str(tiny_models(kind)), dropout=0.1), seed=0).train()
    views, shards = TwoViews(encoder, "fp32"), shards_of()
    z, gradients = outputs_and_gradients(views, shards)

    def batches(self: TwoViews, shard: Shard, words: list[Tensor]) -> list[TokenBatch]:
        twice = (shard.input_ids_BT.repeat(2, 1), shard.attention_mask_BT.repeat(2, 1))
        both = np.concatenate([shard.dropout_keys.of_rows(copy) for copy in ("first", "second")])
        return [TokenBatch(*twice, row_keys_B=both)]  # nothing shared, not even what both views read

    monkeypatch.setattr(TwoViews, "_batches", batches)
    plain_z, plain = outputs_and_gradients(views, shards)
    torch.testing.assert_close(z, plain_z, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == plain.keys() and any("embed" in name for name in plain)
    for name in plain:
        torch.testing.assert_close(gradients[name], plain[name], atol=1e-5 * float(plain[name].abs().max()), rtol=1e-4)


@pytest.mark.parametrize("packs", [True, False])
def test_the_gradient_of_the_vocabulary_is_made_once(
    packs: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of real tokens alone, where they are packed."""
    encoder = Encoder.for_training(EncoderConfig(name=str(tiny_model)), seed=0).train()
    encoder.packs = packs
    looked_up = []
    embedding = encoder.backbone.get_input_embeddings()
    forward = nn.Embedding.forward

    def counted(self: nn.Embedding, ids: Tensor) -> Tensor:
        if self is embedding:
            looked_up.append(ids.numel())
        return forward(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", counted)
    shards = shards_of()
    TwoViews(encoder, "fp32")(shards)
    real = sum(int(shard.attention_mask_BT.sum()) for shard in shards)
    assert looked_up == [real if packs else 4 * 5 + 3 * 9 + 4 * 12]


def test_two_prompts_have_words_of_their_own(tiny_model: Path) -> None:
    encoder = Encoder.for_training(EncoderConfig(name=str(tiny_model), dropout=0.0001), seed=0).train()
    encoder.backbone.eval()
    shards = shards_of(second=True)
    z1, z2, _ = TwoViews(encoder, "fp32")(shards)
    for z, ids in ((z1, [s.input_ids_BT for s in shards]), (z2, [s.second[0] for s in shards if s.second])):
        masks = [s.attention_mask_BT for s in shards] if z is z1 else [torch.ones_like(i) for i in ids]
        expected = torch.cat([encoder.project(encoder(i, m)) for i, m in zip(ids, masks, strict=True)])
        torch.testing.assert_close(z, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(z1, z2)
