"""What transformers loads: only weights that are in the files, no code that comes with a model, and one line that says
why where it fails."""

from __future__ import annotations

import logging
import os
import pickle
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clusterns_ray.errors import ClusterNSError, ConfigError, NonFiniteError
from clusterns_ray.models.resolve import local_model_config

UNLIMITED = 1_000_000
"""Tokens that no text has: the length of a model that cuts none."""

MOST_LAYERS = 1000
"""More than any model has. A damaged config.json could ask for a number that takes hours to make."""

NAMED = 3
"""Weights that a message names; it counts the others."""

_HAS_CODE = "it has code of its own (auto_map in its {file}), and code that comes with a model is never run."
_NO_CODE = (
    "Use a model whose architecture is part of transformers; where transformers' own class is right for this one, "
    "remove auto_map from a copy of it."
)


def read_config(source: str, *, revision: str | None = None, **changes: Any) -> Any:
    """The transformers configuration of a resolved model (see ``models.resolve_model``).

    Args:
        changes: values that replace those of the file.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoConfig

    local_model_config(source)
    with loading(source, "its config.json"):
        config = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False, **hub_options(source, revision), **changes
        )
    check_code(source, "config.json", getattr(config, "auto_map", None))
    return config


def check_code(source: str, file: str, auto_map: Any) -> None:
    """Refuse a model that comes with code: transformers' own class may take its weights and compute something else.

    Args:
        file: which states it, under ``auto_map``.

    Raises:
        ConfigError: it does.
    """
    if auto_map:
        raise _refused(source, _HAS_CODE.format(file=file), _NO_CODE)


def load_weights(
    auto_class: Any, source: str, config: Any, *, revision: str | None = None, shortened: bool = False
) -> tuple[Any, list[str]]:
    """A model in float32 and evaluation mode, and the names of the weights that its files lack, which are drawn.

    Without seeding: whoever lets weights be drawn seeds torch.

    Args:
        auto_class: ``transformers.AutoModel`` or one of its kin.
        shortened: whether ``config`` has fewer layers than the files.

    Raises:
        ConfigError: it cannot be loaded; its files hold weights of other shapes or of further layers, or values that
            are not finite.
    """
    import torch

    _check_readable(source, config)
    with loading(source, "its weights"):
        try:
            model, report = auto_class.from_pretrained(
                source,
                revision=revision,
                config=config,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                **hub_options(source, revision),
            )
        except RuntimeError as error:
            other = _other_shapes(auto_class, source, config)
            if not other:
                raise
            raise _refused(
                source,
                f"its config.json does not describe its weights, which have other shapes: {_some(other)}.",
                "Copy or download both files again from one place.",
            ) from error
    if not shortened and (further := _further_layers(model, report["unexpected_keys"])):
        raise _refused(
            source,
            f"its config.json states {getattr(config, 'num_hidden_layers', 'fewer')} layers, but its weights are of "
            f"more: {_some(further)}.",
            "Correct num_hidden_layers in config.json; encoder.num_layers takes the first layers of a model.",
        )
    bad = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if bad:
        raise NonFiniteError(
            f"encoder {source!r} cannot be used: its weights hold values that are not finite (NaN or infinity): "
            f"{_some(bad)}.",
            "Copy or download it again, or take an earlier checkpoint.",
        )
    return model, sorted(report["missing_keys"])


def check_complete(source: str, missing: Iterable[str]) -> None:
    """Refuse a model whose files lack weights that an embedding depends on; a pooler's are never read.

    Raises:
        ConfigError: it names some of them.
    """
    lacking = [name for name in missing if "pooler" not in name.split(".")]
    if not lacking:
        return
    raise _refused(
        source,
        f"its files lack weights, which would have to be drawn at random: {_some(lacking)}.",
        "Their names must be those of the architecture in config.json: save the model itself with save_pretrained, not "
        "a module around it, or copy or download it again.",
    )


def check_vocabulary(source: str, tokenizer: Any, rows: int | None) -> None:
    """Refuse a tokenizer with ids for which the model has no embedding.

    Args:
        rows: embeddings of the model; None if unknown.

    Raises:
        ConfigError: with both numbers and the remedy.
    """
    ids = {*tokenizer.get_vocab().values(), *tokenizer.all_special_ids, *tokenizer("a")["input_ids"]}
    if rows is not None and max(ids) >= rows:
        raise _refused(
            source,
            f"its tokenizer has token ids up to {max(ids)} ({len(tokenizer)} tokens), but the model has embeddings for "
            f"{rows} tokens.",
            "Use the tokenizer that the model came with, or, where tokens were added, call "
            f"model.resize_token_embeddings({max(ids) + 1}), train them, and save both.",
        )


def vocabulary_size(config: Any) -> int | None:
    """Rows of the embedding table that a transformers configuration describes; None where it does not say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def length_limit(value: Any) -> int | None:
    """A length in tokens as a model's files state it; None for numbers that mean no limit, such as -1 and 1e30."""
    return int(value) if isinstance(value, (int, float)) and 0 < value < UNLIMITED else None


