"""One run, from top to bottom: data, step, evaluation, checkpoint, export. The same on any number of workers."""

from __future__ import annotations

import math
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clusterns_ray import distributed
from clusterns_ray.clustering.describe import describe_clusters
from clusterns_ray.clustering.health import ClusterHealth
from clusterns_ray.clustering.state import Clustering
from clusterns_ray.config import Config, dump_config
from clusterns_ray.data.digests import check_digests, data_digests
from clusterns_ray.data.sampler import BatchOrder, stream_key
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.errors import CheckpointError, ClusterNSError, Drained, NonFiniteError, StorageError
from clusterns_ray.io.files import (
    json_text,
    remove_partial_files,
    storage_error,
    with_checksum,
    write_atomic,
    write_manifest,
)
from clusterns_ray.io.lease import exclusive
from clusterns_ray.io.uploader import LocalFiles
from clusterns_ray.models.backbone import load_language_model
from clusterns_ray.models.encoder import Encoder
from clusterns_ray.models.resolve import resolve_model
from clusterns_ray.models.settings import read_settings
from clusterns_ray.training.batch_layout import BatchLayout, build_batch_layout
from clusterns_ray.training.checkpoint import (
    list_checkpoints,
    load_newest,
    load_step,
    replace_directory,
    save_checkpoint,
)
from clusterns_ray.training.collapse_monitor import Alarms
from clusterns_ray.training.collate import Shard, ShardReader
from clusterns_ray.training.corpus_clusters import CorpusClusters
from clusterns_ray.training.environment import describe_environment
from clusterns_ray.training.finite import first_not_finite
from clusterns_ray.training.kmeans_init import sample_centroids, sample_rows, token_ids
from clusterns_ray.training.metrics import MetricsLog, step_metrics
from clusterns_ray.training.mlm import head_state
from clusterns_ray.training.model_card import model_card
from clusterns_ray.training.objective import DTYPES, Objective, TwoViews
from clusterns_ray.training.optim import Optimizer, learning_rate
from clusterns_ray.training.precision import agreed_precision, multiplies_bf16
from clusterns_ray.training.row_log import NoRowLog, RowLog
from clusterns_ray.training.run_files import WRITTEN, check_config, model_damage, read_result
from clusterns_ray.training.teacher import Teacher
from clusterns_ray.training.trackers import Trackers
from clusterns_ray.training.validation import DevSet, encode_together
from clusterns_ray.training.views import CachedViews, Views, chunked

OnEvent = Callable[[dict[str, Any]], None]
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

TRIED = 64
"""Sentences of the corpus whose embeddings have to be finite before a model is exported without a dev set."""


