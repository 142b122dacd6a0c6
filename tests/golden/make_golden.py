"""Write clusterns_float64.json, the golden values of the losses: `python tests/golden/make_golden.py`.

Everything in it comes from reference.py; the package is not involved. The same seed gives the same file; a
number may differ in its last digits on another platform, which is why the tests compare to 1e-10.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import reference
from reference import LossSettings

FILE = Path(__file__).parent / "clusterns_float64.json"
SEED = 20230
MIN_GAP = 1e-3  # from every tie and every kink of the loss

# name: (B, D, K, update rule, rate, settings)
CASES = {
    "authors": (8, 5, 3, "sum", 1e-3, LossSettings(0.05, True, "batch", 0.0, 1e-3, 0.0, 0.3, "all_pairs")),
    "default": (12, 8, 5, "mean", 1e-3, LossSettings(0.05, True, "batch", 0.0, 0.01, 0.0, 0.2, "all_pairs")),
    "alpha": (8, 5, 3, "mean", 0.3, LossSettings(0.05, True, "batch", 0.0, 1.0, 0.25, 0.3, "all_pairs")),
    "weight": (9, 4, 4, "mean", 0.2, LossSettings(0.1, True, "batch", 1.5, 0.5, 0.2, 0.5, "false_negatives")),
    "weight_down": (7, 6, 3, "sum", 0.1, LossSettings(0.2, True, "batch", -2.0, 0.3, 0.0, 0.1, "all_pairs")),
    "own": (6, 4, 2, "mean", 0.5, LossSettings(0.05, True, "own", 0.0, 0.7, 0.0, 0.2, "false_negatives")),
    "own_weight": (
        10,
        5,
        4,
        "replace_sum",
        1.0,
        LossSettings(0.1, True, "own", 0.8, 2.0, 0.3, 0.4, "all_pairs"),
    ),
    "not_own": (
        10,
        6,
        4,
        "mean",
        0.1,
        LossSettings(0.05, True, "not_own_cluster", 0.0, 1.0, 0.2, 0.3, "all_pairs"),
    ),
    "not_own_weight": (
        *(12, 4, 5, "sum", 0.05),
        LossSettings(0.2, True, "not_own_cluster", 1.2, 3.0, 0.0, 0.2, "false_negatives"),
    ),
    "not_own_two_clusters": (
        *(8, 4, 2, "replace_sum", 1.0),
        LossSettings(0.1, True, "not_own_cluster", 0.0, 0.4, 0.1, 0.3, "false_negatives"),
    ),
    "false_negatives_only": (
        *(9, 5, 3, "mean", 1e-3),
        LossSettings(0.05, False, "batch", 0.0, 0.5, 0.2, 0.6, "false_negatives"),
    ),
    "hard_negatives_only": (
        8,
        6,
        4,
        "mean",
        0.4,
        LossSettings(0.05, True, "batch", 0.5, 0.0, 0.0, 0.3, "all_pairs"),
    ),
}


def draw(rng: np.random.Generator, B: int, D: int, K: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two views of rows around K centres. The last centroid points away from the rows: an empty cluster."""
    centres = rng.normal(size=(K, D))
    rows = centres[np.arange(B) % K] + 0.9 * rng.normal(size=(B, D)) + 0.5
    z1 = rows + 0.25 * rng.normal(size=(B, D))
    z2 = rows + 0.25 * rng.normal(size=(B, D))
    centroids = centres + 0.3 * rng.normal(size=(K, D)) + 0.5
    if K > 2:
        centroids[-1] = -z1.mean(axis=0) + 0.3 * rng.normal(size=D)
    return z1.round(6), z2.round(6), centroids.round(6)


def make_case(seed: int, B: int, D: int, K: int, rule: str, rate: float, settings: LossSettings) -> dict:
    for attempt in range(1000):
        rng = np.random.default_rng([seed, attempt])
        z1, z2, centroids = draw(rng, B, D, K)
        nearest, _ = reference.assign(z1, centroids)
        step = reference.reference_step(z1, z2, centroids, rate, rule, settings)
        enough = len(set(nearest)) >= 2 and len(set(step.second)) >= 2
        gaps = (
            reference.smallest_gap(z1, z2, centroids, settings),
            reference.smallest_gap(z1, z2, step.centroids, settings),
        )
        bml_counts = settings.bml_weight == 0 or step.losses.bml - relu_share(step, settings) > 1e-3
        if enough and min(gaps) > MIN_GAP and bml_counts:
            break
    else:
        raise RuntimeError("no example without ties: change the seed")
    first = int(rng.integers(B))
    scores = reference.cosines(z1, z2)
    sums, counts = reference.member_statistics(z1, nearest, K)
    return {
        "settings": asdict(settings),
        "rate": rate,
        "rule": rule,
        "first": first,
        "z1": z1.tolist(),
        "z2": z2.tolist(),
        "centroids": centroids.tolist(),
        "expected": {
            "mean_cosine": float(scores.mean()),
            "chain": reference.farthest_chain(scores, K, first),
            "counts": counts.astype(int).tolist(),
            "sums": sums.tolist(),
            "updated_centroids": step.centroids.tolist(),
            "nearest": step.nearest,
            "second": step.second,
            "plain_info_nce": reference.info_nce(z1, z2, settings.temperature),
            "info_nce": step.losses.info_nce,
            "bml": step.losses.bml,
            "loss": step.losses.loss,
            "grad_z1": step.grad_z1.tolist(),
            "grad_z2": step.grad_z2.tolist(),
        },
    }


def relu_share(step: reference.Step, settings: LossSettings) -> float:
    """The part of an all_pairs margin loss that comes from unmasked pairs, which is a constant."""
    if settings.bml_reduction != "all_pairs":
        return 0.0
    return float((~reference.same_cluster_mask(step.nearest)).mean()) * settings.bml_alpha


def to_json(value) -> str:
    """JSON with 17 significant digits, which read back as the same float64; a list of numbers a line."""
    if isinstance(value, bool | str):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.17g}" if len(repr(value)) > 10 else repr(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",\n".join(f"{json.dumps(key)}: {to_json(item)}" for key, item in value.items()) + "}"
    separator = ",\n" if value and isinstance(value[0], list) else ", "
    return "[" + separator.join(to_json(item) for item in value) + "]"


def make_golden() -> str:
    cases = {name: make_case(SEED + n, *case) for n, (name, case) in enumerate(CASES.items())}
    return to_json({"seed": SEED, "cases": cases}) + "\n"


if __name__ == "__main__":
    FILE.write_text(make_golden())
    print(f"wrote {FILE} ({FILE.stat().st_size} bytes)")
