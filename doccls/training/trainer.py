"""Train one fold from start to end: build, train, validate, keep the best weights, write the predictions."""

import gc
import os
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from doccls.data.sampler import find_epoch
from doccls.errors import UserError
from doccls.experiment import Experiment
from doccls.model.build import check_img_size
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, remove_resume_checkpoints, write_predictions
from doccls.reporting.tracking import track_fold
from doccls.run.heartbeat import Heartbeat
from doccls.run.metrics_log import EpochMetrics, write_fold_metrics
from doccls.run.owner import FoldOwner
from doccls.run.paths import RunPaths
from doccls.system.cores import count_own_cores
from doccls.system.disk import measure_free
from doccls.system.signals import Interrupted
from doccls.training.batches import TimedBatches, advise_on_waiting
from doccls.training.checkpoint import BestEpoch, BestWeights, ResumePoint, describe_disk, estimate_disk
from doccls.training.distributed import agree_on_stop, has_scaler, on_main
from doccls.training.engine import Engine, FoldProgress, LossMeter, RunContext, build_engine
from doccls.training.error_hints import translate_error
from doccls.training.resume import Checkpointer, average_buffers, copy_to_cpu, describe_resume, restore
from doccls.training.step import TrainedEpoch, group_gradients, train_epoch
from doccls.training.validation import validate_epoch

_MAX_DATA_WAIT = 0.1  # the share of an epoch's time above which the log advises what to change


@dataclass(frozen=True)
class _Pace:
    """How fast an epoch's remaining steps were."""

    data_wait: float  # the share of time spent on waiting for batches
    images_per_s: float | None  # of all processes; None if no step remained


def train_fold(context: RunContext, fold: int, resume_point: ResumePoint | None, batches: TimedBatches) -> None:
    """Train one fold and write its checkpoints, its metrics and, last, its predictions. All ranks must call.

    It consumes this fold's batches from those of `load_folds`, beginning at `resume_point`.

    Raises:
        UserError: the model, its weights or the optimizer can't be built, a loss or logit is not finite, or another
            process has taken over the fold.
        Interrupted: a signal asked this rank or another one to stop.
    """
    experiment, accelerator, log, heartbeat = context.experiment, context.accelerator, context.log, context.heartbeat
    run_dir = experiment.paths.root if accelerator.is_main_process else None
    agree_on_stop(accelerator)
    _reset(accelerator)
    progress = FoldProgress()
    with track_fold(experiment.config, run_dir, fold, experiment.fingerprint, log) as tracker:
        heartbeat.beat(phase="start", fold=fold, epoch=0, step=0)
        try:
            engine = build_engine(context, fold, tracker)
            plan = engine.plan
            heartbeat.beat(epochs=plan.epochs, steps_per_epoch=plan.steps_per_epoch, batch_size=plan.size)
            _log_disk(engine, experiment.paths)
            group_gradients(engine)
            if resume_point is not None:
                progress = restore(engine, resume_point)
                last_beat_s = _find_last_beat_s(heartbeat, fold)
                log.line(describe_resume(resume_point, fold, engine.plan.steps_per_epoch, last_beat_s))
            with Checkpointer(
                engine, experiment.paths, experiment.fingerprint, resume_point, partial(context.owner.check, fold)
            ) as checkpointer:
                best = _fit(context, engine, checkpointer, progress, batches)
        except UserError:  # its message already says what to do
            raise
        except (RuntimeError, ValueError, AssertionError, TypeError) as error:
            translated = translate_error(error, experiment.config.train, accelerator)
            if translated is not None:
                raise translated from error
            if progress.step == 0:
                check_img_size(experiment.config.model, experiment.config.train.img_size)
            raise
        predictions = _make_predictions(experiment, fold, best, accelerator.mixed_precision)
        on_main(accelerator, lambda: _save_predictions(experiment.paths, fold, predictions, context.owner))
        log.line(f"[FOLD {fold}] done | best epoch={best.epoch} {_format_scores(best)}")


def _log_disk(engine: Engine, paths: RunPaths) -> None:
    if engine.accelerator.is_main_process:
        trained = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
        need = estimate_disk(engine.bare_model.state_dict().values(), trained, engine.ema is not None)
        for line in describe_disk(need, measure_free(paths.root), engine.plan.fold, paths.root):
            engine.log.line(line)


def _find_last_beat_s(heartbeat: Heartbeat, fold: int) -> float | None:
    """Return the time of the last heartbeat of the previous process that trained the fold, in seconds since 1970."""
    earlier = heartbeat.earlier
    return earlier.time_s if earlier is not None and earlier.fold == fold else None


