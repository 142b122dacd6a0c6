from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.evaluation import transfer
from clusterns_ray.evaluation.labelled import labelled, read_labelled
from clusterns_ray.evaluation.transfer import TASKS, evaluate_transfer, in_order, read_transfer


def write(path: Path, rows: Sequence[tuple[str, ...]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def separable(count: int, labels: Sequence[str] = "01", offset: int = 0) -> list[tuple[str, str]]:
    """Sentences whose label stands in their second word; as many of each label."""
    return [(labels[n % len(labels)], f"w{n + offset} {labels[n % len(labels)]}") for n in range(count)]


def by_second_word(sentences: Sequence[str]) -> np.ndarray:
    """One direction a second word, and a little of each sentence's own."""
    rows = []
    for sentence in sentences:
        first, second = sentence.split()
        rng = np.random.default_rng(int(first[1:]))
        rows.append(5 * np.eye(6)[int(second)] + 0.1 * rng.normal(size=6))
    return np.array(rows, dtype=np.float32)


def by_chance(sentences: Sequence[str]) -> np.ndarray:
    return np.random.default_rng(len(sentences)).normal(size=(len(sentences), 6)).astype(np.float32)


# ---- reading ------------------------------------------------------------------------------------------------------


def test_read_labelled(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes("\ufeff1\tan été \r\n\n 0 \tb\u2028c\n1\t\n".encode())
    rows = read_labelled(path)
    assert rows.labels.tolist() == ["1", "0", "1"]
    assert rows.sentences == ["an été", "b\u2028c", ""]
    pairs = read_labelled(write(tmp_path / "b.tsv", [("1", "a", "b"), ("0", "c", "d")]), 2)
    assert pairs.columns == [["a", "c"], ["b", "d"]] and len(pairs) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"1\ta\nno tab here\n", r"a.tsv:2: 'no tab here' has 1 columns .* label<TAB>sentence"),
        (b"1\ta\n0\tb\tc\n", r"a.tsv:2: .* has 3 columns"),
        (b"1\ta\n\tb\n", r"a.tsv:2: .* the label ''"),
        (b"1\ta\n0\t\xff\n", r"a.tsv:2: byte 0xff is not UTF-8"),
        (b"1\ta\n0\tb\0\n", r"a.tsv:2: the line holds a NUL"),
        ("1\ta\n0\tb\n".encode("utf-16"), r"a.tsv: the file is UTF-16"),
        (b"1\ta\n1\tb\n", "one label only, '1'"),
        (b"\n", "0 rows"),
    ],
)
def test_what_is_not_labelled_sentences(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(text)
    with pytest.raises(DataError, match=message):
        read_labelled(path)


def test_line_ends_and_quotes_of_labelled_sentences(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'1\t"a\r0\tb"\r\n1\t"c"\n')
    assert read_labelled(path).sentences == ['"a', 'b"', '"c"']


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "MR.tsv")
    for read in (lambda: read_labelled(tmp_path / "MR.tsv"), lambda: read_transfer(tmp_path)):
        with pytest.raises(ConfigError, match="a FIFO"):
            read()


def test_read_transfer(tmp_path: Path) -> None:
    write(tmp_path / "CR.tsv", separable(30))
    write(tmp_path / "TREC-train.tsv", separable(40, "0123"))
    write(tmp_path / "TREC-test.tsv", separable(8, "0123"))
    write(tmp_path / "other.tsv", [("x", "y")])
    tasks = read_transfer(tmp_path)
    assert [(task.name, [len(part) for part in task.parts]) for task in tasks] == [("CR", [30]), ("TREC", [40, 8])]
    assert len(tasks[1].sentences()) == 48


def test_rows_are_ordered_as_senteval_orders_them() -> None:
    rows = [("1", "a b"), ("0", "c"), ("0", "d e"), ("1", "f"), ("0", "g"), ("1", "h  i")]
    ordered = in_order(labelled(rows))
    # by words, then by label; rows that are equal in both keep their order
    assert list(zip(ordered.labels, ordered.sentences)) == [
        ("0", "c"),
        ("0", "g"),
        ("1", "f"),
        ("0", "d e"),
        ("1", "a b"),
        ("1", "h  i"),
    ]
    pairs = in_order(labelled([("0", "a", "b c"), ("1", "a", "b"), ("0", "a", "c")]))
    assert pairs.columns == [["a", "a", "a"], ["c", "b", "b c"]]