@contextmanager
def loading(source: str, part: str) -> Iterator[None]:
    """Quieten transformers, and turn whatever a library raises inside into one ConfigError.

    Args:
        part: what is loaded, in words: ``its tokenizer``.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except ClusterNSError:
        raise
    except Exception as error:
        raise cannot_load(source, part, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library written in Rust, and no Exception
            raise
        raise cannot_load(source, part, error) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def cannot_load(source: str, part: str, error: BaseException) -> ConfigError:
    """What to say when a library cannot load ``part`` of a model: the reason in one line, and a remedy that helps."""
    text = one_line(error)
    if "trust_remote_code" in text or "custom code" in text:
        return _refused(source, _HAS_CODE.format(file="config.json"), _NO_CODE)
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in text:
        reason = (
            "its weights file is a pickle that holds more than tensors, and unpickling it could run code, so it is not "
            "read"
        )
        remedy = (
            "Where you trust it, load it by itself and write a directory with save_pretrained, which makes a "
            "model.safetensors."
        )
    elif part == "its tokenizer" and (lacking := _sentencepiece_lacks(source, text)):
        reason = f"its tokenizer is a SentencePiece model, and {' and '.join(lacking)} cannot be imported here"
        remedy = f"pip install {' '.join(lacking)}."
    elif Path(source).is_dir():
        reason = f"{part} cannot be read ({text})"
        remedy = {
            "its config.json": "Correct it, or copy or download the model again.",
            "its tokenizer": "Copy or download it again; one that a newer version wrote needs "
            "pip install --upgrade transformers tokenizers.",
        }.get(part, "Copy or download it again, or write it anew with save_pretrained.")
    else:
        reason = f"{part} cannot be had ({text})"
        remedy = "Check the name and the revision; without a network give a directory or package:PYTHON_PACKAGE/SUBDIR."
    return _refused(source, f"{reason}.", remedy)


def one_line(error: BaseException, length: int = 300) -> str:
    """An error's message without line ends, shortened; with the type where the message alone says little."""
    text = " ".join(str(error).split()).rstrip(".")
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= length else text[: length - 3].rsplit(" ", 1)[0] + "..."


def hub_options(source: str, revision: str | None = None) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a model of the hub, by which it reads the cache where the hub does not answer.

    The hub's client tries each file for a minute; here the hub is asked once. HF_HUB_ETAG_TIMEOUT sets the seconds.

    Raises:
        ConfigError: the hub does not answer, and the model is not in its cache.
    """
    return {} if os.path.isdir(source) else {"local_files_only": _hub_is_silent(source, revision)}


@cache
def _hub_is_silent(source: str, revision: str | None) -> bool:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        return True
    wait = constants.HF_HUB_ETAG_TIMEOUT
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(source, "config.json", revision=revision), timeout=wait)
            outcome.append(None)
        except HFValidationError:
            outcome.append(None)  # transformers says so
        except HfHubHTTPError as error:
            status = error.response.status_code
            outcome.append(f"answers with HTTP status {status}" if status == 429 or status >= 500 else None)
        except Exception as error:  # whatever the HTTP library of this version raises
            outcome.append(f"does not answer ({one_line(error)})")

    # A time-out of the client is of each read and write, and there is none of name servers.
    thread = threading.Thread(target=ask, daemon=True, name="ask_hub")
    thread.start()
    thread.join(2 * wait)
    reason = outcome[0] if outcome else f"does not answer within {2 * wait} s"
    if reason is None:
        return False
    if isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
        return True
    raise _refused(
        source,
        f"{constants.ENDPOINT} {reason}, and the model is not in the hub's cache here.",
        "Open the network or correct HF_ENDPOINT; without a network give a directory or package:PYTHON_PACKAGE/SUBDIR.",
    )


def _refused(source: str, reason: str, remedy: str) -> ConfigError:
    return ConfigError(f"encoder {source!r} cannot be loaded: {reason}", remedy)


def _check_readable(source: str, config: Any) -> None:
    """Refuse what would be read only in part."""
    if getattr(config, "quantization_config", None):
        raise _refused(
            source,
            "its weights are quantised (quantization_config in its config.json), and float32 is needed here.",
            "Name the model that it was made from.",
        )
    if (Path(source) / "adapter_config.json").is_file():
        raise _refused(
            source,
            "it has an adapter beside its weights (adapter_config.json), which would be left out.",
            "Merge it (merge_and_unload of the peft library), and save the model that comes out with save_pretrained.",
        )
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and not 1 <= layers <= MOST_LAYERS:
        raise _refused(source, f"its config.json states {layers} layers.", "Correct it, or copy or download it again.")


def _further_layers(model: Any, unexpected: Iterable[str]) -> list[str]:
    """The weights that are named as the model's layers are, with another number, and for which it has no place."""

    def pattern(name: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)

    own = {pattern(name) for name in model.state_dict()}
    prefix = f"{model.base_model_prefix}."
    names = [name for name in unexpected if "*" in pattern(name)]
    return sorted(name for name in names if {pattern(name), pattern(name).removeprefix(prefix)} & own)


def _other_shapes(auto_class: Any, source: str, config: Any) -> list[str]:
    """Weights of a directory's files whose shape is not what ``config`` says, with both shapes."""
    import torch
    from safetensors import safe_open

    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False)
    prefix = f"{model.base_model_prefix}."
    expected = {name.removeprefix(prefix): list(value.shape) for name, value in model.state_dict().items()}
    differing = []
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                wanted, shape = expected.get(name.removeprefix(prefix)), file.get_slice(name).get_shape()
                if wanted is not None and wanted != shape:
                    differing.append(f"{name} is {shape} and not {wanted}")
    return differing


def _sentencepiece_lacks(source: str, text: str) -> list[str]:
    """The packages that a SentencePiece tokenizer needs, and that are not installed; none for another tokenizer."""
    path = Path(source)
    models = any(path.glob("*.model")) if path.is_dir() else "sentencepiece" in text.lower() or "tiktoken" in text
    if not models or (path / "tokenizer.json").is_file():
        return []
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    return [package for package, module in packages.items() if not _importable(module)]


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _some(names: list[str]) -> str:
    """The first of them, and how many more."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
