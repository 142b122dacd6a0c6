"""A plan on a terminal: a column a number of workers, and beneath it what it rests on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clusterns_ray.ops.plan.quantities import bytes_text, duration_text

MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW",
    "partial_sums": "partial sums",
    "activations": "activations, scores",
    "keys": "keys of the batch",
    "clusters": "centroids",
    "bank": "bank of the corpus",
    "besides": "process, libraries",
}
SECONDS = {"compute": "computing", "exchange": "waiting for exchanges"}


def render(plan: dict[str, Any]) -> None:
    """Print what ``predict.plan`` returns."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if plan["workers"]:
        table = Table()
        table.add_column("number of workers; for each:", no_wrap=True)
        for column in plan["workers"]:
            table.add_column(str(column["workers"]), justify="right", no_wrap=True)
        for cells in rows(plan["workers"]):
            table.add_row(*cells) if cells else table.add_section()
        console.print(table)
    for text in remarks(plan):
        console.print(text, highlight=False, markup=False)


def rows(columns: list[dict[str, Any]]) -> list[list[str]]:
    """Lines of the table, a label first; an empty one where a section ends."""
    timed = any(column["step_seconds"] is not None for column in columns)

    def line(label: str, text: Callable[[dict[str, Any]], str | None]) -> list[str]:
        return [label, *(text(column) or "-" for column in columns)]

    def shown(value: float | None, text: Callable[[float], str]) -> str:
        return "-" if value is None else text(value)

    lines = [line("sentences of a step", lambda c: f"{c['sentences_per_worker']:,.0f}"), []]
    lines += [
        line(f"  {label}", lambda c, k=key: bytes_text(c["memory"][k]))
        for key, label in MEMORY.items()
        if any(column["memory"][key] for column in columns)
    ]
    lines += [line("memory", lambda c: bytes_text(c["memory"]["total"])), []]
    lines += [
        line(f"  {name}", lambda c, k=name: bytes_text(c["sent_bytes"][k]))
        for name in columns[0]["sent_bytes"]
        if any(column["sent_bytes"][name] for column in columns)
    ]
    lines.append(line("sent in a step", lambda c: bytes_text(sum(c["sent_bytes"].values()))))
    lines += [line("computed a step, GFLOP", lambda c: f"{c['flops'] / 1e9:,.0f}"), []]
    if timed:
        lines += [
            line(f"  {label}", lambda c, k=key: c["seconds"] and duration_text(c["seconds"][k]))
            for key, label in SECONDS.items()
            if any(column["seconds"] and column["seconds"][key] for column in columns)
        ]
        lines += [
            line("a step", lambda c: shown(c["step_seconds"], duration_text)),
            line("sentences a second", lambda c: shown(c["sentences_per_second"], lambda v: f"{v:,.0f}")),
            line("efficiency", lambda c: shown(c["efficiency"], lambda v: f"{100 * v:.0f} %")),
        ]
        if any(column["epoch_hours"] is not None for column in columns):
            lines.append(line("an epoch", lambda c: shown(c["epoch_hours"], lambda v: duration_text(3600 * v))))
        if any(column["epoch_cost"] is not None for column in columns):
            lines.append(line("cost of an epoch", lambda c: shown(c["epoch_cost"], lambda v: f"{v:,.2f}")))
    return lines if lines[-1] else lines[:-1]


def remarks(plan: dict[str, Any]) -> list[str]:
    """What stands beneath the table."""
    lines = [
        f"{workers} workers are impossible, as they do not divide train.shards ({plan['shards']}); the nearest that "
        f"do: {', '.join(map(str, nearest))}."
        for workers, nearest in plan["impossible"].items()
    ]
    lines.append(
        f"{plan['parameters']:,} parameters, {plan['trained_parameters']:,} of them trained. A checkpoint has "
        f"{bytes_text(plan['checkpoint_bytes'])}; the model, written where the dev score is the best so far, "
        f"{bytes_text(plan['model_bytes'])}."
    )
    return [*lines, "Assumed:", *(f"  {text}" for text in plan["assumptions"])]
