"""The driver of ``prepare --workers``, with workers that are calls in this process; on real ones in tests/ray."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers import sentences

from clusterns_ray.config import Config, make_config
from clusterns_ray.data import pieces
from clusterns_ray.data.prepare import prepare as prepare_here
from clusterns_ray.data.token_parts import PartFiles
from clusterns_ray.errors import DataError
from clusterns_ray.launch import distributed_prepare
from clusterns_ray.launch.capacity import ClusterCapacity
from clusterns_ray.launch.distributed_prepare import prepare


@pytest.fixture(autouse=True)
def workers_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts are made in this process, the last one first; their numbers."""
    done: list[int] = []

    def on_workers(files: PartFiles, workers: int) -> Generator[Any]:
        numbers = list(reversed(range(len(files.job.parts))))
        done.extend(numbers)
        made = [files.make_likely(number) for number in numbers]
        yield from reversed(made)

    monkeypatch.setattr(distributed_prepare, "_on_workers", on_workers)
    monkeypatch.setattr(distributed_prepare, "connect", lambda *_, **__: nullcontext())
    monkeypatch.setattr(distributed_prepare, "cluster_capacity", lambda: ClusterCapacity(({"CPU": 2.0},)))
    monkeypatch.setattr(pieces, "PART_BYTES", 400)
    return done


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Callable[..., Config]:
    (tmp_path / "corpus.txt").write_text("\n".join(sentences(60)) + "\n")

    def build(storage: str, **data: Any) -> Config:
        values = {
            "encoder": {"name": str(tiny_model)},
            "data": {"corpus": str(tmp_path / "corpus.txt"), **data},
            "evaluation": {"sts": None},
            "runtime": {"storage_path": storage},
        }
        return make_config(values)

    return build


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_directory(config: Callable[..., Config], tmp_path: Path, workers_here: list[int]) -> None:
    one = prepare_here(config(str(tmp_path / "one")))
    other = prepare(config(str(tmp_path / "other")), workers=2)
    assert len(contents(one.tokens_dir)) > 5 and contents(one.tokens_dir) == contents(other.tokens_dir)
    assert list((tmp_path / "other" / "cache").iterdir()) == [other.tokens_dir] and not other.reused
    begun = len(workers_here)
    assert prepare(config(str(tmp_path / "other")), workers=2).reused and len(workers_here) == begun


def test_an_object_store(config: Callable[..., Config], tmp_path: Path, s3: str, monkeypatch: Any) -> None:
    """The machine that asks keeps nothing; the next one to need the tokens copies them."""
    monkeypatch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path / "here"))
    made = prepare(config(f"{s3}/{tmp_path.name}"), workers=2)
    assert made.address.startswith(f"{s3}/{tmp_path.name}/cache/tokens-") and not made.reused
    assert not [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    again = prepare(config(f"{s3}/{tmp_path.name}"), workers=2)
    assert again.reused and again.manifest == made.manifest
    here = prepare_here(config(f"{s3}/{tmp_path.name}"))
    assert here.reused and here.manifest == made.manifest
    one = prepare_here(config(str(tmp_path / "one")))
    assert contents(here.tokens_dir) == contents(one.tokens_dir)


def test_an_error_is_that_of_one_process_and_leaves_nothing(config: Callable[..., Config], tmp_path: Path) -> None:
    text = (tmp_path / "corpus.txt").read_bytes().split(b"\n")
    (tmp_path / "corpus.txt").write_bytes(b"\n".join([*text[:40], b"\xff", *text[40:]]))
    said = []
    for way in (prepare_here, lambda config: prepare(config, workers=2)):
        with pytest.raises(DataError, match=r"corpus\.txt:41: byte 0xff") as raised:
            way(config(str(tmp_path / "runs")))
        said.append(str(raised.value))
        assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert said[0] == said[1]
    one, other = (config(str(tmp_path / name), limit=30) for name in ("one", "other"))
    assert contents(prepare_here(one).tokens_dir) == contents(prepare(other, workers=2).tokens_dir)
