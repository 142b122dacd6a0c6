"""YAML: what is read, and what is refused in one line, at once."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.yaml_text import (
    MAX_BYTES,
    dump_yaml,
    load_foreign_yaml,
    load_setting,
    load_yaml,
    read_yaml_text,
)


def refusal(text: str, load: Any = load_yaml) -> str:
    with pytest.raises(ConfigError, match=r"^this\.yaml is ") as raised:
        load(text, "this.yaml")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-13-45", "2024-13-45"),
        ("2024-01-02", "2024-01-02"),
        ("2024-01-02 25:61:61", "2024-01-02 25:61:61"),
        ("3e-4", 0.0003),
        ("12:30:45", "12:30:45"),
        ("1_000", 1000),
        ("0x1f", 31),
        ("0o17", 15),
        ("0b101", 5),
        ("0x", "0x"),
        ("0b", "0b"),
        ("0b_", "0b_"),
        ("0b12", "0b12"),
        ("1.2.3", "1.2.3"),
        ("1e", "1e"),
        ("-", [None]),
        ("no", False),
        ("'no'", "no"),
        ("'010'", "010"),
        ("~", None),
        ("", None),
        ("\ufeffa: 1", {"a": 1}),
        ("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}", {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}}),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    loaded = load_yaml(text, "s")
    assert loaded == value and type(loaded) is type(value)


@pytest.mark.parametrize(
    "text", ["010", "1e-3", "12:30", "0x1f", "no", "2024-01-02", "-007", ".5", "1_000", "null", ""]
)
def test_texts_come_back_as_texts(text: str) -> None:
    assert load_yaml(dump_yaml({"a": text}), "s") == {"a": text}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 010", "line 1, column 4: 010 begins with 0"),
        ("a: -007", "write -7 or quote it"),
        ("a: " + "7" * 4500, "a number of 4,500 characters"),
        ("a: ." + "7" * 4500, "a number of 4,501 characters"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is there twice"),
        ("a: {b: 1, b: 1}", "the key 'b' is there twice"),
        ("[" * 50_000, "deeper than 40"),
        ("- " * 500, "deeper than 40"),
        ("? " * 500, "deeper than 40"),
        ("{a: " * 500, "deeper than 40"),
        ("a: &a [*a]", "holds the alias"),
        ("a: !!python/object/apply:os.getcwd []", "python/object"),
        ("%TAG ! tag:yaml.org,2002:python/\n--- !none x", "python/none"),
        ("a: !!binary aGk=", "binary"),
        ("a: !!int x", "write the value"),
        ("a: !ours x", "!ours"),
        ('a: "\\ud83d"', "half a character"),
        ('a: "\\U00ffffff"', "impossible"),
    ],
)
def test_what_is_refused_in_files_and_settings(text: str, reason: str) -> None:
    assert reason in refusal(text) and reason in refusal(text, load_setting)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 'x", "end of stream"),
        ("a: b\n\tc: d", "indent with spaces"),
        ("--- a\n--- b", "another document"),
        ("a: \0", "#x0000"),
        ("? [a]\n: b", "unhashable"),
        ("<<: 3", "merging"),
        ("a: =", "constructor"),
        ("%YAML 9.1\n--- a", "version"),
    ],
)
def test_what_is_no_yaml_is_refused_in_files_and_a_text_in_settings(text: str, reason: str) -> None:
    assert reason in refusal(text)
    assert load_setting(text, "s") == text


def test_aliases_that_multiply_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 15)]
    started = time.process_time()
    assert "more than 20,000 values" in refusal("\n".join(lines))
    deep = "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60))
    assert "deeper than 40" in refusal(deep)
    assert "more than 20,000 values" in refusal("[" + "1," * 30_000 + "]")
    assert time.process_time() - started < 8


def test_files_of_other_programs_have_documents_and_octal_numbers() -> None:
    assert load_foreign_yaml("mode: 0644\n---\nb: 2024-01-02", "s") == [{"mode": 0o644}, {"b": "2024-01-02"}]
    assert "twice" in refusal("a: 1\na: 2", load_foreign_yaml)
    assert "impossible" in refusal("a: 0x_", load_foreign_yaml)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    (tmp_path / "large.yaml").write_text("#" * (MAX_BYTES + 1))
    for name, reason in {"fifo": "FIFO", "/dev/zero": "device", "latin.yaml": "UTF-8", "large.yaml": "larger"}.items():
        with pytest.raises(ConfigError, match=reason):
            read_yaml_text("The study", tmp_path / name)
