"""A document as prose: its title, and the paragraphs of its sections; and where a sentence stands in it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import NamedTuple


class Boundary(IntEnum):
    """The largest part of a text that begins with a sentence."""

    NONE = 0
    PARAGRAPH = 1
    SECTION = 2
    DOCUMENT = 3


class Sentence(NamedTuple):
    """A sentence, and what begins with it."""

    text: str
    boundary: Boundary


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

    # Not splitlines(), which also splits at characters that may stand within a sentence, such as U+2028.
    for line in map(str.strip, text.replace("\r\n", "\n").replace("\r", "\n").split("\n")):
        begun = _heading(line)
        if begun is not None:
            close()
            heading, block = begun, []
        else:
            block.append(line)
    close()
    return Document(title, tuple(sections))


def _heading(line: str) -> str | None:
    """The text of a heading; None for another line. Takes a time linear in the line, as regular expressions may not."""
    if line.startswith("#"):
        rest = line.lstrip("#")
        if len(line) - len(rest) > 6 or not rest[:1].isspace():
            return None
        return rest.strip().rstrip("#").rstrip()
    if line.startswith("="):
        level = len(line) - len(line.lstrip("="))
        if level > 6 or len(line) <= 2 * level or not line.endswith("=" * level):
            return None
        return line[level:-level].strip()
    return None


def _paragraphs(lines: list[str]) -> tuple[str, ...]:
    return tuple(" ".join(" ".join(group).split()) for filled, group in groupby(lines, key=bool) if filled)
