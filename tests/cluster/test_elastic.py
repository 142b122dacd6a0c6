"""``runtime.num_workers: [1, 2]``: a run takes up a node that comes, does without one that goes, and ends the same."""

from __future__ import annotations

import pytest
from row_proof import proves_each_row_once, read_steps, world_sizes

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]

ROWS = 300
STEPS = 150
TIMEOUT_S = 400.0
GROWS_WITHIN_S = 200.0
"""Ray looks at the nodes that are there every 20 s."""
SETTINGS = (f"train.max_steps={STEPS}", "train.epochs=15")
"""So slow that Ray can look twice before it ends."""


def two_workers(run) -> bool:
    """Whether a second worker has done steps."""
    return any(path.stat().st_size for path in run.directory.glob("rows/*-1.jsonl"))


def test_a_node_is_added_and_one_is_lost(nodes, make_run, make_run_on):
    alone = make_run("elastic-alone", *SETTINGS)
    assert alone.train().code == 0

    nodes.start_head()
    nodes.add("first")
    # A group of a size that the cluster no longer has is given up after this long.
    nodes.env["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    run = make_run_on("elastic", *SETTINGS, "runtime.num_workers=[1,2]", "runtime.resize_every_s=1")
    command = run.start()
    command.until(run.checkpointed)
    nodes.add("second")
    command.until(lambda: two_workers(run), GROWS_WITHIN_S)
    with_two = run.checkpointed()
    command.until(lambda: run.checkpointed() > with_two)
    assert not run.finished()
    nodes.take_away("second")

    said = command.wait(TIMEOUT_S)
    assert said.code == 0, said.err
    steps = read_steps([run.directory])
    assert world_sizes(steps) == [1, 2, 1]
    proves_each_row_once(steps, read_steps([alone.directory]), ROWS)
    assert len(run.losses()) == STEPS
    assert run.losses() == alone.losses() and run.weights() == alone.weights()
    for key in ("sts_dev", "sts_dev_last"):
        assert run.result()[key] == alone.result()[key], key
