from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import make_tiny_model, quick_first, sentences

from clusterns_ray.data.corpus import Source
from clusterns_ray.errors import ClusterNSError, ConfigError, DataError
from clusterns_ray.inference import encode as embeddings
from clusterns_ray.inference.embedding_file import (
    EmbeddingFile,
    embedding_schema,
    embedding_table,
    read_info,
    write_tables,
)
from clusterns_ray.inference.encode import (
    Encoded,
    EncodedPart,
    describe_changes,
    encode_files,
    encode_here,
    unit_rows,
    writer_lock,
)
from clusterns_ray.io import files
from clusterns_ray.io.events import Event, Note, RowsDone
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.serialization import model_digest

ROWS = 300
PART = 16
PARTS = -(-ROWS // PART)


@pytest.fixture
def encode(tiny_model: Path, corpus_file: Path, tmp_path: Path) -> Callable[..., Encoded]:
    """``encode_files`` of the corpus to ``out.parquet``, with any argument replaced."""

    def call(**changes: Any) -> Encoded:
        arguments = {
            "model": str(tiny_model),
            "files": str(corpus_file),
            "out": tmp_path / "out.parquet",
            "rows_per_part": PART,
        }
        return encode_files(**{**arguments, **changes})

    return call


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, corpus_file: Path) -> Path:
    """What an encoding that nobody disturbed wrote."""
    out = tmp_path_factory.mktemp("whole") / "out.parquet"
    return encode_files(str(tiny_model), str(corpus_file), out, rows_per_part=PART).path


class Counting:
    """``encode_here``, and how many parts it was given."""

    def __init__(self) -> None:
        self.parts: list[int] = []

    def __call__(self, encoder: Any, parts: Any, batch_size: int, on_progress: Any) -> Iterator[Any]:
        def counted() -> Iterator[Any]:
            for part in parts:
                self.parts.append(part[0])
                yield part

        return encode_here(encoder, counted(), batch_size, on_progress)


def not_called(*_: Any) -> Any:
    raise AssertionError("it was encoded again")


# ---- what is written ----------------------------------------------------------------------------------------------


def test_the_embeddings_are_those_of_the_encoder_in_the_order_of_the_corpus(whole: Path, tiny_model: Path) -> None:
    table = pq.read_table(whole)
    assert table.column_names == ["text", "embedding"]
    assert table["text"].to_pylist() == sentences(ROWS)
    ours = np.array(table["embedding"].to_pylist())[::10]
    encoder = Encoder.load(tiny_model)
    theirs = np.concatenate([encoder.encode([text]) for text in sentences(ROWS)[::10]])
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_file_says_how_it_was_made(whole: Path, tiny_model: Path, corpus_file: Path) -> None:
    schema = pq.read_schema(whole)
    assert schema.field("text").type == pa.string()
    assert schema.field("embedding").type.list_size == 32
    assert schema.field("embedding").type.value_type == pa.float32()
    info = read_info(whole)
    assert {key: info[key] for key in ("model", "width", "dtype", "normalize", "pooling", "max_length")} == {
        "model": str(tiny_model),
        "width": 32,
        "dtype": "float32",
        "normalize": False,
        "pooling": "mean",
        "max_length": 64,
    }
    assert info["digest"] == model_digest(str(tiny_model))
    assert [source["path"] for source in info["request"]["sources"]] == [str(corpus_file)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("normalize", [False, True])
def test_dtype_and_normalize(encode: Callable[..., Encoded], whole: Path, dtype: str, normalize: bool) -> None:
    result = encode(dtype=dtype, normalize=normalize, limit=40)
    file, full = EmbeddingFile(result.path), EmbeddingFile(whole)
    assert (result.rows, result.width, len(file)) == (40, 32, 40)
    assert pq.read_schema(result.path).field("embedding").type.value_type == pa.from_numpy_dtype(dtype)
    found, wanted = file.vectors(np.arange(40)), full.vectors(np.arange(40))
    assert abs(np.linalg.norm(wanted[0]) - 1) > 0.1
    if normalize:
        wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-3)
    assert read_info(result.path)["normalize"] is normalize


