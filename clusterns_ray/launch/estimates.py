"""What a run will need of memory and disk, from its configuration alone: no weights are read, nothing is allocated.

The encoder is built of tensors that have shapes and no values (PyTorch's ``FakeTensorMode``), so that parameters are
counted, not guessed, and what autograd would save of one shard is added up tensor by tensor.
Shape suffixes: b rows of a worker, D width, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from clusterns_ray.config import Config, TrainConfig
from clusterns_ray.models.resolve import resolve_model

FLOAT = 4
"""Bytes of a float32, which weights, gradients, moments and centroids are, whatever the precision of the products."""

PROCESS_BYTES = 700 << 20
"""Host memory of a worker besides its tensors: Python, torch, transformers, Ray."""

CUDA_BYTES = 1 << 30
"""GPU memory of a worker besides its tensors: the CUDA context, NCCL's buffers, cuBLAS's work space."""


@dataclass(frozen=True)
class ModelSize:
    """The size of the encoder in training, its head included; in parameters unless said otherwise."""

    all: int
    trained: int
    """Those with a gradient: the pooler, which is not read, has none."""
    width: int
    """D"""
    layers: int
    exported_bytes: int
    """The size of ``model.safetensors``."""
    tokens_a_row: int
    """The most that a row may have: ``encoder.max_length``, and the prompt."""
    fixed_bytes: int
    """Saved for the backward pass once a step: the weights in the precision of the products."""
    shard_bytes: int
    """Saved for the backward pass of one shard: both views, and the masked copy where one is predicted."""
    loss_bytes: int
    """Saved for the backward pass of the loss of a block of the batch; see ``losses.row_blocks``."""
    filled_bytes: int = 0
    """Saved for the backward pass of one shard besides ``shard_bytes`` where its rows are packed, on a CPU."""
    teacher: int = 0
    """Parameters of the teacher, which has no gradients and no moments; 0 without one."""


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes that one worker holds where it computes, at the end of a forward pass."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    partial_sums: int
    """Further copies of the gradients, while they are added up."""
    activations: int
    """What autograd keeps for the backward pass."""
    besides: int
    """What the process has without the model."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def model_size(config: Config) -> ModelSize:
    """Build the encoder without values, and pass one shard through it.

    Raises:
        ConfigError: the model's configuration or tokenizer cannot be loaded, or does not fit what is asked of it:
            limits that training would meet once the weights are loaded.
    """
    import numpy as np
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.initialization import no_init_weights

    from clusterns_ray.losses import clusterns_loss, rank_distillation_share, row_blocks
    from clusterns_ray.models.backbone import check_dropout, empty_model, load_config, masked_language_model_class
    from clusterns_ray.models.base_model import complete
    from clusterns_ray.models.encoder import Encoder
    from clusterns_ray.models.packed_bert import FILL, can_pack
    from clusterns_ray.models.tokenization import load_tokenizer, prompt_length
    from clusterns_ray.training.collate import DropoutKeys, Shard
    from clusterns_ray.training.objective import TwoViews

    config = complete(config)
    encoder = config.encoder
    source = resolve_model(encoder.name)
    tokenizer = load_tokenizer(source, revision=encoder.revision)
    shape = load_config(source, revision=encoder.revision, num_layers=encoder.num_layers, dropout=encoder.dropout)
    check_dropout(shape, encoder.name)
    with FakeTensorMode(), no_init_weights():
        backbone = empty_model(shape, source)
        built = Encoder.from_backbone(backbone, tokenizer, encoder, seed=0).train()
        built.packs = False  # the rows are all as long as can be, and packing asks for values
        width = built.width
        language_model = None
        if config.loss.mlm_weight:
            auto = masked_language_model_class(shape, source)
            language_model = empty_model(shape, source, auto)
            setattr(language_model, language_model.base_model_prefix, backbone)
            language_model.tie_weights()
            language_model.train()
        # `auto` counts as fp32, which needs more.
        precision = "fp32" if config.train.precision == "auto" else config.train.precision
        views = TwoViews(built, precision, language_model)
        rows = config.train.global_batch_size // config.train.shards
        prompts = [prompt_length(each, tokenizer) for each in (encoder.prompt, encoder.second_prompt) if each]
        tokens = encoder.max_length + max(prompts, default=0)
        ids = torch.ones(rows, tokens, dtype=torch.int64)
        packs = can_pack(backbone)
        shard = Shard(
            ids,
            ids,
            DropoutKeys(0, 0, np.zeros(rows, np.int64)),
            (ids, ids) if encoder.second_prompt or config.data.positives != "dropout" else None,
            (ids, ids) if language_model is not None and not packs else None,
            (np.full(rows, tokens), np.full(rows, tokens)),
        )
        weights = list(views.parameters())
        one, two = (_saved_bytes(lambda n=n: views([shard] * n), weights) for n in (1, 2))
        fixed_bytes, shard_bytes = max(2 * one - two, 0), two - one
        filled_bytes = _filled_bytes(backbone, rows, tokens, precision) if packs else 0
        filled_bytes += FILL * shard_bytes // (2 * rows * tokens) if packs else 0
        if language_model is not None and packs:  # one more pass, and its head of the predicted tokens alone
            head = _saved_by_head(language_model, config.loss.mlm_probability, rows * tokens, width, precision)
            shard_bytes, filled_bytes = 3 * shard_bytes // 2 + head, 3 * filled_bytes // 2
        parameters = {id(p): p for p in weights}.values()
        batch, k = config.train.global_batch_size, config.clustering.num_clusters
        z1_BD, z2_BD = (torch.zeros(batch, width, requires_grad=True) for _ in range(2))
        if config.clustering.scope == "corpus" and k and config.loss.hard_negatives:
            k = batch * config.loss.bank_negatives  # sentences of the bank stand where centroids do
        teacher = 0
        if config.loss.teacher is not None:
            taught_by = resolve_model(config.loss.teacher)
            teacher = sum(p.numel() for p in empty_model(load_config(taught_by), taught_by).parameters())
        # Also without clusters, as the scores are as many; then with the two that there must be.
        loss = _saved_bytes(
            lambda: clusterns_loss(
                z1_BD,
                z2_BD,
                torch.zeros(max(k, 2), width),
                temperature=config.loss.temperature,
                bml_weight=config.loss.bml_weight,
                bml_alpha=config.loss.bml_alpha,
                bml_beta=config.loss.bml_beta,
            ),
            [z1_BD, z2_BD],
        )
        if teacher:
            cos_BB = torch.zeros(batch, batch, requires_grad=True)
            rows_B = torch.arange(batch)
            loss += _saved_bytes(lambda: rank_distillation_share(cos_BB, cos_BB.detach(), rows_B, 1.0, 1.0), [cos_BB])
    return ModelSize(
        all=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        width=width,
        layers=backbone.config.num_hidden_layers,
        exported_bytes=FLOAT * sum(p.numel() for p in backbone.parameters()),
        tokens_a_row=tokens,
        fixed_bytes=fixed_bytes,
        shard_bytes=shard_bytes,
        filled_bytes=filled_bytes,
        loss_bytes=math.ceil(loss * row_blocks(batch)[0].stop / batch),
        teacher=teacher,
    )


