"""Fixtures for all tests. What they are made of is in ``helpers.py``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports huggingface_hub: no test may need a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports torch: on tiny tensors threads wait for one another more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from helpers import make_tiny_model, write_corpus, write_pairs
from s3_server import s3, store  # noqa: F401  fixtures


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny encoder (3 layers, width 32) of an architecture, made once a session."""
    base = tmp_path_factory.mktemp("models")

    def directory(kind: str) -> Path:
        path = base / kind
        if not path.exists():
            make_tiny_model(path, kind, layers=3)
        return path

    return directory


@pytest.fixture(scope="session")
def tiny_model(tiny_models: Callable[[str], Path]) -> Path:
    """Directory of a tiny BERT."""
    return tiny_models("bert")


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 different sentences, one a line."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture(scope="session")
def sts_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``STSB/dev.jsonl``: 40 graded pairs."""
    path = tmp_path_factory.mktemp("sts")
    write_pairs(path / "STSB" / "dev.jsonl")
    return path


@pytest.fixture(scope="session")
def measured_data() -> Path:
    """Real text and test sets, from the environment variable CLUSTERNS_DATA; without it the test is skipped."""
    value = os.environ.get("CLUSTERNS_DATA")
    if not value or not Path(value).is_dir():
        pytest.skip("CLUSTERNS_DATA is not set to a directory")
    return Path(value)
