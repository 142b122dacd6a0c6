"""The Ray cluster under a sweep: started here or joined, and refused when it can never run a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import ray

from clusterns_ray.errors import ConfigError
from clusterns_ray.launch.cluster import autoscales, can_grow_to, connect, places, uses_gpu
from clusterns_ray.tuning.study import Study

HEAD = {"node:__internal_head__": 0.001}
"""Where the process of a trial that only waits for its workers belongs: on the node that is there to stay."""


@contextmanager
def cluster(study: Study, note: Callable[[str], None]) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, else start Ray on this machine; leave it as it was found.

    Raises:
        ConfigError: a trial can never run there.
        ClusterNSError: nothing answers at RAY_ADDRESS.
    """
    config = study.config
    needed = config.concurrent_trials * max(config.workers_per_trial, 1) * study.base.runtime.cpus_per_worker
    # Trials with workers of their own are watched through the State API, which the dashboard serves.
    with connect(needed, note, dashboard=bool(config.workers_per_trial)):
        check_resources(study)
        if config.workers_per_trial:
            check_state_api()
        yield


def worker_resources(study: Study) -> dict[str, float]:
    """What one worker needs."""
    gpu = {"GPU": 1} if uses_gpu(study.base.runtime) else {}
    return {"CPU": float(study.base.runtime.cpus_per_worker), **gpu}


def trial_resources(study: Study) -> dict[str, float]:
    """What the process of a trial needs: all, or nothing but a place on the head where it has workers."""
    return HEAD if study.config.workers_per_trial else worker_resources(study)


def check_resources(study: Study) -> None:
    """Whether one trial fits into the cluster, as it is or as its autoscaler may make it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    can_grow = can_grow_to()
    if can_grow is None and autoscales():
        return  # It does not tell its limits; `runtime.start_timeout_s` bounds the wait.
    check_fits(worker_resources(study), max(study.config.workers_per_trial, 1), nodes, can_grow)


def check_fits(
    worker: Mapping[str, float], workers: int, nodes: list[dict[str, float]], can_grow: Mapping[str, float] | None
) -> None:
    """Refuse ``workers`` that the nodes can never hold at once.

    Args:
        can_grow: the most of each resource that an autoscaler may bring the cluster to; None without one.
    """
    if can_grow is not None:
        short = {key: can_grow.get(key, 0) for key, value in worker.items() if can_grow.get(key, 0) < value * workers}
    else:
        room = sum(places(worker, node) for node in nodes)
        short = {} if room >= workers else {key: sum(node.get(key, 0) for node in nodes) for key in worker}
    if short:
        each = " and ".join(f"{value:g} {key}" for key, value in worker.items())
        has = ", ".join(f"{value:g} {key}" for key, value in short.items())
        grown = "may grow to" if can_grow is not None else f"({len(nodes)} node{'s'[: len(nodes) != 1]}) has"
        raise ConfigError(
            f"A trial asks for {workers} worker{'s'[: workers != 1]} with {each} each, but the cluster {grown} {has}, "
            "so no trial could ever start. Lower workers_per_trial or runtime.cpus_per_worker, set runtime.use_gpu to "
            "false, or add nodes."
        )


def check_state_api() -> None:
    """Whether Ray's State API answers: without it the workers of a trial that is stopped may stay for ever."""
    from ray.util.state import list_nodes

    try:
        # By address, as another Ray may run on this machine.
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=20)
    except Exception as error:
        raise ConfigError(
            f"Ray's State API does not answer ({' '.join(str(error).split())[:200]}), and trials with workers of their "
            'own need it. Install "ray[default]" and start the head with its dashboard, or set workers_per_trial to 0.'
        ) from None
