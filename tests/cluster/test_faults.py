"""What happens to a cluster does not change the result: nodes taken away, drivers killed, a head that comes back."""

from __future__ import annotations

import random
import time

import pytest
from row_proof import proves_each_row_once, read_steps, steps_by_attempt, world_sizes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 300
TIMEOUT_S = 240.0


def check_same_run(run, undisturbed, attempts: int = 2) -> None:
    """Bit for bit, on two workers at every step; at least this many groups of workers did it."""
    assert run.losses() == undisturbed.losses() and len(run.losses()) == run.steps
    assert run.weights() == undisturbed.weights()
    for key in ("best_step", "sts_dev", "sts_dev_before", "sts_dev_last", "clustering_started_at", "steps"):
        assert run.result()[key] == undisturbed.result()[key], key
    steps = read_steps([run.directory])
    proves_each_row_once(steps, read_steps([undisturbed.directory]), ROWS)
    assert set(world_sizes(steps)) == {2} and len(world_sizes(steps)) >= attempts


def hit_in_the_middle(run, command) -> None:
    """Return at a moment that nobody chose, some steps after the next checkpoint."""
    reached = run.checkpointed()
    command.until(lambda: run.checkpointed() >= reached + run.checkpoint_every)
    time.sleep(random.uniform(0, 0.5))
    assert not run.finished()


def test_a_node_is_lost_the_driver_killed_and_a_node_drained(nodes, make_run_on, undisturbed):
    nodes.start_head()
    nodes.add("first")
    nodes.add("second")
    run = make_run_on("hit", "runtime.num_workers=2")
    command = run.start()
    hit_in_the_middle(run, command)
    nodes.take_away(random.choice(("first", "second")))
    nodes.add("third")
    hit_in_the_middle(run, command)
    command.kill()

    command = run.start()
    hit_in_the_middle(run, command)
    nodes.drain(random.choice([name for name in nodes.nodes if name != "head"]), deadline_s=60)
    nodes.add("fourth")
    said = command.wait(TIMEOUT_S)
    assert said.code == 0, said.err
    assert said.out.count("Training from step") == 2
    assert "A machine is about to go: stopped after step" in said.out
    *_, before, after = (steps for _, steps in sorted(steps_by_attempt([run.directory]).items()))
    assert not before & after, "the drain cost steps"
    check_same_run(run, undisturbed, attempts=4)


@pytest.mark.nightly
def test_the_head_is_lost_and_comes_back(nodes, make_run_on, undisturbed):
    """With its machine goes Ray's memory of everything; the storage stays."""
    nodes.start_head()
    nodes.add("first")
    nodes.add("second")
    run = make_run_on("head-lost", "runtime.num_workers=2")
    command = run.start()
    hit_in_the_middle(run, command)
    nodes.take_away("head")
    said = command.wait(60)
    assert said.code == 1, "the driver did not end by itself"
    assert "Traceback" not in said.err and "does not answer any more. Start it again" in said.err
    assert "when the same command is given again" in said.err

    nodes.start_head()
    nodes.add("third")
    nodes.add("fourth")
    said = run.train(TIMEOUT_S)
    assert (said.code, said.err) == (0, "")
    assert "Training from step" in said.out
    check_same_run(run, undisturbed)
