"""The proof, from the logs of all workers, that every row of every epoch was trained on once."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One step, as those did it whose work counts: the last that came to it."""

    attempt: int
    world_size: int
    batch: tuple[int, ...]
    """sorted rows of all workers"""


def read_steps(directories: Iterable[Path]) -> list[Step]:
    """Every step of a run, in order, from ``rows/*.jsonl`` in its directory on each machine that had a worker."""
    lines: dict[int, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for path in (path for directory in directories for path in directory.glob("rows/*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            lines[record["step"]][record["attempt"]].append(record)
    assert lines and sorted(lines) == list(range(len(lines))), "steps are missing"
    steps = []
    for number in range(len(lines)):
        last = max(lines[number])
        records = sorted(lines[number][last], key=lambda record: record["rank"])
        (world_size,) = {record["world_size"] for record in records}
        assert [record["rank"] for record in records] == list(range(world_size)), f"not each worker once, step {number}"
        steps.append(Step(last, world_size, tuple(sorted(row for record in records for row in record["rows"]))))
    attempts = [step.attempt for step in steps]
    assert attempts == sorted(attempts), "a step was done again, but not the steps after it"
    return steps


def proves_each_row_once(steps: list[Step], undisturbed: list[Step], num_rows: int) -> None:
    """Assert that every batch is the undisturbed run's, and that no epoch leaves out or repeats a row."""
    assert [step.batch for step in steps] == [step.batch for step in undisturbed]
    epoch: list[int] = []
    epochs = 0
    for step in steps:
        epoch += step.batch
        if len(epoch) >= num_rows:
            assert sorted(epoch) == list(range(num_rows)), f"epoch {epochs} leaves out rows or repeats some"
            epoch, epochs = [], epochs + 1
    assert epochs and not epoch, "the run has to end with an epoch, or its last one proves nothing"


def steps_by_attempt(directories: Iterable[Path]) -> dict[int, set[int]]:
    """The steps that each attempt did, by its number."""
    steps: dict[int, set[int]] = defaultdict(set)
    for path in (path for directory in directories for path in directory.glob("rows/*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else it is being written
                record = json.loads(line)
                steps[record["attempt"]].add(record["step"])
    return steps


def done_twice(directories: Iterable[Path]) -> list[int]:
    """The steps that more than one attempt did: what was lost when something happened."""
    attempts = steps_by_attempt(directories)
    assert attempts, "no rows were logged"
    counts = Counter(step for steps in attempts.values() for step in steps)
    return sorted(step for step, count in counts.items() if count > 1)


def world_sizes(steps: list[Step]) -> list[int]:
    """How many workers did the run, one number an attempt."""
    return [next(of_attempt).world_size for _, of_attempt in groupby(steps, key=lambda step: step.attempt)]
