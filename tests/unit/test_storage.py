"""Object stores, against a real S3 server on this machine: whole or not there, verified, resumed, bit-identical."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
from helpers import write_corpus, write_pairs
from s3_server import BadHealth, s3_server
from training_runs import Killed, kill_at

from clusterns_ray.config import Config, make_config
from clusterns_ray.errors import ClusterNSError, ConfigError, StorageError
from clusterns_ray.io import object_store as storage
from clusterns_ray.io.events import Event, Note, RunStarted, StepLogged
from clusterns_ray.io.object_store import (
    Place,
    Store,
    is_url,
    local_copy,
    place,
    read_text,
    reading_place,
    split_url,
    write_text,
)
from clusterns_ray.io.uploader import Uploader
from clusterns_ray.launch.preflight import check_storage
from clusterns_ray.launch.staging import read_run_file, run_directory, stage, unstage
from clusterns_ray.launch.trainer import train


def directory(path: Path, **files: str) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


# ---- objects ------------------------------------------------------------------------------------------------------


def test_urls() -> None:
    assert is_url("s3://b/p") and is_url("gs://b") and not is_url("/a/b") and not is_url("runs") and not is_url("C:/x")
    assert local_copy("runs") == Path("runs").resolve()
    assert local_copy("s3://b/p", "/there").parent == Path("/there")
    assert local_copy("s3://b/p", "/there") != local_copy("s3://b/q", "/there")


def test_this_machines_own_place_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path))
    assert local_copy("s3://b/p", "/there").parent == tmp_path


def test_objects(store: Store, tmp_path: Path) -> None:
    assert store.read("a") is None and store.names() == []
    store.write("a/b.txt", b"one")
    store.write("a/b.txt", b"two")
    assert store.read("a/b.txt") == b"two" and (store / "a").read("b.txt") == b"two"
    (tmp_path / "up").write_bytes(b"x" * 100_000)
    store.upload(tmp_path / "up", "big")
    assert store.names() == ["a/b.txt", "big"]
    digest = store.download("big", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"x" * 100_000 and digest == storage.sha256(tmp_path / "up")
    store.delete("big")
    store.delete("big")
    assert store.names() == ["a/b.txt"]


def test_a_transfer_that_fails_is_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    failures = [OSError("slow down"), OSError("slow down")]

    def work() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert store._retried("it", work) == "done" and waits == [1, 2]
    failures.extend([OSError("connection refused")] * 9)
    with pytest.raises(StorageError, match=r"it failed 4 times: connection refused\. Check the network"):
        store._retried("it", work)


# ---- directories --------------------------------------------------------------------------------------------------


def test_a_directory_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    local = directory(tmp_path / "local", **{"a.txt": "1", "sub/b.txt": "2"})
    assert not store.pull_directory("d", tmp_path / "copy")
    store.push_directory(local, "d")
    assert store.directories() == ["d"] and set(store.manifest("d") or ()) == {"a.txt", "sub/b.txt"}
    assert store.pull_directory("d", tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "b.txt").read_text() == "2"
    stamp = (tmp_path / "copy" / "a.txt").stat().st_mtime_ns
    assert store.pull_directory("d", tmp_path / "copy"), "what is there is not downloaded again"
    assert (tmp_path / "copy" / "a.txt").stat().st_mtime_ns == stamp

    (local / "sub" / "b.txt").unlink()
    directory(local, **{"a.txt": "changed"})
    store.push_directory(local, "d")
    assert store.pull_directory("d", tmp_path / "copy")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["a.txt"]
    assert (tmp_path / "copy" / "a.txt").read_text() == "changed"
    store.delete_directory("d")
    assert store.names() == []


def test_a_copy_that_was_changed_is_made_anew(store: Store, tmp_path: Path) -> None:
    store.push_directory(directory(tmp_path / "local", **{"a.txt": "12"}), "d")
    store.pull_directory("d", tmp_path / "copy")
    (tmp_path / "copy" / "a.txt").write_text("21")
    assert store.pull_directory("d", tmp_path / "copy")
    assert (tmp_path / "copy" / "a.txt").read_text() == "12"


def test_half_a_directory_is_none(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = directory(tmp_path / "local", **{"a.txt": "1", "b.txt": "2"})
    original = Store.upload

    def upload(self: Store, path: Path, name: str) -> None:
        if name.endswith("b.txt"):
            raise KeyboardInterrupt  # the machine dies
        original(self, path, name)

    monkeypatch.setattr(Store, "upload", upload)
    with pytest.raises(KeyboardInterrupt):
        store.push_directory(local, "d")
    assert store.names() == ["d/a.txt"]
    assert store.manifest("d") is None and not store.pull_directory("d", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_damage_is_noticed(store: Store, tmp_path: Path) -> None:
    store.push_directory(directory(tmp_path / "local", **{"a.txt": "123"}), "d")
    store.write("d/a.txt", b"124")
    with pytest.raises(StorageError, match="checksum"):
        store.pull_directory("d", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_manifest_cannot_lead_out_of_its_directory(store: Store, tmp_path: Path, name: str) -> None:
    store.write("d.manifest.json", json.dumps({name: {"bytes": 1, "sha256": "0"}}).encode())
    with pytest.raises(StorageError, match="damaged"):
        store.pull_directory("d", tmp_path / "copy")


def test_one_process_downloads_and_the_others_wait(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.push_directory(directory(tmp_path / "local", **{"a.txt": "1"}), "d")
    original, count = Store.download, []

    def download(self: Store, name: str, local: Path) -> str:
        count.append(name)
        time.sleep(0.3)
        return original(self, name, local)

    monkeypatch.setattr(Store, "download", download)
    threads = [threading.Thread(target=store.pull_directory, args=("d", tmp_path / "copy")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert count == ["d/a.txt"] and (tmp_path / "copy" / "a.txt").read_text() == "1"


# ---- the copy of a run --------------------------------------------------------------------------------------------


def uploader(store: Store, run_dir: Path, warnings: list[str]) -> Uploader:
    run_dir.mkdir(parents=True, exist_ok=True)
    found = Uploader(store, run_dir)
    found.begin(warnings.append)
    return found


def test_what_is_pushed_is_there_in_the_order_given(store: Store, tmp_path: Path) -> None:
    run_dir, warnings = tmp_path / "run", []
    copy = uploader(store, run_dir, warnings)
    directory(run_dir, **{"model/w": "1", "metrics.jsonl": "{}\n", "checkpoints/step-00000002/state.pt": "s"})
    copy.push("model")
    copy.push("metrics.jsonl")
    copy.push("checkpoints/step-00000002")
    # Set aside at once: the run may replace them.
    shutil.rmtree(run_dir / "model")
    shutil.rmtree(run_dir / "checkpoints")
    copy.finish(30)
    copy.stop()
    assert (store / "checkpoints").directories() == ["step-00000002"] and store.read("model/w") == b"1"
    assert store.read("metrics.jsonl") == b"{}\n" and warnings == []
    assert list((run_dir / ".uploads").iterdir()) == []


def test_old_checkpoints_go_and_a_newer_one_takes_the_place_of_one_that_waits(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    original, pushed = Store.push_directory, []

    def push_directory(self: Store, local: Path, name: str) -> None:
        gate.wait(30)
        pushed.append(name)
        original(self, local, name)

    monkeypatch.setattr(Store, "push_directory", push_directory)
    run_dir = tmp_path / "run"
    copy = uploader(store, run_dir, [])
    for step in range(1, 6):
        directory(run_dir, **{f"checkpoints/step-0000000{step}/state.pt": str(step)})
        copy.push(f"checkpoints/step-0000000{step}")
        copy.keep_newest("checkpoints", 1)
        if step == 1:
            time.sleep(0.3)  # until the thread has taken it up
    gate.set()
    copy.finish(30)
    copy.stop()
    assert pushed == ["checkpoints/step-00000001", "checkpoints/step-00000005"]
    assert (store / "checkpoints").directories() == ["step-00000005"]


def test_what_could_not_be_copied_is_told_and_fails_the_end(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload(self: Store, path: Path, name: str) -> None:
        raise StorageError("no rights")

    monkeypatch.setattr(Store, "upload", upload)
    warnings: list[str] = []
    copy = uploader(store, directory(tmp_path / "run", **{"a.json": "1"}), warnings)
    copy.push("a.json")
    with pytest.raises(StorageError, match=r"a\.json could not be copied \(no rights\)"):
        copy.finish(30)
    copy.stop()
    assert len(warnings) == 1 and "no rights" in warnings[0]


def test_waiting_for_copies_has_an_end(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(Store, "upload", lambda self, path, name: gate.wait(30))
    copy = uploader(store, directory(tmp_path / "run", **{"a.json": "1", "b.json": "2"}), [])
    copy.push("a.json")
    copy.push("b.json")
    with pytest.raises(StorageError, match=r"after 0 s these are still not there: .*b\.json"):
        copy.finish(0.2)
    gate.set()
    copy.stop()


# ---- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def config(s3: str, tiny_model: Path, tmp_path: Path) -> Config:
    write_pairs(tmp_path / "sts" / "STSB" / "dev.jsonl")
    return make_config(
        {
            "seed": 3,  # by which it gains, so that a trained encoder is exported
            "encoder": {"name": str(tiny_model), "num_layers": 2},
            "data": {"corpus": str(write_corpus(tmp_path / "corpus.txt"))},
            "clustering": {"num_clusters": 6, "start_cosine": 1.0},
            "train": {"global_batch_size": 32, "shards": 2, "max_steps": 6, "learning_rate": 1e-3},
            "evaluation": {"sts": str(tmp_path / "sts"), "every_steps": 2, "patience": None},
            "runtime": {
                "storage_path": f"{s3}/{tmp_path.name}",
                "local_path": str(tmp_path / "machine-1"),
                "name": "run",
                "log_every_steps": 1,
                "keep": 2,
            },
        }
    )


@pytest.mark.slow
def test_a_run_in_the_store_is_that_of_a_directory(config: Config, tmp_path: Path) -> None:
    result = train(config)
    store = Store(config.runtime.storage_path) / "run"
    assert result["model"] == f"{config.runtime.storage_path}/run/model"
    assert json.loads(read_run_file(config, "result.json") or "") == result
    # One that still waited when the next was written was left out.
    found = (store / "checkpoints").directories()
    assert found[-1] == "step-00000006" and len(found) <= 2
    for name in ("config.yaml", "metrics.jsonl", "environment.json", "clusters.json", "centroids.npy"):
        assert store.read(name) == (run_directory(config) / name).read_bytes(), name

    assert set(store.manifest("tensorboard") or ()) == {
        p.name for p in (run_directory(config) / "tensorboard").iterdir()
    }

    values = config.resolved()
    values["runtime"] |= {"storage_path": str(tmp_path / "plain")}
    plain = train(make_config(values))
    store.pull_directory("model", tmp_path / "pulled")
    for name in ("model.safetensors", "clusterns.json", "tokenizer.json"):
        assert (tmp_path / "pulled" / name).read_bytes() == (Path(plain["model"]) / name).read_bytes(), name
    assert plain["sts_dev"] == result["sts_dev"]
    notes: list[str] = []
    assert train(config, lambda event: notes.append(event.text) if isinstance(event, Note) else None) == result
    assert any("is finished" in note for note in notes)
    with pytest.raises(ConfigError, match=r"/run' holds already with another config: seed was 3 and is now 43"):
        train(make_config({**config.resolved(), "seed": 43}))


@pytest.mark.slow
def test_a_run_in_a_store_in_bad_health_is_that_of_a_directory(config: Config, tmp_path: Path) -> None:
    """Every tenth request fails, is late or breaks off, at moments nobody chose."""
    values = config.resolved()
    plain = train(make_config({**values, "runtime": values["runtime"] | {"storage_path": str(tmp_path / "plain")}}))
    health = BadHealth(0.1, seed := random.SystemRandom().randrange(2**32))
    with s3_server(health):
        result = train(config)
        store = Store(config.runtime.storage_path) / "run"
        assert store.pull_directory("model", tmp_path / "pulled")
        assert store.pull_directory("checkpoints/step-00000006", tmp_path / "checkpoint")
        assert not [name for name in store.names() if name.startswith(".lease")]
    assert sum(health.met.values()) >= 5, (seed, health.met)
    assert [result[key] for key in ("sts_dev", "best_step", "steps")] == [plain["sts_dev"], plain["best_step"], 6], seed
    for name in ("model.safetensors", "clusterns.json", "tokenizer.json"):
        assert (tmp_path / "pulled" / name).read_bytes() == (Path(plain["model"]) / name).read_bytes(), name


def test_training_does_not_wait_for_copies(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing gets to the store before the last step is done; then the end waits for all of it."""
    upload, gate, before = Store.upload, threading.Event(), []

    def wait(self: Store, path: Path, name: str) -> None:
        before.append(name)
        assert gate.wait(60), "the loop waits for its copies"
        upload(self, path, name)

    monkeypatch.setattr(Store, "upload", wait)
    waited: list[float] = []

    def on_event(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == 6:
            waited.append(len(before))
            threading.Timer(1.0, gate.set).start()

    result = train(config, on_event)
    assert waited == [1], "one copy had begun, and none was over"
    assert result["checkpoint_seconds"] > 0.9, "the wait at the end counts"
    assert (Store(config.runtime.storage_path) / "run" / "checkpoints").directories()[-1] == "step-00000006"


@pytest.mark.slow
def test_a_machine_that_is_lost_is_replaced_by_another(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second machine has nothing but the store, and ends with the same bits."""
    values = config.resolved()
    values["runtime"] |= {"storage_path": str(tmp_path / "plain")}
    whole = train(make_config(values))

    store = Store(config.runtime.storage_path) / "run"

    def on_event(event: Event) -> None:
        deadline = time.monotonic() + 30
        while isinstance(event, StepLogged) and event.step == 5 and time.monotonic() < deadline:
            if (store / "checkpoints").directories():
                return
            time.sleep(0.1)
        kill_at(6)(event)

    with pytest.raises(Killed):
        train(config, on_event)
    assert read_run_file(config, "result.json") is None
    shutil.rmtree(tmp_path / "machine-1")
    monkeypatch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path / "machine-2"))
    starts: list[int] = []
    result = train(config, lambda event: starts.append(event.step) if isinstance(event, RunStarted) else None)
    assert starts[0] in (2, 4)
    for key in ("sts_dev", "best_step", "sts_dev_before", "clustering_started_at", "steps"):
        assert result[key] == whole[key], key
    pulled = tmp_path / "pulled"
    store.pull_directory("model", pulled)
    assert (pulled / "model.safetensors").read_bytes() == (Path(whole["model"]) / "model.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (store.read("metrics.jsonl") or b"").decode().splitlines()]
    assert steps == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


@pytest.mark.slow
def test_a_run_that_fails_still_copies_what_it_had(config: Config, tmp_path: Path) -> None:
    def on_event(event: Event) -> None:
        if isinstance(event, StepLogged) and event.step == 5:
            raise ClusterNSError("the loop failed")

    with pytest.raises(ClusterNSError, match="the loop failed"):
        train(config, on_event)
    store = Store(config.runtime.storage_path) / "run"
    assert (store / "checkpoints").directories()[-1] == "step-00000004"


@pytest.mark.slow
def test_a_damaged_checkpoint_in_the_store_is_passed_over(config: Config, tmp_path: Path) -> None:
    train(config)
    store = Store(config.runtime.storage_path) / "run"
    checkpoints = run_directory(config) / "checkpoints"
    (store / "checkpoints").push_directory(checkpoints / "step-00000004", "step-00000004")
    (store / "checkpoints").write("step-00000006/state.pt", b"damaged")
    store.delete("result.json")
    shutil.rmtree(tmp_path / "machine-1")
    starts: list[int] = []
    train(config, lambda event: starts.append(event.step) if isinstance(event, RunStarted) else None)
    assert starts == [4]


def test_what_workers_read_is_staged(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterns_ray.data.prepare import prepare
    from clusterns_ray.data.token_store import TokenStore
    from clusterns_ray.models import resolve as models

    prepared = prepare(config)
    staged = stage(config, prepared)
    monkeypatch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path / "machine-2"))
    monkeypatch.setattr(models, "staged", {})
    tokens_dir, sts_dir = unstage(config, staged)
    assert tokens_dir.is_relative_to(tmp_path / "machine-2")
    assert TokenStore.open(tokens_dir, verify=True).manifest == prepared.manifest
    assert (
        sts_dir is not None
        and Path(sts_dir, "STSB", "dev.jsonl").read_text()
        == (Path(prepared.sts_dir or "") / "STSB" / "dev.jsonl").read_text()
    )
    encoder = models.resolve_model(config.encoder.name)
    assert Path(encoder).is_relative_to(tmp_path / "machine-2") and Path(encoder, "config.json").is_file()
    (Store(config.runtime.storage_path) / "cache").delete_directory(staged["tokens"])
    with pytest.raises(StorageError, match="is gone"):
        unstage(config, staged)


def test_a_store_without_a_bucket_is_refused_before_anything_starts(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    values = config.resolved()
    values["runtime"] |= {"storage_path": "s3://no-such-bucket/x"}
    with pytest.raises(ConfigError, match=r"runtime\.storage_path: s3://no-such-bucket/x"):
        check_storage(make_config(values))


# ---- places -------------------------------------------------------------------------------------------------------


def test_what_holds_a_url() -> None:
    assert split_url("s3://b/p/name") == ("s3://b/p", "name")
    assert split_url("s3://b/name/?x=1") == ("s3://b?x=1", "name")
    assert split_url("s3://b") == ("s3://b", "") and split_url("file:///a/b") == ("file:///a", "b")


def test_small_texts_here_and_there(store: Store, tmp_path: Path) -> None:
    for where in (f"{store.url}/sub/a.txt", tmp_path / "a.txt"):
        assert read_text(where) is None
        write_text(where, "grün")
        assert read_text(where) == "grün"


@pytest.fixture(params=["directory", "store"])
def home(request: pytest.FixtureRequest, store: Store, tmp_path: Path) -> Place:
    """A place of each kind, in the eyes of its writer."""
    if request.param == "directory":
        return place(str(tmp_path / "runs"), "study")
    return place(store.url, "study", str(tmp_path / "here"))


def test_a_place(home: Place) -> None:
    run = home / "trials" / "0001"
    assert run.read("config.yaml") is None
    run.write("config.yaml", "seed: 1\n")
    assert run.read("config.yaml") == "seed: 1\n" and (run.local / "config.yaml").read_text() == "seed: 1\n"
    assert run.address == f"{home.address}/trials/0001" and run.path.endswith("/trials/0001")
    directory(run.local / "model", **{"a.txt": "1", "sub/b.txt": "2"})
    run.publish("model")
    (home.local / "page.html").write_text("page")
    home.publish("page.html")
    assert home.read("page.html") == "page"
    assert (run.fetch("model") / "sub" / "b.txt").read_text() == "2"
    run.remove("model")
    run.remove("model")
    assert not (run.local / "model").exists() and run.read("model/a.txt") is None
    assert run.read("config.yaml") == "seed: 1\n"


def test_another_machine_sees_what_was_published(store: Store, tmp_path: Path) -> None:
    writer = place(store.url, "study", str(tmp_path / "one"))
    directory(writer.local / "model", **{"a.txt": "1"})
    writer.publish("model")
    writer.write("a.json", "{}")
    writer.write("b.json", "{}")
    writer.write("page.html", "page")
    (store / "study").write("deep/c.json", b"{}")
    other = place(store.url, "study", str(tmp_path / "two"))
    assert (other.fetch("model") / "a.txt").read_text() == "1"
    other.fetch_files(leave_out=(".html",))
    assert sorted(path.name for path in other.local.iterdir() if path.is_file() and path.name[0] != ".") == [
        "a.json",
        "b.json",
    ]
    (store / "study").delete("b.json")
    other.fetch_files()
    assert not (other.local / "b.json").exists() and (other.local / "page.html").read_text() == "page"
    assert (other.local / "model" / "a.txt").exists(), "directories stay"
    with pytest.raises(StorageError, match="study/none is not there, or not whole"):
        other.fetch("none")


def test_a_reader_has_a_copy_of_its_own(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERNS_LOCAL_PATH", str(tmp_path))
    writer = place(store.url, "study")
    reader = reading_place(f"{store.url}/study")
    writer.write("study.db", "old")
    reader.fetch_files()
    (writer.local / "study.db").write_text("new, and not yet copied")
    reader.fetch_files()
    assert (writer.local / "study.db").read_text().startswith("new")
    assert (reader.local / "study.db").read_text() == "old" and reader.address == writer.address


def test_a_directory_that_is_replaced_while_it_is_copied_is_read_anew(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = directory(tmp_path / "first", **{"a.txt": "1", "b.txt": "1"})
    second = directory(tmp_path / "second", **{"a.txt": "2", "b.txt": "2"})
    store.push_directory(first, "d")
    original, times = Store.download, 0

    def download(self: Store, name: str, local: Path) -> str:
        nonlocal times
        times += 1
        if times == 2:
            self.push_directory(second, "d")
        return original(self, name, local)

    monkeypatch.setattr(Store, "download", download)
    notes: list[str] = []
    assert store.pull_directory("d", tmp_path / "copy", notes.append)
    assert {path.read_text() for path in (tmp_path / "copy").iterdir()} == {"2"}
    assert notes == [f"Copying {store.address}/d to this machine (0.0 MB)"] * 2

    def replace(self: Store, name: str, local: Path) -> str:
        nonlocal times
        times += 1
        self.push_directory(directory(tmp_path / f"d{times}", **{"a.txt": f"{times}"}), "d")
        return original(self, name, local)

    monkeypatch.setattr(Store, "download", replace)
    with pytest.raises(StorageError, match="was replaced 3 times while it was copied"):
        store.pull_directory("d", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_a_push_that_was_cut_off_has_left_is_removed_too(store: Store) -> None:
    store.write("d/half.bin", b"1")
    store.write("d-other/kept.bin", b"1")
    store.delete_directory("d")
    assert store.names() == ["d-other/kept.bin"]


def test_the_times_of_objects_are_the_stores(store: Store) -> None:
    before = time.time() - 2  # whole seconds
    store.write("a", b"1")
    assert list(store.times()) == ["a"] and before < store.times()["a"] < time.time() + 2
