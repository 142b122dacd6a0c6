"""Does training work on this GPU, is it right, does it repeat to the bit, and how fast is it?

    python experiments/gpu_check.py --out gpu_check.json                # on a machine with one GPU
    python experiments/gpu_check.py --device cpu --small                # in miniature; --carry writes the CPU's losses

Needs a checkout of this repository with torch, transformers, pyarrow and pydantic; no Ray, no network, no weights:
encoders and text are drawn at random. Each section writes its results as it ends, and none begins after --minutes. The
exit code is 1 where a section fails, a loss is not the CPU's, or a run does not repeat. Utilisation is the FLOPs of the
products of real tokens (BERT's layers, both views, forward and backward) a second, over the fastest product.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

sys.path.extend(str(Path(__file__).parent / name) for name in ("..", "../tests", "benchmarks"))

from helpers import make_tiny_model, sentences, write_corpus, write_pairs  # pyright: ignore
from racing import quiet_run, take_step  # pyright: ignore
from train_speed import SentenceTransformers  # pyright: ignore
from transformers import AutoTokenizer, BertConfig, BertModel

from clusterns_ray.config import Config, make_config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import Drained
from clusterns_ray.io.files import write_json
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.environment import describe_environment
from clusterns_ray.training.loop import train_worker
from clusterns_ray.training.metrics import read_metrics

CARRIED = Path(__file__).parent / "benchmarks" / "results" / "gpu_check-cpu.json"
PROMPTS = ('The sentence "{sentence}" says [MASK] to her.', 'This sentence of "{sentence}" means [MASK].')
UNPADDED = {"attn_implementation": "flash_attention_2"} if find_spec("flash_attn") else {}
MODES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "mean pooling": {"encoder": {"pooling": "mean", "head": "none"}, "data": {"order": "random"}},
    "prompts": {"encoder": {"pooling": "mask", "prompt": PROMPTS[0], "second_prompt": PROMPTS[1], "denoise": True}},
    "masked language modelling": {"loss": {"mlm_weight": 0.1}},
    "teacher": {"loss": {"teacher": "TEACHER"}},
    "cached": {"train": {"cache_chunk": 8}},
    "first centroids by K-means": {"clustering": {"init": "kmeans"}},
    "corpus": {"clustering": {"scope": "corpus", "bank_rows": 200, "recluster_every_steps": 3, "refresh_rows": 16}},
}


class Check:
    """The sections, and what they share."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.device, self.small, self.carry, self.place = options.device, options.small, options.carry, place
        self.on_gpu = self.device.type == "cuda"
        self.tiny = make_tiny_model(place / "tiny", layers=3)
        self.teacher = make_tiny_model(place / "teacher", layers=2)
        self.corpus = write_corpus(place / "corpus.txt", 300)
        write_pairs(place / "sts" / "STSB" / "dev.jsonl")
        self.base = place / "base"
        torch.manual_seed(0)
        BertModel(BertConfig.from_pretrained(self.tiny) if self.small else BertConfig()).save_pretrained(self.base)
        AutoTokenizer.from_pretrained(str(self.tiny)).save_pretrained(self.base)
        self.carried = json.loads(CARRIED.read_text())
        self.problems, self.fastest_product = list[str](), float("nan")

    def machine(self) -> dict[str, Any]:
        """Versions, and the fastest bf16 product."""
        x = torch.randn(2 * [n := 512 if self.small else 8192], device=self.device, dtype=torch.bfloat16)
        self.fastest_product = 2 * n**3 / self.seconds(lambda: x @ x, 20)
        return describe_environment(self.device, sys.argv, 1) | {"product_tflops": self.fastest_product / 1e12}

    def mode(self, name: str) -> dict[str, list[float]]:
        """Compare the losses of a mode in fp32, without dropout, with a CPU's; in 16 bits, with dropout, they have to
        be finite."""
        exact = {"encoder": {"dropout": 1e-9}, "train": {"precision": "fp32", "max_steps": 5}}
        halves = {precision: {"train": {"precision": precision}} for precision in ("bf16", "fp16")[: 1 + self.on_gpu]}
        runs = {"fp32": exact, **halves}
        losses = {key: self.train(self.config(MODES[name], change), "mode") for key, change in runs.items()}
        self.carried |= {name: losses["fp32"]} if self.carry else {}
        off = np.abs(np.subtract(losses["fp32"], self.carried[name])).max()
        self.problems += [] if off <= 1e-4 else [f"{name}: a loss differs by {off:.2g} from the CPU's"]
        self.problems += [f"{name}: not finite in {key}" for key in halves if not np.isfinite(losses[key]).all()]
        return losses

    def repetition(self) -> dict[str, Any]:
        """How many tensors of the checkpoint differ in a second run, and in one that was resumed twice; none should."""
        differences = {}
        for name in ("plain", "corpus"):
            config, states = self.config(MODES[name], {"train": {"precision": "bf16"}}), {}
            for run, stops in (("first", ()), ("repeated", ()), ("resumed", (3, 6))):
                self.train(config, run, stops)
                (*_, newest) = sorted((self.place / "runs" / run / "checkpoints").glob("step-*"))
                leaves = tree_leaves(torch.load(newest / "state.pt", weights_only=True))
                states[run] = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
                differ = sum(not torch.equal(a, b) for a, b in zip(states["first"], states[run], strict=True))
                differences[f"{name}, {run}"] = f"{differ} of {len(states[run])} tensors differ"
                self.problems += [f"{name}, {run}: {differ} tensors differ from the first run's"] * (differ > 0)
        return differences

    def step(self) -> dict[str, Any]:
        """The step of BERT-base that training takes, by shards, and sentence-transformers' step on the same text."""
        results, batch = dict[str, Any](), 64 if self.small else 512
        for shards in (8, 1):
            step = partial(take_step, run := self.base_run(shards, batch), 0)
            seconds = self.seconds(step, 8)
            width, layers = run.encoder.width, run.encoder.backbone.config.num_hidden_layers
            lengths = run.tokens.lengths(run.batch(0)[0].rows_B).astype(float)
            flops = 6 * layers * float((24 * lengths * width**2 + 4 * lengths**2 * width).sum())
            speed = {"sentences_per_second": batch / seconds, "milliseconds": 1e3 * seconds}
            use = {"tflops": flops / seconds / 1e12, "utilisation": flops / seconds / self.fastest_product}
            results[f"clusterns_ray, {shards} shards"] = speed | use | self.on_device(step)
        if find_spec("sentence_transformers"):
            texts, where = run.tokens.texts(run.batch(0)[0].rows_B), str(self.base)
            peer = SentenceTransformers(lambda _: texts, where, bf16=True, device=self.device, model_options=UNPADDED)
            speed = {"sentences_per_second": batch / self.seconds(lambda: peer([0]), 8)}
            results["sentence-transformers, bf16"] = speed | {"unpadded": bool(UNPADDED)}
        return results

    def encode(self) -> dict[str, Any]:
        """Sentences a second, with tokenising: of 8,192 in fp32, of a fifth of a million in bf16."""
        few, many = (sentences(512 if self.small else count, 3) for count in (8_192, 200_000))
        encoder, fast = Encoder.load(str(self.base)).to(self.device), {"batch_size": 1024}
        ways: dict[str, Any] = {"clusterns_ray, fp32": (encoder.encode, few, {})}
        ways["clusterns_ray, bf16"] = encoder.encode, many, {**fast, "bf16": True}
        if find_spec("sentence_transformers"):
            from sentence_transformers import SentenceTransformer

            for precision, texts, options in (("fp32", few, {}), ("bf16", many, {"dtype": "bfloat16", **UNPADDED})):
                peer = SentenceTransformer(str(self.base), device=str(self.device), model_kwargs=options)
                ways[f"sentence-transformers, {precision}"] = (peer.encode, texts, fast)
        speeds: dict[str, Any] = {}
        for name, (encode, texts, options) in ways.items():
            encode(texts[:1024], **options)  # chooses kernels, fills memory
            speeds[name] = len(texts) / self.seconds(partial(encode, texts, **options), 1, warm=0)
        return speeds | {"seconds of a million, bf16": 1e6 / speeds["clusterns_ray, bf16"], "unpadded": bool(UNPADDED)}

    def config(self, *changes: dict[str, dict[str, Any]]) -> Config:
        values: dict[str, dict[str, Any]] = {
            "encoder": {"name": str(self.tiny)},
            "data": {"corpus": str(self.corpus), "cache_dir": str(self.place / "cache")},
            "loss": {"bml_weight": 0.1, "bml_alpha": 0.1},
            "clustering": {"num_clusters": 6, "start_cosine": 1.0, "rate": 0.1},
            "train": {"global_batch_size": 32, "shards": 4, "max_steps": 8, "learning_rate": 1e-3},
            "evaluation": {"sts": str(self.place / "sts"), "every_steps": 4, "patience": None},
            "runtime": {"log_every_steps": 1, "trackers": []},
        }
        for name, section in (item for sections in changes for item in sections.items()):
            values[name] |= section | ({"teacher": str(self.teacher)} if "teacher" in section else {})
        return make_config(values)

    def train(self, config: Config, name: str, stops: tuple[int, ...] = ()) -> list[float]:
        """The loss of every step of a new run, which is stopped after the steps ``stops`` and resumed."""
        shutil.rmtree(directory := self.place / "runs" / name, ignore_errors=True)
        directory.mkdir(parents=True)
        context = RunContext(config, prepare(config).tokens_dir, config.evaluation.sts, directory)
        for stop in (*stops, 0):
            with suppress(Drained):
                train_worker(context, self.device, lambda _: None, should_stop=stop.__eq__)
        return [metrics["loss"] for metrics in read_metrics(directory / "metrics.jsonl") if "loss" in metrics]

    def base_run(self, shards: int, batch: int) -> Any:
        """A run of the base encoder over lines of about 26 tokens."""
        text, some = self.place / "long.txt", sentences(4 * batch, 5)
        text.write_text("".join(f"{a[:-1]}, and {b}\n" for a, b in zip(some[::2], some[1::2])))
        config = self.config(
            {"encoder": {"name": str(self.base)}, "data": {"corpus": str(text)}, "evaluation": {"sts": None}},
            {"train": {"shards": shards, "global_batch_size": batch, "precision": "bf16"}},
            {"clustering": {"num_clusters": 16 if self.small else 128}},
        )
        return quiet_run(config, prepare(config).tokens_dir, self.place, self.device)

    def seconds(self, work: Callable[[], Any], count: int, warm: int = 3) -> float:
        """The median of ``count`` calls."""
        marks = [time.perf_counter()]
        for _ in range(warm + count):
            work()
            if self.on_gpu:
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
        return float(np.median(np.diff(marks)[warm:]))

    def on_device(self, step: Callable[[], Any]) -> dict[str, Any]:
        """Kernels of a step and the time they take, the most memory, and where the host waits for the GPU."""
        if not self.on_gpu:
            return {}
        torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self.seconds(step, 1, warm=0)
        on_gpu = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
        spans = [event.time_range.elapsed_us() for event in on_gpu if not event.is_user_annotation]
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        waits = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in caught)
        memory = {"waits": waits, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        return {"kernels": len(spans), "busy_milliseconds": sum(spans) / 1e3} | memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true", help="a small encoder in place of BERT-base")
    parser.add_argument("--carry", action="store_true", help=f"write the losses in fp32 to {CARRIED.name}")
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins later")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    options = parser.parse_args()
    results, began = dict[str, Any](), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        check = Check(options, Path(scratch))
        # Each mode is a section, so that one that fails leaves the results of the others.
        sections: dict[str, Callable[[], Any]] = {"machine": check.machine}
        sections |= {f"mode {name}": partial(check.mode, name) for name in MODES}
        sections |= {"repetition": check.repetition, "step": check.step, "encode": check.encode}
        for name, section in sections.items():
            try:
                late = time.monotonic() - began > 60 * options.minutes
                results[name] = "left out, as the time was up" if late else section()
            except Exception as error:  # the other sections go on
                results[name] = f"{type(error).__name__}: {str(error)[:600]}"
                check.problems.append(f"{name} failed: {results[name]}")
            print(f"{time.monotonic() - began:5.0f} s  {name}: {json.dumps(results[name])[:1500]}", flush=True)
            write_json(options.out, {**results, "problems": check.problems})
        if options.carry:
            write_json(CARRIED, check.carried)
    sys.exit("\n".join(check.problems) or 0)


if __name__ == "__main__":
    main()