def test_read_transfer_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a directory"):
        read_transfer(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds none of MR, CR, SUBJ, MPQA, SST2, TREC, MRPC"):
        read_transfer(tmp_path)
    write(tmp_path / "SST2-train.tsv", separable(30))
    write(tmp_path / "SST2-test.tsv", separable(30))
    with pytest.raises(ConfigError, match=r"holds SST2-train.tsv, but no SST2-dev.tsv, and SST2 is train, dev, test"):
        read_transfer(tmp_path)
    write(tmp_path / "SST2-dev.tsv", [("0", "a 0"), ("7", "b 1")])
    with pytest.raises(DataError, match=r"SST2-dev.tsv: label '7' is not among those of SST2-train.tsv: 0, 1"):
        read_transfer(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    write(tmp_path / "MR.tsv", [*separable(50), ("2", "rare 0")])
    with pytest.raises(DataError, match=r"label '2' has 1 rows, and 10-fold cross-validation needs 12"):
        read_transfer(tmp_path)
    write(tmp_path / "MR.tsv", [(label, text, "third") for label, text in separable(50)])
    with pytest.raises(DataError, match=r"MR.tsv:1: .* has 3 columns"):
        read_transfer(tmp_path)


# ---- the classifier -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.25, 8.0])
def test_a_fit_is_the_minimum_of_the_regularised_loss(strength: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    y = np.where(x @ [1, -2, 0.5] + rng.normal(size=60) > 0.3, "b", "a")
    sign = np.where(y == "b", 1.0, -1.0)

    def loss(weights: np.ndarray) -> float:
        return weights[:3] @ weights[:3] / 2 + strength * np.logaddexp(0, -sign * (x @ weights[:3] + weights[3])).sum()

    best = scipy.optimize.minimize(loss, np.zeros(4), method="Nelder-Mead", options={"maxiter": 9999, "xatol": 1e-7})
    *_, model = transfer._fit(x, y, [strength / 4, strength])
    np.testing.assert_allclose([*model.coef_[0], *model.intercept_], best.x, atol=2e-3)
    alone = transfer._fit(x, y, [strength])[0]  # where it starts does not matter
    np.testing.assert_allclose(model.coef_, alone.coef_, atol=1e-3)
    assert np.abs(model.coef_).max() > 0.3


def test_more_labels_go_by_one_softmax() -> None:
    x, y = np.eye(3).repeat(8, axis=0), np.array(["a", "b", "c"]).repeat(8)
    weak, strong = transfer._fit(x, y, [0.01, 100.0])
    assert (strong.predict(x) == y).all()
    np.testing.assert_allclose(weak.predict_proba(x).sum(axis=1), 1)
    odds = np.log(strong.predict_proba(x))
    scores = x @ strong.coef_.T + strong.intercept_
    np.testing.assert_allclose(odds[:, :1] - odds, scores[:, :1] - scores, atol=1e-9)


def test_the_folds_choose_the_strength() -> None:
    """Noise in 30 directions: a weak regularisation fits it, and does worse on rows that are held out."""
    rng = np.random.default_rng(4)
    y = np.array(["a", "b"] * 40)
    x = rng.normal(size=(80, 31))
    x[:, 0] = np.where(y == "a", 1, -1) + rng.normal(size=80)
    search = [0.003, 100.0]
    strength, accuracy = transfer._choose(x, y, search, seed=1)
    by_hand = []
    for value in search:
        right = []
        for train, test in transfer._folds(x, y, 1):
            assert set(train) | set(test) == set(range(80)) and len(test) == 8
            assert Counter(y[test]) == {"a": 4, "b": 4}
            right.append((transfer._fit(x[train], y[train], [value])[0].predict(x[test]) == y[test]).mean())
        by_hand.append(100 * np.mean(right))
    assert by_hand[0] > by_hand[1] + 3, "the strengths make no difference"
    assert (strength, accuracy) == (0.003, pytest.approx(by_hand[0], abs=0.01))


def test_the_strongest_of_equals_is_taken() -> None:
    x, y = np.array([[1.0], [-1.0]] * 20), np.array(["a", "b"] * 20)
    assert transfer._choose(x, y, [0.5, 1.0, 2.0], seed=1) == (0.5, 100.0)


def test_the_published_protocol() -> None:
    assert (transfer.FOLDS, transfer.SEED) == (10, 1111)
    assert transfer.SEARCH == [0.25, 0.5, 1, 2, 4, 8]
    assert transfer.SEARCH_TRAIN_TEST == [0.5, 1, 2, 4, 8, 16, 32]


# ---- the tasks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def few_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three, and a short search: with ten the time goes into calls of scikit-learn."""
    monkeypatch.setattr(transfer, "FOLDS", 3)
    monkeypatch.setattr(transfer, "SEARCH", [0.5, 8.0])


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven; in MRPC a pair is a paraphrase if the second words agree."""
    path = tmp_path_factory.mktemp("transfer")
    for name in ("MR", "CR", "SUBJ", "MPQA"):
        write(path / f"{name}.tsv", separable(30))
    for part in ("train", "dev", "test"):
        write(path / f"SST2-{part}.tsv", separable(24, offset=99))
    for part, count in (("train", 40), ("test", 12)):
        write(path / f"TREC-{part}.tsv", separable(count, "0123", offset=count))
        rows = [(str(int(n % 2 == n // 2 % 2)), f"w{n} {n % 2}", f"w{n + 50} {n // 2 % 2}") for n in range(count)]
        write(path / f"MRPC-{part}.tsv", rows)
    return path


@pytest.mark.usefixtures("few_folds")
def test_separable_labels_are_told_apart(seven: Path) -> None:
    notes: list[str] = []
    found, right = evaluate_transfer(read_transfer(seven), by_second_word, note=notes.append)
    assert list(found["tasks"]) == list(TASKS) and found["missing"] == []
    assert {name: task["accuracy"] for name, task in found["tasks"].items()} == dict.fromkeys(TASKS, 100)
    assert found["average"] == 100 and found["tasks"]["MRPC"]["f1"] == 100
    assert [task["rows"] for task in found["tasks"].values()] == [30, 30, 30, 30, 24, 12, 12]
    assert all(values.all() and len(values) == found["tasks"][name]["rows"] for name, values in right.items())
    assert len(found["tasks"]["MR"]["C"]) == 3 and found["tasks"]["TREC"]["C"] == 0.5
    assert (found["folds"], found["seed"]) == (3, 1111)
    assert "TREC: fold 3 of 3" in notes and "MR: fold 3 of 3" in notes


@pytest.mark.usefixtures("few_folds")
def test_embeddings_without_the_label_are_at_chance_and_the_seed_decides(tmp_path: Path) -> None:
    write(tmp_path / "MR.tsv", separable(100))
    tasks = read_transfer(tmp_path)
    runs = [evaluate_transfer(tasks, by_chance, seed=seed) for seed in (1, 1, 2)]
    accuracies = [found["tasks"]["MR"]["accuracy"] for found, _ in runs]
    assert all(30 < accuracy < 70 for accuracy in accuracies)
    assert runs[0][0] == runs[1][0] and (runs[0][1]["MR"] == runs[1][1]["MR"]).all()
    assert (runs[0][1]["MR"] != runs[2][1]["MR"]).any()
    found = runs[0][0]
    assert found["average"] is None and found["missing"] == [name for name in TASKS if name != "MR"]
    assert found["tasks"]["MR"]["accuracy"] == pytest.approx(100 * runs[0][1]["MR"].mean())


def test_the_test_rows_alone_are_scored(tmp_path: Path) -> None:
    """Half of the test labels are wrong, all of the training ones right."""
    write(tmp_path / "TREC-train.tsv", separable(40))
    rows = [(str(1 - int(label)) if n < 10 else label, text) for n, (label, text) in enumerate(separable(20))]
    write(tmp_path / "TREC-test.tsv", rows)
    found, right = evaluate_transfer(read_transfer(tmp_path), by_second_word)
    assert found["tasks"]["TREC"]["accuracy"] == 50 and found["tasks"]["TREC"]["dev_accuracy"] == 100
    assert right["TREC"].sum() == 10


def test_the_development_rows_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    table: dict[str, np.ndarray] = {}
    for part, count in (("train", 40), ("dev", 200), ("test", 200)):
        rows = [(str(n % 2), f"{part}{n}") for n in range(count)]
        write(tmp_path / f"SST2-{part}.tsv", rows)
        for label, name in rows:
            table[name] = np.concatenate([[2 * int(label) - 1 + rng.normal()], rng.normal(size=30)])
    monkeypatch.setattr(transfer, "SEARCH", [0.003, 100.0])
    embed: Callable[[Sequence[str]], np.ndarray] = lambda names: np.stack([table[name] for name in names])  # noqa: E731
    task = evaluate_transfer(read_transfer(tmp_path), embed)[0]["tasks"]["SST2"]
    assert task["C"] == 0.003 and 70 < task["accuracy"] < 95 and task["accuracy"] != task["dev_accuracy"]
    x, y = (np.stack([table[f"{part}{n}"] for n in range(count)]) for part, count in (("train", 40), ("test", 200)))
    model = transfer._fit(x, np.array(["0", "1"] * 20), [0.003])[0]
    assert task["accuracy"] == pytest.approx(100 * (model.predict(y) == np.array(["0", "1"] * 100)).mean())
