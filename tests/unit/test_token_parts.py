"""Parts of a corpus, made in any order with likely values, are the store that one process makes, byte for byte."""

from __future__ import annotations

import gzip
import json
import random
import string
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clusterns_ray.config import DataConfig
from clusterns_ray.data.corpus import CorpusFile, list_files
from clusterns_ray.data.pieces import cut_corpus, is_continued
from clusterns_ray.data.prepare import TokenJob, read_job
from clusterns_ray.data.token_parts import PartFiles
from clusterns_ray.data.token_store import TokenSettings, TokenStore, count_repeated, merge_parts, prepare_tokens
from clusterns_ray.errors import ClusterNSError, DataError
from clusterns_ray.io.object_store import Place

LINES = [
    "alpha",
    "beta",
    "été",
    "x" * 40,
    "alpha beta gamma",
    "日本",
    "日本 语",
    "",
    "",
    " \t",
    "\u200b",
    "\x01\x02",
    "delta " * 30,
]
"""Lines with text, of which two have no token here; blank ones; and some that look blank."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Latin letters alone: no special tokens, and nothing for a character that it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(string.ascii_lowercase)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def job_of(files: list[Path], tokenizer: Any, cache: Path, part_bytes: int, **options: Any) -> TokenJob:
    data = DataConfig(corpus=[str(file) for file in files], **options)
    listed = list_files(data.corpus or "")
    fingerprint = {"corpus": [asdict(file.source) for file in listed]}
    settings = TokenSettings(tokenizer, 4, rows_per_shard=7, rows_per_batch=3)
    parts = cut_corpus(listed, data.document_column, part_bytes)
    return TokenJob(data, parts, settings, fingerprint, Place(cache), "tokens")


def in_turn(job: TokenJob, directory: Path) -> TokenStore:
    return prepare_tokens(read_job(job), job.settings, directory=directory, fingerprint=job.fingerprint)


def scattered(job: TokenJob, draw: random.Random) -> tuple[dict[str, Any], Path]:
    """Manifest and files of the parts, made in any order."""
    order = list(range(len(job.parts)))
    draw.shuffle(order)
    made = {number: PartFiles(job).make_likely(number) for number in order}
    files = PartFiles(job)
    manifest = merge_parts(
        list(files.in_order(made[number] for number in sorted(order))), job.settings, job.fingerprint
    )
    manifest["counts"]["repeated"] = count_repeated(manifest["files"], files.open)
    return manifest, files.files.local


def contents(directory: Path, manifest: dict[str, Any]) -> dict[str, bytes]:
    return {file["name"]: (directory / file["name"]).read_bytes() for file in manifest["files"]}


def said(work: Callable[[], Any]) -> Any:
    """What it returns, or the error that it raises, in words."""
    try:
        return work()
    except ClusterNSError as error:
        return f"{type(error).__name__}: {error}"


def write(folder: Path, kind: str, lines: list[str], draw: random.Random) -> Path:
    """Lines as a file of a kind; ``\\n`` as any end of a line."""
    end = draw.choice(["\n", "\r\n", "\r"])
    path = folder / f"{draw.randrange(10**9)}.{kind}"
    if kind in ("jsonl", "csv", "parquet"):
        records = [{"text": line, "doc": draw.randrange(3)} for line in lines]
        if kind == "parquet":
            columns = {"text": pa.array(lines, pa.string()), "doc": [record["doc"] for record in records]}
            pq.write_table(pa.table(columns), path, row_group_size=draw.choice([1, 3, 100]))
            return path
        lines = [json.dumps(record) for record in records]
        if kind == "csv":
            lines = ["text,doc", *(f'"{record["text"]}",{record["doc"]}' for record in records)]
        lines = [line for line in lines for line in ([line, ""] if draw.random() < 0.1 else [line])]
    raw = end.join(lines).encode() + (end.encode() if draw.random() < 0.5 else b"")
    path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    return path


@pytest.mark.parametrize(
    ("examples", "part_bytes"), [(8, [40, 1 << 25]), pytest.param(100, [20, 60, 300, 1 << 25], marks=pytest.mark.slow)]
)
def test_any_corpus_in_any_parts_in_any_order(
    examples: int, part_bytes: list[int], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(seed=st.integers(0, 2**32))
    @example(seed=53)  # blank lines behind the sentence that reaches the limit, in another part than it began in
    def check(seed: int) -> None:
        compare_ways(random.Random(seed), part_bytes, tokenizer, tmp_path_factory.mktemp("parts"))

    check()


def compare_ways(draw: random.Random, sizes: list[int], tokenizer: Any, folder: Path) -> None:
    """The files do not depend on who made which part when, nor their content on where the corpus was cut."""
    kinds = draw.choices(["txt", "jsonl", "csv", "parquet", "txt.gz"], k=draw.randint(1, 4))
    files = [write(folder, kind, draw.choices(LINES, k=draw.randint(0, 40)), draw) for kind in kinds]
    limit = draw.choice([None, None, draw.randint(1, 30)])
    column = draw.choice([None, "doc"]) if not any("txt" in kind for kind in kinds) else None
    options = {"limit": limit, "document_column": column}
    results = []
    for part_bytes in sizes:
        job = job_of(files, tokenizer, folder / f"cache-{part_bytes}", part_bytes, **options)
        one = said(lambda job=job: in_turn(job, folder / f"store-{job.cache.local.name}"))
        other = said(lambda job=job: scattered(job, draw))
        if isinstance(one, str):
            assert other == one
            results.append(one)
            continue
        manifest, directory = other
        assert manifest == one.manifest
        assert contents(directory, manifest) == contents(folder / f"store-{job.cache.local.name}", manifest)
        rows = np.arange(len(one))
        tokens = [array.tolist() for array in one.tokens(rows, 0)]
        whole = {name: value for name, value in manifest.items() if name not in ("files", "fingerprint")}
        results.append([whole, one.texts(rows), one.boundaries(rows).tolist(), tokens])
    assert all(result == results[-1] for result in results), "it depends on where the corpus was cut"


@pytest.mark.parametrize("part_bytes", [11, 17, 40])
def test_a_document_that_a_row_without_tokens_begins_goes_over_to_the_next_part(
    part_bytes: int, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(["alpha", "beta", "", "日本", "gamma"] * 12))
    job = job_of([path], tokenizer, tmp_path / "cache", part_bytes)
    one = in_turn(job, tmp_path / "store")
    assert one.boundaries(np.arange(36)).tolist() == [3, 0, 3, 0, 0, 3] + [0, 0, 3] * 10
    manifest, directory = scattered(job, random.Random(1))
    assert manifest == one.manifest
    assert contents(directory, manifest) == contents(tmp_path / "store", manifest)
    likely = [PartFiles(job).make_likely(number) for number in range(len(job.parts))]
    assert any(part is not None and part.pending for part in likely), "no part ends in such a row"


BROKEN = {
    "txt": b"half a \xff character",
    "jsonl": b'{"text": 3}',
    "json": b'{"txt": "no such field"}',
    "ndjson": b"{",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("limit", [None, 25, 60])
def test_the_first_broken_row_is_named_as_in_one_process(
    kind: str, limit: int | None, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / f"broken.{kind}"
    row = b"alpha beta" if kind == "txt" else b'{"text": "alpha"}'
    lines = [row] * 80
    lines[10] = lines[11] = b""
    lines[50] = lines[70] = BROKEN[kind]
    path.write_bytes(b"\n".join(lines))
    for part_bytes in (40, 200):
        job = job_of([path], tokenizer, tmp_path / str(part_bytes), part_bytes, limit=limit)
        assert len(job.parts) > 2
        one = said(lambda job=job, size=part_bytes: in_turn(job, tmp_path / f"store-{size}").manifest)
        other = said(lambda job=job: scattered(job, random.Random(3))[0])
        assert one == other
        if limit == 25:
            assert other["counts"]["rows"] == 27 and other["rows"] == 25
        else:
            assert other.startswith("DataError: ") and f"broken.{kind}:51: " in other


def test_where_files_are_cut(tmp_path: Path) -> None:
    """Pieces join without a gap; what cannot be cut stays whole; small files are read together."""
    lines = [f"line {number}" for number in range(100)]
    (tmp_path / "large.txt").write_text("\n".join(lines))
    (tmp_path / "large.csv").write_text("\n".join(["text", *lines]))
    for name in "ab":
        (tmp_path / f"small-{name}.txt").write_text("one\ntwo\n")
    names = ["small-a.txt", "small-b.txt", "large.txt", "large.csv", "small-a.txt"]
    files = list_files([str(tmp_path / name) for name in names])
    parts = cut_corpus(files, None, 300)
    described = [[(Path(file.location).name, file.begin, file.end) for file in part] for part in parts]
    size = (tmp_path / "large.txt").stat().st_size
    assert described == [
        [("small-a.txt", 0, None), ("small-b.txt", 0, None)],
        *([("large.txt", begin, min(begin + 300, size))] for begin in range(0, size, 300)),
        [("large.csv", 0, None)],
    ]
    assert [is_continued(part) for part in parts] == [False, False, True, True, False]
    assert cut_corpus(files, "doc", 300)[1] == [files[2], files[3]] or len(cut_corpus(files, "doc", 300)) == 2
    hub = CorpusFile(files[0].source, None, "hf://some/set")
    assert cut_corpus([hub._replace(source=replace(hub.source, size=None))], None, 1) == [
        [hub._replace(source=replace(hub.source, size=None))]
    ]


def test_parts_that_are_there_are_not_made_again(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(["alpha beta"] * 60))
    job = job_of([path], tokenizer, tmp_path / "cache", 100)
    files = PartFiles(job)
    for number in range(len(job.parts)):
        files.make_likely(number)
    stamps = {file: file.stat().st_ino for file in files.files.local.iterdir()}
    damaged = sorted(files.files.local.iterdir())[2]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    for number in range(len(job.parts)):
        assert PartFiles(job).make_likely(number) is not None
    changed = {file for file in stamps if file.stat().st_ino != stamps[file]}
    part = {file for file in stamps if file.name.startswith(damaged.name[: len("tokens-00000")])}
    assert changed == part and len(part) < len(stamps), "what is whole stays, and what is damaged is made again"
    other = PartFiles(replace(job, settings=replace(job.settings, rows_per_batch=2)))
    other.make_likely(0)
    assert other.files.local.joinpath("tokens-00000.arrow").stat().st_ino != stamps[sorted(stamps)[0]]


def test_a_machine_that_does_not_see_the_corpus_says_so(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("alpha\n" * 5)
    job = job_of([path], tokenizer, tmp_path / "cache", 100)
    path.write_text("alpha\n" * 6)
    seen = r"a\.txt: it had 30 bytes .* the machine .* another version, of 36 bytes, .* a disk that all of them see"
    with pytest.raises(ClusterNSError, match=seen):
        PartFiles(job).make_likely(0)
    path.unlink()
    with pytest.raises(ClusterNSError, match=r"has no such file there") as raised:
        PartFiles(job).make_likely(0)
    assert not isinstance(raised.value, DataError), "the corpus is not at fault"
