from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
import pytest

from clusterns_ray.data import corpus, readers
from clusterns_ray.data.corpus import MAX_CHARACTERS, ReadCounts, Source, list_sources, read_sentences
from clusterns_ray.errors import ConfigError, DataError


def read(spec: Any, **options: Any) -> list[str]:
    return list(read_sentences(spec, counts=ReadCounts(), **options))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def refusal(spec: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(spec, **options)
    return str(caught.value)


# .txt


def test_text_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.txt", "\ufeffone\r\n\n\ufeff  two \t\n \r\nno \ufeff\x0b\x0c\x85 x\nvier\u2028fünf\nlast"
    )
    counts = ReadCounts()
    sentences = list(read_sentences(str(path), counts=counts))
    assert sentences == ["one", "two", "no \ufeff\x0b\x0c\x85 x", "vier\u2028fünf", "last"]
    assert counts == ReadCounts(files=1, rows=7, empty=2, cut=0, kept=5)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl"])
def test_line_ends_of_every_system(tmp_path: Path, end: str, name: str) -> None:
    rows = ["one", "two, 2", "", "three"]
    if name.endswith(".jsonl"):
        lines = [json.dumps({"text": row}) for row in rows]
    else:
        quoted = [f'"{row}"' for row in rows] if name.endswith(".csv") else rows
        lines = quoted if name.endswith(".txt") or "sv" not in name else ["text", *quoted]
    counts = ReadCounts()
    path = write(tmp_path / name, end.join(lines) + end)
    assert list(read_sentences(str(path), counts=counts)) == ["one", "two, 2", "three"]
    assert counts == ReadCounts(files=1, rows=4, empty=1, kept=3)


def test_mixed_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\rtwo\r\nthree\n\rfive\r")
    counts = ReadCounts()
    assert list(read_sentences(str(path), counts=counts)) == ["one", "two", "three", "five"]
    assert counts == ReadCounts(files=1, rows=5, empty=1, kept=4)


@pytest.mark.parametrize("extra", range(-2, 3))
def test_a_line_end_where_a_long_line_is_cut(tmp_path: Path, extra: int) -> None:
    """CR and LF on either side of the cut are one line end, and CR alone is one too."""
    for end in ("\r\n", "\r", "\n"):
        line = "x" * (corpus._MAX_TEXT_LINE + extra)
        path = write(tmp_path / "a.txt", f"{line}{end}y{end}{end}z")
        counts = ReadCounts()
        assert list(read_sentences(str(path), counts=counts)) == ["x" * MAX_CHARACTERS, "y", "z"]
        assert counts == ReadCounts(files=1, rows=4, empty=1, cut=1, kept=3)


def test_text_behind_a_long_run_of_blanks_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", " " * 300_000 + "one\ntwo\n")
    assert read(str(path)) == ["one", "two"]


INVISIBLE = "\u200b\ufeff\u00ad\u2060\x01\x1b\u2028 \u3000\x85"


def test_rows_without_a_visible_character_are_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", f"one\n{INVISIBLE}\n{INVISIBLE}a{INVISIBLE}\n")
    counts = ReadCounts()
    (one, other) = read_sentences(str(path), counts=counts)
    assert one == "one" and "a" in other
    assert counts == ReadCounts(files=1, rows=3, empty=1, kept=2)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.txt.gz"])
