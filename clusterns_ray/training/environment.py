"""``environment.json``: with what, on what, and by which command a run was made."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clusterns_ray import distributed

GPU_DRIVER = Path("/proc/driver/nvidia/version")

PACKAGES = ("clusterns-ray", "torch", "transformers", "ray", "numpy", "faiss-cpu", "faiss-gpu")


def describe_environment(device: torch.device, command: Sequence[str], num_workers: int) -> dict[str, Any]:
    """The content of ``environment.json``; machine and versions are this worker's.

    Args:
        command: the driver's command line.
    """
    return {
        "command": list(command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: installed for name in PACKAGES if (installed := _version(name))},
            **(_cuda_versions() if device.type == "cuda" else {}),
        },
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
            if sys.platform != "win32"
            else None,
            **_gpu(device),
        },
        "num_workers": num_workers,
    }


def changed_versions(path: Path, environment: dict[str, Any]) -> str | None:
    """A note on versions that differ from those in the run's ``environment.json``; None where none do."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["versions"]
        pairs = [(name, before[name], environment["versions"][name]) for name in ("torch", "transformers")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    changes = [f"{name} {old} and goes on with {new}" for name, old, new in pairs if old != new]
    if not changes:
        return None
    return (
        f"The run was begun with {', '.join(changes)}: it may differ in its last digits from one that was not changed."
    )


def _gpu(device: torch.device) -> dict[str, str | int | None]:
    """The GPU's name, and its multiprocessors: what torch draws on it, in models with dropout of their own, depends on
    their number."""
    if device.type != "cuda":
        return {"gpu": None}
    return {
        "gpu": torch.cuda.get_device_name(device),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
    }


def _cuda_versions() -> dict[str, str | int | None]:
    """The libraries below torch, by which sums differ in their last digits."""
    return {
        "driver": _gpu_driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": distributed.nccl_version(),
    }


def _gpu_driver() -> str | None:
    """The version of NVIDIA's driver, as Linux tells it; None where it does not."""
    try:
        version_of_module = GPU_DRIVER.read_text().partition("\n")[0]
    except OSError:
        return None
    number = re.search(r"\b\d{3,}\.\d[\d.]*", version_of_module)
    return number and number[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
