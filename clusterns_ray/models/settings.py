"""What the files beside a model's weights say of its embeddings: those that a run writes, and those of
sentence-transformers, which are taken as they are or refused by name. Found without importing torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusterns_ray.errors import ConfigError
from clusterns_ray.models.pretrained import UNLIMITED, hub_options, length_limit, loading

SETTINGS_FILE = "clusterns.json"
"""What a directory written by ``Encoder.save`` needs besides the transformer: pooling, length, prompt."""


@dataclass(frozen=True)
class ModelSettings:
    """What a model says of its embeddings; None where it says nothing."""

    pooling: str | None = None
    max_length: int | None = None
    prompt: str | None = None
    """a template that holds ``{sentence}``"""
    normalize: bool = False
    denoise: bool = False
    lower_case: bool = False
    """whether text is put into lower case before it is tokenised"""
    counts_prompt: bool = False
    """whether the tokens of the prompt are among those of ``max_length``"""
    similarity: str = "cosine"

    @property
    def other_similarity(self) -> str | None:
        """The similarity that embeddings are meant for, where it ranks otherwise than the cosine; None where it does
        not, as with embeddings of unit length."""
        return None if self.similarity == "cosine" or self.normalize else self.similarity


SAVED = ("pooling", "max_length", "prompt", "normalize", "denoise", "lower_case")
"""The keys of :data:`SETTINGS_FILE`."""

POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""Pooling modes of sentence-transformers that are supported, and what they are called here."""

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The keys by which releases before 6 name pooling modes."""

_ANY = object()
"""Every value of a key is right, as it is read elsewhere or changes no embedding."""

_KWARGS = {
    "trust_remote_code": _ANY,  # sentence-transformers ignores it as well
    "attn_implementation": _ANY,
    "use_cache": _ANY,
    "output_hidden_states": _ANY,
    "use_fast": (True,),
    "padding_side": _ANY,  # rows are padded on the right, and padding is never read
    "dtype": ("float32", "auto", None),
    "torch_dtype": ("float32", "auto", None),
}
_SUPPORTED: dict[str, dict[str, Any]] = {
    "Transformer": {
        "max_seq_length": _ANY,
        "do_lower_case": (True, False, None),
        "transformer_task": ("feature-extraction",),
        "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
        "module_output_name": ("token_embeddings",),
        "processing_kwargs": ({}, None),
        "query_length": (None,),
        "document_length": (None,),
        "query_expansion": (None,),
        "tokenizer_name_or_path": (None,),
        "unpad_inputs": _ANY,
        **dict.fromkeys(("model_args", "tokenizer_args", "config_args"), _KWARGS),
        **dict.fromkeys(("model_kwargs", "processor_kwargs", "config_kwargs"), _KWARGS),
    },
    "Pooling": {
        "word_embedding_dimension": _ANY,
        "embedding_dimension": _ANY,
        "pooling_mode": _ANY,
        "include_prompt": (True, False),
        **dict.fromkeys(_MODES, (True, False)),
    },
    "Normalize": {
        "module_input_name": ("sentence_embedding",),
        "module_output_name": ("sentence_embedding", None),
    },
    "model": {
        "__version__": _ANY,
        "requirements": _ANY,
        "model_type": ("SentenceTransformer",),
        "prompts": _ANY,
        "default_prompt_name": _ANY,
        "similarity_fn_name": (None, "cosine", "dot", "euclidean", "manhattan"),
        "truncate_dim": (None,),
    },
}
"""The keys of the files of sentence-transformers, each with the values that are supported, or with keys of its own."""

_ORDERS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])

_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


def read_settings(source: str, *, revision: str | None = None) -> ModelSettings:
    """What a resolved model (see ``models.resolve_model``) says of its embeddings; a plain transformer says nothing.

    Raises:
        ConfigError: a file is damaged, or asks for something that is not supported, which it names.
    """
    files = _Files(source, revision)
    saved = files.read(SETTINGS_FILE)
    if saved is not None:
        files.check(SETTINGS_FILE, saved, dict.fromkeys(SAVED, _ANY))
        return ModelSettings(**saved)
    modules = files.read("modules.json", list)
    if modules is None:
        return ModelSettings()
    folders = _module_folders(files, modules)
    transformer: dict[str, Any] = {}
    for name in _TRANSFORMER_FILES:
        if transformer := files.read(name) or {}:
            files.check(name, transformer, _SUPPORTED["Transformer"])
            break
    pooling_file = f"{folders['Pooling']}/config.json"
    pooling = files.read(pooling_file)
    if pooling is None:
        raise files.refused(f"it has no {pooling_file}. Copy or download it again")
    files.check(pooling_file, pooling, _SUPPORTED["Pooling"])
    if "Normalize" in folders:
        name = f"{folders['Normalize']}/config.json"
        files.check(name, files.read(name) or {}, _SUPPORTED["Normalize"])
    model = files.read("config_sentence_transformers.json") or {}
    files.check("config_sentence_transformers.json", model, _SUPPORTED["model"])
    prefix = _default_prompt(files, model)
    if prefix and not pooling.get("include_prompt", True):
        raise files.unsupported(pooling_file, "include_prompt", False)
    length = transformer.get("max_seq_length")
    if length is None:
        length = (files.read("tokenizer_config.json") or {}).get("model_max_length")
    return ModelSettings(
        pooling=_pooling(files, pooling_file, pooling),
        max_length=length_limit(length) or UNLIMITED,
        prompt=prefix + "{sentence}" if prefix else None,
        normalize="Normalize" in folders,
        lower_case=bool(transformer.get("do_lower_case")),
        counts_prompt=True,
        similarity=model.get("similarity_fn_name") or "cosine",
    )


class _Files:
    """The JSON files of a model, in a directory or on the hub."""

    def __init__(self, source: str, revision: str | None) -> None:
        self.source, self.revision = source, revision

    def read(self, name: str, kind: type = dict) -> Any:
        """What a file holds; None where there is none."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise self.refused(f"its {name} cannot be read ({error}). Copy or download it again") from None
        if not isinstance(value, kind):
            raise self.refused(f"its {name} holds a {type(value).__name__} and not a {kind.__name__}. Copy it again")
        return value

    def _path(self, name: str) -> Path | None:
        if Path(self.source).is_dir():
            return Path(self.source) / name
        from transformers.utils.hub import cached_file

        options = hub_options(self.source, self.revision)
        with loading(self.source, f"its {name}"):
            file = cached_file(
                self.source,
                name,
                revision=self.revision,
                _raise_exceptions_for_missing_entries=False,
                # A cache that never held the file is as good as a model without it.
                _raise_exceptions_for_connection_errors=not options["local_files_only"],
                _raise_exceptions_for_gated_repo=True,
                **options,
            )
        return None if file is None else Path(file)

    def check(self, file: str, values: Mapping[str, Any], supported: Mapping[str, Any], within: str = "") -> None:
        for key, value in values.items():
            known = supported.get(key, ())
            if isinstance(known, Mapping) and isinstance(value, Mapping | None):
                self.check(file, value or {}, known, f"{within}{key}.")
            elif known is not _ANY and not (isinstance(known, Collection) and value in known):
                raise self.unsupported(file, within + key, value)

    def unsupported(self, file: str, key: str, value: Any) -> ConfigError:
        return self.refused(
            f"its {file} sets {key} to {value!r}, which is not supported here: its embeddings would not be those of "
            f"sentence-transformers. Name another model, or a copy of this one without {key}, which is another encoder"
        )

    def refused(self, reason: str) -> ConfigError:
        return ConfigError(f"encoder {self.source!r}: {reason}.")


