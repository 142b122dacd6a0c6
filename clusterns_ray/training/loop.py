"""One run, from top to bottom: data, step, evaluation, checkpoint, export. The same on any number of workers."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clusterns_ray import distributed
from clusterns_ray.backbone import load_language_model
from clusterns_ray.clustering.describe import describe_clusters
from clusterns_ray.clustering.health import ClusterHealth
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import Config
from clusterns_ray.data.batches import BatchOrder, stream_key
from clusterns_ray.data.digests import check_digests, data_digests
from clusterns_ray.data.tokens import TokenStore
from clusterns_ray.encoder import Encoder
from clusterns_ray.errors import ClusterNSError, DataError, Drained, NonFiniteError, StorageError
from clusterns_ray.files import write_json
from clusterns_ray.models import resolve_model
from clusterns_ray.training.alarms import Alarms
from clusterns_ray.training.checkpoint import list_checkpoints, load_newest, replace_directory, save_checkpoint
from clusterns_ray.training.corpus_clusters import CorpusClusters
from clusterns_ray.training.dev import DevSet, encode_together
from clusterns_ray.training.environment import describe_environment
from clusterns_ray.training.exclusive import exclusive
from clusterns_ray.training.layout import Layout, lay_out
from clusterns_ray.training.metrics import MetricsLog, step_metrics
from clusterns_ray.training.mirror import NoMirror
from clusterns_ray.training.mlm import head_state
from clusterns_ray.training.model_card import model_card
from clusterns_ray.training.objective import DTYPES, Objective, TwoViews
from clusterns_ray.training.optim import Optimizer, learning_rate
from clusterns_ray.training.precision import agreed_precision, multiplies_bf16
from clusterns_ray.training.rows import NoRowLog, RowLog
from clusterns_ray.training.sample import sample_centroids, sample_rows, token_ids
from clusterns_ray.training.shards import Shard, ShardReader
from clusterns_ray.training.teacher import Teacher
from clusterns_ray.training.trackers import Trackers
from clusterns_ray.training.views import CachedViews, Views, chunked

Watch = Callable[[dict[str, Any]], None]
"""Told of what happens: ``{"event": "start" | "step" | "evaluation" | "note" | "done", ...}``."""

Report = Callable[[dict[str, Any]], None]
"""Called by every worker after an evaluation; where Ray (or a sweep's scheduler) hears of the run."""

Leave = Callable[[int], bool]
"""Asked by every worker after every step but the last, which it is given: whether all of them have to stop there."""

MAX_SKIPPED_IN_A_ROW = 10

COLLAPSED = -100.0
"""The dev score of embeddings that are all alike, whose correlation is not defined: below any that is."""

ONE_LAST_COPY_S = 60.0
"""How long a run that failed still copies what it had finished."""

DESCRIBED = 2048
"""Sentences of the corpus by which the clusters are described at the end of a run."""


@dataclass
class Progress:
    """What changes besides weights, optimiser and centroids."""

    step: int = 0
    """steps done"""
    best_step: int = 0
    best_score: float | None = None
    score_before: float | None = None
    last_score: float | None = None
    evaluations_without_gain: int = 0
    clustering_started_at: int | None = None
    seconds: float = 0.0
    """spent in steps and evaluations, over all resumptions"""
    precision: str = "fp32"
    """of matrix products; what ``train.precision: auto`` was when the run began"""
    checkpoint_seconds: float = 0.0
    """that the loop waited for checkpoints and for their last copies, over all resumptions but for the checkpoints that
    these began with"""


def train_worker(
    config: Config,
    *,
    tokens_dir: str | Path,
    sts_dir: str | Path | None,
    run_dir: str | Path,
    device: torch.device,
    watch: Watch,
    report: Report = lambda metrics: None,
    leave: Leave = lambda step: False,
    command: Sequence[str] = (),
    score_before: float | None = None,
    mirror: NoMirror | None = None,
) -> dict[str, Any]:
    """Train on this worker, alone or as one of a process group, resuming from the newest checkpoint of ``run_dir``.

    Args:
        command: what started the run, for ``environment.json``.
        score_before: the dev score of the untrained encoder, where it is known already.
        mirror: copies the run to where it belongs, where ``run_dir`` is this machine's alone.

    Returns:
        What ``result.json`` holds; the same on every worker but for the seconds.

    Raises:
        NonFiniteError: gradients stay NaN or infinite.
        CheckpointError: checkpoints are there but none can be used.
        Drained: ``leave`` said so; the last step is in a checkpoint.
    """
    mirror = mirror or NoMirror(Path(run_dir))
    with one_writer(Path(run_dir), mirror, lambda text: watch({"event": "note", "text": text})):
        mirror.pull(files=distributed.rank() == 0)
        verify_tokens(Path(tokens_dir), begun=bool(list_checkpoints(Path(run_dir) / "checkpoints")))
        run = Run(config, Path(tokens_dir), sts_dir, Path(run_dir), device, watch, report, mirror)
        run.restore()
        run.write_json("environment.json", describe_environment(device, command, distributed.world_size()))
        try:
            return _train(run, leave, score_before)
        except (Exception, KeyboardInterrupt):
            with suppress(StorageError):  # what failed first is what has to be told
                mirror.finish(ONE_LAST_COPY_S)
            raise
        finally:
            run.trackers.close()
            mirror.stop()


@contextmanager
def one_writer(run_dir: Path, mirror: NoMirror, note: Callable[[str], None]) -> Iterator[None]:
    """Worker 0 takes the run for itself alone; where it may not, all workers raise, and none waits for the others."""
    is_main = distributed.rank() == 0
    refused: ClusterNSError | None = None
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(run_dir, is_main))
            held.enter_context(mirror.alone(is_main, note))
        except ClusterNSError as error:
            refused = error
        reason = distributed.broadcast_object(str(refused) if refused else None)
        if reason is not None:
            raise refused or ClusterNSError(reason)
        yield


