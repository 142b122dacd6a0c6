"""A run that was killed, refused or out of disk goes on as if nothing had been; others cannot write it."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import quick_first, write_corpus, write_pairs
from training_runs import (
    NO_SECONDS,
    TWO_PROMPTS,
    Killed,
    Lab,
    WholeRun,
    assert_same_tensors,
    kill_at,
    placed,
    weights,
)  # fmt: skip

from clusterns_ray.data.prepare import prepare
from clusterns_ray.errors import CheckpointError, ClusterNSError, ConfigError, DataError, StorageError
from clusterns_ray.io.events import Evaluated, Event, RunStarted, StepLogged
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.training import run_access
from clusterns_ray.training.checkpoint import list_checkpoints
from clusterns_ray.training.evaluator import Evaluator
from clusterns_ray.training.metrics import read_metrics
from clusterns_ray.training.validation import DevSet

pytestmark = pytest.mark.slow

# Each kind of state that a checkpoint holds, several in a run; those that a change is likeliest to break come first.
RESUMED: dict[str, dict[str, dict[str, Any]]] = {
    "clustering, another set": {"evaluation": {"also": ["LEE50/test"]}},
    # The bank is filled in step 1, and clustered anew in steps 4 and 6: before and after the kill.
    "corpus, neighbour": {
        "clustering": {"scope": "corpus", "num_clusters": 40, "recluster_every_steps": 2, "refresh_rows": 9},
        "data": {"positives": "neighbour", "neighbour_distance": 2, "corpus": "DOCUMENTS"},
    },
    "sum, fp16": {
        "clustering": {"update": "sum", "rate": 0.01},
        "data": {"order": "random"},
        "train": {"precision": "fp16", "weight_decay": 0.1},
    },
    "before clustering": {"clustering": {"start_cosine": -1.0}},
    "corpus before it starts, masked words": {
        "clustering": {"scope": "corpus", "start_cosine": -1.0},
        "loss": {"mlm_weight": 0.1},
    },
    "kmeans, bf16, crop, teacher": {
        "clustering": {"init": "kmeans"},
        "train": {"precision": "bf16", "schedule": "cosine", "warmup_ratio": 0.3},
        "data": {"positives": "crop"},
        "loss": {"teacher": "TEACHER", "distillation_weight": 0.5},
    },
    "prompts": TWO_PROMPTS,
}


@pytest.mark.parametrize("case", quick_first(RESUMED, 3))
def test_a_resumed_run_is_the_same_to_the_bit(lab: Lab, tmp_path: Path, case: str) -> None:
    config = lab.config(**placed(RESUMED[case], tmp_path))
    whole = lab.run(tmp_path / "whole", config)
    # Killed in step 4, after the checkpoint of step 2: steps 3 and 4 are done again.
    with pytest.raises(Killed):
        lab.run(tmp_path / "killed", config, kill_at(4))
    assert [path.name for path in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-00000002"]
    assert not (tmp_path / "killed" / "result.json").exists()
    resumed = lab.run(tmp_path / "killed", config)
    assert lab.seen(RunStarted)[0].step == 2

    if "start_cosine" not in RESUMED[case].get("clustering", {}):
        assert_same_tensors(weights(tmp_path / "whole", 6), weights(tmp_path / "killed", 6))
        assert weights(tmp_path / "whole", 6)["centroids"] is not None
    else:
        a, b = weights(tmp_path / "whole", 6), weights(tmp_path / "killed", 6)
        assert a.pop("centroids") is None and b.pop("centroids") is None
        assert_same_tensors(a, b)
    for key in ("best_step", "sts_dev", "sts_dev_before", "also", "steps", "clustering_started_at", "fingerprint"):
        assert resumed[key] == whole[key], key

    def step_records(name: str) -> list[dict[str, Any]]:
        timing = ("sentences_per_second",)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        return [{key: value for key, value in record.items() if key not in timing} for record in records]

    assert len(step_records("whole")) == 10
    assert step_records("killed") == step_records("whole"), "steps are missing, doubled, or other"


def test_killed_before_the_first_checkpoint_it_starts_anew(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        lab.run(tmp_path, lab.config(), kill_at(1))
    lab.run(tmp_path, lab.config())
    assert lab.seen(RunStarted)[0].step == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_going_on_with_another_torch_is_said(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        lab.run(tmp_path, lab.config(), kill_at(4))
    path = tmp_path / "environment.json"
    environment = json.loads(path.read_text())
    environment["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(environment))
    lab.run(tmp_path, lab.config())
    (text,) = [note for note in lab.notes if "was begun with" in note]
    assert text.startswith(f"The run was begun with torch 1.0 and goes on with {torch.__version__}: it may differ")


def test_killed_after_the_last_step_it_only_finishes(lab: Lab, tmp_path: Path) -> None:
    whole = lab.run(tmp_path, lab.config())
    (tmp_path / "result.json").unlink()
    again = lab.run(tmp_path, lab.config())
    assert lab.seen(StepLogged) == [] and lab.seen(Evaluated) == []
    assert {**again, **NO_SECONDS} == {**whole, **NO_SECONDS}


def test_stopped_early_it_stays_stopped(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 10.0, 9.0, 8.0])
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    config = lab.config(evaluation={"every_steps": 1, "patience": 2})
    lab.run(tmp_path, config)
    (tmp_path / "result.json").unlink()
    again = lab.run(tmp_path, config)
    assert lab.seen(StepLogged) == [] and (again["steps"], again["best_step"]) == (3, 1)


def test_stopped_early_between_checkpoints_the_result_is_the_same(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a checkpoint of the last step, the steps since the one before are done again."""
    given = {0: 5.0, 1: 10.0, 2: 9.0, 3: 8.0}
    asked: list[int] = []

    def score(self: DevSet, encoder: Encoder) -> float:
        asked.append(current["evaluator"].state.step)
        return given[asked[-1]]

    current: dict[str, Evaluator] = {}
    original = Evaluator.__init__

    def init(self: Evaluator, *arguments: Any) -> None:
        current["evaluator"] = self
        original(self, *arguments)

    monkeypatch.setattr(Evaluator, "__init__", init)
    monkeypatch.setattr(DevSet, "score", score)
    config = lab.config(evaluation={"every_steps": 1, "patience": 2}, runtime={"checkpoint_every_steps": 2})
    first = lab.run(tmp_path, config)
    assert (first["steps"], first["best_step"], asked) == (3, 1, [0, 1, 2, 3])
    (tmp_path / "result.json").unlink()
    again = lab.run(tmp_path, config)
    assert {**again, **NO_SECONDS} == {**first, **NO_SECONDS}


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(lab: Lab, whole: WholeRun, tmp_path: Path) -> None:
    config = lab.config()
    with pytest.raises(Killed):
        lab.run(tmp_path / "killed", config, kill_at(6))
    newest = list_checkpoints(tmp_path / "killed" / "checkpoints")[0]
    assert newest.name == "step-00000004"
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-9])
    lab.run(tmp_path / "killed", config)
    assert lab.seen(RunStarted)[0].step == 2
    assert any("step-00000004 is passed over" in note for note in lab.notes)
    assert_same_tensors(weights(whole.directory, 6), weights(tmp_path / "killed", 6))


