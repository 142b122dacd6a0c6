"""What came of a run, as values and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RunResult(dict[str, Any]):
    """What ``result.json`` of a run holds, by its keys; shown as the lines that ``clusterns train`` ends with."""

    @property
    def model(self) -> str:
        """The exported encoder: a directory, or a URL in an object store."""
        return self["model"]

    @property
    def directory(self) -> str:
        """The run's directory or URL, as :func:`clusterns_ray.write_report` takes it."""
        return self.model.rpartition("/")[0]

    def __repr__(self) -> str:
        return "\n".join([*outcome_lines(self), f"Model: {self.model}"])


def outcome_lines(result: Mapping[str, Any]) -> list[str]:
    """What came of a run, from its ``result.json``."""
    lines: list[str] = []
    if result["stopped_early"]:
        lines.append(f"Training stopped early, after step {result['steps']} of {result['total_steps']}.")
    if result["sts_dev"] is None:
        return lines
    before, after = result["sts_dev_before"], result["sts_dev"]
    if result["best_step"]:
        step = f"at step {result['best_step']} of {result['steps']}"
        lines.append(
            f"{result['dev']} (Spearman x 100): {before:.2f} before, {after:.2f} {step} ({after - before:+.2f})."
        )
        for name, also in result.get("also", {}).items():
            lines.append(
                f"{name}, which selects nothing: {also['before']:.2f} before, {also['after']:.2f} at that step "
                f"({also['after'] - also['before']:+.2f}; 95 % interval {also['low']:+.2f} to {also['high']:+.2f})."
            )
        return lines
    trained = result["sts_dev_trained"]
    lines.append(
        f"{result['dev']} (Spearman x 100): {before:.2f} before, {trained:.2f} at best in {result['steps']} steps "
        f"({trained - before:+.2f})."
    )
    lines.append(
        "No step beat the untrained encoder, so model/ holds that one. Is the text of the dev set's kind? Try a lower "
        "train.learning_rate, or more text."
    )
    return lines