def _save_predictions(paths: RunPaths, fold: int, predictions: FoldPredictions, owner: FoldOwner) -> None:
    owner.check(fold)
    write_predictions(paths.predictions(fold), predictions)
    remove_resume_checkpoints(paths, [fold])


def release_memory(accelerator: Accelerator) -> None:
    """Free a finished fold's model and optimizer, to which Accelerate and its patched methods still refer."""
    accelerator.free_memory()
    gc.collect()


def _reset(accelerator: Accelerator) -> None:
    """Reset what an earlier fold left behind: gradient scale, compiled code and peak memory."""
    if has_scaler(accelerator):
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    torch.compiler.reset()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)


def _fit(
    context: RunContext,
    engine: Engine,
    checkpointer: Checkpointer,
    progress: FoldProgress,
    batches: TimedBatches,
) -> BestEpoch:
    """Train and validate the remaining epochs, saving improved weights at once, and return the best epoch."""
    first = find_epoch(progress.step, engine.plan)
    for epoch in range(first, engine.config.epochs):
        began_s = time.perf_counter()
        resumed_step = (progress.step or None) if epoch == first else None
        trained, pace = _train(engine, batches, epoch, progress, checkpointer)
        if pace.data_wait > _MAX_DATA_WAIT and epoch > first:  # the first epoch includes starting the loader
            advice = advise_on_waiting(
                pace.data_wait, batches.workers, count_own_cores(os.environ), context.experiment.data.stored is not None
            )
            engine.log.line(f"[DATA] {advice}")
        try:
            validated, valid_loss = validate_epoch(context.experiment, engine, batches, epoch)
        except Interrupted:  # raised on all ranks at the same point
            engine.heartbeat.beat(phase="stopping")
            checkpointer.save(progress, wait=True)
            raise
        batches.pop_wait_s()
        row = EpochMetrics(
            fold=engine.plan.fold,
            epoch=epoch + 1,
            train_loss=trained.loss,
            valid_loss=valid_loss,
            macro_f1=validated.macro_f1,
            lr=trained.lr,
            time_s=time.perf_counter() - began_s,
            mem_MiB=measure_memory(engine.accelerator),
            selection_f1=validated.selection_f1,
            weights=validated.weights,
            macro_f1_damaged=validated.macro_f1_damaged,
            images_per_s=pace.images_per_s,
            resumed_step=resumed_step,
        )
        _log_validation(engine, row)
        progress.rows.append(row)
        progress.meter = LossMeter()
        # Of equal epochs, the later counts as better.
        is_better = progress.best is None or validated.selection_f1 >= progress.best.selection_f1
        if is_better:
            progress.best = validated
        warnings = on_main(
            engine.accelerator, partial(_record_epoch, context, engine, checkpointer, progress, is_better)
        )
        for warning in warnings if epoch == first else ():
            engine.log.line(f"[WARNING] {warning}")
    on_main(engine.accelerator, partial(checkpointer.check_best, wait=True))
    assert progress.best is not None
    return progress.best


def _log_validation(engine: Engine, row: EpochMetrics) -> None:
    is_new = row.selection_f1 not in (row.macro_f1, row.macro_f1_damaged)
    notes = f"selection_f1={row.selection_f1:.5f} " if is_new else ""
    notes += "" if engine.ema is None else f"weights={row.weights} "
    engine.log.line(
        f"[EPOCH {row.epoch}] fold={row.fold} valid_loss={row.valid_loss:.5f} {_format_scores(row)} "
        f"{notes}time_s={row.time_s:.1f}"
    )
    assert row.selection_f1 is not None
    values = {"valid/loss": row.valid_loss, "valid/macro_f1": row.macro_f1, "valid/selection_f1": row.selection_f1}
    if row.macro_f1_damaged is not None:
        values["valid/macro_f1_damaged"] = row.macro_f1_damaged
    engine.tracker.log(values, row.epoch * engine.plan.steps_per_epoch)


def _format_scores(scores: EpochMetrics | BestEpoch) -> str:
    """Return the score as `key=value` and, with damaged copies, the score on those."""
    damaged = "" if scores.macro_f1_damaged is None else f" macro_f1_damaged={scores.macro_f1_damaged:.5f}"
    return f"macro_f1={scores.macro_f1:.5f}{damaged}"


