"""The tour of ``make demo``: train experiments/quickstart.yaml, and SimCSE beside it, then look at what was learnt.

Prints the clusters with example sentences, nearest neighbours before and after, the scores of both before and after,
by the documents' structure and by people, and where the model is. Takes the same ``section.key=value`` arguments as
``clusterns train --set``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray import ClusterNSError, Config, Encoder, load_config, make_config, progress_view, train
from clusterns_ray.data.prepare import prepare
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.inference.encode import unit_rows

CLUSTERS_SHOWN = 6
QUERIES = 3
SENTENCES = 3000
"""Looked at afterwards: a seeded sample, as encoding all of them twice takes longer than the training."""


def main(overrides: list[str]) -> None:
    config = load_config(Path(__file__).with_suffix(".yaml"), overrides)
    results = {}
    for name, asked in {"SimCSE": simcse(config), "neighbours, ClusterNS": config}.items():
        print(f"\n{name}: {asked.runtime.name}", flush=True)
        with progress_view() as on_event:
            results[name] = result = train(asked, on_event)
    store = TokenStore.open(prepare(config).tokens_dir)
    rows = np.random.default_rng(config.seed).permutation(len(store))[:SENTENCES]
    sentences = list(dict.fromkeys(store.texts(rows)))

    print(
        f"\nEncoding a sample of {len(sentences):,} sentences with the encoder before and after training ...",
        flush=True,
    )
    before = unit_rows(Encoder.for_training(config.encoder, seed=0).encode(sentences))
    after = unit_rows(Encoder.load(result["model"]).encode(sentences))

    centroids = Path(result["model"]).parent / "centroids.npy"
    if centroids.is_file():
        show_clusters(sentences, after, unit_rows(np.load(centroids)))
    show_neighbours(sentences, before, after, config.seed)

    print_scores(results)
    print(f"The encoder, for transformers and sentence-transformers: {result['model']}")


def simcse(config: Config) -> Config:
    """The same run with a sentence's own dropout copy as its positive, and without clusters."""
    values = config.resolved()
    for key in ("positives", "neighbour_distance", "crop_ratio"):
        del values["data"][key]  # the defaults are SimCSE's
    values["clustering"] |= {"scope": "batch", "num_clusters": 0}
    values["runtime"]["name"] += "-simcse"
    return make_config(values)


def print_scores(results: dict[str, dict[str, Any]]) -> None:
    """Scores before and after of each run: of the set that selected, and of those that selected nothing."""
    print("\nSpearman x 100, before and after; structure selects the checkpoint, human grades select nothing:")
    for name, result in results.items():
        print(f"  {name}")
        before, after = result["sts_dev_before"], result["sts_dev"]
        print(f"    {before:.2f} to {after:.2f} ({after - before:+.2f})  {result['dev']}, graded by document structure")
        for other, scores in result["also"].items():
            gain = f"{scores['after'] - scores['before']:+.2f}; {scores['low']:+.2f} to {scores['high']:+.2f}"
            print(f"    {scores['before']:.2f} to {scores['after']:.2f} ({gain})  {other}, graded by people")
        if not result["best_step"]:
            print("    No step beat the untrained encoder, so model/ holds that one.")


def show_clusters(sentences: list[str], z_ND: np.ndarray, centroids_KD: np.ndarray) -> None:
    """The largest clusters, each by the sentences nearest to its members' mean."""
    nearest_N = (z_ND @ centroids_KD.T).argmax(axis=1)
    sizes_K = np.bincount(nearest_N, minlength=len(centroids_KD))
    print(
        f"\n{(sizes_K > 0).sum()} of {len(sizes_K)} clusters hold sentences. The largest, by their most typical ones:"
    )
    for cluster in np.argsort(-sizes_K)[:CLUSTERS_SHOWN]:
        members = np.flatnonzero(nearest_N == cluster)
        typical = members[np.argsort(-(z_ND[members] @ unit_rows(z_ND[members].mean(axis=0, keepdims=True))[0]))[:3]]
        print(f"\n  cluster {cluster}, {sizes_K[cluster]:,} sentences")
        for row in typical:
            print(f"    {shorten(sentences[row])}")


def show_neighbours(sentences: list[str], before: np.ndarray, after: np.ndarray, seed: int) -> None:
    print("\nNearest neighbours of a few sentences, before and after:")
    for row in np.random.default_rng(seed).choice(len(sentences), QUERIES, replace=False):
        print(f"\n  {shorten(sentences[row])}")
        for label, z_ND in (("before", before), ("after", after)):
            cosine_N = z_ND @ z_ND[row]
            cosine_N[row] = -np.inf
            for neighbour in np.argsort(-cosine_N)[:2]:
                print(f"    {label:6} {cosine_N[neighbour]:.2f}  {shorten(sentences[neighbour])}")


def shorten(sentence: str, width: int = 100) -> str:
    return sentence if len(sentence) <= width else sentence[: width - 3].rstrip() + "..."


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
