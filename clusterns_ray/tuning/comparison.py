"""The winner beside what it has to beat: the untrained encoder, and the base configuration trained without a search.

Shape suffixes: N pairs of a dev set.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clusterns_ray.config import Config
from clusterns_ray.evaluation.compare import LEVEL, compare_sts
from clusterns_ray.evaluation.sts import StsTests, cosines_of

SEED = 1111
"""The seed of the resampling: the same models give the same intervals."""

NAMES = {"untrained": "the untrained encoder", "base": "the base configuration"}


def seed_interval(scores: Sequence[float]) -> dict[str, float] | None:
    """The 95 % interval of the mean over seeds, by Student's t; None for fewer than two."""
    from scipy.stats import ttest_1samp

    return _interval(lambda: ttest_1samp(scores, 0), statistics.fmean(scores)) if len(scores) > 1 else None


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Differences of scores by seed, over those that both have: the same seed draws the same batches and masks."""
    return [score - second[seed] for seed, score in first.items() if seed in second]


def difference_over_seeds(first: Sequence[float], second: Sequence[float]) -> dict[str, float] | None:
    """The 95 % interval of the difference of two means over seeds, by Welch's t; None for fewer than two seeds.

    Args:
        second: A single score stands for something that does not depend on seeds.
    """
    if len(second) == 1:
        return seed_interval([score - second[0] for score in first])
    if len(first) < 2 or len(second) < 2:
        return None
    from scipy.stats import ttest_ind

    return _interval(
        lambda: ttest_ind(first, second, equal_var=False), statistics.fmean(first) - statistics.fmean(second)
    )


def _interval(test: Callable[[], Any], estimate: float) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scores that are all equal
        interval = test().confidence_interval(LEVEL)
    low, high = (estimate if math.isnan(bound) else float(bound) for bound in (interval.low, interval.high))
    return {"low": low, "high": high}


def encode_tests(encoder: Any, tests: StsTests) -> dict[str, np.ndarray]:
    """Cosines of the pairs of every subset, computed on a GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        encoder.to("cuda")
    return cosines_of(tests, encoder.encode)


def model_cosines(models: Sequence[Any], tests: StsTests) -> list[dict[str, np.ndarray]]:
    """:func:`encode_tests` of each of the models, one after the other.

    Raises:
        ConfigError: one of them cannot be loaded.
    """
    from clusterns_ray.models.encoder import Encoder

    return [encode_tests(Encoder.load(str(model)), tests) for model in models]


def untrained_cosines(config: Config, tests: StsTests) -> dict[str, np.ndarray]:
    """:func:`encode_tests` of the encoder that a configuration starts from."""
    from clusterns_ray.models.encoder import Encoder

    return encode_tests(Encoder.for_training(config.encoder, config.seed), tests)


def over_pairs(
    tests: StsTests, winner: list[dict[str, np.ndarray]], others: Mapping[str, list[dict[str, np.ndarray]]]
) -> dict[str, dict[str, Any]]:
    """Differences of the winner's mean over seeds to that of each of ``others``: by task, with 95 % intervals of a
    paired bootstrap over the pairs."""
    return {name: compare_sts(tests, winner, models, seed=SEED) for name, models in others.items() if models}


def sentence(name: str, against: Mapping[str, Any]) -> str:
    """One sentence on the winner beside one of :data:`NAMES`."""
    other, score, difference = NAMES[name], against["score"], against["difference"]
    known = {"the dev pairs": against["over_pairs"], "seeds": against["over_seeds"]}
    known = {what: span for what, span in known.items() if span is not None}
    spans = [f"95 % interval over {what} {span['low']:+.2f} to {span['high']:+.2f}" for what, span in known.items()]
    if difference == 0:
        return f"The winner is no better than {other} ({score:.2f})."
    noise = any(
        span is not None and span["low"] <= 0 <= span["high"] for span in (against["over_pairs"], against["over_seeds"])
    )
    text = f"The winner is {abs(difference):.2f} {'above' if difference > 0 else 'BELOW'} {other} ({score:.2f})"
    text += f"; {' and '.join(spans)}" if spans else "; no interval is known"
    return text + (": inside the noise." if noise else ".")


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What has to be said of a study's winner beside the untrained encoder and the base configuration."""
    lines = []
    for name, other in NAMES.items():
        against = (result.get("against") or {}).get(name)
        if against is None:
            lines.append(f"{other[0].upper()}{other[1:]} has no score, so it is unknown whether the winner beats it.")
        else:
            lines.append(sentence(name, against))
    untrained = (result.get("against") or {}).get("untrained")
    if untrained is not None and untrained["difference"] <= 0:
        lines.append(
            "No configuration of this study improves the untrained encoder on this dev set: use that, or other text, "
            "a lower learning rate or more steps."
        )
    if result.get("model_is_trained") is False:
        lines.append("model/ is the untrained encoder itself, as no step of that run was better on the dev set.")
    return lines


def show_value(value: Any) -> str:
    """A value of the configuration as people read it: numbers to three digits, ``3.12e-4``, the rest as YAML has it."""
    if isinstance(value, float) and math.isfinite(value):
        rounded = float(f"{value:.3g}")
        if rounded and not 1e-3 <= abs(rounded) < 1e6:
            digits, _, exponent = f"{rounded:.2e}".partition("e")
            return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
        return f"{rounded:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
