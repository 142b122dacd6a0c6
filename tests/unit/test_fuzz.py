"""A small part of ``tests/fuzz.py``, which is run whole by hand."""

from __future__ import annotations

from fuzz import fuzz


def test_hostile_input_is_refused_well() -> None:
    wrong, counts, _ = fuzz(range(25), seed=2026)
    assert wrong == []
    assert len(counts) >= 6
