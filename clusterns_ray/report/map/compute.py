"""Clusters, false and hard negatives, terms and places of the sentences of a map.

Shape suffixes: N sentences, D width, K clusters, S similar sentences.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from clusterns_ray.clustering.bank import draw_negatives, list_members
from clusterns_ray.clustering.kmeans import cosine_matrix, nearest_two
from clusterns_ray.data.sampler import random_draws
from clusterns_ray.inference.encode import unit_rows
from clusterns_ray.io.events import OnNote
from clusterns_ray.losses import row_blocks, similar_mask
from clusterns_ray.report.map.corpus_map import CorpusMap, Sample
from clusterns_ray.report.map.layout import has_opentsne, lay_out, trustworthiness
from clusterns_ray.report.map.terms import distinguishing_terms

SIMILAR = 5
"""False negatives of a sentence that are kept: the most similar ones."""


class Rule(NamedTuple):
    """Which sentences training would take as false negatives, and what as hard negatives."""

    of_corpus: bool = False
    """hard negatives are sentences drawn from the second nearest cluster, not its centroid"""
    cosine: float = -2.0
    """false negatives share a cluster and have a larger cosine than this"""
    bank_negatives: int = 1
    """sentences drawn for each"""


def make_map(
    sample: Sample,
    z_ND: np.ndarray,
    before_ND: np.ndarray | None,
    centroids_KD: np.ndarray,
    rule: Rule,
    seed: int,
    note: OnNote = lambda text: None,
) -> CorpusMap:
    """Assign, lay out and describe the sentences of a sample.

    Args:
        z_ND, before_ND: float32 embeddings of the sample by the encoder, and by the one it was trained from.
        centroids_KD: of any length, in the space of ``z_ND``.
    """
    unit_ND = unit_rows(z_ND)
    unit, centroids = torch.as_tensor(unit_ND), torch.as_tensor(centroids_KD)
    cos_NK = cosine_matrix(unit, centroids)
    cluster, second = nearest_two(cos_NK)
    similar, similar_cosine = most_similar(unit, cluster, rule.cosine)
    hard = None
    if rule.of_corpus:
        places = torch.arange(len(unit))
        draws = random_draws(np.arange(len(unit) * rule.bank_negatives), "map", seed).reshape(len(unit), -1)
        members = list_members(cluster, len(centroids))
        hard = draw_negatives(cos_NK, places, torch.as_tensor(draws), members).numpy()
    cluster_N, k = cluster.numpy(), len(centroids)
    terms = distinguishing_terms(sample.texts, cluster_N, k)

    layout = "openTSNE" if has_opentsne() else "scikit-learn"
    note(f"Laying out {len(unit):,} sentences by t-SNE ({layout})")
    if layout == "scikit-learn" and len(unit) > 5000:
        note('This takes several minutes; openTSNE is quicker: pip install "clusterns-ray[map]"')
    xy_N2 = lay_out(unit_ND, seed, note=note)
    facts = {"total": sample.total, "seed": seed, "layout": layout}
    facts["trustworthiness"] = trustworthiness(unit_ND, xy_N2, seed)
    before_N2 = None
    if before_ND is not None:
        note("Laying out the same sentences as the encoder saw them before training")
        unit_before_ND = unit_rows(before_ND)
        before_N2 = lay_out(unit_before_ND, seed, xy_N2, note)
        facts["trustworthiness_before"] = trustworthiness(unit_before_ND, before_N2, seed)
    return CorpusMap(
        texts=sample.texts,
        rows_N=sample.rows_N,
        xy_N2=xy_N2,
        before_N2=before_N2,
        cluster_N=cluster_N,
        cosine_N=cos_NK.gather(1, cluster[:, None]).squeeze(1).numpy(),
        second_N=second.numpy(),
        similar_NS=similar.numpy(),
        similar_cosine_NS=similar_cosine.numpy(),
        hard_NM=hard,
        terms={int(number): terms[number] for number in np.unique(cluster_N)},
        facts=facts,
    )


def most_similar(unit_ND: torch.Tensor, cluster_N: torch.Tensor, cosine: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The false negatives of each sentence, if all were one batch: the ``SIMILAR`` most similar ones.

    Returns:
        Their places (int64, -1 where there are fewer) and cosines, both (N, S), the most similar first.
    """
    places_NS = torch.full((len(unit_ND), SIMILAR), -1)
    cosines_NS = torch.zeros(len(unit_ND), SIMILAR)
    for members in (torch.nonzero(cluster_N == number).squeeze(1) for number in cluster_N.unique()):
        for rows in row_blocks(len(members)):
            cos_bn = unit_ND[members[rows]] @ unit_ND[members].T
            own_b = torch.arange(rows.start, rows.stop)
            mask_bn = similar_mask(cos_bn, cluster_N[members[rows]], cluster_N[members], own_b, cosine)
            best = cos_bn.masked_fill(~mask_bn, -torch.inf).topk(min(SIMILAR, len(members)))
            there = best.values.isfinite()
            count = there.shape[1]
            places_NS[members[rows], :count] = torch.where(there, members[best.indices], -1)
            cosines_NS[members[rows], :count] = torch.where(there, best.values, 0.0)
    return places_NS, cosines_NS
