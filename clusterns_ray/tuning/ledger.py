"""The Optuna study on disk: what was proposed, how it went, and what may be proposed next.

It is the truth of a sweep, and one process writes it. Every change is in it before anything follows from it, so that
after a kill at any moment the same questions get the same answers: a trial is proposed by a sampler that is seeded by
the trial's number, and a half-done proposal is completed, not repeated. In an object store there are snapshots of it:
one before a trial's first step, after its first evaluation and after its end, and meanwhile every half minute.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from clusterns_ray.data.batches import stream_key
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.tuning.snapshot import FILES, LOCK_WAIT_S, SNAPSHOT_S, pull_snapshot, push_snapshot
from clusterns_ray.tuning.space import Overrides, point_key
from clusterns_ray.tuning.study import Study, differences

optuna.logging.set_verbosity(optuna.logging.WARNING)

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Proposal:
    number: int
    overrides: Overrides
    """values by configuration key"""


class Ledger:
    """Open, or begin, the Optuna study in the directory of ``study``; from its store, where it has one.

    Args:
        permit: called before anything is written to the store; raises where another process has taken over.

    Raises:
        ConfigError: the directory holds a study of that name with another identity.
        StorageError: the store cannot be read or written; also from what changes the study.
    """

    def __init__(
        self,
        study: Study,
        clock: Callable[[], float] = time.monotonic,
        permit: Callable[[], None] = lambda: None,
    ):
        self.config, self.space, self.workers = study.config, study.space, max(study.config.workers_per_trial, 1)
        self.home, self.permit = study.home, permit
        self._saving = threading.Lock()
        self._changed, self._saved_at = False, -math.inf
        study.directory.mkdir(parents=True, exist_ok=True)
        pull_snapshot(self.home, self.config.storage)
        self.optuna = optuna.create_study(
            storage=open_storage(study.directory, self.config.storage, writing=True),
            study_name=self.config.name,
            direction="maximize",
            load_if_exists=True,
            sampler=Sampler(self.config.sampler),
            pruner=_pruner(study),
        )
        self._check_identity(study)
        self._grid = _grid(study) if self.config.sampler.name == "grid" else None
        self._live: dict[int, optuna.Trial] = {}
        self._spent: dict[int, tuple[float, float]] = {}
        """of live trials: seconds of their earlier attempts, and of this one"""
        self._clock, self._last_time = clock, clock()

    def _check_identity(self, study: Study) -> None:
        identity = study.identity()
        known = self.optuna.user_attrs.get("identity")
        if known is None:
            self.remember("identity", identity)
            self.save()
            return
        changed = differences(known, identity)
        if changed:
            raise ConfigError(
                f"The study {self.config.name!r} in {str(study.directory)!r} is another one: "
                + "; ".join(changed[:5])
                + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
                + ". Choose another name, or go back to those values to go on with it."
            )

    def save(self) -> None:
        """Bring the study to its store, as it is now."""
        with self._saving:
            self.permit()
            self._changed, self._saved_at = False, time.monotonic()
            push_snapshot(self.home, self.config.storage)

    def save_if_due(self) -> None:
        """The same, where something has changed and the last time was :data:`SNAPSHOT_S` ago."""
        if self._changed and time.monotonic() - self._saved_at > SNAPSHOT_S:
            self.save()

    # ---- reading ------------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        return begun(self.optuna)

    def ended(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.state in ENDED]

    def running(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.state == TrialState.RUNNING]

    def spent(self) -> bool:
        """Whether no further trial may start."""
        budget, trials = self.config.budget, self.trials()
        if self._grid is not None and len(trials) >= len(self._grid):
            return True
        worker_seconds = sum(trial.user_attrs.get("seconds", 0.0) for trial in trials) * self.workers
        return (
            len(trials) >= (math.inf if budget.trials is None else budget.trials)
            or self.optuna.user_attrs.get("seconds", 0.0) >= 3600 * (budget.hours or math.inf)
            or worker_seconds >= 3600 * (budget.worker_hours or math.inf)
        )

    # ---- proposing ----------------------------------------------------------------------------------------------

    def propose(self) -> Proposal:
        """The next trial, RUNNING from now on; ask :meth:`spent` before."""
        trials = self.optuna.get_trials(deepcopy=False)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        number = waiting[0].number if waiting else len(trials)
        point = self._fixed_point(number)
        if point is not None and not waiting:
            self.optuna.enqueue_trial(point)
        return self._begin(self.optuna.ask())

    def heard(self, number: int) -> int:
        """The step of the newest evaluation of a trial that is in the study; 0 before the first."""
        return max(self.optuna.get_trials(deepcopy=False)[number].intermediate_values, default=0)

    def resume(self, number: int) -> Proposal:
        """A trial that was left RUNNING, with the values it has or was about to get."""
        trial_id = self.optuna.get_trials(deepcopy=False)[number]._trial_id
        return self._begin(optuna.Trial(self.optuna, trial_id))

    def _begin(self, trial: optuna.Trial) -> Proposal:
        overrides = self.space.suggest(trial)
        attrs = trial.user_attrs
        trial.set_user_attr("attempts", attrs.get("attempts", 0) + 1)
        self._live[trial.number] = trial
        self._spent[trial.number] = attrs.get("seconds", 0.0), 0.0
        self.save()
        return Proposal(trial.number, overrides)

    def _fixed_point(self, number: int) -> Overrides | None:
        points = self.config.first_points if self._grid is None else self._grid
        return points[number] if number < len(points) else None

    # ---- what became of it --------------------------------------------------------------------------------------

    def evaluated(self, number: int, step: int, score: float, seconds: float, last: bool) -> bool:
        """Note a dev score; whether to stop the trial, which then is PRUNED.

        Args:
            seconds: that this attempt has taken so far.
            last: the trial has no further step; it is never pruned there.
        """
        trial = self._live[number]
        values = self._frozen(trial).intermediate_values
        newest = max(values, default=0)
        if step < newest:  # a resumed trial passes evaluations that were judged before
            return False
        if step > newest:
            first = self._frozen(trial).user_attrs.get("attempts", 0) > 0
            trial.report(score, step)
            self._note(trial, steps=step, seconds=self._seconds(number, seconds), attempts=0)
            self._changed = True
            if first:  # so that no attempt counts as fruitless that was not
                self.save()
        if last or not trial.should_prune():
            return False
        self._note(trial, reason=f"pruned at step {step}")
        self._tell(number, state=TrialState.PRUNED)
        return True

    def complete(
        self, number: int, score: float, steps: int, seconds: float, curve: Iterable[tuple[int, float]]
    ) -> None:
        """Note the trial's final score, and whatever evaluations have not been heard of."""
        trial = self._live[number]
        heard = self._frozen(trial).intermediate_values
        for step, value in curve:
            if step not in heard:
                trial.report(value, step)
        self._note(trial, steps=steps, seconds=self._seconds(number, seconds))
        self._tell(number, score)

    def fail(self, number: int, reason: str, seconds: float = 0.0) -> None:
        trial = self._live[number]
        self._note(trial, reason=reason, seconds=self._seconds(number, seconds))
        self._tell(number, state=TrialState.FAIL)

    def remember(self, key: str, value: Any) -> None:
        """Keep a plain value with the study."""
        self.optuna.set_user_attr(key, value)
        self._changed = True

    def recall(self, key: str, default: Any = None) -> Any:
        return self.optuna.user_attrs.get(key, default)

    def tick(self) -> None:
        """Add the time since the last call to the study's."""
        now = self._clock()
        self.remember("seconds", self.recall("seconds", 0.0) + now - self._last_time)
        self._last_time = now

    def _note(self, trial: optuna.Trial, **attrs: Any) -> None:
        known = self._frozen(trial).user_attrs
        for key, value in attrs.items():
            if known.get(key) != value:
                trial.set_user_attr(key, value)

    def _seconds(self, number: int, of_attempt: float) -> float:
        before, last = self._spent[number]
        if of_attempt < last:  # its process died, and another has taken over
            before += last
        self._spent[number] = before, of_attempt
        return round(before + of_attempt, 3)

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return self.optuna.get_trials(deepcopy=False)[trial.number]

    def _tell(self, number: int, value: float | None = None, state: TrialState | None = None) -> None:
        self.optuna.tell(self._live.pop(number), value, state)
        self.tick()
        self.save()


