from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats

from clusterns_ray.evaluation import compare
from clusterns_ray.evaluation.compare import (
    CountedRanks,
    compare_right,
    compare_sts,
    interval,
    paired_bootstrap,
    spearman_difference,
)
from clusterns_ray.evaluation.sts import TASKS, Pairs, StsTests


def draws(sizes: Sequence[int], resamples: int, seed: int = 0) -> np.ndarray:
    return compare._draw(np.random.default_rng(seed), sizes, resamples)


# ---- counting instead of copying ----------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_ranks_from_counts_are_the_ranks_of_the_copies(digits: int) -> None:
    rng = np.random.default_rng(digits)
    values = rng.normal(size=40).round(digits)
    counts_RN = draws([40], 20)
    assert counts_RN.min() == 0 and counts_RN.max() > 2
    for counts_N, ranks_N in zip(counts_RN.astype(int), CountedRanks(values)(counts_RN)):
        copied = scipy.stats.rankdata(np.repeat(values, counts_N))
        np.testing.assert_allclose(np.repeat(ranks_N, counts_N), copied - copied.mean(), atol=1e-9)


def test_differences_are_those_of_scipy_on_the_copies() -> None:
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 6, 50).astype(float)
    a, b = (gold + rng.normal(size=50)).round(1), gold + 3 * rng.normal(size=50)
    counts_RN = draws([50], 30)
    found = spearman_difference(a, b, gold)(counts_RN)
    for counts_N, difference in zip(counts_RN.astype(int), found):
        rows = np.repeat(np.arange(50), counts_N)
        first, second = (scipy.stats.spearmanr(side[rows], gold[rows]).statistic for side in (a, b))
        assert difference == pytest.approx(100 * (first - second), abs=1e-9)
    assert found.std() > 1


def test_a_resample_with_one_grade_has_no_correlation() -> None:
    difference = spearman_difference(np.array([1.0, 2, 3]), np.array([3.0, 1, 2]), np.array([1.0, 1, 5]))
    assert difference(np.array([[2.0, 1, 0]])).tolist() == [0]


def test_items_are_drawn_within_their_subset() -> None:
    counts_RN = draws([3, 7, 1], 400)
    np.testing.assert_array_equal(counts_RN[:, :3].sum(axis=1), 3)
    np.testing.assert_array_equal(counts_RN[:, 3:10].sum(axis=1), 7)
    np.testing.assert_array_equal(counts_RN[:, 10], 1)
    np.testing.assert_allclose(counts_RN.mean(axis=0), 1, atol=0.2)


def test_the_seed_decides_and_blocks_do_not_lose_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [paired_bootstrap(lambda c: c[:, 0], [9], seed=seed, resamples=50) for seed in (1, 1, 2)]
    assert (runs[0] == runs[1]).all() and (runs[0] != runs[2]).any()
    monkeypatch.setattr(compare, "BLOCK", 40)
    asked: list[int] = []
    found = paired_bootstrap(lambda c: asked.append(len(c)) or c[:, 0], [9], seed=1, resamples=50)
    assert len(found) == 50 and max(asked) == 4


# ---- intervals ----------------------------------------------------------------------------------------------------


def test_interval() -> None:
    found = interval(2.0, np.arange(1001) / 100 - 3)
    assert found == {"difference": 2, "low": pytest.approx(-2.75), "high": pytest.approx(6.75), "inside_noise": True}
    assert interval(2.0, np.arange(1001) / 100 + 0.1)["inside_noise"] is False


def rank_correlation(pearson: float) -> float:
    """Spearman's of two normal variables with this Pearson correlation (Pearson 1907)."""
    return 6 / np.pi * np.arcsin(pearson / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("of_a", "of_b"), [(0.7, 0.7), (0.8, 0.6)])
def test_intervals_cover_the_true_difference(of_a: float, of_b: float) -> None:
    """Both models see the same sentences, so their errors are related, too."""
    rng = np.random.default_rng(5)
    true = 100 * (rank_correlation(of_a) - rank_correlation(of_b))
    covered = found_different = 0
    for number in range(200):
        gold, common, *own = rng.normal(size=(4, 150))
        sides = [
            r * gold + np.sqrt(1 - r**2) * (np.sqrt(0.5) * common + np.sqrt(0.5) * noise)
            for r, noise in zip((of_a, of_b), own)
        ]
        difference = spearman_difference(sides[0], sides[1], gold)
        found = interval(
            difference(np.ones((1, 150)))[0], paired_bootstrap(difference, [150], seed=number, resamples=300)
        )
        covered += found["low"] <= true <= found["high"]
        found_different += not found["inside_noise"]
    assert 0.90 <= covered / 200 <= 0.98
    assert (found_different / 200 <= 0.10) if true == 0 else (found_different / 200 > 0.8)


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(1)
    gold = rng.normal(size=300)
    a = gold + rng.normal(size=300)
    b = a + 0.1 * rng.normal(size=300)  # errs where a errs

    def width(first: np.ndarray, second: np.ndarray) -> float:
        found = interval(0, paired_bootstrap(spearman_difference(first, second, gold), [300], seed=0, resamples=400))
        return found["high"] - found["low"]

    assert width(a, b) < 0.3 * width(a, gold + rng.normal(size=300))


