"""Quantities as people write them, and as they read them."""

from __future__ import annotations

import re

from clusterns_ray.errors import ConfigError


def read_workers(text: str) -> list[int]:
    """Numbers of workers as the command line takes them, ``1,8,64``: each once, in rising order.

    Raises:
        ConfigError: one of them is no number of workers, or there are too many.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,7}", part) and int(part) for part in parts) or len(parts) > MAX_COUNTS:
        remedy = f"Give up to {MAX_COUNTS} numbers of workers, 1 or more, with commas: 1,8,64."
        raise ConfigError(f"--workers is {text[:100]!r}.", remedy)
    return sorted({int(part) for part in parts})


MAX_COUNTS = 100


UNITS = {
    "--bandwidth": {
        **{f"{prefix}bit/s": scale / 8 for prefix, scale in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))},
        **{f"{prefix}B/s": scale for prefix, scale in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))},
    },
    "--latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
}
EXAMPLES = {"--bandwidth": "25Gbit/s or 3GB/s", "--latency": "50us or 1ms"}


def read_quantity(option: str, text: str) -> float:
    """``25Gbit/s`` in bytes a second, ``50us`` in seconds.

    Raises:
        ConfigError: no number, a unit that is not one of the option's, or not above 0.
    """
    units = {unit.lower(): scale for unit, scale in UNITS[option].items()}
    # Of bits and bytes, the letter's case tells one from the other; elsewhere it does not matter.
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*([A-Za-z/]+)\s*", text)
    unit = match[2].replace("bps", "bit/s").replace("b/s", "bit/s") if match else ""
    if not match or unit.lower() not in units or not 1e-12 <= float(match[1]) <= 1e12:
        remedy = f"Give a number above 0 with its unit, such as {EXAMPLES[option]}."
        raise ConfigError(f"{option} is {text[:100]!r}.", remedy)
    return float(match[1]) * units[unit.lower()]


def bytes_text(count: float) -> str:
    """A number of bytes in the decimal unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.3g} {unit}"


def duration_text(seconds: float) -> str:
    """A time in the unit that makes it easy to read: 90 s rather than 1.5 min."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= (2 if length > 1 else 1) * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.2g} us" if seconds > 0 else "0 s"
