"""Transfer: how well a logistic regression on frozen embeddings predicts labels.

The protocol is SentEval's (Conneau and Kiela, LREC 2018; ``senteval/tools/validation.py`` with scikit-learn and
``kfold`` 10): rows are ordered by their number of words, then by label; folds are stratified and drawn from the seed
(1111 there); the regularisation with the best accuracy on held-out folds, to 0.01, is taken, the strongest of equals.

* MR, CR, SUBJ, MPQA: ten folds; within the nine that train, ten folds choose C from 2^-2 to 2^3.
* TREC, MRPC: ten folds of the training rows choose C from 2^-1 to 2^5; scored on the test rows.
* SST2: the development rows choose C from 2^-2 to 2^3; scored on the test rows.

A pair of sentences (u, v) is given as abs(u - v) and u * v. Each problem is solved to convergence, with an intercept
that is not regularised; TREC's six labels by one softmax. Figures that SentEval gives with Adam or with a multilayer
perceptron, as SimCSE's do, are near these and not the same. Accuracy is over all tested rows.

Shape suffixes: N rows, F features, C regularisation strengths, K folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.evaluation.labelled import Labelled, read_labelled
from clusterns_ray.evaluation.sts import Embed
from clusterns_ray.io.events import OnNote

TASKS: dict[str, tuple[str, ...]] = {
    "MR": (),
    "CR": (),
    "SUBJ": (),
    "MPQA": (),
    "SST2": ("train", "dev", "test"),
    "TREC": ("train", "test"),
    "MRPC": ("train", "test"),
}
"""The seven tasks and the parts they come in; none: one file, in cross-validation."""

PAIRS = {"MRPC"}
SEED = 1111
FOLDS = 10
SEARCH = [2.0**power for power in range(-2, 4)]
SEARCH_TRAIN_TEST = [2.0**power for power in range(-1, 6)]


@dataclass(frozen=True)
class Task:
    """One task, read and in the order in which it is folded."""

    name: str
    parts: list[Labelled]
    """all rows, or train and test, or train, dev and test"""

    def sentences(self) -> list[str]:
        return [sentence for part in self.parts for column in part.columns for sentence in column]


def read_transfer(directory: str | Path) -> list[Task]:
    """The tasks that are in ``directory``: ``MR.tsv``, ``TREC-train.tsv``, ``TREC-test.tsv`` and so on.

    Lines are ``label<TAB>sentence``, of MRPC ``label<TAB>sentence1<TAB>sentence2`` with label 1 for a paraphrase.

    Raises:
        ConfigError: none of the tasks is there, or a part of one is missing.
        DataError: a line or the labels of a task cannot be used.
    """
    check_transfer_directory(directory)
    tasks = []
    for name, parts in TASKS.items():
        paths = [Path(directory) / f"{name}{'-' * bool(part)}{part}.tsv" for part in parts or ("",)]
        there = [path for path in paths if path.exists()]
        if not there:
            continue
        if len(there) < len(paths):
            missing = next(path for path in paths if path not in there)
            raise ConfigError(
                f"--transfer {str(directory)!r} holds {there[0].name}, but no {missing.name}, and {name} is "
                f"{', '.join(parts)}. Add it, or take the others away."
            )
        task = Task(name, [in_order(read_labelled(path, 2 if name in PAIRS else 1)) for path in paths])
        _check(task, paths)
        tasks.append(task)
    if not tasks:
        raise ConfigError(
            f"--transfer {str(directory)!r} holds none of {', '.join(TASKS)}. Give a directory of MR.tsv, "
            "TREC-train.tsv and so on, each line label<TAB>sentence."
        )
    return tasks


def check_transfer_directory(directory: str | Path) -> None:
    """Refuse what is not a directory, before anything is read."""
    if not Path(directory).is_dir():
        raise ConfigError(
            f"--transfer {str(directory)!r} is not a directory. Give one that holds MR.tsv, TREC-train.tsv and so on, "
            "each line label<TAB>sentence."
        )


def in_order(rows: Labelled) -> Labelled:
    """Rows by number of words (of the first sentence, then of the second), then by label, as SentEval has them."""
    words = [[len(sentence.split()) for sentence in column] for column in rows.columns]
    order = sorted(range(len(rows)), key=lambda n: (*(column[n] for column in words), rows.labels[n]))
    return Labelled(rows.labels[order], [[column[n] for n in order] for column in rows.columns])


def _check(task: Task, paths: Sequence[Path]) -> None:
    first = task.parts[0]
    labels, counts = np.unique(first.labels, return_counts=True)
    # A label must be in every training fold, of folds within folds too.
    least = {1: FOLDS + 2, 2: FOLDS, 3: 1}[len(task.parts)]
    if counts.min() < least:
        raise DataError(
            f"{paths[0]}: label {str(labels[counts.argmin()])!r} has {counts.min()} rows, and {FOLDS}-fold "
            f"cross-validation needs {least} of each. Give more, or leave that label out."
        )
    for part, path in zip(task.parts[1:], paths[1:]):
        unknown = sorted(set(part.labels) - set(labels))
        if unknown:
            raise DataError(
                f"{path}: label {str(unknown[0])!r} is not among those of {paths[0].name}: {', '.join(labels[:9])}. "
                "Correct it, or leave its rows out."
            )


def evaluate_transfer(
    tasks: Sequence[Task], embed: Embed, *, seed: int = SEED, note: OnNote = lambda text: None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Accuracies of the tasks.

    Args:
        seed: of the folds.
        note: called at the beginning of every task and after each of its folds.

    Returns:
        ``tasks``: for each ``accuracy``, ``dev_accuracy`` (x 100), ``C`` (one, or one a fold), ``rows`` that were
        tested, of MRPC ``f1``; ``missing``; ``average`` over all seven, None unless all are there; ``folds``, ``seed``.
        And of each task which of its test rows were right: bool (rows).
    """
    scores, right = {}, {}
    for task in tasks:
        rows = len(task.parts[0])
        note(f"{task.name}: logistic regression on {rows:,} rows")
        features = [_features(part, embed) for part in task.parts]
        labels = [part.labels for part in task.parts]
        solve = {1: _nested, 2: _train_test, 3: _train_dev_test}[len(task.parts)]
        strengths, dev, predicted = solve(features, labels, seed, lambda text, name=task.name: note(f"{name}: {text}"))
        right[task.name] = predicted == labels[-1]
        scores[task.name] = {
            "accuracy": 100 * float(right[task.name].mean()),
            "dev_accuracy": dev,
            "C": strengths,
            "rows": len(predicted),
        }
        if task.name in PAIRS:
            from sklearn.metrics import f1_score

            of_paraphrases = f1_score(labels[-1], predicted, pos_label="1", zero_division=0)  # pyright: ignore[reportArgumentType]
            scores[task.name]["f1"] = 100 * float(of_paraphrases)
    missing = [name for name in TASKS if name not in scores]
    average = None if missing else float(np.mean([score["accuracy"] for score in scores.values()]))
    return {"tasks": scores, "missing": missing, "average": average, "folds": FOLDS, "seed": seed}, right