def _train(
    engine: Engine, batches: TimedBatches, epoch: int, progress: FoldProgress, checkpointer: Checkpointer
) -> tuple[TrainedEpoch, _Pace]:
    """Train the remaining steps of an epoch (0-based) and log it; also return how fast that was."""
    accelerator, plan = engine.accelerator, engine.plan
    began_s, steps = time.perf_counter(), plan.steps_per_epoch - len(progress.meter.losses)
    with engine.log.progress(f"fold {plan.fold} epoch {epoch + 1}/{engine.config.epochs}", plan.steps_per_epoch) as bar:
        trained = train_epoch(engine, batches, epoch, progress, checkpointer, bar)
    average_buffers(engine)
    time_s = time.perf_counter() - began_s
    pace = _Pace(batches.pop_wait_s() / time_s, steps * plan.size / time_s if steps else None)
    engine.log.line(
        f"[EPOCH {epoch + 1}] fold={plan.fold} loss={trained.loss:.5f} lr={trained.lr:.3e} "
        f"{'' if trained.skipped_steps is None else f'skipped_steps={trained.skipped_steps} '}"
        f"mem_MiB={measure_memory(accelerator):.0f} images_per_s={pace.images_per_s or 0:.1f} "
        f"data_wait={pace.data_wait:.0%}"
    )
    return trained, pace


def _record_epoch(
    context: RunContext, engine: Engine, checkpointer: Checkpointer, progress: FoldProgress, is_better: bool
) -> list[str]:
    """Write the metrics and save improved weights; return warnings. Only the main process may call."""
    experiment = context.experiment
    context.owner.check(engine.plan.fold)
    checkpointer.check_best()
    if is_better:
        assert progress.best is not None
        checkpointer.save_best(_capture_best(experiment, engine, progress.best))
        path = experiment.paths.best_checkpoint(engine.plan.fold).relative_to(experiment.paths.root)
        engine.log.line(f"NEW_BEST F1={progress.best.selection_f1:.5f} -> {path}")
    return write_fold_metrics(experiment.paths, progress.rows)


def _capture_best(experiment: Experiment, engine: Engine, best: BestEpoch) -> BestWeights:
    return BestWeights(
        state_dict=copy_to_cpu(engine.modules[best.weights].state_dict()),
        fingerprint=experiment.fingerprint,
        fold=engine.plan.fold,
        epoch=best.epoch,
        macro_f1=best.macro_f1,
        weights=best.weights,
        classes=experiment.data.manifest.classes,
        mean=engine.normalize.mean,
        std=engine.normalize.std,
        precision=engine.accelerator.mixed_precision,
        # Without valid_fold, so that a fold gives the same bytes whether trained alone or with the others.
        config=experiment.config.model_dump(mode="json", exclude={"provenance": True, "data": {"valid_fold"}}),
    )


def _make_predictions(experiment: Experiment, fold: int, best: BestEpoch, precision: str) -> FoldPredictions:
    """Return the best epoch's logits as the fold's predictions."""
    manifest, assignment = experiment.data.manifest, experiment.data.assignment
    rows = assignment.list_valid(fold)
    logits = _spread(best.logits_NC, best.indices_N, rows)
    damaged = None if best.damaged_logits_NC is None else _spread(best.damaged_logits_NC, best.indices_N, rows)
    info = PredictionsInfo(
        fingerprint=experiment.fingerprint,
        fold=fold,
        num_folds=assignment.num_folds,
        num_samples=len(manifest),
        classes=manifest.classes,
        ids=tuple(manifest.ids[row] for row in rows),
        skipped=tuple(sorted(experiment.data.skipped.intersection(rows.tolist()))),
        best_epoch=best.epoch,
        macro_f1=best.macro_f1,
        precision=precision,
        micro_batch_size=experiment.config.train.micro_batch_size,
        groups=None if manifest.groups is None else tuple(manifest.groups[row] for row in rows.tolist()),
        num_split=len(assignment.split.intersection(rows.tolist())),
        damage=experiment.config.valid.damage,
        macro_f1_damaged=best.macro_f1_damaged,
        selected_by="damaged" if experiment.config.valid.selects_damaged else "clean",
    )
    return FoldPredictions(info, rows.astype(np.int64), logits, manifest.targets_N[rows], damaged)


def _spread(logits_NC: np.ndarray, indices_N: np.ndarray, rows_M: np.ndarray) -> np.ndarray:
    """Return the logits of samples `indices_N` at their places in `rows_M`; rows without a usable image are NaN."""
    spread_MC = np.full((len(rows_M), logits_NC.shape[1]), np.nan, dtype=np.float32)
    spread_MC[np.searchsorted(rows_M, indices_N)] = logits_NC
    return spread_MC


def measure_memory(accelerator: Accelerator) -> float:
    """Return MiB: this process's peak GPU memory since the fold's start, or its current main memory without a GPU."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device) / 2**20
    return float(psutil.Process().memory_info().rss / 2**20)
