"""experiments/methods.py: what it runs, and the figures of its table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from helpers import write_corpus, write_pairs
from scipy import stats

from clusterns_ray.config import load_config
from clusterns_ray.errors import ClusterNSError, ConfigError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods", EXPERIMENTS / "methods.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def file(tmp_path: Path, tiny_model: Path) -> Path:
    write_pairs(tmp_path / "sts" / "STSB" / "dev.jsonl")
    base = {
        "encoder": {"name": str(tiny_model), "pooling": "cls"},
        "data": {"corpus": str(write_corpus(tmp_path / "corpus.txt"))},
        "clustering": {"num_clusters": 4, "start_cosine": 1.0},
        "train": {"global_batch_size": 32, "shards": 4, "max_steps": 2, "learning_rate": 1e-3, "precision": "fp32"},
        "evaluation": {"sts": str(tmp_path / "sts"), "every_steps": 1},
        "runtime": {"trackers": []},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    content = {
        "base": "base.yaml",
        "set": {"train.weight_decay": 0.01},
        "methods": {
            "SimCSE": {"clustering.num_clusters": 0},
            "from SimCSE": {"encoder.name": "model:clusters"},
            "clusters": {},
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_the_prose_of_docstrings() -> None:
    spec = importlib.util.spec_from_file_location("docstrings", EXPERIMENTS / "docstrings.py")
    assert spec and spec.loader
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    text = """Draw :func:`one <a.b>` of
    ``these`` points.

    not a sentence

    >>> draw(1)  # Code ends here.

    Parameters
    ----------
    x : int

        Indented below. And so on.

    They are *drawn* anew each time.
    """
    kept = ["Draw one of these points.", "Indented below. And so on.", "They are drawn anew each time."]
    assert docstrings.paragraphs(text) == kept
    with pytest.raises(ConfigError, match=r"no_such_package is not an installed package\. Install it, or leave it out"):
        list(docstrings.documents_of("no_such_package"))


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_files_name_possible_runs(
    methods: ModuleType, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLUSTERNS_DATA", str(tmp_path))
    study = methods.Study(path, tmp_path, [], 1)
    assert study.first == "SimCSE"
    configs = {name: load_config(study.base, study.values(name, 3)) for name in study.methods}
    assert configs["SimCSE"].clustering.num_clusters == 0
    assert len({config.fingerprint() for config in configs.values()}) == len(configs), "two methods are the same"
    assert {config.seed for config in configs.values()} == {3}


@pytest.mark.nightly
def test_it_trains_what_is_named_first_and_nothing_twice(
    methods: ModuleType, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = methods.Study(file, tmp_path / "runs", [], 2)
    scores = study.run(list(study.methods), [1, 2], test=None)
    assert list(scores) == ["SimCSE", "from SimCSE", "clusters"]
    for name, found in scores.items():
        for place, seed in enumerate((1, 2)):
            result = json.loads(
                (tmp_path / "runs" / f"{name.replace(' ', '-')}-seed{seed}" / "result.json").read_text()
            )
            assert found["dev"][place] == result["sts_dev_trained"] and found["last"][place] == result["sts_dev_last"]
    config = load_config(tmp_path / "runs" / "from-SimCSE-seed2" / "config.yaml")
    assert config.encoder.name == str(tmp_path / "runs" / "clusters-seed2" / "model")
    assert config.train.weight_decay == 0.01 and config.seed == 2
    printed = capsys.readouterr().err
    assert printed.index("clusters, seed 1") < printed.index("from SimCSE, seed 1") and "6/6" in printed

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    assert len(written) == 6
    assert study.run(list(study.methods), [1, 2], test=None) == scores
    assert {path: path.stat().st_mtime_ns for path in written} == written
    with pytest.raises(ConfigError, match="holds already with another config"):
        methods.Study(file, tmp_path / "runs", ["train.learning_rate=1e-2"], 1).run(["SimCSE"], [1], test=None)


def test_without_the_seven_tests_there_is_no_average(methods: ModuleType, file: Path, tmp_path: Path) -> None:
    study = methods.Study(file, tmp_path / "runs", [], 1)
    path = study.path("SimCSE", 1)
    path.mkdir(parents=True)
    result = {"sts_dev_trained": 61.0, "sts_dev_last": 60.0, "also": {}, "dev": "STRUCTURE/dev"}
    (path / "result.json").write_text(json.dumps(result))
    (path / "evaluation.json").write_text(json.dumps({"extra": {"STSB/dev": 58.0}, "average": None}))
    expected = {"dev": [61.0], "last": [60.0], "STSB/dev": [58.0]}
    assert study.scores("SimCSE", [1], test="DIR") == expected
    (path / "evaluation.json").write_text(json.dumps({"extra": {"STSB/dev": 58.0}, "average": 70.0}))
    assert study.scores("SimCSE", [1], test="DIR") == {**expected, "tests": [70.0]}


@pytest.mark.nightly
def test_a_run_that_fails_is_named_with_its_last_lines(methods: ModuleType, file: Path, tmp_path: Path) -> None:
    study = methods.Study(file, tmp_path / "runs", [], 1)
    (tmp_path / "corpus.txt").unlink()
    with pytest.raises(
        ClusterNSError, match=r"(?s)clusterns train of clusters-seed1 ended with 2.*corpus.txt"
    ) as caught:
        study.run(["clusters"], [1], test=None)
    assert "clusters-seed1.log" in str(caught.value)


def test_what_is_wrong_with_a_file_is_said_before_anything_runs(
    methods: ModuleType, file: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(file.read_text())
    for change, said in (
        ({"methods": {"x": {"loss.temprature": 1}}}, "temprature"),
        ({"methods": {"x": {"encoder.name": "model:y"}}}, "model:y names no method; there are x"),
        ({"seeds": [1]}, "needs base and methods"),
    ):
        file.write_text(yaml.safe_dump({**content, **change}))
        with pytest.raises(ConfigError, match=said):
            methods.Study(file, tmp_path / "runs", [], 1)


def test_a_wrong_request_is_refused(methods: ModuleType, file: Path, tmp_path: Path) -> None:
    study = methods.Study(file, tmp_path / "runs", [], 1)
    assert study.chosen(["clusters"]) == ["SimCSE", "clusters"] and study.chosen(None) == list(study.methods)
    with pytest.raises(ConfigError, match=r"--only 'cluster' names no method; there are SimCSE, from SimCSE, clusters"):
        study.chosen(["clusters", "cluster"])
    with pytest.raises(ConfigError, match=r"nothing.yaml is not a file"):
        methods.Study(tmp_path / "nothing.yaml", tmp_path / "runs", [], 1)


def test_the_table_gives_mean_deviation_and_a_paired_interval(methods: ModuleType) -> None:
    draw = np.random.default_rng(0)
    first = draw.normal(70, 1, 5)
    second = first + draw.normal(0.5, 0.2, 5)
    scores = {name: {"dev": d.tolist(), "last": d.tolist()} for name, d in {"SimCSE": first, "ours": second}.items()}
    text = methods.table(scores)
    interval = stats.ttest_1samp(second - first, 0).confidence_interval(0.95)
    rows = text.splitlines()
    assert f"{first.mean():.2f} +- {first.std(ddof=1):.2f}" in rows[2]
    assert f"{(second - first).mean():+.2f} ({interval.low:+.2f} to {interval.high:+.2f})" in rows[3]
    assert all(row.count("|") == 6 for row in rows), "no Markdown table"
    assert f"{(first - second).mean():+.2f}" in methods.table(scores, against="ours").splitlines()[2]
    first_row = methods.table(scores, {"dev": 60.125, "last": 61.0}).splitlines()[2]
    assert first_row == "| before training | 60.12 |  | 61.00 |  |"


@pytest.mark.nightly
def test_the_seven_tests(
    methods: ModuleType, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("STS12", "STS13", "STS14", "STS15", "STS16", "STSB", "SICKR"):
        write_pairs(tmp_path / "sts" / task / "test.jsonl")
    arguments = [str(file), "--seeds", "1", "--only", "clusters", "--runs", str(tmp_path / "runs")]
    arguments += ["--test", str(tmp_path / "sts"), "--against", "clusters"]
    monkeypatch.setattr(sys, "argv", ["methods.py", *arguments, "--json", str(tmp_path / "scores.json")])
    methods.main()
    written = json.loads((tmp_path / "scores.json").read_text())
    scores, before = written["scores"], written["before"]
    untrained = json.loads((tmp_path / "runs" / "small" / "untrained" / "evaluation.json").read_text())
    assert before["tests"] == untrained["average"] and before["dev"] == untrained["extra"]["STSB/dev"]
    for name in ("SimCSE", "clusters"):
        evaluation = json.loads((tmp_path / "runs" / "small" / f"{name}-seed1" / "evaluation.json").read_text())
        assert scores[name]["tests"] == [evaluation["average"]] and len(evaluation["tasks"]) == 7
    assert "seven tests" in capsys.readouterr().out
