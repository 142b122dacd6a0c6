"""Two nodes that share nothing but an object store: each stages what it needs; the result is that of one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from nodes import Nodes
from ray_runs import Run
from row_proof import proves_each_row_once, read_steps
from s3_server import s3_server

from clusterns_ray.io.object_store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 300


def files_below(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_nodes_that_share_nothing_but_a_store(
    make_run_on: Callable[..., Run], undisturbed: Run, nodes: Nodes, tmp_path: Path
) -> None:
    with s3_server() as reached_by:
        nodes.env |= reached_by
        labels = "--labels=gpu=none,market=spot"
        machines = [nodes.start_head(1, labels).directory, nodes.add("second", 1, labels).directory]
        nodes.add("without the labels")
        url = f"s3://bucket/{tmp_path.name}"
        selector = "runtime.label_selector={market: spot}"
        run = make_run_on("stored", "runtime.num_workers=2", selector, f"runtime.storage_path={url}")
        said = run.train(400)
        assert said.code == 0, said.out + said.err
        assert f"Wrote {url}/stored/model" in said.out

        store = Store(url)
        names = store.names()
        for part in ("stored/result.json", "stored/config.yaml", "stored/metrics.jsonl", "stored/model.manifest.json"):
            assert part in names, names
        assert store.pull_directory("stored/model", tmp_path / "pulled")
    ours = (tmp_path / "pulled" / "model.safetensors").read_bytes()
    theirs = (undisturbed.directory / "model" / "model.safetensors").read_bytes()
    assert ours == theirs, "not the weights of the run on one file system"

    # A worker on each of the two, which found there what it read.
    trained = [[path.parent for path in machine.rglob("rows") if path.parent.name == "stored"] for machine in machines]
    assert [len(found) for found in trained] == [1, 1]
    steps = read_steps([directory for found in trained for directory in found])
    proves_each_row_once(steps, read_steps([undisturbed.directory]), ROWS)
    staged = [file for file in files_below(machines[1]) if "/staged/" in file]
    assert any("tokens-" in file for file in staged) and any("encoder-" in file for file in staged)
    assert any(file.endswith("STSB/dev.jsonl") for file in staged)
    assert not run.directory.exists(), "something was written to the directory that they would have shared"