def begun(study: optuna.Study) -> list[FrozenTrial]:
    """All trials but those that only wait to begin, by number."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]


def read_ledger(directory: Path) -> optuna.Study:
    """The Optuna study of a directory, to look at.

    Raises:
        ConfigError: there is none.
    """
    for kind, name in FILES.items():
        if (directory / name).is_file():
            storage = open_storage(directory, kind, writing=False)
            names = optuna.get_all_study_names(storage)
            if names:
                return optuna.load_study(study_name=names[0], storage=storage)
    raise ConfigError(f"{str(directory)!r} holds no study yet. `clusterns tune` of the study file begins it.")


def open_storage(directory: Path, kind: str, writing: bool) -> optuna.storages.BaseStorage:
    """The storage in ``directory``; its one writer also mends what a kill has left half-written."""
    path = directory / FILES[kind]
    try:
        if kind == "sqlite":
            if writing and not path.exists():
                _create_database(path)
            return _database(path)
        if writing:
            _mend_journal(path)
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        return optuna.storages.JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
    except Exception as error:
        raise ClusterNSError(
            f"The study's file {str(path)!r} cannot be opened ({str(error).splitlines()[0]}). Restore it from a copy, "
            "or choose another name."
        ) from error


def _database(path: Path) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": LOCK_WAIT_S}})


def _create_database(path: Path) -> None:
    """Make the tables beside their place, as whoever opens a database without them would make them, too."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    storage = _database(temporary)
    storage.remove_session()
    storage.engine.dispose()
    temporary.replace(path)


