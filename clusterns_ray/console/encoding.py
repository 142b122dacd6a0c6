"""What a person sees of encoding and indexing: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from clusterns_ray.io.terminal import printable

EVERY_S = 5.0
DOING = {"encoded": "encoding", "indexed": "indexing"}


def encoding_view(stream: TextIO | None = None) -> Lines | Bar:
    """An ``on_event`` callback that writes to ``stream`` (stdout if not given)."""
    where: TextIO = sys.stdout if stream is None else stream
    return Bar(where) if where.isatty() else Lines(where)


def speed_text(event: dict[str, Any]) -> str:
    """Sentences a second, and the time left where it is known."""
    parts = []
    if event.get("sentences_per_second"):
        parts.append(f"{event['sentences_per_second']:,.0f} sentences/s")
    if event.get("seconds_left") is not None:
        seconds = round(event["seconds_left"])
        hours = f"{seconds // 3600}:" if seconds >= 3600 else ""
        parts.append(f"{hours}{seconds // 60 % 60:02d}:{seconds % 60:02d} left")
    return "  ".join(parts)


class Lines:
    """A line every few seconds, for logs."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.last = time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "note":
            print(printable(event["text"]), file=self.stream, flush=True)
        elif time.monotonic() - self.last >= EVERY_S:
            self.last = time.monotonic()
            of = f" of {event['total']:,}" if event["total"] else ""
            line = f"  {event['rows']:,}{of} sentences {event['event']}  {speed_text(event)}"
            print(line.rstrip(), file=self.stream, flush=True)

    def close(self) -> None:
        pass


class Bar:
    """A bar; notes scroll above it."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            console=Console(file=stream),
            transient=True,
        )
        self.doing = ""

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "note":
            self.close()
            self.progress.console.print(printable(event["text"]), highlight=False, markup=False, soft_wrap=True)
            return
        if self.doing != event["event"]:
            self.close()
            self.doing = event["event"]
            self.progress.add_task(DOING[self.doing], total=event["total"], speed="")
            self.progress.start()
        task = self.progress.task_ids[0]
        self.progress.update(task, completed=event["rows"], speed=speed_text(event))
        if event["rows"] == event["total"]:
            self.close()

    def close(self) -> None:
        if self.doing:
            self.progress.stop()
            self.progress.remove_task(self.progress.task_ids[0])
            self.doing = ""
