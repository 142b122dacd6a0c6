"""Whole runs do not depend on the number of workers, and a killed one resumes to the same bits."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import sentences
from spawn import RanksFailed, run_ranks, small_config

from clusterns_ray.config import Config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.io.events import Event, StepLogged
from clusterns_ray.training.checkpoint import list_checkpoints
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.loop import train_worker
from clusterns_ray.training.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 20
NO_SECONDS = {"seconds": 0, "checkpoint_seconds": 0, "checksum": ""}
"""Without what differs by the clock: the seconds, and the checksum over them."""


class Job(NamedTuple):
    config: Config
    tokens_dir: Path
    run_dir: Path

    def named(self, name: str) -> Job:
        return self._replace(run_dir=self.run_dir.with_name(name))


def train_here(job: Job, kill_at_step: int | None = None) -> dict[str, Any]:
    def on_event(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    context = RunContext(job.config, job.tokens_dir, job.config.evaluation.sts, job.run_dir)
    return train_worker(context, torch.device("cpu"), on_event)


@pytest.fixture
def make_job(tiny_model: Path, corpus_file: Path, sts_dir: Path, tmp_path: Path):
    def make(**sections: dict[str, Any]) -> Job:
        config = small_config(tiny_model, corpus_file, sts_dir, tmp_path, **sections)
        return Job(config, prepare(config).tokens_dir, tmp_path / "run")

    return make


def losses(job: Job) -> list[float]:
    return [record["loss"] for record in read_metrics(job.run_dir / "metrics.jsonl") if "loss" in record]


GENTLE = {"clustering": {"start_cosine": 1.0}, "train": {"learning_rate": 1e-3}}

RUNS = {
    "length_grouped": {},
    # 297 rows: 9 batches of 32, and one of 9, whose shards have 3, 2, 2 and 2 rows; two epochs.
    "random_with_odd_last_batches": {"data": {"limit": 297, "order": "random"}},
    # 290 rows: two rows are too few for 4 shards, and join the batch before, which has 34; two epochs.
    "enlarged_last_batches": {"data": {"limit": 290}, "train": {"epochs": 2, "max_steps": None}},
    # At the other runs' rate their two views would not be told apart, and clustering would not start.
    "neighbours": {"data": {"positives": "neighbour", "neighbour_distance": 2}, **GENTLE},
    "crops": {"data": {"positives": "crop"}, **GENTLE},
}


@pytest.mark.parametrize("name", RUNS)
def test_1_2_and_4_workers_make_the_same_run(make_job, name: str, tmp_path: Path):
    sections = RUNS[name]
    if name == "neighbours":  # documents of five sentences that have their words in common
        path, words = tmp_path / "documents.txt", [sentence.split() for sentence in sentences(60)]
        path.write_text("\n\n".join("\n".join(" ".join(w[k:] + w[:k]) for k in range(5)) for w in words))
        sections = {**sections, "data": {**sections["data"], "corpus": str(path)}}
    job = make_job(**sections)
    jobs = {ranks: job.named(f"on-{ranks}") for ranks in (1, 2, 4)}
    results = {ranks: run_ranks(train_here, ranks, jobs[ranks]) for ranks in jobs}

    alone, curve = results[1][0], losses(jobs[1])
    steps = 18 if name == "enlarged_last_batches" else STEPS
    assert alone["steps"] == steps == len(curve)
    first = 1 if "clustering" in sections else 3
    assert first <= alone["clustering_started_at"] < steps - 5
    assert min(abs(b - a) for a, b in pairwise(curve)) > 1e-4, "the losses hardly change"
    assert alone["sts_dev_trained"] != alone["sts_dev_before"]
    for ranks in (2, 4):
        result = results[ranks][0]
        assert all(other | NO_SECONDS == result | NO_SECONDS for other in results[ranks])
        assert result["num_workers"] == ranks
        assert losses(jobs[ranks]) == pytest.approx(curve, rel=1e-5)
        assert result["sts_dev_trained"] == pytest.approx(alone["sts_dev_trained"], abs=0.01)
        assert result["sts_dev_last"] == pytest.approx(alone["sts_dev_last"], abs=0.01)
        for key in ("best_step", "clustering_started_at", "steps", "fingerprint"):
            assert result[key] == alone[key], key


EXTRAS = {
    "encoder": {
        "pooling": "mask",
        "prompt": 'this sentence of "{sentence}" means [MASK].',
        # Longer than the first, so that no view can be taken for the other.
        "second_prompt": 'this sentence : "{sentence}" , as she says , means [MASK] to her.',
        "denoise": True,
    },
    "loss": {"mlm_weight": 0.1},
    "train": {"max_steps": 8},
}


def test_a_teacher_does_not_make_it_depend_on_the_workers_either(make_job, tiny_model: Path):
    job = make_job(loss={"teacher": str(tiny_model), "distillation_weight": 2.0}, train={"max_steps": 8})
    jobs = {ranks: job.named(f"on-{ranks}") for ranks in (1, 2, 4)}
    for ranks, each in jobs.items():
        run_ranks(train_here, ranks, each)
    records = {ranks: read_metrics(jobs[ranks].run_dir / "metrics.jsonl") for ranks in jobs}
    parts = {ranks: [(r["loss"], r["distillation"]) for r in found if "loss" in r] for ranks, found in records.items()}
    assert len(parts[1]) == 8 and all(0.01 < distillation < loss for loss, distillation in parts[1])
    for ranks in (2, 4):
        for found, expected in zip(parts[ranks], parts[1], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def test_prompts_and_masked_language_modelling_do_not_depend_on_the_workers_either(make_job):
    job = make_job(**EXTRAS)
    jobs = {ranks: job.named(f"on-{ranks}") for ranks in (1, 2, 4)}
    results = {ranks: run_ranks(train_here, ranks, jobs[ranks])[0] for ranks in jobs}
    records = {ranks: read_metrics(jobs[ranks].run_dir / "metrics.jsonl") for ranks in jobs}
    parts = {ranks: [(r["info_nce"], r["mlm"]) for r in records[ranks] if "loss" in r] for ranks in jobs}
    assert len(parts[1]) == 8 and all(info_nce > 0 and mlm > 0 for info_nce, mlm in parts[1])
    for ranks in (2, 4):
        assert losses(jobs[ranks]) == pytest.approx(losses(jobs[1]), rel=1e-5)
        for found, expected in zip(parts[ranks], parts[1], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        assert results[ranks]["sts_dev"] == pytest.approx(results[1]["sts_dev"], abs=0.01)


CORPUS = {
    "batch columns": {},
    "own columns, refreshed": {
        "loss": {"hard_negative_columns": "own", "bml_reduction": "false_negatives"},
        "clustering": {"refresh_rows": 10},
    },
    # Batches of 32, and one of 9, whose shards have 3, 2, 2 and 2 rows; not all rows are in the bank.
    "odd last batches": {
        "data": {"limit": 297, "order": "random"},
        "loss": {"hard_negative_columns": "not_own_cluster"},
        "clustering": {"bank_rows": 200},
    },
}


def corpus_job(make_job, case: str, every: int, **runtime: Any) -> Job:
    """More clusters than the batch has rows, from the first step on, clustered anew every ``every`` steps."""
    sections = {name: dict(section) for name, section in CORPUS[case].items()}
    sections["clustering"] = {
        "scope": "corpus",
        "num_clusters": 40,
        "start_cosine": 1.0,
        "recluster_every_steps": every,
        "false_negative_cosine": 0.3,
        **sections.get("clustering", {}),
    }
    sections["loss"] = {"bank_negatives": 2, **sections.get("loss", {})}
    job = make_job(**sections, **({"runtime": runtime} if runtime else {}))
    return job._replace(config=job.config.model_copy(update={"seed": 2}))


@pytest.mark.parametrize("case", CORPUS)
def test_clusters_of_the_corpus_do_not_depend_on_the_workers_either(make_job, case: str):
    """To 1e-5, until K-means runs on embeddings that differ in their last bits: a row between two clusters may then go
    to the other, and other sentences are drawn."""
    again = 12
    job = corpus_job(make_job, case, again)
    jobs = {ranks: job.named(f"on-{ranks}") for ranks in (1, 2, 4)}
    results = {ranks: run_ranks(train_here, ranks, jobs[ranks], deadline_s=240)[0] for ranks in jobs}
    records = [r for r in read_metrics(jobs[1].run_dir / "metrics.jsonl") if "loss" in r]
    exact = results[1]["clustering_started_at"] + again
    assert 10 < exact < STEPS, "there are steps before and after"
    clustered = records[exact - again :]
    assert min(record["hard_negative_cosine"] for record in clustered) > 0
    assert max(record["false_negative_rate"] for record in clustered) > 0
    for ranks in (2, 4):
        losses_here, losses_alone = losses(jobs[ranks]), losses(jobs[1])
        assert losses_here[:exact] == pytest.approx(losses_alone[:exact], rel=1e-5)
        clusters = [final_state(jobs[n])["corpus.cluster_N"] for n in (ranks, 1)]
        after = 1e-5 if torch.equal(*clusters) else 0.3
        assert losses_here[exact:] == pytest.approx(losses_alone[exact:], rel=after)
        others = [r for r in read_metrics(jobs[ranks].run_dir / "metrics.jsonl") if "loss" in r]
        for record, expected in list(zip(others, records, strict=True))[:exact]:
            for key in ("false_negative_rate", "clusters_used", "empty_clusters"):
                assert record.get(key) == pytest.approx(expected.get(key)), (ranks, record["step"], key)


def final_state(job: Job) -> dict[str, torch.Tensor]:
    """Weights, head included, and centroids after the last step."""
    newest = list_checkpoints(job.run_dir / "checkpoints")[0]
    state = torch.load(newest / "state.pt", weights_only=True)
    assert state["progress"]["step"] == STEPS
    corpus = state.get("corpus", {})
    tensors = {f"corpus.{name}": value for name, value in corpus.items() if torch.is_tensor(value)}
    return {**state["encoder"], "centroids": state["clustering"]["centroids_KD"], **tensors}


@pytest.mark.parametrize(("ranks", "scope"), [(2, "batch"), (4, "batch"), (2, "corpus")])
def test_a_killed_run_resumes_to_the_same_bits(make_job, ranks: int, scope: str):
    """Killed two steps after a checkpoint, with clustering under way."""
    every = {"checkpoint_every_steps": 7}
    job = make_job(runtime=every) if scope == "batch" else corpus_job(make_job, "own columns, refreshed", 5, **every)
    whole, broken = job.named("whole"), job.named("broken")
    result = run_ranks(train_here, ranks, whole)[0]
    assert result["clustering_started_at"] < 14

    with pytest.raises(RanksFailed, match=r"\{0: -9"):
        run_ranks(train_here, ranks, broken, 16)
    assert [path.name for path in list_checkpoints(broken.run_dir / "checkpoints")] == [
        "step-00000014",
        "step-00000007",
    ]
    assert not (broken.run_dir / "result.json").exists()
    resumed = run_ranks(train_here, ranks, broken)[0]

    expected, found = final_state(whole), final_state(broken)
    assert ("corpus.z_ND" in expected) is (scope == "corpus")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert losses(broken) == losses(whole) and len(losses(whole)) == STEPS
    assert resumed["best_step"] == result["best_step"] and resumed["sts_dev"] == result["sts_dev"]
    models = [(run.run_dir / "model" / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert models[0] == models[1]
