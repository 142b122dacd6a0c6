from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, make_tiny_model, quick_first
from torch.utils._pytree import tree_leaves

from clusterns_ray.clustering.bank import Bank
from clusterns_ray.config import Config, TrainConfig, make_config
from clusterns_ray.errors import ConfigError
from clusterns_ray.launch.estimates import (
    FLOAT,
    ModelSize,
    bank_bytes,
    checkpoint_bytes,
    held_shards,
    model_size,
    run_bytes,
    worker_memory,
)
from clusterns_ray.launch.trainer import train
from clusterns_ray.losses import BLOCK
from clusterns_ray.models.backbone import load_language_model
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.training.collate import DropoutKeys, Shard
from clusterns_ray.training.mlm import IGNORED
from clusterns_ray.training.objective import TwoViews
from clusterns_ray.training.reduction import chunked


def config_of(model: Path, corpus: str = "none.txt", **sections: Any) -> Config:
    values: dict[str, Any] = {
        "encoder": {"name": str(model), "num_layers": 2},
        "data": {"corpus": corpus},
        "clustering": {"num_clusters": 4, "start_cosine": 1.0},
        "train": {"global_batch_size": 16, "shards": 4, "max_steps": 2, "precision": "fp32"},
        "runtime": {"trackers": []},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return make_config(values)


@pytest.mark.parametrize(
    ("kind", "head"), quick_first([("bert", "none"), *((kind, "mlp") for kind in reversed(ARCHITECTURES))], 2)
)
def test_parameters_are_those_of_the_real_encoder(
    tiny_models: Callable[[str], Path], tmp_path: Path, kind: str, head: str
) -> None:
    config = config_of(tiny_models(kind), encoder={"head": head, "dropout": 0.1})
    size = model_size(config)
    real = Encoder.for_training(config.encoder, seed=0)
    assert size.all == sum(p.numel() for p in real.parameters()) > 0
    assert size.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert (size.width, size.layers) == (real.width, 2)
    real.save(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert size.exported_bytes <= written < 1.2 * size.exported_bytes + 8192


def test_masked_language_modelling_adds_its_head(tiny_model: Path) -> None:
    without = model_size(config_of(tiny_model, encoder={"dropout": 0.1}))
    having = model_size(config_of(tiny_model, encoder={"dropout": 0.1}, loss={"mlm_weight": 0.1}))
    assert having.all > without.all and having.shard_bytes > 1.5 * without.shard_bytes
    assert having.exported_bytes == without.exported_bytes


@pytest.fixture(scope="module")
def trained(tiny_model: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run of two steps with centroids."""
    storage = tmp_path_factory.mktemp("runs")
    runtime = {"storage_path": str(storage), "name": "run", "use_gpu": False, "checkpoint_every_steps": 1}
    config = config_of(tiny_model, str(corpus_file), runtime={**runtime, "trackers": []})
    train(config)
    return config, storage


def test_a_checkpoint_holds_what_was_estimated(trained: tuple[Config, Path]) -> None:
    config, storage = trained
    (file,) = storage.glob("run/checkpoints/step-00000002/state.pt")
    state = torch.load(file, weights_only=True)
    held = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    # What belongs to no parameter: AdamW's counts of steps, the health of the clusters.
    tensors = sum(leaf.nbytes for leaf in held if leaf.ndim and leaf.numel() > 8)
    assert len(held) > 50
    estimate = checkpoint_bytes(model_size(config), config)
    assert estimate == pytest.approx(tensors, rel=0.002)
    assert estimate <= file.stat().st_size < 1.5 * estimate + 100_000


def test_the_bank_is_in_the_estimates(tiny_model: Path, tmp_path: Path) -> None:
    few = {"scope": "corpus", "bank_rows": 100, "start_cosine": 1.0}
    config, without = (config_of(tiny_model, clustering=c) for c in ({"num_clusters": 4, **few}, {"num_clusters": 4}))
    size = model_size(config)
    bank = Bank(np.arange(100), size.width, 4, tmp_path, torch.device("cpu"))
    bank.write(torch.arange(100), torch.randn(100, size.width, out=bank.allocate()))
    bank.cluster(0, None)
    held = sum(value.nbytes for value in bank.state_dict().values())
    assert held == bank_bytes(size, config) and bank_bytes(size, without) == 0
    assert checkpoint_bytes(size, config) == checkpoint_bytes(size, without) + held
    # Of two checkpoints that stay, and the one that is written; and on the one worker.
    assert run_bytes(size, config) == run_bytes(size, without) + 4 * held
    assert bank_bytes(size, config_of(tiny_model, clustering={"num_clusters": 0, "scope": "corpus"})) == 0


def test_a_run_takes_no_more_disk_than_was_estimated(trained: tuple[Config, Path]) -> None:
    config, storage = trained
    files = [
        file for part in ("checkpoints", "model") for file in (storage / "run" / part).rglob("*") if file.is_file()
    ]
    written = sum(file.stat().st_size for file in files)
    # Two checkpoints of the three that may be there for a moment, one model of two, and the tokenizer.
    assert 0.4 * run_bytes(model_size(config), config) < written < 1.5 * run_bytes(model_size(config), config)


def saved_by_real_tensors(config: Config, rows: int, tokens: int, packs: bool) -> int:
    """What autograd keeps of a real forward pass of a shard, each storage once; the weights' own left out."""
    encoder = Encoder.for_training(config.encoder, seed=0).train()
    encoder.packs = packs
    language_model, masked, predicted_R = None, None, None
    if config.loss.mlm_weight:
        language_model = load_language_model(config.encoder.name, encoder.backbone)[0].train()
        chosen = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(1)) < config.loss.mlm_probability
        masked = torch.ones(rows, tokens, dtype=torch.int64), torch.where(chosen, 1, IGNORED)
        predicted_R = chosen.flatten().nonzero()[:, 0]
    views = TwoViews(encoder, config.train.precision, language_model)
    ids = torch.ones(rows, tokens, dtype=torch.int64)
    own = {p.untyped_storage().data_ptr() for p in views.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keys = DropoutKeys(0, 0, np.arange(rows))
        views([Shard(ids, ids, keys, None, masked, None, predicted_R)])
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SHAPES = [("fp32", "mean", 33), ("bf16", "cls", 24), ("fp32", "mean", 32), ("fp32", "cls", 32), ("bf16", "mean", 33)]


@pytest.mark.parametrize(("precision", "pooling", "tokens"), quick_first(SHAPES, 2))
def test_activations_are_those_of_real_tensors(tiny_model: Path, precision: str, pooling: str, tokens: int) -> None:
    encoder = {"dropout": 0.1, "max_length": tokens, "pooling": pooling}
    config = config_of(tiny_model, encoder=encoder, train={"precision": precision})
    size = model_size(config)
    assert size.tokens_a_row == tokens
    estimate = size.fixed_bytes + size.shard_bytes
    assert estimate == pytest.approx(saved_by_real_tensors(config, 4, tokens, packs=False), rel=0.02)
    packed, estimate = saved_by_real_tensors(config, 4, tokens, packs=True), estimate + size.filled_bytes
    assert packed <= 1.02 * estimate
    if pooling == "mean":  # of one token, the last of the two layers keeps little
        assert packed > 0.75 * estimate


def test_activations_of_masked_language_modelling_are_those_of_real_tensors(tiny_model: Path) -> None:
    """Of its head, those of the predicted tokens alone."""
    encoder = {"dropout": 0.1, "max_length": 32, "pooling": "mean"}
    config = config_of(
        tiny_model, encoder=encoder, loss={"mlm_weight": 0.1}, train={"global_batch_size": 256, "shards": 4}
    )
    size = model_size(config)
    saved = saved_by_real_tensors(config, 64, 32, packs=True)
    estimate = size.fixed_bytes + size.shard_bytes + size.filled_bytes
    assert 0.75 * estimate < saved <= 1.02 * estimate


def test_activations_are_about_those_of_the_published_formula(tiny_model: Path) -> None:
    """Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", MLSys 2023, equation 1:
    34 s b h + 5 a s^2 b bytes a layer in 16 bits with a feed-forward layer of 4 h. In 32 bits, masks as well, with a
    feed-forward layer of f, these are 4 (5 h + h + 2 f + 2 h) + 2 * 4 h a token, and 12 a s."""
    batch, tokens, h, f, heads, layers = 64, 64, 32, 48, 2, 2
    config = config_of(
        tiny_model,
        encoder={"dropout": 0.1, "max_length": tokens, "head": "none", "pooling": "mean"},
        train={"global_batch_size": batch, "shards": 1},
    )
    size = model_size(config)
    a_token = 4 * (5 * h + h + 2 * f + 2 * h) + 2 * 4 * h + 12 * heads * tokens
    assert size.shard_bytes == pytest.approx(2 * batch * tokens * layers * a_token, rel=0.35)


def test_memory_of_a_worker() -> None:
    size = ModelSize(
        all=1000,
        trained=900,
        width=8,
        layers=1,
        exported_bytes=4000,
        tokens_a_row=8,
        fixed_bytes=10,
        shard_bytes=100,
        loss_bytes=64,
        filled_bytes=20,
    )
    tree, ddp = (TrainConfig(reduction=way) for way in ("tree", "all_reduce"))
    one, four = (worker_memory(size, ddp, workers, gpu=False) for workers in (1, 4))
    assert (one.weights, one.gradients, one.optimizer, one.partial_sums) == (4000, 3600, 7200, 0)
    assert one.activations == 10 + 8 * 120 + 64
    assert (four.partial_sums, four.activations) == (3600, 10 + 2 * 120 + 64)
    # Of 8 shards three sums wait beside the last gradient; workers of one shard each hold what they send and get.
    assert [worker_memory(size, tree, n, gpu=False).partial_sums // 3600 for n in (1, 2, 4, 8)] == [4, 3, 2, 2]
    assert one.total == 4000 + 3600 + 7200 + 1034 + one.besides
    assert worker_memory(size, ddp, 1, gpu=True).activations == 10 + 8 * 100 + 64
    assert worker_memory(size, ddp, 1, gpu=True).besides != one.besides


@pytest.mark.parametrize(
    ("chunk", "workers", "held"), [(None, 1, 8), (None, 4, 2), (64, 1, 2), (33, 2, 1), (1, 1, 1), (999, 4, 2)]
)
def test_shards_whose_activations_are_held(tiny_model: Path, chunk: int | None, workers: int, held: int) -> None:
    """As many as there are in the largest chunk that training makes of a worker's shards."""
    sizes = {"global_batch_size": 256, "shards": 8, "cache_chunk": chunk}
    config = config_of(tiny_model, train=sizes)
    assert held_shards(config.train, workers, gpu=True) == held
    assert held_shards(config.train, workers, gpu=False) == (held if chunk is None else 1), "the tree's passes"
    ids = torch.zeros(32, 1, dtype=torch.int64)
    chunks = chunked([Shard(ids, ids, DropoutKeys(0, 0, np.arange(32)))] * (8 // workers), chunk or 10_000)
    assert max(map(len, chunks)) == held


def test_the_loss_of_a_large_batch_takes_the_memory_of_a_block(tiny_model: Path) -> None:
    small, large, larger = (
        model_size(config_of(tiny_model, encoder={"dropout": 0.1}, train={"global_batch_size": size, "shards": 4}))
        for size in (1 << 8, 1 << 14, 1 << 15)
    )
    assert larger.loss_bytes == pytest.approx(large.loss_bytes, rel=0.1)
    assert large.loss_bytes > max(4 * FLOAT * BLOCK / 2, 16 * small.loss_bytes)


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        ({"max_length": 500}, "encoder.max_length is 500"),
        ({"pooling": "mask", "prompt": "{sentence} means nothing."}, "must hold the mask token"),
        ({"name": "some/where-else"}, "cannot be loaded"),
    ],
)
def test_what_the_encoder_cannot_do_is_refused(tiny_model: Path, encoder: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        model_size(config_of(tiny_model, encoder=encoder))


def test_an_encoder_without_dropout_is_refused(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, "bert", dropout=0.0)
    with pytest.raises(ConfigError, match="no dropout"):
        model_size(config_of(tmp_path, encoder={"num_layers": 1}))
