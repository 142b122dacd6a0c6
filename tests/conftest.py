"""Fixtures for all tests. What they are made of is in ``helpers.py``."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub: no test may need a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports torch: on tiny tensors threads wait for one another more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock
from helpers import make_tiny_model, write_corpus, write_pairs
from s3_server import s3, store  # noqa: F401  fixtures


def pytest_collection_finish() -> None:
    """What all modules hold stays to the end; Python need not look through it again and again."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one temporary directory of all the processes among which pytest-xdist deals the tests."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def made_once(shared_directory: Path) -> Callable[[str, Callable[[], Any]], Any]:
    """``made_once(name, make)``: what ``make()`` returns, called by the first process that asks and kept for all."""

    def get(name: str, make: Callable[[], Any]) -> Any:
        kept = shared_directory / f"{name}.pickle"
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                kept.write_bytes(pickle.dumps(make()))
        return pickle.loads(kept.read_bytes())

    return get


@pytest.fixture(scope="session")
def tiny_models(shared_directory: Path, made_once: Callable[..., Any]) -> Callable[[str], Path]:
    """The directory of a tiny encoder (3 layers, width 32) of an architecture, made once a session."""

    def directory(kind: str) -> Path:
        path = shared_directory / "models" / kind
        made_once(f"model-{kind}", lambda: make_tiny_model(path, kind, layers=3))
        return path

    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_models: Callable[[str], Path]) -> Path:
    """Directory of a tiny BERT."""
    return tiny_models("bert")


@pytest.fixture(scope="session")
def corpus_file(shared_directory: Path, made_once: Callable[..., Any]) -> Path:
    """300 different sentences, one a line."""
    return made_once("corpus", lambda: write_corpus(shared_directory / "corpus.txt"))


@pytest.fixture(scope="session")
def sts_dir(shared_directory: Path, made_once: Callable[..., Any]) -> Path:
    """A directory with ``STSB/dev.jsonl``: 40 graded pairs."""
    path = shared_directory / "sts"
    made_once("sts-pairs", lambda: write_pairs(path / "STSB" / "dev.jsonl"))
    return path


@pytest.fixture(scope="session")
def measured_data() -> Path:
    """Real text and test sets, from the environment variable CLUSTERNS_DATA; without it the test is skipped."""
    value = os.environ.get("CLUSTERNS_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("CLUSTERNS_DATA is not set to a directory")
    return Path(value)
