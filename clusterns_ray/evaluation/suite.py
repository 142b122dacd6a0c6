"""``clusterns evaluate``: a model by name to a table and a JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clusterns_ray.errors import ConfigError
from clusterns_ray.evaluation.sts import TASKS, check_pairs_exist, evaluate_sts, task_subsets
from clusterns_ray.models import resolve_model


def check_suite(suite: str, sts: str) -> None:
    """Refuse a request before torch is imported."""
    if suite != "sts":
        raise ConfigError(f"--suite is {suite!r}; it must be sts.")
    if not Path(sts).is_dir():
        raise ConfigError(f"--sts {sts!r} is not a directory. Give one that holds TASK/SUBSET.jsonl files.")


def evaluate_model(
    model: str,
    sts: str | Path,
    *,
    extra: Sequence[str] = (),
    pooling: str | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """STS scores of a model; see ``evaluate_sts`` for what is returned.

    Raises:
        ConfigError: no such model, or no tests in the directory.
        DataError: a line of a test is not a graded pair.
    """
    resolve_model(model)
    for name in extra:
        check_pairs_exist(sts, name)
    if not extra and not any(task_subsets(sts, task) for task in TASKS):
        raise ConfigError(f"--sts {str(sts)!r} holds none of {', '.join(TASKS)}.")

    import torch

    from clusterns_ray.encoder import Encoder

    encoder = Encoder.load(model, pooling=pooling, max_length=max_length)
    if torch.cuda.is_available():
        encoder.to("cuda")
    result = evaluate_sts(sts, encoder.encode, extra)
    return {"model": model, "pooling": encoder.pooling, "max_length": encoder.max_length, **result}


def render_sts(model: str, result: dict[str, Any]) -> None:
    """Print the table of tasks; the average only over all seven."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model}: Spearman x 100 over all pairs of a task")
    for column in ("task", "Spearman", "Pearson", "pairs"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, scores in result["tasks"].items():
        table.add_row(task, f"{scores['spearman']:.2f}", f"{scores['pearson']:.2f}", f"{scores['pairs']:,}")
    for name, score in result["extra"].items():
        table.add_row(name, f"{score:.2f}", "", "")
    console = Console()
    console.print(table)
    if result["average"] is not None:
        console.print(f"Average of the seven tests: {result['average']:.2f}", highlight=False)
    else:
        console.print(
            f"No average: {', '.join(result['missing'])} missing, and the figure is of all seven tests.",
            highlight=False,
        )