def test_checkpoints_of_another_configuration_are_refused(lab: Lab, tmp_path: Path) -> None:
    lab.run(tmp_path, lab.config(train={"max_steps": 2}))
    for name in ("config.yaml", "result.json"):  # which would be refused before
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="None of the 1 checkpoints"):
        lab.run(tmp_path, lab.config(train={"max_steps": 3}))
    assert any("another configuration" in note for note in lab.notes)


@pytest.mark.parametrize("changed", ["corpus", "dev"])
def test_a_run_does_not_go_on_with_other_data(lab: Lab, tmp_path: Path, changed: str) -> None:
    corpus, sts = write_corpus(tmp_path / "corpus.txt"), tmp_path / "sts"
    pairs = write_pairs(sts / "STSB" / "dev.jsonl")
    config = lab.config(data={"corpus": str(corpus)}, evaluation={"sts": str(sts)})
    with pytest.raises(Killed):
        lab.run(tmp_path / "run", config, kill_at(6))
    before = {path: path.read_bytes() for path in (corpus, pairs)}
    if changed == "corpus":
        write_corpus(corpus, seed=5)
    else:
        write_pairs(pairs, seed=5)
    with pytest.raises(DataError, match="begun with other data") as caught:
        lab.run(tmp_path / "run", config)
    text = str(caught.value)
    digests = re.findall(r"[0-9a-f]{16}", text)
    assert len(set(digests)) == 2 and ("dev set" in text) == (changed == "dev") and "another name" in text
    for path, content in before.items():  # the remedy
        path.write_bytes(content)
    assert lab.run(tmp_path / "run", config)["steps"] == 6
    assert lab.seen(RunStarted)[0].step == 4


def test_tokens_whose_bytes_were_changed_are_not_learnt_from(lab: Lab, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.txt")
    config = lab.config(data={"corpus": str(corpus), "cache_dir": str(tmp_path / "cache")})
    tokens_dir = prepare(config).tokens_dir
    path = tokens_dir / "tokens-00000.arrow"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"baker", b"maker"))
    os.utime(tokens_dir / "manifest.json")  # as if a disk had done it, long after all was checked
    assert path.read_bytes() != content
    with pytest.raises(DataError, match=r"tokens-00000\.arrow: the checksum differs"):
        lab.run(tmp_path / "run", config)


