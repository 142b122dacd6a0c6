"""Documents that keep their structure: sections, paragraphs and, on demand, sentences."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from clusterns_ray.errors import DataError

SUFFIXES = (".jsonl", ".md", ".txt")
MIN_WORDS, MAX_WORDS = 4, 60
MIN_LETTER_SHARE = 0.6

_HEADING = re.compile(r"#{1,6}\s+(?P<markdown>.*?)\s*#*|(?P<wiki>={1,6})\s*(?P<title>[^=].*?)\s*(?P=wiki)")
_SENTENCE = re.compile(r"""["'“‘«„]*[^\W_].*[.!?…。！？]["'”’»)\]]*""", re.DOTALL)
# U+FFFC (object replacement character) stands where a formula or the like was cut out of a sentence.
_MARKUP = re.compile(r"[<|\ufffc]|\[\[|\]\]|\{\{|\}\}|\{\||''|==|https?://|www\.")


@dataclass(frozen=True)
class Section:
    """A heading (empty before the first one) and the paragraphs under it, one line of text each."""

    heading: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A title and the sections in reading order; headings of every level start a section."""

    title: str
    sections: tuple[Section, ...]


def parse_document(text: str, title: str) -> Document:
    """Split plain text into sections and paragraphs.

    Headings are Markdown ``# x`` to ``###### x`` or wiki ``== x ==`` lines. Blank lines separate paragraphs;
    the lines of a paragraph are joined by single spaces. Sections without paragraphs are dropped.
    """
    sections: list[Section] = []
    heading, block = "", []

    def close() -> None:
        if paragraphs := _paragraphs(block):
            sections.append(Section(heading, paragraphs))

    for line in map(str.strip, text.splitlines()):
        if match := _HEADING.fullmatch(line):
            close()
            heading, block = match["markdown"] or match["title"] or "", []
        else:
            block.append(line)
    close()
    return Document(title, tuple(sections))


def _paragraphs(lines: list[str]) -> tuple[str, ...]:
    return tuple(" ".join(" ".join(group).split()) for filled, group in groupby(lines, key=bool) if filled)


def read_documents(spec: str | list[str], text_column: str = "text") -> Iterator[Document]:
    """Yield the documents with any text that ``spec`` names, in sorted order within a glob or directory.

    ``spec`` is a path, a glob, a directory (searched recursively) or a list of these; ``demo`` is the
    packaged Wikipedia sample. A ``.jsonl`` file holds one document a row (``text_column``, optional
    ``title``); a ``.md`` or ``.txt`` file is one document.

    Raises:
        DataError: nothing found, an unsupported file, bytes that are not UTF-8, invalid JSON or a missing
            field (with file and line).
    """
    found = False
    for source in list_documents(spec):
        for document in _read_source(source, text_column):
            if document.sections:
                found = True
                yield document
    if not found:
        raise DataError(
            f"No document with text in {spec!r}: every file is empty or holds only headings. "
            "Point it at files with paragraphs of text."
        )


def list_documents(spec: str | list[str]) -> list[str]:
    """Files (and ``demo``) that ``spec`` names, in the order asked for, each once; as ``read_documents``."""
    specs = [spec] if isinstance(spec, str) else spec
    return list(dict.fromkeys(source for one in specs for source in _expand(one)))


def _expand(spec: str) -> list[str]:
    path = Path(spec).expanduser()
    if spec == "demo":
        return [spec]
    if not spec:  # which Path would take for the current directory
        files = []
    elif path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES)
    else:
        files = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
    if not files:
        raise DataError(
            f"No documents found at {spec!r}: no such file, no match for the glob, or a directory without "
            f"{', '.join(SUFFIXES)} files. Check the path, or use 'demo' for the packaged sample."
        )
    return [str(file) for file in files]


def _read_source(source: str, text_column: str) -> Iterator[Document]:
    if source == "demo":
        from clusterns_ray.data.demo import demo_documents

        yield from demo_documents()
        return
    path = Path(source)
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, text_column)
    elif path.suffix in SUFFIXES:
        yield parse_document(_decode(path.read_bytes(), path), path.stem)
    else:
        raise DataError(
            f"Cannot read {path} as a document: the suffix is {path.suffix!r}, and only "
            f"{', '.join(SUFFIXES)} are known. Convert or rename it, or narrow the glob."
        )


def _read_jsonl(path: Path, text_column: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if line := _decode(raw, path, number).strip():
                yield _row_document(line, f"{path}:{number}", f"{path.stem}:{number}", text_column)


def _row_document(line: str, where: str, default_title: str, text_column: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: invalid JSON {line[:80]!r}: {error}. Write one JSON object a line, such as "
            f'{{"{text_column}": "..."}}.'
        ) from error
    text = row.get(text_column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        received = f"the fields {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(
            f"{where}: expected an object whose field {text_column!r} is a string, got {received}: there is "
            "no text to read. Add the field, or name the one that holds the text as text_column."
        )
    try:
        text.encode("utf-8")  # JSON escapes can spell half a surrogate pair, which no file can store
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the field {text_column!r} holds {text[error.start]!r}, half a surrogate pair, which "
            "is not text. Write the whole character."
        ) from error
    return parse_document(text, str(row.get("title") or default_title))


def _decode(raw: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not valid UTF-8 ({error.reason}). "
            "Save the file as UTF-8."
        ) from error


def split_sentences(paragraph: str, language: str = "en") -> list[str]:
    """Sentences of a paragraph in order, stripped; ``language`` is an ISO 639-1 code."""
    from sentencex import segment  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without stubs)

    return [stripped for sentence in segment(language, paragraph) if (stripped := sentence.strip())]


def is_usable(sentence: str) -> bool:
    """Whether this is a plain sentence: 4 to 60 words, mostly letters, closed, without leftover markup."""
    if not MIN_WORDS <= len(sentence.split()) <= MAX_WORDS:
        return False
    if not _SENTENCE.fullmatch(sentence) or _MARKUP.search(sentence):
        return False
    visible = "".join(sentence.split())
    return sum(map(str.isalpha, visible)) >= MIN_LETTER_SHARE * len(visible)


def document_sentences(document: Document, language: str = "en") -> Iterator[str]:
    """Usable sentences of a document in reading order."""
    for section in document.sections:
        for paragraph in section.paragraphs:
            yield from filter(is_usable, split_sentences(paragraph, language))
