"""Every file of a run, an index and an embedding file, damaged one at a time.

The command that needs it gives the right result, the same to the bit, or refuses the file in one line.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from damage import DAMAGE, digest
from helpers import make_tiny_model, sentences, write_corpus, write_pairs
from typer.testing import CliRunner, Result

from clusterns_ray.cli import app
from clusterns_ray.io.files import DIRECTORY_MANIFEST

pytestmark = pytest.mark.slow

QUICK = {
    "config.yaml-not_utf8", "metrics.jsonl-truncated", "model/model.safetensors-flipped",
    "model/tokenizer.json-flipped", "manifest.json-not_utf8", "index-00000.faiss-flipped", "embeddings.parquet-zeros",
    "out.parquet-flipped",
}  # fmt: skip
"""One damage of each kind of file, tried on every change; the rest is tried every night."""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def assert_no_traceback(result: Result) -> None:
    """A message in one piece with an exit code that says whose fault it is."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (0, 1, 2)
    if result.exit_code:
        assert re.match(r"(error|failed): .{20,}", result.stderr.splitlines()[-1]), result.stderr


@dataclass(frozen=True)
class Place:
    """A project with a finished run, the same run unfinished, an embedding file and an index."""

    root: Path

    def copy(self, tmp_path: Path) -> Path:
        shutil.copytree(self.root, tmp_path / "project", copy_function=shutil.copy2)
        return tmp_path / "project"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("damage")
    make_tiny_model(root / "encoder", layers=1)
    write_corpus(root / "corpus.txt", 120)
    write_pairs(root / "sts" / "STSB" / "dev.jsonl", 20)
    values = {
        "encoder": {"name": "encoder", "pooling": "mean"},
        "data": {"corpus": "corpus.txt", "cache_dir": str(root / "cache")},
        "clustering": {"num_clusters": 4, "start_cosine": 1.0},
        "train": {
            "global_batch_size": 32,
            "shards": 2,
            "max_steps": 4,
            "epochs": 4,
            "learning_rate": 3e-3,
            "precision": "fp32",
        },
        "evaluation": {"sts": "sts", "every_steps": 2, "patience": None},
        "runtime": {"num_workers": 0, "use_gpu": False, "log_every_steps": 1, "name": "run", "trackers": []},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(values))
    (root / "part.txt").write_text("\n".join(sentences(30)) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        trained = call("train", "run.yaml")
        assert trained.exit_code == 0, trained.output
        assert call("encode", "encoder", "part.txt", "-o", "out.parquet").exit_code == 0
        assert call("search", "encoder", "part.txt", sentences(30)[4], "--index", "index").exit_code == 0
        yield Place(root)


RUN_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "clusters.json",
    "centroids.npy",
    "result.json",
    ".lock",
    f"model/{DIRECTORY_MANIFEST}",
    "model/README.md",
    "model/config.json",
    "model/clusterns.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/modules.json",
    "checkpoints/step-00000002/manifest.json",
    "checkpoints/step-00000002/state.pt",
    "checkpoints/step-00000004/manifest.json",
    "checkpoints/step-00000004/state.pt",
)


def cases(*files: str) -> list[object]:
    return [
        pytest.param(name, damage, id=case, marks=() if case in QUICK else pytest.mark.nightly)
        for name in files
        for damage in DAMAGE
        if (case := f"{name}-{damage}")
    ]


def test_the_list_is_all_that_a_run_leaves(project: Place) -> None:
    """Of a model also what the libraries write beside it, which one check covers."""
    run = project.root / "runs" / "run"
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert set(RUN_FILES) <= left
    assert {name for name in left - set(RUN_FILES) if not name.startswith("model/")} == set()
    assert not list(run.rglob(".*.????????")) and not list(run.glob(".model*"))


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "resumed"])
@pytest.mark.parametrize(("name", "damage"), cases(*RUN_FILES))
def test_a_damaged_run(
    project: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str, finished: bool
) -> None:
    root = project.copy(tmp_path)
    monkeypatch.chdir(root)
    run = root / "runs" / "run"
    right = digest(run / "model")
    if not finished:
        (run / "result.json").unlink()
        if name == "result.json":
            return
    DAMAGE[damage](run / name)

    again = call("train", "run.yaml")
    assert_no_traceback(again)
    if again.exit_code == 0:
        assert digest(run / "model") == right, "another model than the undamaged run's"
        assert (run / "result.json").is_file()
        assert call("train", "run.yaml").exit_code == 0
    else:
        assert str(run) in again.stderr, "it does not say where to look"
    for command in (
        ("report", "runs/run", "-o", "report.html"),
        ("evaluate", "runs/run/model", "--sts", "sts", "--dev", "STSB/dev"),
    ):
        assert_no_traceback(call(*command))


@pytest.mark.parametrize(("name", "damage"), cases(*(name for name in RUN_FILES if name.startswith("model/"))))
def test_a_damaged_model_has_no_scores(
    project: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    root = project.copy(tmp_path)
    monkeypatch.chdir(root)
    DAMAGE[damage](root / "runs" / "run" / name)
    result = call("evaluate", "runs/run/model", "--sts", "sts", "--dev", "STSB/dev")
    assert_no_traceback(result)
    harmless = name == "model/README.md" or (name.endswith(DIRECTORY_MANIFEST) and damage == "removed")
    assert (result.exit_code == 0) == harmless, result.output


INDEX_FILES = ("manifest.json", "index-00000.faiss", "embeddings.parquet", ".lock")


@pytest.mark.parametrize(("name", "damage"), cases(*INDEX_FILES))
def test_a_damaged_index_answers_right_or_not_at_all(
    project: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    root = project.copy(tmp_path)
    monkeypatch.chdir(root)
    query = ("search", "encoder", "part.txt", sentences(30)[4], "--index", "index", "--json")
    right = call(*query)
    assert right.exit_code == 0
    DAMAGE[damage](root / "index" / name)
    for _ in range(2):
        result = call(*query)
        assert_no_traceback(result)
        assert result.exit_code or result.stdout == right.stdout


@pytest.mark.parametrize(("name", "damage"), cases("out.parquet"))
def test_a_damaged_embedding_file_is_noticed(
    project: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    root = project.copy(tmp_path)
    monkeypatch.chdir(root)
    encode = ("encode", "encoder", "part.txt", "-o", name)
    assert call(*encode, "--overwrite").exit_code == 0  # as the request knows its files by their place
    right = (root / name).read_bytes()
    DAMAGE[damage](root / name)
    result = call(*encode)
    assert_no_traceback(result)
    assert (result.exit_code == 0) == (damage == "removed"), result.output
    search = call("search", "encoder", name, sentences(30)[4], "--index", "other")
    assert_no_traceback(search)
    if result.exit_code:
        assert search.exit_code
        assert damage == "a_directory" or call(*encode, "--overwrite").exit_code == 0
    assert damage == "a_directory" or (root / name).read_bytes() == right
