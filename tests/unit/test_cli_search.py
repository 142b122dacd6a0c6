"""``clusterns encode`` and ``clusterns search``: what they print, and what they refuse."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import sentences, write_corpus
from typer.testing import Result

from clusterns_ray.console import progress
from clusterns_ray.io.events import Note, RowsDone
from clusterns_ray.models.encoder import Encoder


@pytest.fixture
def clusterns(clusterns: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    """The command, in this process, beside ``corpus.txt``."""
    write_corpus(tmp_path / "corpus.txt")
    return clusterns


def refused(result: Result, *parts: str) -> None:
    """Exit code 2, one line, no traceback, and the line holds every part."""
    assert isinstance(result.exception, SystemExit), f"a traceback: {result.exception!r}"
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.endswith(lines[0] + "\n"), result.stderr
    assert [part for part in parts if part not in lines[0]] == [], lines[0]


# ---- encode -------------------------------------------------------------------------------------------------------


def test_encode(clusterns: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("encode", tiny_model, "corpus.txt", "-o", "out.parquet", "--dtype", "float16", "--limit", "50")
    said = clusterns(*arguments, "--normalize")
    assert said.exit_code == 0, said.output
    out = tmp_path / "out.parquet"
    assert said.stdout.splitlines() == [
        "Counting the sentences of corpus.txt",
        "50 sentences",
        "Joining 1 parts",
        f"Wrote {out} (50 sentences, 32 values each)",
    ]
    table = pq.read_table(out)
    assert table["text"].to_pylist() == sentences(300)[:50]
    np.testing.assert_allclose(np.linalg.norm(table["embedding"].to_pylist(), axis=1), 1, atol=2e-3)
    again = clusterns(*arguments, "--normalize")
    assert again.stdout == f"Found, and left as it is: {out} (50 sentences, 32 values each)\n"
    refused(clusterns(*arguments), "out.parquet", "--normalize was True and is False", "--overwrite")
    assert clusterns(*arguments, "--overwrite").exit_code == 0


ENCODE_REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no model": (["/none/model", "corpus.txt", "-o", "o.parquet"], ["'/none/model'", "no config.json"]),
    "no corpus": (["MODEL", "none.txt", "-o", "o.parquet"], ["none.txt", "no such file"]),
    "one of several": (["MODEL", "corpus.txt", "none.txt", "-o", "o.parquet"], ["none.txt", "no such file"]),
    "wrong column": (["MODEL", "table.csv", "-o", "o.parquet"], ["'text'", "the columns are: 'a', 'b'"]),
    "suffix": (["MODEL", "corpus.txt", "-o", "o.npy"], ["must end in .parquet"]),
    "place": (["MODEL", "corpus.txt", "-o", "none/o.parquet"], ["none/o.parquet", "cannot be written"]),
    "dtype": (["MODEL", "corpus.txt", "-o", "o.parquet", "--dtype", "int8"], ["float32 or float16"]),
    "workers": (["MODEL", "corpus.txt", "-o", "o.parquet", "--workers", "-1"], ["--workers is -1"]),
    "batch": (["MODEL", "corpus.txt", "-o", "o.parquet", "--batch-size", "0"], ["--batch-size is 0"]),
    "pooling": (["MODEL", "corpus.txt", "-o", "o.parquet", "--pooling", "max"], ["--pooling is 'max'"]),
    "mask": (["MODEL", "corpus.txt", "-o", "o.parquet", "--pooling", "mask"], ["mask", "prompt"]),
    "length": (["MODEL", "corpus.txt", "-o", "o.parquet", "--max-length", "2"], ["max_length is 2", "special tokens"]),
}


@pytest.mark.parametrize("case", ENCODE_REFUSED)
def test_encode_refuses(clusterns: Callable[..., Result], tiny_model: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    arguments, parts = ENCODE_REFUSED[case]
    refused(clusterns("encode", *(str(tiny_model) if each == "MODEL" else each for each in arguments)), *parts)
    assert not (tmp_path / "o.parquet").exists()


@pytest.mark.nightly
def test_encode_killed_from_outside_and_given_again(tiny_model: Path, tmp_path: Path) -> None:
    """By SIGKILL at a moment nobody chose; then the very bytes of a file that was written undisturbed."""
    corpus = write_corpus(tmp_path / "corpus.txt", 6000)

    def start(out: str) -> subprocess.Popen[bytes]:
        arguments = ["encode", tiny_model, corpus, "-o", out, "--batch-size", "4"]
        command = [sys.executable, "-m", "clusterns_ray.cli", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )

    def parts() -> int:
        return len(list((tmp_path / "killed.parquet.parts").glob("part-*.parquet")))

    assert start("whole.parquet").wait(120) == 0
    process = start("killed.parquet")
    deadline = time.monotonic() + 60
    while parts() < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(float(np.random.default_rng().uniform(0, 0.1)))
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended before it could be killed"
    assert parts() >= 2 and not (tmp_path / "killed.parquet").exists()
    assert start("killed.parquet").wait(120) == 0
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not (tmp_path / "killed.parquet.parts").exists()


# ---- search -------------------------------------------------------------------------------------------------------


def test_search(clusterns: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    said = clusterns("search", tiny_model, "corpus.txt", sentences(300)[7], "a lamp", "-k", "3")
    assert said.exit_code == 0, said.output
    lines = said.stdout.splitlines()
    assert len(lines) == 8 and (lines[0], lines[4]) == (f'"{sentences(300)[7]}"', '"a lamp"')
    assert lines[1] == f"  1   1.000  {sentences(300)[7]}"
    for rank, line in enumerate(lines[5:], 1):
        assert re.fullmatch(rf"  {rank}  [ -]\d\.\d{{3}}  (.*)", line)
        assert line[13:] in sentences(300)
    assert f"Building the index in {tmp_path / 'corpus.txt.index'}" in said.stderr
    again = clusterns("search", tiny_model, "corpus.txt", "a lamp", "-k", "3")
    assert again.stdout.splitlines() == lines[4:]
    assert again.stderr.startswith(f"The index in {tmp_path / 'corpus.txt.index'} is up to date: 300 sentences")


def test_search_as_json(clusterns: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    """One object a line, whatever the text holds, and nothing else on stdout."""
    (tmp_path / "t.jsonl").write_text('{"s": "zwei\\nZeilen"}\n{"s": "雪"}\n', encoding="utf-8")
    said = clusterns("search", tiny_model, "t.jsonl", "zwei", "雪", "--text-column", "s", "-k", "2", "--json")
    assert said.exit_code == 0, said.output
    answers = [json.loads(line) for line in said.stdout.splitlines()]
    assert [answer["query"] for answer in answers] == ["zwei", "雪"]
    for answer in answers:
        assert [hit["rank"] for hit in answer["hits"]] == [1, 2]
        assert {(hit["row"], hit["text"]) for hit in answer["hits"]} == {(0, "zwei\nZeilen"), (1, "雪")}
    encoder = Encoder.load(tiny_model)
    a, b = encoder.encode(["zwei", "zwei\nZeilen"])
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert {hit["row"]: hit["score"] for hit in answers[0]["hits"]}[0] == pytest.approx(cosine, abs=1e-5)


def test_search_what_encode_wrote(clusterns: Callable[..., Result], tiny_model: Path, tmp_path: Path) -> None:
    assert clusterns("encode", tiny_model, "corpus.txt", "-o", "out.parquet").exit_code == 0
    said = clusterns("search", tiny_model, "out.parquet", sentences(300)[9], "-k", "1", "--index", "here")
    assert said.stdout.splitlines()[1] == f"  1   1.000  {sentences(300)[9]}"
    assert "Counting" not in said.stderr and not (tmp_path / "here" / "embeddings.parquet").exists()


SEARCH_REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no model": (["/none/model", "corpus.txt", "q"], ["'/none/model'"]),
    "no corpus": (["MODEL", "none.txt", "q"], ["none.txt", "no such file"]),
    "wrong column": (["MODEL", "table.csv", "q"], ["'text'", "the columns are: 'a', 'b'"]),
    "empty query": (["MODEL", "corpus.txt", "good", ""], ["Query 2 is ''", "Give a sentence"]),
    "k of none": (["MODEL", "corpus.txt", "q", "-k", "0"], ["-k is 0"]),
    "k beyond the corpus": (["MODEL", "corpus.txt", "q", "-k", "301"], ["-k is 301", "300 sentences", "-k 300"]),
    "limit": (["MODEL", "corpus.txt", "q", "--limit", "0"], ["--limit is 0"]),
    "another model": (["OTHER", "corpus.txt", "q", "--index", "first"], ["first", "another model", "--rebuild"]),
    "a file as index": (["MODEL", "corpus.txt", "q", "--index", "corpus.txt"], ["--index", "corpus.txt"]),
}


@pytest.mark.parametrize("case", SEARCH_REFUSED)
def test_search_refuses(
    clusterns: Callable[..., Result], tiny_models: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    if case == "another model":
        assert clusterns("search", tiny_models("bert"), "corpus.txt", "q", "--index", "first").exit_code == 0
    arguments, parts = SEARCH_REFUSED[case]
    names = {"MODEL": str(tiny_models("bert")), "OTHER": str(tiny_models("mpnet"))}
    result = clusterns("search", *(names.get(each, each) for each in arguments))
    refused(result, *parts)
    assert result.stdout == ""


# ---- progress -----------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def encoded(rows: int, total: int | None, left: float | None) -> RowsDone:
    return RowsDone("encoded", rows, total, 1234.4, left)


def test_lines_are_few_and_say_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = 100.0, io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    on_event = progress.progress_view(stream)
    for rows, now in ((1000, 101.0), (2000, 105.5), (3000, 106.0), (4000, 111.0)):  # noqa: B007
        on_event(encoded(rows, 5000, 3725.0 if rows == 2000 else 65.0))
    on_event(encoded(5000, None, None))
    now = 120.0
    on_event(encoded(6000, None, None))
    assert stream.getvalue().splitlines() == [
        "  2,000 of 5,000 sentences encoded  1,234 sentences/s  1:02:05 left",
        "  4,000 of 5,000 sentences encoded  1,234 sentences/s  1:05 left",
        "  6,000 sentences encoded  1,234 sentences/s",
    ]


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen()
    on_event = progress.progress_view(screen)
    on_event(Note("Counting [bold] the sentences"))
    on_event(encoded(2000, 5000, 65.0))
    on_event(Note("half way"))
    on_event(encoded(5000, 5000, 0.0))
    on_event(RowsDone("indexed", 10, 20))
    on_event.close()
    shown = screen.getvalue()
    for words in (
        "Counting [bold] the sentences",
        "encoding",
        "5000/5000",
        "sentences/s",
        "half way",
        "indexing",
        "10/20",
    ):
        assert words in shown
