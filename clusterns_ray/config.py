"""The configuration: one frozen tree, read from YAML, changed by ``section.key=value``, resolved once.

Unknown keys and impossible values are errors that name the key. Every field is documented beneath it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.object_store import is_url, read_text
from clusterns_ray.io.paths import CORPORA, STORES, check_path, redact
from clusterns_ray.io.yaml_text import dump_yaml, load_setting, load_yaml, read_yaml_text

MAX_WORKERS = 2**16
LARGEST, SMALLEST = 1e30, 1e-30
"""Bounds of any number but 0: beyond them 32-bit floats, in which training computes, overflow or become 0."""


Plain: TypeAlias = "Mapping[Any, Plain] | list[Plain] | tuple[Plain, ...] | str | int | float | None"
"""What YAML and JSON hold; the keys of a mapping may be anything until they have been checked."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def check_file_name(value: str) -> str:
    """Refuse a name that cannot be that of a run's directory."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value):
        raise ValueError("must be a file name: letters, digits, dots, dashes, underscores")
    if value == "cache":
        raise ValueError("must be another name, as prepared text is kept under this one")
    if len(value.encode()) > 200:
        raise ValueError("must be a file name of at most 200 bytes, as other files are named after it")
    return value


def _checked(key: str, value: str | list[str] | None, schemes: tuple[str, ...]) -> str | list[str] | None:
    if isinstance(value, list):
        return [check_path(key, item, schemes) for item in value]
    return value if value is None else check_path(key, value, schemes)


Pooling = Literal["cls", "mean", "mask", "first_last", "top2", "last"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


class EncoderConfig(Section):
    """The encoder that is trained: its weights, how it reads sentences, and how it makes one vector of each."""

    name: str = "bert-base-uncased"
    """A hub id, a directory, or `package:PYTHON_PACKAGE/SUBDIR` (weights that a pip package carries)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    num_layers: int | None = Field(default=None, ge=1)
    """Keep the first N layers; all of them if unset."""
    pooling: Pooling | None = None
    """How token states become one embedding; `mask` needs a prompt that holds the mask token. If unset, the model's own
    where its directory states one; else `last` for a causal model, whose first token sees nothing, and `cls` for all
    others."""
    head: Literal["mlp", "none"] = "mlp"
    """A linear layer with tanh over the pooled state, in training only; the exported model has none."""
    dropout: float | None = Field(default=None, gt=0, lt=1)
    """Replaces every dropout probability of the model; its own if unset."""
    max_length: int = Field(default=32, ge=4, le=2**20)
    """Tokens a sentence is cut to in training, special ones included; finished encoders read longer text."""
    prompt: str | None = None
    """A template around the sentence, such as `This sentence of "{sentence}" means [MASK].` If unset, the model's own
    where it has one; `{sentence}` is none."""
    second_prompt: str | None = None
    """The template of the second view, in training; `prompt` if unset. The first one is what finished encoders use."""
    denoise: bool = False
    """Subtract from each mask state that of the template alone, at the positions it has around the sentence."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_path("encoder.name", value)

    @model_validator(mode="after")
    def _prompt_and_pooling(self) -> Self:
        for name, prompt in (("prompt", self.prompt), ("second_prompt", self.second_prompt)):
            if prompt is not None and prompt.count("{sentence}") != 1:
                raise ValueError(
                    f"encoder.{name} is {prompt!r}: it must hold {{sentence}} exactly once, where the text goes"
                )
        if self.second_prompt is not None and self.prompt is None:
            raise ValueError(
                f"encoder.second_prompt is {self.second_prompt!r}, but encoder.prompt is not set; the first view and "
                "finished encoders need a template too"
            )
        if self.denoise and self.pooling != "mask":
            raise ValueError(
                f"encoder.denoise is true, but encoder.pooling is {self.pooling or 'unset'}; what is subtracted is the "
                "state of the template's mask token, so use mask, or turn it off"
            )
        if self.pooling == "mask" and self.prompt is None:
            raise ValueError(
                "encoder.pooling is mask, but encoder.prompt is not set, so there is no mask token to read; "
                "set a prompt with the model's mask token, or use cls or mean"
            )
        return self


class DataConfig(Section):
    """The text to learn from, and the order in which it is read."""

    corpus: str | list[str] | None = None
    """Text to learn from: a path, a glob, a list of them, an s3:// or gs:// URL, hf://NAME[:split], or `demo`.
    If unset, the sentences of `documents`."""
    text_column: str = "text"
    """The column or field that holds the text, in csv, jsonl and parquet."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first N usable sentences."""
    order: Literal["random", "length_grouped"] = "length_grouped"
    """`random`: the paper's. `length_grouped`: batches of sentences alike in length, so that length does not
    give the positive away."""
    documents: str | list[str] | None = None
    """Whole documents (.jsonl, .md, .txt: paths, globs or directories): the text where `corpus` is unset, and what a
    structure-graded dev set is made of."""
    document_column: str | None = None
    """The column or field of a `corpus` in csv, jsonl or parquet that names the document of a sentence; rows of a
    document follow each other. In a text file blank lines stand between documents."""
    positives: Literal["dropout", "neighbour", "crop"] = "dropout"
    """The second view of a sentence: `dropout`: itself under other dropout, the paper's. `neighbour`: another sentence
    of its paragraph, else of its section, or itself where it is alone. `crop`: a contiguous part of its tokens."""
    neighbour_distance: int = Field(default=1, ge=1, le=1024)
    """How many sentences away a neighbour may be; where positives is `neighbour`."""
    crop_ratio: float = Field(default=0.5, gt=0, lt=1)
    """The least share of the tokens that a crop keeps; where positives is `crop`."""
    cache_dir: str | None = None
    """Where tokenised shards are kept; `STORAGE_PATH/cache` if unset."""

    @field_validator("corpus")
    @classmethod
    def _corpus(cls, value: str | list[str] | None) -> str | list[str] | None:
        return _checked("data.corpus", value, CORPORA)

    @field_validator("documents", "cache_dir")
    @classmethod
    def _paths(cls, value: str | list[str] | None, info: ValidationInfo) -> str | list[str] | None:
        return _checked(f"data.{info.field_name}", value, ())

    @model_validator(mode="after")
    def _positives(self) -> Self:
        fields = type(self).model_fields
        for key, kind in (("neighbour_distance", "neighbour"), ("crop_ratio", "crop")):
            if self.positives != kind and getattr(self, key) != fields[key].default:
                raise ValueError(
                    f"data.{key} is {getattr(self, key)}, but data.positives is {self.positives}, which does not read "
                    f"it; set data.positives to {kind}, or leave data.{key} out"
                )
        if self.document_column is not None and self.corpus in (None, "demo"):
            raise ValueError(
                f"data.document_column is {self.document_column!r}, but the text is that of whole documents, which "
                "need none; leave it out, or name a file with such a column as data.corpus"
            )
        if self.document_column is not None and self.document_column == self.text_column:
            raise ValueError(
                f"data.document_column is {self.document_column!r}, the column that holds the text (data.text_column); "
                "give the column that names the document"
            )
        return self