def _filled_bytes(backbone: Any, rows: int, tokens: int, precision: str) -> int:
    """What attention of packed rows keeps of one shard, both views, besides what padded attention does: keys, values,
    weights and mask are ``filled`` columns wide, see ``kernels/packed_attention.py``."""
    from clusterns_ray.kernels.packed_attention import filled_columns
    from clusterns_ray.training.objective import DTYPES

    shape = backbone.config
    more = filled_columns(tokens, DTYPES[precision]) - tokens
    values = 2 * more * (shape.hidden_size + shape.num_attention_heads * tokens)
    return 2 * rows * shape.num_hidden_layers * values * DTYPES[precision].itemsize


def _saved_by_head(language_model: Any, probability: float, tokens: int, width: int, precision: str) -> int:
    """What the head of masked language modelling keeps of the tokens that are predicted, at the most (by four standard
    deviations): ``training.mlm.packed_prediction_loss``."""
    import torch
    import torch.nn.functional as F

    from clusterns_ray.models.encoder import autocast
    from clusterns_ray.training.mlm import prediction_head
    from clusterns_ray.training.objective import DTYPES

    spread = 4 * math.sqrt(tokens * probability * (1 - probability))
    predicted = min(tokens, math.ceil(tokens * probability + spread))
    states_RD = torch.zeros(predicted, width, requires_grad=True)
    labels_R = torch.zeros(predicted, dtype=torch.int64)

    def loss() -> torch.Tensor:
        with autocast(torch.device("cpu"), DTYPES[precision]):
            return F.cross_entropy(prediction_head(language_model)(states_RD).float(), labels_R)

    return _saved_bytes(loss, list(language_model.parameters()))


