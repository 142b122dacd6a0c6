"""Checkpoints and exported models that are whole or not there.

A checkpoint is a directory ``checkpoints/step-00000040`` with ``state.pt`` and ``manifest.json`` (sizes and
SHA-256). It is written beside its place, flushed to disk, and renamed into it, so that a crash at any moment
leaves the one before. A damaged one is passed over, with a warning, for the one before.
"""

from __future__ import annotations

import json
import pickle
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from clusterns_ray import distributed
from clusterns_ray.errors import CheckpointError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.files import flush, json_text
from clusterns_ray.io.files import sha256 as file_sha256
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.run_access import on_worker_0

FORMAT = 2

UNUSABLE = (CheckpointError, OSError, RuntimeError, pickle.UnpicklingError)
"""The errors that loading a damaged or foreign checkpoint may raise."""


class Stateful(Protocol):
    """A part of a run that changes while it trains."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class Checkpointer:
    """Saves and loads the parts of a run that change, which are equal on every worker, each under its own name."""

    def __init__(
        self, context: RunContext, parts: dict[str, Stateful], thread: ThreadPoolExecutor | None = None
    ) -> None:
        """
        Args:
            parts: in the order in which they are loaded.
            thread: writes checkpoints while training goes on, for a copy of the state in the host's memory; whoever
                ends it waits for the last one. Without it they are written before training goes on.
        """
        self.context, self.parts, self.thread = context, parts, thread
        self.directory = context.run_dir / "checkpoints"
        self.fingerprint = context.config.fingerprint()
        self._writing: Future[None] | None = None

    def save(self, step: int) -> None:
        """Write a checkpoint of all parts as they are after ``step`` steps; worker 0 does, or its thread.

        Waits until the one before is written, so that there is one copy of the state at most.

        Raises:
            StorageError: on every worker; this one, or with a thread the one before, could not be written.
        """

        def begin() -> None:
            self._wait()
            state = {name: part.state_dict() for name, part in self.parts.items()}
            if self.thread is None:
                self._write(step, state)
            else:
                self._writing = self.thread.submit(self._write, step, copy_to_host(state))

        on_worker_0(begin, self.directory)

    def finish(self) -> None:
        """Wait until the newest checkpoint is written.

        Raises:
            StorageError: on every worker; it could not be.
        """
        on_worker_0(self._wait, self.directory)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        keep, uploader = self.context.config.runtime.keep, self.context.uploader
        path = save_checkpoint(self.directory, step, state, self.fingerprint, keep)
        uploader.push("metrics.jsonl")
        uploader.push(f"checkpoints/{path.name}")
        uploader.keep_newest("checkpoints", keep)

    def newest(self, warn: OnNote) -> dict[str, Any] | None:
        """The state in the newest whole checkpoint, the same on every worker; None where the run has none yet.

        Raises:
            CheckpointError: on every worker; checkpoints are there and every one is damaged or of another
                configuration.
            RuntimeError: on every worker; they see different checkpoints, which a restart of the group may cure, as a
                shared directory may show new files late.
        """
        step, state, problem = 0, None, None
        try:
            step, state = load_newest(self.directory, self.fingerprint, warn) or (0, None)
        except CheckpointError as error:
            problem = str(error)
        seen = distributed.gather_objects((step, problem))
        for worker, (other_step, other_problem) in enumerate(seen):
            if other_problem is not None:
                raise CheckpointError(other_problem)
            if other_step != seen[0][0]:
                raise RuntimeError(
                    f"The newest checkpoint in {str(self.directory)!r} is of step {other_step} on worker {worker} and "
                    f"of step {seen[0][0]} on worker 0. Let runtime.storage_path be a directory that every node sees, "
                    "or in an object store."
                )
        return state

    def of_step(self, step: int) -> dict[str, Any] | None:
        """The state after ``step`` steps; None where there is no whole checkpoint of it."""
        return load_step(self.directory, step, self.fingerprint)

    def load(self, state: dict[str, Any], only: tuple[str, ...] = ()) -> None:
        """Make the parts, or ``only`` those named, what a checkpoint holds.

        Raises:
            CheckpointError: it lacks a part.
            DataError: it is of other data.
        """
        for name, part in self.parts.items():
            if name not in state:
                raise CheckpointError(
                    f"The checkpoint in {str(self.directory)!r} holds no {name!r}, so another version wrote it. Go on "
                    "with that version, or remove the directory to start the run anew."
                )
            if not only or name in only:
                part.load_state_dict(state[name])


def copy_to_host(state: dict[str, Any]) -> dict[str, Any]:
    """A state with every tensor copied to the host; a tensor that is there twice, such as tied weights, stays one."""
    copies: dict[Any, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, dict):
            return {name: copy(item) for name, item in cast("dict[Any, Any]", value).items()}
        return [copy(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value

    return copy(state)


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], fingerprint: str, keep: int) -> Path:
    """Write the state after ``step`` steps and drop all but the newest ``keep``.

    Args:
        directory: the run's ``checkpoints``.
        state: tensors and plain values, as ``torch.load(weights_only=True)`` reads them.
        fingerprint: of the configuration the state belongs to.
    """

    def write(path: Path) -> None:
        with (path / "state.pt").open("wb") as file:  # whose errors name their reason, as torch's own do not
            torch.save(state, file)
        manifest = {
            "format": FORMAT,
            "step": step,
            "fingerprint": fingerprint,
            "files": {
                "state.pt": {"bytes": (path / "state.pt").stat().st_size, "sha256": file_sha256(path / "state.pt")}
            },
        }
        (path / "manifest.json").write_text(json_text(manifest), encoding="utf-8")

    for leftover in directory.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    final = directory / f"step-{step:08d}"
    replace_directory(final, write)
    for old in list_checkpoints(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_newest(directory: Path, fingerprint: str, warn: OnNote) -> tuple[int, dict[str, Any]] | None:
    """``(step, state)`` of the newest whole checkpoint, on the CPU, or None where there is none.

    Raises:
        CheckpointError: checkpoints are there and every one is damaged or of another configuration.
    """
    candidates = list_checkpoints(directory)
    for path in candidates:
        try:
            step = verify(path, fingerprint)
            return step, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except UNUSABLE as error:
            warn(f"Checkpoint {path.name} is passed over: {error}")
    if candidates:
        raise CheckpointError(
            f"None of the {len(candidates)} checkpoints in {str(directory)!r} can be used (see the warnings above). "
            "Remove that directory to start the run anew, or restore it from a copy."
        )
    return None


def load_step(directory: Path, step: int, fingerprint: str) -> dict[str, Any] | None:
    """The state after ``step`` steps, on the CPU; None where there is no whole checkpoint of it."""
    path = directory / f"step-{step:08d}"
    try:
        verify(path, fingerprint)
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except UNUSABLE:
        return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Directories of checkpoints, the newest first."""
    return sorted(directory.glob("step-????????"), reverse=True)


