"""Read the directory of a run: all that a report knows of it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clusterns_ray.config import Config, parse_saved_config
from clusterns_ray.errors import ConfigError, DataError
from clusterns_ray.io.yaml_text import read_yaml_text

COLLAPSED = -100.0
"""The dev score that training notes for embeddings whose correlation is not defined."""


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote. Older and unfinished runs lack some of it: None, or empty."""

    path: Path
    """the directory that was read"""
    config: Config
    steps: Sequence[dict[str, Any]]
    """of metrics.jsonl: those with `loss`"""
    evaluations: Sequence[dict[str, Any]]
    """of metrics.jsonl: those with `sts_dev`, the one of step 0 included"""
    result: dict[str, Any] | None = None
    """result.json; None while the run is unfinished"""
    environment: dict[str, Any] | None = None
    clusters: dict[str, Any] | None = None
    sts: dict[str, Any] | None = None
    """evaluation.json, where it holds scores of the STS tests"""
    address: str | None = None
    """where the directory came from, if it is a copy"""

    @property
    def name(self) -> str:
        return self.config.runtime.name

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def num_clusters(self) -> int:
        return self.config.clustering.num_clusters

    @property
    def of_corpus(self) -> bool:
        """Whether the clusters are of the whole corpus, not of the batches."""
        return self.config.clustering.scope == "corpus"

    @property
    def dev(self) -> str | None:
        """TASK/SUBSET that selected, or None."""
        return self.config.evaluation.dev if self.config.evaluation.sts else None

    @property
    def last_step(self) -> int:
        if self.result:
            return int(self.result["steps"])
        return max((record["step"] for record in [*self.steps, *self.evaluations]), default=0)

    @property
    def method(self) -> str:
        if not self.num_clusters:
            return "SimCSE (no clusters)"
        return f"ClusterNS, K = {self.num_clusters}" + (" over the corpus" if self.of_corpus else "")

    @cached_property
    def dev_scores(self) -> list[tuple[int, float | None]]:
        """Step and Spearman x 100 of each evaluation; None where the embeddings had collapsed."""
        return [(record["step"], _score(record.get("sts_dev"))) for record in self.evaluations]

    @property
    def before(self) -> float | None:
        return next((score for step, score in self.dev_scores if step == 0), None)

    @cached_property
    def best(self) -> tuple[int, float] | None:
        """The step after 0 with the best score, and that score; see :attr:`kept_untrained` for what was exported."""
        trained = [(step, score) for step, score in self.dev_scores if step > 0 and score is not None]
        return max(trained, key=lambda pair: pair[1], default=None)

    @property
    def kept_untrained(self) -> bool:
        """Whether no step beat the untrained encoder, so that this one was exported."""
        return self.result is not None and self.result.get("best_step") == 0

    @cached_property
    def also(self) -> dict[str, dict[str, float]]:
        """Scores before and after, and the interval of their difference, of each set that selected nothing."""
        also = (self.result or {}).get("also")
        keys = ("before", "after", "low", "high")
        return {
            name: scores
            for name, scores in (also.items() if isinstance(also, dict) else ())
            if isinstance(scores, dict) and all(number(scores, key) is not None for key in keys)
        }

    @property
    def last(self) -> float | None:
        """Score of the last evaluation after a step."""
        return self.dev_scores[-1][1] if self.dev_scores and self.dev_scores[-1][0] > 0 else None

    @cached_property
    def clustering_started(self) -> int | None:
        """The step that made the centroids; for an unfinished run, the first logged one with clusters."""
        if self.result and self.result.get("clustering_started_at") is not None:
            return int(self.result["clustering_started_at"])
        return next((record["step"] for record in self.steps if "clusters_used" in record), None)

    @property
    def sts_average(self) -> float | None:
        """The average of all seven tests, or None."""
        return number(self.sts or {}, "average")

    def curve(self, key: str, of_evaluations: bool = False) -> tuple[list[int], list[float | None]]:
        """Steps and values of the records that have the key."""
        records = [record for record in (self.evaluations if of_evaluations else self.steps) if key in record]
        return [record["step"] for record in records], [number(record, key) for record in records]

    def cluster_sizes(self) -> list[tuple[int, list[int]]]:
        """Step of an evaluation, and the sentences that each cluster got since the one before."""
        logged = [(record["step"], record.get("cluster_sizes")) for record in self.evaluations]
        return [(step, sizes) for step, sizes in logged if isinstance(sizes, list) and sum(sizes)]