class LossConfig(Section):
    """What is minimised."""

    temperature: float = Field(default=0.05, gt=0)
    """Divides every cosine in InfoNCE."""
    hard_negatives: bool = True
    """Put the second nearest centroid into the denominator, or sentences of it where clustering.scope is corpus."""
    hard_negative_columns: Literal["batch", "own", "not_own_cluster"] = "batch"
    """Whose hard negatives a row sees: every row's (the authors'), its own, or all but those of its own cluster."""
    hard_negative_weight: float = Field(default=0.0, ge=-20, le=20)
    """A logit added to a row's own hard negative."""
    bank_negatives: int = Field(default=1, ge=1, le=2**16)
    """Hard negatives drawn for each row, with replacement; where clustering.scope is corpus."""
    bml_weight: float = Field(default=1e-3, ge=0)
    """Weight of the Bidirectional Margin Loss on in-batch false negatives; 0 turns it off."""
    bml_alpha: float = Field(default=0.0, ge=0)
    """A false negative's cosine should stay this far below the positive's, or farther."""
    bml_beta: float = Field(default=0.3, ge=0)
    """A false negative's cosine should not fall more than this below the positive's."""
    bml_reduction: Literal["all_pairs", "false_negatives"] = "all_pairs"
    """Mean over all pairs of the batch (the authors') or over the false negatives alone."""
    teacher: str | None = None
    """A finished encoder, named as `encoder.name` is, such as the model/ of an earlier run, with the same tokenizer and
    prompt: how it ranks the batch for each sentence is learnt as well."""
    distillation_weight: float = Field(default=1.0, gt=0)
    """Weight of that ranking distillation; where there is a teacher."""
    teacher_temperature: float = Field(default=0.05, gt=0)
    """Divides the teacher's cosines: the lower, the more only its nearest count."""
    mlm_weight: float = Field(default=0.0, ge=0)
    """Weight of masked language modelling on a masked copy of the batch; 0 turns it off."""
    mlm_probability: float = Field(default=0.15, gt=0, lt=1)
    """Share of the tokens to be predicted; of these 80 % become the mask token, 10 % a random one, 10 % stay."""

    @field_validator("teacher")
    @classmethod
    def _teacher(cls, value: str | None) -> str | None:
        return value if value is None else check_path("loss.teacher", value)

    @model_validator(mode="after")
    def _margins(self) -> Self:
        if self.bml_weight > 0 and self.bml_alpha > self.bml_beta:
            raise ValueError(
                f"loss.bml_alpha is {self.bml_alpha} and loss.bml_beta {self.bml_beta}: the margins cross, as a false "
                "negative should stay between beta and alpha below the positive; make alpha <= beta"
            )
        return self


