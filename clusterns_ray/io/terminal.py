"""Text from files as it may be printed: a terminal obeys some characters, and files may hold any."""

from __future__ import annotations

import re
from unicodedata import category

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # colours, cursor, clearing
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"
)
_BIDIRECTIONAL = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """The text without escape sequences, control characters (but line ends, tabs) and marks that reverse its order."""
    if text.isprintable():  # which escape and control characters are not, nor those marks
        return text
    text = _SEQUENCE.sub("", text)
    return "".join(
        character
        for character in text
        if character in "\n\t" or (category(character) not in ("Cc", "Cs") and character not in _BIDIRECTIONAL)
    )
