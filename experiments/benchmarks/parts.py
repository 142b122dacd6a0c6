"""The parts of training alone, and what clusters add to a whole step.

    python experiments/benchmarks/parts.py [--only loss step ...] [--json FILE]

Contestants take turns in random order, several rounds; medians, and 95 % intervals of their ratios by a bootstrap over
the rounds.

    loss        of one of eight workers at width 768, forward and backward, by batch and clusters
    step        the whole step with 128 clusters beside SimCSE's, batch 512, width 768
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from racing import (
    MODEL,
    ClusterNS,
    Contestant,
    environment,
    print_race,
    race,
    ratio,
    step_config,
    summary,
    timed,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clusterns_ray.clustering.kmeans import cluster_sizes, cosine_matrix, nearest_two
from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.losses import (
    Clusters,
    clusterns_loss_share,
    false_negative_mask,
    hard_negative_logits,
    info_nce_share,
)
from clusterns_ray.models.resolve import resolve_model

WORKERS = 8
PARTS = ("loss", "step")
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
    parts: dict[str, Callable[[], Any]] = {
        "loss": lambda: losses(arguments.batches, arguments.clusters, rounds),
        "step": lambda: whole_step(corpus, rounds, layers=arguments.layers),
    }
    results = {**environment(), **{name: parts[name]() for name in PARTS if name in arguments.only}}
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
        step = run.objective(z1_BD.detach().requires_grad_(), z2_BD.detach().requires_grad_(), layout.rows_B)
        step.loss.backward()

    return timed(work, repeats=5)


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
