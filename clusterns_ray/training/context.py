"""Where the files of a run are on this machine: resolved once, before training, and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clusterns_ray.config import Config
from clusterns_ray.io.files import json_text, write_atomic
from clusterns_ray.io.uploader import LocalFiles
from clusterns_ray.training.run_access import on_worker_0


@dataclass(frozen=True)
class RunContext:
    """A configuration and the places of everything that a run of it reads and writes."""

    config: Config
    tokens_dir: Path
    """the tokenised corpus"""
    sts_dir: str | Path | None
    """the directory of the dev set, ``config.evaluation.dev`` within it; None for a run without one"""
    run_dir: Path
    """the run's files, or this machine's copy of them"""
    copied_by: LocalFiles | None = None
    """copies the run to where it belongs, where ``run_dir`` is this machine's alone; None where it is not"""
    command: tuple[str, ...] = ()
    """what started the run, for ``environment.json``"""

    @cached_property
    def uploader(self) -> LocalFiles:
        """``copied_by``, or one that has nothing to copy."""
        return self.copied_by or LocalFiles(self.run_dir)

    @property
    def address(self) -> str:
        """Where a person finds the run."""
        return self.uploader.address("").rstrip("/")

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run; worker 0 does, and all workers raise where it fails."""

        def write() -> None:
            write_atomic(self.run_dir / name, text)
            self.uploader.push(name)

        on_worker_0(write, self.run_dir)

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file of the run, as :meth:`write_text` does."""
        self.write_text(name, json_text(value))
