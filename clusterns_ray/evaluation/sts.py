"""Semantic textual similarity: Spearman's correlation of cosines with graded pairs.

Layout: ``DIRECTORY/TASK/SUBSET.jsonl``, one ``{"sentence1", "sentence2", "score"}`` a line. Protocol: the score of
a task is taken over all pairs of its subsets together ("all"), as in SimCSE's evaluation; sentences are encoded once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray.data.readers import check_characters, json_rows, read_lines
from clusterns_ray.errors import ConfigError, DataError, NonFiniteError
from clusterns_ray.evaluation.lee import LEE, check_lee, lee_pairs
from clusterns_ray.io.paths import check_regular_file

FIELDS = ("sentence1", "sentence2", "score")
TASKS = {
    "STS12": None,
    "STS13": None,
    "STS14": None,
    "STS15": None,
    "STS16": None,
    "STSB": "test",
    "SICKR": "test",
}
"""The seven tests; None: all subsets of the task."""

Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """The graded pairs of one subset."""

    name: str
    """TASK/SUBSET"""
    sentences1: list[str]
    sentences2: list[str]
    scores: np.ndarray
    """float64 (n)"""

    def __len__(self) -> int:
        return len(self.scores)

    def sentences(self) -> list[str]:
        """Every sentence once, in order of first appearance."""
        return list(dict.fromkeys([*self.sentences1, *self.sentences2]))


def read_pairs(directory: str | Path, name: str) -> Pairs:
    """Read ``TASK/SUBSET``; LEE50/test, where the directory has none, from the package that carries it.

    Raises:
        ConfigError: there is no such file, or it is not a regular one.
        DataError: a line is not a graded pair, all grades are the same, or each sentence is paired with itself.
    """
    directory = Path(directory).expanduser()
    path = directory / f"{name}.jsonl"
    check_pairs_exist(directory, name)
    if not path.exists():
        return Pairs(name, *lee_pairs())
    first, second, scores = [], [], []
    for number, row in json_rows(iter(read_lines(path)), str(path), FIELDS):
        if row is not None:
            pair = graded_pair(row, f"{path}:{number}")
            for column, value in zip((first, second, scores), pair, strict=True):
                column.append(value)
    if len(set(scores)) < 2:
        raise DataError(
            f"{path}: {len(scores)} pairs with {len(set(scores))} different grades; a correlation needs at least two. "
            "Give a set whose scores differ."
        )
    if first == second:
        raise DataError(
            f"{path}: in each of its {len(first)} pairs both sentences are the same, so their cosines are all 1 and "
            "have no correlation with the grades. Give pairs of different sentences."
        )
    return Pairs(name, first, second, np.asarray(scores, dtype=np.float64))


def graded_pair(row: dict[str, Any], where: str) -> tuple[str, str, float]:
    """The sentences and the score of a row.

    Raises:
        DataError: a sentence is not text, or the score is not a finite number (or the text of one).
    """
    first, second, score = (row.get(field) for field in FIELDS)
    # float() would also take true, "1_000" and "nan".
    number = isinstance(score, (int, float)) and not isinstance(score, bool)
    if isinstance(first, str) and isinstance(second, str) and (number or _is_number(score)):
        check_characters(first + second, where)
        with suppress(OverflowError):
            value = float(score)  # pyright: ignore[reportArgumentType]
            if math.isfinite(value):
                return first, second, value
    shown = json.dumps(row, ensure_ascii=True)[:80]
    raise DataError(
        f"{where}: {shown!r} is not a graded pair. Each line must be a JSON object in UTF-8 with the texts "
        '"sentence1" and "sentence2" and the finite number "score".'
    )


def _is_number(score: Any) -> bool:
    return isinstance(score, str) and re.fullmatch(r"\s*[+-]?\d+(\.\d*)?\s*", score, re.ASCII) is not None


def check_pairs_exist(directory: str | Path, name: str) -> None:
    """Refuse a directory without ``TASK/SUBSET.jsonl``, naming what it does hold."""
    path = Path(directory) / f"{name}.jsonl"
    if path.exists():
        check_regular_file("The file", path)
        return
    if name == LEE:
        return check_lee()
    _check_is_directory(Path(directory))
    there = sets_in(directory)
    raise ConfigError(
        f"{str(directory)!r} has no {name}.jsonl. It holds: {', '.join(there) or 'no TASK/SUBSET.jsonl at all'}."
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, in [-1, 1], with average ranks for ties; NaN where a side is constant or has one."""
    ranks_a, ranks_b = _ranks(a), _ranks(b)
    ranks_a, ranks_b = ranks_a - ranks_a.mean(), ranks_b - ranks_b.mean()
    norm = np.sqrt((ranks_a @ ranks_a) * (ranks_b @ ranks_b))
    return float(ranks_a @ ranks_b / norm) if norm else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, the average for ties, NaN for NaN. scipy.stats has it, but is half a second to import."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.where(np.isnan(values), np.nan, (np.cumsum(counts) - (counts - 1) / 2)[inverse])


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation, in [-1, 1]."""
    return float(np.corrcoef(a, b)[0, 1])


def pair_cosines(pairs: Sequence[Pairs], embed: Embed) -> list[np.ndarray]:
    """Cosine of each pair of each subset (float64, to 10 digits); every different sentence is encoded once.

    Rounding makes ties of equal pairs: a sentence with itself is 1 or 1 + 2e-16, which would rank such pairs at random.
    """
    sentences = list(dict.fromkeys(sentence for subset in pairs for sentence in subset.sentences()))
    z_ND = embed(sentences).astype(np.float64)
    z_ND /= np.maximum(np.linalg.norm(z_ND, axis=1, keepdims=True), 1e-8)
    row = {sentence: number for number, sentence in enumerate(sentences)}
    return [
        np.einsum(
            "nd,nd->n", z_ND[[row[s] for s in subset.sentences1]], z_ND[[row[s] for s in subset.sentences2]]
        ).round(10)
        for subset in pairs
    ]


def score_pairs(pairs: Pairs, embed: Embed) -> float:
    """Spearman x 100 of one subset; what selects when it is the dev set."""
    return 100 * spearman(pair_cosines([pairs], embed)[0], pairs.scores)


def task_subsets(directory: str | Path, task: str) -> list[str]:
    """Names TASK/SUBSET of a task's test subsets in a directory; empty where it has none."""
    subset = TASKS[task]
    files = sorted((Path(directory) / task).glob("*.jsonl" if subset is None else f"{subset}.jsonl"))
    return [f"{task}/{file.stem}" for file in files]


