"""The seven STS tests beside published scores."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from clusterns_ray.evaluation.sts import TASKS
from clusterns_ray.report.page import Cell, Section, Table
from clusterns_ray.report.record import RunRecord, number
from clusterns_ray.report.words import fixed, listing, spread


@dataclass(frozen=True)
class Published:
    name: str
    scores: tuple[float, ...]
    """in the order of ``TASKS``"""
    average: float
    paper: str


PUBLISHED = (
    Published(
        "SimCSE",
        (68.40, 82.41, 74.38, 80.91, 78.56, 76.85, 72.23),
        76.25,
        "Gao et al., SimCSE: Simple Contrastive Learning of Sentence Embeddings, EMNLP 2021",
    ),
    Published(
        "ClusterNS",
        (69.93, 83.57, 76.00, 82.44, 80.01, 78.85, 72.03),
        77.55,
        "Deng et al., Clustering-Aware Negative Sampling for Unsupervised Sentence Representation, Findings of ACL "
        "2023",
    ),
    Published(
        "PromptBERT",
        (71.56, 84.58, 76.98, 84.47, 80.60, 81.60, 69.87),
        78.54,
        "Jiang et al., PromptBERT: Improving BERT Sentence Embeddings with Prompts, EMNLP 2022",
    ),
    Published(
        "ClusterNS, prompt",
        (72.92, 84.86, 77.38, 84.52, 80.23, 81.58, 69.53),
        78.72,
        "Deng et al. 2023, as above",
    ),
)

"""Spearman x 100 over all pairs of a task; BERT-base, trained without labels on a million sentences of Wikipedia."""

LABELS = {"STSB": "STS-B", "SICKR": "SICK-R"}
"""The names of tests as papers write them, where these differ."""


def sts_section(runs: Sequence[RunRecord], rows: Sequence[Sequence[Cell]]) -> Section:
    """The seven tests beside the published figures.

    Args:
        runs: all that the page is about; those that have not been scored are named with the command that does it.
        rows: what is shown of those that have, as :func:`sts_row` makes them.
    """
    scored = [run.sts for run in runs if run.sts is not None]
    words = [
        "Spearman × 100 over all pairs of a task, the average over all seven tests. They chose nothing. The published "
        "rows are BERT-base (110 million parameters), trained on a million sentences of Wikipedia: another model on "
        "other text, unless this run did the same."
    ]
    partial = sorted({str(task) for sts in scored for task in sts.get("missing") or []})
    if partial:
        words.append(f"No average where tests are missing ({', '.join(partial)}): it is of all seven or not at all.")
    protocols = [protocol for sts in scored if isinstance(protocol := (sts.get("data") or {}).get("protocol"), dict)]
    if protocols:
        differences = "; ".join(f"{task}: {text}" for task, text in protocols[0].items())
        words.append(f"Scored on the hub's data sets, which are not those of the papers ({differences}).")
    without = [run for run in runs if run.sts is None]
    if without:
        names = listing([run.name for run in without[:5]] + (["others"] if len(without) > 5 else []))
        words.append(f"{names} {'has' if len(without) == 1 else 'have'} not been scored on these tests. To do so, run:")
    return Section(
        "STS tests",
        words=words,
        code="\n".join(evaluate_command(run) for run in without[:5]),
        tables=[
            Table(
                ["model", *(LABELS.get(task, task) for task in TASKS), "average"],
                [*rows, *([item.name, *map(fixed, item.scores), fixed(item.average)] for item in PUBLISHED)],
                strong_rows=range(len(rows)),
            )
        ],
        footnotes=[f"{item.name}: {item.paper}." for item in PUBLISHED[:3]]
        + ["ClusterNS, prompt: the same paper, with PromptBERT's templates."],
    )


def sts_row(name: str, runs: Sequence[RunRecord]) -> list[Cell]:
    """The scores of a run, or mean and deviation of several; all have been scored."""
    scores = [run.sts or {} for run in runs]
    tasks = [spread([number(sts["tasks"].get(task) or {}, "spearman") for sts in scores]) for task in TASKS]
    return [name, *tasks, spread([run.sts_average for run in runs])]


def evaluate_command(run: RunRecord) -> str:
    sts = run.config.evaluation.sts
    directory = shlex.quote(sts) if sts and sts != "structure" else "STS_DIRECTORY"
    place = run.address or run.path
    model, output = shlex.quote(f"{place}/model"), shlex.quote(f"{place}/evaluation.json")
    return f"clusterns evaluate {model} --sts {directory} --json {output}"
