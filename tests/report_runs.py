"""Directories of runs that were never run, as training would have written them, and pages as a browser reads them."""

from __future__ import annotations

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from helpers import sentences

from clusterns_ray.config import Config, dump_config, make_config
from clusterns_ray.evaluation.sts import TASKS
from clusterns_ray.report.map.corpus_map import CorpusMap
from clusterns_ray.report.page import Page, render_page


def run_config(name: str, seed: int = 1, **sections: dict[str, Any]) -> Config:
    """A configuration; its paths need not be there."""
    values: dict[str, dict[str, Any]] = {
        "encoder": {"name": "bert-base-uncased", "num_layers": 3},
        "data": {"corpus": "texts/*.txt"},
        "clustering": {"num_clusters": 32},
        "train": {"global_batch_size": 128, "max_steps": 400},
        "evaluation": {"sts": "sts", "every_steps": 25, "patience": None},
        "runtime": {"name": name},
    }
    for section, changes in sections.items():
        values.setdefault(section, {}).update(changes)
    return make_config({"seed": seed, **values})


def write_records(directory: Path, records: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def make_run(
    storage: Path,
    name: str = "night",
    seed: int = 1,
    *,
    gain: float = 10.0,
    finished: bool = True,
    complete: bool = True,
    **sections: dict[str, Any],
) -> Path:
    """A plausible run of 400 steps that starts to cluster at step 30 and has its best score at step 300.

    Args:
        gain: points of the dev score.
        complete: with clusters.json, environment.json and evaluation.json, and what newer records hold.
    """
    config = run_config(name, seed, **sections)
    directory = storage / name
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    draw, k, batch = random.Random(seed), config.clustering.num_clusters, config.train.global_batch_size
    start, total = 30, config.train.max_steps or 400
    records: list[dict[str, Any]] = []
    scores: dict[int, float] = {}
    sizes = [draw.random() ** 2 + 0.02 for _ in range(k)]
    for step in range(0, total + 1, 5):
        clustered = bool(k) and step > start
        if step:
            loss = 0.02 + 1.5 * math.exp(-step / 40) + 0.01 * draw.random()
            bml = 0.02 * math.exp(-step / 200) if clustered else 0.0
            record = {
                "step": step,
                "epoch": round(step / 300, 4),
                "loss": loss + config.loss.bml_weight * bml,
                "info_nce": loss,
                "bml": bml,
                "mean_cosine": 0.25 + 0.6 * math.exp(-step / 30) + 0.02 * draw.random(),
            }
            if clustered:
                record |= {
                    "hard_negative_cosine": 0.5 - 0.0004 * step + 0.01 * draw.random(),
                    "clusters_used": k - 4 + draw.randrange(4),
                    "largest_cluster": 10 + draw.randrange(6),
                    "false_negative_rate": 0.04 + 0.004 * draw.random(),
                }
                record |= {"empty_clusters": step // 150} if complete else {}
            record |= {
                "learning_rate": 5e-5 * (1 - step / total),
                "grad_norm": 0.4 + 2 * math.exp(-step / 20) + 0.1 * draw.random(),
                "skipped_steps": 0,
                "sentences_per_second": 800 + 50 * draw.random(),
            }
            records.append(record)
        if step % config.evaluation.every_steps == 0:
            grown = 1 - math.exp(-step / 60) - max(0, step - 300) / 2000
            score = 63 + gain * grown + (0.3 * draw.random() if step else 0)
            scores[step] = score
            record = {"step": step, "epoch": round(step / 300, 4), "sts_dev": score}
            if step:
                record["best"] = score == max(scores.values())
            if complete:
                record |= {
                    "alignment": 0.2 + 0.05 * math.exp(-step / 90),
                    "uniformity": -2.2 - 0.6 * (1 - math.exp(-step / 90)),
                    "effective_rank": 120 + 30 * (1 - math.exp(-step / 90)),
                    "embedding_cosine": 0.1 + 0.3 * math.exp(-step / 90),
                }
                if clustered:
                    record["cluster_sizes"] = [int(25 * batch * size / sum(sizes)) for size in sizes]
                    record["centroid_drift"] = 0.02 * math.exp(-step / 120)
            records.append(record)
    write_records(directory, records)
    if finished:
        best_step = max((step for step in scores if step), key=lambda step: scores[step])
        result = {
            "best_step": best_step,
            "sts_dev": scores[best_step],
            "sts_dev_before": scores[0],
            "sts_dev_last": scores[total],
            "dev": config.evaluation.dev,
            "steps": total,
            "stopped_early": False,
            "clustering_started_at": start if k else None,
            "seconds": 754.2,
            "num_workers": 2,
            "model": str(directory / "model"),
            "fingerprint": config.fingerprint(),
            "torch": "2.13.0",
            "python": "3.11.7",
        }
        write_json(directory / "result.json", result)
    if complete:
        texts = sentences(2000, seed)
        clusters = [
            {
                "cluster": number,
                "size": int(2000 * size / sum(sizes)) or 1,
                "tightness": round(0.4 + 0.4 * draw.random(), 4),
                "examples": texts[5 * number : 5 * number + 5],
            }
            for number, size in enumerate(sizes)
        ]
        if k:
            clusters.sort(key=lambda cluster: -cluster["size"])
            write_json(directory / "clusters.json", {"step": total, "sample": 2000, "clusters": clusters})
        write_json(
            directory / "environment.json",
            {
                "command": ["/usr/bin/clusterns", "train", "night.yaml", "--set", f"seed={seed}"],
                "started": "2026-03-01T21:04:05+00:00",
                "versions": {"python": "3.11.7", "clusterns-ray": "0.1.0", "torch": "2.13.0"},
                "machine": {"platform": "Linux-6.1-x86_64", "cpus": 8, "memory_gib": 31.2, "gpu": None},
                "num_workers": 2,
            },
        )
        write_json(directory / "evaluation.json", sts_scores(seed))
    return directory


def sts_scores(seed: int = 1, missing: tuple[str, ...] = ()) -> dict[str, Any]:
    """What ``clusterns evaluate --json`` writes."""
    tasks = {task: {"spearman": 60.0 + number + seed / 4} for number, task in enumerate(TASKS) if task not in missing}
    average = None if missing else sum(scores["spearman"] for scores in tasks.values()) / len(tasks)
    return {"model": "model", "tasks": tasks, "missing": list(missing), "average": average, "extra": {}}


class Html(HTMLParser):
    """Text, scripts and what is loaded, as a browser would find them."""

    def __init__(self, source: str):
        super().__init__()
        self.text, self.csp = "", ""
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[list[Any]] = []
        """type, id and text of each"""
        self.stack: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.stack.append(tag)
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]
        assert not any(key.startswith("on") for key in values), "no inline handlers"
        if tag == "script":
            self.scripts.append([values.get("type"), values.get("id"), ""])
        if values.get("http-equiv") == "Content-Security-Policy":
            self.csp = values["content"] or ""

    def handle_endtag(self, tag: str) -> None:
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1][2] += data
        elif "style" not in self.stack:
            self.text += data

    def plots(self) -> list[dict[str, Any]]:
        return [json.loads(text) for kind, name, text in self.scripts if kind == "application/json" and name is None]