def verify_tokens(tokens_dir: Path, begun: bool) -> None:
    """Refuse damaged tokens on all workers together; of a run that begins, worker 0 compares every checksum."""
    refused: DataError | None = None
    if distributed.rank() == 0:
        try:
            TokenStore.open(tokens_dir, verify=not begun)
        except DataError as error:
            refused = error
    reason = distributed.broadcast_object(str(refused) if refused else None)
    if reason is not None:
        raise refused or DataError(reason)


def _train(run: Run, leave: Leave, score_before: float | None) -> dict[str, Any]:
    config = run.config
    run.warm_up_reducer()
    run.watch(
        {
            "event": "start",
            "step": run.progress.step,
            "total_steps": run.total_steps,
            "rows": len(run.tokens),
            "num_clusters": config.clustering.num_clusters,
        }
    )
    if run.progress.score_before is None:
        run.evaluate_before(score_before)

    while run.progress.step < run.total_steps and not run.out_of_patience():
        began = time.perf_counter()
        step = run.progress.step
        layout, shards = run.batch(step)
        run.row_log.append(step, layout)

        views = run.encode(shards)
        step_loss = run.objective(views.z1_bD, views.z2_bD, layout, views.mlm, run.teach(shards))
        run.health.observe(run.clustering.centroids_KD, step_loss.counts_K)
        rate = learning_rate(step, run.total_steps, config.train)
        grad_norm = run.optimizer.step(step_loss.to_backward, rate, views.backward)

        run.progress.step = step + 1
        run.note_start_of_clustering()
        if run.due(config.runtime.log_every_steps):
            run.log_step(step_loss, layout, rate, grad_norm)
        if run.due(config.evaluation.every_steps):
            run.evaluate()
        run.progress.seconds += time.perf_counter() - began
        leaving = run.progress.step < run.total_steps and leave(run.progress.step)
        if leaving or run.due(run.checkpoint_every):
            run.save()
        if leaving:
            run.note(f"A machine is about to go: stopped after step {run.progress.step}, which is in a checkpoint.")
            raise Drained(f"stopped after step {run.progress.step}, as a machine was about to go")

    return run.finish()


