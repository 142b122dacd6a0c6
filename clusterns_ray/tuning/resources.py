"""The Ray cluster under a sweep: started here or joined, and refused when it can never run a trial."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clusterns_ray.errors import ConfigError
from clusterns_ray.io.events import OnNote
from clusterns_ray.launch.capacity import worker_resources
from clusterns_ray.launch.ray_cluster import (
    check_workers,
    cluster_capacity,
    connect,
    least_gpu_memory,
    state_api_error,
)
from clusterns_ray.tuning.job import GpuShare
from clusterns_ray.tuning.packing import choose_trials_per_gpu
from clusterns_ray.tuning.study import Study

HEAD = {"node:__internal_head__": 0.001}
"""Where the process of a trial that only waits for its workers belongs: on the node that is there to stay."""


@contextmanager
def cluster(study: Study, note: OnNote, *, begun: bool) -> Iterator[GpuShare]:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine; leave it as it was before.

    Args:
        begun: whether the study has trials already.

    Yields:
        Whether each worker takes a GPU, and how many trials share one.

    Raises:
        ConfigError: a trial can never run there, or whether it takes a GPU is not known.
        ClusterNSError: nothing answers at RAY_ADDRESS.
    """
    config = study.config
    needed = config.concurrent_trials * max(config.workers_per_trial, 1) * study.base.runtime.cpus_per_worker
    # Trials with workers of their own are watched through the State API, which the dashboard serves.
    with connect(needed, note, dashboard=bool(config.workers_per_trial)):
        use_gpu = check_workers(study.base.runtime, max(config.workers_per_trial, 1), "trial", begun=begun, note=note)
        if config.trials_per_gpu not in (1, "auto") and not use_gpu:
            raise ConfigError(
                f"trials_per_gpu is {config.trials_per_gpu}, but trials take no GPU here.",
                "Leave it out: on CPUs concurrent_trials and runtime.cpus_per_worker say how many run at a time.",
            )
        if config.workers_per_trial:
            check_state_api()
        yield GpuShare(use_gpu, _trials_per_gpu(study, note) if use_gpu else 1)


def _trials_per_gpu(study: Study, note: OnNote) -> int:
    if study.config.trials_per_gpu != "auto":
        return study.config.trials_per_gpu
    memory = least_gpu_memory(study.base.runtime.start_timeout_s)
    number, reason = choose_trials_per_gpu(study, memory, cluster_capacity())
    note(reason)
    return number


def trial_resources(study: Study, share: GpuShare) -> dict[str, float]:
    """What the process of a trial needs: all, or nothing but a place on the head where it has workers."""
    config = study.config
    if config.workers_per_trial:
        return HEAD
    return worker_resources(study.base.runtime.cpus_per_worker, share.use_gpu, share.trials)


def check_state_api() -> None:
    """Whether Ray's State API answers: without it the workers of a trial that is stopped may stay for ever."""
    error = state_api_error(20)
    if error is not None:
        raise ConfigError(
            f"Ray's State API does not answer ({error[:200]}), and trials with workers of their own need it. Install "
            '"ray[default]" and start the head with its dashboard, or set workers_per_trial to 0.'
        )
