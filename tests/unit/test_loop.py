"""One run in this process, on a tiny encoder: what it writes, when it stops, and that a resumed one is the same."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import WIDTH, make_tiny_model, sentences, write_corpus, write_pairs

from clusterns_ray.config import Config, make_config
from clusterns_ray.console.progress import outcome_lines
from clusterns_ray.data.prepare import Prepared, prepare
from clusterns_ray.errors import CheckpointError, ClusterNSError, ConfigError, DataError, NonFiniteError, StorageError
from clusterns_ray.evaluation.sts import read_pairs, score_pairs
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.tokenization import tokenize
from clusterns_ray.training import run_access
from clusterns_ray.training.checkpoint import list_checkpoints
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.evaluator import COLLAPSED, Evaluator
from clusterns_ray.training.hard_negatives import CentroidNegatives
from clusterns_ray.training.loop import train_worker
from clusterns_ray.training.metrics import read_metrics
from clusterns_ray.training.optim import Optimizer
from clusterns_ray.training.parts import TrainingParts
from clusterns_ray.training.precision import agreed_precision
from clusterns_ray.training.validation import DevSet
from clusterns_ray.training.views import CachedViews, Views, chunked

CPU = torch.device("cpu")
NO_SECONDS = {"seconds": 0, "checkpoint_seconds": 0, "checksum": ""}


@pytest.fixture(autouse=True)
def leave_the_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@dataclass
class Lab:
    """Makes configurations of tiny runs, and runs them."""

    base: dict[str, dict[str, Any]]
    prepared: Prepared
    events: list[dict[str, Any]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)

    def config(self, **sections: dict[str, Any]) -> Config:
        values: dict[str, Any] = {name: dict(section) for name, section in self.base.items()}
        for name, section in sections.items():
            values.setdefault(name, {}).update(section)
        return make_config(values)

    def run(
        self,
        run_dir: Path,
        config: Config,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
        score_before: float | None = None,
    ) -> dict:
        self.events, self.reports = [], []

        def see(event: dict[str, Any]) -> None:
            self.events.append(event)
            on_event(event)

        run_dir.mkdir(parents=True, exist_ok=True)
        return train_worker(
            RunContext(
                config,
                prepare(config).tokens_dir,
                config.evaluation.sts,
                run_dir,
                command=("clusterns", "train", "x.yaml"),
            ),
            CPU,
            see,
            on_evaluation=self.reports.append,
            score_before=score_before,
        )

    def seen(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, corpus_file: Path, sts_dir: Path
) -> dict[str, Any]:
    return {
        "encoder": {"name": str(tiny_model), "num_layers": 2, "pooling": "cls"},
        "data": {"corpus": str(corpus_file), "cache_dir": str(tmp_path_factory.mktemp("cache"))},
        "loss": {"bml_weight": 0.1, "bml_alpha": 0.1},
        "clustering": {"num_clusters": 6, "start_cosine": 1.0, "rate": 0.1},
        "train": {"global_batch_size": 32, "shards": 4, "max_steps": 6, "learning_rate": 1e-3, "precision": "fp32"},
        "evaluation": {"sts": str(sts_dir), "every_steps": 2, "patience": None},
        "runtime": {"log_every_steps": 1, "keep": 9},
    }


@pytest.fixture
def lab(base: dict[str, Any]) -> Lab:
    return Lab(base, prepare(make_config(base)))


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that is a tensor in the checkpoint of a step."""
    state = torch.load(run_dir / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)
    found = {f"encoder.{name}": value for name, value in state["encoder"].items()}
    for number, values in state["optimizer"]["adamw"]["state"].items():
        found |= {f"adamw.{number}.{name}": value for name, value in values.items()}
    found["centroids"] = state["clustering"]["centroids_KD"]
    found["skipped"] = state["optimizer"]["skipped"]
    found |= {f"corpus.{name}": value for name, value in state.get("corpus", {}).items() if torch.is_tensor(value)}
    return found


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], least: int = 50) -> None:
    assert set(a) == set(b) and len(a) > least
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# ---- what a run leaves --------------------------------------------------------------------------------------------


