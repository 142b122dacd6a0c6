"""What a run leaves for others: the best encoder in ``model/``, the centroids, and the clusters in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray.clustering.describe import describe_clusters
from clusterns_ray.errors import CheckpointError
from clusterns_ray.io.events import OnNote
from clusterns_ray.io.files import replacing, write_manifest
from clusterns_ray.training.checkpoint import Checkpointer, replace_directory
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.kmeans_init import sample_rows, token_ids
from clusterns_ray.training.model_card import model_card
from clusterns_ray.training.parts import TrainingParts
from clusterns_ray.training.run_access import on_worker_0
from clusterns_ray.training.run_files import model_damage
from clusterns_ray.training.state import TrainState
from clusterns_ray.training.validation import encode_together

DESCRIBED_SENTENCES = 2048
"""Sentences of the corpus by which the clusters are described at the end of a run."""


class Exporter:
    """Writes the encoder as the step of ``state.best_step`` left it."""

    def __init__(self, context: RunContext, parts: TrainingParts, state: TrainState) -> None:
        self.context, self.parts, self.state = context, parts, state
        self.fingerprint = context.config.fingerprint()

    def export(self) -> None:
        """Write ``model/`` (and the centroids beside it) in one step each; worker 0 does."""
        on_worker_0(self._export, self.context.run_dir / "model")

    def repair(self, newest: dict[str, Any], checkpointer: Checkpointer, note: OnNote) -> None:
        """Before a resumed run goes on, export its best model again where that is missing or damaged; worker 0 does.

        Args:
            newest: the state of the checkpoint from which it goes on, which is not loaded yet.

        Raises:
            CheckpointError: no checkpoint holds the weights of that step any more.
        """
        on_worker_0(lambda: self._repair(newest, checkpointer, note), self.context.run_dir / "model")

    def describe_clusters(self) -> None:
        """Write ``clusters.json``: a sample of the corpus in the clusters of the last step, by all workers."""
        centroids_KD, tokens = self.parts.clustering.centroids_KD, self.parts.tokens
        if centroids_KD is None:
            return
        rows = sample_rows(tokens, DESCRIBED_SENTENCES, "describe", self.context.config.seed)
        z_ND = encode_together(self.parts.encoder, token_ids(tokens, rows), project=True)
        clusters = describe_clusters(z_ND, centroids_KD.cpu().numpy(), lambda chosen: tokens.texts(rows[chosen]))
        self.context.write_json("clusters.json", {"step": self.state.step, "sample": len(rows), "clusters": clusters})

    def _export(self) -> None:
        run_dir, uploader = self.context.run_dir, self.context.uploader

        def write(path: Path) -> None:
            self.parts.encoder.save(path)
            card = model_card(self.context.config, self.state)
            (path / "README.md").write_text(card, encoding="utf-8")
            write_manifest(path, step=self.state.best_step, fingerprint=self.fingerprint)

        replace_directory(run_dir / "model", write)
        uploader.push("model")
        centroids_KD = self.parts.clustering.centroids_KD
        if centroids_KD is not None:
            with replacing(run_dir / "centroids.npy") as temporary, temporary.open("wb") as file:
                np.save(file, centroids_KD.cpu().numpy())
            uploader.push("centroids.npy")

    def _repair(self, newest: dict[str, Any], checkpointer: Checkpointer, note: OnNote) -> None:
        progress = TrainState(**newest["progress"])
        if progress.best_score is None:
            return  # nothing was exported yet
        model, best = self.context.run_dir / "model", progress.best_step
        damage = model_damage(model, self.fingerprint, best, progress.step)
        if damage is None:
            return
        if best == 0:  # the weights are still those of the untrained encoder
            self.state.score_before = self.state.best_score = progress.score_before
        else:
            kept = checkpointer.of_step(best)
            if kept is None:
                raise CheckpointError(
                    f"{damage}, and no checkpoint of step {best}, the best one, is left to write it from. Restore "
                    f"{str(model)!r} from a copy; or remove {str(self.context.run_dir)!r} and give the same command, "
                    "which trains the same model anew."
                )
            checkpointer.load(kept, only=("data", "encoder", "clustering", "progress"))
        note(f"{damage}: the model of step {best} is written anew.")
        self._export()
