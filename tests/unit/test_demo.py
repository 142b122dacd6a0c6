from __future__ import annotations

import bz2
import time
from importlib.util import find_spec
from xml.sax.saxutils import escape

import pytest
from helpers import document_sentences

from clusterns_ray.data import demo
from clusterns_ray.errors import DataError

needs_parser = pytest.mark.skipif(find_spec("mwparserfromhell") is None, reason="needs mwparserfromhell")
needs_sample = pytest.mark.skipif(find_spec("gensim") is None, reason="needs gensim's packaged data")

WIKITEXT = """{{Infobox teapot|name=Brown Betty}}
[[File:Pot.jpg|thumb|A [[teapot]] in use]]
A '''brown pot''' ({{IPAc-en|p|o|t}}; born of clay) is a&nbsp;[[vessel (pottery)|vessel]].<ref
name="a">Kiln Weekly</ref> It holds {{convert|2|L|pt}} of ''water''.<!-- check --> It
keeps <math>q = mc</math> joules.<ref name=a/>

See [http://example.org the maker's page] for its price.

== History ==
{{main|Clay}}
{| class="wikitable"
| cell || other cell
|}
Potters threw it by hand {{citation needed}}.
* Glaze
* This item of the list is a sentence.
:indented words

=== Later ===
Machines cast it now.

== References ==
{{reflist}}
Not prose at all.

=== Printed ===
Nor is this line.

== Uses ==
It pours tea well.

[[Category:Pots]]
"""


def page(title: str, text: str, namespace: int = 0, redirect: bool = False) -> str:
    target = '<redirect title="x" />' if redirect else ""
    return (
        f"<page><title>{escape(title)}</title><ns>{namespace}</ns>{target}"
        f"<revision><comment>c</comment><text>{escape(text)}</text></revision></page>"
    )


def write_dump(path, *pages: str):
    body = "".join(pages)
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/"><siteinfo/>{body}</mediawiki>'
    path.write_bytes(bz2.compress(xml.encode()) if path.suffix == ".bz2" else xml.encode())
    return path


@needs_parser
@pytest.mark.parametrize("name", ["dump.xml.bz2", "dump.xml"])
def test_dump_becomes_prose(tmp_path, name):
    dump = write_dump(
        tmp_path / name,
        page("Pot", "#REDIRECT [[Teapot]]", redirect=True),
        page("Talk:Teapot", "A talk page stands here.", namespace=1),
        page("Teapot & cup", WIKITEXT),
        page("Empty", ""),
    )
    teapot, empty = demo.read_wikipedia_dump(dump)
    assert (teapot.title, empty.title, empty.sections) == ("Teapot & cup", "Empty", ())
    assert [(section.heading, section.paragraphs) for section in teapot.sections] == [
        (
            "",
            (
                "A brown pot (born of clay) is a vessel. It holds 2 L of water. It keeps \ufffc joules.",
                "See the maker's page for its price.",
            ),
        ),
        ("History", ("Potters threw it by hand.", "This item of the list is a sentence.")),
        ("Later", ("Machines cast it now.",)),
        ("Uses", ("It pours tea well.",)),
    ]


@needs_parser
@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("A word (''[[foo]]'': {{IPA|x}}) here.", "A word (foo) here."),
        ("A word ({{IPA|x}}) here, {{citation}}.", "A word here."),
        ("From {{convert|3|to|5|km|mi}} away.", "From 3 to 5 km away."),
        ("Say {{lang|fr|[[bon]]}} twice.", "Say bon twice."),
        ("One<br>two H<sub>2</sub>O <span>three</span>.", "One two H2O three."),
        ("Kept [[:Category:Pots|pots]] and [[mug]]s.", "Kept pots and mugs."),
        ("----", ""),
    ],
)
def test_plain_text(wikitext, expected):
    assert demo.plain_text(wikitext).strip() == expected


@needs_parser
def test_unreadable_dumps(tmp_path):
    with pytest.raises(DataError, match=r"missing\.xml\.bz2"):
        list(demo.read_wikipedia_dump(tmp_path / "missing.xml.bz2"))
    whole = write_dump(tmp_path / "cut.xml.bz2", page("Teapot", WIKITEXT)).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not bzip2", bz2.compress(b"<a><b></a>"), bz2.compress(b"")):
        (tmp_path / "cut.xml.bz2").write_bytes(damaged)
        with pytest.raises(DataError, match=r"Cannot read the Wikipedia dump .*cut\.xml\.bz2"):
            list(demo.read_wikipedia_dump(tmp_path / "cut.xml.bz2"))


@pytest.mark.parametrize("missing", ["gensim", "mwparserfromhell"])
def test_missing_packages_name_the_extra(monkeypatch, missing):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == missing else find_spec("json"))
    with pytest.raises(DataError, match=rf'{missing}.*pip install "clusterns-ray\[demo\]"'):
        demo.demo_documents()


@pytest.mark.slow
@needs_parser
@needs_sample
def test_whole_sample():
    start = time.perf_counter()
    documents = list(demo.demo_documents())
    sentences = [sentence for document in documents for sentence in document_sentences(document)]
    assert time.perf_counter() - start < 60
    assert len(documents) >= 100
    assert len(sentences) >= 14_000
    paragraphs = [p for document in documents for section in document.sections for p in section.paragraphs]
    for markup in ("[[", "{{", "<ref"):
        assert not any(markup in text for text in paragraphs)
    headings = {section.heading.lower() for document in documents for section in document.sections}
    assert not headings & {"references", "external links", "see also", "further reading"}