def test_byte_order_marks_are_no_text(tmp_path: Path, name: str) -> None:
    """At the start, and where files that have one were joined."""
    lines = ['{"text": "one"}', '{"text": "two"}'] if "json" in name else ["text"] * ("sv" in name) + ["one", "two"]
    content = "".join(f"\ufeff{line}\n" for line in lines).encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert read(str(path)) == ["one", "two"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl"])
def test_utf16_and_utf32_are_told_with_a_remedy_that_works(tmp_path: Path, encoding: str, name: str) -> None:
    lines = '{"text": "café 夢"}\n' if "json" in name else "text\n" * ("sv" in name) + "café 夢\n"
    path = write(tmp_path / name, lines.encode(encoding))
    message = refusal(str(path))
    assert encoding[:6].upper() in message and message.startswith(str(path))
    remedy = re.search(r"(iconv -f \S+ -t UTF-8) FILE > NEW", message)
    assert remedy is not None
    new = tmp_path / f"new-{name}"
    subprocess.run(f"{remedy[1]} {path} > {new}", shell=True, check=True)
    assert read(str(new)) == ["café 夢"]


@pytest.mark.parametrize("content", [b"one\ntw\0o\n", b"one\n\0\0\0\n", b"one\nt\0w\0o\0\n\0"])
def test_nul_characters_are_refused(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.txt", content)
    message = refusal(str(path))
    assert message.startswith(f"{path}:2: ") and "tr -d '\\000'" in message
    subprocess.run(f"tr -d '\\000' < {path} > {tmp_path / 'new.txt'}", shell=True, check=True)
    assert read(str(tmp_path / "new.txt"))[0] == "one"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", gzip.compress(b"one\n", mtime=0), "gzip"),
        ("a.csv", bz2.compress(b"text\none\n"), "bzip2"),
        ("a.jsonl", pa.Codec("zstd").compress(b"{}").to_pybytes(), "zstd"),
        ("a.txt", b"PK\x03\x04\x14\0\x06\0", "zip"),
        ("a.txt", b"PAR1\x15\x04\x15\x20", "parquet"),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3", "PDF"),
    ],
)
def test_files_of_other_kinds_are_told(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    message = refusal(str(write(tmp_path / name, content)))
    assert f"the file is {kind}" in message and "UTF-8" not in message
    assert read(str(write(tmp_path / "b.txt", "PAR1 is a gene.\n"))) == ["PAR1 is a gene."]


def test_long_lines_are_cut_and_counted(tmp_path: Path) -> None:
    lines = ["x" * MAX_CHARACTERS, "y" * (MAX_CHARACTERS + 1), "€" * 300_000, "😀" * 300_000, "z"]
    counts = ReadCounts()
    path = write(tmp_path / "a.txt", "\n".join(lines))
    sentences = list(read_sentences(str(path), counts=counts))
    assert sentences == [line[:MAX_CHARACTERS] for line in lines]
    assert counts == ReadCounts(files=1, rows=5, cut=3, kept=5)


@pytest.mark.parametrize(
    ("bad", "byte", "reason"),
    [
        ("caf\u00e9".encode("latin-1") + b" noir", "0xe9", "continuation"),
        (b"x" * 200_000 + b"\xff" + b"y", "0xff", "start byte"),
        (b"\xe2\x82", "0xe2", "unexpected end"),
    ],
)
def test_a_line_that_is_not_utf8_is_refused(tmp_path: Path, bad: bytes, byte: str, reason: str) -> None:
    path = write(tmp_path / "a.txt", b"good\n\n" + bad)
    message = refusal(str(path))
    assert f"{path}:3: byte {byte} is not UTF-8" in message
    assert reason in message and "iconv -f LATIN1 -t UTF-8" in message


def test_limit_counts_usable_sentences_and_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\none\n\ntwo\n\xff\n")
    counts = ReadCounts()
    assert list(read_sentences(str(path), limit=2, counts=counts)) == ["one", "two"]
    assert counts == ReadCounts(files=1, rows=4, empty=2, kept=2)
    assert read(str(path), limit=0) == []


def test_reading_streams(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n" * 1_000_000)
    before = pa.total_allocated_bytes()
    sentences = read_sentences(str(path), counts=ReadCounts())
    assert next(sentences) == "one"
    assert pa.total_allocated_bytes() - before < 4_000_000


# Compression


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    text, record = b"one\ntwo\n", b'{"text": "three"}\n'
    pack = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": lambda data: pa.Codec("zstd").compress(data).to_pybytes(),
    }[suffix]
    a = write(tmp_path / f"a.txt{suffix}", pack(text))
    b = write(tmp_path / f"b.jsonl{suffix}", pack(record))
    assert read([str(a), str(b)]) == ["one", "two", "three"]


def test_gzip_members_and_a_truncated_file(tmp_path: Path) -> None:
    whole = gzip.compress(b"one\n", mtime=0) + gzip.compress(b"two\n")
    assert read(str(write(tmp_path / "a.txt.gz", whole))) == ["one", "two"]
    message = refusal(str(write(tmp_path / "b.txt.gz", gzip.compress(os.urandom(5000).hex().encode())[:-400])))
    assert "b.txt.gz: reading failed: " in message and "whole" in message
    assert "reading failed" in refusal(str(write(tmp_path / "c.txt.gz", "plain text\n")))


# .csv and .tsv


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffid,text\r\n1,"one, ""two""\r\nthree"\r\n2,\r\n\r\n3,  four \r\n')
    counts = ReadCounts()
    assert list(read_sentences(str(path), counts=counts)) == ['one, "two"\r\nthree', "four"]
    assert counts == ReadCounts(files=1, rows=4, empty=2, kept=2)


def test_tsv_and_text_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.TSV", "sentence\tlabel\nNA, one\t1\nnull\t2\n")
    assert read(str(path), text_column="sentence") == ["NA, one", "null"]


def test_csv_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,sentence\n1,one\n")
    assert f"{path}: there is no column 'text'; the columns are: 'id', 'sentence'" in refusal(str(path))
    assert "the columns are: none" in refusal(str(write(tmp_path / "b.csv", "")))

    path = write(tmp_path / "c.csv", 'id,text\n1,"a\nb"\n2,one, two\n')
    message = refusal(str(path))
    assert f"{path}:4: the row has 3 fields, but the header has 2" in message and "quote" in message

    path = write(tmp_path / "d.csv", 'id,text\n1,one\n2,"never closed\n' + "3,x\n" * 100_000)
    assert f"{path}:3: the row that begins here is malformed (unexpected end" in refusal(str(path))
    path = write(tmp_path / "e.csv", 'id,text\n1,one\n2,"never closed\n')
    assert f"{path}:3: the row that begins here is malformed (unexpected end" in refusal(str(path))

    path = write(tmp_path / "f.csv", b"id,text\n1,one\n2,caf\xe9\n")
    assert f"{path}:3: byte 0xe9 is not UTF-8" in refusal(str(path))


def test_long_fields_are_cut_and_counted_as_long_lines_are(tmp_path: Path) -> None:
    long = "word " * 40_000
    for name, content in {
        "a.csv": f'text,n\nshort,1\n"{long}",2\nlast,3\n',
        "a.tsv": f"text\tn\nshort\t1\n{long}\t2\nlast\t3\n",
        "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in ("short", long, "last")),
        "a.txt": f"short\n{long}\nlast\n",
    }.items():
        counts = ReadCounts()
        sentences = list(read_sentences(str(write(tmp_path / name, content)), counts=counts))
        assert sentences == ["short", long[:MAX_CHARACTERS].strip(), "last"], name
        assert counts == ReadCounts(files=1, rows=3, cut=1, kept=3)


def test_a_record_too_long_to_hold_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers.text_lines, "__defaults__", (100,))
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "' + "x" * 200 + '"}\n')
    assert f"{path}:2: the line has more than 100 characters" in refusal(str(path))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_stray_carriage_return_in_one_column_is_refused(tmp_path: Path, name: str) -> None:
    """It would make two rows of one, with no count of fields to tell."""
    message = refusal(str(write(tmp_path / name, "text\none\ntwo\rhalf\nthree\n")))
    assert f"{name}:3: some rows end in LF, and others in CR alone" in message
    write(tmp_path / name, message.count("tr '") * "text\none\ntwo\nhalf\nthree")
    assert read(str(tmp_path / name)) == ["one", "two", "half", "three"]
    assert read(str(write(tmp_path / name, "text\rone\rtwo"))) == ["one", "two"]
    assert read(str(write(tmp_path / name, "text\r\n\r\none\r\n\rtwo"))) == ["one", "two"]
    if name == "a.csv":
        assert read(str(write(tmp_path / name, 'text\none\n"two\rhalf"\n'))) == ["one", "two\rhalf"]