def _mend_journal(path: Path) -> None:
    """Drop a last line that was cut off, and locks of a process that is gone."""
    for lock in path.parent.glob(f"{path.name}.lock*"):
        with contextlib.suppress(OSError):
            lock.unlink()
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


class Sampler(optuna.samplers.BaseSampler):
    """An Optuna sampler whose draws depend on the seed, the trial's number, the parameter and the trials before it.

    So a proposal that was cut off after some of its values gets the others as it would have.
    """

    def __init__(self, config: Any):
        self.config = config
        self.joint: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler()

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        self.joint = self._make(trial.number)
        return self.joint.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self.joint.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._make(trial.number, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _make(self, *parts: int | str) -> optuna.samplers.BaseSampler:
        config, seed = self.config, stream_key("sampler", self.config.seed, *parts) % 2**32
        if config.name == "tpe":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=config.startup_trials, multivariate=True, group=True, constant_liar=True
                )
        if config.name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=config.startup_trials)
        return optuna.samplers.RandomSampler(seed=seed)


def _pruner(study: Study) -> optuna.pruners.BasePruner:
    """Both count the trial's own training steps, and keep what they decided in the study."""
    config = study.config.scheduler
    if config.name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=config.min_steps or study.base.evaluation.every_steps,
            reduction_factor=config.reduction_factor,
        )
    if config.name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials, n_warmup_steps=config.warmup_steps)
    return optuna.pruners.NopPruner()


def _grid(study: Study) -> list[Overrides]:
    """The first points, then the rest of the grid in an order of the sampler's seed."""
    first: list[Mapping[str, Any]] = list(study.config.first_points)
    taken = set(map(point_key, first))
    rest = [point for point in study.space.grid() if point_key(point) not in taken]
    random.Random(stream_key("grid", study.config.sampler.seed)).shuffle(rest)
    return [*map(dict, first), *rest]
