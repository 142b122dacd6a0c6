"""Numbers as people read them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

NONE = "–"


def fixed(value: float | None, digits: int = 2) -> str:
    """``73.18``; a dash for None. With a true minus sign, which is as wide as a plus."""
    return formatted(value, f".{digits}f")


def formatted(value: float | None, spec: str) -> str:
    """A number in the format ``spec``, with a true minus sign; a dash for None."""
    return NONE if value is None else format(value, spec).replace("-", "−")


def signed(value: float) -> str:
    """``+10.15``"""
    return formatted(value, "+.2f")


def count(value: int, one: str) -> str:
    """``1 step``, ``12,000 steps``"""
    return f"{value:,} {one if value == 1 else one + 's'}"


def percent(share: float) -> str:
    """``3.1 %`` of 0.031"""
    return f"{100 * share:.1f}\u00a0%"


def duration(seconds: float | None) -> str:
    """``58 s``, ``12 min 5 s``, ``3 h 20 min``"""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60}\u00a0s"
    return f"{whole // 3600:,}\u00a0h {whole % 3600 // 60}\u00a0min"


def spread(values: Sequence[float | None]) -> str:
    """``73.71 ± 0.23``; of one value the value; a dash if any is missing or there are none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return NONE
    mean = fixed(statistics.fmean(known))
    return mean if len(known) == 1 else f"{mean}\u202f±\u202f{fixed(statistics.stdev(known))}"


def plain_value(value: Any) -> str:
    """A value of the configuration, as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def listing(names: Sequence[str]) -> str:
    """``a, b and c``"""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