class ClusteringConfig(Section):
    """The clusters that hard negatives and false negatives come from."""

    scope: Literal["batch", "corpus"] = "batch"
    """`batch`: centroids follow the batches, as in the paper. `corpus`: spherical K-means over a bank of embeddings of
    the corpus; hard negatives are its sentences. `rate`, `update` and `init` then mean nothing."""
    num_clusters: int = Field(default=128, ge=0)
    """K; 0 is plain SimCSE. At most the rows of a batch, or of the bank where scope is corpus."""
    start_cosine: float = Field(default=0.4, ge=-1, le=1)
    """Clustering starts at the first step whose mean cosine between the views of all rows is at most this."""
    rate: float = Field(default=1e-3, gt=0, le=1)
    """How far one batch moves a centroid."""
    update: Literal["mean", "sum", "replace_sum"] = "mean"
    """`mean`: towards the members' mean. `sum`: the authors' code and published settings. `replace_sum`: to the sum."""
    init: Literal["farthest_chain", "kmeans"] = "farthest_chain"
    """First centroids: rows of the batch, each far from the one before (the authors'), or spherical K-means over a
    sample of the corpus."""
    bank_rows: int = Field(default=65_536, ge=2, le=2**31 - 1)
    """Sentences of the bank, a random sample of the corpus, or all of it. They take 4 x embedding width bytes each (201
    MB at the default and width 768) on every worker, in a memory-mapped file of the run's directory, or in GPU memory;
    as much in each checkpoint; and 2 times that on worker 0 while it clusters, where its encoder is, and within
    runtime.step_timeout_s, as the others wait."""
    recluster_every_steps: int = Field(default=100, ge=1)
    """Steps between runs of K-means over the bank, which begin with the centroids that are there."""
    refresh_rows: int = Field(default=0, ge=0)
    """Rows of the bank that are encoded anew each step, in turn, besides those of the batch; by 64 on each worker, so
    fewer are encoded by one, while the others wait."""
    false_negative_cosine: float = Field(default=0.7, ge=-1, le=1)
    """Batch mates of one cluster are false negatives if the cosine of their views is above this; where scope is
    corpus."""

    @property
    def enabled(self) -> bool:
        """Whether there are clusters at all; without them a run is plain SimCSE."""
        return self.num_clusters > 0

    @field_validator("num_clusters")
    @classmethod
    def _second_nearest(cls, value: int) -> int:
        if value == 1:
            raise ValueError("1 cluster has no second nearest centroid; use 2 or more, or 0 for plain SimCSE")
        return value


