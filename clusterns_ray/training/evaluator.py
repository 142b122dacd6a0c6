"""The dev score of a run: measured on all workers together, it chooses the best step and ends a run without gain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clusterns_ray import distributed
from clusterns_ray.config import Config
from clusterns_ray.errors import NonFiniteError
from clusterns_ray.evaluation.compare import compare_sts, fall_text
from clusterns_ray.evaluation.sts import StsTests, pair_cosines, spearman
from clusterns_ray.io.events import OnNote
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.models.settings import read_settings
from clusterns_ray.training.state import TrainState
from clusterns_ray.training.validation import DevSet

COLLAPSED = -100.0
"""The dev score of embeddings that are all alike, whose correlation is not defined: below any that is."""

RESAMPLES = 1000
"""Bootstrap resamples of a set that selects nothing, at each evaluation."""


class Evaluation(NamedTuple):
    """The scores of one evaluation."""

    score: float
    """Spearman x 100 on the dev set"""
    best: bool
    """whether the model is better than every one before, the untrained encoder included"""
    geometry: dict[str, Any]
    """how the embeddings lie, for the record; empty where they were not computed, and on workers but the first"""
    also: dict[str, float]
    """scores of the sets that select nothing, as ``also TASK/SUBSET``"""


def _by_name(also: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"also {name}": scores["after"] for name, scores in also.items()}


class Evaluator:
    """Scores the encoder on the dev set, and keeps in the run's state which step was the best."""

    def __init__(
        self,
        config: Config,
        sts_dir: str | Path | None,
        encoder: Encoder,
        state: TrainState,
        note: OnNote = lambda text: None,
    ) -> None:
        """
        Args:
            sts_dir: the directory of the dev set; None for a run without one, which is never evaluated.
        """
        self.config, self.sts_dir, self.encoder, self.state, self.note = config, sts_dir, encoder, state, note
        self.dev = DevSet(sts_dir, config.evaluation.dev, encoder) if sts_dir else None
        self.also = [DevSet(sts_dir, name, encoder) for name in config.evaluation.also] if sts_dir else []
        self._warned: set[str] = set()

    def evaluate_untrained(self, known_score: float | None = None) -> Evaluation:
        """Score the encoder before training, or take the score that is known: the first best model.

        Raises:
            NonFiniteError: its embeddings are NaN or infinite.
        """
        geometry = {}
        if known_score is None:
            z_ND = self._encode()
            if not np.isfinite(z_ND).all():
                raise NonFiniteError(
                    f"encoder.name is {self.config.encoder.name!r}, whose embeddings of the dev set are NaN or "
                    f"infinite before training (in {self.state.precision}). Check that model, or set "
                    "train.precision to fp32."
                )
            score, geometry = self._score(z_ND), self._geometry(z_ND)
            self._compare_with_own_settings(score)
        else:
            score = known_score
        self.state.score_before = self.state.best_score = score
        cosines = {also.name: self._cosines(also) for also in self.also}
        self.state.also_cosines_before = {name: values.tolist() for name, values in cosines.items()}
        self.state.also = self._compare(cosines)
        return Evaluation(score, True, geometry, _by_name(self.state.also))

    def evaluate(self) -> Evaluation:
        """Score the encoder after the step that the run's state is at."""
        state = self.state
        z_ND = self._encode()
        score = state.last_score = self._score(z_ND)
        if state.best_trained_score is None or score > state.best_trained_score:
            state.best_trained_score, state.evaluations_without_gain = score, 0
        else:
            state.evaluations_without_gain += 1
        best = state.best_score is None or score > state.best_score
        if best:
            state.best_score, state.best_step = score, state.step
        also = self._compare({also.name: self._cosines(also) for also in self.also})
        if best:
            state.also = also
        self._warn_of_falls(also)
        return Evaluation(score, best, self._geometry(z_ND), _by_name(also))

    def _cosines(self, also: DevSet) -> np.ndarray:
        return pair_cosines([also.pairs], lambda _: also.encode(self.encoder))[0]

    def _compare(self, after: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Scores of the further sets, and how they differ from those before training; the same on every worker.

        Args:
            after: the cosines of the pairs of each set.
        """
        scores = {}
        if distributed.rank() == 0:
            before = {name: np.array(cosines) for name, cosines in self.state.also_cosines_before.items()}
            for number, also in enumerate(self.also):
                tests = StsTests({}, [also.pairs])
                difference = compare_sts(tests, after, before, seed=number, resamples=RESAMPLES)[also.name]
                scores[also.name] = {
                    "before": 100 * spearman(before[also.name], also.pairs.scores),
                    "after": 100 * spearman(after[also.name], also.pairs.scores),
                    "low": difference["low"],
                    "high": difference["high"],
                }
        return distributed.broadcast_object(scores)

    def _warn_of_falls(self, also: dict[str, dict[str, float]]) -> None:
        """Say once of each set that the model got worse on it than chance in its pairs would explain."""
        for name, scores in also.items():
            if scores["high"] < 0 and name not in self._warned:
                self._warned.add(name)
                self.note(fall_text(name, scores, f"at step {self.state.step}", self.config.evaluation.dev))

    def out_of_patience(self) -> bool:
        """Whether ``evaluation.patience`` evaluations in a row brought no better score."""
        patience = self.config.evaluation.patience
        return patience is not None and self.state.evaluations_without_gain >= patience

    def _encode(self) -> np.ndarray:
        assert self.dev is not None
        return self.dev.encode(self.encoder)

    def _score(self, z_ND: np.ndarray) -> float:
        """The score of dev embeddings; :data:`COLLAPSED`, with a note, where there is none."""
        assert self.dev is not None
        score = self.dev.score(z_ND)
        if math.isfinite(score):
            return score
        finite = np.isfinite(z_ND).all()
        reason = "all embeddings are alike" if finite else "embeddings are NaN or infinite"
        self.note(f"There is no dev score at step {self.state.step}, as {reason}; it counts as {COLLAPSED:.0f}.")
        return COLLAPSED

    def _geometry(self, z_ND: np.ndarray) -> dict[str, Any]:
        assert self.dev is not None
        return self.dev.geometry(z_ND) if distributed.rank() == 0 else {}

    def _compare_with_own_settings(self, chosen_score: float) -> None:
        """Note the score that the model has by its own settings, where the run encodes with others."""
        config = self.config.encoder
        settings = read_settings(resolve_model(config.name), revision=config.revision)
        chosen = (self.encoder.pooling, self.encoder.prompt, self.encoder.denoise)
        if settings.pooling is None or chosen == (settings.pooling, settings.prompt, settings.denoise):
            return
        assert self.dev is not None and self.sts_dir is not None
        own = Encoder.finished(self.encoder.backbone, self.encoder.tokenizer, settings, config.name)
        own.autocast_dtype = self.encoder.autocast_dtype
        dev = DevSet(self.sts_dir, self.config.evaluation.dev, own)
        score = self._score(dev.encode(own))
        self.encoder.train()
        self.note(
            f"{config.name} by its own settings (pooling {own.pooling}) scores {score:.2f} before training; with "
            f"encoder.pooling {self.encoder.pooling} it scores {chosen_score:.2f}."
        )
