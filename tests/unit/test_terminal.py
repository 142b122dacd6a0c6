from __future__ import annotations

import io
import time

import pytest

from clusterns_ray.console import progress
from clusterns_ray.inference.search import Hit, hits_as_json, hits_as_text
from clusterns_ray.io.events import Note
from clusterns_ray.io.terminal import printable

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b[2J\x1b[Hred",
    "\x1b]0;title\x07red",
    "\x1b]8;;http://example.org\x1b\\red\x1b]8;;\x1b\\",
    "\x1b]52;c;ZXZpbA==\x07red",
    "\x9b31mred",
    "\x9d0;title\x9cred",
    "\x1bPq#0\x1b\\red",
    "r\x08ed\x07\x00",
    "\x1bcred",
    "\u202ered\u202c",
    "red\ud800",
    "\x1b[",
    "\x1b",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_terminal_obeys_is_printed(text: str) -> None:
    shown = printable(text)
    assert shown in ("red", "")
    printed = io.StringIO()
    progress.Lines(printed)(Note(text))
    assert printed.getvalue() == shown + "\n"
    lines = hits_as_text(text, [Hit(1, 0.5, 0, text)])
    assert lines.count("red") == (2 if shown else 0) and lines.replace("\n", "").isprintable()


@pytest.mark.parametrize("text", ["plain", "два 三 é 🙂", "a\tb\nc", "", "e\u0301 \u200d \xa0"])
def test_other_text_is_printed_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_notes_of_a_run_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    progress.Lines()(Note("a\x1b[31mb"))
    assert capsys.readouterr().out == "ab\n"
    from typer import Exit

    from clusterns_ray.cli import readable_errors
    from clusterns_ray.errors import DataError

    with pytest.raises(Exit), readable_errors():
        raise DataError("a\x1b[31mb.txt: no such file")
    assert capsys.readouterr().err == "error: ab.txt: no such file\n"


def test_json_keeps_the_text() -> None:
    import json

    for text in HOSTILE[:-3]:
        assert json.loads(hits_as_json("q", [Hit(1, 0.5, 0, text)]))["hits"][0]["text"] == text


def test_long_hostile_text_takes_no_time() -> None:
    for text in ("\x1b[" * 200_000, "\x1b]" + "x" * 400_000, "\x1b[" + "0" * 400_000):
        began = time.process_time()
        printable(text)
        assert time.process_time() - began < 1
