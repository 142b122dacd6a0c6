"""The trials of a sweep as Ray's metrics; see ``clusterns_ray.launch.gauges``."""

from __future__ import annotations

from clusterns_ray.io.events import Event, OnEvent
from clusterns_ray.launch.gauges import set_gauge
from clusterns_ray.tuning.events import TrialBegan, TrialEvent, TrialFailed, TrialScored

STATES = ("running", "pruned", "finished", "failed")


def with_trial_gauges(on_event: OnEvent, study: str) -> OnEvent:
    """``on_event``, with the gauges of ``study`` set by each event of a trial in this sweep."""
    states: dict[str, str] = {}
    scores: list[float] = []

    def handle(event: Event) -> None:
        on_event(event)
        match event:
            case TrialScored(name, state, score=score):
                states[name] = "running" if state == "evaluated" else state
                scores.append(score)
                set_gauge("best_dev_score", max(scores), study)
            case TrialBegan(name):
                states[name] = "running"
            case TrialFailed(name):
                states[name] = "failed"
            case _:
                pass
        if isinstance(event, TrialEvent):
            for state in STATES:
                set_gauge("trials", list(states.values()).count(state), study, state)

    return handle
