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
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from clusterns_ray.data.sampler import stream_key
from clusterns_ray.errors import ClusterNSError, ConfigError, DiskError
from clusterns_ray.io.files import disk_fault
from clusterns_ray.tuning.snapshot import FILES, LOCK_WAIT_S, LOOK_WAIT_S, SNAPSHOT_S, pull_snapshot, push_snapshot
from clusterns_ray.tuning.space import Overrides, point_key
from clusterns_ray.tuning.study import Study, differences

optuna.logging.set_verbosity(optuna.logging.WARNING)

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Proposal:
    number: int
    overrides: Overrides
    """values by configuration key"""


class OptunaStudy:
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
        self.path = study.directory / FILES[self.config.storage]
        self.begins_anew = not self.path.exists() and any((study.directory / "trials").glob("*"))
        """The study's file is gone, though its trials' directories are there."""
        with study_file(self.path):
            storage = open_storage(study.directory, self.config.storage, writing=True)
            others = [name for name in optuna.get_all_study_names(storage) if name != self.config.name]
            if others:
                raise ConfigError(
                    f"{str(self.path)!r} holds the study {others[0]!r}, not {self.config.name!r}. Put that file back "
                    "where it came from, or choose another name."
                )
            self.optuna = optuna.create_study(
                storage=storage,
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
        if known is None and self.optuna.get_trials(deepcopy=False):
            raise ClusterNSError(_damaged(self.path, "it has trials, and does not tell of which space"))
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

    def begin_again(self, number: int) -> None:
        """Take back that a trial was begun, where the disk and not the trial ended it."""
        trial = self._live[number]
        attempts = self._frozen(trial).user_attrs.get("attempts", 0)
        self._note(trial, attempts=max(attempts - 1, 0))

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


def read_optuna_study(directory: Path, name: str | None = None) -> optuna.Study:
    """The Optuna study of a directory, to look at.

    Args:
        name: of the study; None takes the only one that the file holds.

    Raises:
        ConfigError: there is none.
        ClusterNSError: its file is damaged, locked, or cannot be read.
    """
    for kind, file in FILES.items():
        path = directory / file
        if not path.is_file():
            continue
        with study_file(path):
            storage = open_storage(directory, kind, writing=False)
            names = optuna.get_all_study_names(storage)
            if name is not None and names and name not in names:
                raise ConfigError(f"{str(path)!r} holds the study {names[0]!r}, not {name!r}. Mend `name`.")
            if names:
                study = optuna.load_study(study_name=name or names[0], storage=storage)
                study.get_trials(deepcopy=False)
                return study
    raise ConfigError(f"{str(directory)!r} holds no study yet. `clusterns tune` of the study file begins it.")


def open_storage(directory: Path, kind: str, writing: bool) -> optuna.storages.BaseStorage:
    """The storage in ``directory``; its one writer also mends what a kill has left half-written.

    Raises:
        ClusterNSError: the file is damaged.
    """
    path = directory / FILES[kind]
    if kind == "sqlite":
        if writing and not path.exists():
            _create_database(path)
        _check_database(path)
        return _database(path, LOCK_WAIT_S if writing else LOOK_WAIT_S)
    if writing:
        _mend_journal(path)
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return optuna.storages.JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))


@contextmanager
def study_file(path: Path) -> Iterator[None]:
    """One line with the reason and the remedy in place of whatever opening or reading a study's file raises.

    Raises:
        DiskError: the disk does not take what is written.
        ClusterNSError: the file is locked, damaged, or cannot be opened.
    """
    try:
        yield
    except ClusterNSError:
        raise
    except Exception as error:
        raise file_error(path, error) from error


def file_error(path: Path, error: Exception) -> ClusterNSError:
    """The words for what SQLite, SQLAlchemy or Optuna said of a study's file."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    texts = [" ".join(str(each).split("\n")[0].split()) or type(each).__name__ for each in chain]
    said = " ".join(texts).lower()
    # SQLAlchemy's own text begins with the class of the error below it.
    reason = texts[0].rpartition("(sqlite3.")[2].partition(") ")[2] or texts[0]
    if "locked" in said or "busy" in said:
        return ClusterNSError(
            f"The study's file {str(path)!r} is locked by another process ({reason}). End whatever has it open, such "
            "as a database browser; then the same command goes on."
        )
    full = disk_fault(error)
    if full is not None:
        return DiskError(
            f"The study's file {str(path)!r} could not be written ({full}). Free space there, or make it writable; "
            "then the same command goes on."
        )
    if "unable to open" in said or any(isinstance(each, PermissionError) for each in chain):
        return ClusterNSError(
            f"The study's file {str(path)!r} cannot be opened ({reason}). Make it and its directory readable and "
            "writable for this user."
        )
    return ClusterNSError(_damaged(path, reason[:200]))


def _damaged(path: Path, reason: str) -> str:
    return (
        f"The study's file {str(path)!r} is damaged ({reason}). Restore it from a copy; or move it away, and "
        "`clusterns tune` begins the study anew."
    )


def _check_database(path: Path) -> None:
    """Refuse a database that is damaged, before anything is read of it or written to it.

    Raises:
        ClusterNSError: it is.
        sqlite3.Error: it cannot be read.
    """
    if path.stat().st_size == 0:
        raise ClusterNSError(_damaged(path, "it is empty"))
    with contextlib.closing(sqlite3.connect(path, timeout=LOOK_WAIT_S)) as connection:
        (found,) = connection.execute("pragma quick_check(1)").fetchone()
        if found != "ok":
            raise ClusterNSError(_damaged(path, " ".join(str(found).split())))
        connection.execute("select count(*) from trials").fetchone()


def _database(path: Path, wait_s: float) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": wait_s}})


def _create_database(path: Path) -> None:
    """Make the tables beside their place, as whoever opens a database without them would make them, too."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    storage = _database(temporary, LOCK_WAIT_S)
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
        if not content and any((path.parent / "trials").glob("*")):
            raise ClusterNSError(_damaged(path, "it is empty"))
        if content and not content.endswith(b"\n"):
            last = content.rfind(b"\n") + 1
            if not content[last:].startswith(b"{"):
                raise ClusterNSError(_damaged(path, "its last line is not one that Optuna began to write"))
            file.truncate(last)


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
