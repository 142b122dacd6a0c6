"""Documents that keep their structure: sections, paragraphs and, on demand, sentences."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from unicodedata import category

from clusterns_ray.data.corpus import Source, find_local, walk
from clusterns_ray.data.demo import demo_documents
from clusterns_ray.data.document import Boundary, Document, Sentence, parse_document
from clusterns_ray.data.readers import decode, json_rows, text_lines, text_of
from clusterns_ray.errors import DataError
from clusterns_ray.io.paths import check_regular_file

SUFFIXES = (".jsonl", ".md", ".txt")
MIN_WORDS, MAX_WORDS = 4, 60
MIN_LETTER_SHARE = 0.6

IDEOGRAPHS_A_WORD = 2
"""Characters of Chinese and Japanese, written without spaces, that count as a word."""
LETTERS_A_WORD = 4
"""Letters and vowel signs of Thai, Lao, Tibetan, Burmese and Khmer that count as a word."""

_OPENING, _CLOSING = "\"'“‘«„「『《〈（", "\"'”’»)]」』》〉）"
_TERMINATORS = ".!?…。！？．｡॥।։؟۔።།༎။។៕"
# U+FFFC (object replacement character) stands where a formula or the like was cut out of a sentence.
_MARKUP = re.compile(r"[<|\ufffc]|\[\[|\]\]|\{\{|\}\}|\{\||''|==|https?://|www\.")
_IDEOGRAPHS = re.compile("[\u3005\u3006\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_UNSPACED_LETTERS = re.compile("[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff]")
# Thai and Lao have no full stop: a space ends a phrase. Of the others the splitter does not know.
_MORE_ENDS = re.compile("(?<=[\u0e00-\u0eff]) +(?=[\u0e00-\u0eff])|(?<=[។៕།༎።]) *(?=[^ ។៕།༎።])")
_LONG_PARAGRAPH, _WINDOW = 10_000, 800


def read_documents(spec: str | list[str], text_column: str = "text") -> Iterator[Document]:
    """Yield the documents with any text that ``spec`` names, in sorted order within a glob or directory.

    ``spec`` is a path, a glob, a directory (searched recursively) or a list of these; ``demo`` is the
    packaged Wikipedia sample. A ``.jsonl`` file holds one document a row (``text_column``, optional
    ``title``); a ``.md`` or ``.txt`` file is one document.

    Raises:
        ConfigError: what is named is not a regular file.
        DataError: no file is there or none has text, a file's format is not supported, or (with file and line) bytes
            are not UTF-8, JSON is invalid or a field is missing.
    """
    any_text = False
    for source in list_documents(spec):
        for document in _read_source(source, text_column):
            if document.sections:
                any_text = True
                yield document
    if not any_text:
        raise DataError(
            f"No document with text in {spec!r}: every file is empty or holds only headings.",
            "Point it at files with paragraphs of text.",
        )


def list_documents(spec: str | list[str]) -> list[str]:
    """Files (and ``demo``) that ``spec`` names, in the order asked for, each once; as ``read_documents``."""
    specs = [spec] if isinstance(spec, str) else spec
    once: dict[str, str] = {}
    for source in (source for one in specs for source in _expand(one)):
        once.setdefault(source if source == "demo" else os.path.realpath(source), source)
    return list(once.values())


def document_sources(spec: str | list[str]) -> list[Source]:
    """As :func:`list_documents`, each with its size and the time of its last change."""
    sources = []
    for file in list_documents(spec):
        stat = None if file == "demo" else os.stat(file)
        path = file if stat is None else str(Path(file).resolve())
        sources.append(Source(path, stat and stat.st_size, stat and stat.st_mtime_ns))
    return sources


def _expand(spec: str) -> list[str]:
    if spec == "demo":
        return [spec]
    try:
        files = [str(file) for file in sorted(map(Path, _find(spec)))] if spec else []
    except OSError as error:
        raise DataError(
            f"Documents {spec!r} cannot be listed: {error.strerror or error}.",
            "Check the path, and that this user may read the directory.",
        ) from None
    if not files:
        raise DataError(
            f"No documents found at {spec!r}: no such file, no match for the glob, or a directory without "
            f"{', '.join(SUFFIXES)} files.",
            "Check the path, or use 'demo' for the packaged sample.",
        )
    for file in files:
        check_regular_file("The document", file)
        if not os.access(file, os.R_OK):
            raise DataError(f"The document {file!r} may not be read by this user.", "Change its permissions.")
    return files


def _find(spec: str) -> list[str]:
    path = os.path.expanduser(spec)
    if os.path.isdir(path):
        return [file for file in walk(path) if Path(file).suffix in SUFFIXES]
    return [path] if os.path.lexists(path) else find_local(path)


def _read_source(source: str, text_column: str) -> Iterator[Document]:
    if source == "demo":
        yield from demo_documents()
        return
    path = Path(source)
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"Cannot read {path} as a document: the suffix is {path.suffix!r}, and only "
            f"{', '.join(SUFFIXES)} are known.",
            "Convert or rename it, or narrow the glob.",
        )
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, text_column)
        else:
            yield parse_document(decode(path.read_bytes(), source), path.stem)
    except OSError as error:
        raise DataError(f"{source}: reading failed: {error.strerror or error}.", "Check the disk.") from None


def _read_jsonl(path: Path, text_column: str) -> Iterator[Document]:
    with path.open("rb") as stream:
        for number, row in json_rows(text_lines(stream, str(path)), str(path), [text_column]):
            if row is not None:
                text = text_of(row, f"{path}:{number}", text_column)
                yield parse_document(text or "", str(row.get("title") or f"{path.stem}:{number}"))


def split_sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph in order, stripped."""
    sentences = _segment(paragraph) if len(paragraph) <= _LONG_PARAGRAPH else _segment_long(paragraph)
    parts = sentences if paragraph.isascii() else (part for s in sentences for part in _MORE_ENDS.split(s))
    return [stripped for part in parts if (stripped := part.strip())]


