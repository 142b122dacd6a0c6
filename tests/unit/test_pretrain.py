"""``experiments/pretrain.py`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from clusterns_ray.config import make_config
from clusterns_ray.errors import ConfigError
from clusterns_ray.models.encoder import Encoder
from experiments.pretrain import Pretraining


def pretraining(out: Path, model: Path, corpus: Path, steps: int, sts: Path | None = None) -> Pretraining:
    encoder = {"name": str(model), "pooling": "mean", "head": "none"}
    data = {"corpus": str(corpus), "cache_dir": str(out.parent / "cache")}
    train = {"global_batch_size": 16, "shards": 1}
    config = make_config({"encoder": encoder, "data": data, "train": train, "clustering": {"num_clusters": 0}})
    return Pretraining(config, out, steps, 1e-2, 3, None if sts is None else str(sts))


@pytest.mark.nightly
def test_stopped_and_given_again_it_makes_the_same_language_model(tiny_model, corpus_file, sts_dir, tmp_path):
    whole = pretraining(tmp_path / "whole", tiny_model, corpus_file, 24, sts_dir)
    whole.run()
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(0, 25, 3))
    assert log[-1]["loss"] < log[1]["loss"] - 0.5, "it learns nothing"
    assert all(-100 <= record["stsb_dev"] <= 100 for record in log)

    stopped = pretraining(tmp_path / "stopped", tiny_model, corpus_file, 24)
    for _ in range(7):
        stopped.train_step()
        stopped.step += 1
        if stopped.step == 6:
            stopped.save()
    pretraining(tmp_path / "stopped", tiny_model, corpus_file, 24).run()
    models = [AutoModelForMaskedLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "stopped")]
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models), strict=True))
    assert Encoder.load(tmp_path / "whole" / "model").encode(["A sentence."]).shape == (1, 32)

    with pytest.raises(ConfigError, match=r"was begun with .*'steps': 24.* now asked for .*'steps': 25"):
        pretraining(tmp_path / "stopped", tiny_model, corpus_file, 25).run()
