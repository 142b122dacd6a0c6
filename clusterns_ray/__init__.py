"""ClusterNS: sentence embeddings without labels, trained and tuned on Ray.

Everything is imported where it is first used, so that ``import clusterns_ray`` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterns_ray.config import Config, load_config
    from clusterns_ray.encoder import Encoder
    from clusterns_ray.evaluation.suite import evaluate_model as evaluate
    from clusterns_ray.launch.trainer import train

__version__ = "0.1.0"
__all__ = ["Config", "Encoder", "evaluate", "load_config", "train"]

_HOMES = {
    "Config": ("clusterns_ray.config", "Config"),
    "load_config": ("clusterns_ray.config", "load_config"),
    "Encoder": ("clusterns_ray.encoder", "Encoder"),
    "evaluate": ("clusterns_ray.evaluation.suite", "evaluate_model"),
    "train": ("clusterns_ray.launch.trainer", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
