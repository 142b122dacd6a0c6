"""The parts of training alone, and what clusters add to a whole step.

    python experiments/benchmarks/parts.py [--only loss step ...] [--json FILE]

Contestants take turns in random order, several rounds; medians, and 95 % intervals of their ratios by a bootstrap over
the rounds.

    loss        of one of eight workers at width 768, forward and backward, by batch and clusters
    step        the whole step with 128 clusters beside SimCSE's, batch 512, width 768
    kmeans      beside faiss and scikit-learn
    reading     rows of the corpus as tensors
    evaluation  the seven STS tests with all-MiniLM-L6-v2, where CLUSTERNS_DATA is set
    dropout     the ways to draw masks and to multiply by them
    products    of a linear layer, by torch and by oneDNN
    attention   of short rows, ours beside torch's, and the softmax in it
    corpus      a step with clusters of the whole corpus beside one with clusters of the batches
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from racing import (
    MODEL,
    ClusterNS,
    Contestant,
    environment,
    print_race,
    quiet_run,
    race,
    ratio,
    step_config,
    summary,
    timed,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clusterns_ray.clustering.backend import spherical_kmeans
from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix, nearest_two
from clusterns_ray.config import ClusteringConfig
from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.evaluation.sts import TASKS, cosines_of, read_tests, score_tests
from clusterns_ray.kernels.dropout import LEVELS, Streams, drop, dropped_levels
from clusterns_ray.kernels.packed_attention import VECTOR_BYTES, Packing, UnpackIndex, packed_attention
from clusterns_ray.losses import (
    Clusters,
    clusterns_loss_share,
    false_negative_mask,
    hard_negative_logits,
    info_nce_share,
)
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.packed_bert import multiply, onednn_multiplies
from clusterns_ray.models.resolve import resolve_model

WORKERS = 8
PARTS = ("loss", "step", "kmeans", "reading", "evaluation", "dropout", "products", "attention", "corpus")
SIMCSE = "SimCSE"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 4096, 16384], help="of the loss")
    parser.add_argument("--clusters", type=int, nargs="+", default=[0, 128, 4096], help="of the loss")
    parser.add_argument("--layers", type=int, default=1, help="of the step of width 768")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--corpus", default="demo", help="one sentence a line; the quickstart's text by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds, corpus = arguments.rounds, arguments.corpus
    data = os.environ.get("CLUSTERNS_DATA")
    parts: dict[str, Callable[[], Any]] = {
        "loss": lambda: losses(arguments.batches, arguments.clusters, rounds),
        "step": lambda: whole_step(corpus, rounds, layers=arguments.layers),
        "kmeans": lambda: kmeans(rounds),
        "reading": lambda: reading(corpus, rounds),
        "evaluation": lambda: evaluation(Path(data) / "sts" if data else None),
        "dropout": lambda: dropout(rounds),
        "products": lambda: products(rounds),
        "attention": lambda: attention(rounds),
        "corpus": lambda: corpus_clusters(corpus, rounds),
    }
    results = {**environment("scikit-learn"), **{name: parts[name]() for name in PARTS if name in arguments.only}}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"Wrote {arguments.json}")


# ---- the loss -------------------------------------------------------------------------------------------------------


def losses(batches: Sequence[int], clusters: Sequence[int], rounds: int, width: int = 768) -> list[dict[str, Any]]:
    """Time, bytes that autograd keeps, and the largest tensor that is made: all grow with b x B and b x K."""
    print(f"The loss of one of {WORKERS} workers, width {width}, forward and backward")
    print(f"{'B':>7}{'K':>7}{'ms':>10}{'MB kept':>10}{'largest tensor':>16}{'B x B x D':>14}   x without clusters")
    rows = []
    for batch in batches:
        sizes = [k for k in clusters if k <= batch]
        works = {k: loss_work(batch, k, width) for k in sizes}
        seconds = race({f"B {batch}, K {k}": timed(work) for k, work in works.items()}, rounds)
        for k, work in works.items():
            taken = seconds[f"B {batch}, K {k}"]
            kept, largest = kept_bytes(work), largest_bytes(work)
            row = {"batch": batch, "clusters": k, "seconds": taken, "median": statistics.median(taken)}
            against = ratio(taken, seconds[f"B {batch}, K 0"]) if k and 0 in sizes else None
            row |= {"kept_bytes": kept, "largest_tensor_bytes": largest, "ratio": against and against._asdict()}
            rows.append(row)
            print(
                f"{batch:>7}{k:>7}{1000 * row['median']:>10.1f}{kept / 1e6:>10.1f}{largest / 1e6:>13.1f} MB"
                f"{4 * batch**2 * width / 1e6:>11,.0f} MB   {against or ''}",
                flush=True,
            )
    return rows


def loss_work(batch: int, clusters: int, width: int) -> Callable[[], None]:
    """The loss of a worker's rows and its backward pass."""
    torch.manual_seed(0)
    z1_bD, z2_BD = torch.randn(batch // WORKERS, width), torch.randn(batch, width)
    centroids_KD = torch.randn(clusters, width) if clusters else None

    def work() -> None:
        loss(z1_bD.requires_grad_(), z2_BD.requires_grad_(), centroids_KD).backward()
        z1_bD.grad = z2_BD.grad = None

    return work


def loss(z1_bD: Tensor, z2_BD: Tensor, centroids_KD: Tensor | None) -> Tensor:
    """What ``training/objective.py`` computes of a worker's rows, but for the exchanges."""
    b, positive_b = len(z1_bD), torch.arange(len(z1_bD))
    cos_bB = cosine_matrix(z1_bD, z2_BD)
    if centroids_KD is None:
        return info_nce_share(cos_bB, positive_b, 0.05)
    cos_bK = cosine_matrix(z1_bD, centroids_KD)
    nearest_b, second_b = nearest_two(cos_bK.detach())
    nearest_B, second_B = nearest_b.repeat(len(z2_BD) // b), second_b.repeat(len(z2_BD) // b)
    clusters = Clusters(nearest_b, second_b, nearest_B, cluster_sizes(second_B, len(centroids_KD)))
    return clusterns_loss_share(
        cos_bB,
        hard_negative_logits(cos_bK, clusters, 0.05, "batch", 0.0),
        positive_b,
        false_negative_mask(nearest_b, nearest_B, positive_b),
        0.0,
        temperature=0.05,
        bml_weight=1e-3,
        bml_alpha=0.0,
        bml_beta=0.3,
    ).loss


def kept_bytes(work: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd keeps for the backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in storages.values())


def largest_bytes(work: Callable[[], Any]) -> int:
    """Bytes of the largest storage that any operation returns, forward or backward."""

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            self.nbytes = max([self.nbytes, *sizes])
            return out

    with Largest() as largest:
        work()
    return largest.nbytes


# ---- whole steps ----------------------------------------------------------------------------------------------------


def whole_step(
    corpus: str, rounds: int, *, batch: int = 512, clusters: int = 128, width: int = 768, layers: int = 1
) -> dict[str, Any]:
    """Time steps of a BERT drawn at random, with clusters and without; and the objective alone, as the noise of whole
    steps is larger than what it takes."""
    ours = f"ClusterNS, K {clusters}"
    names = {SIMCSE: 0, ours: clusters}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        random_bert(model, width, layers)
        configs = {
            name: step_config(
                layers=None,
                batch=batch,
                corpus=corpus,
                precision="fp32",
                clusters=k,
                settings=[f"encoder.name={model}"],
            )
            for name, k in names.items()
        }
        tokens_dir = prepare(configs[SIMCSE]).tokens_dir
        contestants = {name: ClusterNS(config, tokens_dir, Path(scratch)) for name, config in configs.items()}
        print(
            f"A whole step of {batch} sentences, width {width}, layers: {layers}, fp32; with more of "
            "them the share of the clusters only falls"
        )
        steps = race(dict(contestants), rounds)
        print_race(steps, SIMCSE)
        alone = race({name: objective(made) for name, made in contestants.items()}, 4 * rounds)
    print("Of that the objective alone, forward and backward:")
    print_race(alone, SIMCSE)
    added = statistics.median(alone[ours]) - statistics.median(alone[SIMCSE])
    share = added / statistics.median(steps[SIMCSE])
    print(f"  {ours} adds {1000 * added:.2f} ms, which is {share:.2%} of SimCSE's step")
    return {
        "batch": batch,
        "width": width,
        "layers": layers,
        "steps": summary(steps, SIMCSE),
        "objective": summary(alone, SIMCSE),
        "share of SimCSE's step": share,
    }


def random_bert(directory: Path, width: int, layers: int) -> None:
    """A BERT with heads of 64 (or one), and MiniLM's vocabulary and tokenizer."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = resolve_model(MODEL)
    config = transformers.AutoConfig.from_pretrained(source)
    config.hidden_size, config.intermediate_size = width, 4 * width
    config.num_attention_heads, config.num_hidden_layers = max(1, width // 64), layers
    transformers.AutoModel.from_config(config).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(directory)


def objective(contestant: ClusterNS) -> Contestant:
    """The loss of one batch of a run, from its embeddings to their gradients; the centroids move."""
    run = contestant.run
    layout, _ = run.batch(0)
    z1_BD, z2_BD = torch.randn(2, layout.size, run.encoder.width).unbind()

    def work() -> None:
        step = run.objective(z1_BD.detach().requires_grad_(), z2_BD.detach().requires_grad_(), layout)
        step.scaled_loss.backward()

    return timed(work, repeats=5)


def corpus_clusters(
    corpus: str,
    rounds: int,
    *,
    layers: int = 3,
    batch: int = 128,
    batch_clusters: int = 32,
    clusters: int = 256,
    bank: int = 4096,
    refreshed: Sequence[int] = (0, 32),
) -> dict[str, Any]:
    """Time steps with clusters of a bank and with those of the batches, and what is done once, or rarely, alone."""
    against = f"scope batch, K {batch_clusters}"
    # In the timed steps the bank is not clustered again.
    of_corpus = ["clustering.scope=corpus", f"clustering.bank_rows={bank}", f"clustering.recluster_every_steps={10**6}"]
    settings = {against: (batch_clusters, [])} | {
        f"scope corpus, K {clusters}, refresh {rows}": (clusters, [*of_corpus, f"clustering.refresh_rows={rows}"])
        for rows in refreshed
    }
    configs = {
        name: step_config(layers=layers, batch=batch, corpus=corpus, precision="fp32", clusters=k, settings=lines)
        for name, (k, lines) in settings.items()
    }
    every = ClusteringConfig().recluster_every_steps
    tokens_dir = prepare(configs[against]).tokens_dir
    with tempfile.TemporaryDirectory() as scratch:
        contestants = {name: ClusterNS(config, tokens_dir, Path(scratch)) for name, config in configs.items()}
        print(f"A whole step of {batch} sentences, layers of MiniLM: {layers}, fp32, by what is clustered")
        steps = race(dict(contestants), rounds)
        print_race(steps, against)
        run = [made.run for made in contestants.values()][-1]
        assert run.corpus is not None
        held, start_KD = run.corpus.bank, run.clustering.centroids_KD
        again = race({"K-means of the bank": timed(lambda: held.cluster(0, start_KD))}, rounds)["K-means of the bank"]
    filled = [made.bank_seconds for made in contestants.values() if made.run.corpus is not None]
    once, now = statistics.median(filled), statistics.median(again)
    print(f"  Once: {bank:,} rows encoded, and clustered, in {once:.1f} s")
    print(f"  Clustered again in {1000 * now:.0f} ms: {1000 * now / every:.2f} ms a step, at every {every} of them")
    return {
        "batch": batch,
        "layers": layers,
        "bank_rows": bank,
        "steps": summary(steps, against),
        "filled_seconds": filled,
        "clustered_anew_seconds": again,
    }


# ---- K-means, reading, evaluation -----------------------------------------------------------------------------------


def kmeans(rounds: int, rows: int = 20_000, width: int = 384, k: int = 128) -> dict[str, Any]:
    """Rows around 100 directions, 25 iterations, from one seed."""
    import faiss
    from sklearn.cluster import KMeans

    draw = np.random.default_rng(0)
    directions = draw.normal(size=(100, width))
    z_ND = (directions[draw.integers(100, size=rows)] + 2 * draw.normal(size=(rows, width))).astype(np.float32)
    n_ND = z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True)

    def with_faiss() -> np.ndarray:
        model = faiss.Kmeans(width, k, niter=25, seed=0, spherical=True, max_points_per_centroid=len(n_ND))
        model.train(n_ND)
        return np.asarray(model.centroids)

    def with_sklearn() -> np.ndarray:
        model = KMeans(k, n_init=1, max_iter=25, random_state=0)  # type: ignore[arg-type]
        return model.fit(n_ND).cluster_centers_

    contestants = {
        "spherical_kmeans": lambda: spherical_kmeans(z_ND, k, seed=0),
        "faiss.Kmeans": with_faiss,
        "sklearn.KMeans (not spherical)": with_sklearn,
    }
    print(f"K-means of {rows:,} x {width} into {k} clusters")
    seconds = race({name: timed(work) for name, work in contestants.items()}, min(rounds, 3))
    print_race(seconds, "faiss.Kmeans")
    results = summary(seconds, "faiss.Kmeans")
    for name, work in contestants.items():
        centroids_KD = work()
        centroids_KD = centroids_KD / np.linalg.norm(centroids_KD, axis=1, keepdims=True)
        results[name]["mean_cosine"] = float((n_ND @ centroids_KD.T).max(axis=1).mean())
        print(f"  {name:<36}{results[name]['mean_cosine']:>12.4f} mean cosine of a row with its centroid", flush=True)
    return results


def reading(corpus: str, rounds: int, batch: int = 1024) -> dict[str, Any]:
    """Rows a second: choosing a step's rows, reading their tokens, and laying them out in shards."""
    config = step_config(
        layers=1, batch=batch, corpus=corpus, precision="fp32", clusters=0, settings=["train.shards=8"]
    )
    with tempfile.TemporaryDirectory() as scratch:
        run = quiet_run(config, prepare(config).tokens_dir, Path(scratch))
        steps = range(run.order.steps_per_epoch)
        rows = sum(run.batch(step)[0].size for step in steps)
        seconds = race({"reading": timed(lambda: [run.batch(step) for step in steps])}, rounds)["reading"]
    rate = rows / statistics.median(seconds)
    print(f"Reading batches of {batch:,} as tensors: {rate:,.0f} rows/s")
    return {"rows": rows, "seconds": seconds, "rows_per_second": rate}


def evaluation(sts: Path | None, model: str = MODEL) -> dict[str, Any] | None:
    """One round, as it takes long enough: reading the tests, encoding each different sentence once, and scoring."""
    if sts is None:
        print("The seven STS tests: left out, as CLUSTERNS_DATA is not set to a directory that holds sts/")
        return None
    encoder = Encoder.load(model)
    encoded = 0
    times = [time.perf_counter()]
    tests = read_tests(sts)
    times.append(time.perf_counter())

    def embed(sentences: Sequence[str]) -> np.ndarray:
        nonlocal encoded
        encoded += len(sentences)
        return encoder.encode(sentences)

    cosines = cosines_of(tests, embed)
    times.append(time.perf_counter())
    scores = score_tests(tests, cosines)
    times.append(time.perf_counter())
    read, encode, score = np.diff(times).tolist()
    print(
        f"{len(tests.tasks)} of the {len(TASKS)} STS tests with {model}: {times[-1] - times[0]:.1f} s; reading "
        f"{read:.1f}, encoding {encoded:,} sentences {encode:.1f} ({encoded / encode:,.0f} sentences/s), scoring "
        f"{score:.1f}",
        flush=True,
    )
    return {
        "model": model,
        "tasks": list(tests.tasks),
        "average": scores["average"],
        "sentences": encoded,
        "sentences_per_second": encoded / encode,
        "seconds": {"reading": read, "encoding": encode, "scoring": score},
    }


# ---- dropout --------------------------------------------------------------------------------------------------------


def dropout(rounds: int, rows: int = 1800, width: int = 384, p: float = 0.1, repeats: int = 50) -> dict[str, Any]:
    """Drawing random numbers, making a mask of them, multiplying by it, and all together."""
    x = torch.randn(rows, width).bfloat16()
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    level = dropped_levels(p) - LEVELS // 2
    streams = Streams(range(4))
    masks = {dtype: numbers.ge(level).to(dtype) for dtype in (torch.bool, torch.bfloat16)}
    out = {dtype: torch.empty_like(mask) for dtype, mask in masks.items()}
    contests: list[dict[str, Callable[[], Any]]] = [
        {
            "draw by Tensor.bernoulli_, float32": lambda: torch.empty(x.shape).bernoulli_(1 - p),
            "draw 64-bit words": lambda: torch.empty_like(words).random_(-(2**63), None),
            "draw them by four streams": lambda: streams._draw([len(words) // 4] * 4),
        },
        {
            "compare words into bool": lambda: torch.ge(numbers, level, out=out[torch.bool]),
            "compare words into bfloat16": lambda: torch.ge(numbers, level, out=out[torch.bfloat16]),
        },
        {
            "multiply by bool": lambda: x * masks[torch.bool],
            "multiply by bfloat16": lambda: x * masks[torch.bfloat16],
        },
        {
            "torch.nn.functional.dropout": lambda: nn.functional.dropout(x, p),
            "clusterns_ray.kernels.dropout.drop": lambda: drop(x, p),
        },
    ]
    print(f"Dropout of {rows:,} x {width} states in bfloat16, forward: each of ours beside what it stands for")
    return race_all(contests, 2 * rounds, repeats)


# ---- products and attention -----------------------------------------------------------------------------------------


@torch.no_grad()
def products(rounds: int, rows: int = 2688, width: int = 384, out: int = 1536) -> dict[str, Any]:
    """A linear layer forward, and back to its inputs, in both precisions."""
    print(f"A linear layer of {width} to {out} for {rows:,} tokens, forward and back to the inputs")
    contests: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16):
        if not onednn_multiplies(dtype):
            print(f"  oneDNN does not multiply {dtype} here")
            continue
        x, weight, bias, d = (torch.randn(shape).to(dtype) for shape in ((rows, width), (out, width), out, (rows, out)))
        laid_out = torch.ops.mkldnn._reorder_linear_weight(weight)
        name = str(dtype).removeprefix("torch.")
        contests += [
            {
                f"F.linear, {name}": partial(nn.functional.linear, x, weight, bias),
                f"oneDNN, {name}": partial(multiply, x, weight, bias),
                f"oneDNN, weight laid out before, {name}": partial(multiply, x, laid_out, bias),
            },
            {
                f"back by torch, {name}": partial(torch.mm, d, weight),
                f"back by oneDNN, {name}": partial(multiply, d, weight.T, None),
            },
        ]
    return race_all(contests, 2 * rounds, repeats=5)


@torch.no_grad()
def attention(rounds: int, rows: int = 64, heads: int = 12, width: int = 32) -> dict[str, Any]:
    """Time the attention of a batch to encode, without dropout, by the length of its rows; and its softmax, in rows of
    that length and in whole vectors."""
    print(f"Attention of {rows} rows, {heads} heads of {width}, by torch's fused kernel with a mask and by ours")
    contests: list[Any] = []
    for dtype in (torch.float32, torch.bfloat16):
        fill = VECTOR_BYTES // dtype.itemsize
        for length in (15, 24, 50):
            qkv = torch.randn(rows * length, 3 * heads * width).to(dtype)
            query, key, value = qkv.view(rows, length, 3, heads, width).permute(2, 0, 3, 1, 4)
            mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
            parts = [UnpackIndex.of(Packing.of(torch.ones(rows, length)), heads, dtype, fill)]
            own, filled = (torch.randn(rows * heads, length, n).to(dtype) for n in (length, parts[0].filled))
            name = f"{length} tokens, {str(dtype).removeprefix('torch.')}"
            contests += [
                {
                    f"fused, {name}": partial(nn.functional.scaled_dot_product_attention, query, key, value, mask),
                    f"ours, {name}": partial(packed_attention, qkv, parts, 0.0, width**-0.5),
                },
                {
                    f"softmax, {name}": partial(torch.softmax, own, -1),
                    f"softmax of {parts[0].filled}, {name}": partial(torch.softmax, filled, -1),
                },
            ]
    return race_all(contests, 2 * rounds, repeats=5)


def race_all(contests: Sequence[dict[str, Callable[[], Any]]], rounds: int, repeats: int) -> dict[str, Any]:
    """Each contest against its first contestant."""
    results = {}
    for works in contests:
        seconds = race({name: timed(work, repeats) for name, work in works.items()}, rounds)
        print_race(seconds, next(iter(works)))
        results |= summary(seconds, next(iter(works)))
    return results


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
