"""Warnings of a run whose embeddings collapse or whose clusters empty, in the step in which it shows."""

from __future__ import annotations

from typing import Any

from clusterns_ray.clustering.health import EMPTY_AFTER

EMPTY_SHARE = 0.3
SPREAD_COSINE, COLLAPSED_COSINE = 0.8, 0.9
"""A mean cosine that was below the first and is above the second has come back; between them it only wavers."""


class CollapseMonitor:
    """Checks each logged step; warns once of each problem, and again if it returns after it had passed."""

    def __init__(self, num_clusters: int, of_corpus: bool = False) -> None:
        """
        Args:
            of_corpus: whether the clusters are those of a bank, not of the batches.
        """
        self.num_clusters = num_clusters
        self.of_corpus = of_corpus
        self.was_spread = False
        self.active: set[str] = set()
        """problems that the step before had"""

    def __call__(self, step: int, values: dict[str, Any], steps_clustered: int) -> list[str]:
        """Warnings that are new at this step.

        Args:
            values: of ``metrics.jsonl``: ``mean_cosine``, and ``empty_clusters`` once clustering has started.
            steps_clustered: steps since clustering started.
        """
        cosine = values["mean_cosine"]
        empty = values.get("empty_clusters", 0)
        warnings: dict[str, str] = {}
        if self.was_spread and cosine > COLLAPSED_COSINE:
            warnings["cosine"] = (
                f"Collapse at step {step}: the mean cosine of the batch is back at {cosine:.2f}, so all sentences look "
                "alike. Lower train.learning_rate or loss.bml_weight; the best model so far is kept."
            )
        if steps_clustered >= EMPTY_AFTER and empty >= EMPTY_SHARE * self.num_clusters:
            warnings["empty"] = f"At step {step}, {empty} of {self.num_clusters} clusters " + (
                "hold no sentence of the bank. Use fewer clusters (clustering.num_clusters), or a larger bank "
                "(clustering.bank_rows)."
                if self.of_corpus
                else f"have had no sentence for {EMPTY_AFTER} steps. Use fewer clusters (clustering.num_clusters), or "
                "move centroids faster (clustering.rate)."
            )
        self.was_spread = self.was_spread or cosine <= SPREAD_COSINE
        new = [text for name, text in warnings.items() if name not in self.active]
        self.active = set(warnings)
        return new
