"""The page of one run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from clusterns_ray.config import Config, dump_config
from clusterns_ray.config import Section as ConfigSection
from clusterns_ray.report.advice import advise
from clusterns_ray.report.curves import cluster_section, dev_section, loss_section, space_section, throughput_section
from clusterns_ray.report.page import Cell, Examples, Fact, Fold, Page, Section, Table, Warning, footer
from clusterns_ray.report.record import RunRecord, number
from clusterns_ray.report.sts_table import sts_row, sts_section
from clusterns_ray.report.words import NONE, count, duration, fixed, listing, percent, plain_value, signed

SHOWN_CLUSTERS = 6
SMALLEST_SHOWN = 5
"""Sentences that a cluster must have among the sample to be listed as tight: of few, any are alike."""


def run_page(run: RunRecord) -> Page:
    """Put the whole report of a run together."""
    corpus_map, stale = run_map(run)
    sections = [
        dev_section(run),
        loss_section(run),
        cluster_section(run),
        space_section(run),
        example_section(run),
        corpus_map,
        sts_section([run], [sts_row(run.name, [run])] if run.sts is not None else []),
        throughput_section(run),
        setup_section(run),
    ]
    return Page(
        title=run.name,
        subtitle=f"{run.method} · {run.config.encoder.name} · seed {run.config.seed}",
        headline=headline(run),
        facts=facts(run),
        warnings=[*advise(run), *stale],
        sections=[section for section in sections if section],
        footer=footer(),
    )


def run_map(run: RunRecord) -> tuple[Section | None, list[Warning]]:
    """The map that ``clusterns map`` left in the run; where it is not of the model that is there, a note instead."""
    path = run.path / "map.parquet"
    if not path.is_file():
        return None, []
    from clusterns_ray.report.map.map_file import read_map
    from clusterns_ray.report.map.map_page import map_section, map_warnings, model_identity

    corpus_map = read_map(path)
    if corpus_map.facts["identity"] != model_identity(run.path / "model"):
        text = (
            f"map.parquet is of another model than model/, so it is not shown: clusterns map {run.path} makes it again."
        )
        return None, [Warning(text, "note")]
    return map_section(corpus_map), map_warnings(corpus_map)


def headline(run: RunRecord) -> list[str]:
    """What was done and what came of it, in two or three sentences."""
    config = run.config
    layers = f"the first {count(config.encoder.num_layers, 'layer')} of " if config.encoder.num_layers else ""
    seconds = number(run.result or {}, "seconds")
    took = f" in {duration(seconds)}" if seconds is not None else ""
    corpus = config.data.corpus if config.data.corpus is not None else config.data.documents
    text = f"{'ClusterNS' if run.num_clusters else 'SimCSE'} trained {layers}{config.encoder.name} on "
    text += listing(corpus) if isinstance(corpus, list) else str(corpus)
    text += f" for {count(run.last_step, 'step')} of {count(config.train.global_batch_size, 'sentence')}{took}"
    if not run.finished:
        text += " so far; it has not finished"
    elif run.result and run.result.get("stopped_early"):
        text += (
            f", and stopped early, after {count(config.evaluation.patience or 0, 'evaluation')} without a better score"
        )
    return [text + ".", _outcome(run)]


def _outcome(run: RunRecord) -> str:
    if run.dev is None:
        return "Nothing was measured on the way: the run has no dev set."
    if run.best is None:
        before = f"; before training it was {fixed(run.before)}" if run.before is not None else ""
        return f"There is no score on {run.dev} after a step{before}."
    step, best = run.best
    gain = f", {signed(best - run.before)} from {fixed(run.before)} before training" if run.before is not None else ""
    if run.last is None:
        end = "; at the last evaluation there was none"
    else:
        end = ", the last" if step == run.evaluations[-1]["step"] else f"; the last score is {fixed(run.last)}"
    text = f"Its best score on {run.dev} (Spearman × 100) is {fixed(best)}{gain}, at step {step:,}{end}."
    if run.kept_untrained:
        text += " No step beat the untrained encoder, so model/ holds that one."
    return text


def facts(run: RunRecord) -> list[Fact]:
    facts = []
    if run.dev is not None:
        step, best = run.best or (0, None)
        why = "not kept: no better than the untrained encoder" if run.kept_untrained else "chosen on this set"
        facts = [
            Fact("Dev, before training", fixed(run.before), run.dev),
            Fact("Dev, best step", fixed(best), f"step {step:,}; {why}" if run.best else ""),
            Fact("Dev, last step", fixed(run.last), f"step {run.last_step:,}"),
        ]
    for name, also in run.also.items():
        gain = f"{signed(also['after'] - also['before'])} ({fixed(also['low'])} to {fixed(also['high'])})"
        facts.append(Fact(name, fixed(also["after"]), f"{gain} from before training; chose nothing"))
    if run.sts_average is not None:
        facts.append(Fact("Average of the STS tests", fixed(run.sts_average), "the seven tests, chose nothing"))
    stopped = run.result is not None and run.result.get("stopped_early")
    ended = "unfinished" if not run.finished else "stopped early" if stopped else "as planned"
    epoch = max((value for record in run.steps if (value := number(record, "epoch")) is not None), default=None)
    facts.append(Fact("Steps", f"{run.last_step:,}", ended + (f", {fixed(epoch)} epochs" if epoch is not None else "")))
    facts.append(Fact("Time", duration(number(run.result or {}, "seconds")), "steps and evaluations"))
    return facts


# ---- sections ---------------------------------------------------------------------------------------------------


def example_section(run: RunRecord) -> Section | None:
    if run.clusters is None:
        return None
    clusters = [cluster for cluster in run.clusters["clusters"] if isinstance(cluster, dict)]
    sample = run.clusters.get("sample") or sum(cluster.get("size", 0) for cluster in clusters)
    if not clusters or not sample:
        return None

    def rows(shown: Sequence[dict[str, Any]]) -> list[list[Cell]]:
        return [
            [
                str(cluster.get("cluster", NONE)),
                f"{cluster.get('size', 0):,} ({percent(cluster.get('size', 0) / sample)})",
                fixed(number(cluster, "tightness"), 3),
                Examples([str(text) for text in cluster.get("examples", [])]),
            ]
            for cluster in shown
        ]

    largest = sorted(clusters, key=lambda cluster: -cluster.get("size", 0))[:SHOWN_CLUSTERS]
    tight = [cluster for cluster in clusters if cluster.get("size", 0) >= SMALLEST_SHOWN]
    tight = sorted(tight, key=lambda cluster: -(number(cluster, "tightness") or -1))[:SHOWN_CLUSTERS]
    columns = ["cluster", "sentences", "tightness", "the most typical ones"]
    return Section(
        "What the clusters hold",
        words=[
            f"{count(sample, 'sentence')} of the corpus, drawn at random, by their nearest centroid after step "
            f"{run.clusters.get('step', run.last_step):,}: {len(clusters)} of {run.num_clusters} clusters hold any. "
            "Tightness is the mean cosine of a cluster's sentences to its centroid. A cluster is of use if its "
            "sentences are about one thing, not if they merely have the same length or form.",
        ],
        tables=[
            Table(columns, rows(largest), "The largest clusters", text_columns=(0, 3), cards=True),
            Table(
                columns,
                rows(tight),
                f"The tightest clusters, of those with {SMALLEST_SHOWN} sentences or more",
                text_columns=(0, 3),
                cards=True,
            ),
        ],
    )


def setup_section(run: RunRecord) -> Section:
    changed = changed_keys(run.config)
    environment = run.environment or {}
    command = environment.get("command")
    words = []
    if environment.get("started"):
        words.append(f"Started, or last resumed, on {_moment(environment['started'])}.")
    words.append(
        f"{count(len(changed), 'key')} of the configuration {'differs' if len(changed) == 1 else 'differ'} from the "
        "defaults; the whole of it is below."
    )
    tables = [Table(["key", "value", "default"], changed, "What was set", text_columns=(0, 1, 2))] if changed else []
    machine = _machine(run)
    if machine:
        tables.append(Table(["", ""], machine, "Where it ran", text_columns=(0, 1)))
    return Section(
        "What was run",
        words=words,
        code=_command(command) if isinstance(command, list) and command else "",
        tables=tables,
        folds=[Fold("The whole configuration", dump_config(run.config))],
    )


def _moment(text: Any) -> str:
    """``1 March 2026, 21:04 UTC`` of an ISO time; what is not one as it is."""
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return str(text)
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


def _command(argv: Sequence[Any]) -> str:
    """The command as it can be typed: a console script by its name, not its path."""
    first, *rest = map(str, argv)
    return shlex.join([Path(first).name if Path(first).name == "clusterns" else first, *rest])


def _machine(run: RunRecord) -> list[list[Cell]]:
    environment = run.environment or {}
    machine = environment.get("machine") or {}
    versions = environment.get("versions") or {key: (run.result or {}).get(key) for key in ("python", "torch")}
    workers = (run.result or environment).get("num_workers")
    rows = [
        ("machine", machine.get("platform")),
        ("CPUs", machine.get("cpus")),
        ("memory", f"{machine['memory_gib']} GiB" if machine.get("memory_gib") else None),
        ("GPU", machine.get("gpu") or ("none" if machine else None)),
        ("workers", workers),
        *versions.items(),
    ]
    return [[str(name), str(value)] for name, value in rows if value is not None]


def changed_keys(config: Config) -> list[list[str]]:
    """``section.key``, value and default of every key that is not at its default."""
    rows = []
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        if isinstance(value, ConfigSection):
            standard = type(value)().model_dump(mode="json")
            rows += [
                [f"{name}.{key}", plain_value(item), plain_value(standard[key])]
                for key, item in value.model_dump(mode="json").items()
                if item != standard[key]
            ]
        elif value != field.default:
            rows.append([name, plain_value(value), plain_value(field.default)])
    return rows