def test_headers(tmp_path: Path) -> None:
    assert read(str(write(tmp_path / "a.csv", "\n\ntext\none\n"))) == ["one"]
    assert read(str(write(tmp_path / "b.tsv", "\n\ntext\none\n"))) == ["one"]
    for name, split in (("c.csv", ","), ("c.tsv", "\t")):
        path = write(tmp_path / name, split.join(["text", "n", "text"]) + "\n" + split.join("abc") + "\n")
        assert f"{path}: 'text' is there 2 times" in refusal(str(path))
        assert read(str(path), text_column="n") == ["b"]
        assert read(str(write(tmp_path / name, split.join(["n", "text"]) + "\n"))) == []


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_a_csv_with_another_delimiter_is_told(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "a.csv", delimiter.join(["id", "text"]) + "\n" + delimiter.join(["1", '"a, b"']) + "\n")
    message = refusal(str(path))
    if delimiter == "\t":
        assert "split by tabs, but it is read with commas; give it a name that ends in .tsv" in message
        path.rename(tmp_path / "b.tsv")
        assert read(str(tmp_path / "b.tsv")) == ["a, b"]
        return
    command = re.search(r"convert it: python (-c .*) < FILE > NEW\.csv", message)
    assert command is not None
    subprocess.run(f"{sys.executable} {command[1]} < {path} > {tmp_path / 'new.csv'}", shell=True, check=True)
    assert read(str(tmp_path / "new.csv")) == ["a, b"]
    assert "split by commas" in refusal(str(write(tmp_path / "c.tsv", "id,text\n1,one\n")))


