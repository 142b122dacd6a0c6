"""What the doctor finds, and checks that may not take longer than they are given."""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from clusterns_ray.errors import ClusterNSError

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Level
    """problem: a run would fail, or not be what was asked for; warning: it would run, but the user should know."""
    what: str
    """The name of the check: `storage`, `versions`."""
    value: str
    """What was there."""
    remedy: str = ""
    """What to do, where it is not ok."""

    def text(self, width: int = 100) -> str:
        """The finding in lines of at most ``width`` characters."""
        label, indent = f"  {self.level:<8} {self.what:<14} ", " " * 26
        # A long name, such as the keys of a value in a cluster file, has a line of its own.
        head, first = (f"{label.rstrip()}\n", indent) if len(label) > len(indent) else ("", label)
        wrapper = textwrap.TextWrapper(
            max(width, len(indent) + 20), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        wrapper.initial_indent = first
        lines = head + wrapper.fill(self.value)
        wrapper.initial_indent = indent + "-> "
        return lines + ("\n" + wrapper.fill(self.remedy) if self.remedy else "")


def ok(what: str, value: str) -> Finding:
    return Finding("ok", what, value)


def warning(what: str, value: str, remedy: str) -> Finding:
    return Finding("warning", what, value, remedy)


def problem(what: str, value: str, remedy: str) -> Finding:
    return Finding("problem", what, value, remedy)


def from_error(what: str, error: ClusterNSError) -> list[Finding]:
    """A problem for each line of a refusal, with the refusal's remedy."""
    return [problem(what, line.strip(), error.remedy) for line in error.message.splitlines()]


class Check:
    """Work that begins in a thread of its own when this is made, and is not waited for beyond a deadline."""

    def __init__(self, what: str, work: Callable[[], Iterable[Finding]], deadline: float) -> None:
        """
        Args:
            deadline: of ``time.monotonic()``.
        """
        self.what, self.deadline, self.began = what, deadline, time.monotonic()
        self._outcome: list[list[Finding]] = []

        def run() -> None:
            try:
                findings = list(work())
            except ClusterNSError as error:
                findings = from_error(what, error)
            except Exception as error:  # whatever a library raises is a finding too, and the other checks go on
                value = f"the check itself failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
                findings = [problem(what, value, "Correct what it names; a run may meet the same.")]
            self._outcome.append(findings)

        # A daemon, as a file system that hangs cannot be interrupted.
        self._thread = threading.Thread(target=run, daemon=True, name=f"doctor {what}")
        self._thread.start()

    def findings(self) -> list[Finding]:
        """The results; no answer in time is a problem."""
        self._thread.join(max(self.deadline - time.monotonic(), 0))
        if self._outcome:
            return self._outcome[0]
        value = f"no answer within {time.monotonic() - self.began:.0f} s"
        return [problem(self.what, value, "Look at the disk or the network behind it: a run would hang there too.")]


def size_text(count: float) -> str:
    """A number of bytes as people write it, such as ``3 MiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def count_text(number: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number:,} {noun}{'s'[: number != 1]}"
