"""The seven published configurations: as the paper's table has them, and able to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import make_tiny_model, write_corpus, write_pairs

from clusterns_ray.config import Config, load_config
from clusterns_ray.launch.trainer import train
from clusterns_ray.training.metrics import read_metrics

PAPER = Path(__file__).parents[2] / "experiments" / "paper"


class Row(NamedTuple):
    """Table of hyperparameters of Deng et al. 2023."""

    model: str
    batch: int
    learning_rate: float
    clusters: int
    rate: float
    start_cosine: float
    hard_negatives: bool
    bml_weight: float
    margins: tuple[float, float] | None


TABLE = {
    "bert-base": Row("bert-base-uncased", 256, 5e-5, 128, 1e-3, 0.4, True, 1e-3, (0, 0.3)),
    "bert-large": Row("bert-large-uncased", 512, 5e-5, 128, 1e-3, 0.5, True, 5e-5, (0.25, 0.3)),
    "roberta-base": Row("roberta-base", 512, 5e-5, 128, 1e-3, 0.4, True, 1e-4, (0.2, 0.5)),
    "roberta-large": Row("roberta-large", 512, 5e-5, 128, 5e-4, 0.4, True, 0, None),
    "prompt-bert-base": Row("bert-base-uncased", 512, 5e-5, 96, 5e-4, 0.4, True, 1e-2, (0, 0.2)),
    "prompt-bert-large": Row("bert-large-uncased", 256, 3e-5, 96, 1e-4, 0.2, True, 5e-4, (0.25, 0.3)),
    "prompt-roberta-base": Row("roberta-base", 512, 5e-5, 128, 1e-3, 0.4, False, 1e-2, (0.2, 0.6)),
}
NAMES = list(TABLE)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_papers_table(name: str) -> None:
    config, row = load_config(PAPER / f"{name}.yaml"), TABLE[name]
    assert config.encoder.name == row.model
    assert (config.train.global_batch_size, config.train.learning_rate) == (row.batch, row.learning_rate)
    clustering = config.clustering
    assert (clustering.num_clusters, clustering.rate) == (row.clusters, row.rate)
    assert (clustering.start_cosine, clustering.update, clustering.init) == (row.start_cosine, "sum", "farthest_chain")
    assert (config.loss.hard_negatives, config.loss.bml_weight) == (row.hard_negatives, row.bml_weight)
    if row.margins is not None:
        assert (config.loss.bml_alpha, config.loss.bml_beta) == row.margins


@pytest.mark.parametrize("name", NAMES)
def test_what_they_have_in_common(name: str) -> None:
    config = load_config(PAPER / f"{name}.yaml")
    assert config.data.corpus == "hf://princeton-nlp/datasets-for-simcse/wiki1m_for_simcse.txt"
    assert (config.data.order, config.encoder.max_length, config.encoder.head) == ("random", 32, "mlp")
    assert config.encoder.dropout is None, "the models' own 0.1"
    loss, training, evaluation = config.loss, config.train, config.evaluation
    assert (loss.temperature, loss.hard_negative_weight, loss.mlm_weight) == (0.05, 0, 0)
    assert (loss.hard_negative_columns, loss.bml_reduction) == ("batch", "all_pairs")
    assert (training.epochs, training.max_steps, training.schedule) == (1, None, "linear")
    assert (training.warmup_ratio, training.weight_decay, training.max_grad_norm) == (0, 0, 1)
    assert (evaluation.sts, evaluation.dev, evaluation.every_steps, evaluation.patience) == ("hf", "STSB/dev", 125, 3)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_those_of_the_variant(name: str) -> None:
    encoder = load_config(PAPER / f"{name}.yaml").encoder
    if not name.startswith("prompt"):
        assert (encoder.pooling, encoder.prompt, encoder.second_prompt, encoder.denoise) == ("cls", None, None, False)
        return
    assert (encoder.pooling, encoder.denoise) == ("mask", True)
    if "roberta" in name:
        expected = ("This sentence : ' {sentence} ' means<mask>.", "The sentence : ' {sentence} ' means<mask>.")
    else:
        expected = ('This sentence of "{sentence}" means [MASK].', 'This sentence : "{sentence}" means [MASK].')
    assert (encoder.prompt, encoder.second_prompt) == expected


def test_no_configuration_is_left_out() -> None:
    assert {path.stem for path in PAPER.glob("*.yaml")} == set(TABLE)


# ---- two steps ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """In place of the hub: tiny models of the same architectures and kinds of tokenizer, a corpus, a dev set."""
    base = tmp_path_factory.mktemp("paper")
    write_pairs(base / "sts" / "STSB" / "dev.jsonl")
    write_corpus(base / "corpus.txt", 1200)
    models = {kind: make_tiny_model(base / kind, kind, positions=128) for kind in ("bert", "roberta")}
    return {"models": models, "corpus": base / "corpus.txt", "sts": base / "sts", "cache": base / "cache"}


def for_the_test(name: str, stand_ins: dict[str, Any], tmp_path: Path) -> Config:
    kind = "roberta" if "roberta" in name else "bert"
    changes = {
        "encoder.name": stand_ins["models"][kind],
        "data.corpus": stand_ins["corpus"],
        "data.cache_dir": stand_ins["cache"],
        "evaluation.sts": stand_ins["sts"],
        "train.max_steps": 2,
        "clustering.start_cosine": 1,  # a tiny encoder's cosines are not the real one's
        "runtime.storage_path": tmp_path,
        "runtime.log_every_steps": 1,
    }
    return load_config(PAPER / f"{name}.yaml", [f"{key}={value}" for key, value in changes.items()])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name: str, stand_ins: dict[str, Any], tmp_path: Path) -> None:
    result = train(for_the_test(name, stand_ins, tmp_path))
    run_dir = tmp_path / f"paper-{name}"
    steps = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]
    assert result["steps"] == len(steps) == 2 and result["clustering_started_at"] == 1
    row = TABLE[name]
    second = steps[1]
    assert second["loss"] == pytest.approx(second["info_nce"] + row.bml_weight * second["bml"], rel=1e-5)
    assert (second["bml"] > 0) is (row.bml_weight > 0)
    assert steps[0]["loss"] != second["loss"] and 1 < second["clusters_used"] <= row.clusters
    settings = json.loads((run_dir / "model" / "clusterns.json").read_text())
    assert settings["denoise"] is name.startswith("prompt")