def page_text(page: Page) -> str:
    return " ".join(Html(render_page(page)).text.split())


def make_corpus_map(n: int = 400, clusters: int = 8, *, before: bool = True, seed: int = 1) -> CorpusMap:
    """A map of invented sentences: clusters as clouds in the plane, wider before training."""
    draw = np.random.default_rng(seed)
    cluster_N = draw.integers(clusters, size=n)
    middles_K2 = draw.normal(size=(clusters, 2)) * 20
    xy_N2 = (middles_K2[cluster_N] + draw.normal(size=(n, 2)) * 4).astype(np.float32)
    words = np.array([f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "nd", "rka", "lom", "tis")])
    texts = [" ".join(words[draw.integers(len(words), size=draw.integers(6, 28))]).capitalize() for _ in range(n)]
    return CorpusMap(
        texts=texts,
        rows_N=np.arange(n) * 3,
        xy_N2=xy_N2,
        before_N2=(xy_N2 + draw.normal(size=(n, 2)) * 8).astype(np.float32) if before else None,
        cluster_N=cluster_N,
        cosine_N=draw.random(n).astype(np.float32),
        second_N=(cluster_N + 1) % clusters,
        similar_NS=draw.integers(n, size=(n, 5)),
        similar_cosine_NS=draw.random((n, 5)).astype(np.float32),
        hard_NM=None,
        terms={number: [f"term{number}", "second", "third"] for number in range(clusters)},
        facts={
            "corpus": "texts.txt",
            "model": "runs/night",
            "identity": None,
            "own_clusters": True,
            "false_negative_cosine": None,
            "total": 10 * n,
            "seed": 0,
            "layout": "openTSNE",
            "trustworthiness": 0.95,
            **({"trustworthiness_before": 0.94} if before else {}),
        },
    )
