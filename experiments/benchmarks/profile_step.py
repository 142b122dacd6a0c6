"""Show where the time of one training step goes, and how fast it could be at most on this machine.

    python experiments/benchmarks/profile_step.py [--precision bf16] [--layers 3] [--batch 128]

Shares are those of torch's operations by its profiler, in the thread that leads: while others help it, it works or
waits for them. The profiler makes a step slower, so speeds are taken from steps without it. The ceiling is what the
step's own matrix products take alone, in the same shapes and with nothing between them: FLOPs of a step over that time.
By it a step has a bound that only fewer or faster products could lift.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from racing import ClusterNS, environment, processor, race, step_config, take_step, timed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.kernels.packed_attention import AttentionIndex, Packing
from clusterns_ray.models.packed_bert import Linear, PackedBert, multiply
from clusterns_ray.ops.plan.step import BACKWARD, EncoderWork, objective_flops
from clusterns_ray.ops.plan.workload import encoder_work
from clusterns_ray.training.objective import DTYPES
from clusterns_ray.training.parts import TrainingParts

WARM_UP_STEPS = 2
SHOWN = 20
"""Operations that are printed; the JSON has all of them."""
PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
"""Torch's names of the operations that multiply in linear layers, forward and back, and in the loss."""
REST = "the rest: Python, and the random numbers of dropout"


class Product(NamedTuple):
    """A product of a matrix m x k with one k x n."""

    m: int
    k: int
    n: int
    lies: str
    """how both lie in memory, in BLAS's letters: n by rows, t as the transpose of such"""

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    def __str__(self) -> str:
        return f"{self.m} x {self.k} x {self.n} {self.lies}"


class StepFlops(NamedTuple):
    """FLOPs of a step's matrix products; a multiplication and an addition are two."""

    linear: int
    attention: int
    objective: int

    @property
    def total(self) -> int:
        return sum(self)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="of the steps and of the products alone")
    parser.add_argument("--steps", type=int, default=3, help="that are profiled")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--corpus", default="demo", help="one sentence a line; the quickstart's text by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = step_config(
        layers=arguments.layers,
        batch=arguments.batch,
        corpus=arguments.corpus,
        precision=arguments.precision,
        clusters=arguments.clusters,
    )
    with tempfile.TemporaryDirectory() as scratch:
        ours = ClusterNS(config, prepare(config).tokens_dir, Path(scratch))
        print(
            f"Layers of MiniLM: {arguments.layers}, batch {arguments.batch}, {arguments.precision}, "
            f"{arguments.threads} threads of {processor()}, torch {torch.__version__}"
        )
        # The same batches each time, as products depend on the lengths of the sentences.
        numbers = range(arguments.steps)
        seconds = race({"step": lambda _: ours(numbers) / arguments.steps}, arguments.rounds)["step"]
        shares = profile_steps(ours.run, numbers)
        work = encoder_work(config)
        flops = [step_flops(ours.run, work, number) for number in numbers]
        ceilings = measure_ceilings(ours.run, numbers, arguments.rounds)
    results = bounds(arguments, seconds, shares, flops, ceilings)
    show(arguments, results)
    if arguments.json:
        arguments.json.write_text(json.dumps({**environment(), **results}, indent=1) + "\n")
        print(f"Wrote {arguments.json}")


# ---- the profile ----------------------------------------------------------------------------------------------------


