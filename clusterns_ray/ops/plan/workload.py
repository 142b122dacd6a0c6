"""What a step of a configuration has to do, whatever the number of workers: read from the encoder's config.json, and
from the corpus where it is prepared. No weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from clusterns_ray.config import Config
from clusterns_ray.data.positives import Positives
from clusterns_ray.data.prepare import cache_directory, corpus_fingerprint, load_tokenizer
from clusterns_ray.data.sampler import BatchOrder, cut_shards, steps_per_epoch
from clusterns_ray.data.token_store import TokenStore, reuse_tokens
from clusterns_ray.errors import DataError
from clusterns_ray.launch.estimates import ModelSize, model_size
from clusterns_ray.models.base_model import complete
from clusterns_ray.models.resolve import local_model_config, resolve_model
from clusterns_ray.ops.plan.quantities import bytes_text
from clusterns_ray.ops.plan.step import (
    EncoderWork,
    Exchange,
    busiest_worker,
    gradient_exchange,
    objective_flops,
    step_exchanges,
    tree_exchanges,
)

SAMPLED_STEPS = 64
"""Batches of the prepared corpus, spread over an epoch, whose padding stands for all."""


@dataclass(frozen=True, eq=False)
class Workload:
    """What a step has to do, whatever the number of workers. Shapes: N sampled batches, S shards."""

    config: Config
    size: ModelSize
    encoder: EncoderWork
    teacher: EncoderWork | None
    """The model by which each row is embedded once; None without one."""
    rows_NS: np.ndarray
    """The rows of each shard."""
    tokens_NS: np.ndarray
    """The tokens to which its rows are padded."""
    second_NS: np.ndarray
    """The tokens to which their second views are padded."""
    sentences: int | None
    """The sentences of the corpus; None where unknown."""
    assumptions: tuple[str, ...]

    @property
    def steps_per_epoch(self) -> int | None:
        train = self.config.train
        return self.sentences and steps_per_epoch(self.sentences, train.global_batch_size, train.shards)

    @property
    def shard_flops_NS(self) -> np.ndarray:
        taught = 0 if self.teacher is None else self.teacher.encode(self.rows_NS, self.tokens_NS)
        return self.encoder.shard(self.rows_NS, self.tokens_NS, self.second_NS) + taught

    def flops(self, workers: int) -> float:
        """FLOPs of the busiest worker in a step."""
        return _worker_flops(self, workers)

    def exchanges(self, workers: int, *, gpu: bool = False) -> list[Exchange]:
        config, size = self.config, self.size
        train, clustering = config.train, config.clustering
        tree, mlm = train.adds_in_tree(gpu=gpu), config.loss.mlm_weight > 0
        gradients = [gradient_exchange(size.trained)]
        if tree:
            # The head of masked language modelling reads the whole table.
            table = 0 if mlm else self.encoder.embeddings
            tokens_NS = self.rows_NS * self.tokens_NS
            if (self.second_NS != self.tokens_NS).any() or config.encoder.second_prompt:
                tokens_NS = tokens_NS + self.rows_NS * self.second_NS
            looked_up = float(np.minimum(tokens_NS, table / size.width).sum(axis=1).mean())
            gradients = tree_exchanges(size.trained - table, train.shards, workers, looked_up, size.width)
        return step_exchanges(
            gradients,
            batch=train.global_batch_size,
            width=size.width,
            clusters=clustering.num_clusters if clustering.scope == "batch" else 0,
            mlm_sums=0 if not mlm else train.shards if tree else workers,
            teacher=self.teacher.width if self.teacher else 0,
            encoded_anew=clustering.refresh_rows if clustering.enabled and clustering.scope == "corpus" else 0,
        )


@lru_cache(maxsize=64)  # with many shards, assigning those of every sampled batch takes seconds
def _worker_flops(work: Workload, workers: int) -> float:
    train, clusters, negatives = work.config.train, work.config.clustering.num_clusters, _bank_negatives(work.config)
    encoder = busiest_worker(work.shard_flops_NS, workers)
    rows = train.global_batch_size
    taught = 2 * rows * rows * (work.teacher.width if work.teacher else 0)  # its scores
    return encoder + objective_flops(rows, work.size.width, clusters, negatives) + taught


def _bank_negatives(config: Config) -> int | None:
    clustering = config.clustering
    return config.loss.bank_negatives if clustering.scope == "corpus" and clustering.enabled else None


def workload(config: Config, sentences: int | None = None) -> Workload:
    """Size the encoder by its config.json, and read lengths from what is prepared; no weights are loaded.

    Args:
        sentences: of the corpus, in place of how many there are.

    Raises:
        ConfigError: the encoder cannot be loaded, or does not fit the configuration.
        DataError: there are fewer sentences than shards.
    """
    check_reachable(config)
    config = complete(config)
    size = model_size(config)
    encoder = encoder_work(config)
    store = find_tokens(config)
    train = config.train
    assumptions = []
    if store is None:
        rows_NS = np.full((1, train.shards), train.global_batch_size // train.shards)
        tokens_NS = second_NS = np.full_like(rows_NS, size.tokens_a_row)
        assumptions.append(
            f"Every row has {size.tokens_a_row} tokens, the most it may have, as the corpus is not prepared here: "
            "`clusterns prepare` it to count with its own lengths."
        )
    else:
        rows_NS, tokens_NS, second_NS = sampled_batches(config, store)
        mean = (rows_NS * tokens_NS).sum() / rows_NS.sum()
        assumptions.append(
            f"Rows are padded to {mean:.1f} tokens on average, as in {len(rows_NS)} batches of the prepared corpus."
        )
    count = sentences or (len(store) if store else None)
    if count is None:
        assumptions.append("The number of sentences is not known: prepare the corpus or give --sentences for epochs.")
    else:
        steps_per_epoch(count, train.global_batch_size, train.shards)
        source = "--sentences" if sentences else "prepared"
        on_disk = ""
        if store is not None:
            stored = sum(entry["size"] for entry in store.manifest["files"]) / len(store)
            on_disk = f"; tokens and text take {stored:.0f} bytes each, {bytes_text(stored * count)}"
        assumptions.append(f"{count:,} sentences ({source}){on_disk}.")
    if config.encoder.denoise or config.encoder.second_prompt:
        assumptions.append("Left out: template denoising, and what a second prompt is longer than the first.")
    teacher = finished_work(config.loss.teacher) if config.loss.teacher else None
    return Workload(config, size, encoder, teacher, rows_NS, tokens_NS, second_NS, count, tuple(assumptions))


def check_reachable(config: Config) -> None:
    """Refuse an encoder of the hub that is not here while the hub does not answer: its client tries for a minute."""
    from clusterns_ray.ops.doctor.hub import find_model

    if local_model_config(resolve_model(config.encoder.name)) is None:
        find_model(config.encoder.name, config.encoder.revision)


def encoder_work(config: Config) -> EncoderWork:
    """The matrices of the encoder, counted in one that has shapes and no values."""
    encoder = config.encoder
    work = finished_work(encoder.name, encoder.revision, encoder.num_layers, language_model=config.loss.mlm_weight > 0)
    return replace(
        work,
        head=work.width**2 if encoder.head == "mlp" else 0,
        cached=config.train.cache_chunk is not None,
    )


def finished_work(
    name: str, revision: str | None = None, num_layers: int | None = None, *, language_model: bool = False
) -> EncoderWork:
    """The matrices of an encoder without a training head."""
    import torch

    from clusterns_ray.models.backbone import empty_model, load_config, masked_language_model_class

    source = resolve_model(name)
    shape = load_config(source, revision=revision, num_layers=num_layers)

    def matrices(model: Any, pooler: bool = False) -> int:
        return sum(
            layer.weight.numel()
            for name, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear) and ("pooler" in name.split(".")) == pooler
        )

    with torch.device("meta"):
        backbone = empty_model(shape, source)
        linear, prediction = matrices(backbone), 0
        if language_model:
            auto = masked_language_model_class(shape, source)
            prediction = matrices(empty_model(shape, source, auto)) - linear
    return EncoderWork(
        width=shape.hidden_size,
        layers=shape.num_hidden_layers,
        linear=linear,
        embeddings=backbone.get_input_embeddings().weight.numel(),
        pooler=matrices(backbone, pooler=True),
        prediction=prediction,
    )


def find_tokens(config: Config) -> TokenStore | None:
    """The prepared corpus of this configuration; None where it is not on this machine."""
    try:
        fingerprint = corpus_fingerprint(config, load_tokenizer(config))
    except DataError:  # the corpus itself is elsewhere
        return None
    stores = (reuse_tokens(path, fingerprint) for path in sorted(cache_directory(config).glob("tokens-*")))
    return next(filter(None, stores), None)


def sampled_batches(config: Config, store: TokenStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the shards of batches spread over the first epoch, and to how many tokens both views of them are padded:
    int64 (N, S) each."""
    train = config.train
    order = BatchOrder(config.seed, len(store), train.global_batch_size, train.shards, config.data.order, store.lengths)
    steps = np.unique(np.linspace(0, order.steps_per_epoch - 1, SAMPLED_STEPS).astype(int))
    positives = Positives(config, store, load_tokenizer(config))
    rows, tokens, second = [], [], []
    for step in steps.tolist():
        rows_B = order.sample_ids(0, step)
        lengths_B = store.lengths(rows_B)
        pieces = cut_shards(lengths_B, train.shards)
        rows.append([len(piece) for piece in pieces])
        tokens.append([int(lengths_B[piece].max()) for piece in pieces])
        views = [positives(rows_B[piece], *store.tokens(rows_B[piece], 0), step) for piece in pieces]
        second.append([own if view is None else view[0].shape[1] for own, view in zip(tokens[-1], views)])
    return np.array(rows), np.array(tokens), np.array(second)
