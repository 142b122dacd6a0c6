"""The Optuna study on disk: what was proposed, how it went, and what may be proposed next.

It is the truth of a sweep, and one process writes it. Every change is in it before anything follows from it, so that
after a kill at any moment the same questions get the same answers: a trial is proposed by a sampler that is seeded by
the trial's number, and a half-done proposal is completed, not repeated. In an object store there are snapshots of it:
one before a trial's first step, after its first evaluation and after its end, and meanwhile every half minute.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from clusterns_ray.errors import ClusterNSError, ConfigError, DamagedError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.object_store import Place
from clusterns_ray.tuning.job import Evaluation, Finished
from clusterns_ray.tuning.objectives import TwoObjectives
from clusterns_ray.tuning.previous import PREVIOUS, Learnt, begun, earlier_trials, learn_from
from clusterns_ray.tuning.racing import RACE, MergedStudy, merge_seeds, next_run, noise, stops
from clusterns_ray.tuning.sampling import Sampler, grid, pruner
from clusterns_ray.tuning.space import Overrides, Space, point_key
from clusterns_ray.tuning.study import Study, StudyConfig, check_identity
from clusterns_ray.tuning.study_checks import check_point
from clusterns_ray.tuning.study_file import (
    FILES,
    SNAPSHOT_S,
    damaged,
    open_storage,
    pull_snapshot,
    push_snapshot,
    readable_file_errors,
)

ENQUEUED = "enqueued"
"""The directory of the points that ``clusterns enqueue`` has left, a file each; and the attribute of a trial that took
one, which holds the file's name."""

FIXED_VALUES = "fixed_params"
"""Where Optuna keeps the values that a trial was enqueued with."""

