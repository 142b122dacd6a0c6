"""Files of a study that are damaged, locked or of another study: a clear refusal, and never a wrong winner."""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clusterns_ray.config import Config, dump_config, make_config
from clusterns_ray.console.study import read_result
from clusterns_ray.errors import ClusterNSError, ConfigError, DataError, DiskError, StorageError
from clusterns_ray.io.files import disk_fault, storage_error, with_checksum
from clusterns_ray.io.object_store import Place
from clusterns_ray.tuning import study_file
from clusterns_ray.tuning.comparison import difference_over_seeds, seed_interval, sentences, show_value
from clusterns_ray.tuning.outcome import read_final
from clusterns_ray.tuning.runs import is_run_of, run_score
from clusterns_ray.tuning.selection import check_result
from clusterns_ray.tuning.study import dump_study, load_study, read_study_file, saved_study
from clusterns_ray.tuning.study_file import file_error, open_storage, read_optuna_study, readable_file_errors
from clusterns_ray.tuning.sweep import full_disk


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A directory with the empty study ``s``."""
    import optuna

    optuna.create_study(study_name="s", storage=open_storage(tmp_path, "sqlite", writing=True))
    return tmp_path


@pytest.mark.parametrize("kind", ["empty", "zeros", "text", "truncated", "no tables"])
def test_a_damaged_database_is_refused_with_a_remedy_that_works(database: Path, kind: str) -> None:
    path = database / "study.db"
    whole = path.read_bytes()
    damage = {"empty": b"", "zeros": bytes(len(whole)), "text": b"not a database" * 99, "truncated": whole[:20000]}
    path.write_bytes(damage.get(kind, b""))
    if kind == "no tables":
        sqlite3.connect(path).execute("create table x (y)")
    with pytest.raises(ClusterNSError, match=r"is damaged .* move it away, and `clusterns tune` begins") as error:
        read_optuna_study(database)
    assert "\n" not in str(error.value)
    with pytest.raises(ClusterNSError, match="is damaged"), readable_file_errors(path):
        open_storage(database, "sqlite", writing=True)
    path.rename(database / "aside")
    open_storage(database, "sqlite", writing=True)


def test_a_locked_database_is_told(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_file, "LOOK_WAIT_S", 0.1)
    other = sqlite3.connect(database / "study.db", isolation_level=None)
    other.execute("begin exclusive")
    with pytest.raises(ClusterNSError, match="is locked by another process"):
        read_optuna_study(database)
    other.execute("rollback")
    assert read_optuna_study(database, "s").study_name == "s"


def test_a_database_of_another_study_is_refused(database: Path) -> None:
    with pytest.raises(ConfigError, match="holds the study 's', not 'other'"):
        read_optuna_study(database, "other")


@pytest.mark.parametrize("content", [bytes(200), b'{"a": 1}\nnonsense', b"nonsense"])
def test_a_damaged_journal_is_not_emptied(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.journal").write_bytes(content)
    with pytest.raises(ClusterNSError, match="is damaged"), readable_file_errors(tmp_path / "study.journal"):
        open_storage(tmp_path, "journal", writing=True)
    assert (tmp_path / "study.journal").read_bytes() == content


def config(seed: int = 1) -> Config:
    return make_config({"seed": seed, "data": {"corpus": "demo"}, "evaluation": {"sts": "structure"}})


def test_a_run_counts_only_where_it_is_whole_and_of_that_configuration(tmp_path: Path) -> None:
    run, mine = Place(tmp_path), config()
    assert is_run_of(run, mine) and run_score(run, mine) is None
    (tmp_path / "config.yaml").write_text(dump_config(mine))
    result = with_checksum({"sts_dev_trained": 71.5, "fingerprint": mine.fingerprint()})
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert run_score(run, mine) == 71.5 and run_score(run, config(2)) is None and not is_run_of(run, config(2))
    for damaged in (json.dumps({**result, "sts_dev_trained": 99.0}).encode(), b"", bytes(40), b"\xff\xfe{", b"[]"):
        (tmp_path / "result.json").write_bytes(damaged)
        assert run_score(run, mine) is None
    (tmp_path / "config.yaml").write_bytes(bytes(30))
    assert not is_run_of(run, mine)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "null", '{"winner": 3}', "\0\0", '{"dev": 1, "winner": {}}'])
def test_a_damaged_result_is_refused(text: str | None) -> None:
    with pytest.raises(DataError, match=r"is damaged .*which writes it anew"):
        check_result(text, "result.json")


@pytest.mark.parametrize(("name", "read"), [("result.json", read_result), ("final.json", read_final)])
def test_a_file_of_a_study_that_is_not_text_is_damaged(tmp_path: Path, name: str, read: Callable[..., Any]) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match=f"{name}' is damaged"):
        read(SimpleNamespace(home=Place(tmp_path)))


@pytest.mark.parametrize("content", [b"", bytes(9), b"\xff\xfe", b"a: [", b"- 1", b"name: x\n"])
def test_a_damaged_study_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(DataError, match=r"study\.yaml' is damaged"):
        read_study_file(tmp_path / "study.yaml")
    with pytest.raises(DataError, match=r"study\.yaml' is damaged"):
        saved_study(tmp_path, str(tmp_path))


def test_a_saved_study_of_other_values_or_another_name_is_refused(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    study = load_study(write_study())
    directory = tmp_path / study.config.name
    directory.mkdir()
    (directory / "study.yaml").write_text(dump_study(study))
    assert saved_study(directory, str(directory)).space.parameters == study.space.parameters
    with pytest.raises(ConfigError, match=r"holds the study 'tiny'\. Give the directory the name 'tiny'\."):
        saved_study(directory.rename(tmp_path / "renamed"), str(tmp_path / "renamed"))
    changed = dump_study(study).replace("concurrent_trials: 1", "concurrent_trials: 0")
    (tmp_path / "renamed/study.yaml").write_text(changed)
    with pytest.raises(DataError, match=r"study\.yaml' is damaged: concurrent_trials is 0") as error:
        saved_study(tmp_path / "renamed", str(tmp_path / "renamed"))
    assert "\n" not in str(error.value)


# ---- disks ----------------------------------------------------------------------------------------------------------


def test_what_a_full_disk_looks_like() -> None:
    for number in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT):
        try:
            try:
                raise OSError(number, "x", "file")
            except OSError as error:
                raise RuntimeError("wrapped") from error
        except RuntimeError as error:
            assert disk_fault(error) is not None
    assert disk_fault(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")) is not None
    assert disk_fault(sqlite3.OperationalError("database or disk is full")) is not None
    assert disk_fault(FileNotFoundError(errno.ENOENT, "x")) is None and disk_fault(ValueError("NaN")) is None
    assert isinstance(file_error(Path("study.db"), sqlite3.OperationalError("database or disk is full")), DiskError)
    kinds = [type(storage_error(OSError(number, "x"), Path("a"), "")) for number in (errno.ENOSPC, errno.EACCES)]
    assert kinds == [DiskError, StorageError]


def test_a_disk_is_tried_with_real_bytes(tmp_path: Path) -> None:
    assert full_disk(tmp_path) is None and list(tmp_path.iterdir()) == []
    assert "cannot be written" in str(full_disk(tmp_path / "none"))


# ---- what is said ---------------------------------------------------------------------------------------------------


def beside(difference: float, **more: Any) -> dict[str, Any]:
    against = {"score": 70.0, "difference": difference, "over_pairs": None, "over_seeds": None, **more}
    return {"against": {"untrained": against, "base": None}}


def test_a_winner_below_the_untrained_encoder_is_told_in_words() -> None:
    lines = sentences(beside(-1.25, over_pairs={"low": -2.0, "high": -0.5}))
    assert lines[0] == (
        "The winner is 1.25 BELOW the untrained encoder (70.00); 95 % interval over the dev pairs -2.00 to -0.50."
    )
    assert lines[1].startswith("The base configuration has no score") and "No configuration of this study" in lines[2]
    better = sentences(beside(0.2, over_seeds={"low": -0.1, "high": 0.5}))
    assert better[0].endswith("inside the noise.") and len(better) == 2


def test_intervals_over_seeds() -> None:
    assert seed_interval([70.0]) is None and difference_over_seeds([70.0], [71.0, 72.0]) is None
    found = seed_interval([70.0, 72.0])
    assert found is not None and found["low"] == pytest.approx(71 - 12.706, abs=1e-3)
    against = difference_over_seeds([70.0, 72.0], [70.0])
    assert against is not None and against["high"] == pytest.approx(1 + 12.706, abs=1e-3)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00031249999, "3.12e-4"), (1e-5, "1e-5"), (0.05, "0.05"), (0.30000000000000004, "0.3"), (0.0, "0"),
     (-2e-7, "-2e-7"), (1234.5, "1230"), (16, "16"), (True, "true"), (None, "null"), ("cls", "cls")],
)  # fmt: skip
def test_numbers_are_rounded(value: Any, text: str) -> None:
    assert show_value(value) == text
