"""The README of an exported model."""

from __future__ import annotations

from clusterns_ray.config import Config
from clusterns_ray.training.state import TrainState

POSITIVES = {"neighbour": "a neighbouring sentence", "crop": "a crop of the sentence"}


def model_card(config: Config, state: TrainState) -> str:
    """Markdown: how to load the model, how it was trained, and what was measured."""
    method = (
        f"ClusterNS with {config.clustering.num_clusters} clusters"
        + (" of the whole corpus" if config.clustering.scope == "corpus" else "")
        if config.clustering.enabled
        else "SimCSE"
    )
    if config.loss.teacher is not None:
        method += f" and the ranking of `{config.loss.teacher}`"
    if config.data.positives != "dropout":
        method += f", with {POSITIVES[config.data.positives]} as the second view"
    before, after = state.score_before, state.best_score
    if after is None or before is None:
        measured = "No dev set was given, so this is the model of the last step."
    elif state.best_step == 0:
        measured = (
            f"This is the untrained encoder: no step of training had a better score on {config.evaluation.dev} than "
            f"its **{before:.2f}** (Spearman x 100)."
        )
    else:
        measured = (
            f"Spearman x 100 on {config.evaluation.dev}, which also chose the step: {before:.2f} before training, "
            f"**{after:.2f}** after step {state.best_step}."
        )
    for name, also in state.also.items():
        measured += f" On {name}, which chose nothing: {also['before']:.2f} before, {also['after']:.2f} after."
    return f"""---
library_name: sentence-transformers
tags: [sentence-transformers, sentence-similarity, feature-extraction, clusterns]
base_model: {config.encoder.name}
---

# A sentence encoder trained without labels

{method}, from `{config.encoder.name}`, on `{config.data.corpus or config.data.documents}`.

{measured}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OF_THIS_DIRECTORY")
embeddings = model.encode(["A first sentence.", "And a second."])
```

Pooling: {config.encoder.pooling}; trained on sentences of up to {config.encoder.max_length} tokens; seed {config.seed};
{state.step} steps of {config.train.global_batch_size} sentences; learning rate {config.train.learning_rate}.
"""
