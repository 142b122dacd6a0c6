from __future__ import annotations

import json

import pytest

from clusterns_ray.data.documents import (
    Document,
    Section,
    document_sentences,
    is_usable,
    parse_document,
    read_documents,
    split_sentences,
)
from clusterns_ray.errors import DataError

PROSE = "The kettle sings on the stove. Nobody in the house hears it."


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_both_heading_styles_start_sections():
    text = "Before any heading.\n# One\nfirst\n\n== Two ==\nsecond\n=== Half ===\nhalf\n###### Six ######\nsixth"
    assert parse_document(text, "t") == Document(
        "t",
        (
            Section("", ("Before any heading.",)),
            Section("One", ("first",)),
            Section("Two", ("second",)),
            Section("Half", ("half",)),
            Section("Six", ("sixth",)),
        ),
    )


def test_lines_join_and_blank_lines_separate_paragraphs():
    document = parse_document("a lamp\n  and   a chair\r\n\n \t\na table\n", "t")
    assert document.sections == (Section("", ("a lamp and a chair", "a table")),)


@pytest.mark.parametrize("text", ["", "\n\n", "# Only a heading\n\n## Another", "== A ==\n\n"])
def test_empty_sections_are_dropped(text):
    assert parse_document(text, "t").sections == ()


@pytest.mark.parametrize("line", ["#hashtag", "####### seven", "a = b", "=a", "x == y", "# "])
def test_other_lines_are_not_headings(line):
    (section,) = parse_document(line, "t").sections
    assert section == Section("", (line.strip(),))


def test_jsonl_holds_a_document_a_row(tmp_path):
    path = write_jsonl(tmp_path / "docs.jsonl", {"body": "One.", "title": "First"}, {"body": "Two."})
    documents = list(read_documents(path, text_column="body"))
    assert [(d.title, d.sections[0].paragraphs) for d in documents] == [
        ("First", ("One.",)),
        ("docs:2", ("Two.",)),
    ]


def test_files_globs_directories_and_lists(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("# H\nbee", encoding="utf-8")
    (tmp_path / "sub" / "a.txt").write_text("\ufeffay", encoding="utf-8")
    (tmp_path / "skipped.csv").write_text("x,y", encoding="utf-8")
    (tmp_path / "empty.md").write_text("", encoding="utf-8")

    def titles(spec):
        return [document.title for document in read_documents(spec)]

    assert titles(str(tmp_path)) == ["b", "a"]
    assert titles(str(tmp_path / "*.md")) == ["b"]
    assert titles(str(tmp_path / "**" / "*.txt")) == ["a"]
    assert titles([str(tmp_path / "sub"), str(tmp_path / "b.md"), str(tmp_path)]) == ["a", "b"]
    (document,) = read_documents(str(tmp_path / "sub" / "a.txt"))
    assert document.sections[0].paragraphs == ("ay",)


def test_demo_is_the_packaged_sample(monkeypatch):
    sample = Document("t", (Section("", (PROSE,)),))
    monkeypatch.setattr("clusterns_ray.data.demo.demo_documents", lambda: iter([sample]))
    assert list(read_documents("demo")) == [sample]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("bad.txt", b"fine\nfine\nbr\xe9ak", r"bad\.txt:3: byte 0xe9 is not valid UTF-8"),
        ("bad.jsonl", b'{"text": "a b"}\n{"text": "\xff"}\n', r"bad\.jsonl:2: byte 0xff"),
        ("bad.jsonl", b'{"text": "a b"}\n\n{"text": \n', r"bad\.jsonl:3: invalid JSON"),
        ("bad.jsonl", b'{"body": "a b"}\n', r"bad\.jsonl:1: .*'text'.*\['body'\]"),
        ("bad.jsonl", b'{"text": 3}\n', r"bad\.jsonl:1: .*'text'"),
        ("bad.jsonl", b'["text"]\n', r"bad\.jsonl:1: .*got a list"),
        ("bad.jsonl", b'{"text": "a \\ud800"}\n', r"bad\.jsonl:1: .*surrogate"),
        ("bad.csv", b"a,b\n", r"suffix is '\.csv'"),
        ("blank.md", b"# Heading only\n", "No document with text"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize("spec", ["nowhere.txt", "no*.md", ""])
def test_nothing_found(tmp_path, spec):
    with pytest.raises(DataError, match="No document"):
        list(read_documents(str(tmp_path / spec)))


@pytest.mark.parametrize("spec", ["", [], [""]])
def test_nothing_asked_for(spec):
    with pytest.raises(DataError, match="No document"):
        list(read_documents(spec))


def test_split_sentences_keeps_abbreviations_whole():
    text = "Dr. Voss met Ms. Lind at 5 p.m. on Elm St. near the mill.  They left early!"
    sentences = split_sentences(text)
    assert sentences[-1] == "They left early!"
    assert " ".join(sentences) == " ".join(text.split())
    assert split_sentences("") == []


@pytest.mark.parametrize(
    "sentence",
    [
        "The kettle sings loudly.",
        '"Nobody hears it," she said.',
        "7 birds sat there?",
        'He asked, "Who is there?"',
    ],
)
def test_usable(sentence):
    assert is_usable(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "Only three words.",
        "word " * 61 + "end.",
        "A sentence that never ends",
        "- a list item of words.",
        "Sums 1 + 22 + 333 + 4444 + 55555 = 60355.",
        "See the [[old mill]] by night.",
        "See the {{old mill}} by night.",
        "See the old mill <ref> by night.",
        "(The mill stands by itself.)",
        "One | two | three | four.",
        "The law says \ufffc for every mass.",
        "Read it at https://example.org/page for more.",
    ],
)
def test_not_usable(sentence):
    assert not is_usable(sentence)


def test_document_sentences_are_in_order():
    document = parse_document(
        f"# A\n{PROSE} Hush!\n\nA second paragraph follows it.\n# B\nThe last words stand here.", "t"
    )
    assert list(document_sentences(document)) == [
        "The kettle sings on the stove.",
        "Nobody in the house hears it.",
        "A second paragraph follows it.",
        "The last words stand here.",
    ]
