"""One run, from top to bottom: batch, forward, loss, backward, step, evaluation, checkpoint, export.

The same on any number of workers: each calls :func:`train_worker`, alone or as one of a process group.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from clusterns_ray import distributed
from clusterns_ray.config import dump_config
from clusterns_ray.data.digests import DataDigests, data_digests
from clusterns_ray.data.token_store import TokenStore
from clusterns_ray.errors import Drained, StorageError
from clusterns_ray.io.events import Evaluated, OnEvent, RunDone, RunStarted
from clusterns_ray.io.files import with_checksum
from clusterns_ray.training.checkpoint import Checkpointer, list_checkpoints
from clusterns_ray.training.collapse_monitor import CollapseMonitor
from clusterns_ray.training.context import RunContext
from clusterns_ray.training.environment import changed_versions, describe_environment
from clusterns_ray.training.evaluator import Evaluator
from clusterns_ray.training.export import Exporter
from clusterns_ray.training.finite import FiniteChecks
from clusterns_ray.training.logger import RunLogger
from clusterns_ray.training.metrics import step_metrics
from clusterns_ray.training.optim import learning_rate
from clusterns_ray.training.parts import TrainingParts
from clusterns_ray.training.precision import multiplies_bf16
from clusterns_ray.training.prefetch import Prefetcher
from clusterns_ray.training.row_log import NoRowLog, RowLog
from clusterns_ray.training.run_access import on_worker_0, one_writer, storage_errors, take_over
from clusterns_ray.training.state import TrainState

OnEvaluation = Callable[[Evaluated], None]
"""Called by every worker after an evaluation; where Ray (or a sweep's scheduler) learns how the run does."""

ShouldStop = Callable[[int], bool]
"""Called by every worker with each step that is done, but for the last one: whether all workers have to stop there."""

LAST_COPY_S = 60.0
"""How long a run that failed still copies what it had finished."""


def train_worker(
    context: RunContext,
    device: torch.device,
    on_event: OnEvent,
    *,
    on_evaluation: OnEvaluation = lambda event: None,
    should_stop: ShouldStop = lambda step: False,
    score_before: float | None = None,
) -> dict[str, Any]:
    """Train on this worker, alone or as one of a process group, resuming from the newest checkpoint of the run.

    Args:
        score_before: the dev score of the untrained encoder, where it is known already.

    Returns:
        What ``result.json`` holds; the same on every worker but for the seconds.

    Raises:
        ConfigError, DataError: the request cannot work; the run's name is still free.
        NonFiniteError: weights or embeddings are NaN or infinite, or gradients stay so.
        CheckpointError: checkpoints are there but none can be used, or the exported model is damaged for good.
        StorageError: a file cannot be read or written.
        Drained: ``should_stop`` said so; the last step is in a checkpoint.
    """
    config, run_dir, uploader = context.config, context.run_dir, context.uploader
    logger = RunLogger(context, on_event)
    with one_writer(run_dir, uploader, logger.note), storage_errors(run_dir):
        uploader.pull(files=logger.is_main)
        on_worker_0(lambda: take_over(run_dir, config, context.address, logger.note), run_dir)
        # Every checksum is compared before a run begins; one that goes on was compared then.
        begins = not list_checkpoints(run_dir / "checkpoints")
        on_worker_0(lambda: TokenStore.open(context.tokens_dir, verify=begins), context.tokens_dir)
        try:
            # However training ends, its threads have ended first, and a checkpoint that was begun is whole.
            with ThreadPoolExecutor(1, "checkpoints") as writer, ThreadPoolExecutor(1, "batches") as reader:
                return _train(context, device, logger, on_evaluation, should_stop, score_before, writer, reader)
        except (Exception, KeyboardInterrupt):
            with suppress(StorageError):  # what failed first is what has to be raised
                uploader.finish(LAST_COPY_S)
            raise
        finally:
            logger.close()
            uploader.stop()


def _train(
    context: RunContext,
    device: torch.device,
    logger: RunLogger,
    on_evaluation: OnEvaluation,
    should_stop: ShouldStop,
    score_before: float | None,
    writer: ThreadPoolExecutor,
    reader: ThreadPoolExecutor,
) -> dict[str, Any]:
    config = context.config
    parts = TrainingParts(context, device, logger.note)
    state = TrainState(precision=parts.precision, reduction=parts.reduction_name)
    evaluator = Evaluator(config, context.sts_dir, parts.encoder, state, logger.note)
    exporter = Exporter(context, parts, state)
    finite = FiniteChecks(parts, state)
    collapse_monitor = CollapseMonitor(config.clustering.num_clusters, of_corpus=config.clustering.scope == "corpus")
    digests = data_digests(parts.tokens.manifest, evaluator.dev and evaluator.dev.pairs)
    data = DataDigests(f"The run {config.runtime.name!r}", digests)
    # On a CPU the cores of these threads would be those that compute, and its memory that of the copy.
    on_gpu = device.type == "cuda"
    stateful = {"data": data, **parts.stateful(), "progress": state}
    checkpointer = Checkpointer(context, stateful, writer if on_gpu else None)
    read_batch = Prefetcher(parts.batch, parts.total_steps, reader if on_gpu else None)
    row_log = RowLog(context.run_dir / "rows") if config.runtime.log_rows else NoRowLog()

    if logger.is_main:
        context.uploader.begin(logger.note)
    checkpoint = checkpointer.newest(logger.note)
    if checkpoint is not None:
        exporter.repair(checkpoint, checkpointer, logger.note)
        checkpointer.load(checkpoint)
        parts.compute_in(state.precision)
        if state.reduction != parts.reduction_name:
            parts.reduce_by(state.reduction)
        _note_emulated_precision(config.train.precision, state.precision, device, logger)
    logger.open(None if checkpoint is None else state.step)
    # Only now is the name taken: nothing of a request that is refused stays.
    context.write_text("config.yaml", dump_config(config))
    environment = describe_environment(device, context.command, distributed.world_size())
    if checkpoint is not None and (change := changed_versions(context.run_dir / "environment.json", environment)):
        logger.note(change)
    chosen = {"precision": state.precision, "reduction": state.reduction}
    context.write_json("environment.json", environment | chosen)

    parts.warm_up_reducer()
    total_steps = parts.total_steps
    _note_early_end(parts, logger)
    logger.event(
        RunStarted(state.step, total_steps, len(parts.tokens), config.clustering.num_clusters, state.score_before)
    )

    def due(every_steps: int) -> bool:
        return state.step % every_steps == 0 or state.step == total_steps

    def export() -> None:
        finite.weights()
        exporter.export()

    def save_checkpoint() -> None:
        began = time.perf_counter()
        finite.weights()
        checkpointer.save(state.step)
        state.checkpoint_seconds += time.perf_counter() - began

    if evaluator.dev and state.score_before is None:
        with logger.paused():
            evaluation = evaluator.evaluate_untrained(score_before)
            export()
            record = {"step": 0, "epoch": 0.0, "sts_dev": evaluation.score, **evaluation.also, **evaluation.geometry}
            logger.record(Evaluated(0, evaluation.score, record))

    while state.step < total_steps and not evaluator.out_of_patience():
        began = time.perf_counter()

        # The global batch, and this worker's rows of it.
        layout, shards = read_batch(state.step)
        row_log.append(state.step, layout)

        # Forward: both views of each sentence. Loss: of the whole batch, on every worker; centroids move.
        views = parts.forward(layout, shards)
        teacher_BD = parts.teacher_embeddings(layout, shards)
        loss = parts.objective(views.z1_BD, views.z2_BD, layout.rows_B, views.mlm_N2, teacher_BD)
        parts.health.observe(parts.clustering.centroids_KD, loss.counts_K)

        # Backward: each worker back-propagates its own rows; all add up the parameters' gradients (train.reduction).
        parts.optimizer.zero_grad()
        views.backward(parts.optimizer.scale(loss.loss))

        # A step whose gradients are not finite is skipped, on the device and on all workers alike.
        grad_norm = parts.optimizer.clip_gradients()
        rate = learning_rate(state.step, total_steps, config.train)
        parts.optimizer.step(rate)
        state.step += 1

        if parts.clustering.started and state.clustering_started_at is None:
            state.clustering_started_at = state.step
            count = parts.clustering.num_clusters
            logger.note(f"Clustering starts after step {state.step} with {count} centroids.")

        if due(config.runtime.log_every_steps):
            values = {
                "epoch": parts.epoch(state.step),
                **step_metrics(loss, layout.size, parts.objective.unused_terms()),
            }
            if loss.counts_K is not None:
                values["empty_clusters"] = parts.empty_clusters()
            skipped = finite.gradients()
            optimiser_values = {"learning_rate": rate, "grad_norm": float(grad_norm), "skipped_steps": skipped}
            logger.log_step(state.step, config.train.global_batch_size, values | optimiser_values)
            for warning in collapse_monitor(state.step, values, parts.health.steps):
                logger.note(warning)

        if evaluator.dev and due(config.evaluation.every_steps):
            with logger.paused():
                evaluation = evaluator.evaluate()
                if evaluation.best:
                    export()
                score, best = evaluation.score, evaluation.best
                record = {"step": state.step, "epoch": parts.epoch(state.step), "sts_dev": score, "best": best}
                record |= evaluation.also | evaluation.geometry
                if parts.clustering.centroids_KD is not None and parts.health.steps:
                    record |= parts.health.take(parts.clustering.centroids_KD)
                event = Evaluated(state.step, score, record, best, state.best_trained_score)
                logger.record(event)
                on_evaluation(event)
        state.seconds += time.perf_counter() - began

        stopping = state.step < total_steps and should_stop(state.step)
        if stopping or due(config.runtime.checkpoint_every_steps or config.evaluation.every_steps):
            save_checkpoint()
        if stopping:
            checkpointer.finish()
            logger.note(f"A machine is about to go: stopped after step {state.step}, which is in a checkpoint.")
            raise Drained(f"stopped after step {state.step}, as a machine was about to go")

    if state.step < total_steps:
        logger.note(
            f"Stopped early after step {state.step} of {total_steps}: the last {config.evaluation.patience} "
            "evaluations brought no better dev score (evaluation.patience)."
        )
    finite.gradients_at_the_end()
    finite.weights()
    if not evaluator.dev:
        finite.embeddings()
    exporter.describe_clusters()
    if not evaluator.dev:
        state.best_step = state.step
        export()
    logger.close()
    return _write_result(context, state, total_steps, checkpointer, logger)


def _note_early_end(parts: TrainingParts, logger: RunLogger) -> None:
    """Add a note where the epochs end before ``train.max_steps``."""
    train, total_steps = parts.config.train, parts.total_steps
    if train.max_steps is not None and train.max_steps > total_steps:
        logger.note(
            f"train.max_steps is {train.max_steps}, but {train.epochs} epoch{'s'[: train.epochs != 1]} of this "
            f"corpus {'have' if train.epochs != 1 else 'has'} {total_steps} steps: training ends after "
            f"{total_steps}. For more, raise train.epochs (to "
            f"{math.ceil(train.max_steps / parts.order.steps_per_epoch)} for {train.max_steps} steps)."
        )


def _note_emulated_precision(configured: str, precision: str, device: torch.device, logger: RunLogger) -> None:
    """Add a note where a run that chose bf16 on another machine resumes on one that only emulates it."""
    if configured == "auto" and precision == "bf16" and not multiplies_bf16(device):
        logger.note(
            "This run was begun in bf16, which this machine only emulates, slowly. It goes on in bf16, so as to stay "
            "the same run. For fp32, begin another run with train.precision=fp32."
        )


def _write_result(
    context: RunContext, state: TrainState, total_steps: int, checkpointer: Checkpointer, logger: RunLogger
) -> dict[str, Any]:
    """Wait until all files are where they belong, and then write ``result.json``, which says that they are."""
    config, uploader = context.config, context.uploader
    began = time.perf_counter()
    checkpointer.finish()
    if logger.is_main:
        uploader.push("metrics.jsonl")
        if (context.run_dir / "tensorboard").is_dir():
            uploader.push("tensorboard")
        uploader.finish(config.runtime.step_timeout_s)
    state.checkpoint_seconds += time.perf_counter() - began
    result = with_checksum(
        {
            "best_step": state.best_step,
            "sts_dev": state.best_score,
            "sts_dev_trained": state.best_trained_score,
            "sts_dev_before": state.score_before,
            "sts_dev_last": state.last_score,
            "dev": config.evaluation.dev if context.sts_dir else None,
            "also": state.also,
            "steps": state.step,
            "total_steps": total_steps,
            "stopped_early": state.step < total_steps,
            "clustering_started_at": state.clustering_started_at,
            "precision": state.precision,
            "reduction": state.reduction,
            "seconds": round(state.seconds, 1),
            "checkpoint_seconds": round(state.checkpoint_seconds, 2),
            "num_workers": distributed.world_size(),
            "model": uploader.address("model"),
            "fingerprint": config.fingerprint(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    )
    context.write_json("result.json", result)
    uploader.finish(config.runtime.step_timeout_s)
    logger.event(RunDone(result))
    return result