PER_GPU = "trials_per_gpu"
"""The attribute of a study that holds how many trials shared a GPU last, where that was left to `auto`."""

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
    ) -> None:
        self.config, self.space, self.seeds = study.config, study.space, study.seeds
        self.home, self.permit = study.home, permit
        self._changed, self._saved_at = False, -math.inf
        study.directory.mkdir(parents=True, exist_ok=True)
        pull_snapshot(self.home, self.config.storage)
        self.path = study.directory / FILES[self.config.storage]
        self.begins_anew = not self.path.exists() and any((study.directory / "trials").glob("*"))
        """The study's file is gone, though its trials' directories are there."""
        # Before the study begins, so that one that is refused leaves nothing behind.
        learnt = {} if self.path.exists() else {name: learn_from(study, name) for name in self.config.previous}
        with readable_file_errors(self.path):
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
                sampler=Sampler(self.config.sampler, self._seen),
                pruner=pruner(study),
            )
            self._check_identity(study)
            self._add_previous(study, learnt)
        self._grid = self.config.sampler.name == "grid"
        self._points = grid(study) if self._grid else self.config.first_points
        """Points to try in this order, before the sampler proposes."""
        self._live: dict[int, optuna.Trial] = {}
        self._spent: dict[int, tuple[float, float]] = {}
        """Seconds that each live trial took in earlier attempts, and in this one."""
        self._clock, self._last_time = clock, clock()

    def _check_identity(self, study: Study) -> None:
        known = self.optuna.user_attrs.get("identity")
        if known is None and self.optuna.get_trials(deepcopy=False):
            raise ClusterNSError(damaged(self.path, "it has trials, but not the space that they are of"))
        if known is None:
            self.remember("identity", study.identity())
            self.save()
            return
        check_identity(study, known)

    def _add_previous(self, study: Study, learnt: Mapping[str, Learnt]) -> None:
        """Add the finished trials of the studies under ``previous``, each once; a kill amid it is made good.

        Args:
            learnt: of those that were read already.
        """
        for name in study.config.previous:
            added = self.recall(PREVIOUS, {})
            if name in added:
                continue
            trials, outside, data = learnt.get(name) or learn_from(study, name)
            known = [trial.user_attrs[PREVIOUS] for trial in earlier_trials(self.optuna)]
            self.optuna.add_trials([trial for trial in trials if trial.user_attrs[PREVIOUS] not in known])
            # What this study reads is compared with the digests of theirs before a trial begins.
            self.remember("data", {**data, **self.recall("data", {})})
            self.remember(PREVIOUS, {**added, name: outside})
            self.save()

    def save(self) -> None:
        """Bring the study to its store, as it is now."""
        self.permit()
        self._changed, self._saved_at = False, time.monotonic()
        push_snapshot(self.home, self.config.storage)

    def save_if_due(self) -> None:
        """Save the study where it has changed and was last saved more than :data:`SNAPSHOT_S` seconds ago."""
        if self._changed and time.monotonic() - self._saved_at > SNAPSHOT_S:
            self.save()

    # ---- reading ------------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        return begun(self.optuna)

    def trial(self, number: int) -> FrozenTrial:
        return self.optuna.get_trials(deepcopy=False)[number]

    def _seen(self, study: optuna.Study) -> optuna.Study:
        """The study as the sampler shall see it."""
        minimize = self.config.minimize
        return MergedStudy(study, self.seeds[0]) if minimize is None else TwoObjectives(study, minimize)

    def merged_trials(self) -> list[FrozenTrial]:
        """The trials without the runs of further seeds, which are in their values."""
        return merge_seeds(self.trials(), self.seeds[0])

    def ended(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.state in ENDED]

    def running(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.state == TrialState.RUNNING]

    def ended_by(self) -> str | None:
        """Why no further trial may start; None if one may."""
        trials, stop = self.trials(), self.config.stop
        first = [trial for trial in trials if RACE not in trial.user_attrs]
        if self._grid and len(first) >= len(self._points) and next_run(trials, self.seeds) is None:
            return "every point of the grid was tried"
        hours = worker_hours(self.config, self.optuna)
        spent = {
            "trials": len(trials),
            "hours": self.recall("seconds", 0.0) / 3600,
            "worker_hours": hours,
            "cost": hours * (self.config.budget.price or 0.0),
        }
        for name, limit in self.config.budget.limits().items():
            if spent[name] >= limit:
                return f"budget.{name} ({limit:g}) is used up"
        gain = noise(trials, self.seeds) if stop.gain == "noise" else stop.gain
        best, since = last_gain(first, gain)
        if best is None or stop.after is None or since < stop.after:
            return None
        more = f" by more than {gain:.2g}" if gain else ""
        more += ", the noise of a seed" if stop.gain == "noise" and gain else ""
        return f"{since} trials in a row did not exceed the {best.value:.2f} of trial {best.number}{more} (stop.after)"

    def budget_spent(self) -> bool:
        """Whether no further trial may start."""
        return self.ended_by() is not None

    # ---- proposing ----------------------------------------------------------------------------------------------

    def propose(self, note: OnNote = lambda text: None) -> Proposal:
        """The next trial, RUNNING from now on; ask :meth:`budget_spent` before.

        Points that were enqueued come first; then a further seed, where a trial has earned one; then first points that
        are left, and what the sampler proposes.
        """
        trials = self.optuna.get_trials(deepcopy=False)
        if not any(trial.state == TrialState.WAITING for trial in trials):
            tried = {point_key(trial.system_attrs.get(FIXED_VALUES, {"": None})) for trial in trials}
            point = next((point for point in self._points if point_key(point) not in tried), None)
            enqueued = enqueued_points(self.home, self.space, self.optuna, note)
            due = next_run(self.trials(), self.seeds)
            if enqueued:
                name = next(iter(enqueued))
                self.optuna.enqueue_trial(enqueued[name], {ENQUEUED: name})
            elif due is not None:
                self.optuna.enqueue_trial(due[0].params, {RACE: [due[0].number, due[1]]})
            elif point is not None:
                self.optuna.enqueue_trial(point)
        proposal = self._begin(self.optuna.ask())
        box, taken = self.home / ENQUEUED, taken_names(self.optuna)
        for name in taken.intersection(box.names()):
            box.remove_file(name)  # only now, as the store has the trial that took it
        return proposal

    def known_step(self, number: int) -> int:
        """The step of the newest evaluation of a trial that is in the study; 0 before the first."""
        return max(self.trial(number).intermediate_values, default=0)

    def resume(self, number: int) -> Proposal:
        """A trial that was left RUNNING, with the values it has or was about to get."""
        return self._begin(optuna.Trial(self.optuna, self.trial(number)._trial_id))

    def _begin(self, trial: optuna.Trial) -> Proposal:
        overrides = self.space.suggest(trial)
        attrs = trial.user_attrs
        if RACE in attrs:
            overrides["seed"] = attrs[RACE][1]
        trial.set_user_attr("attempts", attrs.get("attempts", 0) + 1)
        self._live[trial.number] = trial
        self._spent[trial.number] = attrs.get("seconds", 0.0), 0.0
        self.save()
        return Proposal(trial.number, overrides)

    # ---- what became of it --------------------------------------------------------------------------------------

    def report(self, number: int, evaluation: Evaluation) -> bool:
        """Add a dev score. Returns whether the trial stops, which then is PRUNED; at its last step it never does."""
        step, seconds = evaluation.step, evaluation.seconds
        trial = self._live[number]
        values = self._frozen(trial).intermediate_values
        newest = max(values, default=0)
        if step < newest:  # a resumed trial passes evaluations that were judged before
            return False
        if step > newest:
            first = self._frozen(trial).user_attrs.get("attempts", 0) > 0
            trial.report(evaluation.score, step)
            self._note(trial, steps=step, seconds=self._seconds(number, seconds), attempts=0)
            self._changed = True
            if first:  # so that no attempt counts as fruitless that was not
                self.save()
        frozen = self._frozen(trial)
        races = RACE in frozen.user_attrs
        if evaluation.last or not (
            stops(self.trials(), self.seeds, frozen, step)
            if races
            else self.optuna.pruner.prune(self._seen(self.optuna), frozen)
        ):
            return False
        self._note(trial, reason=f"{'behind the leader' if races else 'pruned'} at step {step}")
        self._tell(number, state=TrialState.PRUNED)
        return True

    def complete(self, number: int, result: Finished) -> None:
        """Add the trial's final score, and the evaluations that the study does not have yet."""
        trial = self._live[number]
        known = self._frozen(trial).intermediate_values
        for step, score in result.curve:
            if step not in known:
                trial.report(score, step)
        self._note(trial, steps=result.steps, seconds=self._seconds(number, result.seconds))
        self._tell(number, result.score)

    def fail(self, number: int, reason: str, seconds: float = 0.0) -> None:
        trial = self._live[number]
        self._note(trial, reason=reason, seconds=self._seconds(number, seconds))
        self._tell(number, state=TrialState.FAIL)

    def take_back(self, number: int) -> None:
        """Take back that a trial was begun, where the disk and not the trial ended it."""
        trial = self._live[number]
        attempts = self._frozen(trial).user_attrs.get("attempts", 0)
        self._note(trial, attempts=max(attempts - 1, 0))

    def note_memory(self, number: int, count: int) -> None:
        """Keep the memory of a trial's worker, in bytes."""
        self._note(self._live[number], memory=count)

    def remember(self, key: str, value: Any) -> None:
        """Keep a plain value with the study."""
        self.optuna.set_user_attr(key, value)
        self._changed = True

    def recall(self, key: str, default: Any = None) -> Any:
        return self.optuna.user_attrs.get(key, default)

    def add_elapsed_time(self) -> None:
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
        return self.trial(trial.number)

    def _tell(self, number: int, value: float | None = None, state: TrialState | None = None) -> None:
        self.optuna.tell(self._live.pop(number), value, state)
        self.add_elapsed_time()
        self.save()


