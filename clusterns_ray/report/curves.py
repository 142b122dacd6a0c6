"""The sections of a run that are curves over its steps. Each is None where the run has nothing of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from clusterns_ray.report.advice import COLLAPSED_COSINE
from clusterns_ray.report.charts import Level, Line, Mark, line_chart, size_bands, sorted_sizes, spans_decades
from clusterns_ray.report.page import Cell, Figure, Section, Table
from clusterns_ray.report.record import RunRecord, number
from clusterns_ray.report.words import count, fixed, formatted

SHOWN_EVALUATIONS = 200


def dev_section(run: RunRecord) -> Section | None:
    if not run.dev_scores or run.dev is None:
        return None
    steps, scores = zip(*run.dev_scores, strict=True)
    best = [Mark(run.best[0], run.best[1], f"best {fixed(run.best[1])}")] if run.best else []
    levels = [Level(run.before, "before training")] if run.before is not None else []
    chart = line_chart(
        [Line(run.dev, steps, scores, points=True)],
        y="Spearman × 100",
        marks=best,
        levels=levels,
        start=run.clustering_started,
    )
    return Section(
        "Dev score",
        words=[
            f"Spearman's correlation between cosines and the grades of {run.dev}, × 100. The best step on this set is "
            "the one that was exported, so its score flatters the model a little; the STS tests do not.",
        ],
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
    columns = [column for column in EVALUATION_COLUMNS if any(column[0] in record for record in run.evaluations)]
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


def loss_section(run: RunRecord) -> Section | None:
    if not run.steps:
        return None
    settings = run.config.loss
    weight = settings.bml_weight
    terms = ["InfoNCE", f"{weight:g} times the Bidirectional Margin Loss (BML)"]
    if settings.teacher is not None:
        terms.append(f"{settings.distillation_weight:g} times the distance from the teacher's ranking")
    if settings.mlm_weight:
        terms.append(f"{settings.mlm_weight:g} times masked language modelling")
    steps, loss = run.curve("loss")
    _, info_nce = run.curve("info_nce")
    known = [value for value in [*loss, *info_nce] if value is not None]
    figures = [
        Figure(
            "Loss",
            line_chart(
                [
                    Line("loss", steps, loss, width=5, opacity=0.4),
                    Line("InfoNCE", steps, info_nce, "orange", width=1.5),
                ],
                y="nats",
                shown=".3g",
                may_be_logarithmic=True,
                start=run.clustering_started,
            ),
            f"What is minimised: {' plus '.join(terms)}."
            + (" Logarithmic." if spans_decades(known) else "")
            + (" Hard negatives come in when clustering starts." if run.num_clusters else ""),
        )
    ]
    bml_steps, bml = run.curve("bml")
    if run.num_clusters and weight:
        figures.append(
            Figure(
                "Bidirectional Margin Loss",
                line_chart(
                    [Line("BML", bml_steps, bml, "green")],
                    y="BML, unweighted",
                    shown=".3g",
                    from_zero=True,
                    start=run.clustering_started,
                ),
                "How far the cosines of false negatives lie outside their margins; 0 until clustering starts.",
            )
        )
    taught_steps, taught = run.curve("distillation")
    if taught_steps:
        figures.append(
            Figure(
                "Distance from the teacher",
                line_chart([Line("distance", taught_steps, taught)], y="nats, unweighted", shown=".3g", from_zero=True),
                f"How far the ranking of the batch is from that of {settings.teacher}; 0 where both agree.",
            )
        )
    figures.append(
        Figure(
            "Learning rate",
            line_chart(
                [Line("learning rate", *run.curve("learning_rate"))], y="learning rate", shown=".3g", from_zero=True
            ),
        )
    )
    figures.append(
        Figure(
            "Gradient norm",
            line_chart(
                [Line("gradient norm", *run.curve("grad_norm"))],
                y="L2 norm",
                shown=".3g",
                from_zero=True,
                levels=_reached(run.curve("grad_norm")[1], run.config.train.max_grad_norm, "clipped above"),
            ),
        )
    )
    return Section("Loss", figures=figures)


def _reached(values: Sequence[float | None], bound: float, text: str) -> list[Level]:
    return [Level(bound, text)] if any(value is not None and value > 0.5 * bound for value in values) else []


def cluster_section(run: RunRecord) -> Section | None:
    if not run.num_clusters or run.clustering_started is None:
        return None
    start, k = run.clustering_started, run.num_clusters
    lines = [Line("used in the batch", *run.curve("clusters_used"))]
    if run.curve("empty_clusters")[0]:
        empty = "empty" if run.of_corpus else "empty for 50 steps"
        lines.append(Line(empty, *run.curve("empty_clusters"), hue="orange", dash="dash"))
    figures = [
        Figure(
            "Clusters in use",
            line_chart(lines, y="clusters", shown=",.0f", from_zero=True, levels=[Level(k, f"K = {k}")], start=start),
            (
                "A cluster is empty when no sentence of the bank is in it."
                if run.of_corpus
                else "A cluster is empty when no sentence was nearest to its centroid in 50 steps (or since clustering "
                "started)."
            )
            + " From 30\u00a0% on they are dead weight.",
        )
    ]
    batch = run.config.train.global_batch_size
    largest_steps, largest = run.curve("largest_cluster")
    figures.append(
        Figure(
            "The largest cluster",
            line_chart(
                [Line("largest cluster", largest_steps, [None if v is None else 100 * v / batch for v in largest])],
                y="share of the batch (%)",
                shown=",.1f",
                from_zero=True,
                levels=[Level(100 / k, "even")],
                start=start,
            ),
            f"Share of the batch's {batch:,} sentences; {100 / k:.2g} % if all clusters were alike.",
        )
    )
    sizes = run.cluster_sizes()
    if sizes:
        steps = [step for step, _ in sizes]
        if len(sizes) > 1:
            figures.append(
                Figure(
                    "Sizes over time",
                    size_bands(steps, [row for _, row in sizes], start),
                    "How the sentences between two evaluations spread over the clusters: the bands hold half, "
                    "80\u00a0% and all of them.",
                )
            )
        moments = [sizes[at] for at in sorted({0, len(sizes) // 2, len(sizes) - 1})]
        figures.append(
            Figure(
                "Sizes, sorted",
                sorted_sizes([(f"step {step:,}", row) for step, row in moments]),
                "A long flat tail at 0 is dead clusters; a high left end, oversized ones.",
            )
        )
    drift_steps, drift = run.curve("centroid_drift", of_evaluations=True)
    if drift_steps:
        figures.append(
            Figure(
                "Centroid drift",
                line_chart(
                    [Line("drift", drift_steps, drift, points=True)],
                    y="1 − cosine",
                    shown=".3g",
                    from_zero=True,
                    start=start,
                ),
                "How far the mean centroid turned since the evaluation before. It should fade as training settles.",
            )
        )
    for key, title, y, words in (
        (
            "false_negative_rate",
            "False negatives",
            "share of the pairs",
            f"Pairs of the batch that share a cluster{' and are alike' if run.of_corpus else ''}: they are not pushed "
            "apart, but kept at a margin.",
        ),
        (
            "hard_negative_cosine",
            "Hard negatives",
            "mean cosine",
            "Cosine of a sentence to its hard negative, "
            + ("drawn from the second nearest cluster" if run.of_corpus else "the second nearest centroid")
            + ". Higher is harder.",
        ),
    ):
        steps, values = run.curve(key)
        if steps:
            chart = line_chart([Line(title, steps, values)], y=y, shown=".3g", from_zero=True, start=start)
            figures.append(Figure(title, chart, words))
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
    figures = []
    batch = Line("batch, in training", *run.curve("mean_cosine"))
    dev = Line("dev sentences", *run.curve("embedding_cosine", True), hue="orange", dash="dash", points=True)
    lines = [line for line in (batch, dev) if line.x]
    if lines:
        levels = _reached([v for line in lines for v in line.y], COLLAPSED_COSINE, "collapse")
        if run.num_clusters:
            levels.append(Level(run.config.clustering.start_cosine, "start_cosine"))
        figures.append(
            Figure(
                "Mean cosine",
                line_chart(
                    lines, y="mean cosine", shown=".3g", from_zero=True, start=run.clustering_started, levels=levels
                ),
                "Between the two views of all sentences of a batch, and between different dev sentences. Near 1, all "
                "sentences look alike.",
            )
        )
    alignment, uniformity = run.curve("alignment", True), run.curve("uniformity", True)
    for title, (steps, values), y, words in (
        (
            "Alignment",
            alignment,
            "mean squared distance",
            "Of the dev pairs graded as alike. Lower is better (Wang and Isola 2020).",
        ),
        (
            "Uniformity",
            uniformity,
            "log of the mean potential",
            "How evenly dev sentences cover the sphere. Lower is better (Wang and Isola 2020).",
        ),
        (
            "Effective rank",
            run.curve("effective_rank", True),
            "dimensions",
            "How many directions the dev embeddings use, by the entropy of their singular values.",
        ),
    ):
        if any(value is not None for value in values):
            chart = line_chart(
                [Line(title, steps, values, points=True)], y=y, shown=".3g", start=run.clustering_started
            )
            figures.append(Figure(title, chart, words))
    return Section("Shape of the space", figures=figures) if figures else None


def throughput_section(run: RunRecord) -> Section | None:
    steps, speed = run.curve("sentences_per_second")
    known = [value for value in speed if value is not None]
    if not known:
        return None
    workers = (run.result or run.environment or {}).get("num_workers")
    return Section(
        "Throughput",
        words=[
            f"Median {statistics.median(known):,.0f} sentences per second"
            + (f" on {count(workers, 'worker')}" if isinstance(workers, int) else "")
            + f", each encoded twice and trained on; {fixed(min(known), 0)} at the slowest logged stretch, "
            f"{fixed(max(known), 0)} at the fastest. Time in evaluations is not counted."
        ],
        figures=[
            Figure(
                "Sentences per second",
                line_chart([Line("sentences/s", steps, speed)], y="sentences per second", shown=",.0f", from_zero=True),
            )
        ],
    )