def test_quotes_of_tsv_never_swallow_rows(tmp_path: Path) -> None:
    rows = ['"So it goes', 'it is 6" long', '"a" b', 'the end " here', '"""', "\"it's", "plain", '"whole ""field"""']
    expected = [*rows[:5], "\"it's", "plain", 'whole "field"']
    path = write(tmp_path / "a.tsv", "id\ttext\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)))
    counts = ReadCounts()
    assert list(read_sentences(str(path), counts=counts)) == expected
    assert counts.rows == len(rows)
    path = write(tmp_path / "b.tsv", 'text\tid\n"with\ttab"\t1\n"open\t2\nlast\t3\n')
    assert read(str(path)) == ["with\ttab", '"open', "last"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('text\n"one\ntwo"\nthree\n', (2, 3)),
        ('id\ttext\n1\t"one\nand\tmore\n2\ttwo"\n', (2, 4)),
        ('text\tid\n"one\t1\ntwo"\t2\n', (2, 3)),
    ],
)
def test_lines_of_tsv_that_may_be_one_row_are_refused(tmp_path: Path, content: str, lines: tuple[int, int]) -> None:
    path = write(tmp_path / "a.tsv", content)
    message = refusal(str(path))
    assert message.startswith(f"{path}:{lines[0]}: ") and f"line {lines[1]} closes" in message
    assert read(str(write(tmp_path / "b.tsv", content.replace('"', ""))))  # the remedy


def test_a_quoted_field_over_lines_of_tsv_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'id\ttext\n1\t"one\ntwo"\n')
    assert "a field opens a quote" in refusal(str(path)) and ".csv" in refusal(str(path))


