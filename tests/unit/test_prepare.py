from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import sentences
from typer.testing import CliRunner

from clusterns_ray.cli import app
from clusterns_ray.config import Config, make_config
from clusterns_ray.data import prepare as prepare_module
from clusterns_ray.data.prepare import Prepared, cache_directory, describe, most_rows, prepare
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.evaluation import hub
from clusterns_ray.evaluation.sts import read_pairs
from clusterns_ray.io.events import Event, Note, RowsDone
from clusterns_ray.io.files import PROBE_BYTES
from clusterns_ray.launch.trainer import train


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(sentences(30)) + "\n")
    return path


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, corpus: Path) -> Callable[..., Config]:
    def build(**sections: dict[str, Any]) -> Config:
        values: dict[str, dict[str, Any]] = {
            "encoder": {"name": str(tiny_model)},
            "data": {"corpus": str(corpus)},
            "runtime": {"storage_path": str(tmp_path / "runs")},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return make_config(values)

    return build


def rows(prepared: Prepared) -> tuple[list[str], list[list[int]]]:
    """The texts and token ids of a store, in order."""
    store = TokenStore.open(prepared.tokens_dir)
    everything = np.arange(len(store))
    ids, mask = store.tokens(everything, 0)
    return store.texts(everything), [list(row[: n.sum()]) for row, n in zip(ids, mask)]


def test_text_to_tokens(config: Callable[..., Config], tmp_path: Path) -> None:
    events: list[Event] = []
    prepared = prepare(config(), events.append)
    assert prepared.tokens_dir.parent == tmp_path / "runs" / "cache"
    assert not prepared.reused and prepared.sts_dir is None
    texts, ids = rows(prepared)
    assert texts == sentences(30)
    tokenizer = prepare_module.load_tokenizer(config())
    assert ids == tokenizer(texts, truncation=True, max_length=32)["input_ids"]
    assert prepared.manifest["rows"] == 30 and prepared.manifest["tokens"] == sum(map(len, ids))
    assert isinstance(events[0], Note) and "corpus.txt" in events[0].text
    assert {type(event) for event in events[1:]} == {RowsDone} and events[-1] == RowsDone("tokenised", 30)


def test_the_second_time_it_is_reused(config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config())
    stamps = {path: path.stat().st_mtime_ns for path in first.tokens_dir.iterdir()}
    monkeypatch.setattr(prepare_module, "prepare_tokens", lambda *_, **__: pytest.fail("it was tokenised again"))
    events: list[Event] = []
    second = prepare(config(train={"learning_rate": 1e-3}, loss={"temperature": 0.1}), events.append)
    assert second.reused and second.tokens_dir == first.tokens_dir and second.manifest == first.manifest
    assert stamps == {path: path.stat().st_mtime_ns for path in first.tokens_dir.iterdir()}
    assert events == []


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"limit": 7}},
        {"data": {"text_column": "body"}},
        {"encoder": {"max_length": 8}},
        {"encoder": {"prompt": 'this sentence : "{sentence}" means'}},
    ],
    ids=["limit", "text_column", "max_length", "prompt"],
)
def test_what_changes_the_tokens_makes_new_ones(config: Callable[..., Config], change: dict[str, Any]) -> None:
    first = prepare(config())
    other = prepare(config(**change))
    assert not other.reused and other.tokens_dir != first.tokens_dir
    assert prepare(config()).reused and prepare(config(**change)).reused, "one took the place of the other"
    if "text_column" not in str(change):
        assert rows(other) != rows(first)
    if "limit" in str(change):
        assert rows(other)[0] == sentences(30)[:7]


def test_another_tokenizer_makes_new_tokens(config: Callable[..., Config], tiny_models: Callable[[str], Path]) -> None:
    first = prepare(config())
    other = prepare(config(encoder={"name": str(tiny_models("roberta"))}))
    assert not other.reused and other.tokens_dir != first.tokens_dir
    assert rows(other)[0] == rows(first)[0] and rows(other)[1] != rows(first)[1]
    same = prepare(config(encoder={"name": str(tiny_models("distilbert"))}))
    assert same.reused, "DistilBERT has the tokenizer of BERT here, so its tokens are the same"


