"""A training step of BERT-base on one GPU, computed in many ways: sentences/s, and use of the matrix units.

    python experiments/benchmarks/gpu_step.py --json experiments/benchmarks/results/gpu_step-h200.json
    python experiments/benchmarks/gpu_step.py --device cpu --layers 2 --width 64 --batch 16 --steps 2   # a smoke test
    python experiments/benchmarks/gpu_step.py --print-lengths      # makes LENGTHS anew, with the package installed

Needs torch and transformers alone; sentence-transformers and flash-attn run where they are installed. Weights and
token ids are drawn, lengths follow LENGTHS. K-means, loss and the choice of batches are the package's own modules.

bf16 by autocast over fp32 weights, unless a variant says "bf16 weights": these have fp32 masters, which AdamW updates.
Both views go through the encoder together, are pooled at [CLS] and go through the training head. "padded" rows are one
piece, or shards by length, one after the other; "packed" is one sequence of the real tokens. torch's varlen attention
has no dropout: in "packed, varlen" attention's own is off, and hidden dropout is not. Compiled are the layers, one by
one. A graph holds a whole step, one for each shape; lengths are rounded up so that shapes repeat.

Utilisation: 3 x the forward pass's matrix products of real tokens (layers and attention, both views) a second, over the
fastest bf16 product measured on the same device. Reading and tokenising text are not in the step.

A process of its own runs the variants and writes the JSON after each; where it dies, another goes on behind it.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import math
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package may not be installed, only lie here

from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix, nearest_two
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.data.sampler import BatchOrder, cut_shards
from clusterns_ray.losses import Clusters, clusterns_loss_share, info_nce_share

LONGEST = 32
# fmt: off
LENGTHS = {
    7: 23, 8: 52, 9: 78, 10: 156, 11: 191, 12: 267, 13: 300, 14: 370, 15: 443, 16: 435, 17: 480, 18: 548, 19: 578,
    20: 613, 21: 613, 22: 650, 23: 647, 24: 607, 25: 605, 26: 623, 27: 563, 28: 544, 29: 587, 30: 570, 31: 562,
    32: 7371,
}
# fmt: on
"""Sentences of the package's demo corpus by their WordPiece tokens, special ones included, cut to 32."""

PAD_ROWS, PAD_TOKENS = 8, 1024
"""What lengths are rounded up to where shapes have to repeat: of padded rows, and of a packed batch."""
TOLERANCE = 0.05
"""How far loss and gradient norm in bf16 may be from those in fp32, relatively."""
POISONED = 3
"""Exit code of a worker whose device no longer works."""


# ---- batches, and what their products cost --------------------------------------------------------------------------


class Batch(NamedTuple):
    ids_BT: np.ndarray
    """int64, drawn; B x 32, of which each row uses its length"""
    lengths_B: np.ndarray


class Part(NamedTuple):
    """What one pass through the encoder reads: first the rows of one view, then those of the other."""

    ids: Tensor
    """int64 (2b, T); packed (1, N)"""
    mask: Tensor | None = None
    """bool (2b, T), None where all tokens are real; padded rows only"""
    positions: Tensor | None = None
    """int64 (1, N); packed only"""
    starts: Tensor | None = None
    """int32, where each sequence starts, and N; packed only. The first 2b are sentences, any further ones fill up"""

    def each(self, change: Callable[[Tensor], Any]) -> Part:
        values: Any = (x if x is None else change(x) for x in self)
        return Part(*values)


