"""How many trials share a GPU where a study leaves that to ``auto``: as many as fit, by the estimate of memory that
``clusterns plan`` shows."""

from __future__ import annotations

from clusterns_ray.config import Config
from clusterns_ray.errors import ConfigError
from clusterns_ray.launch.capacity import ClusterCapacity, Resources
from clusterns_ray.launch.estimates import model_size, step_memory
from clusterns_ray.tuning.space import Overrides
from clusterns_ray.tuning.study import MOST_PER_GPU, Study

SHARE = 0.9
"""The part of a GPU's memory that trials may need together: an estimate is one, and others may use the GPU a little."""

GIB = 1 << 30


def trial_bytes(config: Config, *, gpu: bool) -> int:
    """The memory of each worker of a trial where it computes, at the most."""
    return step_memory(model_size(config), config, max(config.runtime.worker_counts()[0], 1), gpu=gpu)["total"]


def largest_trial(study: Study) -> tuple[int, Overrides]:
    """The GPU memory of the trial of a space that needs the most, and the values that make it so.

    Keys are taken one after the other, each at the end of its range, or the choice, that needs the most beside those
    before it: memory grows, or does not, with each of them by itself.

    Raises:
        ConfigError: the encoder cannot be loaded.
    """
    most, overrides = trial_bytes(study.base, gpu=True), {}
    for name, parameter in study.space.parameters.items():
        if not study.space.matters(name, overrides):
            continue
        for value in parameter.ends():
            try:
                need = trial_bytes(study.space.config({**overrides, name: value}), gpu=True)
            except ConfigError:  # possible with values of other keys alone
                continue
            if need > most:
                most, overrides = need, {**overrides, name: value}
    return most, overrides


def choose_trials_per_gpu(study: Study, gpu_bytes: int, capacity: ClusterCapacity) -> tuple[int, str]:
    """The number of trials that share a GPU, and why, in a sentence.

    Args:
        gpu_bytes: the memory of the smallest GPU.
        capacity: what the nodes hold, as a trial needs CPUs too.
    """
    need, overrides = largest_trial(study)
    limits = {
        f"{SHARE:.0%} of the smallest GPU's {gpu_bytes / GIB:.1f} GiB holds no more": int(SHARE * gpu_bytes / need),
        "no more run at a time (concurrent_trials)": study.config.concurrent_trials,
        "there are no more CPUs beside a GPU (runtime.cpus_per_worker)": _by_cpus(study, capacity.nodes),
        "more are not allowed": MOST_PER_GPU,
    }
    number = max(min(limits.values()), 1)
    values = ", ".join(f"{key} {value}" for key, value in overrides.items())
    of = f" with {values}" if values else ""
    why = min(limits, key=lambda name: limits[name])
    text = f"trials_per_gpu: auto is {number}, as a trial{of} needs at most {need / GIB:.1f} GiB of GPU memory by the "
    return number, f"{text}estimate of `clusterns plan`, and {'not even one fits' if need > gpu_bytes else why}."


def _by_cpus(study: Study, nodes: tuple[Resources, ...]) -> int:
    """How many trials the CPUs beside a GPU allow, on the node with the most; no limit where no such node is up."""
    cpus = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU", 0) >= 1]
    return int(max(cpus) / study.base.runtime.cpus_per_worker) if cpus else MOST_PER_GPU
