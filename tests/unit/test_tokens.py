from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clusterns_ray.data import token_store as tokens
from clusterns_ray.data.corpus import ReadCounts, read_sentences
from clusterns_ray.data.document import Boundary, Sentence
from clusterns_ray.data.token_store import TokenSettings, TokenStore, prepare_tokens, reuse_tokens
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.models.tokenization import tokenize

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(50)]
VOCABULARY = [*SPECIAL, *WORDS, "this", "means", ":", ".", '"', "##x"]
PROMPT = 'this : "{sentence}" means [MASK] .'
PAD, CLS, SEP = 0, 2, 3
FINGERPRINT = {"corpus": ["a", 1], "max_length": 12}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY))
    return BertTokenizerFast(str(path))


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """Byte-level BPE without special tokens that merges "ab" and "ba", also across the seams of a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab", "ba"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence(i: int) -> str:
    """Sentence ``i`` has 1 to 14 words, told apart by their order."""
    return " ".join(WORDS[(i * 7 + j * (1 + i // 50)) % 50] for j in range(1 + i % 14))


SENTENCES = [sentence(i) for i in range(103)]


def prepare(directory: Path, tokenizer: Any, sentences: Any = SENTENCES, **options: Any) -> TokenStore:
    settings: dict[str, Any] = {"max_length": 12, "rows_per_shard": 40, "rows_per_batch": 16}
    settings |= {name: options.pop(name) for name in ("prompt", *settings) if name in options}
    arguments: dict[str, Any] = {"directory": directory, "fingerprint": FINGERPRINT, **options}
    counts = arguments.pop("counts", ReadCounts())
    rows = (each if isinstance(each, Sentence) else Sentence(each, Boundary.NONE) for each in sentences)
    return prepare_tokens([(rows, counts)], TokenSettings(tokenizer, **settings), **arguments)


# tokenize


def test_tokenize(tokenizer: Any) -> None:
    rows, truncated = tokenize(SENTENCES, tokenizer, 12)
    for text, ids in zip(SENTENCES, rows, strict=True):
        words = [VOCABULARY.index(word) for word in text.split()]
        assert ids == [CLS, *words[:10], SEP]
    assert truncated == sum(len(text.split()) > 10 for text in SENTENCES) > 0
    assert tokenize([], tokenizer, 12) == ([], 0)
    assert tokenize([""], tokenizer, 12) == ([[CLS, SEP]], 0)


def test_tokenize_with_a_prompt_keeps_its_end(tokenizer: Any) -> None:
    rows, truncated = tokenize(SENTENCES, tokenizer, 12, PROMPT)
    head = [VOCABULARY.index(token) for token in ["[CLS]", "this", ":", '"']]
    tail = [VOCABULARY.index(token) for token in ['"', "means", "[MASK]", ".", "[SEP]"]]
    for text, ids in zip(SENTENCES, rows, strict=True):
        words = [VOCABULARY.index(word) for word in text.split()]
        assert ids == head + words[:10] + tail
    assert truncated == sum(len(text.split()) > 10 for text in SENTENCES) > 0


@pytest.mark.parametrize("prompt", ["b{sentence}b", "{sentence}b", "{sentence}: zyx"])
@pytest.mark.parametrize("max_length", [1, 2, 5, 9])
def test_tokenize_across_the_seams_of_a_prompt(byte_tokenizer: Any, prompt: str, max_length: int) -> None:
    sentences = ["", "a", "ab" * 20, "a" * 5, "ba" * 4, "é€😀" * 5, "aé" * 3, "aaaab", "ab abab a b ba"]
    bare = len(byte_tokenizer(prompt.replace("{sentence}", "")).input_ids)
    head, tail = prompt.split("{sentence}")
    rows, truncated = tokenize(sentences, byte_tokenizer, max_length, prompt)
    cut = 0
    for text, ids in zip(sentences, rows, strict=True):
        whole = byte_tokenizer(head + text + tail).input_ids
        assert len(ids) <= max_length + bare
        filled = byte_tokenizer.decode(ids)
        assert filled.startswith(head) and filled.endswith(tail)
        kept = filled[len(head) : len(filled) - len(tail)]
        assert text.startswith(kept)
        assert ids == byte_tokenizer(filled).input_ids
        if len(whole) <= max_length + bare:
            assert kept == text
        cut += kept != text
    assert truncated == cut > 0


@pytest.mark.parametrize("prompt", ["{sentence}", "xyz: {sentence}"])
@pytest.mark.parametrize("max_length", [1, 5, 9])
def test_a_prompt_that_stands_before_is_cut_as_one_text(byte_tokenizer: Any, prompt: str, max_length: int) -> None:
    sentences = ["", "a", "ab" * 20, "é€😀" * 5, "ab abab a b ba"]
    head = prompt.removesuffix("{sentence}")
    most = max_length + len(byte_tokenizer(head).input_ids)
    rows, truncated = tokenize(sentences, byte_tokenizer, max_length, prompt)
    whole = [byte_tokenizer(head + text).input_ids for text in sentences]
    assert rows == [ids[:most] for ids in whole]
    assert truncated == sum(len(ids) > most for ids in whole) > 0


def test_tokenize_counts_only_what_was_truncated(tokenizer: Any) -> None:
    ten, eleven = " ".join(WORDS[:10]), " ".join(WORDS[:11])
    for prompt in (None, PROMPT):
        assert tokenize([ten], tokenizer, 12, prompt)[1] == 0
        assert tokenize([ten, eleven, eleven], tokenizer, 12, prompt)[1] == 2


def test_tokenize_errors(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_length is 2, but 2 of these are special.*3 or more"):
        tokenize(["w1"], tokenizer, 2)
    assert tokenize(["w1 w2"], tokenizer, 3) == ([[CLS, VOCABULARY.index("w1"), SEP]], 1)
    for prompt in ("no place", "{sentence} {sentence}"):
        with pytest.raises(ConfigError, match="exactly once"):
            tokenize(["w1"], tokenizer, 12, prompt)
    with pytest.raises(ConfigError, match="the tokenizer is a object, which is not a fast one"):
        tokenize(["w1"], object(), 12)


# Writing and reading


def test_a_store_holds_what_was_tokenised(tokenizer: Any, tmp_path: Path) -> None:
    written = prepare(tmp_path / "new" / "store", tokenizer)
    expected, _ = tokenize(SENTENCES, tokenizer, 12)
    assert len(written) == len(SENTENCES)
    files = sorted(os.listdir(tmp_path / "new" / "store"))
    assert files == ["manifest.json", "tokens-00000-00001.arrow", "tokens-00000-00002.arrow", "tokens-00000.arrow"]
    assert os.listdir(tmp_path / "new") == ["store"]

    rows = np.random.default_rng(0).integers(0, len(SENTENCES), 300)
    for store in (written, TokenStore.open(tmp_path / "new" / "store", verify=True)):
        for some in (rows, np.arange(len(SENTENCES)), np.array([102]), np.array([0, 0, 0])):
            input_ids, attention_mask = store.tokens(some, 99)
            lengths = store.lengths(some)
            assert (input_ids.dtype, attention_mask.dtype, lengths.dtype) == (np.int64, np.int64, np.int32)
            longest = max(len(expected[i]) for i in some)
            assert input_ids.shape == attention_mask.shape == (len(some), longest)
            assert lengths.tolist() == [len(expected[i]) for i in some]
            assert input_ids.tolist() == [expected[i] + [99] * (longest - len(expected[i])) for i in some]
            assert np.array_equal(attention_mask, np.arange(longest) < lengths[:, None])
            assert store.texts(some) == [SENTENCES[i] for i in some]


def test_no_rows_and_rows_that_are_not_there(tokenizer: Any, tmp_path: Path) -> None:
    store = prepare(tmp_path / "store", tokenizer)
    none = np.array([], dtype=np.int64)
    assert [x.shape for x in store.tokens(none, PAD)] == [(0, 0), (0, 0)]
    assert store.lengths(none).shape == (0,) and store.texts(none) == []
    for rows in ([-1], [103], [[1]]):
        for method in (lambda r: store.tokens(r, PAD), store.lengths, store.texts):
            with pytest.raises(IndexError, match="rows 0 to 102"):
                method(np.array(rows))


def test_the_manifest(tokenizer: Any, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(["", *SENTENCES, " ", "w1" * 6000]))
    counts = ReadCounts()
    sentences = read_sentences(str(corpus), counts=counts)
    done: list[int] = []
    store = prepare(tmp_path / "store", tokenizer, sentences, counts=counts, progress=done.append)
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert store.manifest == manifest
    expected, truncated = tokenize(SENTENCES, tokenizer, 12)
    lengths = [len(ids) for ids in expected] + [3]  # the long word is one unknown token
    assert manifest["format"] == 2
    assert manifest["fingerprint"] == FINGERPRINT
    assert manifest["counts"] == {
        **{"files": 1, "rows": 106, "empty": 2, "cut": 1, "kept": 104},
        **{"truncated": truncated, "without_tokens": 0, "repeated": 0, "unknown": 1},
    }
    assert (manifest["rows"], manifest["tokens"], manifest["longest"]) == (104, sum(lengths), 12)
    assert manifest["mean_length"] == pytest.approx(np.mean(lengths))
    assert (manifest["vocab_size"], manifest["max_length"]) == (len(VOCABULARY), 12)
    assert [f["rows"] for f in manifest["files"]] == [40, 40, 24]
    for entry in manifest["files"]:
        content = (tmp_path / "store" / entry["name"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert done == [16, 32, 40, 56, 72, 80, 96, 104]


def test_the_digest_is_that_of_the_sentences(tokenizer: Any, tmp_path: Path) -> None:
    digests = [
        prepare(tmp_path / str(i), tokenizer, sentences, **options).manifest["digest"]
        for i, (sentences, options) in enumerate(
            [
                (["w1 w2", "w3"], {}),
                (iter(["w1 w2", "w3"]), {"rows_per_shard": 1, "max_length": 3}),
                (["w1", "w2 w3"], {}),
                (["w1 w2w3"], {}),
                (["w3", "w1 w2"], {}),
            ]
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_prompt_is_stored_in_tokens_and_not_in_texts(tokenizer: Any, tmp_path: Path) -> None:
    store = prepare(tmp_path / "store", tokenizer, prompt=PROMPT)
    expected, truncated = tokenize(SENTENCES, tokenizer, 12, PROMPT)
    rows = np.arange(103)
    assert [row[mask == 1].tolist() for row, mask in zip(*store.tokens(rows, PAD), strict=True)] == expected
    assert store.texts(rows) == SENTENCES
    assert store.manifest["counts"]["truncated"] == truncated


def test_repeated_sentences_and_unknown_words_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    store = prepare(tmp_path / "store", tokenizer, ["w1 w2", "日本", "w1 w2", "日本 w1", "w1 w2"], rows_per_batch=2)
    assert (store.manifest["counts"]["repeated"], store.manifest["counts"]["unknown"]) == (2, 1)


def test_sentences_without_tokens_are_skipped(byte_tokenizer: Any, tmp_path: Path) -> None:
    sentences = [*[""] * 20, "ab", "", "ba"]
    store = prepare(tmp_path / "store", byte_tokenizer, sentences)
    assert store.texts(np.arange(2)) == ["ab", "ba"]
    assert store.manifest["counts"]["without_tokens"] == 21
    with pytest.raises(DataError, match="0 of 1 rows usable: 0 empty, 1 without tokens"):
        prepare(tmp_path / "none", byte_tokenizer, [""])


def test_a_large_batch_is_tokenised_in_parts(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_TOKENIZE_ROWS", 7)
    done: list[int] = []
    parts = prepare(tmp_path / "parts", tokenizer, progress=done.append)
    monkeypatch.undo()
    whole = prepare(tmp_path / "whole", tokenizer)
    assert parts.manifest == whole.manifest
    assert done[:4] == [7, 14, 16, 23] and done[-1] == 103


def test_many_files_take_no_descriptors(tokenizer: Any, tmp_path: Path) -> None:
    prepare(tmp_path / "store", tokenizer, rows_per_shard=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        store = TokenStore.open(tmp_path / "store", verify=True)
        assert store.texts(np.arange(103)) == SENTENCES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_reading_is_quick(tokenizer: Any, tmp_path: Path) -> None:
    store = prepare(tmp_path / "s", tokenizer, SENTENCES * 200, rows_per_shard=4000, rows_per_batch=1000)
    batches = np.random.default_rng(0).integers(0, len(store), (40, 512))
    store.tokens(batches[0], PAD)
    took = []
    for rows in batches:
        began = time.perf_counter()
        store.tokens(rows, PAD)
        took.append(time.perf_counter() - began)
    assert 512 / np.median(took) > 200_000  # rows per second


# Whole or not at all


def test_an_interrupted_run_leaves_nothing(tokenizer: Any, tmp_path: Path) -> None:
    def interrupted() -> Iterator[str]:
        yield from SENTENCES
        assert len(list(tmp_path.glob(".store.*.tmp/tokens-*.arrow"))) == 3  # it was at work
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "store", tokenizer, interrupted())
    assert os.listdir(tmp_path) == []
    assert reuse_tokens(tmp_path / "store", FINGERPRINT) is None


def test_what_a_killed_run_left_is_removed_after_a_day(tokenizer: Any, tmp_path: Path) -> None:
    for name, hours in [(".store.old.tmp", 25), (".store.live.tmp", 23), (".other.old.tmp", 25)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens-00000.arrow").write_text("half")
        then = time.time() - hours * 3600
        os.utime(tmp_path / name, (then, then))
    prepare(tmp_path / "store", tokenizer)
    assert sorted(os.listdir(tmp_path)) == [".other.old.tmp", ".store.live.tmp", "store"]


def test_no_usable_sentence(tokenizer: Any, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n" * 12)
    counts = ReadCounts()
    sentences = read_sentences(str(corpus), counts=counts)
    with pytest.raises(DataError, match=r"0 of 12 rows usable: 12 empty.*text_column"):
        prepare(tmp_path / "store", tokenizer, sentences, counts=counts)
    assert os.listdir(tmp_path) == ["corpus.txt"]


def test_a_store_is_used_again(tokenizer: Any, tmp_path: Path) -> None:
    def unread() -> Iterator[str]:
        raise AssertionError("the sentences were read again")
        yield

    prepare(tmp_path / "store", tokenizer, fingerprint={"a": (1, 2)})
    again = prepare(tmp_path / "store", tokenizer, unread(), fingerprint={"a": [1, 2]})
    assert len(again) == 103
    assert reuse_tokens(tmp_path / "store", {"a": (1, 2)}) is not None
    assert reuse_tokens(tmp_path / "store", {"a": (1, 3)}) is None
    assert reuse_tokens(tmp_path / "elsewhere", {"a": (1, 2)}) is None
    with pytest.raises(DataError, match="neither used nor overwritten; remove it"):
        prepare(tmp_path / "store", tokenizer, unread(), fingerprint={"a": (1, 3)})


def test_an_empty_directory_may_be_filled_and_another_may_not(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert len(prepare(tmp_path / "store", tokenizer)) == 103
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="mine: the directory is not empty"):
        prepare(tmp_path / "mine", tokenizer)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def test_of_two_processes_the_quicker_one_wins(tokenizer: Any, tmp_path: Path) -> None:
    def overtaken(fingerprint: dict[str, Any]) -> Iterator[str]:
        yield from SENTENCES
        prepare(tmp_path / "store", tokenizer, SENTENCES[:50], fingerprint=fingerprint)

    assert len(prepare(tmp_path / "store", tokenizer, overtaken(FINGERPRINT))) == 50
    assert os.listdir(tmp_path) == ["store"]
    (tmp_path / "store").rename(tmp_path / "before")
    with pytest.raises(DataError, match="neither used nor overwritten"):
        prepare(tmp_path / "store", tokenizer, overtaken({"another": 1}))
    assert sorted(os.listdir(tmp_path)) == ["before", "store"]


# Damage


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest))


def damage(directory: Path, how: str) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    first, path = manifest["files"][0], directory / "tokens-00000-00001.arrow"
    rest = manifest["files"][1:]
    if how == "no manifest":
        (directory / "manifest.json").unlink()
    elif how == "half a manifest":
        (directory / "manifest.json").write_text((directory / "manifest.json").read_text()[:100])
    elif how == "binary manifest":
        (directory / "manifest.json").write_bytes(b"\xff\xfe")
    elif how == "a list":
        (directory / "manifest.json").write_text("[]")
    elif how == "format":
        edit(directory, format=1)
    elif how == "no files":
        (directory / "manifest.json").write_text(json.dumps({"format": 2, "fingerprint": {}}))
    elif how == "no fingerprint":
        del manifest["fingerprint"]
        (directory / "manifest.json").write_text(json.dumps(manifest))
    elif how == "files are numbers":
        edit(directory, files=[1, 2])
    elif how == "outside":
        (directory.parent / "tokens-00000.arrow").write_bytes(path.read_bytes())
        edit(directory, files=[first | {"name": "../tokens-00000.arrow"}, *rest])
    elif how == "absolute":
        edit(directory, files=[first | {"name": "/etc/passwd"}, *rest])
    elif how == "rows":
        edit(directory, rows=99)
    elif how == "a file is missing":
        path.unlink()
    elif how == "a file is short":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "a file is overwritten":
        path.write_bytes(b"\0" * path.stat().st_size)
    elif how == "rows moved":
        edit(directory, files=[first | {"rows": 39}, rest[0] | {"rows": 41}, rest[1]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("no manifest", "there is no such file, so .* is not a token store"),
        ("half a manifest", "the manifest cannot be read"),
        ("binary manifest", "the manifest cannot be read"),
        ("a list", "has format None, but this version reads format 2"),
        ("format", "has format 1, but this version reads format 2"),
        ("no files", "the manifest is damaged .KeyError: 'files'"),
        ("no fingerprint", "the manifest is damaged .KeyError: 'fingerprint'"),
        ("files are numbers", "the manifest is damaged .TypeError"),
        ("outside", r"names the files \['../tokens-00000.arrow'\], but"),
        ("absolute", r"names the files \['/etc/passwd'\], but"),
        ("rows", "do not add up to 99"),
        ("a file is missing", "tokens-00000-00001.arrow: the file is missing"),
        ("a file is short", r"tokens-00000-00001.arrow: the file has \d+ bytes, but \d+ were written"),
        ("a file is overwritten", "tokens-00000-00001.arrow: the checksum differs"),
        ("rows moved", "tokens-00000.arrow: the file holds 40 rows .* but 39 rows"),
    ],
)
def test_damage_is_noticed(tokenizer: Any, tmp_path: Path, how: str, expected: str) -> None:
    directory = tmp_path / "store"
    prepare(directory, tokenizer)
    damage(directory, how)
    with pytest.raises(DataError, match=expected) as caught:
        TokenStore.open(directory)
    assert "prepare the tokens" in str(caught.value)
    assert reuse_tokens(directory, FINGERPRINT) is None


def test_a_changed_byte_is_noticed_when_verifying(tokenizer: Any, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    prepare(directory, tokenizer)
    path = directory / "tokens-00000-00002.arrow"
    content = path.read_bytes()
    place = content.index(SENTENCES[85].encode())
    path.write_bytes(content[:place] + b"W" + content[place + 1 :])
    os.utime(path, ns=(0, 0))  # an old time of change does not hide it
    with pytest.raises(DataError, match=r"tokens-00000-00002\.arrow: the checksum differs"):
        TokenStore.open(directory)
    os.utime(directory / "manifest.json")  # as if it had been checked since
    TokenStore.open(directory)
    with pytest.raises(DataError, match=r"tokens-00000-00002\.arrow: the checksum differs"):
        TokenStore.open(directory, verify=True)


def test_checksums_of_a_copied_store_are_compared_once(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    sha256 = tokens.sha256

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256(path)

    prepare(tmp_path / "store", tokenizer)
    monkeypatch.setattr(tokens, "sha256", counted)
    TokenStore.open(tmp_path / "store")
    assert read == [], "what has not changed since it was written is opened without reading it"
    (tmp_path / "copy").mkdir()
    for name in ("manifest.json", "tokens-00000.arrow", "tokens-00000-00001.arrow", "tokens-00000-00002.arrow"):
        (tmp_path / "copy" / name).write_bytes((tmp_path / "store" / name).read_bytes())
        time.sleep(0.02)
    for _ in range(2):
        TokenStore.open(tmp_path / "copy")
        assert sorted(read) == ["tokens-00000-00001.arrow", "tokens-00000-00002.arrow", "tokens-00000.arrow"]
