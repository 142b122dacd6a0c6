"""Readers over arbitrary bytes and tables: every row once, or a DataError that names the file; never anything else."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusterns_ray.data.corpus import ReadCounts, read_sentences
from clusterns_ray.data.documents import read_documents
from clusterns_ray.errors import DataError
from clusterns_ray.evaluation.labelled import read_labelled
from clusterns_ray.evaluation.sts import read_pairs

QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SUFFIXES = [".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt.gz", ".csv.bz2", ".jsonl.zst"]

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
"""Any characters that text may have, line ends and quotes among them."""

lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=20)
WORDS = rb"""" , ; text { } [ {"text":"a"} ": \u0000 \ud800 PAR1 a""".split()
BYTES = [b"\t", b"\n", b"\r", b" ", b"\0", b"\x1f\x8b", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\x80"]
pieces = st.sampled_from([*WORDS, *BYTES])
rubbish = st.lists(pieces, max_size=25).map(b"".join) | st.binary(max_size=60)


def visible(row: str | None) -> bool:
    """Independently of the reader: whether anything would be printed."""
    return row is not None and any(c.isprintable() and not c.isspace() for c in row)


@pytest.mark.parametrize("suffix", SUFFIXES)
@QUICK
@given(content=rubbish, header=st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path: Path, suffix: str, content: bytes, header: bool) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes((b"text\n" if header else b"") + content)
    counts = ReadCounts()
    try:
        kept = list(read_sentences(str(path), counts=counts))
    except DataError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        return
    assert counts.rows == counts.empty + counts.kept and counts.kept == len(kept)
    assert all(row == row.strip() and row and "\0" not in row for row in kept)
    if suffix == ".txt":
        raw = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        assert counts.rows == raw.count(b"\n") + bool(raw and not raw.endswith(b"\n"))


@QUICK
@given(content=rubbish)
def test_any_bytes_as_other_data(tmp_path: Path, content: bytes) -> None:
    for name in ("STSB/dev.jsonl", "a.tsv", "a.md", "b.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        try:
            if name == "a.tsv":
                read_labelled(path)
            elif name == "STSB/dev.jsonl":
                read_pairs(tmp_path, "STSB/dev")
            else:
                list(read_documents(str(path)))
        except DataError as error:
            assert str(path) in str(error)


def stored(rows: list[Any], suffix: str, ends: str) -> bytes:
    """A file of these rows, as the standard library or pyarrow writes it."""
    if suffix == ".parquet":
        out = io.BytesIO()
        pq.write_table(pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.string())}), out)
        return out.getvalue()
    if suffix == ".jsonl":
        return "".join(json.dumps({"id": i, "text": row}) + ends for i, row in enumerate(rows)).encode()
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=ends, quoting=csv.QUOTE_ALL)
    writer.writerows([["id", "text"], *([i, row] for i, row in enumerate(rows))])
    return out.getvalue().encode()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@QUICK
@given(rows=st.lists(texts | st.none(), max_size=12), ends=st.sampled_from(["\n", "\r\n"]))
def test_every_row_of_a_table_is_read(tmp_path: Path, suffix: str, rows: list[str | None], ends: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(stored(rows, suffix, ends))
    counts = ReadCounts()
    kept = list(read_sentences(str(path), counts=counts))
    assert counts.rows == len(rows)
    expected = [row.strip() for row in rows if visible(row) and row is not None]
    assert [row for row in kept if visible(row)] == expected


@QUICK
@given(rows=st.lists(lines, max_size=12), ends=st.sampled_from(["\n", "\r\n", "\r"]), packed=st.booleans())
def test_every_line_of_text_is_read(tmp_path: Path, rows: list[str], ends: str, packed: bool) -> None:
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    content = "".join(row + ends for row in rows).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    counts = ReadCounts()
    kept = list(read_sentences(str(path), counts=counts))
    assert counts.rows == len(rows)
    assert [row for row in kept if visible(row)] == [row.lstrip("\ufeff").strip() for row in rows if visible(row)]


@QUICK
@given(rows=st.lists(lines.filter(lambda row: "\t" not in row), max_size=12))
def test_every_line_of_tsv_is_a_row(tmp_path: Path, rows: list[str]) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("id\ttext\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)), encoding="utf-8")
    counts = ReadCounts()
    try:
        kept = list(read_sentences(str(path), counts=counts))
    except DataError as error:
        assert "quote" in str(error) and any(row.startswith('"') for row in rows)
        return
    assert counts.rows == len(rows)
    plain = [row.strip() for row in rows if visible(row) and '"' not in row]
    assert [row for row in kept if row in set(plain)] == plain or any('"' in row for row in rows)
