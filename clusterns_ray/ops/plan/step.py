"""A model of one training step: what it computes, what it exchanges, and how long both take on n workers.

Arithmetic alone: no torch, no files. Letters: B rows of the global batch, b rows of a worker, T tokens of a row, D
width, K clusters, L layers, n workers. FLOPs count a multiplication and an addition as two, and matrix products alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from clusterns_ray.data.shard_tree import assign_shards, nodes_by_rank

FLOAT, INDEX = 4, 8
"""Bytes of a float32 and of an int64: gradients, keys and centroids are exchanged as the one, clusters as the other."""

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20
"""Bytes of gradients that DistributedDataParallel exchanges at once: of its first bucket, and of the others."""

BACKWARD = 2
"""FLOPs of a backward pass over those of its forward pass: a gradient of the weights, and one of the inputs."""

Number = TypeVar("Number", float, np.ndarray)
"""A number, or an array of them."""


# ---- computing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderWork:
    """The sizes of the matrices by which a token, or a row, is multiplied; in weights."""

    width: int
    """D"""
    layers: int
    """L"""
    linear: int
    """The linear layers that every token passes."""
    embeddings: int = 0
    """The table of tokens, which is looked up and not multiplied."""
    pooler: int = 0
    """The layers that a row passes once, forward only, as their result is not read."""
    head: int = 0
    """The layers that a row passes once, with a gradient: the training head."""
    prediction: int = 0
    """The layers that a token of the masked copy passes besides; 0 without masked language modelling."""
    cached: bool = False
    """Whether embeddings are computed once more, without activations, before their gradient is known."""

    def forward(self, rows: Number, length: Number) -> Number:
        """FLOPs of one forward pass of ``rows`` rows padded to ``length`` tokens.

        It is an upper bound: packed batches (``kernels/packed_attention.py``) spare the linear layers the padding.

        ``rows T 2 linear + rows L 4 T^2 D``: two a weight and token, and two for each of the T x T x D products of
        attention, queries with keys and probabilities with values (Hoffmann et al., "Training Compute-Optimal Large
        Language Models", 2022, appendix F).
        """
        return rows * length * (2 * self.linear + 4 * self.layers * length * self.width)

    def encode(self, rows: Number, length: Number) -> Number:
        """FLOPs of embedding ``rows`` rows padded to ``length`` tokens, without a gradient."""
        return self.forward(rows, length) + 2 * rows * self.pooler

    def shard(self, rows: Number, length: Number, second: Number) -> Number:
        """FLOPs of both views of a shard, padded to ``length`` and ``second`` tokens, and their backward pass; and of
        its masked copy where there is one."""
        forwards = 2 if self.cached else 1
        passes = forwards + BACKWARD
        once = 2 * rows * (forwards * self.pooler + passes * self.head)
        flops = passes * (self.forward(rows, length) + self.forward(rows, second)) + 2 * once
        if self.prediction:
            flops = flops + passes * (self.forward(rows, length) + 2 * rows * length * self.prediction)
            flops = flops + 2 * rows * forwards * self.pooler
        return flops


def objective_flops(batch: int, width: int, clusters: int, negatives: int | None = None) -> float:
    """FLOPs of the loss of a batch, which every worker computes: ``6 B B D + 8 B K D``.

    The scores of B rows with B keys, and from them the gradients of both: 3 products of 2 B B D. With K centroids: the
    nearest and the sums of their members, by which they move, and the rows' hard negatives with their gradients, as
    centroids have none. A batch that goes through in blocks (``losses.row_blocks``) has its scores computed twice.

    Args:
        negatives: M sentences drawn for each row from clusters of the corpus: then ``8 B B D + 2 B K D + 4 B B M D``,
            as false negatives are counted beforehand, centroids only say which, and stored embeddings have no gradient.
    """
    if negatives is None:
        return 2 * batch * width * (3 * batch + 4 * clusters)
    return 2 * batch * width * (4 * batch + clusters + 2 * batch * negatives)


def busiest_worker(flops_NS: np.ndarray, workers: int) -> float:
    """FLOPs of the worker that has most to do, as the others wait for it: the mean over N sampled batches.

    Args:
        flops_NS: FLOPs of each of a batch's S shards.
    """
    most = [
        max(flops_S[its_shards].sum() for its_shards in assign_shards(len(flops_S), workers)) for flops_S in flops_NS
    ]
    return float(np.mean(most))


# ---- exchanging -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """The connection between any two workers."""

    bandwidth: float
    """Bytes a second, each way."""
    latency: float
    """Seconds of a message, whatever its size."""
    trees: bool = True
    """Whether sums may take the path with fewer messages, as NCCL chooses; gloo always goes around a ring."""


@dataclass(frozen=True)
class Exchange:
    """Some collectives of one step."""

    what: str
    kind: Literal["all_reduce", "all_gather", "all_to_all", "broadcast"]
    size: float
    """Bytes of what is summed, of what has been gathered, or of what a worker has or gets, over all calls."""
    calls: float = 1

    def sent(self, workers: int) -> float:
        """Bytes that each worker sends: ``2 (n - 1) / n`` of a sum's, ``(n - 1) / n`` of all others.

        Around a ring, which is as few as there can be (Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms for
        clusters of workstations", J. Parallel Distrib. Comput. 69, 2009).
        """
        turns = 2 if self.kind == "all_reduce" else 1
        return turns * (workers - 1) / workers * self.size

    def seconds(self, workers: int, network: Network) -> float:
        """``calls (n - 1) (latency + size / calls / n / bandwidth)`` around a ring, twice that for a sum.

        A sum over two trees takes ``2 log2 n`` messages, and every byte is sent twice (Sanders, Speck & Traff,
        "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing 35, 2009): where that
        is less, and the library chooses, that.
        """
        if workers == 1:
            return 0.0
        turns = (2 if self.kind == "all_reduce" else 1) * (workers - 1) * self.calls
        ring = turns * network.latency + self.sent(workers) / network.bandwidth
        if self.kind != "all_reduce" or not network.trees:
            return ring
        depth = math.ceil(math.log2(workers))
        return min(ring, 2 * depth * self.calls * network.latency + 2 * self.size / network.bandwidth)


def gradient_exchange(trained: int) -> Exchange:
    """DistributedDataParallel's sum of ``trained`` float32 gradients, and an upper bound of the number of its buckets:
    each still holds the parameter that fills it."""
    size = FLOAT * trained
    return Exchange("gradients", "all_reduce", size, 1 + math.ceil(max(size - FIRST_BUCKET, 0) / BUCKET))


def tree_exchanges(dense: int, shards: int, workers: int, looked_up: float, width: int) -> list[Exchange]:
    """What adds up gradients in the tree over shards: each worker gets its slice of the partial sums of all, adds them,
    and sends the sum to all; and all gather the gradients of looked-up embeddings, rows of ``width`` and their ids.

    Args:
        dense: parameters that are not looked up.
        looked_up: rows of the table that all shards read, at most.
    """
    partial_sums = sum(map(len, nodes_by_rank(shards, workers))) / workers
    size = FLOAT * math.ceil(dense / workers) * workers
    exchanges = [
        Exchange("gradients", "all_to_all", size * partial_sums),
        Exchange("sums of gradients", "all_gather", size),
    ]
    if looked_up:
        exchanges += [
            Exchange("gradients of tokens", "all_gather", (FLOAT * width + INDEX) * looked_up, 2),
            Exchange("numbers of tokens", "all_gather", INDEX * shards),
        ]
    return exchanges


def step_exchanges(
    gradients: list[Exchange],
    *,
    batch: int,
    width: int,
    clusters: int,
    mlm_sums: int = 0,
    teacher: int = 0,
    encoded_anew: int = 0,
) -> list[Exchange]:
    """What workers exchange in a step once clustering has started.

    That a gradient is finite is not exchanged: the sum of gradients is not, where one of them is not.

    Args:
        gradients: how they are added up.
        mlm_sums: pairs of a loss and a number of masked tokens; 0 without masked language modelling.
        teacher: width of its embeddings; 0 without one.
        encoded_anew: rows of the corpus' bank that are encoded again, besides those of the batch.
    """
    exchanges = [*gradients, Exchange("both views", "all_gather", FLOAT * batch * 2 * width)]
    if clusters:
        exchanges.append(Exchange("centroids", "broadcast", FLOAT * clusters * width))
    if encoded_anew:
        exchanges.append(Exchange("rows encoded anew", "all_reduce", FLOAT * encoded_anew * width))
    if teacher:
        exchanges.append(Exchange("the teacher's embeddings", "all_gather", FLOAT * batch * teacher))
    if mlm_sums:
        exchanges.append(Exchange("masked tokens", "all_gather", 2 * FLOAT * mlm_sums))
    return exchanges


def exposed_seconds(
    exchanges: Sequence[Exchange], workers: int, network: Network, backward_s: float, last: float, *, overlaps: bool
) -> float:
    """Seconds in which a worker waits for exchanges.

    Gradients are exchanged while the backward pass goes on, each bucket as soon as it is complete. That is only in the
    pass of the worker's last shard, as all of its shards add to them, and the last bucket is complete at its end.

    Args:
        exchanges: what :func:`step_exchanges` returns; the gradients are the first.
        backward_s: seconds of the last shard's backward pass.
        last: share of the gradients that is complete at its end alone: the table of tokens is.
        overlaps: whether that goes on in parallel: on a CPU both want the same cores.
    """
    total = sum(exchange.seconds(workers, network) for exchange in exchanges)
    if not overlaps:
        return total
    gradients = exchanges[0]
    whole = gradients.seconds(workers, network)
    return total - min(whole * (1 - max(1 / gradients.calls, last)), backward_s)


def nearest_possible(workers: int, shards: int) -> list[int]:
    """The worker counts next to ``workers``, below and above, that divide ``shards``; itself if it does."""
    divisors = [d for d in range(1, shards + 1) if shards % d == 0]
    if workers in divisors:
        return [workers]
    return [*[d for d in divisors if d < workers][-1:], *[d for d in divisors if d > workers][:1]]