# ---- tests with subsets, and seeds --------------------------------------------------------------------------------


def graded(name: str, count: int, seed: int) -> Pairs:
    texts = [f"{name} {n}" for n in range(count)]
    return Pairs(name, texts, texts, np.random.default_rng(seed).integers(0, 6, count).astype(float))


def seven_tests() -> StsTests:
    tasks = {task: [graded(f"{task}/{part}", 30, 7 * n + len(part)) for part in "ab"] for n, task in enumerate(TASKS)}
    return StsTests(tasks, [graded("STSB/dev", 25, 9)])


def cosines(tests: StsTests, noise: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {pairs.name: pairs.scores + noise * rng.normal(size=len(pairs)) for pairs in tests.subsets()}


def test_compare_sts() -> None:
    tests = seven_tests()
    good, bad = cosines(tests, 1, 0), cosines(tests, 4, 1)
    found = compare_sts(tests, good, bad, seed=3, resamples=200)
    assert list(found) == [*TASKS, "STSB/dev", "average"]
    gold = np.concatenate([pairs.scores for pairs in tests.tasks["STS13"]])
    sides = [np.concatenate([side["STS13/a"], side["STS13/b"]]) for side in (good, bad)]
    first, second = (scipy.stats.spearmanr(side, gold).statistic for side in sides)
    assert found["STS13"]["difference"] == pytest.approx(100 * (first - second))
    assert found["average"]["difference"] == pytest.approx(np.mean([found[task]["difference"] for task in TASKS]))
    widths = [found[task]["high"] - found[task]["low"] for task in TASKS]
    assert found["average"]["high"] - found["average"]["low"] < 0.6 * min(widths), "seven tests tell more than one"
    assert found["average"]["low"] > 0 and not found["average"]["inside_noise"]
    assert found == compare_sts(tests, good, bad, seed=3, resamples=200)
    turned = compare_sts(tests, bad, good, seed=3, resamples=200)
    assert turned["average"]["high"] == pytest.approx(-found["average"]["low"])


def test_a_model_against_itself_is_inside_the_noise() -> None:
    tests = seven_tests()
    same = cosines(tests, 2, 0)
    found = compare_sts(tests, same, same, seed=0, resamples=50)
    assert all(part == {"difference": 0, "low": 0, "high": 0, "inside_noise": True} for part in found.values())


def test_there_is_no_average_of_some() -> None:
    tests = seven_tests()
    some = StsTests({task: tests.tasks[task] for task in ("STS12", "SICKR")}, [])
    found = compare_sts(some, cosines(some, 1, 0), cosines(some, 2, 1), seed=0, resamples=20)
    assert list(found) == ["STS12", "SICKR"]


def test_compare_right_is_mcnemars_spread() -> None:
    """The variance of a paired difference of accuracies is that of its items' differences: -1, 0 or 1."""
    rng = np.random.default_rng(0)
    a = {"x": rng.random(2000) < 0.8}
    b = {"x": a["x"] ^ (rng.random(2000) < 0.1)}
    found = compare_right(a, b, seed=0)["x"]
    each = 100 * (a["x"].astype(float) - b["x"])
    error = each.std() / np.sqrt(2000)
    assert found["difference"] == pytest.approx(each.mean())
    assert found["low"] == pytest.approx(each.mean() - 1.96 * error, abs=0.15 * error)
    assert found["high"] == pytest.approx(each.mean() + 1.96 * error, abs=0.15 * error)


def test_seeds_add_to_the_spread() -> None:
    """Equal models whose accuracy depends on the seed of K-means alone."""
    level = np.array([0.5, 0.9] * 5)[:, None]
    rows = np.linspace(0, 1, 1000)[None, :]
    a, b = {"x": rows < level}, {"x": (rows < level)[::-1]}
    found = compare_right(a, b, seed=1)["x"]
    error = 100 * np.sqrt(2 * 0.2**2 / 10)
    assert found["difference"] == pytest.approx(0) and found["inside_noise"]
    assert found["high"] == pytest.approx(1.96 * error, rel=0.1)


def test_average_of_accuracies() -> None:
    rng = np.random.default_rng(2)
    a = {name: rng.random(100) < 0.9 for name in "xyz"}
    b = {name: rng.random(100) < 0.5 for name in "xyz"}
    found = compare_right(a, b, seed=0, average=True)
    assert list(found) == ["x", "y", "z", "average"]
    assert found["average"]["difference"] == pytest.approx(np.mean([found[name]["difference"] for name in "xyz"]))
    assert found["average"]["low"] > 20 and "average" not in compare_right(a, b, seed=0)
