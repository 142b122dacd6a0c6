"""The small files beside a transformer's weights: how token states become an embedding, ours and those of
sentence-transformers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from clusterns_ray.io.files import follow_umask, json_text, sha256
from clusterns_ray.models.pretrained import hub_options, loading
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.models.settings import SAVED, SETTINGS_FILE, ModelSettings

HIDDEN_STATE_POOLINGS = ("first_last", "top2")
"""Poolings that read more than the last layer."""


def model_digest(name: str) -> str:
    """The identity of an encoder: SHA-256 over its configuration, tokenizer and weights, wherever they are.

    A model of the hub is known by its name and commit.

    Args:
        name: as of ``Encoder.load``.

    Raises:
        ConfigError: there is no such model, or its commit on the hub is not known.
    """
    source = resolve_model(name)
    digest = hashlib.sha256()
    path = Path(source)
    if not path.is_dir():
        digest.update(f"{source}@{_hub_commit(source)}".encode())
        return digest.hexdigest()
    weights = list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
    small = [*path.glob("*.json"), *path.glob("*.txt"), *path.glob("*.model"), *path.glob("*/config.json")]
    for file in sorted({*small, *weights}):
        digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _hub_commit(source: str) -> str | None:
    from transformers.utils.hub import cached_file, extract_commit_hash

    with loading(source, "its config.json"):
        return extract_commit_hash(cached_file(source, "config.json", **hub_options(source)), None)


def write_settings(path: Path, settings: ModelSettings) -> None:
    """Write what :func:`~clusterns_ray.models.settings.read_settings` reads."""
    _write_json(path / SETTINGS_FILE, {key: getattr(settings, key) for key in SAVED})


def write_sentence_transformers(path: Path, settings: ModelSettings, config: Any) -> None:
    """Describe an encoder for sentence-transformers, which then loads the directory as it is.

    Args:
        settings: with a prompt that ends with the sentence, or none; ``max_length`` counts the prompt.
        config: the transformer's.
    """
    pooling, width = settings.pooling, config.hidden_size
    # The module names and keys of sentence-transformers 2 to 5, which 6 reads as well.
    modules = [("", "Transformer")]
    transformer = {"max_seq_length": settings.max_length, "do_lower_case": settings.lower_case}
    if pooling in HIDDEN_STATE_POOLINGS:
        modules.append(("1_LayerPooling", "WeightedLayerPooling"))
        _write_layer_weights(path / "1_LayerPooling", pooling, width, config.num_hidden_layers)
        transformer["config_args"] = {"output_hidden_states": True}
    modules.append((f"{len(modules)}_Pooling", "Pooling"))
    (path / modules[-1][0]).mkdir(exist_ok=True)
    _write_json(
        path / modules[-1][0] / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling not in ("cls", "last"),
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_lasttoken": pooling == "last",
        },
    )
    if settings.normalize:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
        (path / modules[-1][0]).mkdir(exist_ok=True)
    _write_json(path / "sentence_bert_config.json", transformer)
    _write_json(
        path / "modules.json",
        [
            {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
            for i, (folder, kind) in enumerate(modules)
        ],
    )
    prefix = (settings.prompt or "").removesuffix("{sentence}")
    prompts = {"prompts": {"default": prefix}, "default_prompt_name": "default"} if prefix else {}
    _write_json(path / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", **prompts})


def write_prompt_module(path: Path) -> None:
    """Name the module by which sentence-transformers applies the prompt."""
    module = {
        "idx": 0,
        "name": "0",
        "path": "",
        "type": "clusterns_ray.models.sentence_transformers_module.PromptEncoder",
    }
    _write_json(path / "modules.json", [module])
    _write_json(path / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


def _write_layer_weights(path: Path, pooling: str, width: int, layers: int) -> None:
    from safetensors.torch import save_file

    start = 0 if pooling == "first_last" else layers - 1
    weights = torch.zeros(layers + 1 - start)
    weights[0] += 1
    weights[-1] += 1
    path.mkdir(exist_ok=True)
    save_file({"layer_weights": weights}, path / "model.safetensors")
    follow_umask(path)
    _write_json(
        path / "config.json",
        {"word_embedding_dimension": width, "layer_start": start, "num_hidden_layers": layers},
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")
