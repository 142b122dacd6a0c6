"""The page of a study."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clusterns_ray.io.yaml_text import dump_yaml
from clusterns_ray.report import study_charts as charts
from clusterns_ray.report.page import Cell, Fact, Figure, Fold, Link, Page, Section, Table, Warning, footer, write_page
from clusterns_ray.report.words import NONE, count, duration, fixed, listing
from clusterns_ray.tuning.analysis import STATES, StudyRecord, Trial, at_the_edge, front, read_study, rungs
from clusterns_ray.tuning.comparison import seed_interval, sentences, show_value
from clusterns_ray.tuning.objectives import show_cost
from clusterns_ray.tuning.selection import check_result
from clusterns_ray.tuning.space import flatten

FEW = 20
"""Importances from fewer finished trials are a hint at most."""


def write_study_report(directory: str | Path, output: str | Path | None = None) -> tuple[Path, Page]:
    """Write the report of a study as an HTML file, ``report.html`` in its directory if no other is named.

    Raises:
        ConfigError: the directory holds no study, or the file cannot be written.
    """
    directory = Path(directory)
    path = Path(output) if output is not None else directory / "report.html"
    page = study_page(read_study(directory), read_result(directory))
    write_page(path, page)
    return path, page


def read_result(directory: Path) -> dict[str, Any] | None:
    """``result.json`` of a study that has come to its end; None while it has not.

    Raises:
        DataError: it is damaged.
    """
    path = directory / "result.json"
    return check_result(path.read_text(encoding="utf-8", errors="replace"), str(path)) if path.is_file() else None


def study_page(study: StudyRecord, result: dict[str, Any] | None) -> Page:
    """Put the whole report of a study together."""
    sections = [
        outcome_section(study, result),
        history_section(study, result),
        importance_section(study),
        slice_section(study),
        trial_section(study, result),
        setup_section(study),
    ]
    dev = study.config["base"]["evaluation"]["dev"]
    return Page(
        title=study.config["name"],
        subtitle=f"study · {dev} · sampler {study.config['sampler']['name']}, scheduler "
        f"{study.config['scheduler']['name']}",
        headline=headline(study, result),
        facts=facts(study, result),
        warnings=sorted(advise(study, result), key=lambda warning: warning.level != "problem"),
        sections=[section for section in sections if section],
        footer=footer(),
    )


def headline(study: StudyRecord, result: dict[str, Any] | None) -> list[str]:
    """The answer first: the winner and how sure its score is, by how much, what it is not told apart from, the cost."""
    tried = f"{count(len(study.trials), 'trial')} over {listing(list(study.varied))}"
    if result is None:
        return [f"{tried}; the study has not come to its end."]
    winner, span = result["winner"], (result.get("intervals") or {}).get("winner")
    values = ", ".join(f"{key} {show_value(value)}" for key, value in winner["values"].items() if key != "seed")
    words = (
        f"The winner is trial {winner['trial']} ({values}): {fixed(winner['mean'])} on {result['dev']} (Spearman × 100)"
    )
    if not winner["scores"]:
        words += ", from a single run that no other seed confirmed"
    elif len(winner["scores"]) == 1:
        words += ", of one new seed"
    else:
        words += f", the mean of {len(winner['scores'])} {'' if result.get('raced') else 'new '}seeds"
        words += f" (95 % interval {fixed(span['low'])} to {fixed(span['high'])})" if span else ""
    beside = sentences(result) if result.get("against") else []
    return [words + ".", *([" ".join(beside)] if beside else []), _apart(result), _cost(study, result, tried)]


def _apart(result: dict[str, Any]) -> str:
    """What the winner cannot be told apart from."""
    if len(result["winner"]["scores"]) < 2:
        return "Without two seeds of its own, nothing tells it apart from the next best."
    names = listing([f"trial {number}" for number in result["not_told_apart"]] or ["none"])
    return f"Not told apart from it by these seeds (paired t-test at 5 %), of those that were run again: {names}."


def _cost(study: StudyRecord, result: dict[str, Any], tried: str) -> str:
    """What the study took, and why it ended."""
    hours, cost = result.get("worker_hours"), result.get("cost")
    parts = [] if hours is None else [f"{hours:.2f} worker-hours"]
    parts += [] if cost is None else [f"cost {cost:.2f}"]
    took = f"It took {tried}, in {duration(study.seconds)}" + (f" ({', '.join(parts)})" if parts else "")
    return f"{took}. {result.get('ended_by') or ''}".strip()


def facts(study: StudyRecord, result: dict[str, Any] | None) -> list[Fact]:
    outcome = result or {}
    states = {name: sum(trial.state == state for trial in study.trials) for state, name in STATES.items()}
    return [
        *_score_fact("Winner on the dev set", outcome.get("winner")),
        Fact("Untrained encoder", fixed(study.before), "the same set"),
        *_score_fact("Base configuration", outcome.get("base")),
        Fact(
            "Trials", str(len(study.trials)), ", ".join(f"{number} {name}" for name, number in states.items() if number)
        ),
        Fact("Time", duration(study.seconds), "of the study, over all resumptions"),
    ]


def _score_fact(label: str, runs: dict[str, Any] | None) -> list[Fact]:
    """Mean and deviation of runs that differ in their seed; nothing where there are none."""
    if not runs:
        return []
    deviation = "" if runs["deviation"] is None else f" ± {fixed(runs['deviation'])}"
    note = f"mean over {count(len(runs['scores']), 'seed')}" if runs["scores"] else "one run"
    return [Fact(label, fixed(runs["mean"]) + deviation, note)]


# ---- warnings ---------------------------------------------------------------------------------------------------


def advise(study: StudyRecord, result: dict[str, Any] | None) -> Iterator[Warning]:
    """What to be wary of, in words."""
    failed = [trial for trial in study.trials if trial.state == "FAIL"]
    if failed:
        yield Warning(f"{count(len(failed), 'trial')} failed; the last, trial {failed[-1].number}: {failed[-1].reason}")
    if result is None:
        yield Warning("The study has not come to its end, so nothing here is final.", "note")
    else:
        yield from _about_winner(study, result)
    for text in study.about_earlier:
        yield Warning(text, "note")
    finished = len(study.finished)
    if study.importances and finished < FEW:
        yield Warning(
            f"The importances come from {count(finished, 'finished trial')}; of fewer than {FEW} they are a hint at "
            "most. Look at their deviations.",
            "note",
        )
    startup = study.config["sampler"].get("startup_trials")
    if startup is not None and len(study.trials) + len(study.earlier) <= startup:
        yield Warning(
            f"All {len(study.trials)} trials were drawn at random: the model proposes after "
            f"{count(startup, 'trial')} (sampler.startup_trials).",
            "note",
        )


def _about_winner(study: StudyRecord, result: dict[str, Any]) -> Iterator[Warning]:
    winner = result["winner"]
    for key, value in winner["values"].items():
        parameter = study.varied.get(key)
        side = at_the_edge(parameter, value) if parameter else None
        if parameter and side:
            ends = f"{show_value(parameter['low'])} to {show_value(parameter['high'])}"
            yield Warning(
                f"The winner's {key} ({show_value(value)}) lies at the {side} edge of the space ({ends}); the best "
                "value may lie beyond. Widen it."
            )
    if not winner["scores"]:
        yield Warning(
            "Nothing was confirmed with other seeds: the best of many single runs is too good on average, and the "
            "next may be as good. Set confirmation.seeds."
        )
    elif len(winner["scores"]) < 2:
        yield Warning(
            "The winner has the score of one new seed alone, so it is not known whether it differs from the next. Set "
            "more confirmation.seeds."
        )
    elif result["not_told_apart"]:
        names = listing([f"trial {number}" for number in result["not_told_apart"]])
        yield Warning(
            f"The winner cannot be told apart from {names} with these seeds (paired t-test at 5 %): the difference "
            "lies inside seed noise. Prefer the cheaper or the simpler, or add seeds.",
            "note",
        )
    loss = [c["trial_score"] - c["mean"] for c in result["candidates"] if c["scores"] and not result.get("raced")]
    if loss and statistics.fmean(loss) > 0:
        yield Warning(
            f"With new seeds the best configurations lost {fixed(statistics.fmean(loss))} points on average against "
            "the run that chose them, as the best of many do. The means are the figures to quote.",
            "note",
        )
    for name, reason in result["confirmation_failures"].items():
        yield Warning(f"The confirming run {name} failed: {reason}")
    if result.get("sts_dev_before") is not None and winner["mean"] <= result["sts_dev_before"]:
        yield Warning(
            f"No configuration improved the untrained encoder on this dev set ({fixed(result['sts_dev_before'])}; the "
            f"winner has {fixed(winner['mean'])}). Is the text of its kind?"
        )
    base = result.get("base")
    if base and base["mean"] > winner["mean"]:
        yield Warning(
            f"The winner ({fixed(winner['mean'])}) is worse than the base configuration ({fixed(base['mean'])}), which "
            "needed no search."
        )


# ---- sections ---------------------------------------------------------------------------------------------------


def outcome_section(study: StudyRecord, result: dict[str, Any] | None) -> Section | None:
    if result is None:
        return None
    keys = list(study.varied)
    alike, number = set(result["not_told_apart"]), result["winner"]["trial"]
    confirmed = any(candidate["scores"] for candidate in result["candidates"])
    candidates = sorted(result["candidates"], key=lambda candidate: -candidate["mean"])
    rows = [
        _outcome_row(Link(f"trial {c['trial']}", "#trials"), _verdict(c, number, alike), c, keys, confirmed)
        for c in candidates
    ]
    base = result.get("base")
    if base and base["trial"] not in [c["trial"] for c in candidates]:
        values = {**base, "values": flatten(study.config["base"])}
        rows.append(_outcome_row("base configuration", "no search", values, keys, confirmed))
    if result.get("sts_dev_before") is not None:
        untrained = {
            "mean": result["sts_dev_before"],
            "deviation": None,
            "scores": {},
            "trial_score": None,
            "values": {},
        }
        rows.append(_outcome_row("untrained encoder", "no training", untrained, keys, confirmed))
    first = next(at for at, c in enumerate(candidates) if c["trial"] == number)
    if confirmed:
        title, columns = "The best configurations, run again", ["mean", "deviation", "seeds", "the run that chose it"]
        words = (
            ("They raced for further seeds. " if result.get("raced") else "")
            + ("" if result.get("raced") else "The best trials were run again with seeds that no trial had. ")
            + "The winner has the best mean; not told apart from it are those whose means do not differ by a paired "
            "t-test at 5 %, which needs two seeds that both have."
        )
    else:
        title, columns = "The best configurations", ["score"]
        words = "Each was run once, with the seed of all trials. None was run again with other seeds."
    return Section(
        title,
        words=[words],
        tables=[
            Table(
                ["", "", *columns, *keys],
                rows,
                f"Dev scores (Spearman × 100){' over the confirmation seeds' if confirmed else ', of one run each'}",
                text_columns=(0, 1),
                strong_rows=(first,),
            )
        ],
        code=f"clusterns train {result['best']}",
    )


def _verdict(candidate: dict[str, Any], winner: int, alike: set[int]) -> str:
    if candidate["trial"] == winner:
        return "winner"
    if len(candidate["scores"]) < 2:
        return "not tested"
    return "not told apart" if candidate["trial"] in alike else "worse"


def _outcome_row(name: Cell, verdict: str, of: dict[str, Any], keys: list[str], confirmed: bool) -> list[Cell]:
    chosen = [fixed(of["deviation"]), str(len(of["scores"]) or NONE), fixed(of["trial_score"])] if confirmed else []
    return [name, verdict, fixed(of["mean"]), *chosen, *(_value(of["values"], key) for key in keys)]


def history_section(study: StudyRecord, result: dict[str, Any] | None) -> Section | None:
    if not any(trial.curve for trial in study.trials):
        return None
    winner = result["winner"]["trial"] if result else None
    last = max((step for trial in study.trials for step, _ in trial.curve), default=0)
    levels = rungs(study.config, last)
    figures = [
        Figure("History", charts.history(study), "Each trial's score, and the best so far."),
        Figure(
            "Learning curves",
            charts.learning_curves(study, levels, winner),
            "Each trial over its own training steps; orange ones were pruned, the green one won.",
        ),
        Figure(
            "Score against cost",
            charts.cost(study),
            "What a trial took. On the line, the Pareto front, no other trial is better in both."
            if study.config.get("minimize")
            else "What a trial took. A pruned one stands at its last score, which a longer run might have raised.",
        ),
    ]
    tables = []
    if levels:
        rows: list[list[Cell]] = []
        for step in levels:
            reached = [trial for trial in study.trials if trial.curve and trial.curve[-1][0] >= step]
            stopped = [trial for trial in reached if trial.state == "PRUNED" and _rung_of(trial, levels) == step]
            rows.append([f"step {step:,}", str(len(reached)), str(len(stopped))])
        tables.append(Table(["rung", "reached it", "pruned there"], rows, "Rungs of the scheduler"))
    return Section("How the search went", figures=figures, tables=tables)


def _rung_of(trial: Trial, levels: list[int]) -> int:
    """The highest rung that a trial had reached."""
    return max(step for step in levels if step <= trial.curve[-1][0])


def importance_section(study: StudyRecord) -> Section | None:
    if not study.importances:
        return None
    figures = [
        Figure(
            "What mattered",
            charts.importance_chart(study.importances),
            "The share of the score's variance that a key explains alone (fANOVA), with the standard deviation over "
            "resampled trials. A key under a condition is judged among the trials in which it mattered.",
        )
    ]
    keys = [importance.key for importance in study.importances[:2]]
    surface = charts.contour(study, *keys) if len(keys) == 2 else None
    if surface:
        figures.append(
            Figure(
                "The two most important keys",
                surface,
                "Dots are finished trials; the colours between and beyond them are interpolated, not measured.",
            )
        )
    return Section("What mattered", figures=figures)


def slice_section(study: StudyRecord) -> Section | None:
    if not study.finished:
        return None
    having = [key for key in study.varied if any(key in trial.values for trial in study.finished)]
    figures = [Figure(key, charts.slice_chart(study, key)) for key in having]
    return Section("Scores over the values of each key", figures=figures)


def trial_section(study: StudyRecord, result: dict[str, Any] | None) -> Section:
    keys = list(study.varied)
    trials = [*study.trials, *study.earlier]
    ordered, races = sorted(trials, key=lambda trial: trial.order), any(trial.scores for trial in trials)
    minimize = study.config.get("minimize")
    best = front(study.trials, minimize)
    rows: list[list[Cell]] = [
        [
            trial.name,
            "front" if trial in best else "earlier" if trial.study else trial.race or STATES[trial.state],
            fixed(trial.score),
            *((show_cost("memory", trial.cost("memory")),) if minimize == "memory" else ()),
            *([_over_seeds(trial)] if races else ()),
            str(trial.curve[-1][0]) if trial.curve else NONE,
            NONE if trial.study else duration(trial.seconds),
            *(_value(trial.values, key) for key in keys),
            trial.reason or "",
        ]
        for trial in ordered
    ]
    more = [*(["memory"] if minimize == "memory" else ()), *(["over seeds"] if races else ())]
    strong = [n for n, trial in enumerate(ordered) if result and trial.name == str(result["winner"]["trial"])]
    table = Table(
        ["trial", "state", "dev", *more, "steps", "time", *keys, ""],
        rows,
        "The finished ones by score, then the others"
        + (
            "; those that have more seeds first, and their means as the leader's seeds would give them" if races else ""
        ),
        text_columns=(1, len(keys) + 5 + len(more)),
        strong_rows=strong,
    )
    return Section("All trials", tables=[table], anchor="trials")


def _over_seeds(trial: Trial) -> str:
    """How many seeds a trial that races has, and the 95 % interval of its mean over them."""
    span = seed_interval(list(trial.scores.values()))
    return f"{len(trial.scores)}: {fixed(span['low'])} to {fixed(span['high'])}" if span else str(len(trial.scores))


def setup_section(study: StudyRecord) -> Section:
    rows: list[list[Cell]] = []
    for key, parameter in study.config["space"].items():
        rows.append([key, parameter["role"], _space(parameter), _conditions(parameter)])
    base = dump_yaml(study.config["base"])
    rest = {key: value for key, value in study.config.items() if key not in ("base", "space")}
    return Section(
        "What was searched",
        tables=[Table(["key", "role", "values", "where it matters"], rows, "The space", text_columns=(0, 1, 2, 3))],
        folds=[
            Fold("The rest of the study", dump_yaml(rest)),
            Fold("The configuration that trials start from", base),
        ],
    )


def _space(parameter: dict[str, Any]) -> str:
    if parameter["role"] == "fixed":
        return show_value(parameter["value"])
    if parameter["type"] == "choice":
        return ", ".join(show_value(choice) for choice in parameter["choices"])
    step = f", in steps of {show_value(parameter['step'])}" if parameter.get("step") else ""
    log = ", logarithmic" if parameter.get("log") else ""
    return f"{show_value(parameter['low'])} to {show_value(parameter['high'])}{step}{log}"


def _conditions(parameter: dict[str, Any]) -> str:
    parts = []
    for key, condition in parameter.get("when", {}).items():
        if isinstance(condition, dict):
            parts += [f"{key} {word} {show_value(value)}" for word, value in condition.items()]
        else:
            parts.append(f"{key} is {show_value(condition)}")
    return " and ".join(parts) or "always"


def _value(values: dict[str, Any], key: str) -> str:
    return show_value(values[key]) if key in values else NONE