def _features(rows: Labelled, embed: Embed) -> np.ndarray:
    """Float64 (N, F): embeddings as they are, or abs(u - v) and u * v of pairs."""
    first, *second = (np.asarray(embed(column), dtype=np.float64) for column in rows.columns)
    return first if not second else np.concatenate([np.abs(first - second[0]), first * second[0]], axis=1)


Solved = tuple[Any, float, np.ndarray]
"""Strength or strengths that were chosen, accuracy that chose them (x 100), predicted labels of the test rows."""


def _nested(x: list[np.ndarray], y: list[np.ndarray], seed: int, note: OnNote) -> Solved:
    (x_NF,), (y_N,) = x, y
    predicted, strengths, dev = np.empty_like(y_N), [], []
    for number, (train, test) in enumerate(_folds(x_NF, y_N, seed), start=1):
        strength, accuracy = _choose(x_NF[train], y_N[train], SEARCH, seed)
        predicted[test] = _fit(x_NF[train], y_N[train], [strength])[0].predict(x_NF[test])
        strengths.append(strength)
        dev.append(accuracy)
        note(f"fold {number} of {FOLDS}")
    return strengths, float(np.mean(dev)), predicted


def _train_test(x: list[np.ndarray], y: list[np.ndarray], seed: int, note: OnNote) -> Solved:
    strength, accuracy = _choose(x[0], y[0], SEARCH_TRAIN_TEST, seed, note)
    return strength, accuracy, _fit(x[0], y[0], [strength])[0].predict(x[1])


def _train_dev_test(x: list[np.ndarray], y: list[np.ndarray], seed: int, note: OnNote) -> Solved:
    models = _fit(x[0], y[0], SEARCH)
    scores_C = [round(100 * float((model.predict(x[1]) == y[1]).mean()), 2) for model in models]
    best = int(np.argmax(scores_C))
    return SEARCH[best], scores_C[best], models[best].predict(x[2])


def _choose(
    x_NF: np.ndarray,
    y_N: np.ndarray,
    search: list[float],
    seed: int,
    note: OnNote = lambda text: None,
) -> tuple[float, float]:
    """The strength with the best mean accuracy over held-out folds, and that accuracy (x 100, to 0.01)."""
    accuracies_KC = []
    for number, (train, held_out) in enumerate(_folds(x_NF, y_N, seed), start=1):
        models = _fit(x_NF[train], y_N[train], search)
        accuracies_KC.append([float((model.predict(x_NF[held_out]) == y_N[held_out]).mean()) for model in models])
        note(f"fold {number} of {FOLDS}")
    scores_C = (100 * np.mean(accuracies_KC, axis=0)).round(2)
    return search[int(scores_C.argmax())], float(scores_C.max())


def _folds(x_NF: np.ndarray, y_N: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedKFold

    return list(StratifiedKFold(n_splits=FOLDS, shuffle=True, random_state=seed).split(x_NF, y_N))


def _fit(x_NF: np.ndarray, y_N: np.ndarray, search: Sequence[float]) -> list[Any]:
    """A converged model for each strength, from the strongest regularisation to the weakest; each starts where the one
    before ended, which saves two thirds of the time.

    Two labels go by Newton's method, which takes a few steps whatever the scale of the embeddings; its matrix grows
    with the square of the labels, so more labels go by L-BFGS.
    """
    from copy import deepcopy

    from sklearn.linear_model import LogisticRegression

    two = len(np.unique(y_N)) == 2
    model = LogisticRegression(
        solver="newton-cholesky" if two else "lbfgs", tol=1e-4 if two else 1e-6, max_iter=1000, warm_start=True
    )
    models = []
    for strength in search:
        model.C = strength
        models.append(deepcopy(model.fit(x_NF, y_N)))
    return models
