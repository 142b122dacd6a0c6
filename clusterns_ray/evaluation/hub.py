"""The public STS data sets of the Hugging Face hub, written in the layout that the other modules here read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clusterns_ray.errors import ConfigError, DataError, first_line
from clusterns_ray.evaluation.sts import FIELDS, graded_pair
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.files import write_atomic, write_json

HUB: dict[str, tuple[str, str]] = {
    **{f"STS{year}/test": (f"mteb/sts{year}-sts", "test") for year in range(12, 17)},
    "STSB/dev": ("mteb/stsbenchmark-sts", "validation"),
    "STSB/test": ("mteb/stsbenchmark-sts", "test"),
    "SICKR/test": ("mteb/sickr-sts", "test"),
}
"""TASK/SUBSET: data set and split."""

PROTOCOL = {
    "STS12 to STS16": "one subset a task, as the hub does not name them; the score over all pairs is the usual one",
    "SICKR": "all 9,927 pairs, as MTEB scores it; the classic test split has 4,927",
}
"""How these differ from the tests as they were first given."""

MANIFEST = "manifest.json"
TIMEOUT = 5.0
"""Seconds in which the hub has to answer at all; its own client would try for half a minute."""


def hub_cache() -> Path:
    """Where :func:`fetch_sts` keeps the data sets where no run has a directory for them."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clusterns" / "sts-hub"


def fetch_sts(directory: Path, names: Sequence[str] | None = None, note: OnNote = lambda text: None) -> Path:
    """Make, or find again, ``directory/TASK/SUBSET.jsonl`` from the hub.

    Each file is written whole or not at all; ``manifest.json`` then lists its data set, split and rows, and the
    protocol. What it lists is not fetched again. With HF_HUB_OFFLINE=1 the hub client's own cache is read.

    Args:
        names: which TASK/SUBSET of :data:`HUB`; all of them if None.
        note: called with what is done, in words.

    Returns:
        ``directory``.

    Raises:
        ConfigError: a name is none of them, the hub does not answer or has no such data set, or the directory cannot
            be written.
    """
    for name in names or ():
        if name not in HUB:
            raise ConfigError(f"STS data 'hf' has no {name!r}; it has {', '.join(HUB)}.", "Name one of these.")
    manifest = _read_manifest(directory)
    wanted = [name for name in names or HUB if not _is_whole(directory, name, manifest)]
    if not wanted:
        return directory
    check_hub([HUB[name][0] for name in wanted])
    for name in wanted:
        dataset, split = HUB[name]
        note(f"Fetching {dataset} ({split}) from the Hugging Face hub")
        rows = _load(dataset, split)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        manifest["files"][name] = {"dataset": dataset, "split": split, "rows": len(lines)}
        try:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(directory / f"{name}.jsonl", "".join(lines))
            write_json(directory / MANIFEST, manifest)
        except OSError as error:
            raise ConfigError(
                f"{str(directory)!r} cannot be written ({error.strerror}), where the STS data of the hub is kept.",
                "Set XDG_CACHE_HOME (or data.cache_dir of a run) to a place that can.",
            ) from None
    return directory


def check_hub(datasets: Iterable[str]) -> None:
    """Make one short request, so that a machine without a network fails at once.

    Raises:
        ConfigError: no answer.
    """
    import huggingface_hub
    from huggingface_hub import constants

    # Local directories stand in for data sets, and the hub client itself handles HF_HUB_OFFLINE.
    if constants.HF_HUB_OFFLINE or all(os.path.isdir(dataset) for dataset in datasets):
        return
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # whatever the HTTP library of this version raises
        raise _unreachable(f"{constants.ENDPOINT} does not answer within {TIMEOUT:.0f} s ({error})") from None


def _load(dataset: str, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        table: Any = datasets.load_dataset(dataset, split=split)
        missing = [field for field in FIELDS if field not in table.column_names]
        if missing:
            raise ConfigError(
                f"data set {dataset!r} ({split}) has no column {missing[0]!r}; STS data has {', '.join(FIELDS)}.",
                "Give a directory of TASK/SUBSET.jsonl files in place of hf.",
            )
        where = f"data set {dataset!r} ({split})"
        pairs = [graded_pair(row, f"{where} row {number}") for number, row in enumerate(table, start=1)]
        return [dict(zip(FIELDS, pair, strict=True)) for pair in pairs]
    except (ConfigError, DataError):
        raise
    except Exception as error:  # the library raises whatever its readers and the network do
        raise _unreachable(f"data set {dataset!r} ({split}) cannot be read: {first_line(error)}") from None


def _unreachable(what: str) -> ConfigError:
    return ConfigError(
        f"STS data 'hf': {what}.",
        "Without the hub give a directory of TASK/SUBSET.jsonl files (--sts DIR, or evaluation.sts).",
    )


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(manifest.get("files"), dict):
            return manifest
    except (OSError, ValueError, AttributeError):
        pass  # absent or damaged: everything is fetched anew
    return {"protocol": PROTOCOL, "files": {}}


def _is_whole(directory: Path, name: str, manifest: dict[str, Any]) -> bool:
    entry = manifest["files"].get(name)
    path = directory / f"{name}.jsonl"
    if not isinstance(entry, dict) or (entry.get("dataset"), entry.get("split")) != HUB[name] or not path.is_file():
        return False
    return path.read_bytes().count(b"\n") == entry.get("rows")