def test_another_text_makes_new_tokens(config: Callable[..., Config], corpus: Path) -> None:
    first = prepare(config())
    stamp = corpus.stat().st_mtime_ns
    corpus.write_text(corpus.read_text().replace("The", "An"))
    os.utime(corpus, ns=(stamp + 1_000_000, stamp + 1_000_000))
    other = prepare(config())
    assert not other.reused and other.tokens_dir != first.tokens_dir


def test_damaged_tokens_are_made_again(config: Callable[..., Config]) -> None:
    first = prepare(config())
    arrow = next(first.tokens_dir.glob("*.arrow"))
    expected = rows(first)
    os.truncate(arrow, 50)
    try:
        again = prepare(config())
    except DataError as error:  # to refuse with a remedy is right, too
        assert str(first.tokens_dir) in str(error)
    else:
        assert not again.reused and rows(again) == expected


def test_cache_directory(config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_directory(config()) == tmp_path / "runs" / "cache"
    assert cache_directory(config(data={"cache_dir": str(tmp_path / "x")})) == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory(config(data={"cache_dir": "here"})) == tmp_path / "here"
    assert cache_directory(config(data={"cache_dir": "~/there"})) == tmp_path / "home" / "there"


def test_an_sts_directory_is_made_absolute(
    config: Callable[..., Config], sts_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sts_dir.parent)
    assert prepare(config(evaluation={"sts": sts_dir.name})).sts_dir == str(sts_dir.resolve())


def test_what_is_missing_is_refused(config: Callable[..., Config]) -> None:
    with pytest.raises(DataError, match="no such file"):
        prepare(config(data={"corpus": "/none.txt"}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        prepare(config(encoder={"name": "/none"}))


# ---- documents ----------------------------------------------------------------------------------------------------


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """24 documents of two sections of two paragraphs."""
    path = tmp_path / "docs"
    path.mkdir()
    pool = iter(sentences(24 * 16, seed=5))
    for number in range(24):
        text = ""
        for section in range(2):
            text += f"# Section {section}\n\n"
            for _ in range(2):
                text += " ".join(next(pool) for _ in range(4)) + "\n\n"
        (path / f"doc{number:02}.md").write_text(text)
    return path


PAIRS = 80
"""Fewer than 2,000, as the invented documents hold no more."""
STRUCTURE = {"sts": "structure", "structure_pairs": PAIRS}


def test_documents_to_a_dev_set(config: Callable[..., Config], documents: Path) -> None:
    settings = config(data={"documents": str(documents)}, evaluation=STRUCTURE)
    prepared = prepare(settings)
    assert prepared.sts_dir is not None
    assert sorted(str(path.relative_to(prepared.sts_dir)) for path in Path(prepared.sts_dir).rglob("*.jsonl")) == [
        "STRUCTURE/dev.jsonl"
    ]
    pairs = read_pairs(prepared.sts_dir, settings.evaluation.dev)
    assert len(pairs) == PAIRS and set(pairs.scores) == {0, 1, 2, 3}
    whole = "\n".join(file.read_text() for file in sorted(documents.iterdir()))
    assert all(sentence in whole for sentence in pairs.sentences())
    assert rows(prepared)[0] == sentences(30), "with a corpus, documents are for the dev set alone"


def test_the_dev_set_does_not_depend_on_the_run(
    config: Callable[..., Config], documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(**more: Any) -> Config:
        return config(data={"documents": str(documents)}, evaluation=STRUCTURE, **more)

    first = prepare(settings())
    assert first.sts_dir is not None
    text = (Path(first.sts_dir) / "STRUCTURE" / "dev.jsonl").read_text()
    monkeypatch.setattr(prepare_module, "read_documents", lambda *_: pytest.fail("documents were read again"))
    again = prepare(settings(encoder={"max_length": 16}, train={"epochs": 2}))
    assert again.sts_dir == first.sts_dir and text.count("\n") == PAIRS
    monkeypatch.undo()
    values = settings().resolved()
    other_seed = prepare(make_config({**values, "seed": 7}))
    assert other_seed.sts_dir == first.sts_dir, "runs of different seeds have to be judged by the same pairs"
    (documents / "doc00.md").write_text("# New\n\nAnother sentence stands here now. And one more follows it here.\n")
    assert prepare(settings()).sts_dir != first.sts_dir


def test_without_a_corpus_the_sentences_of_the_documents_are_learnt_from(
    config: Callable[..., Config], documents: Path
) -> None:
    settings = config(data={"corpus": None, "documents": str(documents)})
    texts = rows(prepare(settings))[0]
    assert texts == sentences(24 * 16, seed=5)
    limited = prepare(config(data={"corpus": None, "documents": str(documents), "limit": 5}))
    assert rows(limited)[0] == texts[:5]


def test_documents_take_one_process_in_words(config: Callable[..., Config], documents: Path, tmp_path: Path) -> None:
    """Workers make the tokens of sentences; of documents this process does, and says so."""
    asked = config(data={"corpus": None, "documents": str(documents)})
    events: list[Event] = []
    prepared = prepare(asked, events.append, lambda *_: pytest.fail("workers were asked"))
    assert len(rows(prepared)[0]) == 24 * 16
    assert any(isinstance(event, Note) and "tokenised in this process" in event.text for event in events)
    sent: list[Any] = []

    def tokenise(job: Any, on_event: Any) -> tuple[dict[str, Any], bool]:
        sent.append(job)
        return prepared.manifest, False

    asked = config(data={"limit": 7})
    assert prepare(asked, tokenise=tokenise).manifest == prepared.manifest
    assert (
        sent[0].data.limit == 7 and sent[0].cache.store is None and sent[0].cache.local == tmp_path / "runs" / "cache"
    )
    sent[0].check_unchanged()


def test_too_few_documents_for_the_dev_set(config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("# A\n\nOne sentence stands here alone.\n")
    with pytest.raises(DataError):
        prepare(config(data={"documents": str(tmp_path / "one.md")}, evaluation={"sts": "structure"}))


CHINESE = ["农夫", "水手", "老师", "画家", "医生", "司机"]


def test_documents_in_a_language_without_spaces(config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for who in CHINESE:
        sections = "\n\n".join(
            f"# 第{n}节\n\n{who}第{n}天清晨在河边卖了三条新鲜的鱼。{who}第{n}天中午把那封长信寄给了朋友。\n\n"
            f"{who}第{n}天傍晚把红色的小船修理好了。{who}第{n}天夜里在山上看见了许多星星。"
            for n in "一二三四"
        )
        (tmp_path / "docs" / f"{who}.md").write_text(sections, encoding="utf-8")
    prepared = prepare(
        config(
            data={"corpus": None, "documents": str(tmp_path / "docs")},
            evaluation={"sts": "structure", "dev": "STRUCTURE/dev", "structure_pairs": 40},
        )
    )
    assert prepared.manifest["rows"] == prepared.manifest["counts"]["rows"] == 6 * 4 * 4
    assert prepared.sts_dir is not None
    pairs = read_pairs(prepared.sts_dir, "STRUCTURE/dev")
    assert sorted(pairs.scores.tolist()) == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10


def test_documents_without_a_usable_sentence_are_told_so(config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("Too short. A list item of words\n\nNo end\n")
    with pytest.raises(DataError, match=r"3 sentences were found in the documents, and none .* 4 to 60 words"):
        prepare(config(data={"corpus": None, "documents": str(tmp_path / "a.md")}))
    (tmp_path / "a.md").write_text("Too short. The kettle sings on the stove.\n")
    prepared = prepare(config(data={"corpus": None, "documents": str(tmp_path / "a.md")}))
    assert "1 sentences" in describe(prepared.manifest) and "1 sentences of documents skipped" in describe(
        prepared.manifest
    )


@pytest.mark.parametrize("kind", ["corpus", "documents"])
def test_text_that_changes_while_it_is_tokenised_is_refused(
    config: Callable[..., Config], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ".join(sentences(30)) if kind == "documents" else "\n".join(sentences(30)))
    asked = config(data={"corpus": None, "documents": str(path)} if kind == "documents" else {"corpus": str(path)})
    read = prepare_module.read_documents if kind == "documents" else prepare_module.read_parts

    def changed(*arguments: Any, **options: Any) -> Any:
        for item in read(*arguments, **options):
            os.utime(path, ns=(1, 1))
            yield item

    monkeypatch.setattr(prepare_module, read.__name__, changed)
    with pytest.raises(DataError, match=r"a\.txt: it changed while it was read"):
        prepare(asked)
    assert not list(cache_directory(asked).glob("tokens-*"))


@pytest.mark.parametrize("kind", ["text", "limit", "parquet"])
def test_a_batch_above_the_corpus_is_refused_as_early_as_it_is_known(
    config: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": sentences(30)}), path)
    data = {"text": {}, "limit": {"limit": 30}, "parquet": {"corpus": str(path)}}[kind]
    batch = {"global_batch_size": 64, "shards": 4}
    asked = config(data=data, train=batch, evaluation={"sts": None}, clustering={"num_clusters": 8})
    assert most_rows(asked) == (None if kind == "text" else 30)
    with pytest.raises(ConfigError, match=r"global_batch_size is 64, but the corpus has 30 sentences.*Set it to 28"):
        train(asked)
    assert bool(list(cache_directory(asked).glob("tokens-*"))) == (kind == "text")
    assert not (tmp_path / "runs" / asked.runtime.name / "config.yaml").exists()


def test_describe(config: Callable[..., Config], corpus: Path) -> None:
    corpus.write_text("\n\n" + corpus.read_text() + "word " * 90 + "\n")
    prepared = prepare(config())
    text = describe(prepared.manifest)
    assert text == describe(TokenStore.open(prepared.tokens_dir))
    assert "31 sentences" in text and f"{prepared.manifest['tokens']:,} tokens" in text
    assert "2 empty rows skipped" in text and "1 sentences cut to max_length" in text
    json.dumps(prepared.manifest)


def test_the_dev_set_of_the_hub_is_fetched_once(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "stand-in"
    local.mkdir()
    pairs = [{"sentence1": f"a {n}", "sentence2": f"b {n}", "score": float(n)} for n in range(4)]
    (local / "validation.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setitem(hub.HUB, "STSB/dev", (str(local), "validation"))
    settings = config(evaluation={"sts": "hf"})
    prepared = prepare(settings)
    assert prepared.sts_dir is not None and Path(prepared.sts_dir).parent == cache_directory(settings)
    assert read_pairs(prepared.sts_dir, "STSB/dev").scores.tolist() == [0, 1, 2, 3]
    (local / "validation.jsonl").unlink()
    assert prepare(settings).sts_dir == prepared.sts_dir


def test_a_hub_out_of_reach_is_told_before_the_corpus_is_tokenised(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hub.HUB, "STSB/dev", ("no-one/has-this-data-set", "validation"))
    settings = config(evaluation={"sts": "hf"})
    with pytest.raises(ConfigError, match=r"evaluation\.sts"):
        prepare(settings)
    assert not list(cache_directory(settings).glob("tokens-*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
def test_a_disk_that_fills_while_tokens_are_written(tmp_path: Path, tiny_model: Path) -> None:
    """One line and exit code 1; nothing half written stays, and with room the same command does it."""
    (tmp_path / "many.txt").write_text("\n".join(sentences(200) * 100) + "\n")
    values = {
        "encoder": {"name": str(tiny_model)},
        "data": {"corpus": str(tmp_path / "many.txt")},
        "runtime": {"storage_path": str(tmp_path / "runs")},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PROBE_BYTES + 1000, old[1]))
    try:
        result = CliRunner().invoke(app, ["prepare", str(tmp_path / "c.yaml")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert re.search(r"^failed: .*File too large", result.stderr, re.MULTILINE), result.stderr
    assert list((tmp_path / "runs" / "cache").iterdir()) == []
    assert CliRunner().invoke(app, ["prepare", str(tmp_path / "c.yaml")]).exit_code == 0
