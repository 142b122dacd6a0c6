"""What ``--finalize`` scored, as a table on a terminal, and what the differences mean."""

from __future__ import annotations

from typing import Any

from clusterns_ray.tuning.comparison import NAMES


def render(final: dict[str, Any]) -> None:
    """Print the table of tasks: the winner, what it is compared with, and the differences."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    seeds = ", ".join(map(str, final["seeds"])) or "the trials' own"
    table = Table(title=f"Winner, trial {final['trial']}, seeds {seeds}: Spearman x 100, looked at {final['when']}")
    table.add_column("task")
    table.add_column("winner", justify="right")
    others = [name for name in NAMES if final.get(name)]
    for name in others:
        table.add_column(NAMES[name].removeprefix("the "), justify="right")
        table.add_column("difference (95 % interval)", justify="right")
    rows = [*final["tasks"], *(["average"] if final["average"] else [])]
    for task in rows:
        cells = [_cell(final, task)]
        for name in others:
            cells += [_cell(final[name], task), _difference(final["differences"].get(name, {}).get(task))]
        table.add_row(task, *cells)
    console.print(table)
    for line in sentences(final):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def sentences(final: dict[str, Any]) -> list[str]:
    """What the differences mean, in words."""
    lines = [
        f"{count} of the models scored for the {name} are the untrained encoder, as no step of their runs was "
        "better on the dev set."
        for name, count in (final.get("untrained_models") or {}).items()
        if count
    ]
    for name, other in NAMES.items():
        differences = (final.get("differences") or {}).get(name)
        if not differences:
            lines.append(f"{other[0].upper()}{other[1:]} was not scored, so it is unknown whether the winner beats it.")
        elif "average" in differences or len(differences) == 1:
            task = "average" if "average" in differences else next(iter(differences))
            difference = differences[task]["difference"]
            noise = ", inside the noise of the pairs" if differences[task]["inside_noise"] else ""
            side = "above" if difference > 0 else "BELOW"
            lines.append(f"The winner is {abs(difference):.2f} {side} {other} ({task}){noise}.")
    return lines


def _cell(scores: dict[str, Any], task: str) -> str:
    value = scores["average"] if task == "average" else scores["tasks"].get(task)
    if value is None:
        return "-"
    return f"{value['mean']:.2f}" + ("" if value["deviation"] is None else f" +- {value['deviation']:.2f}")


def _difference(value: dict[str, Any] | None) -> str:
    return "-" if value is None else f"{value['difference']:+.2f} ({value['low']:+.2f} to {value['high']:+.2f})"