@dataclass(frozen=True)
class StsTests:
    """What is to be scored, read and checked."""

    tasks: dict[str, list[Pairs]]
    """the subsets of each of the seven tests that is there"""
    extra: list[Pairs]
    """further subsets, such as the dev set"""

    @property
    def missing(self) -> list[str]:
        return [task for task in TASKS if task not in self.tasks]

    def subsets(self) -> list[Pairs]:
        """All of them, each once."""
        subsets = [pairs for parts in self.tasks.values() for pairs in parts]
        return subsets + [pairs for pairs in self.extra if pairs.name not in {p.name for p in subsets}]


def sets_in(directory: str | Path) -> list[str]:
    """Names TASK/SUBSET of every set in a directory, in sorted order."""
    return sorted(file.relative_to(directory).with_suffix("").as_posix() for file in Path(directory).glob("*/*.jsonl"))


def own_subsets(directory: str | Path) -> list[str]:
    """Names TASK/SUBSET of the sets in a directory that belong to none of the seven tasks, in sorted order."""
    return [name for name in sets_in(directory) if name.split("/")[0] not in TASKS]


def _check_is_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise ConfigError(
            f"STS directory {str(directory)!r} is not there. Give a directory of TASK/SUBSET.jsonl files "
            "(evaluation.sts, or --sts)."
        )


