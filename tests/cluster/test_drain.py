"""A node is about to be taken away: the workers stop after a checkpoint, lose no step, and go on elsewhere."""

from __future__ import annotations

import random
import time

import pytest
from row_proof import done_twice, read_steps, world_sizes
from test_faults import TIMEOUT_S, check_same_run, hit_in_the_middle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_drained_node_is_left_before_it_goes(nodes, make_run_on, undisturbed):
    nodes.start_head()
    nodes.add("first")
    nodes.add("second")
    run = make_run_on("drained", "runtime.num_workers=2")
    command = run.start()
    hit_in_the_middle(run, command)
    drained = random.choice(("first", "second"))
    nodes.drain(drained, deadline_s=60)
    nodes.add("third")
    said = command.wait(TIMEOUT_S)
    assert said.code == 0, said.err
    assert "A machine is about to go: stopped after step" in said.out
    assert done_twice([run.directory]) == []
    check_same_run(run, undisturbed)


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
