"""Two objectives: a high dev score, and few seconds or little memory of a trial.

The study on disk has one, the score; what a trial took is an attribute of it. The sampler sees both, and people the
Pareto front.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

UNITS = {"seconds": ("s", 1.0), "memory": ("GiB", float(1 << 30))}
"""The attributes of a trial that may be minimised: the unit in which people read them, and how much that is."""


class TwoObjectives(optuna.Study):
    """A study as its sampler sees it, with what each finished trial took of ``minimize`` as its second value."""

    def __init__(self, study: optuna.Study, minimize: str) -> None:
        self.__dict__.update(study.__dict__)
        self._directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
        self._minimize = minimize

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        shown = []
        for trial in self._storage.get_all_trials(self._study_id, deepcopy=False):
            if trial.state == TrialState.COMPLETE:
                trial = copy.copy(trial)
                trial.values = [trial.value, trial.user_attrs[self._minimize]]
            shown.append(trial)
        return [trial for trial in shown if states is None or trial.state in states]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the points (score, what it took) no other is better than in one and as good in the other, by what they
    took; of equal ones the first."""
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda number: (points[number][1], -points[number][0], number)):
        if not front or points[number][0] > points[front[-1]][0]:
            front.append(number)
    return front


def show_cost(minimize: str, value: float) -> str:
    """What a trial took, with its unit."""
    unit, size = UNITS[minimize]
    return f"{value / size:.3g} {unit}"