@dataclass
class TrainState:
    """What changes besides weights, optimiser and centroids."""

    step: int = 0
    """steps done"""
    best_step: int = 0
    """that of the exported model; 0 is the untrained encoder"""
    best_score: float | None = None
    """the exported model's dev score, never below ``score_before``"""
    best_trained_score: float | None = None
    """the best dev score after a step, which may be below ``score_before``"""
    score_before: float | None = None
    last_score: float | None = None
    evaluations_without_gain: int = 0
    """in a row, without a new ``best_trained_score``: a run whose first steps cost it some score may still gain"""
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
    on_event: OnEvent,
    report: Report = lambda metrics: None,
    leave: Leave = lambda step: False,
    command: Sequence[str] = (),
    score_before: float | None = None,
    uploader: LocalFiles | None = None,
) -> dict[str, Any]:
    """Train on this worker, alone or as one of a process group, resuming from the newest checkpoint of ``run_dir``.

    Args:
        command: what started the run, for ``environment.json``.
        score_before: the dev score of the untrained encoder, where it is known already.
        uploader: copies the run to where it belongs, where ``run_dir`` is this machine's alone.

    Returns:
        What ``result.json`` holds; the same on every worker but for the seconds.

    Raises:
        ConfigError, DataError: the request cannot work; the run's name is still free.
        NonFiniteError: weights or embeddings are NaN or infinite, or gradients stay so.
        CheckpointError: checkpoints are there but none can be used, or the exported model is damaged for good.
        StorageError: a file cannot be read or written.
        Drained: ``leave`` said so; the last step is in a checkpoint.
    """
    run_dir = Path(run_dir)
    uploader = uploader or LocalFiles(run_dir)

    def note(text: str) -> None:
        on_event({"event": "note", "text": text})

    with one_writer(run_dir, uploader, note), storage_errors(run_dir):
        uploader.pull(files=distributed.rank() == 0)
        by_worker_0(lambda: take_over(run_dir, config, uploader.address("").rstrip("/"), note), run_dir)
        begun = bool(list_checkpoints(run_dir / "checkpoints"))
        # Of a run that begins, every checksum is compared.
        by_worker_0(lambda: TokenStore.open(Path(tokens_dir), verify=not begun), Path(tokens_dir))
        run = Run(config, Path(tokens_dir), sts_dir, run_dir, device, on_event, report, uploader)
        run.restore()
        # Only now is the name taken: nothing of a request that is refused stays.
        run.write_text("config.yaml", dump_config(config))
        run.write_json("environment.json", describe_environment(device, command, distributed.world_size()))
        try:
            return _train(run, leave, score_before)
        except (Exception, KeyboardInterrupt):
            with suppress(StorageError):  # what failed first is what has to be told
                uploader.finish(ONE_LAST_COPY_S)
            raise
        finally:
            run.trackers.close()
            uploader.stop()


