"""Warnings about a run, in words: pure functions of its record."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from clusterns_ray.evaluation.compare import fall_text
from clusterns_ray.report.page import Warning
from clusterns_ray.report.record import RunRecord, number
from clusterns_ray.report.words import count, fixed, percent, signed

# The bounds of training/collapse_monitor.py and clustering/health.py, which import torch; a test compares them.
SPREAD_COSINE, COLLAPSED_COSINE = 0.8, 0.9
EMPTY_SHARE = 0.3
EMPTY_AFTER = 50

HALF = 0.5
"""A cluster with more of the sentences than this is oversized."""
RISING = 0.1
"""Points of the dev score; a last evaluation that gains less than this has levelled off."""
FALL = 5.0
"""Points of the dev score lost after the best step that are more than noise."""


def advise(run: RunRecord) -> list[Warning]:
    """All warnings, the gravest first, then what to keep in mind."""
    warnings = itertools.chain.from_iterable(check(run) for check in CHECKS)
    return sorted(warnings, key=lambda warning: warning.level != "problem")


def unfinished(run: RunRecord) -> Iterator[Warning]:
    if not run.finished:
        yield Warning(
            f"This run is not finished: it has no result.json. All figures are as of step {run.last_step:,}. "
            "It may be running still; if it was interrupted, the same command resumes it."
        )


def collapse(run: RunRecord) -> Iterator[Warning]:
    """Warn where the embeddings had spread and are all alike again."""
    spread, moments = False, []
    for record in run.steps:
        cosine = number(record, "mean_cosine")
        if cosine is None:
            continue
        if spread and cosine > COLLAPSED_COSINE:
            moments.append((record["step"], cosine))
        spread = spread or cosine <= SPREAD_COSINE
    if moments:
        step, cosine = moments[0]
        yield Warning(
            f"Collapse: from step {step:,} the mean cosine of the batch was back above {COLLAPSED_COSINE} "
            f"({fixed(cosine)}), so all sentences looked alike. Try a lower train.learning_rate or loss.bml_weight; "
            "the model that was exported is the best one on the dev set, not the last."
        )


def dev_collapse(run: RunRecord) -> Iterator[Warning]:
    lost = [step for step, score in run.dev_scores if score is None]
    if lost:
        yield Warning(
            f"The dev score could not be computed at {_steps(lost)}: the embeddings were all alike or not finite."
        )
    elif run.best and run.last is not None and run.best[1] - run.last > FALL:
        yield Warning(
            f"The dev score fell from {fixed(run.best[1])} at step {run.best[0]:,} to {fixed(run.last)} at the end. "
            f"The exported model is {'the untrained encoder' if run.kept_untrained else 'that of the best step'}; "
            "a lower train.learning_rate should keep the rest."
        )


def no_gain(run: RunRecord) -> Iterator[Warning]:
    if run.before is not None and run.best and run.best[1] <= run.before:
        yield Warning(
            f"Training did not improve the dev score: {fixed(run.before)} before, {fixed(run.best[1])} at the best "
            f"step ({run.best[0]:,}). Is the text of the dev set's kind? Try a lower train.learning_rate, or more text."
        )


def never_started(run: RunRecord) -> Iterator[Warning]:
    if not run.num_clusters or run.clustering_started is not None or not run.steps:
        return
    cosines = [cosine for record in run.steps if (cosine := number(record, "mean_cosine")) is not None]
    lowest = f" The lowest that was logged is {fixed(min(cosines))}." if cosines else ""
    yield Warning(
        "Clustering never started, so this was plain SimCSE: the mean cosine of the batch did not fall to "
        f"clustering.start_cosine ({run.config.clustering.start_cosine:g}).{lowest} Raise it, or train longer."
    )


def dead_clusters(run: RunRecord) -> Iterator[Warning]:
    started = run.clustering_started
    if not run.num_clusters or started is None:
        return
    counts = [
        (record["step"], int(empty))
        for record in run.steps
        if record["step"] >= started + EMPTY_AFTER and (empty := number(record, "empty_clusters")) is not None
    ]
    many = [(step, empty) for step, empty in counts if empty >= EMPTY_SHARE * run.num_clusters]
    if not many:
        return
    step, empty = counts[-1]
    if run.of_corpus:
        yield Warning(
            f"Empty clusters: at step {many[-1][0]:,} {many[-1][1]} of {run.num_clusters} held no sentence of the "
            "bank. Use fewer clusters (clustering.num_clusters), or a larger bank (clustering.bank_rows)."
        )
        return
    now = (
        f"{empty} of {run.num_clusters} clusters had no sentence in the last {EMPTY_AFTER} steps"
        if counts[-1] == many[-1]
        else f"at step {many[-1][0]:,} {many[-1][1]} of {run.num_clusters} clusters had had no sentence for "
        f"{EMPTY_AFTER} steps, and at step {step:,} {empty}"
    )
    yield Warning(
        f"Dead clusters: {now}. Use fewer clusters (clustering.num_clusters), or move the centroids faster "
        "(clustering.rate)."
    )


def oversized_cluster(run: RunRecord) -> Iterator[Warning]:
    sizes = run.cluster_sizes()
    if sizes:
        share = max(sizes[-1][1]) / sum(sizes[-1][1])
        where = f"before the evaluation at step {sizes[-1][0]:,}"
    else:
        logged = [record for record in run.steps if number(record, "largest_cluster") is not None]
        if not logged:
            return
        share = logged[-1]["largest_cluster"] / run.config.train.global_batch_size
        where = f"of the batch of step {logged[-1]['step']:,}"
    if share > HALF:
        yield Warning(
            f"One cluster held {percent(share)} of the sentences {where}: nearly all batch mates count as false "
            "negatives, and few negatives remain. Start clustering later (a lower clustering.start_cosine), use more "
            "clusters, or clustering.init: kmeans."
        )


def still_rising(run: RunRecord) -> Iterator[Warning]:
    earlier = [score for _, score in run.dev_scores[:-1] if score is not None]
    if not run.finished or not earlier or run.last is None:
        return
    gain = run.last - max(earlier)
    if gain >= RISING:
        yield Warning(
            f"The dev score was still rising at the end: {signed(gain)} at the last evaluation (step "
            f"{run.dev_scores[-1][0]:,}). Train longer (train.max_steps or train.epochs).",
            level="note",
        )


def skipped_steps(run: RunRecord) -> Iterator[Warning]:
    skipped = [int(value) for record in run.steps if (value := number(record, "skipped_steps")) is not None]
    if skipped and skipped[-1]:
        yield Warning(
            f"{count(skipped[-1], 'step')} moved nothing, as the gradient was not finite. A lower train.learning_rate "
            "or train.precision: fp32 avoids that."
        )


def not_finite(run: RunRecord) -> Iterator[Warning]:
    steps = [record["step"] for record in run.steps if number(record, "loss") is None]
    if steps:
        yield Warning(f"The loss was not finite at {_steps(steps)}.")


def about_dev(run: RunRecord) -> Iterator[Warning]:
    if run.dev is None:
        yield Warning(
            "No dev set was given (evaluation.sts), so it is not known whether the model is better than before; "
            "that of the last step was exported.",
            level="note",
        )
    elif run.config.evaluation.sts == "structure" or run.dev.startswith("STRUCTURE/"):
        yield Warning(
            f"The dev set {run.dev} is graded by where sentences stand in their documents, not by people. A gain on it "
            "shows that the run learned these documents, not that people would find the sentences closer.",
            level="note",
        )


def general_fall(run: RunRecord) -> Iterator[Warning]:
    """Warn of each set that selects nothing whose fall is beyond its bootstrap interval."""
    for name, also in run.also.items():
        if also["high"] < 0:
            yield Warning(fall_text(name, also, "at the best step", run.dev or "the dev set"))


CHECKS: tuple[Callable[[RunRecord], Iterator[Warning]], ...] = (
    unfinished,
    collapse,
    dev_collapse,
    no_gain,
    general_fall,
    never_started,
    dead_clusters,
    oversized_cluster,
    not_finite,
    skipped_steps,
    still_rising,
    about_dev,
)


def _steps(steps: list[Any]) -> str:
    """``step 20``, ``steps 20, 40, 60 and 7 more``"""
    named = ", ".join(f"{step:,}" for step in steps[:3])
    more = f" and {len(steps) - 3} more" if len(steps) > 3 else ""
    return f"step{'s' if len(steps) > 1 else ''} {named}{more}"