class Run:
    """The parts of a run, and what the loop asks of them."""

    def __init__(
        self,
        config: Config,
        tokens_dir: Path,
        sts_dir: str | Path | None,
        run_dir: Path,
        device: torch.device,
        watch: Watch,
        report: Report,
        mirror: NoMirror | None = None,
    ):
        self.config, self.run_dir, self.device, self.report = config, run_dir, device, report
        self.is_main = distributed.rank() == 0
        self.mirror = mirror or NoMirror(run_dir)
        self.watch: Watch = watch if self.is_main else lambda event: None
        self.tokens = TokenStore.open(tokens_dir)
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
        self.checkpoint_every = config.runtime.checkpoint_every_steps or config.evaluation.every_steps

        precision = agreed_precision(config.train.precision, device)
        self.encoder = Encoder.for_training(config.encoder, stream_key("head", config.seed)).to(device).train()
        self.shards = ShardReader(config, self.tokens, self.encoder.tokenizer, device)
        self.views = TwoViews(self.encoder, precision, self.load_language_model())
        self.teacher = Teacher(config.loss.teacher, device) if config.loss.teacher else None
        self.model = distributed.data_parallel(self.views)
        self.optimizer = Optimizer(self.views, config.train, precision, device)
        c = config.clustering
        self.clustering = Clustering(c.num_clusters, c.start_cosine, c.rate, c.update)
        self.corpus = None
        if c.scope == "corpus" and c.num_clusters:
            self.corpus = CorpusClusters(config, self.clustering, self.tokens, self.encoder, run_dir, self.note)
        by_kmeans = partial(sample_centroids, config, self.tokens, self.encoder)
        self.objective = Objective(
            config.loss,
            self.clustering,
            first_centroid=stream_key("first_centroid", config.seed),
            initial_centroids=by_kmeans if c.init == "kmeans" else None,
            corpus=self.corpus,
        )
        self.health = ClusterHealth()
        self.alarms = Alarms(c.num_clusters, of_corpus=c.scope == "corpus")
        self.dev = DevSet(sts_dir, config.evaluation.dev, self.encoder) if sts_dir else None
        self.digests = data_digests(self.tokens.manifest, self.dev and self.dev.pairs)
        self.progress = Progress(precision=precision)
        self.compute_in(precision)
        self.metrics: MetricsLog | None = None
        self.trackers = Trackers()
        self.row_log = RowLog(run_dir / "rows") if config.runtime.log_rows else NoRowLog()
        self.last_log = (time.perf_counter(), 0)

    # ---- one step -----------------------------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[Layout, list[Shard]]:
        """The global batch of a step, and this worker's shards of it on the device."""
        epoch, step_in_epoch = divmod(step, self.order.steps_per_epoch)
        rows = self.order.sample_ids(epoch, step_in_epoch)
        layout = lay_out(rows, self.tokens.lengths(rows), self.config.train.shards)
        return layout, [self.shards(layout, shard, step) for shard in layout.hands[layout.rank]]

    def encode(self, shards: list[Shard]) -> Views:
        """Both views of this worker's shards."""
        rows = self.config.train.cache_chunk
        return Views(self.model, shards) if rows is None else CachedViews(self.model, chunked(shards, rows))

    def teach(self, shards: list[Shard]) -> torch.Tensor | None:
        """The teacher's embeddings of this worker's shards, where there is one."""
        return None if self.teacher is None else self.teacher(shards, self.views.dtype)

    def load_language_model(self) -> Any:
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

    def due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.total_steps

    def out_of_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def warm_up_reducer(self) -> None:
        """Let DDP settle its buckets before the first step, on a gradient that is thrown away.

        DDP reorders its buckets after the first backward pass, and with three workers or more the order decides
        how a sum rounds: a resumed run has to sum as the first one did.
        """
        if self.model is self.views:
            return
        z1_bD, z2_bD, mlm = self.model([self.shards.dummy()])
        (z1_bD.sum() + z2_bD.sum() + mlm[0]).backward()
        self.optimizer.adamw.zero_grad(set_to_none=True)

    # ---- what is told -------------------------------------------------------------------------------------------

    def record(self, event: dict[str, Any]) -> None:
        """Into ``metrics.jsonl`` and to whoever watches; on worker 0 alone."""
        if self.is_main and self.metrics:
            record = {key: value for key, value in event.items() if key != "event"}
            self.metrics.append(record)
            self.trackers.log(record)
        self.watch(event)

    def note(self, text: str) -> None:
        self.watch({"event": "note", "text": text})

    def write_json(self, name: str, value: Any) -> None:
        """A file of the run; worker 0 alone."""
        if self.is_main:
            write_json(self.run_dir / name, value)
            self.mirror.push(name)

    def log_step(self, step_loss: Any, layout: Layout, rate: float, grad_norm: torch.Tensor) -> None:
        loss = self.config.loss
        used = {"distillation": loss.teacher is not None, "mlm": loss.mlm_weight > 0}
        values: dict[str, Any] = step_metrics(step_loss, layout.size, [name for name in used if not used[name]])
        if step_loss.counts_K is not None:
            values["empty_clusters"] = self.corpus.bank.empty() if self.corpus else self.health.empty()
        skipped, in_a_row = self.optimizer.skipped.tolist()
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"The last {int(in_a_row)} gradients before step {self.progress.step} were NaN or infinite, so the "
                f"weights stand still. Lower train.learning_rate ({self.config.train.learning_rate}), raise "
                f"loss.temperature ({loss.temperature}), or set train.precision to fp32. The checkpoints "
                "before it are whole."
            )
        now = time.perf_counter()
        (then, step), self.last_log = self.last_log, (now, self.progress.step)
        batch = self.config.train.global_batch_size
        self.record(
            {
                "event": "step",
                "step": self.progress.step,
                "epoch": self.epoch(),
                **values,
                "learning_rate": rate,
                "grad_norm": float(grad_norm),
                "skipped_steps": int(skipped),
                "sentences_per_second": round((self.progress.step - step) * batch / (now - then), 2),
            }
        )
        for text in self.alarms(self.progress.step, values, self.health.steps):
            self.note(text)

    def note_start_of_clustering(self) -> None:
        if self.clustering.started and self.progress.clustering_started_at is None:
            self.progress.clustering_started_at = self.progress.step
            self.note(
                f"Clustering starts after step {self.progress.step} with {self.clustering.num_clusters} centroids."
            )

    def epoch(self) -> float:
        return round(self.progress.step / self.order.steps_per_epoch, 4)

    # ---- evaluation, export, checkpoint -------------------------------------------------------------------------

    def evaluate_before(self, known: float | None) -> None:
        """Score the untrained encoder, or take the score that is known."""
        if not self.dev:
            return
        if known is None:
            z_ND = self.dev.encode(self.encoder)
            self.progress.score_before, health = self.dev.score(z_ND), self.dev_health(z_ND)
        else:
            self.progress.score_before, health = known, {}
        self.record({"event": "evaluation", "step": 0, "epoch": 0.0, "sts_dev": self.progress.score_before, **health})
        self.last_log = (time.perf_counter(), 0)

    def dev_health(self, z_ND: np.ndarray) -> dict[str, Any]:
        """What an evaluation tells besides the score; worker 0 alone records it."""
        assert self.dev is not None
        found = self.dev.geometry(z_ND) if self.is_main else {}
        if self.clustering.centroids_KD is not None and self.health.steps:
            found |= self.health.take(self.clustering.centroids_KD)
        return found

    def evaluate(self) -> None:
        """Score the dev set on all workers; export the model when it is the best so far."""
        if not self.dev:
            return
        paused = time.perf_counter()
        z_ND = self.dev.encode(self.encoder)
        score = self.progress.last_score = self.dev.score(z_ND)
        if not math.isfinite(score):
            self.note(f"The dev score is {score}: the embeddings are all alike or not finite.")
            score = self.progress.last_score = COLLAPSED
        best = self.progress.best_score is None or score > self.progress.best_score
        if best:
            self.progress.best_score, self.progress.best_step = score, self.progress.step
            self.progress.evaluations_without_gain = 0
            self.export()
        else:
            self.progress.evaluations_without_gain += 1
        told = {"step": self.progress.step, "epoch": self.epoch(), "sts_dev": score, "best": best}
        self.record({"event": "evaluation", **told, **self.dev_health(z_ND)})
        self.report({"step": self.progress.step, "sts_dev": score, "best_sts_dev": self.progress.best_score})
        then, step = self.last_log
        self.last_log = (then + time.perf_counter() - paused, step)

    def export(self) -> None:
        """Write ``model/`` (and the centroids beside it) in one step each; worker 0 alone."""
        if not self.is_main:
            return

        def write(path: Path) -> None:
            self.encoder.save(path)
            (path / "README.md").write_text(model_card(self.config, asdict(self.progress)), encoding="utf-8")

        replace_directory(self.run_dir / "model", write)
        self.mirror.push("model")
        if self.clustering.centroids_KD is not None:
            temporary = self.run_dir / ".centroids.npy"
            np.save(temporary, self.clustering.centroids_KD.cpu().numpy())
            temporary.replace(self.run_dir / "centroids.npy")
            self.mirror.push("centroids.npy")

    def save(self) -> None:
        """Write a checkpoint of everything that changes; worker 0 alone, as all workers hold the same."""
        if not self.is_main:
            return
        began = time.perf_counter()
        state = {
            "encoder": self.encoder.state_dict(),
            "language_model_head": head_state(self.views.language_model) if self.views.language_model else None,
            "optimizer": self.optimizer.state_dict(),
            "clustering": self.clustering.state_dict(),
            "health": self.health.state_dict(),
            "progress": asdict(self.progress),
            "data": self.digests,
        }
        if self.corpus:
            state["corpus"] = self.corpus.state_dict()
        keep = self.config.runtime.keep
        path = save_checkpoint(self.run_dir / "checkpoints", self.progress.step, state, self.config.fingerprint(), keep)
        self.mirror.push("metrics.jsonl")
        self.mirror.push(f"checkpoints/{path.name}")
        self.mirror.keep_newest("checkpoints", keep)
        self.progress.checkpoint_seconds += time.perf_counter() - began

    def restore(self) -> None:
        """Take up the newest whole checkpoint, which worker 0 chooses for all."""
        directory, fingerprint = self.run_dir / "checkpoints", self.config.fingerprint()
        found = load_newest(directory, fingerprint, self.note)
        step = distributed.broadcast_object(found[0] if found else 0)
        if (found[0] if found else 0) != step:
            raise RuntimeError(f"worker {distributed.rank()} does not see the checkpoint of step {step} in {directory}")
        if found:
            state = found[1]
            check_digests(f"The run {self.config.runtime.name!r}", state.get("data"), self.digests)
            self.encoder.load_state_dict(state["encoder"])
            if self.views.language_model is not None:
                self.views.language_model.load_state_dict(state["language_model_head"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            self.clustering.load_state_dict(state["clustering"], self.device)
            self.health.load_state_dict(state["health"], self.device)
            if self.corpus:
                self.corpus.load_state_dict(state["corpus"])
            self.progress = Progress(**{"precision": self.progress.precision, **state["progress"]})
            self.compute_in(self.progress.precision)
            chosen = self.config.train.precision == "auto" and self.progress.precision == "bf16"
            if chosen and not multiplies_bf16(self.device):
                self.note(
                    "This run was begun in bf16, which this machine only emulates, slowly: it goes on so, to stay the "
                    "same run. For fp32 begin another one, with train.precision=fp32."
                )
        if self.is_main:
            self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", self.progress.step if found else -1)
            self.mirror.begin(self.note)
            self.trackers.begin(self.config, self.run_dir, self.progress.step, self.note)
        self.last_log = (time.perf_counter(), self.progress.step)

    def compute_in(self, precision: str) -> None:
        """Training, and all that is encoded within it: the dev set, the bank of the corpus."""
        self.views.dtype = self.encoder.autocast_dtype = DTYPES[precision]

    def describe_clusters(self) -> None:
        """Write ``clusters.json``: a sample of the corpus in the clusters of the last step, by all workers."""
        centroids_KD = self.clustering.centroids_KD
        if centroids_KD is None:
            return
        rows = sample_rows(self.tokens, DESCRIBED, "describe", self.config.seed)
        z_ND = encode_together(self.encoder, token_ids(self.tokens, rows), project=True)
        clusters = describe_clusters(z_ND, centroids_KD.cpu().numpy(), lambda found: self.tokens.texts(rows[found]))
        self.write_json("clusters.json", {"step": self.progress.step, "sample": len(rows), "clusters": clusters})

    def finish(self) -> dict[str, Any]:
        """Export if nothing was selected, describe the clusters, write ``result.json``, and say how it went."""
        progress = self.progress
        self.describe_clusters()
        if self.dev is None:
            progress.best_step = progress.step
            self.export()
        self.trackers.close()
        if self.is_main:
            began = time.perf_counter()
            self.mirror.push("metrics.jsonl")
            if (self.run_dir / "tensorboard").is_dir():
                self.mirror.push("tensorboard")
            self.mirror.finish(self.config.runtime.step_timeout_s)
            progress.checkpoint_seconds += time.perf_counter() - began
        result = {
            "best_step": progress.best_step,
            "sts_dev": progress.best_score,
            "sts_dev_before": progress.score_before,
            "sts_dev_last": progress.last_score,
            "dev": self.config.evaluation.dev if self.dev else None,
            "steps": progress.step,
            "stopped_early": progress.step < self.total_steps,
            "clustering_started_at": progress.clustering_started_at,
            "precision": progress.precision,
            "seconds": round(progress.seconds, 1),
            "checkpoint_seconds": round(progress.checkpoint_seconds, 2),
            "num_workers": distributed.world_size(),
            "model": self.mirror.address("model"),
            "fingerprint": self.config.fingerprint(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        self.write_json("result.json", result)  # last, as it says that everything is there
        self.mirror.finish(self.config.runtime.step_timeout_s)
        self.watch({"event": "done", **result})
        return result
