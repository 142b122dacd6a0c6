"""One run in this process, on a tiny encoder: what it writes, and when it stops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import WIDTH
from training_runs import CPU, PROMPT, SECOND_PROMPT, TWO_PROMPTS, Lab, WholeRun, assert_same_tensors, placed, weights

from clusterns_ray.config import make_config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.evaluation.sts import read_pairs, score_pairs
from clusterns_ray.io.events import Evaluated, RunDone, RunStarted
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.tokenization import tokenize
from clusterns_ray.training import environment
from clusterns_ray.training.checkpoint import list_checkpoints
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.environment import describe_environment
from clusterns_ray.training.evaluator import COLLAPSED, Evaluator
from clusterns_ray.training.hard_negatives import CentroidNegatives
from clusterns_ray.training.metrics import read_metrics
from clusterns_ray.training.parts import TrainingParts
from clusterns_ray.training.result import outcome_lines
from clusterns_ray.training.validation import DevSet

# ---- what a run leaves --------------------------------------------------------------------------------------------


def test_a_whole_run(whole: WholeRun) -> None:
    lab, tmp_path, result = whole.lab, whole.directory, whole.result
    config = lab.config()

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
    assert [report.step for report in lab.reports] == [2, 4, 6]
    assert lab.reports[-1].best_score == result["sts_dev"]

    assert isinstance(lab.events[0], RunStarted) and isinstance(lab.events[-1], RunDone)
    assert lab.events[0].total_steps == 6 and lab.events[0].rows == 300
    assert any("Clustering starts after step 1 with 6 centroids" in note for note in lab.notes)
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


def test_a_gpu_is_described_with_the_libraries_that_its_sums_depend_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment, "GPU_DRIVER", tmp_path / "version")
    described = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC version: 12.3.0\n"
    )
    (tmp_path / "version").write_text(described)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91200)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    described = describe_environment(torch.device("cuda:0"), ["clusterns"], 1)
    assert (described["machine"]["gpu"], described["machine"]["multiprocessors"]) == ("H100", 132)
    assert [described["versions"][name] for name in ("driver", "cuda", "cudnn", "nccl")] == [
        "570.124.06",
        "13.0",
        91200,
        "2.28.9",
    ]


def test_sets_that_are_scored_as_well_select_nothing(lab: Lab, whole: WholeRun, tmp_path: Path) -> None:
    alone = whole.result
    config = lab.config(evaluation={"also": ["LEE50/test"]})
    result = lab.run(tmp_path / "also", config)
    for key in ("best_step", "sts_dev", "sts_dev_before", "sts_dev_last", "steps"):
        assert result[key] == alone[key], key
    assert_same_tensors(weights(whole.directory, 6), weights(tmp_path / "also", 6))
    assert alone["also"] == {} and set(result["also"]) == {"LEE50/test"}

    found = result["also"]["LEE50/test"]
    records = {
        r["step"]: r["also LEE50/test"] for r in read_metrics(tmp_path / "also" / "metrics.jsonl") if "best" in r
    }
    assert set(records) == {2, 4, 6} and found["after"] == records[result["best_step"]]
    assert found["low"] <= found["after"] - found["before"] <= found["high"]
    card = (tmp_path / "also" / "model" / "README.md").read_text()
    assert f"On LEE50/test, which chose nothing: {found['before']:.2f} before, {found['after']:.2f} after." in card
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
    notes = [note for note in lab.notes if "LEE50/test" in note]
    assert (
        len(notes) == 1 and "fell from 100.00 to -100.00 at step 2" in notes[0] and "whatever STSB/dev says" in notes[0]
    )


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


def test_training_changes_the_weights_and_only_those_it_should(whole: WholeRun) -> None:
    start = Encoder.for_training(whole.lab.config().encoder, seed=0).state_dict()
    after = weights(whole.directory, 6)
    moved = {name for name, value in start.items() if not torch.equal(value, after[f"encoder.{name}"])}
    assert not any("pooler" in name for name in moved)
    still = {name for name in start if name not in moved}
    assert all("pooler" in name or "position_ids" in name or "token_type" in name for name in still), still
    assert after["centroids"].shape == (6, WIDTH)


def test_without_a_dev_set_the_last_step_is_exported(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(evaluation={"sts": None}, train={"max_steps": 3}, data={"positives": "crop"})
    result = lab.run(tmp_path, config)
    assert (result["best_step"], result["sts_dev"], result["sts_dev_before"], result["dev"]) == (3, None, None, None)
    assert lab.reports == [] and lab.seen(Evaluated) == []
    last = weights(tmp_path, 3)
    for name, value in Encoder.load(tmp_path / "model").backbone.state_dict().items():
        assert torch.equal(value, last[f"encoder.backbone.{name}"])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "No dev set" in card
    assert "ClusterNS with 6 clusters, with a crop of the sentence as the second view, from" in card


def test_plain_simcse(lab: Lab, tmp_path: Path) -> None:
    result = lab.run(tmp_path, lab.config(clustering={"num_clusters": 0}, train={"max_steps": 3}))
    assert result["clustering_started_at"] is None
    records = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert len(records) == 3
    assert all(record["loss"] == record["info_nce"] and "clusters_used" not in record for record in records)
    assert not (tmp_path / "centroids.npy").exists()
    assert "\nSimCSE, from" in (tmp_path / "model" / "README.md").read_text()


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"loss": {"mlm_weight": 0.5}},
        {"clustering": {"scope": "corpus"}, "data": {"positives": "neighbour", "corpus": "DOCUMENTS"}},
    ],
)
def test_a_cached_gradient_trains_the_same(lab: Lab, tmp_path: Path, sections: dict[str, dict[str, Any]]) -> None:
    """8 of 32 sentences at a time, with dropout replayed, over steps without and with clusters."""
    records = {}
    sections = placed(sections, tmp_path)
    for name, chunk in (("whole", None), ("cached", 8)):
        lab.run(tmp_path / name, lab.config(**sections, train={"cache_chunk": chunk, "shards": 4}))
        records[name] = [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
    assert any(record["clusters_used"] > 1 for record in records["whole"] if "clusters_used" in record)
    for ours, other in zip(records["cached"], records["whole"], strict=True):
        for key in ("loss", "info_nce", "bml", "grad_norm"):
            assert ours[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), (ours["step"], key)


@pytest.mark.parametrize("way", ["tree", "all_reduce"])
def test_a_cached_gradient_holds_the_activations_of_one_chunk(lab: Lab, tmp_path: Path, way: str) -> None:
    def parts(chunk: int | None) -> TrainingParts:
        config = lab.config(train={"reduction": way, "cache_chunk": chunk, "shards": 4})
        return TrainingParts(RunContext(config, prepare(config).tokens_dir, None, tmp_path), CPU)

    whole, run, kept = parts(None), parts(8), list[int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(0)
        whole.forward(*whole.batch(0))
        kept.append(0)
        views = run.forward(*run.batch(0))
        assert kept[1] == 0 and len(views.pieces) == 4
        forward, at_a_time = run.views.forward, kept.append
        run.views.forward = lambda chunk: (at_a_time(0), forward(chunk))[1]  # type: ignore[method-assign]
        views.backward(views.z1_BD.sum() + views.z2_BD.sum())
    assert len(kept) == 6 and 0 < max(kept[2:]) < 0.6 * kept[0]


def test_masked_language_modelling_leaves_the_contrastive_part_untouched(lab: Lab, tmp_path: Path) -> None:
    records = {}
    for name, weight in (("off", 0.0), ("on", 0.5), ("more", 0.6)):
        lab.run(tmp_path / name, lab.config(loss={"mlm_weight": weight}, train={"max_steps": 2}))
        records[name] = [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in r]
    first = {name: found[0] for name, found in records.items()}
    assert first["on"]["info_nce"] == first["off"]["info_nce"] == first["more"]["info_nce"]
    assert first["on"]["mlm"] == first["more"]["mlm"] > 1 and "mlm" not in first["off"]
    for name, weight in (("on", 0.5), ("more", 0.6)):
        for record in records[name]:
            expected = record["info_nce"] + 0.1 * record["bml"] + weight * record["mlm"]
            assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert records["on"][1]["info_nce"] != records["off"][1]["info_nce"], "its gradient reaches the encoder"
    state = torch.load(tmp_path / "on" / "checkpoints" / "step-00000002" / "state.pt", weights_only=True)
    assert state["language_model_head"] and not any("bert." in name for name in state["language_model_head"])
    exported = Encoder.load(tmp_path / "on" / "model").backbone.state_dict()
    assert set(exported) == set(Encoder.load(tmp_path / "off" / "model").backbone.state_dict())


def test_two_prompts_make_two_different_views(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(**TWO_PROMPTS)
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


# Scores before training and after each step, the steps until it stops, the best one and its score.
PATIENCE: dict[str, tuple[list[float], int, int, float]] = {
    "no better": ([5, 10, 20, 20, 15, 30, 40], 4, 2, 20),
    "renewed by a better score": ([5, 10, 9, 11, 9, 12, 9], 6, 5, 12),
    # Training may cost some score at first: it goes on as long as it gains.
    "below the untrained encoder": ([50, 10, 20, 30, 25, 29, 60], 5, 0, 50),
}


@pytest.mark.parametrize("case", PATIENCE)
def test_patience(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    given, steps, best_step, best = PATIENCE[case]
    scores = iter(given)
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    result = lab.run(tmp_path, lab.config(evaluation={"every_steps": 1, "patience": 2}))
    assert (result["steps"], result["best_step"], result["sts_dev"]) == (steps, best_step, best)
    assert list(scores) == given[steps + 1 :], "another number of evaluations was made"
    stopped = steps < 6
    assert result["stopped_early"] is stopped and result["total_steps"] == 6
    assert (f"stopped early, after step {steps} of 6" in outcome_lines(result)[0]) is stopped
    assert any(f"Stopped early after step {steps} of 6: the last 2 eval" in note for note in lab.notes) is stopped


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
    expected = lab.seen(Evaluated)[0].score
    assert not any("by its own settings" in note for note in lab.notes)
    lab.run(tmp_path / "cls", lab.config(**{**sections, "encoder": {**sections["encoder"], "pooling": "cls"}}))
    before = lab.seen(Evaluated)[0].score
    (text,) = [note for note in lab.notes if "by its own settings" in note]
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
    assert result["sts_dev_trained"] == 30.0, "the score that a search gets"
    assert [report.best_score for report in lab.reports] == [10.0, 20.0, 30.0]
    assert not any(event.best for event in lab.seen(Evaluated)[1:])
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


def test_a_score_that_is_not_a_number_does_not_become_the_best(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spearman of collapsed embeddings is NaN, and nothing is greater than NaN."""
    scores = iter([5.0, math.nan, 20.0, 30.0])
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    result = lab.run(tmp_path, lab.config())
    assert (result["best_step"], result["sts_dev"]) == (6, 30.0)
    assert any("no dev score at step 2, as all embeddings are alike" in note for note in lab.notes)


def test_collapsed_before_and_after_nothing_is_best(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: math.nan)
    result = lab.run(tmp_path, lab.config())
    assert (result["best_step"], result["sts_dev"], result["sts_dev_before"]) == (0, COLLAPSED, COLLAPSED)
    assert not any(event.best for event in lab.seen(Evaluated))


def test_epochs_that_end_before_max_steps_are_said(lab: Lab, tmp_path: Path) -> None:
    config = lab.config(train={"max_steps": 7, "epochs": 1, "global_batch_size": 128}, evaluation={"sts": None})
    assert lab.run(tmp_path / "early", config)["steps"] == 3, "300 rows in batches of 128"
    assert [note for note in lab.notes if "max_steps" in note] == [
        "train.max_steps is 7, but 1 epoch of this corpus has 3 steps: training ends after 3. For more, raise "
        "train.epochs (to 3 for 7 steps)."
    ]
    lab.run(tmp_path / "there", lab.config(train={"max_steps": 1, "epochs": 1}, evaluation={"sts": None}))
    assert not [note for note in lab.notes if "max_steps" in note]


# ---- first centroids ----------------------------------------------------------------------------------------------


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