def number(record: dict[str, Any], key: str) -> float | None:
    """A finite number, or None."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def read_run(directory: str | Path, address: str | None = None) -> RunRecord:
    """Read ``STORAGE_PATH/NAME``.

    Args:
        address: where the directory came from, if it is a copy.

    Raises:
        ConfigError: it is not the directory of a run.
        DataError: a file in it is damaged.
    """
    path = Path(directory)
    check_is_run(path)
    records = read_records(path / "metrics.jsonl")
    return RunRecord(
        path=path,
        config=parse_saved_config(read_yaml_text("The run's", path / "config.yaml"), str(path / "config.yaml")),
        steps=[record for record in records if "loss" in record],
        evaluations=[record for record in records if "sts_dev" in record],
        result=read_object(path / "result.json", ("steps",)),
        environment=read_object(path / "environment.json"),
        clusters=read_object(path / "clusters.json", ("clusters",)),
        sts=_sts_scores(read_object(path / "evaluation.json")),
        address=address,
    )


def check_is_run(path: Path) -> None:
    """Refuse what is not a run, naming the runs that it holds."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise ConfigError(f"Run {str(path)!r} {what}. Give the directory of a run, STORAGE_PATH/NAME.")
    if (path / "config.yaml").is_file():
        return
    raise not_a_run(str(path), sorted(child.name for child in path.iterdir() if (child / "config.yaml").is_file()))


def not_a_run(where: str, runs: Sequence[str]) -> ConfigError:
    """The refusal of a directory or URL without a config.yaml, with the ``runs`` that it holds as the remedy."""
    more = ", ..." if len(runs) > 5 else ""
    remedy = f"It holds the runs {', '.join(runs[:5])}{more}: name those." if runs else "Give STORAGE_PATH/NAME of one."
    return ConfigError(f"{where!r} is not a run: it has no config.yaml.", remedy)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a ``metrics.jsonl``, ``[]`` if there is none; a last line that a crash cut off is left out.

    Raises:
        DataError: another line is not an object with a step.
    """
    if not path.exists():
        return []
    lines = _read_text(path).split("\n")
    records = []
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=lambda name: None)
            if not isinstance(record, dict) or isinstance(record["step"], bool) or not isinstance(record["step"], int):
                raise ValueError
        except (ValueError, KeyError):
            if at == len(lines):
                break
            raise DataError(
                f"{path}:{at}: {line[:80]!r} is not a JSON object with a step, as every line of a run's metrics is. "
                "Remove the line, or restore the file from a copy."
            ) from None
        records.append(record)
    return records


def _sts_scores(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    """The scores of an evaluation; of several models those of the first, which is the one that was asked about."""
    models = (evaluation or {}).get("models")
    if isinstance(models, list) and models and isinstance(models[0], dict):
        evaluation = models[0]
    return evaluation if evaluation is not None and isinstance(evaluation.get("tasks"), dict) else None


def read_object(path: Path, keys: Sequence[str] = ()) -> dict[str, Any] | None:
    """A JSON object that a run, or an evaluation of it, wrote; None where there is none."""
    if not path.exists():
        return None
    try:
        value = json.loads(_read_text(path), parse_constant=lambda name: None)
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not JSON ({error}). Restore it from a copy, or remove it.") from None
    if not isinstance(value, dict) or not all(key in value for key in keys):
        raise DataError(
            f"{str(path)!r} is not a JSON object{' with ' + ', '.join(keys) if keys else ''}, as a run writes it. "
            "Restore it from a copy, or remove it."
        )
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 ({error}). Restore it from a copy.") from None
    except OSError as error:
        raise ConfigError(f"Cannot read {str(path)!r}: {error.strerror}. Make it readable.") from None


def _score(value: Any) -> float | None:
    return None if not isinstance(value, (int, float)) or value <= COLLAPSED else value
