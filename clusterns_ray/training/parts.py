"""What a step of training computes with: corpus, encoder, objective and optimiser, made from a configuration."""

from __future__ import annotations

from functools import partial

import torch

from clusterns_ray.clustering.health import ClusterHealth
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.data.sampler import BatchOrder, stream_key
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.io.events import OnNote
from clusterns_ray.models.backbone import load_language_model
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.training.batch_layout import BatchLayout, build_batch_layout
from clusterns_ray.training.checkpoint import Stateful
from clusterns_ray.training.collate import Shard, ShardReader
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.corpus_clusters import CorpusClusters
from clusterns_ray.training.hard_negatives import CentroidNegatives, HardNegatives
from clusterns_ray.training.kmeans_init import sample_centroids
from clusterns_ray.training.mlm import LanguageModelHead
from clusterns_ray.training.objective import DTYPES, Objective, TwoViews
from clusterns_ray.training.optim import Optimizer
from clusterns_ray.training.precision import agreed_precision
from clusterns_ray.training.reduction import make_reduction
from clusterns_ray.training.teacher import Teacher
from clusterns_ray.training.views import Views


class TrainingParts:
    """The parts of a step, equal on every worker; tests, ``plan`` and benchmarks take steps with them too."""

    def __init__(self, context: RunContext, device: torch.device, note: OnNote = lambda text: None) -> None:
        config = context.config
        self.config, self.device, self.note = config, device, note
        self.tokens = TokenStore.open(context.tokens_dir)
        self.order = BatchOrder(
            config.seed,
            len(self.tokens),
            config.train.global_batch_size,
            config.train.shards,
            config.data.order,
            self.tokens.lengths,
        )
        epoch_steps = self.order.steps_per_epoch * config.train.epochs
        self.total_steps = min(epoch_steps, config.train.max_steps or epoch_steps)

        self.precision = agreed_precision(config.train.precision, device)
        self.encoder = Encoder.for_training(config.encoder, stream_key("head", config.seed)).to(device).train()
        self.shards = ShardReader(config, self.tokens, self.encoder.tokenizer)
        self.views = TwoViews(self.encoder, self.precision, self._language_model())
        self.teacher = Teacher(config.loss.teacher, device) if config.loss.teacher else None
        self.reduce_by("tree" if config.train.adds_in_tree(gpu=device.type != "cpu") else "all_reduce")
        self.optimizer = Optimizer(self.views, config.train, self.precision, device)
        c = config.clustering
        self.clustering = Clustering(c.num_clusters, c.start_cosine, c.rate, c.update, device)
        self.corpus = None
        if c.enabled and c.scope == "corpus":
            self.corpus = CorpusClusters(config, self.clustering, self.tokens, self.encoder, context.run_dir, note)
        self.objective = Objective(config.loss, self._hard_negatives())
        self.health = ClusterHealth(device)
        self.compute_in(self.precision)

    def batch(self, step: int) -> tuple[BatchLayout, list[Shard]]:
        """The global batch of a step, and this worker's shards of it on the device: joined where they go through the
        model at once and packed, so that nothing is computed shard by shard."""
        epoch, step_in_epoch = divmod(step, self.order.steps_per_epoch)
        rows = self.order.sample_ids(epoch, step_in_epoch)
        layout = build_batch_layout(rows, self.tokens.lengths(rows), self.config.train.shards)
        shards = [self.shards(layout, shard, step) for shard in layout.shards_by_rank[layout.rank]]
        if self.encoder.can_pack():
            shards = [self.shards.join(piece) for piece in self.reduction.pieces(shards, self.config.train.cache_chunk)]
        return layout, [shard.to(self.device) for shard in shards]

    def forward(self, layout: BatchLayout, shards: list[Shard]) -> Views:
        """Both views of the batch, from this worker's shards and those of the others, and the way back through them."""
        return Views(self.reduction, shards, layout, self.config.train.cache_chunk)

    def teacher_embeddings(self, layout: BatchLayout, shards: list[Shard]) -> torch.Tensor | None:
        """The teacher's embeddings of the batch, where there is one."""
        if self.teacher is None:
            return None
        pieces = self.reduction.pieces(shards, None)
        return layout.gather(torch.cat([self.teacher(piece, self.views.dtype) for piece in pieces]))

    def epoch(self, step: int) -> float:
        """How many epochs ``step`` steps are."""
        return round(step / self.order.steps_per_epoch, 4)

    def empty_clusters(self) -> int:
        """Clusters that hold no sentence of the bank, or have had none for a while."""
        return self.corpus.bank.empty() if self.corpus else self.health.empty()

    def compute_in(self, precision: str) -> None:
        """Set the precision of training and of all that is encoded within it: the dev set, the bank of the corpus."""
        self.views.dtype = self.encoder.autocast_dtype = DTYPES[precision]

    def reduce_by(self, name: str) -> None:
        """Set how gradients are added up: ``tree`` or ``all_reduce``."""
        self.reduction_name = name
        self.reduction = make_reduction(name, self.views, self.config.train.shards)

    def stateful(self) -> dict[str, Stateful]:
        """The parts that change, by their names in a checkpoint."""
        parts: dict[str, Stateful] = {
            "encoder": self.encoder,
            "optimizer": self.optimizer,
            "clustering": self.clustering,
            "health": self.health,
        }
        if self.views.language_model is not None:
            parts["language_model_head"] = LanguageModelHead(self.views.language_model)
        if self.corpus is not None:
            parts["corpus"] = self.corpus
        return parts

    def warm_up_reducer(self) -> None:
        """Let DDP settle its buckets before the first step, on a gradient that is thrown away.

        DDP reorders its buckets after the first backward pass, and with three workers or more the order decides
        how a sum rounds: a resumed run has to sum as the first one did.
        """
        model = self.reduction.model
        if model is self.views:
            return
        z1_bD, z2_bD, mlm = model([self.shards.warm_up_shard().to(self.device)])
        (z1_bD.sum() + z2_bD.sum() + mlm[0]).backward()
        self.optimizer.zero_grad()

    def _hard_negatives(self) -> HardNegatives | None:
        """Where hard negatives come from; None for plain SimCSE."""
        config = self.config
        if not config.clustering.enabled or self.corpus is not None:
            return self.corpus
        by_kmeans = partial(sample_centroids, config, self.tokens, self.encoder)
        return CentroidNegatives(
            config.loss,
            self.clustering,
            first_centroid=stream_key("first_centroid", config.seed),
            initial_centroids=by_kmeans if config.clustering.init == "kmeans" else None,
        )

    def _language_model(self) -> torch.nn.Module | None:
        """The head of masked language modelling around the encoder's backbone, where its loss is on."""
        if not self.config.loss.mlm_weight:
            return None
        encoder = self.config.encoder
        source = resolve_model(encoder.name)
        model, drawn = load_language_model(source, self.encoder.backbone, revision=encoder.revision)
        if drawn:
            self.note(
                f"{encoder.name} has no trained head for masked language modelling, so loss.mlm_weight trains one from "
                f"random weights ({len(drawn)} of them, such as {drawn[0]})"
            )
        return model.to(self.device).train()