def test_pooling_and_length_in_place_of_the_models_own(encode: Callable[..., Encoded], tiny_model: Path) -> None:
    result = encode(pooling="cls", max_length=6, limit=20)
    theirs = Encoder.load(tiny_model, pooling="cls", max_length=6).encode(sentences(ROWS)[:20])
    other = Encoder.load(tiny_model).encode(sentences(ROWS)[:20])
    found = EmbeddingFile(result.path).vectors(np.arange(20))
    np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(found - other).max() > 0.1
    assert (read_info(result.path)["pooling"], read_info(result.path)["max_length"]) == ("cls", 6)


def test_any_text_survives(encode: Callable[..., Encoded], tmp_path: Path) -> None:
    texts = [
        "Zwei\nZeilen",
        'a "quoted", comma',
        "雪が降る",
        "tab\there",
        "\U0001f6a2 ship",
        "e\u0301",
        "in\u2028side\u2029x",
    ]
    path = tmp_path / "texts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"sentence": f"  {text} "}) + "\n" + json.dumps({"sentence": " "}) + "\n\n")
    result = encode(files=[str(path)], text_column="sentence", rows_per_part=2)
    assert pq.read_table(result.path)["text"].to_pylist() == texts == EmbeddingFile(result.path).texts(np.arange(7))


def test_empty_lines_are_no_sentences_and_are_counted(encode: Callable[..., Encoded], tmp_path: Path) -> None:
    path = tmp_path / "gaps.txt"
    path.write_text("\none\n\n   \ntwo\n")
    said: list[Event] = []
    result = encode(files=str(path), on_event=said.append)
    assert pq.read_table(result.path)["text"].to_pylist() == ["one", "two"]
    assert Note("2 sentences; 3 empty rows skipped") in said


