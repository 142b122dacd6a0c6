"""``clusterns train`` on local Ray workers: what it makes, what it says, and how it ends when it cannot work."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from clusterns_ray.models.encoder import Encoder

pytestmark = pytest.mark.slow


def test_two_workers_make_the_run_of_one_process(alone, on_two_workers):
    (one, one_said), (two, two_said) = alone, on_two_workers
    assert (one_said.code, two_said.code) == (0, 0), one_said.err + two_said.err
    assert (one.result()["num_workers"], two.result()["num_workers"]) == (1, 2)
    assert 1 < two.result()["clustering_started_at"] == one.result()["clustering_started_at"] < one.steps / 2
    steps, losses = zip(*two.losses())
    assert list(steps) == list(range(1, one.steps + 1))
    assert max(losses) > 1.5 * min(losses)
    assert two.losses() == one.losses() and two.weights() == one.weights()
    assert two.result()["reduction"] == "tree"
    assert two.result()["fingerprint"] == one.result()["fingerprint"]


def test_progress_is_shown_where_the_command_was_given_and_nothing_else(on_two_workers):
    run, said = on_two_workers
    assert said.err == ""
    lines = said.out.splitlines()
    assert f"Training: {run.steps} steps over 300 sentences." in lines
    assert [int(step) for step in re.findall(rf"^step (\d+)/{run.steps}  loss \d", said.out, re.M)] == [
        *range(1, run.steps + 1)
    ]
    assert [int(step) for step in re.findall(r"^step (\d+)  dev \d", said.out, re.M)] == [*range(run.steps + 1)]
    assert lines[-1] == f"Wrote {run.directory / 'model'}"
    # "Training did not improve" and "At step" are of the model's state, which differs between kinds of CPU.
    known = (
        r"Tokenising|  300 sentences|Corpus|Training|Clustering starts|Collapse|At step \d|step \d|STSB/dev|Wrote|"
        r"2 CPUs are"
    )
    assert [line for line in lines if not re.match(known, line)] == []


def test_the_model_is_one_that_transformers_loads(on_two_workers):
    import torch
    import transformers

    directory = on_two_workers[0].directory / "model"
    model = transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "The baker finds a lamp."
    with torch.no_grad():
        theirs = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0, 0].numpy()
    assert np.linalg.norm(theirs) > 0.1
    np.testing.assert_allclose(Encoder.load(directory).encode([text])[0], theirs, rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_left_as_it_is(on_two_workers, ray_directory):
    def state(directory: Path) -> dict[str, tuple[int, int]]:
        files = [path for path in directory.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    run = on_two_workers[0]
    before, sessions = state(run.directory), len(ray_directory.sessions())
    assert before
    again = run.train()
    assert again.code == 0, again.err
    assert "'two' is finished, and left as it is." in again.out
    assert not re.search(r"^Training:", again.out, re.M)
    assert state(run.directory) == before
    assert len(ray_directory.sessions()) == sessions, "it started Ray for nothing"


@pytest.mark.nightly
def test_elastic_workers_start_and_finish(make_run, on_two_workers):
    run = make_run("elastic", "runtime.num_workers=[1, 2]")
    said = run.train()
    assert (said.code, said.err) == (0, "")
    assert run.result()["steps"] == run.steps and run.result()["num_workers"] in (1, 2)
    assert run.losses() == on_two_workers[0].losses() and run.weights() == on_two_workers[0].weights()


def test_an_error_that_a_restart_would_meet_again_ends_the_run_at_once(make_run):
    run = make_run("absurd", "runtime.num_workers=1", "train.learning_rate=1e30")
    said = run.train()
    assert said.code == 1
    assert said.err.startswith("failed: The last 10 gradients before step 11 were NaN or infinite"), said.err
    assert "train.learning_rate (1e+30)" in said.err and "Traceback" not in said.err
    assert said.out.count("Training") == 1, "it was tried again"
    assert not run.finished()


def test_workers_that_can_never_start_are_refused(make_run, ray_directory):
    """Two GPUs are asked for where Ray sees none."""
    run = make_run("impossible", "runtime.num_workers=2", "runtime.use_gpu=true", "runtime.start_timeout_s=300")
    began = time.monotonic()
    said = run.train(90)
    assert said.code == 2
    assert time.monotonic() - began < 60
    assert said.err.startswith(
        "error: The run asks for 2 workers with 1 CPU and 1 GPU each, but the cluster has room for 0"
    )
    assert "0 GPU, and no autoscaler" in said.err and "runtime.use_gpu to false" in said.err
    assert not (run.directory / "config.yaml").exists(), "it took the name"
    assert ray_directory.processes("RayTrainWorker") == []