def take_over(run_dir: Path, config: Config, where: str, note: Callable[[str], None]) -> None:
    """Make sure that the run is of this configuration, and remove what a killed writer left half written.

    Raises:
        ConfigError: the run belongs to another configuration, or its own cannot be read.
    """
    remove_partial_files(run_dir, WRITTEN)
    for name in ("config.yaml", "result.json"):
        path = run_dir / name
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        check_config(text, config, where) if name == "config.yaml" else read_result(text, config, where, note)


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Errors of the operating system as StorageError; where there are several workers, as they are: one that ends so is
    started again with the others, which would otherwise wait for it."""
    try:
        yield
    except OSError as error:
        if distributed.world_size() > 1:
            raise
        raise _written_error(error, place) from error


def by_worker_0(work: Callable[[], Any], place: Path) -> None:
    """Do what one worker does for all. Where it fails, all workers raise, so that none waits for the others.

    Raises:
        StorageError: ``work`` could not read or write its files, which are in ``place``.
        ClusterNSError: what else ``work`` raises of this kind.
    """
    failed: ClusterNSError | None = None
    if distributed.rank() == 0:
        try:
            work()
        except ClusterNSError as error:
            failed = error
        except Exception as error:
            failed = _written_error(error, place)
            failed.__cause__ = error
    reason = distributed.broadcast_object(str(failed) if failed else None)
    if reason is not None:
        raise failed or ClusterNSError(reason)


def _written_error(error: Exception, place: Path) -> StorageError:
    """The error as one of storage; raises it as it is where it is none."""
    told = storage_error(error, place, "Then give the same command again: it goes on from the newest checkpoint.")
    if told is None:
        raise error
    return told


@contextmanager
def one_writer(run_dir: Path, uploader: LocalFiles, note: Callable[[str], None]) -> Iterator[None]:
    """Worker 0 takes the run for itself alone; where it may not, all workers raise, and none waits for the others."""
    is_main = distributed.rank() == 0
    refused: ClusterNSError | None = None
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(run_dir, is_main))
            held.enter_context(uploader.writer_lease(is_main, note))
        except ClusterNSError as error:
            refused = error
        reason = distributed.broadcast_object(str(refused) if refused else None)
        if reason is not None:
            raise refused or ClusterNSError(reason)
        yield


def _train(run: Run, leave: Leave, score_before: float | None) -> dict[str, Any]:
    config = run.config
    run.warm_up_reducer()
    run.note_end()
    run.on_event(
        {
            "event": "start",
            "step": run.state.step,
            "total_steps": run.total_steps,
            "rows": len(run.tokens),
            "num_clusters": config.clustering.num_clusters,
            "sts_dev_before": run.state.score_before,
        }
    )
    if run.state.score_before is None:
        run.evaluate_before(score_before)

    while run.state.step < run.total_steps and not run.out_of_patience():
        began = time.perf_counter()
        step = run.state.step
        layout, shards = run.batch(step)
        run.row_log.append(step, layout)

        views = run.encode(shards)
        step_loss = run.objective(views.z1_bD, views.z2_bD, layout, views.mlm, run.teacher_embeddings(shards))
        run.health.observe(run.clustering.centroids_KD, step_loss.counts_K)
        rate = learning_rate(step, run.total_steps, config.train)
        grad_norm = run.optimizer.step(step_loss.scaled_loss, rate, views.backward)

        run.state.step = step + 1
        run.note_start_of_clustering()
        if run.due(config.runtime.log_every_steps):
            run.log_step(step_loss, layout, rate, grad_norm)
        if run.due(config.evaluation.every_steps):
            run.evaluate()
        run.state.seconds += time.perf_counter() - began
        leaving = run.state.step < run.total_steps and leave(run.state.step)
        if leaving or run.due(run.checkpoint_every):
            run.save()
        if leaving:
            run.note(f"A machine is about to go: stopped after step {run.state.step}, which is in a checkpoint.")
            raise Drained(f"stopped after step {run.state.step}, as a machine was about to go")

    if run.state.step < run.total_steps:
        run.note(
            f"Stopped early after step {run.state.step} of {run.total_steps}: the last {config.evaluation.patience} "
            "evaluations brought no better dev score (evaluation.patience)."
        )
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
        on_event: OnEvent,
        report: Report,
        uploader: LocalFiles | None = None,
    ):
        self.config, self.run_dir, self.device, self.report = config, run_dir, device, report
        self.is_main = distributed.rank() == 0
        self.uploader = uploader or LocalFiles(run_dir)
        self.on_event: OnEvent = on_event if self.is_main else lambda event: None
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
        self.dev_dir = sts_dir
        self.dev = DevSet(sts_dir, config.evaluation.dev, self.encoder) if sts_dir else None
        self.digests = data_digests(self.tokens.manifest, self.dev and self.dev.pairs)
        self.state = TrainState(precision=precision)
        self.compute_in(precision)
        self.metrics: MetricsLog | None = None
        self.trackers = Trackers()
        self.row_log = RowLog(run_dir / "rows") if config.runtime.log_rows else NoRowLog()
        self.last_log = (time.perf_counter(), 0)

    # ---- one step -----------------------------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[BatchLayout, list[Shard]]:
        """The global batch of a step, and this worker's shards of it on the device."""
        epoch, step_in_epoch = divmod(step, self.order.steps_per_epoch)
        rows = self.order.sample_ids(epoch, step_in_epoch)
        layout = build_batch_layout(rows, self.tokens.lengths(rows), self.config.train.shards)
        return layout, [self.shards(layout, shard, step) for shard in layout.shards_by_rank[layout.rank]]

    def encode(self, shards: list[Shard]) -> Views:
        """Both views of this worker's shards."""
        rows = self.config.train.cache_chunk
        return Views(self.model, shards) if rows is None else CachedViews(self.model, chunked(shards, rows))

    def teacher_embeddings(self, shards: list[Shard]) -> torch.Tensor | None:
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
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def out_of_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.state.evaluations_without_gain >= patience

    def warm_up_reducer(self) -> None:
        """Let DDP settle its buckets before the first step, on a gradient that is thrown away.

        DDP reorders its buckets after the first backward pass, and with three workers or more the order decides
        how a sum rounds: a resumed run has to sum as the first one did.
        """
        if self.model is self.views:
            return
        z1_bD, z2_bD, mlm = self.model([self.shards.warm_up_shard()])
        (z1_bD.sum() + z2_bD.sum() + mlm[0]).backward()
        self.optimizer.adamw.zero_grad(set_to_none=True)

    # ---- what is told -------------------------------------------------------------------------------------------

    def record(self, event: dict[str, Any]) -> None:
        """Into ``metrics.jsonl`` and to whoever watches; on worker 0 alone."""
        if self.is_main and self.metrics:
            record = {key: value for key, value in event.items() if key != "event"}
            self.metrics.append(record)
            self.trackers.log(record)
        self.on_event(event)

    def note(self, text: str) -> None:
        self.on_event({"event": "note", "text": text})

    def write_text(self, name: str, text: str) -> None:
        """A file of the run, which worker 0 writes."""

        def write() -> None:
            write_atomic(self.run_dir / name, text)
            self.uploader.push(name)

        by_worker_0(write, self.run_dir)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json_text(value))

    def note_end(self) -> None:
        """Say so where the epochs end before ``train.max_steps``."""
        train, an_epoch = self.config.train, self.order.steps_per_epoch
        if train.max_steps is not None and train.max_steps > self.total_steps:
            self.note(
                f"train.max_steps is {train.max_steps}, but {train.epochs} epoch{'s'[: train.epochs != 1]} of this "
                f"corpus {'have' if train.epochs != 1 else 'has'} {self.total_steps} steps: training ends after "
                f"{self.total_steps}. For more, raise train.epochs (to {math.ceil(train.max_steps / an_epoch)} for "
                f"{train.max_steps} steps)."
            )

    def log_step(self, step_loss: Any, layout: BatchLayout, rate: float, grad_norm: torch.Tensor) -> None:
        loss = self.config.loss
        used = {"distillation": loss.teacher is not None, "mlm": loss.mlm_weight > 0}
        values: dict[str, Any] = step_metrics(step_loss, layout.size, [name for name in used if not used[name]])
        if step_loss.counts_K is not None:
            values["empty_clusters"] = self.corpus.bank.empty() if self.corpus else self.health.empty()
        skipped = self.check_gradients(MAX_SKIPPED_IN_A_ROW)
        now = time.perf_counter()
        (then, step), self.last_log = self.last_log, (now, self.state.step)
        batch = self.config.train.global_batch_size
        self.record(
            {
                "event": "step",
                "step": self.state.step,
                "epoch": self.epoch(),
                **values,
                "learning_rate": rate,
                "grad_norm": float(grad_norm),
                "skipped_steps": skipped,
                "sentences_per_second": round((self.state.step - step) * batch / (now - then), 2),
            }
        )
        for text in self.alarms(self.state.step, values, self.health.steps):
            self.note(text)

    def check_gradients(self, most: int) -> int:
        """How many steps were skipped as their gradients were not finite.

        Raises:
            NonFiniteError: the last ``most`` of them were, in a row.
        """
        skipped, in_a_row = map(int, self.optimizer.skipped.tolist())
        if in_a_row >= most:
            raise NonFiniteError(
                f"The last {in_a_row} gradients before step {self.state.step} were NaN or infinite, so the weights "
                f"stand still. {self.remedies()} The checkpoints before it are whole."
            )
        return skipped

    def check_weights(self) -> None:
        """Raise NonFiniteError where a weight or a centroid is NaN or infinite: nothing of it may be kept."""
        parts: list[tuple[str, torch.Tensor]] = list(self.views.named_parameters())
        if self.clustering.centroids_KD is not None:
            parts.append(("centroids", self.clustering.centroids_KD))
        damaged = first_not_finite(parts)
        if damaged:
            raise NonFiniteError(
                f"After step {self.state.step} weights are NaN or infinite ({damaged}), so they are not kept. "
                f"{self.remedies()} Exported models and checkpoints from before are whole."
            )

    def remedies(self) -> str:
        train, loss = self.config.train, self.config.loss
        return (
            f"Lower train.learning_rate ({train.learning_rate}), raise loss.temperature ({loss.temperature}), or set "
            "train.precision to fp32."
        )

    def note_start_of_clustering(self) -> None:
        if self.clustering.started and self.state.clustering_started_at is None:
            self.state.clustering_started_at = self.state.step
            self.note(f"Clustering starts after step {self.state.step} with {self.clustering.num_clusters} centroids.")

    def epoch(self) -> float:
        return round(self.state.step / self.order.steps_per_epoch, 4)

    # ---- evaluation, export, checkpoint -------------------------------------------------------------------------

    def evaluate_before(self, known: float | None) -> None:
        """Score the untrained encoder, or take the score that is known, and export it: the first best model."""
        if not self.dev:
            return
        if known is None:
            z_ND = self.dev.encode(self.encoder)
            if not np.isfinite(z_ND).all():
                raise NonFiniteError(
                    f"encoder.name is {self.config.encoder.name!r}, whose embeddings of the dev set are NaN or "
                    f"infinite before training (in {self.state.precision}). Check that model, or set "
                    "train.precision to fp32."
                )
            score, health = self.dev_score(z_ND), self.dev_health(z_ND)
            self.compare_with_own_encoding(score)
        else:
            score, health = known, {}
        self.state.score_before = self.state.best_score = score
        self.export()
        self.record({"event": "evaluation", "step": 0, "epoch": 0.0, "sts_dev": score, **health})
        self.last_log = (time.perf_counter(), 0)

    def compare_with_own_encoding(self, chosen_score: float) -> None:
        """Say how the model scores as it says of itself that it encodes, where the run encodes otherwise."""
        config = self.config.encoder
        settings = read_settings(resolve_model(config.name), revision=config.revision)
        chosen = (self.encoder.pooling, self.encoder.prompt, self.encoder.denoise)
        if settings.pooling is None or chosen == (settings.pooling, settings.prompt, settings.denoise):
            return
        assert self.dev is not None and self.dev_dir is not None
        own = Encoder.finished(self.encoder.backbone, self.encoder.tokenizer, settings, config.name)
        own.autocast_dtype = self.encoder.autocast_dtype
        score = self.dev_score(DevSet(self.dev_dir, self.config.evaluation.dev, own).encode(own))
        self.encoder.train()
        self.note(
            f"{config.name} by its own settings (pooling {own.pooling}) scores {score:.2f} before training; with "
            f"encoder.pooling {self.encoder.pooling} it scores {chosen_score:.2f}."
        )

    def dev_score(self, z_ND: np.ndarray) -> float:
        """The score of dev embeddings; :data:`COLLAPSED`, with a note, where there is none."""
        assert self.dev is not None
        score = self.dev.score(z_ND)
        if math.isfinite(score):
            return score
        finite = np.isfinite(z_ND).all()
        reason = "all embeddings are alike" if finite else "embeddings are NaN or infinite"
        self.note(f"There is no dev score at step {self.state.step}, as {reason}; it counts as {COLLAPSED:.0f}.")
        return COLLAPSED

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
        progress = self.state
        score = progress.last_score = self.dev_score(z_ND)
        if progress.best_trained_score is None or score > progress.best_trained_score:
            progress.best_trained_score, progress.evaluations_without_gain = score, 0
        else:
            progress.evaluations_without_gain += 1
        best = progress.best_score is None or score > progress.best_score
        if best:
            progress.best_score, progress.best_step = score, progress.step
            self.export()
        told = {"step": progress.step, "epoch": self.epoch(), "sts_dev": score, "best": best}
        self.record({"event": "evaluation", **told, **self.dev_health(z_ND)})
        self.report({"step": progress.step, "sts_dev": score, "best_sts_dev": progress.best_trained_score})
        then, step = self.last_log
        self.last_log = (then + time.perf_counter() - paused, step)

    def export(self) -> None:
        """Write ``model/`` (and the centroids beside it) in one step each; worker 0 does.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        self.check_weights()
        by_worker_0(self._export, self.run_dir / "model")

    def _export(self) -> None:
        def write(path: Path) -> None:
            self.encoder.save(path)
            (path / "README.md").write_text(model_card(self.config, asdict(self.state)), encoding="utf-8")
            write_manifest(path, step=self.state.best_step, fingerprint=self.config.fingerprint())

        replace_directory(self.run_dir / "model", write)
        self.uploader.push("model")
        if self.clustering.centroids_KD is not None:
            temporary = self.run_dir / f".centroids.npy.{uuid.uuid4().hex[:8]}"
            with temporary.open("wb") as file:
                np.save(file, self.clustering.centroids_KD.cpu().numpy())
            temporary.replace(self.run_dir / "centroids.npy")
            self.uploader.push("centroids.npy")

    def save(self) -> None:
        """Write a checkpoint of everything that changes; worker 0 does, as all workers hold the same.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
        """
        began = time.perf_counter()
        self.check_weights()
        by_worker_0(self._save, self.run_dir / "checkpoints")
        self.state.checkpoint_seconds += time.perf_counter() - began

    def _save(self) -> None:
        state = {
            "encoder": self.encoder.state_dict(),
            "language_model_head": head_state(self.views.language_model) if self.views.language_model else None,
            "optimizer": self.optimizer.state_dict(),
            "clustering": self.clustering.state_dict(),
            "health": self.health.state_dict(),
            "progress": asdict(self.state),
            "data": self.digests,
        }
        if self.corpus:
            state["corpus"] = self.corpus.state_dict()
        keep = self.config.runtime.keep
        path = save_checkpoint(self.run_dir / "checkpoints", self.state.step, state, self.config.fingerprint(), keep)
        self.uploader.push("metrics.jsonl")
        self.uploader.push(f"checkpoints/{path.name}")
        self.uploader.keep_newest("checkpoints", keep)

    def restore(self) -> None:
        """Take up the newest whole checkpoint, which worker 0 chooses for all."""
        if self.is_main:
            self.uploader.begin(self.note)
        directory, fingerprint = self.run_dir / "checkpoints", self.config.fingerprint()
        found = load_newest(directory, fingerprint, self.note)
        step = distributed.broadcast_object(found[0] if found else 0)
        if (found[0] if found else 0) != step:
            raise RuntimeError(f"worker {distributed.rank()} does not see the checkpoint of step {step} in {directory}")
        if found:
            check_digests(f"The run {self.config.runtime.name!r}", found[1].get("data"), self.digests)
            by_worker_0(lambda: self.restore_model(found[1]), self.run_dir / "model")
            self.load_state(found[1])
            chosen = self.config.train.precision == "auto" and self.state.precision == "bf16"
            if chosen and not multiplies_bf16(self.device):
                self.note(
                    "This run was begun in bf16, which this machine only emulates, slowly: it goes on so, to stay the "
                    "same run. For fp32 begin another one, with train.precision=fp32."
                )
        if self.is_main:
            self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", self.state.step if found else -1)
            if self.metrics.damaged:
                self.note(
                    f"metrics.jsonl was damaged: {self.metrics.damaged} of its lines are lost. Weights are whole."
                )
            self.trackers.begin(self.config, self.run_dir, self.state.step, self.note)
        self.last_log = (time.perf_counter(), self.state.step)

    def load_state(self, state: dict[str, Any]) -> None:
        """Become what a checkpoint holds."""
        self.encoder.load_state_dict(state["encoder"])
        if self.views.language_model is not None:
            self.views.language_model.load_state_dict(state["language_model_head"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.clustering.load_state_dict(state["clustering"], self.device)
        self.health.load_state_dict(state["health"], self.device)
        if self.corpus:
            self.corpus.load_state_dict(state["corpus"])
        self.state = TrainState(**{"precision": self.state.precision, **state["progress"]})
        self.compute_in(self.state.precision)

    def restore_model(self, state: dict[str, Any]) -> None:
        """Before a resumed run goes on, export its best model again where that is missing or damaged.

        Raises:
            CheckpointError: no checkpoint holds the weights of that step any more.
        """
        progress = TrainState(**state["progress"])
        if progress.best_score is None:
            return  # nothing was exported yet
        model, best, fingerprint = self.run_dir / "model", progress.best_step, self.config.fingerprint()
        damage = model_damage(model, fingerprint, best, progress.step)
        if damage is None:
            return
        if best == 0:  # the weights are still those of the untrained encoder
            self.state.score_before = self.state.best_score = progress.score_before
        else:
            kept = load_step(self.run_dir / "checkpoints", best, fingerprint)
            if kept is None:
                raise CheckpointError(
                    f"{damage}, and no checkpoint of step {best}, the best one, is left to write it from. Restore "
                    f"{str(model)!r} from a copy; or remove {str(self.run_dir)!r} and give the same command, which "
                    "trains the same model anew."
                )
            self.load_state(kept)
        self.note(f"{damage}: the model of step {best} is written anew.")
        self._export()

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
        self.write_json("clusters.json", {"step": self.state.step, "sample": len(rows), "clusters": clusters})

    def check_embeddings(self) -> None:
        """Raise NonFiniteError where the encoder embeds a sample of the corpus as NaN or infinity."""
        rows = sample_rows(self.tokens, TRIED, "try", self.config.seed)
        if not np.isfinite(encode_together(self.encoder, token_ids(self.tokens, rows))).all():
            raise NonFiniteError(
                f"After step {self.state.step} embeddings are NaN or infinite, so no model is exported. "
                f"{self.remedies()} The checkpoints before it are whole."
            )

    def finish(self) -> dict[str, Any]:
        """Export if nothing was selected, describe the clusters, write ``result.json``, and say how it went."""
        progress = self.state
        # A short run may end before ten gradients in a row can be bad.
        self.check_gradients(min(MAX_SKIPPED_IN_A_ROW, max(1, math.ceil(progress.step / 2))))
        self.check_weights()
        if self.dev is None:
            self.check_embeddings()
        self.describe_clusters()
        if self.dev is None:
            progress.best_step = progress.step
            self.export()
        self.trackers.close()
        if self.is_main:
            began = time.perf_counter()
            self.uploader.push("metrics.jsonl")
            if (self.run_dir / "tensorboard").is_dir():
                self.uploader.push("tensorboard")
            self.uploader.finish(self.config.runtime.step_timeout_s)
            progress.checkpoint_seconds += time.perf_counter() - began
        result = {
            "best_step": progress.best_step,
            "sts_dev": progress.best_score,
            "sts_dev_trained": progress.best_trained_score,
            "sts_dev_before": progress.score_before,
            "sts_dev_last": progress.last_score,
            "dev": self.config.evaluation.dev if self.dev else None,
            "steps": progress.step,
            "total_steps": self.total_steps,
            "stopped_early": progress.step < self.total_steps,
            "clustering_started_at": progress.clustering_started_at,
            "precision": progress.precision,
            "seconds": round(progress.seconds, 1),
            "checkpoint_seconds": round(progress.checkpoint_seconds, 2),
            "num_workers": distributed.world_size(),
            "model": self.uploader.address("model"),
            "fingerprint": self.config.fingerprint(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        result = with_checksum(result)
        self.write_json("result.json", result)  # last, as it says that everything is there
        self.uploader.finish(self.config.runtime.step_timeout_s)
        self.on_event({"event": "done", **result})
        return result