# .jsonl


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    lines = [
        '{"text": "one\\ntwo", "x": 1}',
        "",
        '{"text": null}',
        '{"text": " "}',
        '{"text": "\\u00e9"}',
    ]
    path = write(tmp_path / f"a{suffix}", "\n".join(lines))
    counts = ReadCounts()
    assert list(read_sentences(str(path), counts=counts)) == ["one\ntwo", "é"]
    assert counts == ReadCounts(files=1, rows=5, empty=3, kept=2)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{'text': 1}", "invalid JSON (Expecting property name"),
        ("[" * 100_000, "invalid JSON ("),
        ('["one"]', "holds a JSON list, but each line must be an object"),
        ('{"sentence": "one", "id": 3}', "there is no column 'text'; the columns are: 'sentence', 'id'"),
        ('{"text": 12}', "field 'text' holds '12' of type int, but sentences are strings"),
        ('{"text": "a\\ud800"}', "half of a surrogate pair"),
        ('{"text": "a\\u0000"}', "NUL character"),
        ('{"text": "a", "text": "b"}', "'text' is there 2 times"),
        ('{"text": "a", "\\u0074ext": "b"}', "'text' is there 2 times"),
        ('{"n": ' + "9" * 5000 + "}", "invalid JSON ("),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    message = refusal(str(path))
    assert message.startswith(f"{path}:2: ") and expected in message


@pytest.mark.parametrize(
    "content", ['[{"text": "one"}, {"text": "two"}]', '\n[\n {"text": "one"},\n {"text": "two"}\n]']
)
def test_a_json_array_is_told_with_a_remedy_that_works(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "a.json", content)
    message = refusal(str(path))
    assert "is a JSON array" in message and "jq -c '.[]' FILE > NEW.jsonl" in message
    if shutil.which("jq"):
        subprocess.run(f"jq -c '.[]' {path} > {tmp_path / 'new.jsonl'}", shell=True, check=True)
        assert read(str(tmp_path / "new.jsonl")) == ["one", "two"]


def test_objects_over_several_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{\n "text": "one"\n}\n{\n "text": "two"\n}\n')
    assert f"{path}:1: invalid JSON" in refusal(str(path)) and "jq -c . FILE" in refusal(str(path))


def test_keys_within_other_values_are_no_second_field(tmp_path: Path) -> None:
    row = '{"text": "say \\"text\\"", "more": {"text": 1, "x": ["text"]}, "of": "text"}\n'
    assert read(str(write(tmp_path / "a.jsonl", row))) == ['say "text"']


# .parquet


def test_parquet(tmp_path: Path) -> None:
    texts = [f"sentence {i}" for i in range(20_000)]
    texts[7:9] = [None, " "]  # type: ignore[list-item]
    table = pa.table({"id": range(20_000), "text": texts})
    kinds = {"s": pa.string(), "l": pa.large_string(), "d": pa.dictionary(pa.int32(), pa.string())}
    for name, kind in kinds.items():
        pq.write_table(table.set_column(1, "text", table["text"].cast(kind)), tmp_path / f"{name}.parquet")
        counts = ReadCounts()
        sentences = list(read_sentences(str(tmp_path / f"{name}.parquet"), counts=counts))
        assert sentences == texts[:7] + texts[9:]
        assert counts == ReadCounts(files=1, rows=20_000, empty=2, kept=19_998)


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "sentence": ["one"]}), path)
    assert f"{path}: there is no column 'text'; the columns are: 'id', 'sentence'" in refusal(str(path))
    assert "column 'id' has type int64, but sentences are strings" in refusal(str(path), text_column="id")
    assert "cannot be read" in refusal(str(write(tmp_path / "b.parquet", "not parquet at all")))
    assert "cannot be read" in refusal(str(write(tmp_path / "b.parquet", "")))
    assert "cannot be read" in refusal(str(write(tmp_path / "b.parquet", path.read_bytes()[:-9])))
    for values in ([["a"]], [b"a"], [None], [{"text": "a"}], [True]):
        pq.write_table(pa.table({"text": values}), path)
        assert "but sentences are strings" in refusal(str(path))
    gz = write(tmp_path / "c.parquet.gz", gzip.compress(path.read_bytes()))
    assert "decompress it" in refusal(str(gz))


def test_columns_of_one_name_and_of_like_names(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["one"]), pa.array(["two"])], names=["text", "text"]), path)
    assert f"{path}: 'text' is there 2 times" in refusal(str(path))
    pq.write_table(pa.table({"text.en": ["one"], "text": ["two"], "text.de": ["three"]}), path)
    assert read(str(path)) == ["two"]
    assert read(str(path), text_column="text.en") == ["one"]
    pq.write_table(pa.table({"text": ["one", "tw\0o"]}), path)
    assert f"{path}:2: the text holds a NUL character" in refusal(str(path))


