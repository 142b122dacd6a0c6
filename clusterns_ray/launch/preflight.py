"""What can be known to be wrong before anything slow or costly starts; takes well under two seconds, without torch."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

from clusterns_ray.config import Config
from clusterns_ray.data.corpus import list_sources
from clusterns_ray.data.documents import list_documents
from clusterns_ray.data.prepare import cache_directory, corpus_is_documents, documents_of
from clusterns_ray.errors import ConfigError, StorageError
from clusterns_ray.evaluation.hub import HUB
from clusterns_ray.evaluation.lee import LEE, check_lee
from clusterns_ray.evaluation.sts import check_pairs_exist
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.files import write_probe
from clusterns_ray.io.object_store import Store, is_url, local_copy
from clusterns_ray.io.paths import check_outlasts_job
from clusterns_ray.launch.ray_cluster import check_ray_directory
from clusterns_ray.launch.staging import run_place
from clusterns_ray.models.base_model import complete
from clusterns_ray.models.resolve import local_model_config, resolve_model
from clusterns_ray.training.run_files import check_config
from clusterns_ray.training.trackers import missing_packages

RESERVED = ("cache", "staged")
"""Names in an object store's ``runtime.storage_path`` that are those of prepared data and of its copies."""

STORE_TIMEOUT_S = 20.0


def check_request(config: Config, note: OnNote = lambda text: None) -> Config:
    """Refuse what cannot work.

    Args:
        note: called with how the configuration differs from the model that it starts from.

    Returns:
        ``config`` with what it leaves to that model.

    Raises:
        ConfigError, DataError: with the value, the reason and the remedy.
    """
    if config.runtime.num_workers != 0:
        check_ray_directory()
    check_data(config)
    config = check_encoder(config, note)
    check_storage(config)
    check_name(config)
    check_trackers(config)
    return config


def check_data(config: Config) -> None:
    """Check that the corpus, the documents and the STS sets are there."""
    if documents := documents_of(config):
        list_documents(documents)
    if not corpus_is_documents(config):
        list_sources(config.data.corpus or "")
    check_sts(config)


def check_sts(config: Config) -> None:
    """Check that the dev set, and those of ``evaluation.also``, are there."""
    sts = config.evaluation.sts
    for key, names in (("dev", [config.evaluation.dev]), ("also", config.evaluation.also)):
        for name in names:
            if name == LEE:
                check_lee()
            elif sts == "hf" and name not in HUB:
                raise ConfigError(
                    f"evaluation.{key} is {name!r}, but with evaluation.sts hf it must be one of those there.",
                    f"Choose one of {', '.join(HUB)}.",
                )
            elif sts not in (None, "structure", "hf"):
                check_pairs_exist(Path(sts).expanduser(), name)


def check_encoder(config: Config, note: OnNote = lambda text: None) -> Config:
    """Check that the encoder is there, and the limits of its config.json, without loading it.

    Returns:
        ``config`` with the pooling and prompt that it leaves to the model; ``note`` is called where it differs from it.
    """
    model = local_model_config(resolve_model(config.encoder.name))
    layers = (model or {}).get("num_hidden_layers") or (model or {}).get("n_layers")
    if isinstance(layers, int) and 0 < layers < (config.encoder.num_layers or 0):
        raise ConfigError(
            f"encoder.num_layers is {config.encoder.num_layers}, but {config.encoder.name} has {layers} layers.",
            f"Use at most {layers}, or leave it unset.",
        )
    if config.loss.teacher is not None:
        resolve_model(config.loss.teacher)
    return complete(config, note)


def check_lasting(config: Config) -> None:
    """Check that the results outlast the job that this process may be part of."""
    for key, path in (("runtime.storage_path", config.runtime.storage_path), ("data.cache_dir", config.data.cache_dir)):
        if path is not None and not is_url(path):
            check_outlasts_job(key, path)


def check_storage(config: Config) -> None:
    """Check that the directories of the configuration last and can be written."""
    check_lasting(config)
    path = config.runtime.storage_path
    if is_url(path):
        check_store("runtime.storage_path", path)
        check_writable("runtime.local_path", str(local_copy(path, config.runtime.local_path)))
    else:
        check_writable("runtime.storage_path", path)
    if config.data.cache_dir is not None:
        check_writable("data.cache_dir", config.data.cache_dir)


def check_store(key: str, url: str) -> None:
    """Write an object, read it and remove it: the rights to each are given apart."""
    outcome: list[StorageError | None] = []

    def work() -> None:
        name = f".write-test-{uuid.uuid4().hex[:8]}"
        try:
            store = Store(url, attempts=1)
            store.write(name, b"clusterns")
            same = store.read(name) == b"clusterns"
            store.delete(name)
            other = StorageError(
                f"{url!r} returns other data than was written.", "Check that store, or choose another."
            )
            outcome.append(None if same else other)
        except StorageError as error:
            outcome.append(error)

    # The clients of some clouds try for minutes where there is no network.
    thread = threading.Thread(target=work, daemon=True, name="check_store")
    thread.start()
    thread.join(STORE_TIMEOUT_S)
    silence = f"{url!r} did not answer within {STORE_TIMEOUT_S:.0f} s."
    error = outcome[0] if outcome else StorageError(silence, "Check the network, the URL and the credentials.")
    if error is not None:
        raise ConfigError(f"{key}: {error.message}", error.remedy)


def check_writable(key: str, path: str) -> None:
    """Make the directory, and write to it: permissions alone do not show a full or read-only disk."""
    directory = Path(path).expanduser().resolve()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_probe(directory / f".write-test-{uuid.uuid4().hex[:8]}")
    except OSError as error:
        raise ConfigError(
            f"{key} is {path!r}, where nothing can be written ({error.strerror}).",
            "Choose a directory that can be written.",
        ) from None


def check_name(config: Config) -> None:
    """A name in use belongs to one configuration: the same resumes, another is refused."""
    place = run_place(config)
    if place.local == cache_directory(config) or (place.store and config.runtime.name in RESERVED):
        raise ConfigError(
            f"runtime.name is {config.runtime.name!r}, but {place.path!r} is where prepared data is kept.",
            "Choose another runtime.name.",
        )
    saved = place.read("config.yaml")
    if saved is not None:
        check_config(saved, complete(config), place.path)


def check_trackers(config: Config) -> None:
    """Check that the packages of ``runtime.trackers`` are installed."""
    missing = missing_packages(config.runtime.trackers)
    if missing:
        raise ConfigError(
            f"runtime.trackers is {config.runtime.trackers!r}, but {', '.join(missing)} is not installed here.",
            f"Run pip install {' '.join(missing)}, or leave it out.",
        )


def warn_of_faiss(note: OnNote) -> None:
    """Add a note where both faiss wheels are installed; that neither is there is fine."""
    from clusterns_ray.clustering.backend import faiss_conflict

    conflict = faiss_conflict()
    if conflict:
        note(conflict)
