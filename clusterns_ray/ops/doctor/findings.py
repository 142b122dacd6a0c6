"""What the doctor finds, and checks that may not take longer than they are given."""

from __future__ import annotations

import re
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from clusterns_ray.errors import ClusterNSError

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    """problem: a run would fail, or not be what was asked for; warning: it would run, and something should be known."""
    what: str
    """was looked at: `storage`, `versions`"""
    value: str
    """that was found"""
    remedy: str = ""
    """what to do, where it is not ok"""

    def text(self, width: int = 100) -> str:
        """As lines of at most ``width`` characters."""
        label, indent = f"  {self.level:<8} {self.what:<14} ", " " * 26
        # A long name, such as the keys of a value in a cluster file, has a line of its own.
        head, first = (f"{label.rstrip()}\n", indent) if len(label) > len(indent) else ("", label)

        def wrap(text: str, initial: str) -> str:
            return textwrap.fill(
                text,
                max(width, len(indent) + 20),
                initial_indent=initial,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )

        lines = head + wrap(self.value, first)
        return lines + ("\n" + wrap(self.remedy, indent + "-> ") if self.remedy else "")


def warning(what: str, value: str, remedy: str) -> Finding:
    return Finding("warning", what, value, remedy)


def problem(what: str, value: str, remedy: str) -> Finding:
    return Finding("problem", what, value, remedy)


def from_error(what: str, error: BaseException, remedy: str = "Mend it, and ask again.") -> list[Finding]:
    """A problem for each line of a refusal; what it ends with is the remedy, as messages here are written so.

    Args:
        remedy: where there is none.
    """
    found = []
    for line in str(error).splitlines() or [type(error).__name__]:
        value, own = _split(line.strip())
        found.append(Finding("problem", what, value, own or remedy))
    return found


def _split(line: str) -> tuple[str, str]:
    """Before the last sentence, or where there is but one, before the first semicolon; not within brackets."""
    flat, depth = "", 0
    for sign in line:
        depth += (sign == "(") - (sign == ")" and depth > 0)
        flat += "x" if depth else sign
    ends = [match.span() for match in re.finditer(r"(?<=[.)])\s+(?=[A-Z])", flat)][-1:] or [
        match.span() for match in re.finditer(r";\s+", flat)
    ]
    if not ends:
        return line, ""
    start, stop = ends[0]
    return line[:start], line[stop].upper() + line[stop + 1 :]


class Check:
    """Work that began when this was made, in a thread of its own, and is waited for no longer than until a deadline."""

    def __init__(self, what: str, work: Callable[[], Sequence[Finding]], deadline: float):
        """
        Args:
            deadline: of ``time.monotonic()``.
        """
        self.what, self.deadline, self.began = what, deadline, time.monotonic()
        self._outcome: list[Sequence[Finding]] = []

        def run() -> None:
            try:
                found: Sequence[Finding] = work()
            except ClusterNSError as error:
                found = from_error(what, error)
            except Exception as error:  # whatever a library raises is a finding too, and the other checks go on
                found = [
                    Finding(
                        "problem",
                        what,
                        f"the check itself failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}",
                        "Mend what it names; a run may meet the same.",
                    )
                ]
            self._outcome.append(found)

        # A daemon, as a file system that hangs cannot be interrupted.
        self._thread = threading.Thread(target=run, daemon=True, name=f"doctor {what}")
        self._thread.start()

    def findings(self) -> Sequence[Finding]:
        """What was found; that there was no answer in time is a finding too."""
        self._thread.join(max(self.deadline - time.monotonic(), 0))
        if self._outcome:
            return self._outcome[0]
        return [
            Finding(
                "problem",
                self.what,
                f"no answer within {time.monotonic() - self.began:.0f} s",
                "What hangs here would hang a run: look at the disk or the network behind it.",
            )
        ]


def size_text(count: float) -> str:
    """Bytes, as people write them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