# Finding files


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    os.symlink("/dev/zero", tmp_path / "b.txt")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "c.txt"))
    for spec in ("/dev/zero", f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", f"{tmp_path}/c.txt", f"{tmp_path}/*.txt"):
        with pytest.raises(ConfigError, match="not a regular file"):
            list_sources(spec)
    listener.close()
    os.symlink("self", tmp_path / "self")
    os.symlink("nowhere", tmp_path / "broken")
    for name in ("self", "broken"):
        assert "no such file" in refusal(f"{tmp_path}/{name}")


def test_links_in_circles_end(tmp_path: Path) -> None:
    write(tmp_path / "tree" / "sub" / "a.txt", "one\n")
    for name in ("sub/up", "again", "sub/more"):
        os.symlink(tmp_path / "tree", tmp_path / "tree" / name)
    os.symlink("sub/a.txt", tmp_path / "tree" / "b.txt")
    counts = ReadCounts()
    assert list(read_sentences(f"{tmp_path}/tree/**/*.txt", counts=counts)) == ["one"]
    assert counts.files == 1
    assert len(list_sources("/".join([str(tmp_path), *["**"] * 20, "*.txt"]))) == 1


def test_a_file_that_may_not_be_read_is_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "one\n")
    monkeypatch.setattr(os, "access", lambda name, mode: False)  # root may read everything
    with pytest.raises(DataError, match="this user may not read it"):
        list_sources(str(path))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n" * 1000)
    for change in (lambda: write(path, "one\n" * 1001), lambda: os.utime(path, (1, 1)), path.unlink):
        write(path, "one\n" * 1000)
        sentences = read_sentences(str(path), counts=ReadCounts())
        assert next(sentences) == "one"
        change()
        with pytest.raises(DataError, match=r"a\.txt: (it changed while it was read|no such file)"):
            list(sentences)
    write(path, "one\n")
    before = list_sources(str(path))
    write(path, "two\nthree\n")
    with pytest.raises(DataError, match="it changed while it was read"):
        read(str(path), sources=before)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in [
        "b.txt",
        "a.txt",
        "c.csv",
        "sub/d.txt",
        "sub/deep/e.txt",
        ".hidden.txt",
        ".git/f.txt",
        "x[1].txt",
    ]:
        write(tmp_path / "tree" / name, f"text\n{name}\n")
    return tmp_path / "tree"


def names(tree: Path, spec: Any) -> list[str]:
    return [os.path.relpath(source.path, tree) for source in list_sources(spec)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt", "b.txt", "x[1].txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("[a-b].*", ["a.txt", "b.txt"]),
        ("x[1].txt", ["x[1].txt"]),
        ("**/*.txt", ["a.txt", "b.txt", "sub/d.txt", "sub/deep/e.txt", "x[1].txt"]),
        ("**", ["a.txt", "b.txt", "c.csv", "sub/d.txt", "sub/deep/e.txt", "x[1].txt"]),
        ("**/deep/*", ["sub/deep/e.txt"]),
        ("*/*.txt", ["sub/d.txt"]),
        ("sub/**/e.txt", ["sub/deep/e.txt"]),
        (".*.txt", [".hidden.txt"]),
        ("sub/../a.txt", ["a.txt"]),
    ],
)
def test_globs(tree: Path, pattern: str, expected: list[str]) -> None:
    assert names(tree, f"{tree}/{pattern}") == expected
    if "?" not in pattern and ".." not in pattern:
        assert names(tree, f"{tree.as_uri()}/{pattern}") == expected


def test_lists_keep_their_order_and_read_a_file_once(tree: Path) -> None:
    spec = [f"{tree}/sub/d.txt", f"{tree}/*.csv", f"{tree}/**/[ad].txt", (tree / "a.txt").as_uri()]
    assert names(tree, spec) == ["sub/d.txt", "c.csv", "a.txt"]
    assert read(spec) == ["text", "sub/d.txt", "c.csv", "text", "a.txt"]


