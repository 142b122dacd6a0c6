"""Loading a model: what its files do not say right is refused in one line that names it, and none of its code runs."""

from __future__ import annotations

import ast
import http.server
import json
import os
import pickle
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, sentences
from safetensors.torch import load_file, save_file

import clusterns_ray
from clusterns_ray.errors import ClusterNSError, ConfigError, NonFiniteError
from clusterns_ray.models import pretrained
from clusterns_ray.models.backbone import load_language_model, load_transformer
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.pretrained import cannot_load, one_line, read_config
from clusterns_ray.models.tokenization import load_tokenizer
from clusterns_ray.training.teacher import Teacher

Models = Callable[[str], Path]
Weights = dict[str, torch.Tensor]
Edit = Callable[[Path], Any]


@pytest.fixture
def copy(tiny_models: Models, tmp_path: Path) -> Callable[..., Path]:
    """A tiny model that may be damaged."""

    def made(kind: str = "bert") -> Path:
        return Path(shutil.copytree(tiny_models(kind), tmp_path / kind))

    return made


def edit_weights(directory: Path, change: Callable[[Weights], Weights]) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit_json(file: Path, **values: Any) -> None:
    """Set keys, and take out those whose value is ``...``."""
    found = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def refused(directory: Path, load: Callable[[Path], Any] = Encoder.load) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory)
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text and text.endswith(".")
    return text


# ---- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_weight_has_to_be_there(copy: Callable[..., Path], kind: str) -> None:
    directory = copy(kind)
    whole = load_file(directory / "model.safetensors")
    names = sorted(name for name in whole if "pooler" not in name)
    for name in (names[0], names[len(names) // 2], names[-1]):
        save_file({n: v for n, v in whole.items() if n != name}, directory / "model.safetensors", {"format": "pt"})
        text = refused(directory)
        assert "lack weights" in text and name in text and "drawn at random" in text and "save_pretrained" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: {f"trainer.model.{name}": value for name, value in w.items()}, "and 50 more"),
        (lambda w: {name: value for name, value in w.items() if ".layer.2." not in name}, "encoder.layer.2."),
        (lambda w: {name.replace("query", "q_proj"): value for name, value in w.items()}, "attention.self.query"),
        (lambda w: {"nothing": torch.zeros(1)}, "lack weights"),
    ],
    ids=["wrapped", "no last layer", "other names", "nothing"],
)
def test_weights_under_other_names_are_no_weights(
    copy: Callable[..., Path], change: Callable[[Weights], Weights], named: str
) -> None:
    directory = copy()
    edit_weights(directory, change)
    assert named in refused(directory)
    assert named in refused(directory, lambda path: Teacher(str(path), torch.device("cpu")))


def test_a_pooler_is_never_read_and_may_be_missing(copy: Callable[..., Path], tiny_model: Path) -> None:
    directory = copy()
    edit_weights(directory, lambda w: {name: value for name, value in w.items() if "pooler" not in name})
    texts = sentences(3)
    assert (Encoder.load(directory).encode(texts) == Encoder.load(tiny_model).encode(texts)).all()


def test_a_masked_language_model_is_a_whole_encoder(copy: Callable[..., Path], tmp_path: Path) -> None:
    """Its names have a prefix, its head is not read, its decoder is tied, and it has no pooler."""
    source = copy()
    transformers.AutoModelForMaskedLM.from_pretrained(source).save_pretrained(tmp_path / "mlm")
    for file in source.glob("token*"):
        shutil.copy(file, tmp_path / "mlm")
    names = load_file(tmp_path / "mlm" / "model.safetensors")
    assert any(name.startswith("bert.") for name in names) and "cls.predictions.decoder.weight" not in names
    texts = sentences(3)
    assert (Encoder.load(tmp_path / "mlm").encode(texts) == Encoder.load(source).encode(texts)).all()

    backbone, _ = load_transformer(str(tmp_path / "mlm"))
    assert load_language_model(str(tmp_path / "mlm"), backbone)[1] == []
    drawn = load_language_model(str(source), backbone)[1]
    assert drawn and all(name.startswith("cls.predictions.") for name in drawn)


def test_what_is_not_a_weight_may_be_there_or_not(copy: Callable[..., Path]) -> None:
    directory = copy()
    positions = torch.arange(64)[None]
    edit_weights(directory, lambda w: {**w, "embeddings.position_ids": positions, "cls.bias": torch.zeros(3)})
    Encoder.load(directory)