def test_sentences_that_are_cut_are_counted(encode: Callable[..., Encoded], tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("a lamp\n" + "the baker finds a lamp " * 5 + "\n" + "a lamp " * 20 + "\n")
    said: list[Event] = []
    encode(files=str(path), on_event=said.append, max_length=8, rows_per_part=2)
    assert Note("2 of 3 sentences were cut to 8 tokens. --max-length raises that (the model reads 64).") in said
    said.clear()
    encode(files=str(path), out=tmp_path / "whole.parquet", on_event=said.append, max_length=64)
    assert not [event for event in said if isinstance(event, Note) and " were cut to " in event.text]


def test_several_files_and_formats(encode: Callable[..., Encoded], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,text\n1,first\n")
    pq.write_table(pa.table({"text": ["second"], "n": [1]}), tmp_path / "b.parquet")
    result = encode(files=[str(tmp_path / "a.csv"), str(tmp_path / "b.parquet")])
    assert pq.read_table(result.path)["text"].to_pylist() == ["first", "second"]


def test_progress_events_have_rows_speed_and_the_time_left(encode: Callable[..., Encoded]) -> None:
    said: list[Event] = []
    encode(on_event=said.append, batch_size=8)
    events = [event for event in said if isinstance(event, RowsDone)]
    rows = [event.rows for event in events]
    assert {PART, 2 * PART, 2 * PART + 8, ROWS} <= set(rows), "parts, and batches within them"
    assert {event.total for event in events} == {ROWS}
    speeds = [event.sentences_per_second or 0 for event in events]
    assert all(speed > 0 for speed in speeds)
    assert (events[0].seconds_left or 0) > 0 == events[-1].seconds_left
    middle = len(events) // 2
    assert events[middle].seconds_left == pytest.approx((ROWS - rows[middle]) / speeds[middle])


def test_what_is_far_away_is_not_read_twice() -> None:
    def count(limit: int | None) -> int | None:
        return embeddings._count("s3://b/x.txt", [Source("s3://b/x.txt")], "text", limit, lambda event: None)

    assert (count(None), count(7)) == (None, 7)


def test_sentences_are_read_as_they_are_encoded(encode: Callable[..., Encoded], monkeypatch: Any) -> None:
    """Memory holds a part, not the corpus."""
    read, ahead = 0, []
    original = embeddings.read_sentences

    def reading(*args: Any, **kwargs: Any) -> Iterator[str]:
        nonlocal read
        read = 0
        for text in original(*args, **kwargs):
            read += 1
            yield text

    def encode_parts(encoder: Any, parts: Any, batch_size: int, on_progress: Any) -> Iterator[Any]:
        for number, texts in parts:
            ahead.append(read - number * PART)
            yield EncodedPart(number, texts, np.ones((len(texts), encoder.width), np.float32), 0)

    monkeypatch.setattr(embeddings, "read_sentences", reading)
    encode(encode_parts=encode_parts)
    assert len(ahead) == PARTS and max(ahead) == PART


# ---- killed and resumed -------------------------------------------------------------------------------------------


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_part_three(monkeypatch: Any) -> dict[str, Any]:
    times = 0

    def on_event(event: Event) -> None:
        nonlocal times
        times += isinstance(event, RowsDone) and event.rows == 3 * PART
        if times == 2:  # once when its last batch is done, and once when it is written
            kill_me()

    return {"on_event": on_event}


def while_encoding(monkeypatch: Any) -> dict[str, Any]:
    def on_event(event: Event) -> None:
        if isinstance(event, RowsDone) and event.rows == 5 * PART + 8:
            kill_me()

    return {"on_event": on_event, "batch_size": 8}


def while_a_part_is_written(monkeypatch: Any) -> dict[str, Any]:
    original = files.flush
    monkeypatch.setattr(files, "flush", lambda path: kill_me() if "part-000004" in path.name else original(path))
    return {}


def while_joining(monkeypatch: Any) -> dict[str, Any]:
    original = embeddings._read_part

    def read_part(path: Path) -> Any:
        if path.name == "part-000007.parquet":
            kill_me()
        return original(path)

    monkeypatch.setattr(embeddings, "_read_part", read_part)
    return {}


def before_the_parts_are_removed(monkeypatch: Any) -> dict[str, Any]:
    monkeypatch.setattr(embeddings, "_remove", lambda parts_dir: kill_me())
    return {}


def while_the_parts_are_removed(monkeypatch: Any) -> dict[str, Any]:
    original = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "part-000005.parquet":
            kill_me()
        original(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    return {}


KEPT = {
    after_part_three: 3,
    while_encoding: 5,
    while_a_part_is_written: 4,
    while_joining: PARTS,
    before_the_parts_are_removed: None,
    while_the_parts_are_removed: None,
}
"""How many parts are not encoded again; None where the file itself was finished."""


def killed(work: Callable[[], Any]) -> None:
    """Do ``work`` in a process of its own, which does not survive it."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("moment", quick_first(KEPT, 3))
def test_killed_and_given_again(
    encode: Callable[..., Encoded], whole: Path, moment: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    batch = {"batch_size": 8} if moment is while_encoding else {}
    if batch:
        whole = encode(out=tmp_path / "undisturbed.parquet", **batch).path
    with pytest.MonkeyPatch.context() as patch:
        killed(partial(encode, **moment(patch)))
    count = Counting()
    result = encode(encode_parts=count, **batch)
    kept = KEPT[moment]
    assert result.reused is (kept is None)
    assert count.parts == ([] if kept is None else list(range(kept, PARTS)))
    assert result.path.read_bytes() == whole.read_bytes()
    names = {path.name for path in tmp_path.iterdir()} - {"undisturbed.parquet"}
    assert names == {"out.parquet"}, "something is left over"


@pytest.mark.parametrize("damage", ["truncated", "another text", "another schema"])
def test_a_damaged_part_is_encoded_again(
    encode: Callable[..., Encoded], whole: Path, damage: str, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed(partial(encode, **while_joining(patch)))
    part = tmp_path / "out.parquet.parts" / "part-000002.parquet"
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:-100])
    else:
        schema = embedding_schema(32 if damage == "another text" else 31, "float32", {})
        texts = sentences(ROWS)[2 * PART : 3 * PART] if damage == "another schema" else ["another text"] * PART
        z = np.ones((PART, schema.field("embedding").type.list_size), np.float32)
        write_tables(part, [embedding_table(texts, z, schema)], schema)
    count = Counting()
    assert encode(encode_parts=count).path.read_bytes() == whole.read_bytes()
    assert count.parts == [2]


def test_a_finished_file_is_left_as_it_is(encode: Callable[..., Encoded]) -> None:
    first = encode()
    before = first.path.stat()
    again = encode(encode_parts=not_called)
    assert (again.reused, again.rows, again.width) == (True, ROWS, 32)
    assert (first.path.stat().st_mtime_ns, first.path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_full_disk_keeps_what_is_done(encode: Callable[..., Encoded], monkeypatch: Any, whole: Path) -> None:
    original = embeddings.write_tables

    def full(path: Path, tables: Any, schema: Any) -> None:
        if "part-000006" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(path, tables, schema)

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "write_tables", full)
        with pytest.raises(ClusterNSError, match=r"No space left on device.*same command"):
            encode()
    count = Counting()
    assert encode(encode_parts=count).path.read_bytes() == whole.read_bytes()
    assert count.parts == list(range(6, PARTS))


def test_one_writer_at_a_time(encode: Callable[..., Encoded], tmp_path: Path) -> None:
    with writer_lock(tmp_path / "out.parquet.parts", "it"), pytest.raises(ClusterNSError, match="another process"):
        encode()
    assert encode().rows == ROWS


# ---- another request ----------------------------------------------------------------------------------------------

OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "float16"}, "--dtype was 'float32' and is 'float16'"),
    "limit": ({"limit": 200}, "--limit was not given and is 200"),
    "pooling": ({"pooling": "cls"}, "--pooling was not given and is 'cls'"),
    "batch": ({"batch_size": 32}, "--batch-size was 64 and is 32"),
    "normalize": ({"normalize": True}, "--normalize was False and is True"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_file_of_another_request_is_refused_and_can_be_overwritten(
    encode: Callable[..., Encoded], whole: Path, case: str, tmp_path: Path
) -> None:
    changes, words = OTHER[case]
    shutil.copy(whole, tmp_path / "out.parquet")
    with pytest.raises(ConfigError, match="is there already") as error:
        encode(**changes, encode_parts=not_called)
    assert words in str(error.value) and "--overwrite" in str(error.value)
    assert (tmp_path / "out.parquet").read_bytes() == whole.read_bytes()
    assert encode(**changes, overwrite=True).reused is False
    assert encode(**changes, encode_parts=not_called).reused is True


@pytest.mark.parametrize("case", ["limit", "batch"])  # the others are told apart alike, which finished files show
def test_parts_of_another_request_are_refused_and_can_be_discarded(
    encode: Callable[..., Encoded], case: str, tmp_path: Path
) -> None:
    changes, words = OTHER[case]
    with pytest.MonkeyPatch.context() as patch:
        killed(partial(encode, **after_part_three(patch)))
    with pytest.raises(ConfigError, match="parts of an interrupted request") as error:
        encode(**changes, encode_parts=not_called)
    assert words in str(error.value) and "--overwrite" in str(error.value)
    assert len(list((tmp_path / "out.parquet.parts").glob("part-*"))) == 3
    count = Counting()
    result = encode(**changes, overwrite=True, encode_parts=count)
    assert len(count.parts) == -(-result.rows // PART)


def test_a_changed_corpus_and_a_changed_model_are_noticed(
    encode: Callable[..., Encoded], tiny_model: Path, tmp_path: Path
) -> None:
    corpus, model = tmp_path / "c.txt", tmp_path / "model"
    corpus.write_text("one\ntwo\n")
    shutil.copytree(tiny_model, model)
    encode(files=str(corpus), model=str(model))
    assert encode(files=str(corpus), model=str(tiny_model), encode_parts=not_called).reused, "a copy is the same model"
    corpus.write_text("one\ntwo\nthree\n")
    with pytest.raises(ConfigError, match=r"c\.txt has changed"):
        encode(files=str(corpus), model=str(model))
    with pytest.raises(ConfigError, match=r"no longer in the corpus|was not in the corpus"):
        encode(model=str(model))
    encode(files=str(corpus), model=str(model), overwrite=True)
    make_tiny_model(model, layers=2)
    with pytest.raises(ConfigError, match="the model is another one"):
        encode(files=str(corpus), model=str(model))


def test_parts_of_other_versions_are_not_mixed(encode: Callable[..., Encoded], monkeypatch: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed(partial(encode, **after_part_three(patch)))
    versions = embeddings._versions()
    monkeypatch.setattr(embeddings, "_versions", lambda: {**versions, "torch": "9.9"})
    with pytest.raises(ConfigError, match=r"torch was .* and is 9\.9"):
        encode()


def test_what_is_not_ours_is_not_touched(encode: Callable[..., Encoded], tmp_path: Path) -> None:
    out, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    parts.mkdir()
    (parts / "diary.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"something else \(diary.txt\)"):
        encode(overwrite=True)
    assert (parts / "diary.txt").read_text() == "dear"
    shutil.rmtree(parts)
    pq.write_table(pa.table({"text": ["mine"]}), out)
    with pytest.raises(ConfigError, match="did not write it"):
        encode()
    assert pq.read_table(out)["text"].to_pylist() == ["mine"]


def test_changes_are_named() -> None:
    def request(*paths: str, digest: str = "a", **rest: Any) -> dict[str, Any]:
        return {"digest": digest, "sources": [{"path": path, "size": 1, "mtime_ns": 1} for path in paths], **rest}

    assert describe_changes(request("a", "b"), request("a", "b")) == []
    assert describe_changes(request("a", "b"), request("a", "c")) == ["c was not in the corpus"]
    assert describe_changes(request("a", "b"), request("a")) == ["b is no longer in the corpus"]
    assert describe_changes(request("a", "b"), request("b", "a")) == ["the files are in another order"]
    touched = request("a")
    touched["sources"][0]["mtime_ns"] = 2
    assert describe_changes(request("a"), touched) == ["a has changed"]
    assert describe_changes(request("a", text_column="x"), request("a", digest="b")) == [
        "the model is another one",
        "--text-column was 'x' and is not given",
    ]


# ---- what is refused ----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "int8"}, "--dtype is 'int8'; it must be float32 or float16"),
    "pooling": ({"pooling": "max"}, "--pooling is 'max'; it must be cls, mean"),
    "batch": ({"batch_size": 0}, "--batch-size is 0"),
    "limit": ({"limit": 0}, "--limit is 0"),
    "length": ({"max_length": -1}, "--max-length is -1"),
    "suffix": ({"out": "out.csv"}, "must end in .parquet"),
    "no directory": ({"out": "none/out.parquet"}, "No such file or directory"),
    "a directory": ({"out": "dir.parquet"}, "it is a directory"),
    "no model": ({"model": "/none/model"}, "'/none/model'"),
    "no package": ({"model": "package:nobody_has_this/m"}, "pip install nobody-has-this"),
    "no corpus": ({"files": "none.txt"}, "none.txt: no such file"),
    "no column": ({"files": "a.csv"}, "there is no column 'text'; the columns are: 'n'"),
    "no sentence": ({"files": "empty.txt"}, "no sentence in 2 rows"),
    "itself": ({"files": "*.parquet", "out": "p.parquet"}, "one of the files to encode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_made(
    encode: Callable[..., Encoded], case: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("n\n1\n")
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "dir.parquet").mkdir()
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "p.parquet")
    before = sorted(tmp_path.rglob("*"))
    changes, words = REFUSED[case]
    with pytest.raises((ConfigError, DataError)) as error:
        encode(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (np.nan, "float32", "NaN or infinite"),
        (np.inf, "float32", "damaged"),
        (1e6, "float16", "beyond what float16 holds"),
    ],
)
def test_embeddings_that_are_no_numbers_are_refused(
    encode: Callable[..., Encoded], value: float, dtype: str, words: str
) -> None:
    def encode_parts(encoder: Any, parts: Any, batch_size: int, on_progress: Any) -> Iterator[Any]:
        for number, texts in parts:
            z = np.ones((len(texts), encoder.width), np.float32)
            z[3] = value if number == 2 else 1
            yield EncodedPart(number, texts, z, 0)

    with pytest.raises(ClusterNSError, match=words) as error:
        encode(encode_parts=encode_parts, dtype=dtype)
    assert f"sentence {2 * PART + 4} " in str(error.value)


# ---- reading ------------------------------------------------------------------------------------------------------


def test_rows_are_found_wherever_they_are(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    z = draw.standard_normal((50, 4)).astype(np.float32)
    schema = embedding_schema(4, "float32", {"format": 1, "width": 4})
    cuts = [0, 7, 8, 30, 50]
    tables = [embedding_table([f"t{row}" for row in range(a, b)], z[a:b], schema) for a, b in pairwise(cuts)]
    write_tables(tmp_path / "x.parquet", tables, schema)
    file = EmbeddingFile(tmp_path / "x.parquet")
    rows = draw.integers(0, 50, 200)
    np.testing.assert_array_equal(file.vectors(rows), z[rows])
    assert file.texts(rows) == [f"t{row}" for row in rows]
    assert file.texts(np.array([], dtype=np.int64)) == []
    blocks = list(file.blocks(10))
    assert [len(block) for block in blocks] == [30, 20]
    np.testing.assert_array_equal(np.concatenate(blocks), z)
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            file.vectors(np.array([wrong]))


def test_a_damaged_file_is_read_right_or_refused(whole: Path, tmp_path: Path) -> None:
    """Bits that turn, zeros and a cut, all over the file: every reader gives what was written, or a DataError."""

    def read(path: Path) -> list[Any]:
        file = EmbeddingFile(path)
        rows = np.arange(0, len(file), 3)
        found = [file.info, np.concatenate(list(file.blocks(32))), file.vectors(rows), file.texts(rows)]
        file.verify()
        return found

    right, content = read(whole), whole.read_bytes()
    draw, refused = np.random.default_rng(0), 0
    for trial in range(120):
        at = int(draw.integers(len(content))) if trial % 3 else len(content) - 1 - int(draw.integers(4000))
        damaged = [
            content[:at] + bytes([content[at] ^ 1 << int(draw.integers(8))]) + content[at + 1 :],
            content[:at] + bytes(len(content[at : at + 64])) + content[at + 64 :],
            content[:at],
        ][trial % 7 % 3]
        (tmp_path / "x.parquet").write_bytes(damaged)
        try:
            found = read(tmp_path / "x.parquet")
        except DataError as error:
            assert "x.parquet: " in str(error)
            refused += 1
        else:
            for one, other in zip(found, right, strict=True):
                np.testing.assert_array_equal(one, other)
    assert refused > 90


def test_unit_rows() -> None:
    z = np.array([[3, 4], [0, 0], [1e-3, 0]], dtype=np.float64)
    np.testing.assert_allclose(unit_rows(z), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    assert unit_rows(z).dtype == np.float32
