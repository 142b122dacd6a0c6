from __future__ import annotations

import json
import math
import os
import time

import pytest
from helpers import document_sentences

from clusterns_ray.data.document import Document, Section, parse_document
from clusterns_ray.data.documents import (
    MAX_WORDS,
    MIN_WORDS,
    count_words,
    is_usable,
    list_documents,
    read_documents,
    split_sentences,
)
from clusterns_ray.errors import ConfigError, DataError

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
    monkeypatch.setattr("clusterns_ray.data.documents.demo_documents", lambda: iter([sample]))
    assert list(read_documents("demo")) == [sample]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("bad.txt", b"fine\nfine\nbr\xe9ak", r"bad\.txt:3: byte 0xe9 is not UTF-8"),
        ("bad.jsonl", b'{"text": "a b"}\n{"text": "\xff"}\n', r"bad\.jsonl:2: byte 0xff"),
        ("bad.jsonl", b'{"text": "a b"}\n\n{"text": \n', r"bad\.jsonl:3: invalid JSON"),
        ("bad.jsonl", b'{"body": "a b"}\n', r"bad\.jsonl:1: .*'text'; the columns are: 'body'"),
        ("bad.jsonl", b'{"text": 3}\n', r"bad\.jsonl:1: .*'text'"),
        ("bad.jsonl", b'["text"]\n', r"bad\.jsonl:1: .*a JSON list"),
        ("bad.jsonl", b'{"text": "a \\ud800"}\n', r"bad\.jsonl:1: .*surrogate"),
        ("bad.jsonl", b'{"text": "a", "text": "b"}\n', r"bad\.jsonl:1: 'text' is there 2 times"),
        ("bad.md", "A text.\n".encode("utf-16"), r"bad\.md: the file is UTF-16.*iconv -f UTF-16"),
        ("bad.md", b"fine\nn\0\n", r"bad\.md:2: the line holds a NUL character"),
        ("bad.md", b"\x1f\x8b\x08\0", r"bad\.md: the file is gzip"),
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


def test_lines_end_as_in_any_system_and_nowhere_else(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        path = tmp_path / "a.md"
        path.write_bytes(f"\ufeff# One{end}{end}a\u2028b\x0bc{end}d{end}{end}e\x85f{end}".encode())
        (document,) = read_documents(str(path))
        assert document.sections == (Section("One", ("a b c d", "e f")),)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for spec in ("/dev/zero", str(tmp_path / "a.txt"), str(tmp_path), str(tmp_path / "*.txt")):
        with pytest.raises(ConfigError, match="not a regular file"):
            list_documents(spec)


def test_links_in_circles_end_and_a_document_is_read_once(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(PROSE)
    for name in ("up", "again", "more"):
        os.symlink(tmp_path / "docs", tmp_path / "docs" / name)
    os.symlink("a.md", tmp_path / "docs" / "b.md")
    for spec in ("docs", "docs/**/*.md", "docs/*"):
        assert len(list(read_documents(str(tmp_path / spec)))) == 1


# ---- languages ----------------------------------------------------------------------------------------------------

LANGUAGES = {
    "Chinese": "他昨天在市场上买了三条新鲜的鱼。老师说：“明天早上我们去博物馆参观。”妹妹把钥匙忘在厨房的桌子上了！",
    "Japanese": "弟は毎朝駅まで自転車で通っています。先生は「九時に出発します」と言いました。庭の桜がもう咲いた。",
    "Khmer": "កសិករម្នាក់លក់ត្រីនៅផ្សារជិតទន្លេ។ គ្រូបង្រៀនបានសរសេរសំបុត្រវែងមួយទៅកាន់មិត្តរបស់គាត់។",
    "Burmese": "လယ်သမားသည် ဈေးထဲတွင် ငါးရောင်းသည်။ ဆရာမသည် သူငယ်ချင်းထံ စာရှည်တစ်စောင် ရေးခဲ့သည်။",
    "Thai": "ชาวนาขายปลาสดอยู่ที่ตลาดริมแม่น้ำ คุณครูเขียนจดหมายยาวถึงเพื่อนของเธอเมื่อวานนี้",
    "Hindi": "किसान नदी के पास बाज़ार में मछली बेचता है। शिक्षिका ने कल अपनी सहेली को एक लंबा पत्र लिखा।",
    "Arabic": "يبيع المزارع السمك الطازج في السوق كل صباح. هل كتبت المعلمة رسالة طويلة إلى صديقتها؟",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_of_languages_with_and_without_spaces(language):
    text = LANGUAGES[language]
    sentences = list(document_sentences(parse_document(text, "t")))
    assert len(sentences) in (2, 3) and "".join("".join(sentences).split()) == "".join(text.split())
    assert all(MIN_WORDS <= count_words(sentence) <= MAX_WORDS for sentence in sentences)


def test_words_are_counted_in_scripts_without_spaces():
    assert count_words("The kettle sings, loudly.") == 4
    assert count_words("他写了Python程序，共三行。") == 1 + 8 / 2
    assert count_words("ปลาสดๆ 12 ตัว") == 1 + 9 / 4
    assert not is_usable("你好。") and not is_usable("今天天气很好，" * 40 + "完。")


# ---- time ---------------------------------------------------------------------------------------------------------

PATTERNS = {
    "blanks": "# a" + " " * 40 + "b",
    "heading marks": "#" * 40,
    "spaced heading marks": "# # # # #",
    "wiki marks": "= " * 20,
    "wiki heading": "==" + " " * 40,
    "prose": "The kettle sings on the stove. ",
    "without an end": "kettle ",
    "one word": "kettle",
    "Chinese": "今天天气很好。",
    "Japanese quotes": "「本当ですか？」",
    "dots": ".",
    "full stops": "a. ",
    "quotes": '"',
    "open quotes": "“a. ",
    "brackets": "([{<",
    "closing": "a.)))",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_time_grows_as_the_line_does(pattern):
    """One line of some size and of four times that; a quadratic time would be 16 times as long."""

    def seconds(size):
        line = "# x " * (pattern == "blanks") + PATTERNS[pattern] * (size // len(PATTERNS[pattern]))
        best = math.inf
        for _ in range(2):
            began = time.process_time()
            list(document_sentences(parse_document(line + "\nb", "t")))
            best = min(best, time.process_time() - began)
        return best

    short, long = seconds(30_000), seconds(120_000)
    assert long < 1.5 and long < 9 * short + 0.1, (short, long)


def test_sentences_of_a_long_paragraph_are_those_of_its_parts():
    parts = [f'Dr. Voss said, "No. {n} is (e.g. here) at home." The lamp no. {n} stood there!' for n in range(400)]
    paragraph = " ".join(parts)
    assert len(paragraph) > 20_000
    assert split_sentences(paragraph) == [sentence for part in parts for sentence in split_sentences(part)]
    endless = "kettle " * 3000 + "ends. The lamp stands here."
    assert split_sentences(endless) == [("kettle " * 3000) + "ends.", "The lamp stands here."]


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