def enqueued_points(home: Place, space: Space, study: optuna.Study, note: OnNote) -> dict[str, Overrides]:
    """The points of ``clusterns enqueue`` that no trial has taken, by file name, the oldest first.

    Nothing is locked: a file is written in one step and removed by the study's owner once the trial that took it is
    safe, so that a kill at any moment neither loses a point nor tries it twice.

    Args:
        note: called with the reason where a file holds no point of the space.
    """
    box, points = home / ENQUEUED, {}
    taken = taken_names(study)
    for name in box.names():
        if name in taken:
            continue
        source = f"{box.address}/{name}"
        try:
            point = json.loads(box.read(name) or "")
            if not isinstance(point, dict):
                raise ValueError("it holds no keys and values")
            check_point(space, point, source)
            points[name] = point
        except ConfigError as error:
            note(f"An enqueued point is passed over. {error} Remove the file.")
        except (ValueError, DamagedError) as error:
            note(f"An enqueued point is passed over: {source} is damaged ({error}). Remove the file.")
    return points


def worker_hours(config: StudyConfig, study: optuna.Study, *, confirmations: bool = False) -> float:
    """Hours that the workers of the trials were held, and of the runs that confirm if ``confirmations``; a trial that
    shares a GPU holds a part of it."""
    seconds = sum(trial.user_attrs.get("seconds", 0.0) for trial in begun(study))
    if confirmations:
        seconds += study.user_attrs.get("confirmation_seconds", 0.0)
    return seconds / 3600 * workers_held(config, study)


def workers_held(config: StudyConfig, study: optuna.Study) -> float:
    """How many workers a trial holds; below one where it shares a GPU."""
    shared_by = config.trials_per_gpu
    return max(config.workers_per_trial, 1) / (study.user_attrs.get(PER_GPU, 1) if shared_by == "auto" else shared_by)


def last_gain(trials: Sequence[FrozenTrial], gain: float) -> tuple[FrozenTrial | None, int]:
    """The last trial whose score exceeded that of the one before it in this role by more than ``gain``, and how many
    have finished or were pruned since; by number, so that it does not depend on which of two ends first."""
    best, since = None, 0
    for trial in trials:
        if trial.state == TrialState.COMPLETE and (best is None or (trial.value or 0.0) > (best.value or 0.0) + gain):
            best, since = trial, 0
        elif trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            since += 1
    return best, since


def taken_names(study: optuna.Study) -> set[str]:
    """The names of the files whose points trials have taken."""
    return {t.user_attrs[ENQUEUED] for t in study.get_trials(deepcopy=False) if ENQUEUED in t.user_attrs}
