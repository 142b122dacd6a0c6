"""A warm start: the finished trials of earlier studies, for the sampler of one over the same keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.object_store import Place, Store, is_url, place
from clusterns_ray.tuning.racing import RACE
from clusterns_ray.tuning.space import flatten
from clusterns_ray.tuning.study import Study, compared, differences
from clusterns_ray.tuning.study_file import read_optuna_study, readable_directory

PREVIOUS = "previous"
"""The attribute of an earlier study's trial in a later one: that study, as ``previous`` names it, and its number there.
As an attribute of the later study: by the names of earlier ones, how many of their trials lay outside its space."""


Learnt = tuple[list[FrozenTrial], int, dict[str, Any]]
"""Trials of an earlier study, how many more lie outside the space of the later one, and the digests of their data."""


def learn_from(study: Study, name: str) -> Learnt:
    """The finished trials of an earlier study, as trials of ``study``.

    Args:
        name: its place, relative to the storage path of ``study``; or a path or URL of its own.

    Raises:
        ConfigError: there is no such study, its scores do not compare with those of ``study``, or it has no trial of
            use.
    """
    source, remedy = f"previous: {name}", f"Correct that, or leave {name} out of `previous`."
    runtime = study.base.runtime
    if is_url(name):
        home = Place(Path(), Store(name))
    else:
        path = Path(name).expanduser()
        home = Place(path) if path.is_absolute() else place(runtime.storage_path, name, runtime.local_path)
    if home.address == study.home.address:
        raise ConfigError(f"{source} is this study itself. {remedy}")
    try:
        earlier = read_optuna_study(readable_directory(home))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    identity, data = earlier.user_attrs.get("identity"), earlier.user_attrs.get("data")
    if identity is None or data is None:
        raise ConfigError(f"{source} does not say which data its scores are of. {remedy}")
    if changed := _differences(compared(identity), study):
        raise ConfigError(f"{source}: its scores do not compare with this study's: {'; '.join(changed[:5])}. {remedy}")
    trials, outside = [], 0
    for trial in begun(earlier):
        if trial.state != TrialState.COMPLETE or RACE in trial.user_attrs:
            continue
        if not all(study.space.parameters[key].contains(value) for key, value in trial.params.items()):
            outside += 1
            continue
        own = optuna.trial.FixedTrial(trial.params)
        study.space.suggest(own)  # gives it this study's distributions
        learnt = optuna.trial.create_trial(
            value=trial.value,
            params=trial.params,
            distributions=own.distributions,
            intermediate_values=trial.intermediate_values,
            user_attrs={PREVIOUS: [name, trial.number]},
        )
        trials.append(learnt)
    if not trials:
        raise ConfigError(f"{source} has no finished trial in this study's space ({outside} outside it). {remedy}")
    return trials, outside, data


def _differences(known: dict[str, Any], study: Study) -> list[str]:
    """What makes scores incomparable: other keys, types or conditions, or other values of what does not vary. Bounds
    and choices may be others."""

    now = study.identity()
    keys = {key: "held fixed" for identity in (known, now) for key in identity["space"]}

    def shapes(space: Mapping[str, Any]) -> dict[str, Any]:
        varied = {key: value for key, value in space.items() if "type" in value}
        return keys | {key: [value["type"], *value.get("when", {}).items()] for key, value in varied.items()}

    def fixed(base: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in flatten(base).items() if key not in study.space.parameters}

    changed = differences(shapes(known["space"]), shapes(now["space"]))
    return [f"space.{text}" for text in changed] + differences(fixed(known["base"]), fixed(now["base"]))


def begun(study: optuna.Study) -> list[FrozenTrial]:
    """All trials of a study's own but those that only wait to begin, by number."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING and PREVIOUS not in trial.user_attrs
    ]


def earlier_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of earlier studies that a study's sampler knows."""
    return [trial for trial in study.get_trials(deepcopy=False) if PREVIOUS in trial.user_attrs]


def about_earlier(study: optuna.Study) -> list[str]:
    """What has to be said of the trials of earlier studies, in sentences; nothing where there are none."""
    trials = earlier_trials(study)
    if not trials:
        return []
    counts = Counter(trial.user_attrs[PREVIOUS][0] for trial in trials)
    outside = sum(study.user_attrs.get(PREVIOUS, {}).values())
    names = " and ".join(f"{count} of {name}" for name, count in counts.items())
    known = f"Trials of earlier studies that the sampler knows, and the budget does not count: {names}"
    lines = [known + (f"; {outside} outside this space were left out." if outside else ".")]
    best = max(trials, key=lambda trial: trial.value or 0.0)
    own = [trial.value or 0.0 for trial in begun(study) if trial.state == TrialState.COMPLETE]
    if own and max(own) < (best.value or 0.0):
        name, number = best.user_attrs[PREVIOUS]
        lines.append(
            f"No trial here has reached the {best.value:.2f} of {name}'s trial {number}; `clusterns enqueue` of its "
            "values has them tried here."
        )
    return lines
