"""What identifies a model: the digest of its files, or its commit on the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from clusterns_ray.errors import ConfigError
from clusterns_ray.models.serialization import model_digest


def test_the_digest_is_of_what_the_model_is(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    digest = model_digest(str(copy))
    assert digest == model_digest(str(tiny_model)) and len(digest) == 64
    (copy / "README.md").write_text("words")
    assert model_digest(str(copy)) == digest
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert model_digest(str(copy)) != digest, name
        (copy / name).write_bytes(content)
    (copy / "clusterns.json").write_text('{"pooling": "cls"}')
    assert model_digest(str(copy)) != digest


def test_a_model_of_the_hub_is_known_by_its_commit(tiny_model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--tiny"

    def commit(mark: str) -> str:
        shutil.copytree(tiny_model, folder / "snapshots" / (mark * 40))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(mark * 40)
        return model_digest("someone/tiny")

    assert commit("a") != commit("b")
    with pytest.raises(ConfigError, match="someone/other"):
        model_digest("someone/other")