def held_shards(train: TrainConfig, workers: int, *, gpu: bool) -> int:
    """Shards whose activations a worker holds at a time: all of its own, or with ``train.cache_chunk`` those of one
    chunk; in the tree each shard is one."""
    own = math.ceil(train.shards / workers)
    if train.cache_chunk is None:
        return own
    if train.adds_in_tree(gpu=gpu):
        return 1
    return min(own, max(train.cache_chunk * train.shards // train.global_batch_size, 1))


def partial_sums(train: TrainConfig, workers: int, *, gpu: bool) -> int:
    """Copies of the gradients that a worker holds besides one: DDP's buckets; or of the tree, a partial sum a level and
    the gradient that is added, or what is sent and what has arrived."""
    if not train.adds_in_tree(gpu=gpu):
        return int(workers > 1)
    own = math.ceil(train.shards / workers)
    return max(math.ceil(math.log2(own)) + (own > 1), 2 * (workers > 1))


def worker_memory(size: ModelSize, train: TrainConfig, workers: int, *, gpu: bool) -> WorkerMemory:
    """The memory of each of ``workers`` workers, on the GPU or, without one, of the host.

    It is an upper estimate: every row is as long as it may be. Per trained parameter: 4 bytes of weight, 4 of gradient,
    8 of AdamW's two moments (Kingma & Ba, "Adam", 2015), and 4 of each of :func:`partial_sums`.
    """
    shard_bytes = size.shard_bytes + (0 if gpu else size.filled_bytes)
    return WorkerMemory(
        weights=FLOAT * (size.all + size.teacher),
        gradients=FLOAT * size.trained,
        optimizer=2 * FLOAT * size.trained,
        partial_sums=FLOAT * size.trained * partial_sums(train, workers, gpu=gpu),
        activations=size.fixed_bytes + held_shards(train, workers, gpu=gpu) * shard_bytes + size.loss_bytes,
        besides=CUDA_BYTES if gpu else PROCESS_BYTES,
    )


def step_memory(size: ModelSize, config: Config, workers: int, *, gpu: bool) -> dict[str, int]:
    """Bytes of a worker where it computes: those of :func:`worker_memory`, those of the whole batch, and their sum.

    ``keys``: both views, B x 2 D float32, in four copies: as gathered, in canonical order, normalised, their gradient;
    one worker has only the last two. ``clusters``: K x D float32 in four: centroids, those at the last evaluation, the
    sums, and where they go.
    ``bank``: that of the corpus, where there is one; on a CPU a memory-mapped file.
    """
    train, width = config.train, size.width
    parts = asdict(worker_memory(size, train, workers, gpu=gpu))
    parts["keys"] = FLOAT * train.global_batch_size * 2 * width * (4 if workers > 1 else 2)
    parts["clusters"] = 4 * FLOAT * config.clustering.num_clusters * width
    parts["bank"] = bank_bytes(size, config)
    return {**parts, "total": sum(parts.values())}


def bank_bytes(size: ModelSize, config: Config) -> int:
    """The most bytes of the bank of the corpus on a worker and in a checkpoint: an embedding and an int64 a row."""
    clustering = config.clustering
    if clustering.scope == "batch" or not clustering.enabled:
        return 0
    return min(clustering.bank_rows, config.data.limit or clustering.bank_rows) * (FLOAT * size.width + 8)


def checkpoint_bytes(size: ModelSize, config: Config) -> int:
    """Bytes of one checkpoint's tensors: all weights, two moments of the trained ones, centroids, and the bank."""
    weights = size.all + 2 * size.trained + config.clustering.num_clusters * size.width
    return FLOAT * weights + bank_bytes(size, config)


def run_bytes(size: ModelSize, config: Config) -> int:
    """Bytes of a run's directory on disk: ``runtime.keep`` checkpoints and the one being written; the model, and the
    one that replaces it; each worker's bank."""
    checkpoints = (config.runtime.keep + 1) * checkpoint_bytes(size, config)
    banks = config.runtime.worker_counts()[-1] * bank_bytes(size, config)
    return checkpoints + 2 * size.exported_bytes + banks


def _saved_bytes(work: Callable[[], Any], weights: Sequence[Any]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of ``work()``, the weights' own left out."""
    from torch.autograd.graph import saved_tensors_hooks

    own = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, as its address must not be used again meanwhile
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in kept.values())