def make_batches(s: Namespace) -> list[Batch]:
    """As training has them: rows of a corpus with the measured lengths, in the package's order."""
    lengths_R = np.repeat(list(LENGTHS), list(LENGTHS.values()))
    order = BatchOrder(0, len(lengths_R), s.batch, 1, s.order, lambda rows: lengths_R[rows])
    draw, batches = np.random.default_rng(0), []
    for step in range(s.steps):
        rows = order.sample_ids(*divmod(step, order.steps_per_epoch))
        ids = draw.integers(s.vocabulary // 10, s.vocabulary, (len(rows), LONGEST))
        batches.append(Batch(ids, lengths_R[rows]))
    return batches


def forward_flops(lengths: Iterable[int], layers: int, width: int) -> int:
    """Of BERT's layers over sentences of so many tokens, each encoded once, at 2 m n k a product. With T tokens, width
    D and 4 D inside: 4 projections (2 T D D each), 2 of the feed-forward part (2 T D 4D), Q K' and P V (2 T T D)."""
    return sum(layers * (24 * n * width**2 + 4 * n**2 * width) for n in map(int, lengths))


def padded_parts(batch: Batch, shards: int, multiple: int) -> list[Part]:
    parts = []
    for rows in cut_shards(batch.lengths_B, shards):
        rows = np.concatenate([rows, rows])
        longest = -(-int(batch.lengths_B[rows].max()) // multiple) * multiple
        mask = torch.from_numpy(np.arange(longest) < batch.lengths_B[rows, None])
        ids = torch.from_numpy(batch.ids_BT[rows, :longest]) * mask
        parts.append(Part(ids, None if bool(mask.all()) else mask))
    return parts


def packed_parts(batch: Batch, multiple: int) -> list[Part]:
    """One part of N tokens, N a multiple of ``multiple``; sequences that only fill up are of 1 to 32 tokens."""
    rows = np.tile(np.argsort(batch.lengths_B, kind="stable"), 2)
    lengths = batch.lengths_B[rows]
    real = int(lengths.sum())
    ids = np.concatenate([batch.ids_BT[row, :n] for row, n in zip(rows, lengths)])
    if multiple > 1:
        fillers = -(-multiple // (LONGEST - 1))
        fill = -(real + fillers) % multiple + fillers
        lengths = np.concatenate([lengths, np.diff(np.arange(fillers + 1) * fill // fillers)])
        ids = np.concatenate([ids, np.zeros(fill, dtype=np.int64)])
    positions = np.concatenate([np.arange(n) for n in lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids_1N, positions_1N, starts_S = map(torch.from_numpy, (ids[None], positions[None], starts))
    return [Part(ids_1N, positions=positions_1N, starts=starts_S)]


# ---- attention of packed batches: (N, heads, d) in and out ----------------------------------------------------------


def varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropout: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, starts, starts, LONGEST, LONGEST)  # type: ignore[return-value]


def varlen_with_dropout(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropout: float) -> Tensor:
    """The kernel beneath torch's varlen attention, which hands no dropout down to it. Not a public name."""
    arguments = (q, k, v, starts, starts, LONGEST, LONGEST, dropout, False, False)
    return torch.ops.aten._flash_attention_forward(*arguments)[0]


def jagged(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropout: float) -> Tensor:
    """torch's own SDPA over nested tensors, which has dropout."""
    nested = [
        torch.nested.nested_tensor_from_jagged(x, starts, min_seqlen=1, max_seqlen=LONGEST).transpose(1, 2)
        for x in (q, k, v)
    ]
    return scaled_dot_product_attention(*nested, dropout_p=dropout).transpose(1, 2).values()


def flash_attn(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropout: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func(q, k, v, starts, starts, LONGEST, LONGEST, dropout_p=dropout)


PACKED = {
    "varlen": varlen,
    "varlen with dropout": varlen_with_dropout,
    "jagged": jagged,
    "flash-attn": flash_attn,
}


def register(name: str) -> str:
    """Make one of PACKED known to transformers; returns the name it has there."""
    from transformers import AttentionInterface

    def attention(module, query, key, value, attention_mask, dropout=0.0, *, starts: Any, **others):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return PACKED[name](q, k, v, starts, dropout)[None], None

    known = f"packed_{list(PACKED).index(name)}"  # no "flash" in it, which transformers would take for its own
    AttentionInterface.register(known, attention)
    return known


# ---- steps ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    attention: str
    """of padded rows eager (the field's plain loop, which takes cosines by a B x B x D broadcast) or sdpa; one of
    PACKED; or sentence-transformers' whole step"""
    shards: int = 1
    compiled: bool = False
    graph: bool = False
    bf16_weights: bool = False
    clustered: bool = True
    bf16: bool = True
    dropout: float = 0.1
    learning_rate: float = 3e-5
    initializer_range: float = 0.02

    @property
    def name(self) -> str:
        padded = {"eager": "plain loop", "sdpa": "padded, sdpa", PEER.attention: PEER.attention}
        says = {
            padded.get(self.attention, f"packed, {self.attention}"): True,
            f"{self.shards} shards": self.shards > 1,
            "compiled": self.compiled,
            "graph": self.graph,
            "bf16 weights": self.bf16_weights,
            "no clusters": not self.clustered,
        }
        return ", ".join(text for text, true in says.items() if true)

    def parts(self, batch: Batch) -> list[Part]:
        fixed = self.compiled or self.graph
        if self.attention in PACKED:
            return packed_parts(batch, PAD_TOKENS if fixed else 1)
        return padded_parts(batch, self.shards, PAD_ROWS if fixed else 1)


PLAIN = Variant("eager")
PEER = Variant("sentence-transformers")
SHARDED = Variant("sdpa", shards=8)


def all_variants() -> list[Variant]:
    """What all are compared with comes first, what is slow to compile last."""
    ways = [Variant("varlen"), Variant("varlen with dropout"), Variant("sdpa")]
    ways += [Variant("flash-attn")] if find_spec("flash_attn") else []
    graphs = [replace(way, graph=True) for way in [*ways, Variant("jagged"), SHARDED]]
    both = [replace(way, compiled=True, graph=True) for way in ways]
    halves = [replace(way, bf16_weights=True) for way in both]
    alone = [replace(way, compiled=True) for way in ways]
    return [PLAIN, PEER, SHARDED, *ways, Variant("jagged"), *graphs, *both, *halves, *alone]


def bert(s: Namespace, v: Variant) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.width // 64,
        intermediate_size=4 * s.width,
        hidden_dropout_prob=v.dropout,
        attention_probs_dropout_prob=v.dropout,
        initializer_range=v.initializer_range,
    )
    torch.manual_seed(0)
    with torch.device(s.device):
        model: Any = BertModel(config, add_pooling_layer=False)
    model.set_attn_implementation(register(v.attention) if v.attention in PACKED else v.attention)
    return model.to(s.device).train()  # buffers that ignored the device


class Encoder(nn.Module):
    """Embeddings of a part's rows (2b x D, float32), through the training head."""

    def __init__(self, s: Namespace, v: Variant):
        super().__init__()
        self.bert = bert(s, v)
        with torch.device(s.device):
            self.head = nn.Sequential(nn.Linear(s.width, s.width), nn.Tanh())
        self.whole = v.attention == "eager"
        if v.compiled:
            for module in [self.bert.embeddings, *self.bert.encoder.layer]:
                module.compile()

    def forward(self, part: Part, rows: int) -> Tensor:
        if self.whole:
            mask = None if part.mask is None else part.mask.long()
            cls = self.bert(input_ids=part.ids, attention_mask=mask).last_hidden_state[:, 0]
            return self.head(cls).float()
        states = self.bert.embeddings(input_ids=part.ids, position_ids=part.positions)
        mask = None if part.mask is None else part.mask[:, None, None, :]
        states = self.bert.encoder(states, attention_mask=mask, starts=part.starts).last_hidden_state
        cls = states[:, 0] if part.starts is None else states[0].index_select(0, part.starts[:rows])
        return self.head(cls).float()


copy_all: Any = torch._foreach_copy_  # type: ignore[attr-defined]


class Step:
    """One step of ClusterNS: both views, centroids, loss, backward, clipping, fused AdamW. Waits for nothing."""

    def __init__(self, s: Namespace, v: Variant):
        self.s, self.v = s, v
        self.model = Encoder(s, v)
        self.setup(list(self.model.parameters()))
        self.clustering = Clustering(s.clusters if v.clustered else 0, 0.4, 1e-3, "mean")
        if self.clustering.num_clusters:
            draw = torch.Generator().manual_seed(0)
            self.clustering.set_centroids(torch.randn(s.clusters, s.width, generator=draw).to(s.device))
        self.diagonal_B = torch.arange(s.batch, device=s.device)

    def setup(self, weights: list[nn.Parameter]) -> None:
        s, v = self.s, self.v
        self.weights = self.masters = weights
        if v.bf16_weights:
            self.masters = [nn.Parameter(weight.detach().clone()) for weight in weights]
            for master, weight in zip(self.masters, weights):
                master.grad = torch.zeros_like(master)
                weight.data = weight.data.bfloat16()
        on_gpu = s.device.type == "cuda"
        rates: Any = {"lr": v.learning_rate, "weight_decay": 0.0}
        self.adamw = torch.optim.AdamW(self.masters, **rates, fused=True, capturable=v.graph and on_gpu)
        self.said = torch.zeros(2, device=s.device)
        """loss and gradient norm of the last step"""

    def __call__(self, parts: list[Part]) -> None:
        for weight in self.weights:
            weight.grad = None
        loss = self.forward(parts)
        loss.backward()
        if self.v.bf16_weights:
            copy_all([master.grad for master in self.masters], [weight.grad for weight in self.weights])
        norm = nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adamw.step()
        if self.v.bf16_weights:
            with torch.no_grad():
                copy_all(self.weights, self.masters)
        self.said.copy_(torch.stack([loss.detach(), norm]))

    def forward(self, parts: list[Part]) -> Tensor:
        with torch.autocast(self.s.device.type, torch.bfloat16, enabled=self.v.bf16 and not self.v.bf16_weights):
            views = [self.model(part, 2 * self.s.batch).chunk(2) for part in parts]
        return self.loss(*(torch.cat(view) for view in zip(*views)))

    def loss(self, z1_BD: Tensor, z2_BD: Tensor) -> Tensor:
        if self.v.attention == "eager":
            cos_BB = cosine_similarity(z1_BD[:, None], z2_BD[None], dim=-1)
        else:
            cos_BB = cosine_matrix(z1_BD, z2_BD)
        centroids_KD = self.clustering.centroids_KD
        if centroids_KD is None:
            return info_nce_share(cos_BB, self.diagonal_B, 0.05)
        self.clustering.update(z1_BD.detach())
        moved_KD: Any = self.clustering.centroids_KD
        self.clustering.centroids_KD = centroids_KD.copy_(moved_KD)  # a graph keeps the place
        cos_BK = cosine_matrix(z1_BD, centroids_KD)
        nearest_B, second_B = nearest_two(cos_BK.detach())
        clusters = Clusters(nearest_B, second_B, nearest_B, cluster_sizes(second_B, len(centroids_KD)))
        margins: Any = {"bml_weight": 1e-3, "bml_alpha": 0.0, "bml_beta": 0.3}
        return clusterns_loss_share(cos_BB, cos_BK, self.diagonal_B, clusters, temperature=0.05, **margins).loss


class PeerStep(Step):
    """sentence-transformers' model and MultipleNegativesRankingLoss in the steps of its trainer, without tokenising."""

    def __init__(self, s: Namespace, v: Variant):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Pooling

        class Tokens(nn.Module):
            """What its Transformer does with features that are tokens already."""

            def __init__(self):
                super().__init__()
                self.bert = bert(s, replace(v, attention="sdpa"))

            def forward(self, features: dict[str, Tensor], **others: Any) -> dict[str, Tensor]:
                output = self.bert(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
                return {**features, "token_embeddings": output.last_hidden_state}

        self.s, self.v = s, v
        model = SentenceTransformer(modules=[Tokens(), Pooling(s.width, "cls")], device=str(s.device)).train()
        self.mnrl = MultipleNegativesRankingLoss(model)
        self.setup(list(model.parameters()))

    def forward(self, parts: list[Part]) -> Tensor:
        (part,) = parts
        mask = torch.ones_like(part.ids) if part.mask is None else part.mask.long()
        pairs = zip(part.ids.chunk(2), mask.chunk(2))
        with torch.autocast(self.s.device.type, torch.bfloat16, enabled=self.v.bf16):
            return self.mnrl([{"input_ids": i, "attention_mask": m} for i, m in pairs], torch.empty(0))


class Graphs:
    """A step as CUDA graphs, one for each shape of its parts, captured when that first comes."""

    def __init__(self, step: Step):
        if step.s.device.type != "cuda":
            raise RuntimeError(f"the device is {step.s.device.type!r}, and CUDA graphs need a CUDA device")
        self.step, self.said = step, step.said
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Part]]] = {}

    def __call__(self, parts: list[Part]) -> None:
        key = tuple(tuple(part.each(lambda x: x.shape)) for part in parts)
        if key not in self.graphs:
            self.graphs[key] = self.capture([part.each(torch.clone) for part in parts])
        graph, places = self.graphs[key]
        for place, part in zip(places, parts):
            for old, new in zip(place, part):
                if old is not None and new is not None:
                    old.copy_(new)
        graph.replay()

    def capture(self, places: list[Part]) -> tuple[torch.cuda.CUDAGraph, list[Part]]:
        """After three steps on another stream, as torch's documentation of CUDA graphs has it."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.step(places)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(places)
        return graph, places


class Contestant:
    """A variant and its batches, in host memory."""

    def __init__(self, s: Namespace, v: Variant, batches: list[Batch]):
        self.s = s
        self.inputs = [v.parts(batch) for batch in batches]
        if s.device.type == "cuda":
            self.inputs = [[part.each(Tensor.pin_memory) for part in parts] for parts in self.inputs]
        self.step = PeerStep(s, v) if v == PEER else Step(s, v)
        self.run = Graphs(self.step) if v.graph else self.step

    def __call__(self, inputs: list[list[Part]] | None = None) -> float:
        """Steps on all batches, or on those given; the seconds."""
        synchronize(self.s.device)
        began = time.perf_counter()
        for parts in inputs or self.inputs:
            self.run([part.each(lambda x: x.to(self.s.device, non_blocking=True)) for part in parts])
        synchronize(self.s.device)
        return time.perf_counter() - began


# ---- what is measured -----------------------------------------------------------------------------------------------


def matrix_products(s: Namespace, batches: list[Batch]) -> dict[str, Any]:
    """TFLOP/s of bf16 products of drawn numbers, large ones and those of a layer's step; medians of ten groups."""
    on_gpu = s.device.type == "cuda"
    n = 2 * int(statistics.median(batch.lengths_B.sum() for batch in batches))
    d, inner = s.width, 4 * s.width
    large = [(m, m, m) for m in ((4096, 8192, 16384) if on_gpu else (256,))]
    # How often a layer has each, forward and backward; the last three are gradients of weights, over the tokens.
    in_step = {(n, d, d): 8, (n, d, inner): 2, (n, inner, d): 2, (d, n, d): 4, (d, n, inner): 1, (inner, n, d): 1}
    speeds: dict[tuple[int, int, int], float] = {}
    for m, k, p in [*large, *in_step]:
        a = torch.randn(k, m, device=s.device).bfloat16().T if k == n else torch.randn(m, k, device=s.device).bfloat16()
        b = torch.randn(k, p, device=s.device).bfloat16()
        seconds = []
        for _ in range(12):
            began = time.perf_counter()
            for _ in range(20 if on_gpu else 1):
                torch.mm(a, b)
            synchronize(s.device)
            seconds.append((time.perf_counter() - began) / (20 if on_gpu else 1))
        speeds[m, k, p] = 2 * m * k * p / statistics.median(seconds[2:]) / 1e12
        print(f"  {m} x {k} by {k} x {p}: {speeds[m, k, p]:.4g} TFLOP/s", flush=True)
    weighed = {shape: times * math.prod(shape) for shape, times in in_step.items()}
    return {
        "tflops": max(speeds.values()),
        "tflops_of_step_products": sum(weighed.values()) / sum(w / speeds[shape] for shape, w in weighed.items()),
        "by_shape": {" x ".join(map(str, shape)): speed for shape, speed in speeds.items()},
    }


def check(s: Namespace, v: Variant, batches: list[Batch]) -> dict[str, Any]:
    """Loss and gradient norm of two batches, without dropout, beside those of the plain loop in fp32. Weights are
    larger than BERT's at first, whose attention is nearly the mean of all tokens."""
    still: Any = {"dropout": 0.0, "learning_rate": 0.0, "initializer_range": s.width**-0.5}
    contestants = [Contestant(s, replace(w, **still), batches[:2]) for w in (v, replace(PLAIN, bf16=False))]
    ours, plain = [], []
    for contestant, said in zip(contestants, (ours, plain)):
        for parts in contestant.inputs:
            contestant([parts])
            said.append(contestant.step.said.tolist())
    off = float(np.max(np.abs(np.subtract(ours, plain)) / np.abs(plain)))
    print(f"  loss and gradient norm {ours[0]}, in fp32 {plain[0]}: {off:.2%} off", flush=True)
    if not off <= TOLERANCE:
        raise AssertionError(f"loss or gradient norm is {off:.2%} off the plain loop's in fp32: {ours} and {plain}")
    return {"loss_and_gradient_norm": ours, "plain_fp32": plain, "relative_difference": off}


def measure(s: Namespace, v: Variant, batches: list[Batch]) -> dict[str, Any]:
    """Rounds over all batches, after one that compiles and captures."""
    began = time.perf_counter()
    contestant = Contestant(s, v, batches)
    contestant()
    first = time.perf_counter() - began
    found = summary(s, [contestant() for _ in range(s.rounds)], batches)
    loss, norm = contestant.step.said.tolist()
    if not np.isfinite([loss, norm]).all():
        raise FloatingPointError(f"loss {loss} and gradient norm {norm}: not finite")
    found |= {"seconds_to_first_round": first, "loss": loss}
    if s.device.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def summary(s: Namespace, seconds: list[float], batches: list[Batch]) -> dict[str, Any]:
    """Two views, forward and backward; backward is twice the forward pass, a product for each operand's gradient."""
    median = statistics.median(seconds)
    sentences = sum(len(batch.lengths_B) for batch in batches)
    return {
        "sentences_per_second": sentences / median,
        "tokens_per_second": 2 * sum(int(batch.lengths_B.sum()) for batch in batches) / median,
        "tflops": 2 * 3 * sum(forward_flops(b.lengths_B, s.layers, s.width) for b in batches) / median / 1e12,
        "seconds_for_a_million": 1e6 * median / sentences,
        "seconds_of_rounds": seconds,
    }


def race(s: Namespace, variants: list[Variant], batches: list[Batch]) -> dict[str, Any]:
    """The same batches for each, in rounds of an order drawn anew; then the parts of a step of ours."""
    contestants = {v.name: Contestant(s, v, batches) for v in variants}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(2 * s.rounds + 1):
        for name in random.sample(list(contestants), len(contestants)):
            found = contestants[name]()
            if number:
                seconds[name].append(found)
    results = {name: summary(s, found, batches) for name, found in seconds.items()}
    for name, found in results.items():
        for other in (PEER.name, PLAIN.name):
            if other in seconds:
                ratios = [b / a for a, b in zip(seconds[name], seconds[other])]
                found[f"times {other}"] = {"median": statistics.median(ratios), "from": min(ratios), "to": max(ratios)}
        if type(contestants[name].step) is Step:
            found["parts"] = parts_of_a_step(contestants[name])
    return results


# ---- the parts of a step --------------------------------------------------------------------------------------------

PARTS = (
    ("optimizer", r"adam|multi_tensor|lpnorm"),
    ("attention", r"flash|fmha|attention|softmax"),
    ("elementwise and norms", r"^triton_(?!tem|mm)"),
    ("dropout", r"dropout|masked_scale|bernoulli"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|xmma|gemv|^triton_|\b(addmm|mm|bmm)\b"),
    ("embeddings", r"embedding|index|sort|radix|segment|grad_weight"),
    ("copies and casts", r"memcpy|memset|copy|catarray|fill"),
    ("elementwise and norms", r"elementwise|layer_?norm|gammabeta|gelu|tanh|reduce|aten::(add|mul|div|sum|sub)"),
)
"""Kinds of kernels (on a CPU, of operators) by their names, the first that fits; compiled dropout is in triton's."""


def part_of(kernel: str) -> str:
    return next((part for part, names in PARTS if re.search(names, kernel, re.IGNORECASE)), "other")


def kernel_seconds(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds on the device by kernel, or on a CPU by operator (without what it calls)."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
        synchronize(device)
    found: dict[str, float] = defaultdict(float)
    if on_gpu:
        for event in profiler.events() or []:
            if event.device_type.name == "CUDA" and not event.is_user_annotation:
                found[event.name] += event.time_range.elapsed_us() / 1e6
    else:
        for event in profiler.key_averages():
            found[event.key] += event.self_cpu_time_total / 1e6
    return found


def parts_of_a_step(contestant: Contestant) -> dict[str, Any]:
    """Milliseconds of a step by kind of kernel, over four of the batches. Loss and clusters, forward and backward, are
    profiled alone and taken from the rest; "idle" is what is left of a step's time without the profiler."""
    s, step = contestant.s, contestant.step
    some = contestant.inputs[:: max(1, s.steps // 4)]

    def loss_alone() -> None:
        for _ in some:
            z1_BD, z2_BD = torch.randn(2, s.batch, s.width, device=s.device).unbind()
            step.loss(z1_BD.requires_grad_(), z2_BD.requires_grad_()).backward()

    wall = statistics.median(contestant(some) for _ in range(3))
    whole, loss = (kernel_seconds(work, s.device) for work in (lambda: contestant(some), loss_alone))
    parts = defaultdict(float, {"loss and clusters": sum(loss.values())})
    for kernels, sign in ((whole, 1), (loss, -1)):
        for kernel, seconds in kernels.items():
            parts[part_of(kernel)] += sign * seconds
    parts["idle"] = max(0.0, wall - sum(parts.values()))
    largest = sorted(((1000 * seconds / len(some), name[:120]) for name, seconds in whole.items()), reverse=True)
    return {
        "milliseconds": {part: 1000 * seconds / len(some) for part, seconds in parts.items()},
        "share": {part: seconds / sum(parts.values()) for part, seconds in parts.items()},
        "largest_kernels_ms": largest[:15],
    }


# ---- one after the other, whatever happens --------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Record:
    """The JSON file: what was found, and what is being tried."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def write(self) -> None:
        digits = json.loads(json.dumps(self.found, default=str), parse_float=lambda x: float(f"{float(x):.5g}"))
        self.path.write_text(json.dumps(digits, indent=1) + "\n")

    def attempt(self, s: Namespace, section: str, name: str, until: float, work: Callable[[], dict[str, Any]]) -> None:
        """Once; an error is recorded, and what began too late left out. Ends the process if the device is dead."""
        entries = self.found.setdefault(section, {})
        if name in entries:
            return
        if time.time() > until:
            entries[name] = {"skipped": "the time was up"}
            return self.write()
        print(f"{section}: {name}", flush=True)
        entries[name] = {"error": f"the process died of it, or had not ended after {s.limit:.0f} s"}
        self.write()
        faulthandler.dump_traceback_later(s.limit, exit=True)
        try:
            entries[name] = work()
        except Exception as error:
            entries[name] = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
            print(f"  failed: {entries[name]['error'][:500]}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        self.write()
        torch.compiler.reset()
        gc.collect()
        if s.device.type == "cuda":
            try:  # a capture that failed, or a wrong address, leaves nothing usable behind
                nn.functional.dropout(torch.ones(8, device=s.device), 0.5)
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            except Exception:
                sys.exit(POISONED)

    def speed(self, v: Variant) -> float:
        """Sentences a second; 0 where there is none."""
        return self.found.get("variants", {}).get(v.name, {}).get("sentences_per_second", 0.0)


def work_through(s: Namespace, record: Record) -> None:
    """Products, checks and variants in the first two thirds of the time, then the race of the fastest."""
    batches = make_batches(s)
    record.found.setdefault("machine", machine(s))
    record.found.setdefault("settings", vars(s))
    until, early = s.worker_until, s.worker_until - 20 * s.minutes
    variants = [v for v in all_variants() if not s.only or v.name in s.only]
    record.attempt(s, "products", "bf16", until, lambda: matrix_products(s, batches))
    for v in variants:
        if v is not PEER and not v.compiled and not v.bf16_weights:
            record.attempt(s, "checks", v.name, early, lambda v=v: check(s, v, batches))
    for v in variants:
        record.attempt(s, "variants", v.name, early, lambda v=v: measure(s, v, batches))
    ran = sorted((v for v in variants if record.speed(v)), key=record.speed)
    ours = [v for v in ran if v is not PEER]
    if ours:
        fastest = ours[-1]
        record.attempt(s, "checks", fastest.name, until, lambda: check(s, fastest, batches))
        racers = [fastest, replace(fastest, clustered=False), *(v for v in (SHARDED, PEER, PLAIN) if v in ran)]
        racers = list(dict.fromkeys(racers))
        record.attempt(s, "race", "of the fastest", until, lambda: race(s, racers, batches))


def machine(s: Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "sentence-transformers", "flash-attn", "triton", "numpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    if s.device.type != "cuda":
        return {"device": platform.machine(), "versions": versions}
    gpu = torch.cuda.get_device_properties(s.device)
    return {"device": gpu.name, "memory_gb": gpu.total_memory / 1e9, "versions": versions}


def show(found: dict[str, Any]) -> None:
    """The tables at the end."""
    products = found["products"]["bf16"]
    ceiling = products.get("tflops", float("nan"))
    together = products.get("tflops_of_step_products", float("nan"))
    print(f"\nbf16 matrix products, TFLOP/s: {ceiling:.4g} at most, {together:.4g} in the step's own shapes together")
    for name, result in found.get("checks", {}).items():
        print(f"check of {name:<45}{result.get('error', result.get('skipped', 'agrees'))[:100]}")
    tables = {"each alone": found.get("variants", {}), "in turns": found.get("race", {}).get("of the fastest", {})}
    for title, table in tables.items():
        print(f"\n{title:<48}{'sentences/s':>12}{'tokens/s':>11}{'used':>8}{'1M, s':>8}{'GB':>7}{'first, s':>9}")
        for name, result in table.items():
            if "sentences_per_second" not in result:
                print(f"{name:<48}{str(result)[:100]}")
                continue
            print(
                f"{name:<48}{result['sentences_per_second']:>12.1f}{result['tokens_per_second']:>11.0f}"
                f"{result['tflops'] / ceiling:>8.1%}{result['seconds_for_a_million']:>8.0f}"
                f"{result.get('peak_gb', 0):>7.1f}{result.get('seconds_to_first_round', 0):>9.1f}"
            )
            for other in (PEER.name, PLAIN.name):
                if (ratio := result.get(f"times {other}")) and name != other:
                    print(f"    {ratio['median']:.2f} x {other} ({ratio['from']:.2f} to {ratio['to']:.2f})")
            if "parts" in result:
                print("    " + ", ".join(f"{part} {share:.1%}" for part, share in result["parts"]["share"].items()))


def print_lengths() -> None:
    """The table LENGTHS, of the demo corpus as ``clusterns prepare`` tokenises it for the quickstart."""
    from clusterns_ray.config import load_config
    from clusterns_ray.data.prepare import prepare
    from clusterns_ray.data.token_store import TokenStore

    with tempfile.TemporaryDirectory() as scratch:
        keys = [f"data.cache_dir={scratch}", f"encoder.max_length={LONGEST}", "evaluation.sts=null"]
        config = load_config(Path(__file__).parents[1] / "quickstart.yaml", keys)
        store = TokenStore.open(prepare(config).tokens_dir)
        counts = Counter(store.lengths(np.arange(len(store))).tolist())
    print(dict(sorted(counts.items())))


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--device", type=torch.device, default="cuda")
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--width", type=int, default=768, help="a multiple of 64, the width of a head")
    made.add_argument("--vocabulary", type=int, default=30522)
    made.add_argument("--batch", type=int, default=512, help="sentences of a step")
    made.add_argument("--clusters", type=int, default=128)
    made.add_argument("--steps", type=int, default=16, help="steps of a round, each with a batch of its own")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--order", choices=["random", "length_grouped"], default="random")
    made.add_argument("--minutes", type=float, default=8.0, help="what does not fit is left out")
    made.add_argument("--limit", type=float, default=150.0, help="seconds after which a variant is given up")
    made.add_argument("--only", nargs="+", help="variants, by name")
    made.add_argument("--json", type=Path, help="where to write all figures")
    made.add_argument("--print-lengths", action="store_true")
    made.add_argument("--worker-until", type=float, help=SUPPRESS)
    return made


def main() -> None:
    s = parser().parse_args()
    if s.print_lengths:
        return print_lengths()
    if s.worker_until:
        return work_through(s, Record(s.json))
    with tempfile.TemporaryDirectory() as scratch:
        path = s.json or Path(scratch, "gpu_step.json")
        path.unlink(missing_ok=True)
        until = str(time.time() + 60 * s.minutes)
        command = [sys.executable, __file__, *sys.argv[1:], "--json", str(path), "--worker-until", until]
        tried = -1
        while subprocess.run(command, check=False).returncode:
            before, tried = tried, sum(len(v) for v in Record(path).found.values())
            if tried == before:
                sys.exit("The worker died of what is no variant; what it said is above.")
            print("The worker died; the next one goes on behind what it died of.", flush=True)
        record = Record(path)
        record.found["command"] = " ".join(["python", "experiments/benchmarks/gpu_step.py", *sys.argv[1:]])
        record.write()
        show(record.found)


if __name__ == "__main__":
    main()
