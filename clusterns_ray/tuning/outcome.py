"""What a study's trials and confirming runs decide, and the files that say so."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import FrozenTrial

from clusterns_ray.config import Config, dump_config, make_config
from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import ClusterNSError, ConfigError, DamagedError, DataError
from clusterns_ray.evaluation.sts import StsTests, read_pairs
from clusterns_ray.io.events import OnEvent, notes_to
from clusterns_ray.io.files import check_unchanged, json_text
from clusterns_ray.io.object_store import Place
from clusterns_ray.models.base_model import complete
from clusterns_ray.tuning.analysis import Trial, front, read_trial
from clusterns_ray.tuning.comparison import (
    model_cosines,
    over_pairs,
    paired,
    seed_interval,
    sentences,
    untrained_cosines,
)
from clusterns_ray.tuning.optuna_study import OptunaStudy, worker_hours
from clusterns_ray.tuning.previous import about_earlier
from clusterns_ray.tuning.racing import RACER, Racer
from clusterns_ray.tuning.runs import base_trial, clean_up, planned_runs, runs_of, values_of, was_trained
from clusterns_ray.tuning.selection import Candidate, choose, copy_model, summary, top_trials, write_trials
from clusterns_ray.tuning.space import with_values
from clusterns_ray.tuning.study import Study


@dataclass(frozen=True)
class Outcome:
    """What a study's trials and confirmations decide."""

    candidates: list[Candidate]
    winner: Candidate
    alike: list[Candidate]
    """Those that cannot be told apart from the winner."""
    base: Candidate | None
    """The base configuration; None if its runs failed."""
    before: float | None
    """The dev score of the untrained encoder that the winner started from."""


def encoder_key(config: Config) -> str:
    """What the untrained encoder's dev score depends on, as a key of the scores that the study holds."""
    encoder = {key: value for key, value in config.resolved()["encoder"].items() if key not in ("dropout", "head")}
    return json.dumps([encoder, config.train.precision], sort_keys=True)


def candidates(study: Study, optuna_study: OptunaStudy) -> list[Candidate]:
    """The best trials with the scores of their confirmations."""
    scores: dict[int, dict[int, float]] = {}
    for run in planned_runs(study, optuna_study):
        score = run.score(study) if run.trial is not None else None
        if run.trial is not None and score is not None:
            scores.setdefault(run.trial, {})[run.seed] = score
    top = top_trials(optuna_study.merged_trials(), study.config.confirmation.top)
    if not study.confirms:
        return [raced(study, trial) for trial in top]
    return [
        Candidate(trial.number, values_of(study, trial), trial.value or 0.0, scores.get(trial.number, {}))
        for trial in top
    ]


def raced(study: Study, trial: FrozenTrial) -> Candidate:
    """A trial with the scores of its race; with its own alone where none was held."""
    racer: Racer | None = trial.user_attrs.get(RACER)
    if racer is None:
        return Candidate(trial.number, values_of(study, trial), trial.value or 0.0, {})
    numbers = {seed: racer.runs[seed].number for seed in racer.scores}
    return Candidate(trial.number, values_of(study, trial), racer.trial.value or 0.0, racer.scores, numbers)


def baseline(study: Study, optuna_study: OptunaStudy, candidates: list[Candidate]) -> Candidate | None:
    """The base configuration, by the same seeds as the others; None if none of its runs has ended."""
    number = base_trial(study, optuna_study)
    for candidate in candidates:
        if candidate.number == number and (candidate.scores or not study.confirms):
            return candidate
    runs = [run for run in planned_runs(study, optuna_study) if run.trial is None]
    scores = {run.seed: score for run in runs if (score := run.score(study)) is not None}
    if study.confirms or len(scores) > 1:
        return Candidate(number, {}, None, scores) if scores else None
    if number is not None:
        trial = next(trial for trial in optuna_study.merged_trials() if trial.number == number)
        return replace(raced(study, trial), overrides={})
    score = scores.get(study.base.seed)
    return None if score is None else Candidate(None, {}, score, {})


def decide(study: Study, optuna_study: OptunaStudy) -> Outcome:
    """The winner and what stands beside it. At least one trial must have finished."""
    best = candidates(study, optuna_study)
    seeds = len(study.config.confirmation.seeds) or max(len(candidate.scores) for candidate in best)
    winner, alike = choose(best, seeds)
    before = optuna_study.recall("scores_before", {}).get(encoder_key(complete(study.space.config(winner.overrides))))
    return Outcome(best, winner, alike, baseline(study, optuna_study, best), before)


