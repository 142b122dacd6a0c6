"""Where runs are read and where their page goes: directories, or an object store and a copy on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from clusterns_ray.errors import ConfigError, StorageError
from clusterns_ray.io.object_store import Store, is_url, local_copy, reading_place, split_url
from clusterns_ray.report.record import not_a_run

LARGE = (".html", ".parquet", ".npy")
"""Endings of a run's files that a report does not read."""


@dataclass(frozen=True)
class Target:
    """Where a page is written."""

    path: Path
    url: str | None = None
    """where it is copied to"""

    def publish(self) -> None:
        if self.url is None:
            return
        holder, name = split_url(self.url)
        try:
            Store(holder).upload(self.path, name)
        except StorageError as error:
            raise StorageError(f"{error} The page is in {str(self.path)!r}; -o FILE.html writes only a file.") from None


def target_of(runs: Sequence[str | Path], output: str | Path | None) -> Target:
    """``-o``, or ``report.html`` beside the one run, or in the deepest directory that holds all of several.

    Raises:
        ConfigError: no run is named, or several lie in different places and no file is.
    """
    if output is not None:
        return _in_store(str(output)) if is_url(output) else Target(Path(output))
    if not runs:
        raise ConfigError("No run is named; give the directory of one, such as runs/NAME.")
    if not any(is_url(run) for run in runs):
        return Target(default_output([Path(run) for run in runs]))
    parts = [str(run).partition("?") for run in runs]
    options = {mark + value for _, mark, value in parts}
    folders = [address.rstrip("/").split("/") for address, _, _ in parts]
    if len(runs) > 1:
        folders = [folder[:-1] for folder in folders]
    levels = [set(names) for names in zip(*folders)]
    common = [names.pop() for names in takewhile(lambda names: len(names) == 1, levels)]
    if len(common) < 3 or len(options) > 1:  # s3:, nothing, BUCKET, ...
        raise ConfigError("The runs lie in different places, so none is that of their page. Give -o FILE.html.")
    return _in_store("/".join([*common, "report.html"]) + options.pop())


def default_output(directories: Sequence[Path]) -> Path:
    """``RUN/report.html``, or ``report.html`` in the deepest directory that holds all runs."""
    if len(directories) == 1:
        return directories[0] / "report.html"
    return Path(os.path.commonpath([directory.resolve().parent for directory in directories])) / "report.html"


def source(run: str | Path) -> tuple[Path, str | None]:
    """The directory to read, and where it came from if that is a copy.

    Raises:
        ConfigError: there is no run at a URL.
    """
    if not is_url(run):
        return Path(run), None
    place = reading_place(str(run))
    assert place.store is not None
    names = place.store.names()
    if "config.yaml" not in names and "study.yaml" not in names:
        inside = [name.split("/")[0] for name in names if name.count("/") == 1 and name.endswith("/config.yaml")]
        raise not_a_run(str(run), inside)
    place.fetch_files(leave_out=LARGE)
    return place.local, place.address


def _in_store(url: str) -> Target:
    holder, name = split_url(url)
    path = local_copy(holder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return Target(path, url)