def profile_steps(run: TrainingParts, numbers: Sequence[int]) -> dict[str, float]:
    """Seconds of one step by torch's operation, largest first; they add up to the whole profiled step."""
    for number in range(WARM_UP_STEPS):
        take_step(run, number)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for number in numbers:
            with record_function(REST):
                take_step(run, number)
    seconds = {event.key: event.self_cpu_time_total / 1e6 / len(numbers) for event in profiler.key_averages()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


# ---- what a step has to compute -------------------------------------------------------------------------------------


def step_flops(run: TrainingParts, work: EncoderWork, number: int) -> StepFlops:
    """FLOPs of batch ``number``, whose rows are packed: linear layers see N real tokens, and attention groups of b rows
    of a shard with T queries and T' keys, whole vectors of them.

    Linear layers ``2 views x 3 x 2 linear N`` (forward, and back to inputs and weights), the training head
    ``2 views x 3 x 2 head`` a row. Attention ``2 views x 3 x 4 L D b T T'``. The loss: ``objective_flops``.
    """
    layout, shards = run.batch(number)
    tokens = sum(int(shard.attention_mask_BT.sum()) for shard in shards)
    dtype = DTYPES[run.config.train.precision]
    packings = [Packing.of(shard.attention_mask_BT.numpy() != 0, run.device) for shard in shards]
    groups = [group for packing in packings for group in AttentionIndex.of([packing], 1, dtype).groups]
    scores = sum(group.sizes[0] * group.filled for group in groups)
    passes = 2 * (1 + BACKWARD)
    linear = passes * 2 * (work.linear * tokens + work.head * layout.size)
    attention = passes * 4 * work.layers * work.width * scores
    objective = objective_flops(layout.size, work.width, run.config.clustering.num_clusters)
    return StepFlops(linear, attention, int(objective))


def linear_products(run: TrainingParts, numbers: Sequence[int]) -> Counter[Product]:
    """The products of the layers' linear parts in these steps, and how often each is taken: of a layer ``out x in``
    and N tokens (N x in)(in x out), back to the inputs (N x out)(out x in), to the weights (out x N)(N x in)."""
    layers = PackedBert(run.encoder.backbone, torch.float32).layers
    linears = [linear for layer in layers for linear in layer if isinstance(linear, Linear)]
    counts: Counter[Product] = Counter()
    for number in numbers:
        tokens = 2 * sum(int(shard.attention_mask_BT.sum()) for shard in run.batch(number)[1])  # both views
        for out, width in (linear.weight.shape for linear in linears):
            counts[Product(tokens, width, out, "nt")] += 1
            counts[Product(tokens, out, width, "nn")] += 1
            counts[Product(out, tokens, width, "tn")] += 1
    return counts


def measure_ceilings(run: TrainingParts, numbers: Sequence[int], rounds: int) -> dict[str, float]:
    """FLOP/s of a step's linear products alone, by precision: all of them, over the sum of their median times."""
    products = linear_products(run, numbers)
    largest = max(max(product.m * product.k, product.k * product.n) for product in products)
    contestants = {}
    for precision in ("fp32", "bf16"):
        room = torch.randn(2, largest).to(DTYPES[precision])
        for product in products:
            contestants[f"{precision} {product}"] = timed(partial(take, product, room), repeats=3)
    seconds = race(contestants, rounds)
    flops = sum(product.flops * times for product, times in products.items())
    return {
        precision: flops
        / sum(statistics.median(seconds[f"{precision} {product}"]) * times for product, times in products.items())
        for precision in ("fp32", "bf16")
    }


def take(product: Product, room: Tensor) -> Tensor:
    """Take the product of two matrices whose numbers lie one after the other in the two rows of ``room``."""

    def matrix(values: Tensor, rows: int, columns: int, lies: str) -> Tensor:
        values = values[: rows * columns]
        return values.view(columns, rows).T if lies == "t" else values.view(rows, columns)

    a = matrix(room[0], product.m, product.k, product.lies[0])
    b = matrix(room[1], product.k, product.n, product.lies[1])
    # As the step multiplies, the weights' gradients by torch itself.
    return a @ b if product.lies[0] == "t" else multiply(a, b.T, None)


# ---- what comes of it -----------------------------------------------------------------------------------------------


def bounds(
    arguments: argparse.Namespace,
    seconds: list[float],
    shares: dict[str, float],
    flops: Sequence[StepFlops],
    ceilings: dict[str, float],
) -> dict[str, Any]:
    mean = StepFlops(*(round(sum(part) / len(flops)) for part in zip(*flops)))
    step = statistics.median(seconds)
    per_sentence = mean.total / arguments.batch
    profiled = sum(shares.values())
    # In the profile a product is as long as ever; it is what lies between them that the profiler makes longer.
    within = (mean.linear + mean.objective) / sum(shares.get(name, 0.0) for name in PRODUCTS)
    speed, bound = arguments.batch / step, ceilings[arguments.precision] / per_sentence
    return {
        "precision": arguments.precision,
        "layers": arguments.layers,
        "batch": arguments.batch,
        "step_seconds": seconds,
        "sentences_per_second": speed,
        "profiled_step_seconds": profiled,
        "profile_seconds": shares,
        "flops_of_a_step": {**mean._asdict(), "total": mean.total},
        "flops_of_a_sentence": per_sentence,
        "products_within_the_step_flops_per_second": within,
        "ceiling_flops_per_second": ceilings,
        "bound_sentences_per_second": {name: ceiling / per_sentence for name, ceiling in ceilings.items()},
        "share_of_the_bound": speed / bound,
    }


def show(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    whole = results["profiled_step_seconds"]
    alone = statistics.median(results["step_seconds"])
    print(f"\nOne step, profiled: {whole:.3f} s ({alone:.3f} s without the profiler)")
    for operation, seconds in list(results["profile_seconds"].items())[:SHOWN]:
        print(f"  {operation:<60}{1000 * seconds:>10.1f} ms{seconds / whole:>8.1%}")
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in results["flops_of_a_step"].items())
    print(f"\nGFLOP of a step: {parts}; {results['flops_of_a_sentence'] / 1e9:.3f} a sentence")
    within = results["products_within_the_step_flops_per_second"]
    print(f"Linear layers' products within the step: {within / 1e9:.0f} GFLOP/s; alone, in the same shapes:")
    for precision, ceiling in results["ceiling_flops_per_second"].items():
        bound = results["bound_sentences_per_second"][precision]
        print(f"  {precision}: {ceiling / 1e9:.0f} GFLOP/s, which bounds a step by {bound:.1f} sentences/s")
    print(
        f"This step in {arguments.precision}: {results['sentences_per_second']:.1f} sentences/s, "
        f"{results['share_of_the_bound']:.0%} of its bound"
    )


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