def test_layers_that_the_config_does_not_count_are_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    edit_json(directory / "config.json", num_hidden_layers=2)
    text = refused(directory)
    assert "states 2 layers" in text and "encoder.layer.2." in text and "num_hidden_layers" in text
    edit_json(directory / "config.json", num_hidden_layers=3)
    assert len(load_transformer(str(directory), num_layers=2)[0].encoder.layer) == 2


@pytest.mark.parametrize("layers", [0, -1, 10**9])
def test_a_number_of_layers_that_cannot_be_is_refused(copy: Callable[..., Path], layers: int) -> None:
    directory = copy()
    edit_json(directory / "config.json", num_hidden_layers=layers)
    assert f"states {layers} layers" in refused(directory)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"intermediate_size": 40}, "intermediate.dense"), ({"vocab_size": 200}, "word_embeddings.weight is [105, 32]")],
)
def test_weights_of_another_shape_are_named(copy: Callable[..., Path], change: dict[str, int], named: str) -> None:
    directory = copy()
    edit_json(directory / "config.json", **change)
    text = refused(directory)
    assert "other shapes" in text and named in text and "ignore_mismatched" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(copy: Callable[..., Path], value: float) -> None:
    directory = copy()

    def damage(weights: Weights) -> Weights:
        weights["encoder.layer.1.output.dense.weight"][3, 5] = value
        return weights

    edit_weights(directory, damage)
    with pytest.raises(NonFiniteError, match=r"not finite.* encoder\.layer\.1\.output\.dense\.weight"):
        Encoder.load(directory)


def test_quantised_weights_and_adapters_are_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "merge_and_unload" in refused(directory)
    (directory / "adapter_config.json").unlink()
    for method in ("bitsandbytes", "gptq", "no-such-method"):
        edit_json(directory / "config.json", quantization_config={"quant_method": method, "load_in_8bit": True})
        assert "quantised" in refused(directory)


