"""The command in processes of its own, on a Ray that it starts itself in a directory of this session alone."""

from ray_runs import alone, environment, finished, make_run, on_two_workers, ray_directory  # noqa: F401  fixtures
