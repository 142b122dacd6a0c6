"""Runs on 1, 2 and 4 workers end with the same bits: weights, moments, centroids, bank and dev scores; also one that
changes its number of workers, and one that is killed."""

from __future__ import annotations

import os
import signal
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import sentences
from spawn import RanksFailed, run_ranks, small_config
from torch.utils._pytree import tree_leaves_with_path

from clusterns_ray.config import Config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import Drained
from clusterns_ray.io.events import Event, StepLogged
from clusterns_ray.training.checkpoint import list_checkpoints
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.loop import train_worker
from clusterns_ray.training.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 12
RANKS = (4, 1, 2)
NO_SECONDS = {"seconds": 0, "checkpoint_seconds": 0, "checksum": "", "num_workers": 0, "model": ""}
"""Without what differs by the clock or by the number of workers, and the checksum over it."""

GENTLE = {"clustering": {"start_cosine": 1.0}, "train": {"learning_rate": 1e-3}}
PROMPTS = {
    "encoder": {
        "pooling": "mask",
        "prompt": 'this sentence of "{sentence}" means [MASK].',
        # Longer than the first, so that no view can be taken for the other.
        "second_prompt": 'this sentence : "{sentence}" , as she says , means [MASK] to her.',
        "denoise": True,
    },
    "loss": {"mlm_weight": 0.1},
}
CORPUS = {"scope": "corpus", "num_clusters": 40, "start_cosine": 1.0, "recluster_every_steps": 5}

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"train": {"precision": "bf16"}},
    "bf16 in chunks": {"train": {"precision": "bf16", "cache_chunk": 16}},
    # At the other runs' rate their two views would not be told apart, and clustering would not start.
    "neighbours": {"data": {"positives": "neighbour", "neighbour_distance": 2}, **GENTLE},
    # 105 rows: 3 batches of 32, and one of 9, whose shards have 3, 2, 2 and 2 rows.
    "crops, odd last batches": {"data": {"positives": "crop", "limit": 105, "order": "random"}, **GENTLE},
    # 98 rows: two rows are too few for 4 shards, and join the batch before, which has 34.
    "teacher, enlarged last batches": {
        "data": {"limit": 98},
        "loss": {"teacher": "TEACHER", "distillation_weight": 2.0},
    },
    "prompts and masked words": PROMPTS,
    "twelve shards, mean pooling, padded": {
        "encoder": {"pooling": "mean", "name": "OTHER"},
        "train": {"shards": 12, "global_batch_size": 36},
    },
    "corpus": {"clustering": CORPUS, "loss": {"bank_negatives": 2}},
    "corpus, odd and refreshed": {
        "data": {"limit": 105, "order": "random"},
        "clustering": {**CORPUS, "refresh_rows": 10, "bank_rows": 90},
        "loss": {"bank_negatives": 2, "hard_negative_columns": "own", "bml_reduction": "false_negatives"},
    },
}


class Job(NamedTuple):
    config: Config
    tokens_dir: Path
    run_dir: Path

    def named(self, name: str) -> Job:
        return self._replace(run_dir=self.run_dir.with_name(name))


class Outcome(NamedTuple):
    result: dict[str, Any]
    records: list[dict[str, Any]]
    hashes: dict[str, str]
    """of every tensor of the last checkpoint"""


