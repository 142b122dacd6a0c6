"""What comes out of a study: the winner over seeds, and what cannot be told apart from it."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from clusterns_ray.errors import DataError
from clusterns_ray.tuning.comparison import paired, seed_interval
from clusterns_ray.tuning.racing import RACE, RACER, Racer
from clusterns_ray.tuning.space import Overrides


@dataclass(frozen=True)
class Candidate:
    """A configuration that was run with several seeds, or with the trials' seed alone."""

    number: int | None
    """of the trial that had it; None for a base configuration that no trial had"""
    overrides: Overrides
    trial_score: float | None
    """the score that chose it: too good on average, as the best of many is; None where nothing did"""
    scores: dict[int, float]
    """dev score by seed: of the confirmation, or of the race where nothing was confirmed"""
    runs: Mapping[int, int] = field(default_factory=dict)
    """by seed, the numbers of the study's runs that have the scores of a race"""

    @property
    def mean(self) -> float:
        if self.scores:
            return statistics.fmean(self.scores.values())
        assert self.trial_score is not None
        return self.trial_score

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else None


def top_trials(trials: Sequence[FrozenTrial], count: int | None = None) -> list[FrozenTrial]:
    """The best finished trials, the earlier first if they are equal, each set of values once; all without a count.

    Of those that race (as ``racing.merge_seeds`` gives them) the ones with more seeds come first.
    """
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    by_values: dict[str, FrozenTrial] = {}
    for trial in sorted(finished, key=lambda trial: (*standing(trial), trial.number)):
        by_values.setdefault(str(sorted(trial.params.items())), trial)
    return list(by_values.values())[:count]


def standing(trial: FrozenTrial) -> tuple[bool, int, float]:
    """What orders trials, the best first: in the race or out of it, their number of seeds, their value."""
    racer: Racer | None = trial.user_attrs.get(RACER)
    return racer is not None and racer.is_out, -len(racer.scores) if racer else 0, -(trial.value or 0.0)


def choose(candidates: Sequence[Candidate], seeds: int) -> tuple[Candidate, list[Candidate]]:
    """The candidate with the best mean of those with all ``seeds``, and those that cannot be told apart from it."""
    whole = [candidate for candidate in candidates if len(candidate.scores) == seeds] or list(candidates)
    winner = max(whole, key=lambda candidate: candidate.mean)
    return winner, [c for c in candidates if c is not winner and not differ(winner.scores, c.scores)]


def differ(a: Mapping[int, float], b: Mapping[int, float]) -> bool:
    """Whether means over seeds differ: paired t-test over common seeds, two-sided, at 5%. False with fewer than two."""
    interval = seed_interval(paired(a, b))
    return interval is not None and not interval["low"] <= 0 <= interval["high"]


def summary(candidate: Candidate) -> dict[str, Any]:
    return {
        "trial": candidate.number,
        "values": candidate.overrides,
        "mean": candidate.mean,
        "deviation": candidate.deviation,
        "scores": {str(seed): score for seed, score in candidate.scores.items()},
        "trial_score": candidate.trial_score,
    }


RESULT_KEYS = {"dev": str, "winner": dict, "candidates": list, "not_told_apart": list, "confirmation_failures": dict}
SUMMARY_KEYS = ("trial", "values", "mean", "deviation", "scores", "trial_score")


def check_result(text: str | None, where: str) -> dict[str, Any]:
    """What a study's ``result.json`` holds.

    Raises:
        DataError: it is damaged.
    """
    try:
        value = json.loads(text or "")
        for key, kind in RESULT_KEYS.items():
            if not isinstance(value[key], kind):
                raise ValueError(f"its {key} is {str(value[key])[:40]!r}")
        for candidate in (value["winner"], *value["candidates"]):
            if any(key not in candidate for key in SUMMARY_KEYS) or not isinstance(candidate["mean"], int | float):
                raise ValueError("a candidate lacks its scores")
        return {"seeds": [], "study": "", **value}
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    raise DataError(
        f"{where!r} is damaged ({reason}). Give `clusterns tune` of the study file again, which writes it anew."
    )


def write_trials(path: Path, trials: Sequence[FrozenTrial], keys: Sequence[str], seed: int) -> None:
    """``trials.parquet``: a row a run, its values by key, its evaluations as two lists; ``seed`` is that of all but the
    further runs of trials that race."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for trial in trials:
        curve = sorted(trial.intermediate_values.items())
        rows.append(
            {
                "number": trial.number,
                "trial": trial.user_attrs.get(RACE, [trial.number])[0],
                "seed": trial.user_attrs.get(RACE, [0, seed])[1],
                "state": trial.state.name,
                "score": trial.value,
                **{key: trial.params.get(key) for key in keys},
                "steps": trial.user_attrs.get("steps"),
                "seconds": trial.user_attrs.get("seconds"),
                "reason": trial.user_attrs.get("reason"),
                "began": trial.datetime_start,
                "ended": trial.datetime_complete,
                "evaluated_steps": [step for step, _ in curve],
                "evaluated_scores": [score for _, score in curve],
            }
        )
    columns: dict[str, Any] = {}
    for key in rows[0] if rows else ["number", "state", "score"]:
        values = [row[key] for row in rows]
        try:
            columns[key] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # choices of several kinds
            columns[key] = pa.array([None if value is None else str(value) for value in values])
    temporary = path.with_name(f".{path.name}.new")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def copy_model(source: Path, target: Path, about: Sequence[str] = ()) -> None:
    """Put a run's exported model in place in one step; ``about`` is added to its model card."""
    from clusterns_ray.training.checkpoint import replace_directory

    def write(path: Path) -> None:
        shutil.copytree(source, path, dirs_exist_ok=True)
        card = path / "README.md"
        if about and card.is_file():
            text = card.read_text(encoding="utf-8", errors="replace")
            card.write_text("\n".join([text, "## The study that chose it", "", *about]) + "\n", encoding="utf-8")

    replace_directory(target, write)
