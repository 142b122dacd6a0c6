"""Whether what a run needs is on this machine, or on the Hugging Face hub and the hub answers; nothing is downloaded.

With HF_HUB_OFFLINE=1 only this machine is asked.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusterns_ray.errors import ConfigError, first_line
from clusterns_ray.models.resolve import resolve_model

TIMEOUT_S = 8.0
"""Seconds in which the hub has to answer."""

ON_THE_HUB = "on the hub, to be downloaded"
"""What :func:`find_model` says of a model that is not here."""


def find_model(name: str, revision: str | None = None) -> str:
    """Say where an encoder is: in a directory, in the hub's cache, or on the hub.

    Raises:
        ConfigError: it is in none of them, or only in part in the first two and the hub does not answer.
    """
    source = resolve_model(name)
    if os.path.isdir(source):
        lacking = _lacking(Path(source))
        if lacking:
            raise ConfigError(f"encoder {name!r}: {source!r} holds {lacking}.", "Copy or download it again.")
        return f"the directory {source}"
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        lacking = _lacking(Path(snapshot_download(source, revision=revision, local_files_only=True)))
        reason = f"the hub's cache here holds {lacking} of it"
    except LocalEntryNotFoundError:
        lacking = reason = "it is not in the hub's cache here"
    if not lacking:
        return "in the hub's cache here"
    if constants.HF_HUB_OFFLINE:
        raise _elsewhere(name, f"{reason}, and HF_HUB_OFFLINE is set")
    try:
        HfApi().model_info(source, revision=revision, timeout=TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        value = f"encoder {name!r}: the hub has no such model" + (f" of revision {revision!r}." if revision else ".")
        raise ConfigError(value, "Correct encoder.name" + (" or encoder.revision." if revision else ".")) from None
    except Exception as error:  # whatever the HTTP library of this version raises
        raise _elsewhere(
            name, f"{reason}, and {constants.ENDPOINT} does not answer ({first_line(error)[:200]})"
        ) from None
    return ON_THE_HUB


@contextmanager
def settings_of(name: str, revision: str | None = None) -> Iterator[str]:
    """A directory with a hub model's configuration and tokenizer, and no weights, which is removed afterwards.

    Raises:
        ConfigError: they cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory(prefix="clusterns-") as scratch:
        files = ["*.json", "*.txt", "*.model"]
        try:
            directory = snapshot_download(name, revision=revision, allow_patterns=files, cache_dir=scratch)
        except OSError as error:  # as the hub's own errors are
            raise _elsewhere(name, f"its settings cannot be downloaded ({first_line(error)[:200]})") from None
        yield directory


def find_dataset(url: str) -> str | None:
    """Say that the hub has ``hf://NAME[:split]`` or ``hf://OWNER/NAME/FILE``; None where it is here, or where only
    reading it shows whether it is.

    Raises:
        ConfigError: the hub has no such data set, or does not answer.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    name = url.removeprefix("hf://")
    if os.path.isdir(os.path.expanduser(name.rpartition(":")[0] or name)):
        return None
    parts = name.split("/")
    dataset, file = "/".join(parts[:2]).partition(":")[0], "/".join(parts[2:])
    if file and isinstance(try_to_load_from_cache(dataset, file, repo_type="dataset"), str):
        return None
    if constants.HF_HUB_OFFLINE:
        if not file:
            return None  # the `datasets` library keeps a cache of its own
        raise ConfigError(
            f"{url}: it is not in the hub's cache here, and HF_HUB_OFFLINE is set.",
            "Give data.corpus files of this machine, or fetch it where there is a network (hf download --repo-type "
            f"dataset {dataset} {file}) and copy the hub's cache here (HF_HOME).",
        )
    try:
        HfApi().dataset_info(dataset, timeout=TIMEOUT_S)
    except RepositoryNotFoundError:
        raise ConfigError(f"{url}: the hub has no data set {dataset!r}.", "Correct data.corpus.") from None
    except Exception as error:  # whatever the HTTP library of this version raises
        raise ConfigError(
            f"{url}: {constants.ENDPOINT} does not answer ({first_line(error)[:200]}).",
            "Open the network, or give data.corpus files of this machine.",
        ) from None
    return f"{dataset} is on the hub, to be downloaded"


def _lacking(directory: Path) -> str:
    """What a model's directory does not hold, in words; empty where it is complete."""
    there = {path.name for path in directory.iterdir()}
    parts = {
        "config.json": "config.json" in there,
        "weights": any(file.endswith((".safetensors", ".bin")) for file in there),
        "tokenizer": bool(there & {"tokenizer.json", "vocab.txt", "vocab.json", "spiece.model"}),
    }
    return " and ".join(f"no {part}" for part, present in parts.items() if not present)


def _elsewhere(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"encoder {name!r}: {reason}.",
        f"Give encoder.name a directory, or fetch it where there is a network (hf download {name}) and copy the hub's "
        "cache here (HF_HOME).",
    )