def models_of(study: Study, candidate: Candidate | None) -> list[Place]:
    """The directories of a candidate's runs: one for each seed, or the trial's own if it has no other."""
    if candidate is None:
        return []
    if candidate.runs:
        return [runs_of(study, number) / f"{number:04d}" for number in candidate.runs.values()]
    name = "base" if candidate.number is None or not candidate.overrides else f"{candidate.number:04d}"
    if candidate.scores:
        return [runs_of(study, None) / f"{name}-seed{seed}" for seed in sorted(candidate.scores)]
    if candidate.number is None:
        return [runs_of(study, None) / f"base-seed{study.base.seed}"]
    return [runs_of(study, candidate.number) / f"{candidate.number:04d}"]


def best_run(study: Study, winner: Candidate) -> Place:
    """The winner's run with its best seed."""
    runs, seeds = models_of(study, winner), list(winner.runs) or sorted(winner.scores)
    return runs[seeds.index(min(seeds, key=lambda seed: (-winner.scores[seed], seed)))] if seeds else runs[0]


def write_outcome(study: Study, optuna_study: OptunaStudy, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
    """``trials.parquet``, ``best.yaml``, ``model/`` and ``result.json``, from what the study and its runs hold.

    Raises:
        ClusterNSError: No trial finished, or the winner's model is missing or was changed.
    """
    home, trials = study.home, optuna_study.trials()
    clean_up(study, optuna_study)
    write_trials(home.local / "trials.parquet", trials, list(study.space.parameters), study.base.seed)
    home.publish("trials.parquet")
    states = [trial.state.name for trial in trials]
    if "COMPLETE" not in states:
        reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
        raise ClusterNSError(
            f"None of the {len(trials)} trials of {study.config.name!r} finished"
            + (f"; the last: {reasons[-1]}" if reasons else ".")
            + f" See {(home / 'trials').address!r}."
        )
    outcome = decide(study, optuna_study)
    winner, config = outcome.winner, study.space.config(outcome.winner.overrides)
    model = best_run(study, winner).fetch("model")
    check_unchanged(model)
    hours = worker_hours(study.config, optuna_study.optuna, confirmations=True)
    price = study.config.budget.price
    result = {
        "study": study.config.name,
        "dev": study.base.evaluation.dev,
        "sts_dev_before": outcome.before,
        "trials": {state: states.count(state) for state in ("COMPLETE", "PRUNED", "FAIL")},
        "seconds": round(optuna_study.recall("seconds", 0.0), 1),
        "worker_hours": round(hours, 3),
        "cost": None if price is None else round(hours * price, 2),
        "ended_by": optuna_study.recall("ended_by"),
        "previous": about_earlier(optuna_study.optuna),
        "seeds": study.config.confirmation.seeds or list(study.seeds if winner.runs else ()),
        "raced": bool(winner.runs),
        "winner": summary(winner),
        "base": summary(outcome.base) if outcome.base else None,
        "intervals": {
            name: seed_interval(list(candidate.scores.values())) if candidate else None
            for name, candidate in (("winner", winner), ("base", outcome.base))
        },
        "against": {},
        "model_is_trained": was_trained(best_run(study, winner)),
        "not_told_apart": [candidate.number for candidate in outcome.alike],
        "candidates": [summary(candidate) for candidate in outcome.candidates],
        "front": write_front(map(read_trial, trials), study.config.minimize),
        "confirmation_failures": optuna_study.recall("confirmation_failures", {}),
        "best": (home / "best.yaml").address,
        "model": (home / "model").address,
    }
    result["against"] = compare_winner(study, optuna_study, outcome, result, on_event)
    best = make_config(with_values(config.resolved(), {"runtime.name": f"{study.config.name}-best"}))
    about = [winner_sentence(result), *sentences(result)]
    home.write("best.yaml", "".join(f"# {line}\n" for line in about) + dump_config(best))
    copy_model(model, home.local / "model", about)
    home.publish("model")
    optuna_study.save()
    home.write("result.json", json_text(result))  # last, since it says that everything is there
    return result


def write_front(trials: Iterable[Trial], minimize: str | None) -> list[dict[str, Any]]:
    """The Pareto front as plain values, the cheapest first; empty with one objective."""
    return [
        {"trial": trial.number, "values": trial.values, "score": trial.score, str(minimize): trial.cost(minimize)}
        for trial in front(list(trials), minimize)
    ]


def winner_sentence(result: dict[str, Any]) -> str:
    """What kind of score chose the winner of a study."""
    winner, dev = result["winner"], result["dev"]
    start = f"Trial {winner['trial']} of the study {result['study']}: {winner['mean']:.2f}"
    if not winner["scores"]:
        return f"{start} on {dev} (Spearman x 100), the best of single runs, which no other seed confirmed."
    spread = "" if winner["deviation"] is None else f" +- {winner['deviation']:.2f}"
    count = len(winner["scores"])
    seeds = f"{'' if result['raced'] else 'further '}seed{'s' if count > 1 else ''}"
    over = f"{start}{spread} on {dev} (Spearman x 100) over {count} {seeds}"
    return f"{over}; model/ is that of the seed with the best score."


def compare_winner(
    study: Study,
    optuna_study: OptunaStudy,
    outcome: Outcome,
    result: dict[str, Any],
    on_event: OnEvent,
) -> dict[str, dict[str, Any] | None]:
    """Score, difference and intervals of the winner against the untrained encoder and the base configuration.

    The intervals over the dev pairs need the models to be run; those of the last time are kept if no score changed.
    """
    own = seed_scores(study, outcome.winner)
    others: dict[str, float | Candidate | None] = {"untrained": outcome.before, "base": outcome.base}
    scores_key = json.dumps([result[key] for key in ("winner", "base", "sts_dev_before")], sort_keys=True)
    kept = optuna_study.recall("comparison", {})
    if kept.get("of") != scores_key:
        kept = {"of": scores_key, "intervals": _pair_intervals(study, outcome, on_event)}
        optuna_study.remember("comparison", kept if kept["intervals"] else {})
    against: dict[str, dict[str, Any] | None] = {}
    for name, other in others.items():
        # The untrained encoder has no seed; the base configuration is compared over the seeds that both have.
        scores: dict[int, float] = {}
        if isinstance(other, Candidate):
            scores = seed_scores(study, other)
        elif other is not None:
            scores = dict.fromkeys(own, other)
        differences = paired(own, scores)
        against[name] = None
        if differences:
            against[name] = {
                "score": statistics.fmean(scores[seed] for seed in own if seed in scores),
                "difference": statistics.fmean(differences),
                "over_pairs": kept["intervals"].get(name),
                "over_seeds": seed_interval(differences),
            }
    return against


def seed_scores(study: Study, candidate: Candidate) -> dict[int, float]:
    """A candidate's scores by seed; that of its trial where it has no other."""
    return candidate.scores or {study.base.seed: candidate.mean}


def _pair_intervals(study: Study, outcome: Outcome, on_event: OnEvent) -> dict[str, Any]:
    """Over the dev pairs, by name of what the winner is compared with; empty if a model cannot be run."""
    config = study.space.config(outcome.winner.overrides)
    note = notes_to(on_event)
    note("Comparing the winner with the untrained encoder and the base configuration on the pairs of the dev set")
    winner_runs, base_runs = models_of(study, outcome.winner), models_of(study, outcome.base)
    try:
        prepared = prepare(config, on_event)
        assert prepared.sts_dir is not None
        tests = StsTests({}, [read_pairs(prepared.sts_dir, config.evaluation.dev)])
        if not all(map(was_trained, winner_runs)):
            note("No intervals over the dev pairs: a run of the winner exported the untrained encoder.")
            return {}
        winner = model_cosines([run.fetch("model") for run in winner_runs], tests)
        base_runs = base_runs if all(map(was_trained, base_runs)) else []
        untrained = [untrained_cosines(config, tests)]
        base = model_cosines([run.fetch("model") for run in base_runs], tests)
    except ClusterNSError as error:
        note(f"No intervals over the dev pairs, as a model could not be run: {error}")
        return {}
    by_task = {
        **over_pairs(tests, winner, {"untrained": untrained}),
        # As many seeds of each: where they race, one may have more than the other.
        **over_pairs(tests, winner[: len(base)] or winner, {"base": base[: len(winner)]}),
    }
    return {name: tasks[config.evaluation.dev] for name, tasks in by_task.items()}


def read_final(study: Study) -> dict[str, Any]:
    """What ``final.json`` holds.

    Raises:
        DataError: It is damaged.
    """
    try:
        value = json.loads(study.home.read("final.json") or "")
        if isinstance(value["when"], str) and isinstance(value["tasks"], dict) and isinstance(value["seeds"], list):
            return value
    except (ValueError, KeyError, TypeError, DamagedError):
        pass
    raise DataError(
        f"{(study.home / 'final.json').address!r} is damaged: it lacks the scores of the tests, or when they were "
        "looked at. Restore it from a copy; or remove it, and --finalize scores the same winner again."
    )


def check_not_finalized(study: Study) -> None:
    """Refuse to choose anything more once the tests of a study have been looked at."""
    if study.home.has("final.json"):
        raise ConfigError(
            f"The study {study.config.name!r} was finalized at {read_final(study)['when']}: its tests have been looked "
            "at, so nothing more may be chosen. Begin a study of another name."
        )
