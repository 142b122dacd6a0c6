"""What one machine says of itself: versions, memory, storage, model, GPUs. Plain values in, plain values out.

It is sent to every node by value and needs nothing but Python there, so that a node which lacks the package, or has
another version of it, can say so.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "transformers", "clusterns-ray")
"""The packages that need the same version on every node: what a worker runs, and what it unpickles."""

PROBE = ".clusterns-doctor-"
"""The prefix of files that are written to see whether that is possible, and removed at once."""


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """What is known without computing anything.

    Args:
        request: ``directories``: key to absolute path, or None for what this machine itself chooses as the local copy
            of ``store``; ``tokens``: key to a file that the driver wrote; ``store``: a URL or None; ``local_path``;
            ``model``: ``{"name", "revision"}`` or None.
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "memory": memory(),
        "gpus": nvidia_smi(),
        "directories": {key: _directory(key, path, request) for key, path in request["directories"].items()},
        "store": outcome(_store, request["store"]) if request["store"] else None,
        "model": outcome(_model, **request["model"]) if request["model"] else None,
    }


def compute() -> dict[str, Any]:
    """What only computing shows: whether torch works, on each GPU and over NCCL between them, and whether K-means
    runs."""
    return {"torch": outcome(_torch), "kmeans": outcome(_kmeans)}


def memory() -> dict[str, int]:
    """Bytes of memory that processes here may use (the container's limit counts), and how many of them are free."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):  # counts what the system would give back
            free = int(line.split()[1]) << 10
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most = _read(limit).strip()
        if most.isdigit() and int(most) < total:
            total = int(most)
            free = min(free, max(total - int(_read(used).strip() or 0), 0))
    return {"total": total, "free": free}


def nvidia_smi() -> list[dict[str, Any]]:
    """The GPUs that the driver sees, whether or not torch can use them: name, bytes of memory, driver."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in lines]
    return [
        {"name": name, "memory": int(size) << 20 if size.isdigit() else None, "driver": driver}
        for name, size, driver in (row for row in rows if len(row) == 3)
    ]


def nearest_directory(path: str) -> Path:
    """``path``, or the nearest directory above it that exists, in which it would be made."""
    place = Path(path)
    return next((each for each in (place, *place.parents) if each.exists()), place)


def _directory(key: str, path: str | None, request: dict[str, Any]) -> dict[str, Any]:
    """Whether files can be written and read there, the bytes that are free, and whether the driver's file is seen."""
    place: dict[str, Any] = {"path": path, "error": None, "free": None, "shared": None}
    try:
        if path is None:
            from clusterns_ray.io.object_store import local_copy

            place["path"] = path = str(local_copy(request["store"], request["local_path"]))
        where = nearest_directory(path)
        place["free"] = shutil.disk_usage(where).free
        with tempfile.NamedTemporaryFile(prefix=PROBE, dir=where) as file:
            file.write(b"clusterns")
            file.flush()
            if Path(file.name).read_bytes() != b"clusterns":
                place["error"] = "what is read is not what was written"
    except (OSError, ImportError) as error:
        place["error"] = getattr(error, "strerror", None) or str(error)
    token = request["tokens"].get(key)
    if token is not None:
        place["shared"] = os.path.isfile(token)
    return place


def _store(url: str) -> None:
    from clusterns_ray.launch.preflight import check_store

    check_store("runtime.storage_path", url)


def _model(name: str, revision: str | None) -> str:
    from clusterns_ray.ops.doctor.hub import find_model

    return find_model(name, revision)


def _torch() -> dict[str, Any]:
    import torch
    from torch.cuda import nccl

    answer: dict[str, Any] = {"cuda": torch.version.cuda, "gpus": [], "nccl": None}
    if not torch.cuda.is_available():
        return answer
    count = torch.cuda.device_count()
    tensors = [torch.ones(256, 256, device=f"cuda:{number}") for number in range(count)]
    for number, tensor in enumerate(tensors):
        if float((tensor @ tensor)[0, 0]) != 256.0:
            raise RuntimeError(f"GPU {number} multiplies wrongly")
        answer["gpus"].append(torch.cuda.get_device_name(number))
    nccl.all_reduce(tensors)
    if any(float(tensor[0, 0]) != count for tensor in tensors):
        raise RuntimeError(f"NCCL adds up wrongly over {count} GPUs")
    answer["nccl"] = ".".join(map(str, nccl.version()))
    return answer


def _kmeans() -> str:
    import importlib.util

    import numpy as np

    from clusterns_ray.clustering.backend import faiss_conflict, spherical_kmeans

    conflict = faiss_conflict()
    if conflict:  # of two faiss wheels the one that is broken may end the process
        raise RuntimeError(conflict)
    rows = np.random.default_rng(0).standard_normal((64, 8), dtype=np.float32)
    lengths = np.linalg.norm(spherical_kmeans(rows, 4, seed=0), axis=1)
    if not np.allclose(lengths, 1.0, atol=1e-4):
        raise RuntimeError(f"centroids have the lengths {lengths.tolist()}, and not 1")
    return "faiss" if importlib.util.find_spec("faiss") is not None else "torch"


def outcome(work: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
    """The ``value`` of a call, or its ``error`` and ``remedy`` in words, so that a node answers whatever fails."""
    try:
        return {"value": work(*arguments, **named), "error": None, "remedy": ""}
    except Exception as error:
        text = " ".join(str(getattr(error, "message", error)).split())[:500] or type(error).__name__
        return {"value": None, "error": text, "remedy": getattr(error, "remedy", "")}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
