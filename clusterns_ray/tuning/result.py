"""What came of a study, as values and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clusterns_ray.tuning.comparison import sentences, show_value
from clusterns_ray.tuning.objectives import UNITS, show_cost


class StudyResult(dict[str, Any]):
    """What ``result.json`` of a study holds, by its keys; shown as the lines that ``clusterns tune`` ends with."""

    @property
    def model(self) -> str:
        """The winner's encoder: a directory, or a URL in an object store."""
        return self["model"]

    @property
    def best(self) -> str:
        """The winner's configuration, a YAML file."""
        return self["best"]

    @property
    def directory(self) -> str:
        """The study's directory or URL, as :func:`clusterns_ray.write_report` takes it."""
        return self.model.rpartition("/")[0]

    def __repr__(self) -> str:
        return "\n".join([*study_lines(self), f"Model: {self.model}"])


def study_lines(result: Mapping[str, Any]) -> list[str]:
    """What came out, in lines."""
    winner, seeds = result["winner"], result["seeds"]
    values = ", ".join(f"{key} {show_value(value)}" for key, value in winner["values"].items() if key != "seed")
    lines = []
    if seeds:
        for candidate in result["candidates"]:
            spread = "" if candidate["deviation"] is None else f" +- {candidate['deviation']:.2f}"
            of = f"{len(candidate['scores'])} of {len(seeds)} seeds"
            mark = "  <- best mean" if candidate["trial"] == winner["trial"] else ""
            lines.append(
                f"trial {candidate['trial']}: {candidate['mean']:.2f}{spread} over {of} "
                f"({'with the first' if result.get('raced') else 'one run chose it with'} "
                f"{candidate['trial_score']:.2f}){mark}"
            )
    span = (result.get("intervals") or {}).get("winner")
    over = (
        f" (95 % interval over {len(winner['scores'])} seeds {span['low']:.2f} to {span['high']:.2f})" if span else ""
    )
    lines.append(f"Winner by {result['dev']}: trial {winner['trial']}, {values}. It has {winner['mean']:.2f}{over}.")
    lines += sentences(result)
    for minimize in UNITS:
        if points := [point for point in result.get("front", ()) if minimize in point]:
            shown = [f"trial {p['trial']} {p['score']:.2f} with {show_cost(minimize, p[minimize])}" for p in points]
            lines.append(f"Pareto front of score and {minimize}: {', '.join(shown)}.")
    if not seeds:
        lines.append("One run each, without confirmation.seeds: the difference to the next may be chance.")
    elif len(winner["scores"]) < 2:
        lines.append("The winner has the score of one seed alone: the difference to the next may be chance.")
    elif result["not_told_apart"]:
        alike = ", ".join(str(number) for number in result["not_told_apart"])
        lines.append(f"Not to be told apart from it with these seeds (paired t-test, 5%): trial {alike}.")
    return [*lines, *result.get("previous", ())]