def _module_folders(files: _Files, modules: list[Any]) -> dict[str, str]:
    """The folder of each module by its class."""
    folders: dict[str, str] = {}
    names = []
    for module in modules:
        if not (isinstance(module, dict) and isinstance(module.get("type"), str)):
            raise files.refused("its modules.json does not name a type for each module. Copy or download it again")
        kind = module["type"].rpartition(".")[2]
        known = module["type"].startswith("sentence_transformers.") and kind in ("Transformer", "Pooling", "Normalize")
        if not known:
            raise files.refused(
                f"its modules.json has the module {module['type']}, which is not one of sentence-transformers' "
                "Transformer, Pooling and Normalize, so it would be encoded wrongly here. Name another model"
            )
        folders[kind] = str(module.get("path", "")).strip("/")
        names.append(kind)
    if names not in _ORDERS:
        raise files.refused(
            f"its modules.json has the modules {', '.join(names) or 'none'}, and Transformer, Pooling and, where it "
            "normalises, Normalize are supported, in this order. Name another model"
        )
    if folders["Transformer"]:
        raise files.refused(
            f"its modules.json has the Transformer in {folders['Transformer']!r}, as old releases of "
            "sentence-transformers had it. Write it anew with SentenceTransformer(DIRECTORY).save(OTHER), and name that"
        )
    return folders


def _default_prompt(files: _Files, model: Mapping[str, Any]) -> str:
    """The text that is put before every sentence."""
    name, prompts = model.get("default_prompt_name"), model.get("prompts") or {}
    if name is None:
        return ""
    prompt = prompts.get(name, 0) if isinstance(prompts, Mapping) else 0
    if not isinstance(prompt, str | None) or "{sentence}" in (prompt or ""):
        raise files.unsupported("config_sentence_transformers.json", "default_prompt_name", name)
    return prompt or ""


def _pooling(files: _Files, file: str, config: Mapping[str, Any]) -> str:
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for key, name in _MODES.items() if config.get(key)] or "mean"
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    if not isinstance(mode, str) or mode not in POOLINGS:
        key = "pooling_mode" if "pooling_mode" in config else "the pooling mode"
        raise files.unsupported(file, key, mode)
    return POOLINGS[mode]
