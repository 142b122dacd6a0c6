"""The sections of a run that are curves over its steps. Each is None where the run has nothing of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from clusterns_ray.report.advice import COLLAPSED_COSINE
from clusterns_ray.report.charts import Line, line_chart, size_bands, sorted_sizes, spans_decades
from clusterns_ray.report.page import Cell, Figure, Section, Table
from clusterns_ray.report.record import RunRecord, number
from clusterns_ray.report.words import count, fixed, formatted

SHOWN_EVALUATIONS = 200


def dev_section(run: RunRecord) -> Section | None:
    if not run.dev_scores or run.dev is None:
        return None
    steps, scores = zip(*run.dev_scores, strict=True)
    best = (*run.best, f"best {fixed(run.best[1])}") if run.best else None
    levels = [(run.before, "before training")] if run.before is not None else []
    chart = line_chart(
        [Line(run.dev, steps, scores, points=True)],
        y="Spearman × 100",
        mark=best,
        levels=levels,
        start=run.clustering_started,
    )
    exported = (
        "No step beat the untrained encoder, so that one was exported."
        if run.kept_untrained
        else "The best step on this set is the one that was exported, so its score flatters the model a little; the "
        "STS tests do not."
    )
    return Section(
        "Dev score",
        words=[f"Spearman's correlation between cosines and the grades of {run.dev}, × 100. {exported}"],
        figures=[Figure(f"Score on {run.dev}", chart, wide=True)],
        tables=[evaluation_table(run)],
    )


EVALUATION_COLUMNS = (
    ("sts_dev", "dev score", ".2f"),
    ("embedding_cosine", "mean cosine", ".3f"),
    ("alignment", "alignment", ".3f"),
    ("uniformity", "uniformity", ".3f"),
    ("effective_rank", "effective rank", ".1f"),
    ("centroid_drift", "centroid drift", ".2g"),
)


def evaluation_table(run: RunRecord) -> Table:
    """Every evaluation, or an even choice of them with the best one."""
    also = [(f"also {name}", name, ".2f") for name in run.config.evaluation.also]
    columns = [*EVALUATION_COLUMNS[:1], *also, *EVALUATION_COLUMNS[1:]]
    columns = [column for column in columns if any(column[0] in record for record in run.evaluations)]
    every = -(-len(run.evaluations) // SHOWN_EVALUATIONS)
    best_step = run.best[0] if run.best else None
    shown = [record for at, record in enumerate(run.evaluations) if at % every == 0 or record["step"] == best_step]
    scores = dict(run.dev_scores)
    rows: list[list[Cell]] = []
    for record in shown:
        values = [scores[record["step"]] if key == "sts_dev" else number(record, key) for key, _, _ in columns]
        rows.append([f"{record['step']:,}", *(formatted(value, spec) for value, (_, _, spec) in zip(values, columns))])
    return Table(
        caption="All evaluations as figures" if every == 1 else f"One in {every} evaluations as figures",
        columns=["step", *(label for _, label, _ in columns)],
        text_columns=(),
        rows=rows,
        strong_rows=[at for at, record in enumerate(shown) if record["step"] == best_step],
        folded=True,
    )


def _curve_figure(
    run: RunRecord,
    key: str,
    title: str,
    y: str,
    words: str = "",
    *,
    evaluated: bool = False,
    hue: str = "blue",
    scale: float = 1,
    **options: Any,
) -> list[Figure]:
    """The figure of one key over the run's steps; none where no record has a value of it.

    Args:
        evaluated: the key is one of the evaluations, not of the training steps.
        scale: by which values are multiplied.
        options: of :func:`line_chart`.
    """
    steps, values = run.curve(key, evaluated)
    if all(value is None for value in values):
        return []
    scaled = [None if value is None else scale * value for value in values]
    chart = line_chart([Line(title, steps, scaled, hue, points=evaluated)], y=y, **{"shown": ".3g", **options})
    return [Figure(title, chart, words)]


def loss_section(run: RunRecord) -> Section | None:
    if not run.steps:
        return None
    settings, start = run.config.loss, run.clustering_started
    terms = ["InfoNCE", f"{settings.bml_weight:g} times the Bidirectional Margin Loss (BML)"]
    if settings.teacher is not None:
        terms.append(f"{settings.distillation_weight:g} times the distance from the teacher's ranking")
    if settings.mlm_weight:
        terms.append(f"{settings.mlm_weight:g} times masked language modelling")
    (steps, loss), (_, info_nce) = run.curve("loss"), run.curve("info_nce")
    lines = [Line("loss", steps, loss, width=5, opacity=0.4), Line("InfoNCE", steps, info_nce, "orange", width=1.5)]
    figures = [
        Figure(
            "Loss",
            line_chart(lines, y="nats", shown=".3g", may_be_logarithmic=True, start=start),
            f"What is minimised: {' plus '.join(terms)}."
            + (" Logarithmic." if spans_decades([value for value in [*loss, *info_nce] if value is not None]) else "")
            + (" Hard negatives come in when clustering starts." if run.num_clusters else ""),
        )
    ]
    if run.num_clusters and settings.bml_weight:
        figures += _curve_figure(
            run,
            "bml",
            "Bidirectional Margin Loss",
            "BML, unweighted",
            "How far the cosines of false negatives lie outside their margins; 0 until clustering starts.",
            hue="green",
            from_zero=True,
            start=start,
        )
    figures += _curve_figure(
        run,
        "distillation",
        "Distance from the teacher",
        "nats, unweighted",
        f"How far the ranking of the batch is from that of {settings.teacher}; 0 where both agree.",
        from_zero=True,
    )
    figures += _curve_figure(run, "learning_rate", "Learning rate", "learning rate", from_zero=True)
    clipped = _reached(run.curve("grad_norm")[1], run.config.train.max_grad_norm, "clipped above")
    figures += _curve_figure(run, "grad_norm", "Gradient norm", "L2 norm", from_zero=True, levels=clipped)
    return Section("Loss", figures=figures)


def _reached(values: Sequence[float | None], bound: float, text: str) -> list[tuple[float, str]]:
    """A level to be drawn, where the values come near it."""
    return [(bound, text)] if any(value is not None and value > 0.5 * bound for value in values) else []


def cluster_section(run: RunRecord) -> Section | None:
    if not run.num_clusters or run.clustering_started is None:
        return None
    start, k = run.clustering_started, run.num_clusters
    lines = [Line("used in the batch", *run.curve("clusters_used"))]
    if run.curve("empty_clusters")[0]:
        empty = "empty" if run.of_corpus else "empty for 50 steps"
        lines.append(Line(empty, *run.curve("empty_clusters"), hue="orange", dash="dash"))
    counts = line_chart(lines, y="clusters", shown=",.0f", from_zero=True, levels=[(k, f"K = {k}")], start=start)
    means_empty = (
        "A cluster is empty when no sentence of the bank is in it."
        if run.of_corpus
        else "A cluster is empty when no sentence was nearest to its centroid in 50 steps (or since clustering "
        "started)."
    )
    figures = [Figure("Clusters in use", counts, f"{means_empty} From 30\u00a0% on they are dead weight.")]
    batch = run.config.train.global_batch_size
    figures += _curve_figure(
        run,
        "largest_cluster",
        "The largest cluster",
        "share of the batch (%)",
        f"Share of the batch's {batch:,} sentences; {100 / k:.2g} % if all clusters were alike.",
        scale=100 / batch,
        shown=",.1f",
        from_zero=True,
        levels=[(100 / k, "even")],
        start=start,
    )
    sizes = run.cluster_sizes()
    if len(sizes) > 1:
        figures.append(
            Figure(
                "Sizes over time",
                size_bands([step for step, _ in sizes], [row for _, row in sizes], start),
                "How the sentences between two evaluations spread over the clusters: the bands hold half, "
                "80\u00a0% and all of them.",
            )
        )
    if sizes:
        moments = [sizes[at] for at in sorted({0, len(sizes) // 2, len(sizes) - 1})]
        figures.append(
            Figure(
                "Sizes, sorted",
                sorted_sizes([(f"step {step:,}", row) for step, row in moments]),
                "A long flat tail at 0 is dead clusters; a high left end, oversized ones.",
            )
        )
    figures += _curve_figure(
        run,
        "centroid_drift",
        "Centroid drift",
        "1 − cosine",
        "How far the mean centroid turned since the evaluation before. It should fade as training settles.",
        evaluated=True,
        from_zero=True,
        start=start,
    )
    figures += _curve_figure(
        run,
        "false_negative_rate",
        "False negatives",
        "share of the pairs",
        f"Pairs of the batch that share a cluster{' and are alike' if run.of_corpus else ''}: they are not pushed "
        "apart, but kept at a margin.",
        from_zero=True,
        start=start,
    )
    of = "drawn from the second nearest cluster" if run.of_corpus else "the second nearest centroid"
    figures += _curve_figure(
        run,
        "hard_negative_cosine",
        "Hard negatives",
        "mean cosine",
        f"Cosine of a sentence to its hard negative, {of}. Higher is harder.",
        from_zero=True,
        start=start,
    )
    return Section(
        "Cluster health",
        words=[
            f"K = {k} centroids, made at step {start:,}, once the mean cosine of the batch had fallen to "
            f"{run.config.clustering.start_cosine:g} (clustering.start_cosine)."
            if run.finished
            else f"K = {k} centroids; the first step logged with them is {start:,}."
        ],
        figures=figures,
    )


def space_section(run: RunRecord) -> Section | None:
    """How the embeddings lie; also of runs without clusters."""
    start, figures = run.clustering_started, []
    batch = Line("batch, in training", *run.curve("mean_cosine"))
    dev = Line("dev sentences", *run.curve("embedding_cosine", True), hue="orange", dash="dash", points=True)
    lines = [line for line in (batch, dev) if line.x]
    if lines:
        levels = _reached([v for line in lines for v in line.y], COLLAPSED_COSINE, "collapse")
        if run.num_clusters:
            levels.append((run.config.clustering.start_cosine, "start_cosine"))
        figures.append(
            Figure(
                "Mean cosine",
                line_chart(lines, y="mean cosine", shown=".3g", from_zero=True, start=start, levels=levels),
                "Between the two views of all sentences of a batch, and between different dev sentences. Near 1, all "
                "sentences look alike.",
            )
        )
    for key, title, y, words in (
        (
            "alignment",
            "Alignment",
            "mean squared distance",
            "Of the dev pairs graded as alike. Lower is better (Wang and Isola 2020).",
        ),
        (
            "uniformity",
            "Uniformity",
            "log of the mean potential",
            "How evenly dev sentences cover the sphere. Lower is better (Wang and Isola 2020).",
        ),
        (
            "effective_rank",
            "Effective rank",
            "dimensions",
            "How many directions the dev embeddings use, by the entropy of their singular values.",
        ),
    ):
        figures += _curve_figure(run, key, title, y, words, evaluated=True, start=start)
    return Section("Shape of the space", figures=figures) if figures else None


def throughput_section(run: RunRecord) -> Section | None:
    known = [value for value in run.curve("sentences_per_second")[1] if value is not None]
    if not known:
        return None
    workers = (run.result or run.environment or {}).get("num_workers")
    on = f" on {count(workers, 'worker')}" if isinstance(workers, int) else ""
    return Section(
        "Throughput",
        words=[
            f"Median {statistics.median(known):,.0f} sentences per second{on}, each encoded twice and trained on; "
            f"{fixed(min(known), 0)} at the slowest logged stretch, {fixed(max(known), 0)} at the fastest. Time in "
            "evaluations is not counted."
        ],
        figures=_curve_figure(
            run,
            "sentences_per_second",
            "Sentences per second",
            "sentences per second",
            shown=",.0f",
            from_zero=True,
        ),
    )