def test_a_killed_export_leaves_a_whole_model(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([5.0, 10.0, 20.0, 30.0] * 2)
    monkeypatch.setattr(DevSet, "score", lambda self, encoder: next(scores))
    original, count = Encoder.save, []

    def save(self: Encoder, directory: Path) -> None:
        count.append(directory)
        original(self, directory)
        if len(count) == 3:  # before training, after step 2, after step 4
            (Path(directory) / "model.safetensors").write_bytes(b"half")
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "save", save)
        with pytest.raises(Killed):
            lab.run(tmp_path, lab.config())
    step2 = weights(tmp_path, 2)
    for name, value in Encoder.load(tmp_path / "model").backbone.state_dict().items():
        assert torch.equal(value, step2[f"encoder.backbone.{name}"])
    assert lab.run(tmp_path, lab.config())["steps"] == 6


def test_one_writer_a_run(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterns_ray.io import lease as exclusive_module

    original = exclusive_module.exclusive
    monkeypatch.setattr(run_access, "exclusive", lambda run_dir, wanted: original(run_dir, wanted, wait_s=0.1))

    def second(event: Event) -> None:
        if isinstance(event, RunStarted):
            with pytest.raises(ClusterNSError, match="being written by another process") as caught:
                Lab(lab.base, lab.prepared).run(tmp_path, lab.config())
            assert str(tmp_path) in str(caught.value) and "another runtime.name" in str(caught.value)
            met.append(True)

    met: list[bool] = []
    lab.run(tmp_path, lab.config(train={"max_steps": 2}), second)
    assert met


# ---- whose a run is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"encoder": {"max_length": 65}}, "encoder.max_length is 65"),
        ({"train": {"global_batch_size": 512, "shards": 4}, "data": {"limit": 3}}, "3 rows"),
    ],
)
def test_a_refused_request_does_not_take_the_name(
    lab: Lab, tmp_path: Path, sections: dict[str, Any], reason: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=reason):
        lab.run(tmp_path, lab.config(**sections))
    assert not (tmp_path / "config.yaml").exists()
    assert lab.run(tmp_path, lab.config(train={"max_steps": 1}))["steps"] == 1


def test_the_configuration_is_compared_by_who_holds_the_lock(lab: Lab, tmp_path: Path) -> None:
    """As where another command began the run after this one had looked."""
    lab.run(tmp_path, lab.config(train={"max_steps": 1}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"train\.max_steps was 1 and is now 2"):
        lab.run(tmp_path, lab.config(train={"max_steps": 2}))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"result\.json is that of another config"):
        lab.run(tmp_path, lab.config(train={"max_steps": 2}))


def test_what_a_kill_left_half_written_is_removed(lab: Lab, tmp_path: Path) -> None:
    ours = [".result.json.94537254", ".config.yaml.0a1b2c3d", ".centroids.npy.00000000", ".metrics.jsonl.ffffffff"]
    others = [".result.json.notours!", ".mine.94537254", "result.json.94537254", ".report.html.94537254"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("half")
    (tmp_path / ".model.new-12345678").mkdir()
    lab.run(tmp_path, lab.config(train={"max_steps": 1}))
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".") or path.name in others}
    assert left == {".lock", *others}


# ---- disks that take no more --------------------------------------------------------------------------------------


class FullDisk:
    """Fails to flush every file or directory whose path holds ``part``."""

    def __init__(self, part: str):
        self.part, self.fsync = part, os.fsync

    def __call__(self, handle: int) -> None:
        if self.part in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(handle)


PARTS = ["checkpoints/.step", ".result.json", ".model.new", ".config.yaml", ".environment"]


@pytest.mark.parametrize("part", quick_first(PARTS, 2))
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    lab: Lab, whole: WholeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", FullDisk(part))
        with pytest.raises(StorageError, match=r"the disk is full\. Free some space\. Then give the same"):
            lab.run(tmp_path / "full", lab.config())
    assert not (tmp_path / "full" / "result.json").exists()
    again = lab.run(tmp_path / "full", lab.config())
    assert {**again, **NO_SECONDS, "model": ""} == {**whole.result, **NO_SECONDS, "model": ""}
    assert_same_tensors(weights(whole.directory, 6), weights(tmp_path / "full", 6))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE")
@pytest.mark.parametrize("limit", [1_000, 60_000, 200_000])
def test_a_file_that_may_not_grow_is_one_line(lab: Lab, tmp_path: Path, limit: int) -> None:
    """What torch and safetensors write fails with errors of their own kinds."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(
            StorageError, match=r"cannot be read or written: (File too large|the disk took only a part)"
        ):
            lab.run(tmp_path, lab.config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
