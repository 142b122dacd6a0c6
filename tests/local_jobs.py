"""The jobs of a sweep run in this process, in place of Ray Tune's pool, by a driver that may be lost at any moment."""

from __future__ import annotations

from clusterns_ray.tuning.job import Evaluation, Job, Result
from clusterns_ray.tuning.sweep import Sweep, run_jobs
from clusterns_ray.tuning.trial import TrialRun


class Lost(Exception):
    """The driver is gone, with its machine."""


class LocalJobs:
    """Runs one job at a time.

    Args:
        stop_after: The driver is lost as it begins the job after this many.
        lose_after: The driver is lost after this many evaluations, the untrained encoder's included.
    """

    def __init__(self, kind: type[TrialRun], stop_after: int | None = None, lose_after: int | None = None) -> None:
        self.kind, self.stop_after, self.lose_after = kind, stop_after, lose_after
        self.names: list[str] = []
        self.evaluations: list[Evaluation] = []

    def begin(self, job: Job) -> None:
        self.names.append(job.name)
        if self.stop_after is not None and len(self.names) > self.stop_after:
            raise Lost
        self.run = self.kind(job)

    def wait(self, timeout_s: float) -> tuple[Job, Result]:
        result = self.run.next()
        if isinstance(result, Evaluation):
            self.evaluations.append(result)
        return self.run.job, result

    def answer(self, go_on: bool) -> None:
        lost = len(self.evaluations) == self.lose_after
        if lost or not go_on:
            self.run.stop()
        if lost:
            raise Lost


def drive(
    sweep: Sweep, kind: type[TrialRun], stop_after: int | None = None, lose_after: int | None = None
) -> LocalJobs:
    """Run a sweep to its end, or until its driver is lost."""
    jobs = LocalJobs(kind, stop_after, lose_after)
    sweep.prepare()
    try:
        run_jobs(sweep, jobs)
        assert stop_after is None and lose_after is None, "the driver was to be lost"
    except Lost:
        pass
    return jobs