def check_holds_sets(directory: str | Path) -> None:
    """Refuse what is not a directory, or holds neither a test nor a set of another task.

    Raises:
        ConfigError: naming what it does hold, and the remedy.
    """
    directory = Path(directory)
    _check_is_directory(directory)
    if any(task_subsets(directory, task) for task in TASKS) or own_subsets(directory):
        return
    flat, named = sorted(file.name for file in directory.glob("*.jsonl")), sets_in(directory)
    hint = f" It holds {named[0]}: to score that, add --dev {named[0]}." if named else ""
    if flat:
        hint = f" It holds {flat[0]}: move that to {directory / 'MINE' / flat[0]}."
    raise ConfigError(
        f"STS directory {str(directory)!r} holds none of {', '.join(TASKS)}, and no set of your own as "
        f"TASK/SUBSET.jsonl.{hint}"
    )


def read_tests(directory: str | Path, extra: Sequence[str] = ()) -> StsTests:
    """Read the seven tests, as far as they are in ``directory``, every set of other tasks there, and any further
    TASK/SUBSET named in ``extra``.

    Raises:
        ConfigError: nothing is named and it holds no sets, or what is named is not there.
        DataError: a line is not a graded pair.
    """
    directory = Path(directory).expanduser()
    if not extra:
        check_holds_sets(directory)
    subsets = {task: names for task in TASKS if (names := task_subsets(directory, task))}
    tasks = {task: [read_pairs(directory, name) for name in names] for task, names in subsets.items()}
    further = dict.fromkeys([*extra, *own_subsets(directory)])
    return StsTests(tasks, [read_pairs(directory, name) for name in further])


def cosines_of(tests: StsTests, embed: Embed) -> dict[str, np.ndarray]:
    """Cosines of the pairs of every subset, by its name TASK/SUBSET."""
    subsets = tests.subsets()
    return dict(zip([pairs.name for pairs in subsets], pair_cosines(subsets, embed), strict=True))


def score_tests(tests: StsTests, cosines: dict[str, np.ndarray]) -> dict[str, Any]:
    """The figures of STS tests, from the cosines of :func:`cosines_of`.

    Returns:
        ``tasks``: for each task Spearman "all", mean and weighted mean over subsets, Pearson and pairs (x 100);
        ``missing``: tasks that are not there; ``average``: of Spearman "all" over all seven, None unless all are
        there; ``extra``: Spearman of the further subsets.

    Raises:
        NonFiniteError: the correlation of a task is not defined.
    """
    for pairs in tests.extra:
        _check_ranked(pairs.name, cosines[pairs.name])
    tasks = {task: _score_task(parts, [cosines[p.name] for p in parts]) for task, parts in tests.tasks.items()}
    average = None if tests.missing else float(np.mean([task["spearman"] for task in tasks.values()]))
    return {
        "tasks": tasks,
        "missing": tests.missing,
        "average": average,
        "extra": {p.name: 100 * spearman(cosines[p.name], p.scores) for p in tests.extra},
    }


def _check_ranked(name: str, cosines: np.ndarray) -> None:
    if not np.isfinite(cosines).all():
        raise NonFiniteError(f"cosines of {name} are NaN or infinite.")
    if cosines.min() == cosines.max():
        raise NonFiniteError(
            f"the cosines of all {len(cosines):,} pairs of {name} are the same ({cosines[0]:.4f}), so Spearman's "
            "correlation is not defined. Leave that set out, or check the model."
        )


def _score_task(parts: list[Pairs], cosines: list[np.ndarray]) -> dict[str, Any]:
    predicted, gold = np.concatenate(cosines), np.concatenate([p.scores for p in parts])
    _check_ranked(parts[0].name.split("/")[0] if len(parts) > 1 else parts[0].name, predicted)
    each = np.array([spearman(c, p.scores) for c, p in zip(cosines, parts, strict=True)])
    pairs = np.array([len(p) for p in parts])
    return {
        "spearman": 100 * spearman(predicted, gold),
        "spearman_mean": 100 * float(each.mean()),
        "spearman_weighted_mean": 100 * float((each * pairs).sum() / pairs.sum()),
        "pearson": 100 * pearson(predicted, gold),
        "pairs": int(pairs.sum()),
        "subsets": {p.name.split("/")[1]: 100 * float(score) for p, score in zip(parts, each, strict=True)},
    }
