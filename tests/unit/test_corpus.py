from __future__ import annotations

import bz2
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
import pytest

from clusterns_ray.data import corpus
from clusterns_ray.data.corpus import MAX_CHARACTERS, ReadCounts, Source, list_sources, read_sentences
from clusterns_ray.errors import DataError


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
    path = write(tmp_path / "a.txt", "\ufeffone\r\n\n\ufeff  two \t\n \r\nnul\0 \ufeff\x0b x\nvier\u2028fünf\nlast")
    counts = ReadCounts()
    sentences = list(read_sentences(str(path), counts=counts))
    assert sentences == ["one", "\ufeff  two", "nul\0 \ufeff\x0b x", "vier\u2028fünf", "last"]
    assert counts == ReadCounts(files=1, rows=7, empty=2, cut=0, kept=5)


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
    whole = gzip.compress(b"one\n") + gzip.compress(b"two\n")
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
    assert f"{path}:3: the row that begins here is malformed (field larger than" in refusal(str(path))
    path = write(tmp_path / "e.csv", 'id,text\n1,one\n2,"never closed\n')
    assert f"{path}:3: the row that begins here is malformed (unexpected end" in refusal(str(path))

    path = write(tmp_path / "f.csv", b"id,text\n1,one\n2,caf\xe9\n")
    assert f"{path}:3: byte 0xe9 is not UTF-8" in refusal(str(path))


# .jsonl


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    lines = [
        '{"text": "one\\ntwo", "x": 1}',
        "",
        '{"text": null}',
        '{"text": " "}',
        '{"text": "\\u00e9\\u0000"}',
    ]
    path = write(tmp_path / f"a{suffix}", "\n".join(lines))
    counts = ReadCounts()
    assert list(read_sentences(str(path), counts=counts)) == ["one\ntwo", "é\0"]
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
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    message = refusal(str(path))
    assert message.startswith(f"{path}:2: ") and expected in message


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
    gz = write(tmp_path / "c.parquet.gz", gzip.compress(path.read_bytes()))
    assert "decompress it" in refusal(str(gz))


# Finding files


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


def test_importing_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, clusterns_ray.data.corpus; print(*{'pyarrow', 'datasets'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "" and corpus.__doc__


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
