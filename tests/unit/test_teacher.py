"""Ranking distillation: its formula, the teacher that it learns from, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_tiny_model, sentences, write_corpus, write_pairs
from scipy.special import rel_entr, softmax

from clusterns_ray import Encoder, train
from clusterns_ray.config import Config, TrainConfig, make_config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import ConfigError
from clusterns_ray.launch.estimates import model_size, worker_memory
from clusterns_ray.launch.staging import stage, unstage
from clusterns_ray.losses import rank_distillation_share
from clusterns_ray.training.collate import DropoutKeys, Shard
from clusterns_ray.training.metrics import read_metrics
from clusterns_ray.training.teacher import Teacher

CPU = torch.device("cpu")


# ---- the formula ----------------------------------------------------------------------------------------------------


def cosines(seed: int, rows: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, rows))


def by_rows(student: np.ndarray, teacher: np.ndarray, temperature: float, teacher_temperature: float) -> float:
    """Row by row, over the other rows alone."""
    found = []
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        p = softmax(teacher[i, others] / teacher_temperature)
        q = softmax(student[i, others] / temperature)
        found.append(rel_entr(p, q).sum())
    return float(np.mean(found))


@pytest.mark.parametrize("temperatures", [(0.05, 0.05), (0.03, 0.1), (1.0, 0.02)])
def test_it_is_the_mean_divergence_of_the_rows(temperatures: tuple[float, float]) -> None:
    student, teacher = cosines(0), cosines(1)
    found = rank_distillation_share(
        torch.from_numpy(student), torch.from_numpy(teacher), torch.arange(7), *temperatures
    )
    assert float(found) == pytest.approx(by_rows(student, teacher, *temperatures), rel=1e-12)
    assert float(found) > 0.1


def test_the_shares_of_workers_add_up() -> None:
    student, teacher, rows = torch.from_numpy(cosines(0)), torch.from_numpy(cosines(1)), torch.arange(7)
    whole = rank_distillation_share(student, teacher, rows, 0.05, 0.1)
    shards_by_rank = [torch.tensor([0, 4, 6]), torch.tensor([1, 2, 3, 5])]
    shares = [
        rank_distillation_share(student[its_shards], teacher[its_shards], its_shards, 0.05, 0.1)
        for its_shards in shards_by_rank
    ]
    assert float(sum(shares)) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_the_difference_of_the_distributions(dtype: torch.dtype) -> None:
    """Of a softmax's divergence: (q - p) / t, nothing on the diagonal, where no ranking is learnt."""
    student, teacher = (torch.from_numpy(cosines(seed)).to(dtype) for seed in (0, 1))
    student.requires_grad_()
    rank_distillation_share(student, teacher, torch.arange(7), 0.05, 0.1).backward()
    expected = np.zeros((7, 7))
    for i in range(7):
        others = [j for j in range(7) if j != i]
        q = softmax(student.detach().double().numpy()[i, others] / 0.05)
        p = softmax(teacher.double().numpy()[i, others] / 0.1)
        expected[i, others] = (q - p) / 0.05 / 7
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-6 if dtype == torch.float32 else 1e-12)
    assert np.abs(expected).max() > 0.5


def test_nothing_is_left_to_learn_where_both_rank_alike() -> None:
    student = torch.from_numpy(cosines(0)).float().requires_grad_()
    loss = rank_distillation_share(student, 2 * student.detach(), torch.arange(7), 0.05, 0.1)
    loss.backward()
    assert student.grad is not None
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6) and student.grad.abs().max() < 1e-5


def test_extreme_temperatures_stay_finite() -> None:
    student = torch.from_numpy(cosines(0)).float().requires_grad_()
    loss = rank_distillation_share(student, torch.from_numpy(cosines(1)).float(), torch.arange(7), 1e-4, 1e-4)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