def test_a_whole_run(lab: Lab, tmp_path: Path) -> None:
    config = lab.config()
    result = lab.run(tmp_path, config)

    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["steps"], result["stopped_early"], result["num_workers"]) == (6, False, 1)
    assert result["dev"] == "STSB/dev" and result["fingerprint"] == config.fingerprint()
    assert result["clustering_started_at"] == 1
    assert Path(result["model"]) == (tmp_path / "model").resolve()

    records = read_metrics(tmp_path / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    dev = [record for record in records if "sts_dev" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in dev] == [0, 2, 4, 6]
    common = {"step", "epoch", "loss", "info_nce", "bml", "mean_cosine", "learning_rate", "grad_norm"}
    common |= {"skipped_steps", "sentences_per_second"}
    clustered = {"clusters_used", "largest_cluster", "false_negative_rate", "hard_negative_cosine"}
    for record in steps:
        assert common <= set(record) and all(math.isfinite(record[key]) for key in common)
        assert (clustered <= set(record)) is (record["step"] > 1), "the first step only creates the centroids"
        assert record["skipped_steps"] == 0 and record["grad_norm"] > 0 and record["sentences_per_second"] > 0
        assert record["loss"] == pytest.approx(record["info_nce"] + 0.1 * record["bml"], rel=1e-5)
    for record in steps[1:]:
        assert 2 <= record["clusters_used"] <= 6 and 32 / 6 <= record["largest_cluster"] <= 32
        assert 0 < record["false_negative_rate"] <= 1 and record["bml"] > 0
        assert -1 <= record["hard_negative_cosine"] <= 1
    assert len({record["loss"] for record in steps}) == 6
    assert [record["learning_rate"] for record in steps] == pytest.approx([1e-3 * (1 - n / 6) for n in range(6)])
    assert steps[-1]["epoch"] == pytest.approx(6 / 10), "300 rows are 9 batches of 32 and one of 12"

    for record in dev:
        assert 0 <= record["alignment"] <= 4 and record["uniformity"] < 0 and 1 <= record["effective_rank"] <= WIDTH
        assert -1 <= record["embedding_cosine"] <= 1
    # Step 1 creates the centroids, so the first evaluation has seen one step's rows in clusters, the others two.
    assert [sum(record["cluster_sizes"]) for record in dev[1:]] == [32, 64, 64]
    assert all(len(record["cluster_sizes"]) == 6 and 0 < record["centroid_drift"] < 1 for record in dev[1:])
    assert all(0 <= record["empty_clusters"] < 6 for record in steps[1:]) and "empty_clusters" not in steps[0]

    scores = {record["step"]: record["sts_dev"] for record in dev}
    assert result["sts_dev_before"] == scores.pop(0)
    assert result["sts_dev"] == max(scores.values()) == scores[result["best_step"]]
    assert len(set(scores.values())) > 1
    assert [report["step"] for report in lab.reports] == [2, 4, 6]
    assert lab.reports[-1]["best_sts_dev"] == result["sts_dev"]

    assert lab.events[0]["event"] == "start" and lab.events[-1]["event"] == "done"
    assert lab.seen("start")[0]["total_steps"] == 6 and lab.seen("start")[0]["rows"] == 300
    assert any("Clustering starts after step 1 with 6 centroids" in note["text"] for note in lab.seen("note"))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [f"step-0000000{n}" for n in (6, 4, 2)]
    assert np.load(tmp_path / "centroids.npy").shape == (6, WIDTH)

    described = json.loads((tmp_path / "clusters.json").read_text())
    assert (described["step"], described["sample"]) == (6, 300)
    assert sum(cluster["size"] for cluster in described["clusters"]) == 300
    corpus = set(Path(str(config.data.corpus)).read_text().splitlines())
    assert all(corpus.issuperset(cluster["examples"]) for cluster in described["clusters"])
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["machine"]["cpus"] > 0
    assert environment["command"] == ["clusterns", "train", "x.yaml"] and environment["num_workers"] == 1
    assert len(list((tmp_path / "tensorboard").glob("events.*"))) == 1


def test_sets_that_are_scored_as_well_select_nothing(lab: Lab, tmp_path: Path) -> None:
    alone = lab.run(tmp_path / "alone", lab.config())
    config = lab.config(evaluation={"also": ["LEE50/test"]})
    result = lab.run(tmp_path / "also", config)
    for key in ("best_step", "sts_dev", "sts_dev_before", "sts_dev_last", "steps"):
        assert result[key] == alone[key], key
    assert_same_tensors(weights(tmp_path / "alone", 6), weights(tmp_path / "also", 6))
    assert alone["also"] == {} and set(result["also"]) == {"LEE50/test"}

    found = result["also"]["LEE50/test"]
    records = {
        r["step"]: r["also LEE50/test"] for r in read_metrics(tmp_path / "also" / "metrics.jsonl") if "best" in r
    }
    assert set(records) == {2, 4, 6} and found["after"] == records[result["best_step"]]
    assert found["low"] <= found["after"] - found["before"] <= found["high"]
    pairs = read_pairs(tmp_path, "LEE50/test")
    encoders = (Encoder.for_training(config.encoder, seed=0).eval(), Encoder.load(tmp_path / "also" / "model"))
    for key, encoder in zip(("before", "after"), encoders, strict=True):
        assert found[key] == pytest.approx(score_pairs(pairs, encoder.encode), abs=0.01)


def test_a_fall_of_a_set_that_selects_nothing_is_warned_of_once(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cosines(self: Evaluator, also: DevSet) -> np.ndarray:
        grades = also.pairs.scores / 2
        return grades if self.state.step == 0 else -grades

    monkeypatch.setattr(Evaluator, "_cosines", cosines)
    result = lab.run(tmp_path, lab.config(evaluation={"also": ["LEE50/test"]}))
    found = result["also"]["LEE50/test"]
    assert (found["before"], found["after"]) == pytest.approx((100, -100))
    told = [note["text"] for note in lab.seen("note") if "LEE50/test" in note["text"]]
    assert len(told) == 1 and "fell from 100.00 to -100.00 at step 2" in told[0] and "whatever STSB/dev says" in told[0]


def test_a_score_that_is_known_is_not_measured_again(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([10.0, 20.0, 40.0])
    monkeypatch.setattr(DevSet, "score", lambda self, z_ND: next(scores))
    result = lab.run(tmp_path, lab.config(), score_before=7.0)
    assert (result["sts_dev_before"], result["sts_dev"]) == (7.0, 40.0)
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == {"step": 0, "epoch": 0.0, "sts_dev": 7.0}


def test_the_exported_model_is_the_best_step(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([10.0, 20.0, 40.0, 30.0])
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    result = lab.run(tmp_path, lab.config())
    assert (result["best_step"], result["sts_dev"], result["sts_dev_before"]) == (4, 40.0, 10.0)
    model = Encoder.load(tmp_path / "model")
    best, last = (
        {name.removeprefix("encoder.backbone."): value for name, value in weights(tmp_path, step).items()}
        for step in (4, 6)
    )
    exported = model.backbone.state_dict()
    assert len(exported) > 20
    assert all(torch.equal(value, best[name]) for name, value in exported.items())
    assert not all(torch.equal(value, last[name]) for name, value in exported.items())
    z = model.encode(["The baker sells bread at night.", "A doctor finds a lamp."])
    assert z.shape == (2, WIDTH) and np.isfinite(z).all() and np.abs(z[0] - z[1]).max() > 1e-3
    assert (model.pooling, model.max_length, model.head) == ("cls", 64, None)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "10.00 before training" in card and "**40.00** after step 4" in card and "6 clusters" in card


def test_training_changes_the_weights_and_only_those_it_should(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path, lab.config())
    start = Encoder.for_training(lab.config().encoder, seed=0).state_dict()
    after = weights(tmp_path, 6)
    moved = {name for name, value in start.items() if not torch.equal(value, after[f"encoder.{name}"])}
    assert not any("pooler" in name for name in moved)
    still = {name for name in start if name not in moved}
    assert all("pooler" in name or "position_ids" in name or "token_type" in name for name in still), still
    assert after["centroids"].shape == (6, WIDTH)


def test_without_a_dev_set_the_last_step_is_exported(lab: Lab, tmp_path: Path) -> None:
    result = lab.run(tmp_path, lab.config(evaluation={"sts": None}, train={"max_steps": 3}))
    assert (result["best_step"], result["sts_dev"], result["sts_dev_before"], result["dev"]) == (3, None, None, None)
    assert lab.reports == [] and lab.seen("evaluation") == []
    last = weights(tmp_path, 3)
    for name, value in Encoder.load(tmp_path / "model").backbone.state_dict().items():
        assert torch.equal(value, last[f"encoder.backbone.{name}"])
    assert "No dev set" in (tmp_path / "model" / "README.md").read_text()


def test_plain_simcse(lab: Lab, tmp_path: Path) -> None:
    result = lab.run(tmp_path, lab.config(clustering={"num_clusters": 0}, train={"max_steps": 3}))
    assert result["clustering_started_at"] is None
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert len(records) == 3
    assert all(record["loss"] == record["info_nce"] and "clusters_used" not in record for record in records)
    assert not (tmp_path / "centroids.npy").exists()
    assert "SimCSE" in (tmp_path / "model" / "README.md").read_text()


def test_logging_is_as_often_as_asked(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(
        runtime={"log_every_steps": 4, "checkpoint_every_steps": 5, "keep": 1}, evaluation={"every_steps": 3}
    )
    lab.run(tmp_path, config)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [4, 6], "the last step is always logged"
    assert [record["step"] for record in records if "sts_dev" in record] == [0, 3, 6]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000006"]


def test_epochs_end_and_the_last_batch_is_smaller(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(train={"max_steps": None, "epochs": 2, "global_batch_size": 128}, evaluation={"sts": None})
    result = lab.run(tmp_path, config)
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert result["steps"] == 6, "300 rows are batches of 128, 128 and 44, twice"
    assert [record["epoch"] for record in records] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-3)


def test_the_run_is_a_function_of_its_seed(lab: Lab, tmp_path: Path) -> None:
    def losses(name: str, seed: int) -> list[float]:
        values = lab.config(train={"max_steps": 3}, evaluation={"sts": None}).resolved()
        torch.manual_seed(len(name))
        lab.run(tmp_path / name, make_config({**values, "seed": seed}))
        return [record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")]

    first = losses("a", 1)
    assert losses("bb", 1) == first
    assert losses("c", 2) != first


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"loss": {"mlm_weight": 0.5}},
        {"clustering": {"scope": "corpus"}},
        {"clustering": {"scope": "corpus"}, "data": {"positives": "neighbour", "corpus": "DOCUMENTS"}},
    ],
)
def test_a_cached_gradient_trains_the_same(lab: Lab, tmp_path: Path, sections: dict[str, dict[str, Any]]) -> None:
    """8 of 32 sentences at a time, with dropout replayed, over steps without and with clusters."""
    records = {}
    sections = placed(sections, tmp_path)
    for name, chunk in (("whole", None), ("cached", 8)):
        lab.run(tmp_path / name, lab.config(**sections, train={"cache_chunk": chunk}))
        records[name] = [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
    assert any(record["clusters_used"] > 1 for record in records["whole"] if "clusters_used" in record)
    for ours, other in zip(records["cached"], records["whole"], strict=True):
        for key in ("loss", "info_nce", "bml", "grad_norm"):
            assert ours[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), (ours["step"], key)


def test_a_cached_gradient_holds_the_activations_of_one_chunk(lab: Lab, tmp_path: Path) -> None:
    config = lab.config()
    run = TrainingParts(RunContext(config, prepare(config).tokens_dir, None, tmp_path), CPU)
    _, shards = run.batch(0)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(0)
        Views(run.model, shards)
        kept.append(0)
        views = CachedViews(run.model, chunked(shards, 8))
        assert kept[1] == 0 and len(views.chunks) == 4
        forward, at_a_time = run.views.forward, kept.append
        run.views.forward = lambda chunk: (at_a_time(0), forward(chunk))[1]  # type: ignore[method-assign]
        views.backward(views.z1_bD.sum() + views.z2_bD.sum())
    assert len(kept) == 6 and 0 < max(kept[2:]) < 0.6 * kept[0]


def test_masked_language_modelling_leaves_the_contrastive_part_untouched(lab: Lab, tmp_path: Path) -> None:
    records = {}
    for name, weight in (("off", 0.0), ("on", 0.5), ("more", 0.6)):
        lab.run(tmp_path / name, lab.config(loss={"mlm_weight": weight}, train={"max_steps": 3}))
        records[name] = [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
    first = {name: found[0] for name, found in records.items()}
    assert first["on"]["info_nce"] == first["off"]["info_nce"] == first["more"]["info_nce"]
    assert first["on"]["mlm"] == first["more"]["mlm"] > 1 and "mlm" not in first["off"]
    for name, weight in (("on", 0.5), ("more", 0.6)):
        for record in records[name]:
            expected = record["info_nce"] + 0.1 * record["bml"] + weight * record["mlm"]
            assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert records["on"][1]["info_nce"] != records["off"][1]["info_nce"], "its gradient reaches the encoder"
    state = torch.load(tmp_path / "on" / "checkpoints" / "step-00000003" / "state.pt", weights_only=True)
    assert state["language_model_head"] and not any("bert." in name for name in state["language_model_head"])
    exported = Encoder.load(tmp_path / "on" / "model").backbone.state_dict()
    assert set(exported) == set(Encoder.load(tmp_path / "off" / "model").backbone.state_dict())


def test_two_prompts_make_two_different_views(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(**RESUMED["prompt"])
    run = TrainingParts(RunContext(config, prepare(config).tokens_dir, None, tmp_path), CPU)
    shard = run.batch(0)[1][0]
    assert shard.second is not None
    tokenizer, texts = run.encoder.tokenizer, run.tokens.texts(run.batch(0)[0].shard_rows(0))
    for ids, prompt in ((shard.input_ids_BT, PROMPT), (shard.second[0], SECOND_PROMPT)):
        rows = [[token for token in row if token != tokenizer.pad_token_id] for row in ids.tolist()]
        assert rows == tokenize(texts, tokenizer, config.encoder.max_length, prompt)[0]
    run.encoder.eval()
    z1, z2, _ = run.views([shard])
    expected = run.encoder.project(run.encoder(*shard.second, view=1))
    torch.testing.assert_close(z2, expected, rtol=0, atol=1e-6)
    assert (z1 - z2).abs().max() > 1e-3


# ---- stopping early -----------------------------------------------------------------------------------------------


def test_patience(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [5.0, 10.0, 20.0, 20.0, 15.0, 30.0, 40.0]  # before, then after steps 1 to 6
    scores = iter(given)
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    result = lab.run(tmp_path, lab.config(evaluation={"every_steps": 1, "patience": 2}))
    assert (result["steps"], result["stopped_early"]) == (4, True)
    assert (result["best_step"], result["sts_dev"]) == (2, 20.0)
    assert next(scores) == 30.0, "another number of evaluations was made"


def test_a_better_score_renews_the_patience(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 10.0, 9.0, 11.0, 9.0, 12.0, 9.0])
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    result = lab.run(tmp_path, lab.config(evaluation={"every_steps": 1, "patience": 2}))
    assert (result["steps"], result["stopped_early"], result["best_step"]) == (6, False, 5)


def test_both_scores_before_training_where_pooling_is_not_the_models_own(
    lab: Lab, tmp_path: Path, tiny_model: Path
) -> None:
    """The model's own encoding may be the better one, which a run with another would hide."""
    own = Encoder.load(tiny_model, pooling="mean")
    own.save(tmp_path / "own")
    sections: dict[str, Any] = {
        "train": {"max_steps": 1},
        "encoder": {"name": str(tmp_path / "own"), "num_layers": None},
    }
    lab.run(tmp_path / "mean", lab.config(**{**sections, "encoder": {**sections["encoder"], "pooling": "mean"}}))
    expected = lab.seen("evaluation")[0]["sts_dev"]
    assert not any("by its own settings" in note["text"] for note in lab.seen("note"))
    lab.run(tmp_path / "cls", lab.config(**{**sections, "encoder": {**sections["encoder"], "pooling": "cls"}}))
    before = lab.seen("evaluation")[0]["sts_dev"]
    (text,) = [note["text"] for note in lab.seen("note") if "by its own settings" in note["text"]]
    assert f"(pooling mean) scores {expected:.2f} before training" in text
    assert text.endswith(f"with encoder.pooling cls it scores {before:.2f}.")


def test_where_no_step_is_better_the_untrained_encoder_is_exported(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    scores = iter([50.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    config = lab.config(encoder={"pooling": "mean"})
    result = lab.run(tmp_path, config)
    assert (result["sts_dev_before"], result["sts_dev"], result["best_step"]) == (50.0, 50.0, 0)
    assert result["sts_dev_trained"] == 30.0, "what a search is told of"
    assert [report["best_sts_dev"] for report in lab.reports] == [10.0, 20.0, 30.0]
    assert not any(event["best"] for event in lab.seen("evaluation")[1:])
    model = Encoder.load(tmp_path / "model")
    untrained = Encoder.for_training(config.encoder, seed=0)
    assert (model.pooling, model.max_length, model.training) == ("mean", untrained.max_length, False)
    assert_same_tensors(untrained.backbone.state_dict(), model.backbone.state_dict(), least=20)
    texts = ["The baker sells bread at night.", "A doctor finds a lamp."]
    np.testing.assert_array_equal(model.encode(texts), untrained.encode(texts))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "This is the untrained encoder" in card and "**50.00**" in card
    lines = outcome_lines(result)
    assert "50.00 before, 30.00 at best in 6 steps (-20.00)" in lines[0] and "untrained encoder" in lines[1]


def test_patience_counts_steps_that_are_below_the_untrained_encoder(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training may cost some score at first: it goes on as long as it gains."""
    scores = iter([50.0, 10.0, 20.0, 30.0, 25.0, 29.0, 60.0])
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    result = lab.run(tmp_path, lab.config(evaluation={"every_steps": 1, "patience": 2}))
    assert (result["steps"], result["best_step"], result["sts_dev"]) == (5, 0, 50.0)
    assert result["total_steps"] == 6 and "stopped early, after step 5 of 6" in outcome_lines(result)[0]
    assert any("Stopped early after step 5 of 6: the last 2 eval" in note["text"] for note in lab.seen("note"))


def test_a_score_that_is_not_a_number_does_not_become_the_best(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spearman of collapsed embeddings is NaN, and nothing is greater than NaN."""
    scores = iter([5.0, math.nan, 20.0, 30.0])
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    result = lab.run(tmp_path, lab.config())
    assert (result["best_step"], result["sts_dev"]) == (6, 30.0)
    assert any("no dev score at step 2, as all embeddings are alike" in note["text"] for note in lab.seen("note"))


def test_collapsed_before_and_after_nothing_is_best(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: math.nan)
    result = lab.run(tmp_path, lab.config())
    assert (result["best_step"], result["sts_dev"], result["sts_dev_before"]) == (0, COLLAPSED, COLLAPSED)
    assert not any(event.get("best") for event in lab.seen("evaluation"))


@pytest.mark.parametrize(("max_steps", "said"), [(25, True), (10, False)])
def test_epochs_that_end_before_max_steps_are_said(lab: Lab, tmp_path: Path, max_steps: int, said: bool) -> None:
    config = lab.config(train={"max_steps": max_steps, "epochs": 1}, evaluation={"sts": None})
    assert lab.run(tmp_path, config)["steps"] == 10, "300 rows in batches of 32"
    notes = [note["text"] for note in lab.seen("note") if "max_steps" in note["text"]]
    assert notes == said * [
        "train.max_steps is 25, but 1 epoch of this corpus has 10 steps: training ends after 10. For more, raise "
        "train.epochs (to 3 for 25 steps)."
    ]


# ---- resuming -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler of errors sees."""


def kill_at(step: int, kind: str = "step") -> Callable[[dict[str, Any]], None]:
    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == kind and event["step"] == step:
            raise Killed

    return on_event


PROMPT = 'this sentence of "{sentence}" means [MASK].'
SECOND_PROMPT = 'this sentence : "{sentence}" means [MASK].'

RESUMED: dict[str, dict[str, dict[str, Any]]] = {
    "clustering": {},
    "before clustering": {"clustering": {"start_cosine": -1.0}},
    "kmeans": {"clustering": {"init": "kmeans"}},
    # The bank is filled in step 1, and clustered anew in steps 4 and 6: before and after the kill.
    "corpus": {"clustering": {"scope": "corpus", "num_clusters": 40, "recluster_every_steps": 2, "refresh_rows": 9}},
    "corpus before it starts": {"clustering": {"scope": "corpus", "start_cosine": -1.0}},
    "sum": {"clustering": {"update": "sum", "rate": 0.01}, "data": {"order": "random"}},
    "bf16": {"train": {"precision": "bf16", "schedule": "cosine", "warmup_ratio": 0.3}},
    "fp16": {"train": {"precision": "fp16", "weight_decay": 0.1}},
    "prompt": {"encoder": {"pooling": "mask", "prompt": PROMPT, "second_prompt": SECOND_PROMPT, "denoise": True}},
    "mlm": {"loss": {"mlm_weight": 0.1}},
    "teacher": {"loss": {"teacher": "TEACHER", "distillation_weight": 0.5}},
    "neighbour": {"data": {"positives": "neighbour", "neighbour_distance": 2, "corpus": "DOCUMENTS"}},
    "crop": {"data": {"positives": "crop"}},
    "also": {"evaluation": {"also": ["LEE50/test"]}},
}


def write_documents(path: Path) -> Path:
    """Documents of five sentences each, blank lines between them."""
    lines = sentences(300)
    path.write_text("\n\n".join("\n".join(lines[i : i + 5]) for i in range(0, len(lines), 5)) + "\n")
    return path


def placed(sections: dict[str, dict[str, Any]], directory: Path) -> dict[str, dict[str, Any]]:
    """The sections of a case, with the teacher or the documents that they name made in ``directory``."""
    made = {
        "TEACHER": lambda: make_tiny_model(directory / "teacher", layers=1),
        "DOCUMENTS": lambda: write_documents(directory / "documents.txt"),
    }
    return {
        name: {key: str(made[value]()) if value in list(made) else value for key, value in section.items()}
        for name, section in sections.items()
    }


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_is_the_same_to_the_bit(lab: Lab, tmp_path: Path, case: str) -> None:
    config = lab.config(**placed(RESUMED[case], tmp_path))
    whole = lab.run(tmp_path / "whole", config)
    # Killed in step 4, after the checkpoint of step 2: steps 3 and 4 are done again.
    with pytest.raises(Killed):
        lab.run(tmp_path / "killed", config, kill_at(4))
    assert [path.name for path in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-00000002"]
    assert not (tmp_path / "killed" / "result.json").exists()
    resumed = lab.run(tmp_path / "killed", config)
    assert lab.seen("start")[0]["step"] == 2

    if "start_cosine" not in RESUMED[case].get("clustering", {}):
        assert_same_tensors(weights(tmp_path / "whole", 6), weights(tmp_path / "killed", 6))
        assert weights(tmp_path / "whole", 6)["centroids"] is not None
    else:
        a, b = weights(tmp_path / "whole", 6), weights(tmp_path / "killed", 6)
        assert a.pop("centroids") is None and b.pop("centroids") is None
        assert_same_tensors(a, b)
    for key in ("best_step", "sts_dev", "sts_dev_before", "also", "steps", "clustering_started_at", "fingerprint"):
        assert resumed[key] == whole[key], key

    def told(name: str) -> list[dict[str, Any]]:
        timing = ("sentences_per_second",)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{key: value for key, value in record.items() if key not in timing} for record in records]

    assert len(told("whole")) == 10
    assert told("killed") == told("whole"), "steps are missing, doubled, or other"


def test_killed_before_the_first_checkpoint_it_starts_anew(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        lab.run(tmp_path, lab.config(), kill_at(1))
    lab.run(tmp_path, lab.config())
    assert lab.seen("start")[0]["step"] == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_going_on_with_another_torch_is_said(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        lab.run(tmp_path, lab.config(), kill_at(4))
    path = tmp_path / "environment.json"
    environment = json.loads(path.read_text())
    environment["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(environment))
    lab.run(tmp_path, lab.config())
    (text,) = [note["text"] for note in lab.seen("note") if "was begun with" in note["text"]]
    assert text.startswith(f"The run was begun with torch 1.0 and goes on with {torch.__version__}: it may differ")


def test_killed_after_the_last_step_it_only_finishes(lab: Lab, tmp_path: Path) -> None:
    whole = lab.run(tmp_path, lab.config())
    (tmp_path / "result.json").unlink()
    again = lab.run(tmp_path, lab.config())
    assert lab.seen("step") == [] and lab.seen("evaluation") == []
    assert {**again, **NO_SECONDS} == {**whole, **NO_SECONDS}


def test_stopped_early_it_stays_stopped(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 10.0, 9.0, 8.0])
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    config = lab.config(evaluation={"every_steps": 1, "patience": 2})
    lab.run(tmp_path, config)
    (tmp_path / "result.json").unlink()
    again = lab.run(tmp_path, config)
    assert lab.seen("step") == [] and (again["steps"], again["best_step"]) == (3, 1)


def test_stopped_early_between_checkpoints_the_result_is_the_same(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a checkpoint of the last step, the steps since the one before are done again."""
    given = {0: 5.0, 1: 10.0, 2: 9.0, 3: 8.0}
    asked: list[int] = []

    def score(self: DevSet, encoder: Encoder) -> float:
        asked.append(current["evaluator"].state.step)
        return given[asked[-1]]

    current: dict[str, Evaluator] = {}
    original = Evaluator.__init__

    def init(self: Evaluator, *arguments: Any) -> None:
        current["evaluator"] = self
        original(self, *arguments)

    monkeypatch.setattr(Evaluator, "__init__", init)
    monkeypatch.setattr(DevSet, "score", score)
    config = lab.config(evaluation={"every_steps": 1, "patience": 2}, runtime={"checkpoint_every_steps": 2})
    first = lab.run(tmp_path, config)
    assert (first["steps"], first["best_step"], asked) == (3, 1, [0, 1, 2, 3])
    (tmp_path / "result.json").unlink()
    again = lab.run(tmp_path, config)
    assert {**again, **NO_SECONDS} == {**first, **NO_SECONDS}


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(lab: Lab, tmp_path: Path) -> None:
    config = lab.config()
    lab.run(tmp_path / "whole", config)
    with pytest.raises(Killed):
        lab.run(tmp_path / "killed", config, kill_at(6))
    newest = list_checkpoints(tmp_path / "killed" / "checkpoints")[0]
    assert newest.name == "step-00000004"
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-9])
    lab.run(tmp_path / "killed", config)
    assert lab.seen("start")[0]["step"] == 2
    assert any("step-00000004 is passed over" in note["text"] for note in lab.seen("note"))
    assert_same_tensors(weights(tmp_path / "whole", 6), weights(tmp_path / "killed", 6))


def test_checkpoints_of_another_configuration_are_refused(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path, lab.config(train={"max_steps": 2}))
    for name in ("config.yaml", "result.json"):  # which would be refused before
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="None of the 1 checkpoints"):
        lab.run(tmp_path, lab.config(train={"max_steps": 3}))
    assert any("another configuration" in note["text"] for note in lab.seen("note"))


@pytest.mark.parametrize("changed", ["corpus", "dev"])
def test_a_run_does_not_go_on_with_other_data(lab: Lab, tmp_path: Path, changed: str) -> None:
    corpus, sts = write_corpus(tmp_path / "corpus.txt"), tmp_path / "sts"
    pairs = write_pairs(sts / "STSB" / "dev.jsonl")
    config = lab.config(data={"corpus": str(corpus)}, evaluation={"sts": str(sts)})
    with pytest.raises(Killed):
        lab.run(tmp_path / "run", config, kill_at(6))
    before = {path: path.read_bytes() for path in (corpus, pairs)}
    if changed == "corpus":
        write_corpus(corpus, seed=5)
    else:
        write_pairs(pairs, seed=5)
    with pytest.raises(DataError, match="begun with other data") as caught:
        lab.run(tmp_path / "run", config)
    text = str(caught.value)
    digests = re.findall(r"[0-9a-f]{16}", text)
    assert len(set(digests)) == 2 and ("dev set" in text) == (changed == "dev") and "another name" in text
    for path, content in before.items():  # the remedy
        path.write_bytes(content)
    assert lab.run(tmp_path / "run", config)["steps"] == 6
    assert lab.seen("start")[0]["step"] == 4


def test_tokens_whose_bytes_were_changed_are_not_learnt_from(lab: Lab, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.txt")
    config = lab.config(data={"corpus": str(corpus), "cache_dir": str(tmp_path / "cache")})
    tokens_dir = prepare(config).tokens_dir
    path = tokens_dir / "tokens-00000.arrow"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"baker", b"maker"))
    os.utime(tokens_dir / "manifest.json")  # as if a disk had done it, long after all was checked
    assert path.read_bytes() != content
    with pytest.raises(DataError, match=r"tokens-00000\.arrow: the checksum differs"):
        lab.run(tmp_path / "run", config)


def test_a_killed_export_leaves_a_whole_model(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 10.0, 20.0, 30.0] * 2)
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    original, count = Encoder.save, []

    def save(self: Encoder, directory: Path) -> None:
        count.append(directory)
        original(self, directory)
        if len(count) == 3:  # before training, after step 2, after step 4
            (Path(directory) / "model.safetensors").write_bytes(b"half")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "save", save)
        with pytest.raises(Killed):
            lab.run(tmp_path, lab.config())
    step2 = weights(tmp_path, 2)
    for name, value in Encoder.load(tmp_path / "model").backbone.state_dict().items():
        assert torch.equal(value, step2[f"encoder.backbone.{name}"])
    assert lab.run(tmp_path, lab.config())["steps"] == 6


def test_one_writer_a_run(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterns_ray.io import lease as exclusive_module

    original = exclusive_module.exclusive
    monkeypatch.setattr(run_access, "exclusive", lambda run_dir, wanted: original(run_dir, wanted, wait_s=0.1))

    def second(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            with pytest.raises(ClusterNSError, match="being written by another process") as caught:
                Lab(lab.base, lab.prepared).run(tmp_path, lab.config())
            assert str(tmp_path) in str(caught.value) and "another runtime.name" in str(caught.value)
            met.append(True)

    met: list[bool] = []
    lab.run(tmp_path, lab.config(train={"max_steps": 2}), second)
    assert met


# ---- ways to begin, to compute, and to fail -----------------------------------------------------------------------


def test_first_centroids_by_kmeans(lab: Lab, tmp_path: Path) -> None:
    chain = lab.run(tmp_path / "chain", lab.config(train={"max_steps": 2}))
    kmeans = lab.run(tmp_path / "kmeans", lab.config(train={"max_steps": 2}, clustering={"init": "kmeans"}))
    assert chain["clustering_started_at"] == kmeans["clustering_started_at"] == 1
    a, b = (weights(tmp_path / name, 2)["centroids"] for name in ("chain", "kmeans"))
    assert a.shape == b.shape == (6, WIDTH) and not torch.allclose(a, b)
    assert b.isfinite().all() and b.norm(dim=1).min() > 0
    assert read_metrics(tmp_path / "kmeans" / "metrics.jsonl")[-1]["step"] == 2


def test_kmeans_reads_the_corpus_without_dropout_and_leaves_training_on(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(clustering={"init": "kmeans"})
    run = TrainingParts(RunContext(config, lab.prepared.tokens_dir, None, tmp_path), CPU)
    state = torch.get_rng_state()
    assert isinstance(run.objective.hard_negatives, CentroidNegatives)
    make = run.objective.hard_negatives.initial_centroids
    assert make is not None
    first, second = make(), make()
    assert torch.equal(first, second) and first.shape == (6, WIDTH)
    assert run.encoder.training and torch.equal(torch.get_rng_state(), state)
    ids = run.encoder.tokenize(run.tokens.texts(np.arange(len(run.tokens))))
    with torch.inference_mode():
        z_ND = run.encoder.project(run.encoder.encode_ids(ids))
    nearest_N = (torch.nn.functional.normalize(z_ND) @ torch.nn.functional.normalize(first).T).argmax(dim=1)
    assert len(set(nearest_N.tolist())) > 2
    norms = z_ND.norm(dim=1)
    assert norms.min() * 0.5 < first.norm(dim=1).mean() < norms.max() * 1.1, "not at the scale of the embeddings"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(lab: Lab, tmp_path: Path, precision: str) -> None:
    records = {}
    for name in ("fp32", precision):
        lab.run(tmp_path / name, lab.config(train={"precision": name}, evaluation={"sts": None}))
        records[name] = read_metrics(tmp_path / name / "metrics.jsonl")
        tensors = weights(tmp_path / name, 6)
        assert all(value.dtype == torch.float32 for key, value in tensors.items() if value.is_floating_point()), name
        assert all(value.isfinite().all() for value in tensors.values())
    losses = {name: [record["loss"] for record in found] for name, found in records.items()}
    assert losses[precision][0] == pytest.approx(losses["fp32"][0], rel=0.01)
    assert losses[precision][0] != losses["fp32"][0], "it was computed in fp32"
    skipped = [record["skipped_steps"] for record in records[precision]]
    if precision == "bf16":
        assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05) and skipped == [0] * 6
    else:  # the first scales are too large for these gradients; it settles
        assert skipped[-1] == skipped[-2] < 5 and records[precision][-1]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False, "avx2": True}, "fp32")],
)
def test_auto_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert agreed_precision("auto", CPU) == expected
    assert agreed_precision("fp32", CPU) == "fp32" and agreed_precision("bf16", CPU) == "bf16"


def test_auto_precision_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert agreed_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("began", [True, False])
def test_a_resumed_run_keeps_its_precision(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: bool
) -> None:
    """What the first machine chose stays, on one that would choose otherwise."""
    config = lab.config(train={"precision": "auto"}, evaluation={"sts": None})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": began})
    whole = lab.run(tmp_path / "whole", config)
    with pytest.raises(Killed):
        lab.run(tmp_path / "halves", config, on_event=kill_at(4))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": not began})
    events: list[dict[str, Any]] = []
    halves = lab.run(tmp_path / "halves", config, on_event=events.append)
    assert whole["precision"] == halves["precision"] == ("bf16" if began else "fp32")
    ours, theirs = weights(tmp_path / "halves", 6), weights(tmp_path / "whole", 6)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert began == any("only emulates" in event.get("text", "") for event in events)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_dev_set_is_encoded_in_the_precision_of_training(lab: Lab, tmp_path: Path, precision: str) -> None:
    config = lab.config(train={"precision": precision})
    prepared = prepare(config)
    run = TrainingParts(RunContext(config, prepared.tokens_dir, prepared.sts_dir, tmp_path), CPU)
    dev = DevSet(str(prepared.sts_dir), config.evaluation.dev, run.encoder)
    found = dev.encode(run.encoder)
    run.encoder.save(tmp_path / "model")
    finished = Encoder.load(tmp_path / "model")
    finished.max_length = run.encoder.max_length
    texts = dev.pairs.sentences()
    np.testing.assert_allclose(found, finished.encode(texts, bf16=precision == "bf16"), atol=1e-6)
    error = np.abs(found - finished.encode(texts)).max()
    assert (error < 1e-6) if precision == "fp32" else (1e-4 < error < 0.05)


def test_one_bad_gradient_is_skipped_and_counted(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = Optimizer.scale, []

    def scale(self: Optimizer, loss: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return original(self, loss * math.nan if len(count) == 2 else loss)

    monkeypatch.setattr(Optimizer, "scale", scale)
    result = lab.run(tmp_path, lab.config(evaluation={"every_steps": 1}, train={"max_steps": 4}))
    assert result["steps"] == 4
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert [record["skipped_steps"] for record in records] == [0, 1, 1, 1]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    states = [weights(tmp_path, step) for step in (1, 2, 3)]
    encoders = [{k: v for k, v in state.items() if k.startswith("encoder.")} for state in states]
    assert all(torch.equal(encoders[0][name], encoders[1][name]) for name in encoders[0]) and len(encoders[0]) > 20
    assert any(not torch.equal(encoders[1][name], encoders[2][name]) for name in encoders[1])


def test_ten_bad_gradients_in_a_row_end_the_run(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = Optimizer.scale, []

    def scale(self: Optimizer, loss: torch.Tensor) -> torch.Tensor:
        count.append(1)
        return original(self, loss * math.nan if len(count) > 2 else loss)

    monkeypatch.setattr(Optimizer, "scale", scale)
    config = lab.config(train={"max_steps": 30, "epochs": 3}, evaluation={"sts": None})
    with pytest.raises(NonFiniteError) as caught:
        lab.run(tmp_path, config)
    assert len(count) == 12
    text = str(caught.value)
    for part in ("last 10 gradients before step 12", "train.learning_rate (0.001)", "loss.temperature (0.05)", "fp32"):
        assert part in text
    before, after = weights(tmp_path, 2), weights(tmp_path, 10)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))
    assert all(value.isfinite().all() for value in after.values())


def test_bad_gradients_are_found_although_steps_are_seldom_logged(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Optimizer.scale
    monkeypatch.setattr(Optimizer, "scale", lambda self, loss: original(self, loss * math.nan))
    config = lab.config(
        train={"max_steps": 14, "epochs": 2},
        evaluation={"sts": None, "every_steps": 50},
        runtime={"log_every_steps": 7},
    )
    with pytest.raises(NonFiniteError, match="before step 14"):
        lab.run(tmp_path, config)


# ---- nothing that is not finite is kept ---------------------------------------------------------------------------


def assert_all_is_finite(run_dir: Path) -> None:
    """Every exported weight and every checkpoint."""
    for path in list_checkpoints(run_dir / "checkpoints"):
        assert all(value.isfinite().all() for value in weights(run_dir, int(path.name[-8:])).values())
    if (run_dir / "model").exists():
        state = Encoder.load(run_dir / "model").backbone.state_dict()
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("rate", [1e30, 1e25])
@pytest.mark.parametrize("with_dev", [True, False])
def test_weights_that_leave_the_finite_end_the_run(lab: Lab, tmp_path: Path, rate: float, with_dev: bool) -> None:
    """In fewer steps than ten, and before any is logged."""
    every = {"log_every_steps": 50, "checkpoint_every_steps": 50}
    evaluation = {"every_steps": 50} | ({} if with_dev else {"sts": None})
    config = lab.config(train={"max_steps": 3, "learning_rate": rate}, evaluation=evaluation, runtime=every)
    with pytest.raises(NonFiniteError, match=r"Lower train\.learning_rate \(1e\+"):
        lab.run(tmp_path, config)
    assert not (tmp_path / "result.json").exists()
    assert (tmp_path / "model").exists() == with_dev, "the untrained encoder"
    assert_all_is_finite(tmp_path)
    with pytest.raises(NonFiniteError):  # given again, it is not taken for finished
        lab.run(tmp_path, config)


def test_an_encoder_that_is_not_finite_is_refused_before_training(lab: Lab, tmp_path: Path) -> None:
    damaged = make_tiny_model(tmp_path / "damaged", layers=2)
    model = Encoder.load(damaged)
    next(p for p in model.backbone.parameters() if p.ndim == 2).data[3, 1] = math.nan
    model.backbone.save_pretrained(damaged)
    config = lab.config(encoder={"name": str(damaged)})
    with pytest.raises(NonFiniteError, match=r"not finite \(NaN or infinity\): embeddings.word_embed"):
        lab.run(tmp_path / "run", config)
    assert not (tmp_path / "run" / "config.yaml").exists() and not (tmp_path / "run" / "model").exists()


def test_a_short_run_whose_gradients_are_all_bad_fails(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Optimizer.scale
    monkeypatch.setattr(Optimizer, "scale", lambda self, loss: original(self, loss * math.nan))
    with pytest.raises(NonFiniteError, match="last 3 gradients before step 3"):
        lab.run(tmp_path, lab.config(train={"max_steps": 3}, evaluation={"sts": None}))
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "model").exists()


# ---- whose a run is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"encoder": {"max_length": 65}}, "encoder.max_length is 65"),
        ({"train": {"global_batch_size": 512}, "data": {"limit": 3}}, "3 rows"),
    ],
)
def test_a_refused_request_does_not_take_the_name(
    lab: Lab, tmp_path: Path, sections: dict[str, Any], reason: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=reason):
        lab.run(tmp_path, lab.config(**sections))
    assert not (tmp_path / "config.yaml").exists()
    assert lab.run(tmp_path, lab.config(train={"max_steps": 1}))["steps"] == 1


def test_the_configuration_is_compared_by_who_holds_the_lock(lab: Lab, tmp_path: Path) -> None:
    """As where another command began the run after this one had looked."""
    lab.run(tmp_path, lab.config(train={"max_steps": 1}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"train\.max_steps was 1 and is now 2"):
        lab.run(tmp_path, lab.config(train={"max_steps": 2}))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"result\.json is that of another config"):
        lab.run(tmp_path, lab.config(train={"max_steps": 2}))


def test_what_a_kill_left_half_written_is_removed(lab: Lab, tmp_path: Path) -> None:
    ours = [".result.json.94537254", ".config.yaml.0a1b2c3d", ".centroids.npy.00000000", ".metrics.jsonl.ffffffff"]
    others = [".result.json.notours!", ".mine.94537254", "result.json.94537254", ".report.html.94537254"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("half")
    (tmp_path / ".model.new-12345678").mkdir()
    lab.run(tmp_path, lab.config(train={"max_steps": 1}))
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".") or path.name in others}
    assert left == {".lock", *others}


# ---- disks that take no more --------------------------------------------------------------------------------------


class FullDisk:
    """Fails to flush every file or directory whose path holds ``part``."""

    def __init__(self, part: str):
        self.part, self.fsync = part, os.fsync

    def __call__(self, handle: int) -> None:
        if self.part in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(handle)


@pytest.mark.parametrize("part", ["checkpoints/.step", ".model.new", ".config.yaml", ".result.json", ".environment"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    whole = lab.run(tmp_path / "whole", lab.config())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", FullDisk(part))
        with pytest.raises(StorageError, match=r"No space left on device\. Free some space there\. Then give the same"):
            lab.run(tmp_path / "full", lab.config())
    assert not (tmp_path / "full" / "result.json").exists()
    again = lab.run(tmp_path / "full", lab.config())
    assert {**again, **NO_SECONDS, "model": ""} == {**whole, **NO_SECONDS, "model": ""}
    assert_same_tensors(weights(tmp_path / "whole", 6), weights(tmp_path / "full", 6))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [1_000, 60_000, 200_000])
def test_a_file_that_may_not_grow_is_one_line(lab: Lab, tmp_path: Path, limit: int) -> None:
    """What torch and safetensors write fails with errors of their own kinds."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(
            StorageError, match=r"cannot be read or written: (File too large|the disk took only a part)"
        ):
            lab.run(tmp_path, lab.config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
