"""The packaged demo: a sample of the English Wikipedia that ships inside gensim's wheel."""

from __future__ import annotations

import bz2
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING
from xml.etree import ElementTree

from clusterns_ray.data.document import Document, parse_document
from clusterns_ray.errors import DataError

if TYPE_CHECKING:
    from mwparserfromhell.nodes import Node, Tag, Template
    from mwparserfromhell.wikicode import Wikicode

SAMPLE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
REMEDY = 'Install the extra: pip install "clusterns-ray[demo]"'

HOLE = "\ufffc"  # stands for cut content, so that a sentence with a gap in it is not taken for a whole one

_SKIPPED_SECTIONS = frozenset(
    re.split(
        r"\s*;\s*",
        """bibliography; citations; cited sources; discography; external links; filmography; footnotes;
        further reading; gallery; links; literature; notes; notes and citations; notes and references;
        primary sources; publications; references; references and further reading; references and notes;
        secondary sources; see also; selected bibliography; selected works; sources;
        sources and references; works; works cited""",
    )
)
_SKIPPED_TAGS = frozenset({"ref", "references", "table", "gallery", "imagemap", "timeline", "hiero", "score"})
_HOLE_TAGS = frozenset({"math", "chem", "code", "source", "syntaxhighlight", "pre"})
_BLOCK_TAGS = frozenset({"blockquote", "div", "center", "p", "poem", "ol", "ul", "li"})
_HOLE_TEMPLATES = frozenset({"angbr", "chem", "code", "eqm", "frac", "math", "mvar", "sfrac", "val", "vr"})
_SKIPPED_LINKS = re.compile(r"\s*(?:file|image|media|category)\s*:", re.IGNORECASE)

# Comments and references are most of the markup; cutting them first makes the parse three times cheaper.
_COMMENT_OR_REF = re.compile(r"<!--.*?-->|<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref\s*>|__[A-Z]+__", re.DOTALL | re.IGNORECASE)


def demo_documents() -> Iterator[Document]:
    """Articles (about 106) of the Wikipedia sample in gensim's wheel; gensim itself is not imported.

    Raises:
        DataError: gensim or mwparserfromhell is not installed.
    """
    _require("mwparserfromhell")
    sample = Path((_require("gensim") or [""])[0], SAMPLE)
    if not sample.is_file():
        raise DataError(f"The demo's articles are not at {sample}: this gensim ships without them. {REMEDY}")
    return read_wikipedia_dump(sample)


def _require(package: str) -> list[str]:
    """Folders of an installed package, found without importing it."""
    spec = find_spec(package)
    if spec is None:
        raise DataError(f"The demo needs the package {package!r}, which is not installed. {REMEDY}")
    return list(spec.submodule_search_locations or [])


def read_wikipedia_dump(path: str | Path) -> Iterator[Document]:
    """Stream the articles of a MediaWiki XML export (``.bz2`` or plain) as documents of plain prose.

    Redirects and pages outside the article namespace are skipped, as are sections of references and links.

    Raises:
        DataError: mwparserfromhell is missing, or the file is missing, damaged or not XML.
    """
    _require("mwparserfromhell")
    try:
        with bz2.open(path, "rb") if Path(path).suffix == ".bz2" else open(path, "rb") as stream:
            for title, wikitext in _articles(stream):
                yield parse_document(plain_text(wikitext), title)
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise DataError(
            f"Cannot read the Wikipedia dump {path}: {error}. It must be a complete MediaWiki XML export, "
            "plain or compressed with bzip2; download or install it again."
        ) from error


