"""Sentences per second of a training step: ours, sentence-transformers, and a plain PyTorch loop, side by side.

    python experiments/benchmarks/train_speed.py                     # what `make bench` runs
    python experiments/benchmarks/train_speed.py --layers 12 --batch 64 --rounds 3

The same encoder (the first layers of all-MiniLM-L6-v2, as pip brings it), sentences (the quickstart's, or lines of
--corpus FILE), batches, longest input and threads for all, in one process. In each round every contestant takes the
same batches, in a new random order; medians over rounds, and intervals of the ratios by a bootstrap over rounds.

The plain loop is what the field's scripts do: fp32, padded to the longest of the batch, cosines by a B x B x D
broadcast. sentence-transformers runs its MultipleNegativesRankingLoss on pairs of a sentence with itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from racing import CPU, MODEL, ClusterNS, Contestant, environment, quiet_run, race, ratio, step_config
from torch import nn

from clusterns_ray.config import Config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import ClusterNSError
from clusterns_ray.models.resolve import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--corpus", default="demo", help="one sentence a line; the quickstart's text by default")
    parser.add_argument("--only", nargs="+", help="contestants, by name")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as scratch:
        contestants = make_contestants(arguments, Path(scratch))
        if arguments.only:
            contestants = {name: contestants[name] for name in arguments.only}
        print(
            f"{arguments.layers} layers, batch {arguments.batch}, {arguments.threads} threads, {platform.machine()}, "
            f"torch {torch.__version__}; {arguments.rounds} rounds of {arguments.steps} steps"
        )
        seconds = race({name: make() for name, make in contestants.items()}, arguments.rounds, arguments.steps)
    speeds = {name: [arguments.steps * arguments.batch / s for s in taken] for name, taken in seconds.items()}
    show(speeds)
    if arguments.json:
        arguments.json.write_text(json.dumps(record(arguments, speeds), indent=1) + "\n")
        print(f"Wrote {arguments.json}")


def show(speeds: dict[str, list[float]]) -> None:
    against = peers(speeds)
    print(f"{'':<36}{'sentences/s':>12}   " + "   ".join(f"{'x ' + name:>28}" for name in against))
    for name, rounds in speeds.items():
        ratios = "   ".join(f"{ratio(rounds, speeds[other])!s:>28}" for other in against)
        print(f"{name:<36}{statistics.median(rounds):>12.1f}   {ratios}")


def peers(speeds: dict[str, list[float]]) -> list[str]:
    return [name for name in speeds if "clusterns" not in name]


def record(arguments: argparse.Namespace, speeds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        **environment("sentence-transformers"),
        "layers": arguments.layers,
        "batch": arguments.batch,
        "sentences_per_second": {name: [round(v, 2) for v in rounds] for name, rounds in speeds.items()},
        "medians": {name: round(statistics.median(rounds), 1) for name, rounds in speeds.items()},
        "ratios": {
            name: {other: ratio(rounds, speeds[other])._asdict() for other in peers(speeds)}
            for name, rounds in speeds.items()
        },
    }


# ---- contestants ----------------------------------------------------------------------------------------------------


def make_contestants(arguments: argparse.Namespace, scratch: Path) -> dict[str, Callable[[], Contestant]]:
    def config(precision: str, clusters: int) -> Config:
        return step_config(
            layers=arguments.layers,
            batch=arguments.batch,
            corpus=arguments.corpus,
            precision=precision,
            clusters=clusters,
        )

    prepared = prepare(config("fp32", 0))
    plan = quiet_run(config("fp32", 0), prepared.tokens_dir, scratch)

    def texts(step: int) -> list[str]:
        return plan.tokens.texts(plan.batch(step)[0].rows_B)

    def ours(precision: str, clusters: int) -> Callable[[], Contestant]:
        return lambda: ClusterNS(config(precision, clusters), prepared.tokens_dir, scratch)

    peer = partial(SentenceTransformers, texts, resolve_model(MODEL), layers=arguments.layers)
    return {
        "clusterns_ray, bf16": ours("bf16", 32),
        "clusterns_ray, bf16, no clusters": ours("bf16", 0),
        "clusterns_ray, fp32": ours("fp32", 32),
        "sentence-transformers, bf16": lambda: peer(bf16=True),
        "sentence-transformers, fp32": lambda: peer(bf16=False),
        "plain loop, fp32": lambda: PlainLoop(texts, arguments),
    }


class SentenceTransformers:
    """Its model, tokeniser and loss, in the steps that its trainer takes at its defaults, without the trainer's own
    bookkeeping (which needs accelerate): tokenise in the collator, autocast, backward, clip, fused AdamW."""

    def __init__(
        self,
        texts: Callable[[int], list[str]],
        model: str,
        *,
        bf16: bool,
        layers: int | None = None,
        device: torch.device = CPU,
        model_options: dict[str, Any] | None = None,
    ) -> None:
        import sentence_transformers
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        self.texts, self.bf16, self.device = texts, bf16, device
        self.model = sentence_transformers.SentenceTransformer(
            model, device=str(device), model_kwargs=model_options
        ).train()
        self.model.max_seq_length = 32
        backbone: Any = self.model[0].auto_model
        backbone.encoder.layer = backbone.encoder.layer[:layers]
        self.loss = MultipleNegativesRankingLoss(self.model)
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def __call__(self, steps: Sequence[int]) -> float:
        from sentence_transformers.util import batch_to_device

        batches = [self.texts(step) for step in steps]
        began = time.perf_counter()
        for sentences in batches:
            views = [self.model.preprocess(sentences), self.model.preprocess(sentences)]
            features = [batch_to_device(view, self.device) for view in views]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss = self.loss(features, torch.empty(0))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.adamw.step()
            self.adamw.zero_grad()
        return time.perf_counter() - began


class PlainLoop:
    """Two dropout views in one forward pass, the batch padded as a whole, a broadcast for the cosines."""

    def __init__(self, texts: Callable[[int], list[str]], arguments: argparse.Namespace) -> None:
        import transformers

        source = resolve_model(MODEL)
        config = transformers.AutoConfig.from_pretrained(source)
        config.num_hidden_layers = arguments.layers
        self.texts = texts
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.model = transformers.AutoModel.from_pretrained(source, config=config, dtype=torch.float32).train()
        self.adamw = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def __call__(self, steps: Sequence[int]) -> float:
        # Such scripts tokenise beforehand.
        tokens = [
            self.tokenizer(self.texts(step), truncation=True, max_length=32, padding=True, return_tensors="pt")
            for step in steps
        ]
        began = time.perf_counter()
        for batch in tokens:
            mask = batch["attention_mask"].repeat(2, 1)
            states = self.model(input_ids=batch["input_ids"].repeat(2, 1), attention_mask=mask).last_hidden_state
            pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            z1, z2 = pooled.chunk(2)
            cosines = nn.functional.cosine_similarity(z1[:, None], z2[None], dim=-1)
            loss = nn.functional.cross_entropy(cosines / 0.05, torch.arange(len(z1)))
            self.adamw.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.adamw.step()
        return time.perf_counter() - began


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