class TrainConfig(Section):
    """The batch, the optimiser, and for how long."""

    global_batch_size: int = Field(default=256, ge=2, le=2**24)
    """Sentences in a step over all workers; what the result depends on, whatever the number of workers."""
    shards: int = Field(default=8, ge=1)
    """Pieces the global batch is cut into by length, each with its own random stream; the number of workers must
    divide it. Part of the result's identity, as the batch size is."""
    epochs: int = Field(default=1, ge=1, le=10**6)
    """Passes over the corpus."""
    max_steps: int | None = Field(default=None, ge=1, le=10**12)
    """Stop after this many steps; the schedule then ends there too."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate of AdamW."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay, on weight matrices; not on biases and norms."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """The precision of matrix products in training and its dev evaluations: auto is bf16 where GPU or processor
    multiply in it, else fp32. Weights, centroids and finished encoders stay fp32."""
    reduction: Literal["auto", "tree", "all_reduce"] = "auto"
    """How gradients are added up over shards and workers. `tree`: in an order that depends on `shards` alone, so that
    weights have the same bits on any number of workers (same versions, kind of processor, threads a worker).
    `all_reduce`: all shards of a worker in one pass, and the mean over workers while it goes back; sums round by their
    number. auto is tree on CPUs, all_reduce on GPUs."""
    cache_chunk: int | None = Field(default=None, ge=1)
    """Sentences of a worker whose activations are held at a time (whole shards; at least one). The gradient is that of
    the whole batch, for one more forward pass a step. If unset, all are held."""

    def adds_in_tree(self, *, gpu: bool) -> bool:
        """Whether each shard has a gradient of its own. `auto` has it on CPUs alone: on a GPU a pass for each shard is
        too small to fill it."""
        return self.reduction == "tree" or (self.reduction == "auto" and not gpu)


class EvaluationConfig(Section):
    """The dev set, by which the model is selected."""

    sts: str | None = None
    """A directory of TASK/SUBSET.jsonl files, `hf`: the public sets of the hub, or `structure`: pairs graded by the
    documents' structure.
    If unset, nothing is selected: the last step's model is exported."""
    structure_pairs: int = Field(default=2000, ge=40, le=10**7)
    """Pairs graded by structure, a quarter of each grade; where sts is `structure`."""
    dev: str = "STSB/dev"
    """The set that selects, as TASK/SUBSET; `STRUCTURE/dev` where sts is `structure`."""
    also: list[str] = []
    """Further sets that are scored at each evaluation and select nothing, as TASK/SUBSET of `sts`, such as STSB/test;
    or LEE50/test, news documents graded by people, from the package gensim. A fall of one beyond its bootstrap interval
    is warned of."""
    every_steps: int = Field(default=125, ge=1)
    """Steps between dev evaluations; the last step is always evaluated."""
    patience: int | None = Field(default=3, ge=1)
    """Stop after this many evaluations without a better score; unset never stops early."""

    @field_validator("sts")
    @classmethod
    def _sts(cls, value: str | None) -> str | None:
        return value if value is None else check_path("evaluation.sts", value, ())

    @model_validator(mode="before")
    @classmethod
    def _structure_dev(cls, values: Mapping[str, Any] | Section) -> Mapping[str, Any] | Section:
        if isinstance(values, Mapping) and values.get("sts") == "structure":
            return {"dev": "STRUCTURE/dev", **values}
        return values

    @field_validator("dev", "also")
    @classmethod
    def _task_and_subset(cls, value: str | list[str]) -> str | list[str]:
        for name in [value] if isinstance(value, str) else value:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                raise ValueError("must be TASK/SUBSET, such as STSB/dev")
        return value

    @model_validator(mode="after")
    def _also(self) -> Self:
        if self.also and self.sts is None:
            raise ValueError(
                f"evaluation.also is {self.also}, but evaluation.sts is not set, so nothing is evaluated; set it, or "
                "set evaluation.also to []"
            )
        if self.dev in self.also or len(set(self.also)) < len(self.also):
            raise ValueError(
                f"evaluation.also is {self.also}, which names a set twice, or the one that selects "
                f"(evaluation.dev: {self.dev}); name each other set once"
            )
        if self.sts == "structure" and set(self.also) - {"LEE50/test"}:
            raise ValueError(
                f"evaluation.also is {self.also}, but with evaluation.sts structure there is only LEE50/test besides "
                "the dev set; name that one, or give evaluation.sts a directory of TASK/SUBSET.jsonl files"
            )
        return self


