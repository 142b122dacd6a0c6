"""ClusterNS: sentence embeddings without labels, trained and tuned on Ray.

Everything is imported where it is first used, so that ``import clusterns_ray`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterns_ray.config import Config, load_config
    from clusterns_ray.evaluation.suite import evaluate_model as evaluate
    from clusterns_ray.inference.search import SemanticIndex
    from clusterns_ray.launch.trainer import train
    from clusterns_ray.models.encoder import Encoder
    from clusterns_ray.report.map import draw_map
    from clusterns_ray.tuning.study import load_study
    from clusterns_ray.tuning.sweep import tune

__version__ = "0.1.0"
__all__ = ["Config", "Encoder", "SemanticIndex", "draw_map", "evaluate", "load_config", "load_study", "train", "tune"]

_HOMES = {
    "Config": ("clusterns_ray.config", "Config"),
    "load_config": ("clusterns_ray.config", "load_config"),
    "Encoder": ("clusterns_ray.models.encoder", "Encoder"),
    "SemanticIndex": ("clusterns_ray.inference.search", "SemanticIndex"),
    "draw_map": ("clusterns_ray.report.map", "draw_map"),
    "evaluate": ("clusterns_ray.evaluation.suite", "evaluate_model"),
    "load_study": ("clusterns_ray.tuning.study", "load_study"),
    "train": ("clusterns_ray.launch.trainer", "train"),
    "tune": ("clusterns_ray.tuning.sweep", "tune"),
}


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
