"""A node is about to be taken away: the workers stop after a checkpoint, lose no step, and go on elsewhere."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from row_proof import done_twice, read_steps, steps_by_attempt, world_sizes
from test_faults import TIMEOUT_S, hit_in_the_middle

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]


def test_an_elastic_run_leaves_a_drained_node_and_does_without(nodes, make_run_on):
    nodes.start_head()
    nodes.add("first")
    nodes.add("second")
    run = make_run_on("drained-elastic", "runtime.num_workers=[1,2]")
    command = run.start()
    hit_in_the_middle(run, command)
    nodes.drain("second", deadline_s=15)
    time.sleep(15)
    nodes.take_away("second")
    said = command.wait(TIMEOUT_S)
    assert said.code == 0, said.err
    assert "A machine is about to go: stopped after step" in said.out
    assert done_twice([run.directory]) == []
    assert world_sizes(read_steps([run.directory])) == [2, 1]


@pytest.mark.timeout(3000)
def test_at_most_one_step_is_lost_in_nineteen_of_twenty_drains(nodes, make_run_on, capsys):
    """One node after the other is drained, at moments that nobody chose, and goes when the workers have left it."""
    drains = 20
    nodes.start_head()
    there = ["node-0", "node-1"]
    for name in there:
        nodes.add(name)
    run = make_run_on("many-drains", "runtime.num_workers=2", "train.epochs=1000", "train.max_steps=null")
    command = run.start()
    began = time.monotonic()
    for number in range(1, drains + 1):
        reached = run.checkpointed()
        command.until(lambda: run.checkpointed() > reached + run.checkpoint_every)  # noqa: B023
        time.sleep(random.uniform(0, 0.5))
        drained = there.pop(random.randrange(2))
        nodes.drain(drained)
        there.append(f"node-{number + 1}")
        nodes.add(there[-1])
        command.until(lambda: len(steps_by_attempt([run.directory])) > number)  # noqa: B023
        nodes.take_away(drained)
    minutes = (time.monotonic() - began) / 60
    attempts = [steps for _, steps in sorted(steps_by_attempt([run.directory]).items())]
    lost = [len(before & after) for before, after in pairwise(attempts)]
    command.kill()
    with capsys.disabled():
        print(f"\nsteps done again after each of {len(lost)} drains: {lost}; {minutes:.1f} minutes")
    assert len(lost) == drains
    assert sum(steps > 1 for steps in lost) <= drains // 20
