"""Figures of a run or a study as Ray's metrics, which Prometheus collects and Grafana draws.

The driver sets them as events arrive, so that workers do nothing for it. Prometheus shows them as
``ray_clusterns_NAME``, with the tag ``run``: the name of the run or the study.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from clusterns_ray.io.events import Evaluated, Event, OnEvent, RunStarted, StepLogged

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

GAUGES = {
    "loss": "Loss over the global batch",
    "sentences_per_second": "Sentences that all workers together train on in a second",
    "clusters_used": "Clusters with a sentence of the batch",
    "false_negative_rate": "Share of the pairs of a batch that are false negatives",
    "grad_norm": "Norm of the gradient",
    "learning_rate": "Learning rate",
    "step": "Training steps done",
    "dev_score": "Spearman x 100 on the dev set",
    "best_dev_score": "The best of them so far",
    "restarts": "How often the workers were started again, after a drain or a death",
    "trials": "Trials and confirming runs of a study, by state",
}


def set_gauge(name: str, value: float, run: str, state: str = "") -> None:
    """Set a gauge of :data:`GAUGES`; Ray has to be connected."""
    _gauge(name).set(value, {"run": run, "state": state})


@cache
def _gauge(name: str) -> Gauge:
    from ray.util.metrics import Gauge

    return Gauge(f"clusterns_{name}", GAUGES[name], ("run", "state"))


def with_gauges(on_event: OnEvent, run: str) -> OnEvent:
    """``on_event``, with the gauges of ``run`` set by each event."""
    starts = 0

    def handle(event: Event) -> None:
        nonlocal starts
        on_event(event)
        match event:
            case RunStarted(step):
                set_gauge("step", step, run)
                set_gauge("restarts", starts, run)
                starts += 1
            case StepLogged(step, record=record):
                set_gauge("step", step, run)
                for name in record.keys() & GAUGES.keys() - {"step"}:
                    set_gauge(name, record[name], run)
            case Evaluated(step, score):
                set_gauge("step", step, run)
                set_gauge("dev_score", score, run)
                if event.best_score is not None:
                    set_gauge("best_dev_score", event.best_score, run)
            case _:
                pass

    return handle