class RuntimeConfig(Section):
    """Where and on how many workers a run is computed; its result does not depend on it."""

    num_workers: int | tuple[int, int] = 0
    """0: in this process, without Ray. N: that many Ray workers. [min, max]: as many as the cluster has, elastic."""
    use_gpu: bool | None = None
    """One GPU a worker; if unset, GPUs are used where this machine has them."""
    cpus_per_worker: int = Field(default=1, ge=1, le=2**16)
    """CPUs reserved for each worker, which is also how many threads it computes with."""
    label_selector: dict[str, str] = {}
    """Labels that a node needs for workers to run on it, such as {gpu: L4} or {market: spot}; the nodes of the shipped
    cluster files have these two."""
    storage_path: str = "runs"
    """Where runs live: on a cluster a directory that every node sees, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX."""
    local_path: str | None = None
    """Where each machine keeps its copies when `storage_path` is in an object store; the environment variable
    CLUSTERNS_LOCAL_PATH of that machine comes first, and a folder for temporary files last."""
    name: str = "clusterns"
    """The run's name; its files are in STORAGE_PATH/NAME. The same command again resumes it."""
    max_failures: int = Field(default=3, ge=-1, le=10**6)
    """How often Ray restarts the workers after a failure; -1 without end."""
    start_timeout_s: float = Field(default=1800.0, gt=0, le=1e9)
    """Seconds to wait for the workers to start before giving up; a node that a cloud has to boot and install takes ten
    minutes and more."""
    step_timeout_s: float = Field(default=600.0, ge=1, le=1e9)
    """Seconds a worker waits for the others in one exchange before it fails rather than hang."""
    resize_every_s: float = Field(default=60.0, ge=0, le=1e9)
    """Seconds between looks at whether an elastic run could have another number of workers; changing it costs the
    steps since the last checkpoint."""
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; `evaluation.every_steps` if unset."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay; the best model is kept apart from them."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl; the only ordinary steps on which the host waits for the device."""
    log_rows: bool = False
    """Write which rows of the corpus each worker took at each step, to RUN/rows on that worker's machine."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where metrics.jsonl is copied to as it grows; wandb and mlflow must be installed."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_file_name(value)

    @field_validator("label_selector")
    @classmethod
    def _labels(cls, value: dict[str, str]) -> dict[str, str]:
        for key, wanted in value.items():
            if not re.fullmatch(r"([a-z0-9.-]+/)?[A-Za-z0-9][\w.-]*", key) or not re.fullmatch(
                r"[A-Za-z0-9][\w.-]*", wanted
            ):
                raise ValueError(
                    f"must be labels and their values, such as {{market: spot}}, and {key}: {wanted} is not; both are "
                    "of letters, digits, dots, dashes and underscores"
                )
        return value

    @field_validator("storage_path", "local_path")
    @classmethod
    def _paths(cls, value: str | None, info: ValidationInfo) -> str | None:
        schemes = STORES if info.field_name == "storage_path" else ()
        return value if value is None else check_path(f"runtime.{info.field_name}", value, schemes)

    @field_validator("num_workers")
    @classmethod
    def _workers(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, int):
            if value < 0:
                raise ValueError("must be 0 (in this process) or more, or [min, max]")
        elif not 1 <= value[0] <= value[1]:
            raise ValueError("[min, max] needs 1 <= min <= max")
        if max([value] if isinstance(value, int) else value) > MAX_WORKERS:
            raise ValueError(f"at most {MAX_WORKERS:,} workers are possible")
        return value

    def worker_counts(self) -> range:
        """Every number of workers this run may have; in-process counts as one."""
        low, high = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)
        return range(max(low, 1), max(high, 1) + 1)