# ---- the teacher ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Callable[..., Config]:
    corpus = write_corpus(tmp_path / "corpus.txt")
    write_pairs(tmp_path / "sts" / "STSB" / "dev.jsonl")

    def config(**sections: dict[str, Any]) -> Config:
        values: dict[str, Any] = {
            "encoder": {"name": str(tiny_model), "pooling": "mean"},
            "data": {"corpus": str(corpus)},
            "clustering": {"num_clusters": 4, "start_cosine": 1.0},
            "train": {"global_batch_size": 32, "shards": 2, "max_steps": 6, "learning_rate": 1e-3, "precision": "fp32"},
            "evaluation": {"sts": str(tmp_path / "sts"), "every_steps": 3},
            "runtime": {"trackers": [], "log_every_steps": 1, "storage_path": str(tmp_path / "runs")},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return make_config(values)

    return config


@pytest.mark.parametrize("prompt", [None, 'this sentence of "{sentence}" means [MASK].'])
def test_it_embeds_as_the_finished_encoder_does(tiny_model: Path, tmp_path: Path, prompt: str | None) -> None:
    encoder = Encoder.load(tiny_model)
    if prompt:
        encoder.prompt, encoder.pooling = prompt, "mask"
    encoder.save(tmp_path / "teacher")
    teacher, texts = Teacher(str(tmp_path / "teacher"), CPU), sentences(11)
    shards = []
    for piece in (texts[:4], texts[4:]):
        batch = encoder.tokenizer(
            [(prompt or "{sentence}").format(sentence=text) for text in piece], padding=True, return_tensors="pt"
        )
        keys = DropoutKeys(0, 0, np.arange(len(piece)))
        shards.append(Shard(batch["input_ids"], batch["attention_mask"], keys))
    found = teacher(shards, torch.float32)
    assert found.dtype == torch.float32 and not found.requires_grad
    np.testing.assert_allclose(found.numpy(), Encoder.load(tmp_path / "teacher").encode(texts), atol=1e-6)
    half = teacher(shards, torch.bfloat16)
    assert half.dtype == torch.float32 and 0 < (half - found).abs().max() < 0.1


@pytest.mark.slow
def test_a_student_comes_to_rank_as_its_teacher(make: Callable[..., Config], tmp_path: Path) -> None:
    teacher = make_tiny_model(tmp_path / "teacher", layers=1)
    records = {}
    for weight in (1e-9, 20.0):
        name = f"w{weight:g}"
        config = make(
            loss={"teacher": str(teacher), "distillation_weight": weight},
            train={"max_steps": 25},
            runtime={"name": name},
        )
        train(config)
        records[weight] = [r for r in read_metrics(tmp_path / "runs" / name / "metrics.jsonl") if "loss" in r]
    first, last = records[20.0][0], records[20.0][-1]
    assert first["distillation"] == pytest.approx(records[1e-9][0]["distillation"], rel=1e-4)
    assert last["distillation"] < 0.5 * min(first["distillation"], records[1e-9][-1]["distillation"])
    for weight, found in records.items():
        for record in found:
            expected = record["info_nce"] + 1e-3 * record["bml"] + weight * record["distillation"]
            assert record["loss"] == pytest.approx(expected, rel=1e-4)


def test_without_a_teacher_nothing_is_told_of_it(make: Callable[..., Config], tmp_path: Path) -> None:
    train(make(runtime={"name": "plain"}))
    assert "distillation" not in (tmp_path / "runs" / "plain" / "metrics.jsonl").read_text()


def test_the_model_card_names_it(make: Callable[..., Config], tmp_path: Path, tiny_model: Path) -> None:
    train(make(loss={"teacher": str(tiny_model)}, runtime={"name": "taught"}))
    card = (tmp_path / "runs" / "taught" / "model" / "README.md").read_text()
    assert f"the ranking of `{tiny_model}`" in card


def test_a_teacher_that_is_not_there_is_refused_first(make: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere.* holds no config.json"):
        train(make(loss={"teacher": "/nowhere"}))


def test_a_teacher_of_other_tokens_is_refused(make: Callable[..., Config], tiny_models: Callable[[str], Path]) -> None:
    config = make(loss={"teacher": str(tiny_models("roberta"))})
    with pytest.raises(ConfigError, match=r"loss.teacher is .*roberta.*tokenizer is not that of .*bert"):
        train(config)


def test_a_teacher_of_another_prompt_is_refused(make: Callable[..., Config], tiny_model: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(tiny_model)
    encoder.prompt, encoder.pooling = 'it says "{sentence}" [MASK].', "mask"
    encoder.save(tmp_path / "prompted")
    with pytest.raises(ConfigError, match=r"the prompt 'it says .*encoder.prompt is None"):
        prepare(make(loss={"teacher": str(tmp_path / "prompted")}))
    prepare(
        make(
            loss={"teacher": str(tmp_path / "prompted")},
            encoder={"prompt": 'it says "{sentence}" [MASK].', "pooling": "mask"},
        )
    )


def test_its_weights_are_planned_for(make: Callable[..., Config], tiny_model: Path) -> None:
    parameters = sum(p.numel() for p in Encoder.load(tiny_model).backbone.parameters())
    without, with_one = (model_size(make(loss=loss)) for loss in ({}, {"teacher": str(tiny_model)}))
    assert (without.teacher, with_one.teacher) == (0, parameters)
    memory = [worker_memory(size, TrainConfig(shards=4), 1, gpu=False) for size in (without, with_one)]
    assert memory[1].weights - memory[0].weights == 4 * parameters
    assert with_one.loss_bytes > without.loss_bytes


def test_a_directory_named_from_here_is_found_by_workers_elsewhere(
    make: Callable[..., Config], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of Ray has another working directory."""
    from clusterns_ray.models import resolve as models

    Encoder.load(tiny_model).save(tmp_path / "here" / "first" / "model")
    monkeypatch.chdir(tmp_path / "here")
    config = make(loss={"teacher": "first/model"})
    staged = json.loads(json.dumps(stage(config, prepare(config))))
    monkeypatch.chdir("/")
    monkeypatch.setattr(models, "staged", {})
    unstage(config, staged)
    assert models.resolve_model("first/model") == str(tmp_path / "here" / "first" / "model")
