"""The module by which sentence-transformers encodes with a prompt around the sentence: an :class:`Encoder` inside.

Named in the ``modules.json`` of such a model; used as ``SentenceTransformer(DIRECTORY, trust_remote_code=True)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sentence_transformers.models import Module  # pyright: ignore[reportMissingImports]
from torch import Tensor

from clusterns_ray.models.encoder import Encoder, pad


class PromptEncoder(Module):
    """Sentences to embeddings, prompt and denoising included."""

    save_in_root = True

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.max_seq_length = encoder.max_length

    def preprocess(self, inputs: Any, prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        self.encoder.max_length = self.max_seq_length
        ids = self.encoder.tokenize([(prompt or "") + text for text in inputs])
        input_ids, attention_mask = pad(ids, self.tokenizer.pad_token_id)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def tokenize(self, texts: list[str], **kwargs: Any) -> dict[str, Tensor]:
        """Do what :meth:`preprocess` does: releases before 6 call it by this name."""
        return self.preprocess(texts)

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        features["sentence_embedding"] = self.encoder(features["input_ids"], features["attention_mask"])
        return features

    def get_sentence_embedding_dimension(self) -> int:
        return self.encoder.width

    def get_embedding_dimension(self) -> int:
        return self.encoder.width

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.encoder.save(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> PromptEncoder:
        if not Path(model_name_or_path).is_dir():
            from huggingface_hub import snapshot_download

            model_name_or_path = snapshot_download(
                model_name_or_path, revision=kwargs.get("revision"), token=kwargs.get("token")
            )
        with torch.random.fork_rng(devices=[]):
            return cls(Encoder.load(model_name_or_path))
