"""The figures of a run where Prometheus collects them: at the metrics port of the node that the driver runs on."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def test_prometheus_sees_a_run_and_a_study(environment: dict[str, str]) -> None:
    said = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert said.returncode == 0, said.stderr[-3000:]


def main() -> None:
    """In a process of its own: what a driver does with its events, and what is then at the port."""
    import ray

    from clusterns_ray.io.events import Evaluated
    from clusterns_ray.launch.gauges import with_gauges
    from clusterns_ray.tuning.events import TrialScored
    from clusterns_ray.tuning.gauges import with_trial_gauges

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    with_gauges(lambda event: None, "mine")(Evaluated(4, 61.5, {"step": 4, "sts_dev": 61.5}, True, 61.5))
    with_trial_gauges(lambda event: None, "sweep")(TrialScored("0000", "finished", 9, 70.25))
    wanted = {
        ("dev_score{", 'run="mine"', "61.5"),
        ("best_dev_score{", 'run="sweep"', "70.25"),
        ("trials{", 'state="finished"', "1.0"),
    }
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, lines = time.monotonic() + 90, []
    while time.monotonic() < deadline:
        time.sleep(1)
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_clusterns_")]
        missing = {
            (name, tag, value)
            for name, tag, value in wanted
            if not any(f"ray_clusterns_{name}" in each and tag in each and each.endswith(f" {value}") for each in lines)
        }
        if not missing:
            ray.shutdown()
            return
    raise SystemExit(f"{missing} not among {lines}")


if __name__ == "__main__":
    main()
