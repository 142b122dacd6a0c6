"""ClusterNS: sentence embeddings without labels, trained and tuned on Ray.

Everything is imported where it is first used, so that ``import clusterns_ray`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterns_ray.config import Config, load_config, make_config
    from clusterns_ray.console.progress import progress_view
    from clusterns_ray.errors import ClusterNSError, ConfigError, DataError
    from clusterns_ray.evaluation.suite import Evaluation, evaluate
    from clusterns_ray.inference.distributed_encode import encode
    from clusterns_ray.inference.embedding_file import EmbeddingFile
    from clusterns_ray.inference.export import export_model
    from clusterns_ray.inference.exported import ExportedEncoder
    from clusterns_ray.inference.search import SemanticIndex
    from clusterns_ray.launch.trainer import train
    from clusterns_ray.models.encoder import Encoder
    from clusterns_ray.report import write_report
    from clusterns_ray.report.map import draw_map
    from clusterns_ray.report.push import push
    from clusterns_ray.training.result import RunResult
    from clusterns_ray.tuning.result import StudyResult
    from clusterns_ray.tuning.study import load_study
    from clusterns_ray.tuning.sweep import tune

__version__ = "0.1.0"

_HOMES = {
    "load_config": "config",
    "make_config": "config",
    "Config": "config",
    "train": "launch.trainer",
    "RunResult": "training.result",
    "load_study": "tuning.study",
    "tune": "tuning.sweep",
    "StudyResult": "tuning.result",
    "Encoder": "models.encoder",
    "evaluate": "evaluation.suite",
    "Evaluation": "evaluation.suite",
    "encode": "inference.distributed_encode",
    "EmbeddingFile": "inference.embedding_file",
    "export_model": "inference.export",
    "ExportedEncoder": "inference.exported",
    "SemanticIndex": "inference.search",
    "draw_map": "report.map",
    "write_report": "report",
    "push": "report.push",
    "progress_view": "console.progress",
    "ClusterNSError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
}
"""Each public name, in the order in which they are documented, and its module."""

__all__ = [
    "ClusterNSError",
    "Config",
    "ConfigError",
    "DataError",
    "EmbeddingFile",
    "Encoder",
    "Evaluation",
    "ExportedEncoder",
    "RunResult",
    "SemanticIndex",
    "StudyResult",
    "draw_map",
    "encode",
    "evaluate",
    "export_model",
    "load_config",
    "load_study",
    "make_config",
    "progress_view",
    "push",
    "train",
    "tune",
    "write_report",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
