"""``clusterns enqueue``: a point that whoever runs the study, here or on another machine, tries next."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable

from optuna.trial import TrialState

from clusterns_ray.config import shown
from clusterns_ray.errors import ConfigError
from clusterns_ray.io.files import json_text
from clusterns_ray.io.yaml_text import load_setting
from clusterns_ray.tuning.optuna_study import ENQUEUED, FIXED_VALUES, enqueued_points
from clusterns_ray.tuning.outcome import check_not_finalized
from clusterns_ray.tuning.previous import begun
from clusterns_ray.tuning.runs import values_of
from clusterns_ray.tuning.space import Overrides, point_key
from clusterns_ray.tuning.study import Study, check_identity
from clusterns_ray.tuning.study_checks import check_point
from clusterns_ray.tuning.study_file import read_optuna_study, readable_directory, readable_study_errors


def enqueue(study: Study, settings: Iterable[str]) -> Overrides:
    """Leave a point beside a study that runs or stands still; it is the next trial that begins.

    Args:
        settings: ``KEY=VALUE`` of keys of the space; the sampler proposes those that are left out.

    Returns:
        The point.

    Raises:
        ConfigError: the study has not begun, is another one, or takes no more trials; or the point is not in its space,
            waits already, or was tried.
    """
    name, point = study.config.name, read_point(settings)
    if study.config.sampler.name == "grid":
        raise ConfigError(
            f"The study {name!r} tries every point of its grid, so nothing can be enqueued. Name those that are to "
            "come first under first_points."
        )
    check_point(study.space, point, "The point")
    check_not_finalized(study)
    with readable_study_errors(study):
        optuna_study = read_optuna_study(readable_directory(study.home), name)
        check_identity(study, optuna_study.user_attrs.get("identity") or study.identity())
        for trial in begun(optuna_study):
            values = values_of(study, trial) if trial.state.is_finished() else trial.params
            known = map(point_key, (values, trial.system_attrs.get(FIXED_VALUES, {})))
            if point_key(point) in known and trial.state != TrialState.FAIL:
                raise ConfigError(
                    f"Trial {trial.number} of the study {name!r} has that very point, and would give the same scores "
                    "again. Change a value."
                )
        waiting = enqueued_points(study.home, study.space, optuna_study, lambda text: None)
    if point_key(point) in map(point_key, waiting.values()):
        raise ConfigError(f"That very point is enqueued for the study {name!r} already. Change a value.")
    (study.home / ENQUEUED).write(f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json", json_text(point))
    return point


def read_point(settings: Iterable[str]) -> Overrides:
    """``KEY=VALUE`` as people write them, each value read as YAML."""
    point: Overrides = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{shown(setting)} is not KEY=VALUE, such as train.learning_rate=3e-5.")
        if key in point:
            raise ConfigError(f"{key} is given twice. Give one value.")
        point[key] = load_setting(text, setting)
    return point