def _segment(text: str) -> list[str]:
    from sentencex import segment  # pyright: ignore[reportAttributeAccessIssue]  (compiled, without stubs)

    return segment("en", text)


def _segment_long(paragraph: str) -> Iterator[str]:
    """Sentences of a paragraph of any length, a window at a time: the splitter takes a time that grows with the square
    of a text without spaces. What a window splits near its end is split anew by the next, as quotes may close there."""
    start, begun = 0, ""
    while start < len(paragraph):
        window = paragraph[start : start + _WINDOW]
        sentences = _segment(window)
        taken, is_last = 0, start + len(window) == len(paragraph)
        for number, sentence in enumerate(sentences, start=1):
            if not is_last and taken and (taken + len(sentence) > 3 * _WINDOW // 4 or number == len(sentences)):
                break
            taken += len(sentence)
            if len(sentence) == len(window) and not is_last:  # it is longer than the window
                begun += sentence
                continue
            yield begun + sentence
            begun = ""
        start += taken


def count_words(text: str) -> float:
    """Words between spaces, or in scripts that have none as many as their characters make."""
    if text.isascii():
        return len(text.split())
    ideographs, letters = len(_IDEOGRAPHS.findall(text)), len(_UNSPACED_LETTERS.findall(text))
    if not ideographs and not letters:
        return len(text.split())
    rest = _UNSPACED_LETTERS.sub(" ", _IDEOGRAPHS.sub(" ", text)).split()
    words = sum(any(map(str.isalnum, word)) for word in rest)
    return words + ideographs / IDEOGRAPHS_A_WORD + letters / LETTERS_A_WORD


def is_usable(sentence: str) -> bool:
    """Whether this is a plain sentence: 4 to 60 words, mostly letters, closed, without leftover markup.

    Words of scripts without spaces are counted by their characters, as :func:`count_words` does.
    """
    if not MIN_WORDS <= count_words(sentence) <= MAX_WORDS:
        return False
    first, last = sentence.lstrip(_OPENING)[:1], sentence.rstrip(_CLOSING)[-1:]
    if not first.isalnum() or not (last in _TERMINATORS or "\u0e00" <= last <= "\u0eff") or _MARKUP.search(sentence):
        return False
    visible = "".join(sentence.split())
    needed = MIN_LETTER_SHARE * len(visible)
    return sum(map(str.isalpha, visible)) >= needed or sum(category(c)[0] in "LM" for c in visible) >= needed


def all_sentences(document: Document) -> Iterator[Sentence]:
    """Sentences of a document in reading order with their boundaries, also those that are not usable."""
    boundary = Boundary.DOCUMENT
    for section in document.sections:
        boundary = max(boundary, Boundary.SECTION)
        for paragraph in section.paragraphs:
            boundary = max(boundary, Boundary.PARAGRAPH)
            for text in split_sentences(paragraph):
                yield Sentence(text, boundary)
                boundary = Boundary.NONE
