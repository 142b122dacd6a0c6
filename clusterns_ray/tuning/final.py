"""``--finalize``: the winner and what it has to beat on the test sets, once, when nothing more is to be chosen."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from clusterns_ray.errors import ConfigError, DamagedError, DataError
from clusterns_ray.evaluation import hub
from clusterns_ray.evaluation.sts import StsTests, read_tests, score_tests
from clusterns_ray.io.files import json_text
from clusterns_ray.tuning.comparison import model_cosines, over_pairs, untrained_cosines
from clusterns_ray.tuning.optuna_study import OptunaStudy
from clusterns_ray.tuning.outcome import Outcome, decide, models_of, read_final
from clusterns_ray.tuning.runs import is_finished, was_trained
from clusterns_ray.tuning.selection import summary
from clusterns_ray.tuning.study import Study
from clusterns_ray.tuning.study_file import FILES, readable_study_errors
from clusterns_ray.tuning.sweep import owner

Cosines = dict[str, np.ndarray]


def finalize(study: Study) -> tuple[dict[str, Any], str]:
    """Score the winner, the base configuration (one model a seed of each) and the untrained encoder on the STS tests;
    or read what was scored before.

    Returns:
        What ``final.json`` holds, and where that is: `when`, `trial`, `seeds`; `tasks` and `average` of the winner with
        mean and deviation; `untrained` and `base` the same; `differences`: the winner's mean minus theirs by task, with
        95 % intervals of a paired bootstrap.

    Raises:
        ConfigError: the study is not finished, or its STS data holds no tests.
        DataError: a file of the study is damaged.
    """
    home = study.home
    where = (home / "final.json").address
    if home.has("final.json"):
        return read_final(study), where
    if study.base.evaluation.sts == "structure":
        raise ConfigError(
            "evaluation.sts is structure, which has no test sets. Score the model with `clusterns evaluate "
            f"{(home / 'model').address} --sts DIRECTORY`."
        )
    unfinished = ConfigError(
        f"The study {study.config.name!r} is not finished, and tests are looked at once. Run `clusterns tune` of it to "
        "its end first."
    )
    there = home.store is not None or (study.directory / FILES[study.config.storage]).is_file()
    if not there or not home.has("result.json"):
        raise unfinished
    with readable_study_errors(study), owner(study):
        optuna_study = OptunaStudy(study)
        if not is_finished(study, optuna_study):
            raise unfinished
        outcome = decide(study, optuna_study)
        _check_result(study, outcome)
        config = study.space.config(outcome.winner.overrides)
        tests = read_final_tests(str(config.evaluation.sts), config.evaluation.dev)
        runs = {"winner": models_of(study, outcome.winner), "base": models_of(study, outcome.base)}
        winner, base = (model_cosines([run.fetch("model") for run in runs[name]], tests) for name in runs)
        others = {"untrained": [untrained_cosines(config, tests)], "base": base}
        value = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "trial": outcome.winner.number,
            "seeds": sorted(outcome.winner.scores),
            "untrained_models": {name: sum(not was_trained(run) for run in runs[name]) for name in runs},
            **scores_of(tests, winner),
            **{name: scores_of(tests, models) if models else None for name, models in others.items()},
            "differences": over_pairs(tests, winner, others),
        }
        home.write("final.json", json_text(value))
    return value, where


def _check_result(study: Study, outcome: Outcome) -> None:
    """Refuse a ``result.json`` that names another winner than the study's own scores do.

    Raises:
        DataError: it does, or cannot be read.
    """
    try:
        known = json.loads(study.home.read("result.json") or "")["winner"]
        if (known["trial"], known["mean"]) == (outcome.winner.number, summary(outcome.winner)["mean"]):
            return
        reason = "it names another winner than the scores of the study do"
    except (ValueError, KeyError, TypeError, DamagedError):
        reason = "it cannot be read"
    raise DataError(
        f"{(study.home / 'result.json').address!r} is damaged: {reason}. Give `clusterns tune` of the study again, "
        "which writes it anew, and then --finalize."
    )


def read_final_tests(sts: str, dev: str) -> StsTests:
    """The tests in a study's STS data, without the dev set, which has chosen the winner.

    Raises:
        ConfigError: nothing is left.
    """
    directory = str(hub.fetch_sts(hub.hub_cache())) if sts == "hf" else sts
    tests = read_tests(directory)
    tests = replace(tests, extra=[pairs for pairs in tests.extra if pairs.name != dev])
    if not tests.subsets():
        raise ConfigError(
            f"{sts!r} holds no test set: {dev} has chosen the winner, and there is no other. Score the model on other "
            "pairs with `clusterns evaluate RUN/model --sts DIRECTORY`."
        )
    return tests


def scores_of(tests: StsTests, models: Sequence[Cosines]) -> dict[str, Any]:
    """Scores of the models by task, sets of one's own among them, with mean and deviation; and their average."""
    scores = [score_tests(tests, cosines) for cosines in models]
    tasks = {task: spread([s["tasks"][task]["spearman"] for s in scores]) for task in tests.tasks}
    tasks |= {pairs.name: spread([s["extra"][pairs.name] for s in scores]) for pairs in tests.extra}
    averages = [s["average"] for s in scores if s["average"] is not None]
    return {"tasks": tasks, "average": spread(averages) if averages else None}


def spread(scores: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    return {"mean": statistics.fmean(scores), "deviation": deviation, "scores": scores}
