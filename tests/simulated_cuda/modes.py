"""Runs the project's own training, evaluation and encoding on the simulated device, and writes what was recorded.

``python modes.py DIRECTORY``: results go to ``DIRECTORY/results.json``, by mode. See ``test_simulated_cuda.py``.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import simulation  # first, as it has to be there before torch is used

# isort: split
import numpy as np
import torch
from helpers import make_tiny_model, sentences, write_corpus, write_pairs
from training_runs import write_documents

from clusterns_ray.config import Config, make_config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import Drained
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.loop import train_worker
from clusterns_ray.training.parts import TrainingParts

SHORT, LONG = 'This sentence of "{sentence}" means [MASK].', 'The sentence "{sentence}" says [MASK] to her.'
CORPUS = {"scope": "corpus", "bank_rows": 200, "recluster_every_steps": 9, "refresh_rows": 16}
MODES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "mean, first centroids by K-means": {
        "encoder": {"pooling": "mean", "head": "none"},
        "data": {"order": "random"},
        "clustering": {"init": "kmeans"},
        "train": {"precision": "fp32"},
    },
    "roberta, first_last": {"encoder": {"name": "roberta", "pooling": "first_last"}},
    "prompts": {"encoder": {"pooling": "mask", "prompt": LONG, "second_prompt": SHORT, "denoise": True}},
    "longer second prompt": {"encoder": {"pooling": "mask", "prompt": SHORT, "second_prompt": LONG, "denoise": True}},
    "masked language modelling": {"loss": {"mlm_weight": 0.1}},
    "teacher, no clusters": {"loss": {"teacher": "TEACHER"}, "clustering": {"num_clusters": 0}},
    "cached, fp16": {"train": {"cache_chunk": 4, "precision": "fp16", "max_steps": 9}, "loss": {"mlm_weight": 0.1}},
    "corpus": {"clustering": CORPUS, "loss": {"bml_reduction": "false_negatives"}},
    "clusters have not started": {"clustering": {"start_cosine": -1.0}},
    "neighbours": {"data": {"positives": "neighbour", "corpus": "DOCUMENTS"}},
    "crops": {"data": {"positives": "crop"}},
    **{
        f"12 layers, shards: {n}": {"encoder": {"name": "deep"}, "train": {"shards": n}, "evaluation": {"sts": None}}
        for n in (1, 2, 8)
    },
}


def configuration(directory: Path, sections: dict[str, dict[str, Any]]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "encoder": {"name": "bert", "pooling": "cls"},
        "data": {"corpus": str(directory / "corpus.txt"), "cache_dir": str(directory / "cache")},
        "loss": {"bml_weight": 0.1, "bml_alpha": 0.1},
        "clustering": {"num_clusters": 6, "start_cosine": 1.0, "rate": 0.1},
        "train": {"global_batch_size": 16, "shards": 2, "max_steps": 3, "learning_rate": 1e-3, "precision": "bf16"},
        "evaluation": {"sts": str(directory / "sts"), "every_steps": 3, "patience": None},
        "runtime": {"log_every_steps": 3, "trackers": []},
    }
    places = {"TEACHER": "bert", "DOCUMENTS": "documents.txt"}
    for name, section in sections.items():
        values[name] |= {
            key: str(directory / places[value]) if isinstance(value, str) and value in places else value
            for key, value in section.items()
        }
    values["encoder"]["name"] = str(directory / values["encoder"]["name"])
    return make_config(values)


def train(directory: Path, sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is recorded in the second step: clustering starts in the first, the third is logged and evaluated."""
    config = configuration(directory, sections)
    prepared = prepare(config)
    run_dir = directory / "run"
    steps: list[dict[str, Any]] = []
    forward = TrainingParts.forward

    def first_of_step(*arguments: Any) -> Any:
        steps.append(simulation.record.take())
        return forward(*arguments)

    simulation.record.take()
    TrainingParts.forward = first_of_step
    try:
        with simulation.simulated():
            context = RunContext(config, prepared.tokens_dir, config.evaluation.sts, run_dir)
            result = train_worker(context, torch.device("cuda"), lambda event: None)
    finally:
        TrainingParts.forward = forward
        shutil.rmtree(run_dir)
    assert len(steps) == config.train.max_steps
    return {**steps[2], "score": result["sts_dev"]}


def resume(directory: Path) -> dict[str, Any]:
    """How many tensors of the last checkpoint differ in a run that was drained after its second step and resumed."""
    config = configuration(directory, {"train": {"max_steps": 4}, "evaluation": {"every_steps": 2}})
    tokens, states = prepare(config).tokens_dir, []
    for stops in ((), (3,)):
        run_dir = directory / f"resumed{len(stops)}"
        context = RunContext(config, tokens, config.evaluation.sts, run_dir)
        with simulation.simulated():
            for stop in (*stops, 0):
                with suppress(Drained):
                    train_worker(context, torch.device("cuda"), lambda event: None, should_stop=stop.__eq__)
                    assert not stop
                newest = max((run_dir / "checkpoints").iterdir())
                assert newest.name == f"step-0000000{stop or 4}", "the run has ended before its checkpoint was written"
        leaves = simulation.leaves_of(torch.load(newest / "state.pt", weights_only=True))
        states.append([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    differ = [not torch.equal(a, b) for a, b in zip(*states, strict=True)]
    return {**simulation.record.take(), "tensors": len(differ), "differ": sum(differ)}


def encode(directory: Path, name: str, bf16: bool) -> dict[str, Any]:
    """The largest difference between embeddings of the simulated device and of the CPU."""
    texts = sentences(64, 3)
    on_cpu = Encoder.load(directory / name).encode(texts, batch_size=32, bf16=bf16)
    with simulation.simulated():
        encoder = Encoder.load(directory / name).to("cuda")
        simulation.record.take()
        embeddings = encoder.encode(texts, batch_size=32, bf16=bf16)
    return {**simulation.record.take(), "difference": float(np.abs(embeddings - on_cpu).max())}


def read_and_mix(directory: Path) -> dict[str, Any]:
    """What the simulation has to show: a number that is read, and an error."""
    with simulation.simulated():
        vector = torch.ones(3, device="cuda")
        simulation.record.take()
        assert float(vector.sum()) == 3
        try:
            return {"error": f"nothing is wrong with {vector + torch.ones(3)}"}
        except RuntimeError as error:
            return {**simulation.record.take(), "refused": str(error)}


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name, kind, layers in (("bert", "bert", 2), ("roberta", "roberta", 2), ("deep", "bert", 12)):
        make_tiny_model(directory / name, kind, layers=layers)
    write_corpus(directory / "corpus.txt", 300)
    write_documents(directory / "documents.txt")
    write_pairs(directory / "sts" / "STSB" / "dev.jsonl")
    work: dict[str, Any] = {"read and mix": (read_and_mix,), "resume": (resume,)}
    work |= {name: (train, sections) for name, sections in MODES.items()}
    work |= {
        f"encode {name}, {'bf16' if bf16 else 'fp32'}": (encode, name, bf16)
        for name in ("bert", "roberta")
        for bf16 in (False, True)
    }
    results: dict[str, Any] = {}
    for name, (function, *arguments) in work.items():
        try:
            results[name] = function(directory, *arguments)
        except Exception:
            results[name] = {"error": traceback.format_exc(limit=-12)}
    (directory / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