def _articles(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Title and wikitext of each article, holding one page in memory at a time."""
    events = ElementTree.iterparse(stream, events=("start", "end"))
    _, root = next(events)
    for event, page in events:
        if event == "end" and page.tag.rpartition("}")[2] == "page":
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                yield page.findtext("{*}title") or "", page.findtext("{*}revision/{*}text") or ""
            root.clear()


def plain_text(wikitext: str) -> str:
    """Prose of an article: headings as ``== x ==`` lines, paragraphs apart, no templates, tables or notes."""
    import mwparserfromhell

    code = mwparserfromhell.parse(_COMMENT_OR_REF.sub("", wikitext), skip_style_tags=True)
    rendered = "".join(map(_render, _kept_nodes(code)))
    return "\n".join(map(_clean_line, rendered.splitlines()))


def _kept_nodes(code: Wikicode) -> Iterator[Node]:
    """Nodes outside the skipped sections and their subsections."""
    from mwparserfromhell.nodes import Heading

    skipped_level = 0
    for node in code.nodes:
        if isinstance(node, Heading) and not 0 < skipped_level < node.level:
            title = _render_all(node.title).strip().lower()
            skipped_level = node.level if title in _SKIPPED_SECTIONS else 0
        if not skipped_level:
            yield node


def _render_all(code: Wikicode | None) -> str:
    return "".join(map(_render, code.nodes)) if code is not None else ""


def _render(node: Node) -> str:
    """Visible text of one node of the parse tree."""
    from mwparserfromhell import nodes

    match node:
        case nodes.Text():
            return str(node.value)
        case nodes.Wikilink():
            if _SKIPPED_LINKS.match(str(node.title)):
                return ""
            return _render_all(node.title if node.text is None else node.text).lstrip(":")
        case nodes.ExternalLink():
            return _render_all(node.title) if node.brackets else ""
        case nodes.Heading():
            return f"\n\n== {_render_all(node.title).strip()} ==\n\n"
        case nodes.HTMLEntity():
            return node.normalize()
        case nodes.Tag():
            return _render_tag(node)
        case nodes.Template():
            return _render_template(node)
    return ""


def _render_tag(node: Tag) -> str:
    name = str(node.tag).strip().lower()
    if name in _SKIPPED_TAGS:
        return ""
    if name in _HOLE_TAGS:
        return HOLE
    if node.wiki_markup and not node.contents:  # a list marker or a rule, dealt with line by line
        return node.wiki_markup
    if name in _BLOCK_TAGS:
        return f"\n\n{_render_all(node.contents)}\n\n"
    return " " if name == "br" else _render_all(node.contents)


def _render_template(node: Template) -> str:
    """Text of the few templates that carry words of the sentence they stand in; nothing for the others."""
    name = str(node.name).strip().lower()
    if name in _HOLE_TEMPLATES:
        return HOLE
    if name not in _SHOWN_TEMPLATES:
        return ""
    arguments = [_render_all(parameter.value).strip() for parameter in node.params if not parameter.showkey]
    return _SHOWN_TEMPLATES[name](arguments) if arguments else ""


def _quantity(arguments: list[str]) -> str:
    is_range = len(arguments) > 3 and arguments[1] in {"to", "and", "or", "-", "–", "by", "x"}
    return " ".join(arguments[: 4 if is_range else 2])


_SHOWN_TEMPLATES: dict[str, Callable[[list[str]], str]] = {
    "as of": lambda arguments: f"as of {arguments[0]}",
    "convert": _quantity,
    "lang": lambda arguments: arguments[-1],
    "nihongo": lambda arguments: arguments[0],
    "nowrap": lambda arguments: arguments[0],
    "sc": lambda arguments: arguments[0],
    "smallcaps": lambda arguments: arguments[0],
    "transl": lambda arguments: arguments[-1],
    "vanchor": lambda arguments: arguments[0],
    "'": lambda arguments: "'",
    "'s": lambda arguments: "'s",
}

_REPAIRS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"'{2,}", ""),  # bold and italics
        (r"\s+", " "),
        (r"([(\[])[\s;,:]+", r"\1"),  # "( ; born" after a cut pronunciation
        (r"[\s;,:]+([)\]])", r"\1"),
        (r" ?\(\)| ?\[\]", ""),
        (r" +([,.;:!?])(?=\s|$)", r"\1"),
        (r"([,;:])(?: ?[,;])+", r"\1"),
        (r"[,;](?=\.(?:\s|$))", ""),
    )
]
_LIST_MARKER = re.compile(r"\s*[*#:;]+\s*")


def _clean_line(line: str) -> str:
    """One line of prose with the gaps closed; a list item stays, as a paragraph, if it is a sentence."""
    marker = _LIST_MARKER.match(line)
    if not marker and line.startswith(("{|", "|", "!", "----")):  # debris of a table too broken to parse
        return ""
    text = line[marker.end() :] if marker else line
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if not marker:
        return text
    return f"\n{text}\n" if text.endswith((".", "!", "?")) else ""