def test_a_pickled_model_is_not_unpickled(copy: Callable[..., Path], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    directory = copy()
    (directory / "model.safetensors").unlink()
    torch.save(Bomb(), directory / "pytorch_model.bin")
    text = refused(directory)
    assert "pickle" in text and "save_pretrained" in text and "weights_only" not in text
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(directory)
    assert not (tmp_path / "ran").exists()


# ---- damaged and foreign files ------------------------------------------------------------------------------------


def cut(name: str, size: int) -> Edit:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def write(name: str, text: str) -> Edit:
    return lambda path: (path / name).write_text(text)


def values(name: str, **changes: Any) -> Edit:
    return lambda path: edit_json(path / name, **changes)


CONFIG, TOKENIZER, SETTINGS = "config.json", "tokenizer.json", "tokenizer_config.json"
DAMAGED: dict[str, tuple[Edit, str]] = {
    "weights cut": (cut("model.safetensors", 5000), "its weights cannot be read"),
    "weights empty": (cut("model.safetensors", 0), "its weights cannot be read"),
    "config bytes": (lambda path: (path / CONFIG).write_bytes(b"\xff\xfe{}"), "config.json"),
    "no type": (values(CONFIG, model_type=...), "model_type"),
    "unknown type": (values(CONFIG, model_type="no-such"), "no-such"),
    "type a list": (values(CONFIG, model_type=["bert"]), "its config.json"),
    "unknown activation": (values(CONFIG, hidden_act="no-such"), "no-such"),
    "width a word": (values(CONFIG, hidden_size="wide"), "hidden_size"),
    "width odd": (values(CONFIG, hidden_size=33), "33"),
    "dropout": (values(CONFIG, hidden_dropout_prob=5), "dropout"),
    "labels": (values(CONFIG, id2label=[1, 2]), "its config.json"),
    "dtype": (values(CONFIG, dtype="no-such"), "no-such"),
    "padding": (values(CONFIG, pad_token_id=9999), "adding_idx"),
    "images": (values(CONFIG, model_type="vit"), "cannot be loaded"),
    "tokenizer cut": (cut(TOKENIZER, 900), "its tokenizer cannot be read"),
    "tokenizer a list": (write(TOKENIZER, "[]"), "its tokenizer cannot be read"),
    "tokenizer newer": (values(TOKENIZER, model={"type": "Newer"}), "--upgrade transformers tokenizers"),
    "settings a list": (write(SETTINGS, "[1]"), "its tokenizer cannot be read"),
    "settings cut": (cut(SETTINGS, 30), "its tokenizer cannot be read"),
    "length a word": (values(SETTINGS, model_max_length="long"), "its tokenizer cannot be read"),
    "no tokenizer": (lambda path: [file.unlink() for file in path.glob("token*")], "tokenizer.json and vocab.txt"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it(copy: Callable[..., Path], case: str) -> None:
    directory = copy()
    change, named = DAMAGED[case]
    change(directory)
    assert named in refused(directory)


ODD = (None, "x", -1, 10**6, 0, 0.5, [], {}, True, [None], float("nan"))


@pytest.mark.parametrize("name", [CONFIG, SETTINGS, TOKENIZER])
def test_any_value_in_a_file_is_read_or_refused(copy: Callable[..., Path], name: str) -> None:
    """Whatever a key holds; what was right before is right afterwards."""
    directory, draw = copy(), random.Random(4)
    text = (directory / name).read_text()
    found = json.loads(text)
    for _ in range(25):
        key, value = draw.choice(sorted(found)), draw.choice(ODD)
        (directory / name).write_text(json.dumps({**found, key: value}))
        try:
            assert Encoder.load(directory).encode(["a lamp"]).shape == (1, 32)
        except ClusterNSError as error:
            assert "\n" not in str(error), (key, value)
    (directory / name).write_text(text)
    Encoder.load(directory)


def test_a_vocabulary_without_its_merges_is_no_tokenizer(copy: Callable[..., Path]) -> None:
    directory = copy("roberta")
    whole = json.loads((directory / TOKENIZER).read_text())["model"]["vocab"]
    (directory / TOKENIZER).unlink()
    (directory / "vocab.json").write_text(json.dumps(whole))
    edit_json(directory / SETTINGS, tokenizer_class="RobertaTokenizer")
    assert "its tokenizer cannot be read" in refused(directory)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["lighthouse"])
    tokenizer.save_pretrained(directory)
    for load in (Encoder.load, lambda path: load_tokenizer(str(path))):
        text = refused(directory, load)
        assert "106 tokens" in text and "105" in text and "resize_token_embeddings(106)" in text
    model = transformers.AutoModel.from_pretrained(directory)
    model.resize_token_embeddings(106)
    model.save_pretrained(directory)
    assert Encoder.load(directory).encode(["a lighthouse"]).shape == (1, 32)


def test_special_tokens_beyond_the_embeddings_are_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    found = json.loads((directory / TOKENIZER).read_text())
    found["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [700]
    (directory / TOKENIZER).write_text(json.dumps(found))
    assert "up to 700" in refused(directory)


def test_a_slow_tokenizer_is_refused(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ConfigError, match="not a fast one"):
        load_tokenizer(str(copy()))


def test_a_damaged_sentencepiece_model_is_refused(copy: Callable[..., Path]) -> None:
    directory = copy()
    (directory / TOKENIZER).unlink()
    (directory / "spm.model").write_bytes(b"\n\x00")
    edit_json(directory / SETTINGS, tokenizer_class="DebertaV2Tokenizer")
    assert "no words" in refused(directory)


def test_sentencepiece_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers then asks for would not help."""
    (tmp_path / "spm.model").write_bytes(b"")
    error = ValueError("`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`.")
    for missing, remedy in (
        (["sentencepiece"], "pip install sentencepiece."),
        (["sentencepiece", "google.protobuf"], "pip install sentencepiece protobuf."),
    ):
        monkeypatch.setattr(pretrained, "_importable", lambda module, missing=missing: module not in missing)
        text = str(cannot_load(str(tmp_path), "its tokenizer", error))
        assert text.endswith(remedy) and "tiktoken" not in text
    monkeypatch.setattr(pretrained, "_importable", lambda module: True)
    assert "tiktoken" in str(cannot_load(str(tmp_path), "its tokenizer", error))


# ---- code of a model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [CONFIG, SETTINGS])
def test_code_of_a_model_is_never_run(
    copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def asked(*args: Any) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    directory = copy()
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    if place == CONFIG:
        edit_json(directory / CONFIG, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModel": "own.M"})
    else:
        edit_json(directory / SETTINGS, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.T", None]})
    text = refused(directory)
    assert "never run" in text and f"auto_map in its {place}" in text and "trust_remote_code" not in text
    assert not (tmp_path / "ran").exists()


def test_code_beside_an_architecture_of_transformers_is_refused_until_it_is_taken_out(
    copy: Callable[..., Path],
) -> None:
    """Its weights would fit, and transformers' own class might compute something else."""
    directory = copy()
    edit_json(directory / CONFIG, auto_map={"AutoModel": "own.Model"})
    assert "remove auto_map" in refused(directory)
    assert "remove auto_map" in refused(directory, lambda path: load_tokenizer(str(path)))
    edit_json(directory / CONFIG, auto_map=...)
    Encoder.load(directory)


def test_every_call_that_could_run_code_says_not_to() -> None:
    """Of transformers' from_pretrained and from_config, and of sentence-transformers."""
    calls = 0
    for path in Path(clusterns_ray.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("from_pretrained", "from_config", "SentenceTransformer", "pipeline"):
                calls += 1
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                value = given.get("trust_remote_code")
                assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{node.lineno}"
    assert calls >= 4


# ---- whatever a library raises ------------------------------------------------------------------------------------


class PanicException(BaseException):
    """As pyo3 raises it."""


ERRORS: list[BaseException] = [
    Exception("\n\n  odd\n words "),
    KeyError("gelu7"),
    ImportError("no x"),
    MemoryError(),
    AssertionError("a"),
    PanicException("index out of bounds"),
    RecursionError("deep"),
    UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
]


@pytest.mark.parametrize(
    ("where", "error"),
    [*(("AutoConfig", error) for error in ERRORS), ("AutoTokenizer", ERRORS[5]), ("AutoModel", ERRORS[5])],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_whatever_a_library_raises_is_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(getattr(transformers, where), "from_pretrained", fail)
    text = refused(tiny_model)
    assert one_line(error) in text


def test_an_interrupt_is_not_swallowed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Encoder.load(tiny_model)


def test_one_line() -> None:
    assert one_line(ValueError("\n\n first\n\tsecond. ")) == "first second"
    assert one_line(KeyError("gelu7")) == "KeyError: 'gelu7'"
    assert one_line(OSError()) == "OSError"
    assert len(one_line(ValueError("word " * 500))) <= 300


# ---- a hub that does not answer -----------------------------------------------------------------------------------


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a hub that takes connections and never answers."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        pretrained._hub_is_silent.cache_clear()
        yield address
        pretrained._hub_is_silent.cache_clear()


def test_a_hub_that_does_not_answer_is_said_in_time(silent_hub: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="does not answer") as caught:
        Encoder.load("nobody-at-all/no-such-model-here")
    assert time.monotonic() - began < 8
    assert silent_hub in str(caught.value) and "HF_ENDPOINT" in str(caught.value)


def test_the_hubs_cache_is_read_where_the_hub_does_not_answer(
    silent_hub: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / "0123456789012345678901234567890123456789"
    shutil.copytree(tiny_model, snapshot)
    (tmp_path / "models--somebody--tiny" / "refs").mkdir()
    (tmp_path / "models--somebody--tiny" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    assert Encoder.load("somebody/tiny").encode(["a lamp"]).shape == (1, 32)
    assert time.monotonic() - began < 15


def test_a_download_that_stalls_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub answers at first, and then sends a part of a file and no more; its client tries again a few times."""
    from huggingface_hub import constants, file_download

    over = threading.Event()
    asked: list[str] = []

    class Stalls(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", "100")):
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            asked.append(self.path)
            over.wait(30)

        def log_message(self, *given: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalls) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
        pretrained._hub_is_silent.cache_clear()
        try:
            with pytest.raises(ConfigError, match=r"'somebody/tiny' cannot be loaded: its config.json cannot be had"):
                Encoder.load("somebody/tiny")
        finally:
            over.set()
            server.shutdown()
            pretrained._hub_is_silent.cache_clear()
    assert 1 < asked.count("/somebody/tiny/config.json") < 10


def test_a_directory_asks_no_hub(silent_hub: str, tiny_model: Path) -> None:
    began = time.monotonic()
    read_config(str(tiny_model))
    assert time.monotonic() - began < 1


# ---- what is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "first_last"])
def test_weights_have_the_mode_of_the_files_beside_them(tiny_model: Path, tmp_path: Path, pooling: str) -> None:
    before = os.umask(0o027)
    try:
        Encoder.load(tiny_model, pooling=pooling).save(tmp_path / "out")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == (2 if pooling == "first_last" else 1)
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