def test_relative_paths_and_home(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    assert names(tree, "a.txt") == names(tree, "*a.txt") == names(tree, "~/a.txt") == ["a.txt"]
    for missing in ("none.txt", "none/*.txt"):
        message = refusal(missing)
        assert message.startswith(f"{missing}: no such file") and f"working directory {tree}" in message
    assert "working directory" not in refusal(f"{tree}/none.txt")


def test_url_with_escapes(tmp_path: Path) -> None:
    write(tmp_path / "my dir" / "a%b.txt", "one")
    base = (tmp_path / "my dir").as_uri()
    assert "%20" in base
    assert read(f"{base}/a%25b.txt") == read(f"{base}/*.txt") == read(f"{tmp_path.as_uri()}/*%20dir/*") == ["one"]


def test_nothing_to_read(tree: Path) -> None:
    assert "names no file" in refusal([])
    assert f"{tree}: this is a directory" in refusal(str(tree))
    assert "http://host/a.txt: cannot be listed" in refusal("http://host/a.txt")
    assert "written as %20" in refusal("file:///my dir/a.txt")
    assert f"{tree.as_uri()}/none.txt: no such file" in refusal(f"{tree.as_uri()}/none.txt")
    assert "names no dataset" in refusal("hf://")


def test_a_missing_file_is_refused_before_reading(tree: Path) -> None:
    with pytest.raises(DataError):
        read_sentences([f"{tree}/a.txt", f"{tree}/none.txt"], counts=ReadCounts())


def test_sources_tell_a_change(tree: Path) -> None:
    path = tree / "a.txt"
    before = list_sources(str(path))
    assert before == [Source(str(path), path.stat().st_size, path.stat().st_mtime_ns)]
    write(path, "text\nlonger than before")
    assert list_sources(str(path)) != before
    json.dumps([vars(source) for source in before])


def test_object_stores(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
        assert uri in ("s3://bucket/?region=r", "s3://bucket/sub/d.txt?region=r")
        bucket = fs.SubTreeFileSystem(str(tree.parent), fs.LocalFileSystem())
        return bucket, uri.partition("?")[0].removeprefix("s3://").replace("bucket", "tree")

    class FakeFileSystem:
        pass

    FakeFileSystem.from_uri = staticmethod(from_uri)  # type: ignore[attr-defined]
    monkeypatch.setattr(fs, "FileSystem", FakeFileSystem)
    assert [s.path for s in list_sources("s3://bucket/*.txt?region=r")] == [
        "s3://tree/a.txt",
        "s3://tree/b.txt",
        "s3://tree/x[1].txt",
    ]
    assert read("s3://bucket/sub/d.txt?region=r") == ["text", "sub/d.txt"]


# hf://


def test_hub_dataset_in_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data" / "train.jsonl", '{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    write(tmp_path / "data" / "test.jsonl", '{"text": "three"}\n')
    url = f"hf://{tmp_path}/data"
    counts = ReadCounts()
    assert list(read_sentences(url, counts=counts)) == ["one", "two"]
    assert counts == ReadCounts(files=1, rows=3, empty=1, kept=2)
    assert read(f"{url}:test") == ["three"]
    monkeypatch.chdir(tmp_path)
    assert read("hf://data:test") == ["three"]
    (source,) = list_sources(url)
    assert source.path == f"{url}:train" and source.size == 65 and source.mtime_ns

    assert "there is no column 'sentence'; the columns are: 'text'" in refusal(url, text_column="sentence")
    message = refusal(f"{url}:nosplit")
    assert "split 'nosplit' of dataset" in message and "Available splits" in message


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, *, split: str, streaming: bool) -> None:
        assert (name, split, streaming) == ("owner/name", "validation", True)
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list_sources("hf://owner/name:validation") == [Source("hf://owner/name:validation")]
    message = refusal("hf://owner/name:validation")
    assert "ConnectionError: Couldn't reach the Hub" in message and "without network" in message


def test_one_file_of_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    url = "hf://owner/name/folder/some.csv"
    assert list_sources(url) == [Source(url)], "without asking the hub"
    message = refusal(url)
    assert "'folder/some.csv'" in message and "'owner/name'" in message and "give its path" in message

    asked = []

    def download(dataset: str, file: str, repo_type: str) -> str:
        asked.append((dataset, file, repo_type))
        (tmp_path / "some.csv").write_text("id,text\n1,one\n2,two\n")
        return str(tmp_path / "some.csv")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read(url) == ["one", "two"]
    assert asked == [("owner/name", "folder/some.csv", "dataset")]