BANK_KEYS = (
    ("clustering", "bank_rows"),
    ("clustering", "recluster_every_steps"),
    ("clustering", "refresh_rows"),
    ("clustering", "false_negative_cosine"),
    ("loss", "bank_negatives"),
)
"""Keys that mean something only where clustering.scope is corpus."""


class Config(Section):
    """The whole configuration of a run."""

    seed: int = Field(default=42, ge=0)
    """Seeds the order of the data, dropout, the head, and the first centroid."""
    encoder: EncoderConfig = EncoderConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _labels_of_nodes(self) -> Self:
        if self.runtime.label_selector and self.runtime.num_workers == 0:
            raise ValueError(
                f"runtime.label_selector is {self.runtime.label_selector}, but runtime.num_workers is 0, so no node is "
                "chosen. Give workers (in a study workers_per_trial), or leave the labels out"
            )
        return self

    @model_validator(mode="after")
    def _batch_shards_workers_clusters(self) -> Self:
        batch, shards, k = self.train.global_batch_size, self.train.shards, self.clustering.num_clusters
        if batch % shards:
            raise ValueError(
                f"train.global_batch_size is {batch}, which train.shards ({shards}) does not divide; the shards "
                f"of a batch are of one size. Use a batch of {nearest_multiple(batch, shards)}, or shards that divide "
                f"{batch}"
            )
        for workers in self.runtime.worker_counts():
            if shards % workers:
                multiple = _common_multiple(self.runtime.worker_counts(), at_most=batch)
                raise ValueError(
                    f"runtime.num_workers allows {workers} workers, which does not divide train.shards ({shards}); "
                    "every worker takes the same number of shards. "
                    + (f"Set train.shards to a multiple of {multiple}, or use " if multiple else "Use ")
                    + f"{_divisors(shards)} workers"
                )
        if k > batch and self.clustering.scope == "batch":
            raise ValueError(
                f"clustering.num_clusters is {k}, more than train.global_batch_size ({batch}); the first centroids are "
                f"rows of one batch. Use at most {batch} clusters, or a larger batch"
            )
        if self.data.corpus is not None and not self.data.corpus:
            raise ValueError(f"data.corpus is {self.data.corpus!r}, which names nothing; give a path, a glob or a URL")
        if self.data.corpus is None and self.data.documents is None:
            raise ValueError(
                "data.corpus is not set, so there is nothing to learn from; give a path, a glob, a URL, hf://NAME, "
                "or `demo` for the packaged sample"
            )
        if self.evaluation.sts == "structure" and self.data.documents is None and self.data.corpus != "demo":
            raise ValueError(
                "evaluation.sts is structure, but data.documents is not set; pairs are graded by where their sentences "
                "stand in a document, so name the documents, or give evaluation.sts a directory"
            )
        return self

    @model_validator(mode="after")
    def _bank(self) -> Self:
        clustering = self.clustering
        if clustering.scope == "batch":
            for section, key in BANK_KEYS:
                values: Section = getattr(self, section)
                if getattr(values, key) != type(values).model_fields[key].default:
                    raise ValueError(
                        f"{section}.{key} is {getattr(values, key)}, but clustering.scope is batch, which has no bank "
                        f"of the corpus; set clustering.scope to corpus, or leave {section}.{key} out"
                    )
            return self
        rows = min(clustering.bank_rows, self.data.limit or clustering.bank_rows)
        source = "clustering.bank_rows" if rows == clustering.bank_rows else "data.limit"
        if clustering.num_clusters > rows:
            raise ValueError(
                f"clustering.num_clusters is {clustering.num_clusters}, more than {source} ({rows}); each cluster "
                f"needs a sentence of the bank. Use at most {rows} clusters, or raise {source}"
            )
        if clustering.refresh_rows > rows:
            raise ValueError(
                f"clustering.refresh_rows is {clustering.refresh_rows}, more than {source} ({rows}); a step would "
                f"encode the same row twice. Use at most {rows}"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """All values as plain YAML types."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The values a result depends on: all but where and on how many workers it runs, and how it is watched."""
        values = self.resolved()
        del values["runtime"]
        del values["data"]["cache_dir"]
        return values

    def fingerprint(self) -> str:
        """Short hash of :meth:`identity`: the same run whatever the machine."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


def nearest_multiple(value: int, of: int) -> int:
    """The multiple of ``of`` next to ``value``, at least ``of``."""
    return max(of, round(value / of) * of)


def _common_multiple(counts: range, at_most: int) -> int | None:
    """The smallest number that every count divides; None above ``at_most``."""
    multiple = 1
    for count in counts:
        multiple = math.lcm(multiple, count)
        if multiple > at_most:
            return None
    return multiple


def _divisors(n: int) -> str:
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return ", ".join(str(d) for d in dict.fromkeys([*low, *(n // d for d in reversed(low))]))


EXAMPLE = "Give the path of a YAML file; experiments/quickstart.yaml is one to start from."


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, and apply ``section.key=value`` overrides.

    Args:
        path: of the file, also in an object store.
        overrides: each as ``--set`` takes it, such as ``train.max_steps=8``; values are read as YAML.

    Raises:
        StorageError: the store cannot be reached.
        ConfigError: no such file, not YAML, an unknown key, or an impossible value.
    """
    path = check_path("CONFIG", path)
    if is_url(path):
        text = read_text(path)
        if text is None:
            raise ConfigError(f"There is no configuration {path!r}. Check the bucket and the path.")
        return parse_config(text, overrides, source=path)
    return parse_config(read_yaml_text("The configuration", path, EXAMPLE), overrides, source=path)


def parse_config(text: str, overrides: Iterable[str] = (), source: str = "configuration") -> Config:
    """:func:`load_config` from a string."""
    values = _tree(text, source)
    for override in overrides:
        apply_override(values, override)
    return make_config(_expand_variables(values, source), source)


def parse_saved_config(text: str, source: str) -> Config:
    """The ``config.yaml`` that a run wrote: its values are final, so ``${NAME}`` in them is plain text.

    Raises:
        ConfigError: it is damaged.
    """
    return make_config(_tree(text, source), source)


def _tree(text: str, source: str) -> dict[str, Any]:
    values: Plain = load_yaml(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{source} holds {describe_value(values)}, not `section: {{key: value}}`. Give a configuration."
        )
    return values


def describe_value(value: Any) -> str:
    """What a file holds in place of keys and values."""
    return "a list" if isinstance(value, list) else f"the value {shown(value)}"


def make_config(values: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate a tree of plain values, such as ``{"data": {"corpus": "texts.txt"}}``.

    Args:
        values: sections by name, each a dictionary of its keys; what is left out has its default.
        source: what messages call the place they are from.

    Raises:
        ConfigError: an unknown key, or an impossible value; it names the key as a user writes it.
    """
    check_plain_values(values, source, NO_BOOLEANS)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, source)) from None


def check_plain_values(values: Plain, source: str, no_booleans: Collection[str] = (), key: str = "") -> None:
    """Refuse what no field could take: numbers out of the machine's range, half characters, keys that are not text.

    Args:
        no_booleans: the keys where true and false are wrong, though Python counts them as 1 and 0.

    Raises:
        ConfigError: it names the key.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            if not isinstance(name, str):
                raise ConfigError(f"{source}: the key {shown(name)} is not text. Put it in quotes, or correct it.")
            check_plain_values(value, source, no_booleans, f"{key}.{name}" if key else name)
    elif isinstance(values, list | tuple):
        for value in values:
            check_plain_values(value, source, no_booleans, key)
    elif isinstance(values, bool):
        if key in no_booleans:
            raise ConfigError(f"{source}: {key} is {shown(values)}, but it is not a switch. Give a number or text.")
    elif isinstance(values, int):
        if not -(2**63) <= values < 2**63:
            raise ConfigError(f"{source}: {key} is {shown(values)}, beyond 64 bits. Give a smaller number.")
    elif isinstance(values, float):
        if values and not SMALLEST <= abs(values) <= LARGEST:
            raise ConfigError(
                f"{source}: {key} is {values!r}, which 32-bit floats cannot compute with. Give a finite number, 0 or "
                f"one from {SMALLEST:g} to {LARGEST:g} in size."
            )
    elif isinstance(values, str) and any("\ud800" <= character <= "\udfff" for character in values):
        raise ConfigError(f"{source}: {key} is {shown(values)}, which is not UTF-8. Correct the text.")


def shown(value: Any) -> str:
    """A value as messages show it: as YAML writes it, short, and without credentials."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of about {int(value.bit_length() * 0.30103):,} digits"
    text = redact(repr(value))
    return text if len(text) <= 300 else f"{text[:200]}..."


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in a tree of plain values; the value is read as YAML."""
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > 4:
        raise ConfigError(f"--set {shown(override)} is not section.key=value, such as train.learning_rate=3e-5.")
    node = values
    for key in keys[:-1]:
        section: Plain = {} if node.get(key) is None else node[key]
        if not isinstance(section, dict):
            raise ConfigError(f"--set {shown(override)}: {key!r} is a value, not a section.")
        node[key] = section
        node = section
    node[keys[-1]] = load_setting(raw, f"--set {shown(override)}")


def _expand_variables(value: Plain, source: str, key: str = "") -> Any:
    """Replace ``${NAME}`` in every text by the environment variable NAME."""
    if isinstance(value, dict):
        return {k: _expand_variables(v, source, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand_variables(item, source, key) for item in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(
                f"{source}: {key} is {shown(value)}, but the environment variable {match[1]} is not set. "
                f"Set it, or give the value with --set {key}=..."
            )
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", look_up, value)


def _key_types() -> dict[str, Any]:
    """Every ``section.key`` there is, with its type."""
    types: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            types |= {f"{name}.{key}": inner.annotation for key, inner in section.model_fields.items()}
        else:
            types[name] = section
    return types


NO_BOOLEANS = frozenset(
    key for key, kind in _key_types().items() if {int, float} & {kind, *get_args(kind)} and bool not in get_args(kind)
)
"""The keys of numbers."""


def known_keys() -> list[str]:
    """Every ``section.key`` there is."""
    return list(_key_types())


def _describe(error: ValidationError, source: str) -> str:
    import difflib

    lines: list[str] = []
    for item in error.errors():
        location = _keys_of(item["loc"])
        key = ".".join(location)
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key[:100], known_keys(), n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}?" if close else f"the keys there are: {_siblings(location)}."
            lines.append(f"unknown key {key[:100]}: {hint}")
            continue
        refused = item.get("ctx", {}).get("error")
        if isinstance(refused, ConfigError):
            lines.append(str(refused))
            continue
        reason = item["msg"].removeprefix("Value error, ")
        reason = reason[:1].lower() + reason[1:] if item["type"] != "value_error" else reason
        if (item["type"] == "value_error" and isinstance(item["input"], dict)) or not location:
            lines.append(reason + ".")
        else:
            if item["type"] == "model_type":
                reason = "it is a section, so it holds keys; write it as `section: {key: value}`, or leave it out"
            lines.append(f"{key} is {shown(item['input'])}: {reason}{quote_hint(item)}.")
    return f"{source}: " + "\n  ".join(dict.fromkeys(lines))


def quote_hint(item: Any) -> str:
    """A hint to put a text in quotes, where YAML has read a word or digits as another type; else empty."""
    if item["type"] not in ("string_type", "literal_error") or not isinstance(item["input"], bool | int | float):
        return ""
    words = "no, off, yes and on as false and true" if isinstance(item["input"], bool) else "it as a number"
    return f"; YAML reads {words}, so put a text in quotes"


def _keys_of(location: tuple[int | str, ...]) -> list[str]:
    """The keys as the user wrote them: pydantic adds the branch of a union behind them."""
    node: Any = Config
    keys: list[str] = []
    for part in location:
        if not (isinstance(node, type) and issubclass(node, Section)):
            break
        keys.append(str(part))
        field = node.model_fields.get(str(part))
        node = field.annotation if field else None
    return keys


def _siblings(location: list[str]) -> str:
    prefix = ".".join(location[:-1])
    names = [key for key in known_keys() if key.startswith(prefix + ".")] if prefix else list(Config.model_fields)
    return ", ".join(names) or ", ".join(Config.model_fields)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, readable by :func:`load_config`."""
    return dump_yaml(config.resolved())