def verify(path: Path, fingerprint: str) -> int:
    """Check that a checkpoint is whole and of this configuration.

    Returns:
        The step that it is of.

    Raises:
        CheckpointError: it is not; the message says why.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"it has format {manifest['format']}, and this version reads {FORMAT}")
        step, stamp = manifest["step"], manifest["fingerprint"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if path.name != f"step-{step:08d}" or "state.pt" not in files:
            raise ValueError(f"it names step {step} and the files {', '.join(files) or 'none'}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its manifest.json cannot be read ({error})") from None
    if stamp != fingerprint:
        raise CheckpointError(f"it belongs to another configuration ({stamp}, not {fingerprint})")
    for name, (size, sha256) in files.items():
        file = path / Path(name).name
        if not file.is_file() or file.stat().st_size != size or file_sha256(file) != sha256:
            raise CheckpointError(f"{name} is missing or damaged")
    return step


def replace_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Make ``final`` what ``write(temporary)`` wrote: flushed to disk first, then put in place by renaming."""
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final)
    temporary = final.parent / f".{final.name}.new-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        write(temporary)
        for file in temporary.rglob("*"):
            flush(file)
        if final.exists():
            aside = final.parent / f".{final.name}.old-{uuid.uuid4().hex[:8]}"
            final.rename(aside)
            temporary.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(final)
        flush(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(final: Path) -> None:
    """Remove what a killed :func:`replace_directory` left; if it died between its renames, put the old one back."""
    for old in final.parent.glob(f".{final.name}.old-*"):
        old.rename(final) if not final.exists() else shutil.rmtree(old, ignore_errors=True)
    for new in final.parent.glob(f".{final.name}.new-*"):
        shutil.rmtree(new, ignore_errors=True)