def train_here(job: Job, kill_at: int | None = None, stop_at: int | None = None) -> dict[str, Any]:
    def on_event(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    context = RunContext(job.config, job.tokens_dir, job.config.evaluation.sts, job.run_dir)
    try:
        return train_worker(context, torch.device("cpu"), on_event, should_stop=lambda step: step == stop_at)
    except Drained:
        return {}


def train_all(jobs: list[Job], resized: Job, stop_at: int | None) -> list[dict[str, Any]]:
    return [*(train_here(job) for job in jobs), train_here(resized, stop_at=stop_at)]


def outcome(job: Job, result: dict[str, Any]) -> Outcome:
    state = torch.load(list_checkpoints(job.run_dir / "checkpoints")[0] / "state.pt", weights_only=True)
    assert state["progress"]["step"] == STEPS
    parts = {name: state.get(name) for name in ("encoder", "optimizer", "clustering", "corpus", "language_model_head")}
    hashes = {
        str(path): sha256(leaf.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for path, leaf in tree_leaves_with_path(parts)
        if isinstance(leaf, torch.Tensor) and leaf.ndim
    }
    records = [
        {key: value for key, value in record.items() if "second" not in key}
        for record in read_metrics(job.run_dir / "metrics.jsonl")
    ]
    return Outcome(result | NO_SECONDS, records, hashes)


@pytest.fixture(scope="module")
def make_job(tiny_models: Any, corpus_file: Path, sts_dir: Path, tmp_path_factory: Any):
    storage = tmp_path_factory.mktemp("worker-count")
    words = [sentence.split() for sentence in sentences(60)]
    documents = storage / "documents.txt"  # of five sentences that have their words in common
    documents.write_text("\n\n".join("\n".join(" ".join(w[k:] + w[:k]) for k in range(5)) for w in words))

    def make(case: str, **runtime: Any) -> Job:
        sections = {name: dict(section) for name, section in CASES[case].items()}
        sections["train"] = {"max_steps": STEPS, "epochs": 6, **sections.get("train", {})}
        sections["evaluation"] = {"every_steps": 6}
        if case == "neighbours":
            sections["data"]["corpus"] = str(documents)
        if "teacher" in sections.get("loss", {}):
            sections["loss"]["teacher"] = str(tiny_models("bert"))
        if "name" in sections.get("encoder", {}):
            sections["encoder"]["name"] = str(tiny_models("distilbert"))
        config = small_config(tiny_models("bert"), corpus_file, sts_dir, storage, runtime=runtime, **sections)
        config = config.model_copy(update={"seed": 2})
        return Job(config, prepare(config).tokens_dir, storage / "run" / "run")

    return make


@pytest.fixture(scope="module")
def outcomes(make_job: Any) -> dict[tuple[str, int], Outcome]:
    """What every case came to on each number of workers; and ``resized`` of a run on 4, then 1, then 2."""
    found = {}
    resized = make_job("bf16").named("resized")
    for ranks, stop_at in zip(RANKS, (5, 9, None), strict=True):
        jobs = [make_job(case).named(f"{case}-{ranks}") for case in CASES]
        by_rank = run_ranks(train_all, ranks, jobs, resized, stop_at, deadline_s=420)
        for case, job, results in zip([*CASES, "resized"], [*jobs, resized], zip(*by_rank), strict=True):
            first = results[0]
            assert all(other | NO_SECONDS == first | NO_SECONDS for other in results)
            if first:
                found[case, ranks] = outcome(job, first)
    return found


@pytest.mark.parametrize("case", CASES)
def test_1_2_and_4_workers_make_the_same_bits(outcomes: dict[tuple[str, int], Outcome], case: str):
    alone = outcomes[case, 1]
    losses = [record["loss"] for record in alone.records if "loss" in record]
    assert len(losses) == STEPS and min(abs(b - a) for a, b in pairwise(losses)) > 1e-5, "the losses hardly change"
    assert alone.result["clustering_started_at"] < STEPS - 3
    assert alone.result["sts_dev_trained"] != alone.result["sts_dev_before"]
    for ranks in (2, 4):
        assert outcomes[case, ranks] == alone


def test_neither_chunks_nor_new_numbers_of_workers_change_a_bit(outcomes: dict[tuple[str, int], Outcome]):
    assert outcomes["bf16 in chunks", 2].hashes == outcomes["bf16", 2].hashes
    assert outcomes["resized", 2].hashes == outcomes["bf16", 1].hashes
    assert outcomes["resized", 2].result["best_step"] == outcomes["bf16", 1].result["best_step"]
    assert outcomes["fp32", 1].hashes != outcomes["bf16", 1].hashes


@pytest.mark.nightly
def test_8_workers_make_the_same_bits(make_job: Any):
    """Once, as so many processes take long to begin where cores are few."""
    job, by_ranks = make_job("fp32"), list[Outcome]()
    config = job.config.model_copy(update={"train": job.config.train.model_copy(update={"shards": 8})})
    for ranks in (1, 8):
        named = job._replace(config=config).named(f"of-eight-{ranks}")
        by_ranks.append(outcome(named, run_ranks(train_here, ranks, named)[0]))
    assert by_ranks[0] == by_ranks[1]


@pytest.mark.parametrize("case", ["fp32", "corpus"])
def test_a_killed_run_resumes_to_the_same_bits(make_job: Any, outcomes: dict[tuple[str, int], Outcome], case: str):
    """Killed two steps after a checkpoint, with clustering under way."""
    job = make_job(case, checkpoint_every_steps=4).named(f"killed-{case}")
    with pytest.raises(RanksFailed, match=r"\{0: -9"):
        run_ranks(train_here, 2, job, 10)
    checkpoints = [path.name for path in list_checkpoints(job.run_dir / "checkpoints")]
    assert checkpoints == ["step-00000008", "step-00000004"] and not (job.run_dir / "result.json").exists()
    resumed = outcome(job, run_ranks(train_here, 2, job)[0])

    whole = outcomes[case, 2]
    assert resumed.hashes == whole.hashes and resumed.records == whole.records
    models = [job.run_dir.with_name(name) / "model" / "model.safetensors" for name in (f"{case}-2", f"killed-{case}")]
    assert models[0].read_bytes() == models[1].read_bytes()
