"""One fold from end to end: build, train, validate, keep the best, write its part."""

import gc
import os
import time
from functools import partial
from itertools import islice

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from doccls.data.sampler import BatchPlace, find_epoch, list_evaluation
from doccls.errors import UserError
from doccls.experiment import Experiment
from doccls.oof.metrics import cross_entropy, macro_f1, selection_f1
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, remove_resume_checkpoints, write_predictions
from doccls.reporting.tracking import track_fold
from doccls.run.heartbeat import Heartbeat
from doccls.run.metrics_log import EpochMetrics, write_fold_metrics
from doccls.run.owner import FoldOwner
from doccls.run.paths import RunPaths
from doccls.system.cores import count_own_cores
from doccls.system.disk import measure_free
from doccls.system.signals import Interrupted
from doccls.training.batches import WaitingBatches, advise_on_waiting
from doccls.training.checkpoint import BestEpoch, BestWeights, ResumePoint, describe_disk, estimate_disk
from doccls.training.distributed import agree_on_stop, has_scaler, on_main
from doccls.training.engine import Engine, FoldProgress, LossMeter, RunContext, build_engine
from doccls.training.error_hints import explain
from doccls.training.evaluate import predict_logits
from doccls.training.resume import Checkpointer, average_buffers, copy_to_cpu, describe_resume, restore
from doccls.training.step import TrainedEpoch, group_gradients, train_epoch

_MUCH_WAITING = 0.1
"""Share of an epoch's time, above which it is said what to do about it."""


def train_fold(context: RunContext, fold: int, start: ResumePoint | None, batches: WaitingBatches) -> None:
    """Train one fold and leave its checkpoint, its metrics and, last, its OOF part. All ranks must call.

    It takes its own of the batches of `load_folds`, which begin at `start`.

    Raises:
        UserError: the model, its weights or the optimizer can't be had, the numbers went bad, or another process has
            taken the fold meanwhile.
        Interrupted: a signal asked for the end, of this rank or another.
    """
    experiment, accelerator, log, heartbeat = context.experiment, context.accelerator, context.log, context.heartbeat
    run_dir = experiment.paths.root if accelerator.is_main_process else None
    agree_on_stop(accelerator)
    _reset(accelerator)
    with track_fold(experiment.config, run_dir, fold, log) as tracker:
        heartbeat.beat(phase="start", fold=fold, epoch=0, step=0)
        try:
            engine = build_engine(context, fold, tracker)
            _log_disk(engine, experiment.paths)
            group_gradients(engine)
            progress = FoldProgress()
            if start is not None:
                progress = restore(engine, start)
                log.line(describe_resume(start, fold, engine.plan.steps_per_epoch, _find_last_sign_s(heartbeat, fold)))
            with Checkpointer(
                engine, experiment.paths, experiment.fingerprint, start, partial(context.owner.check, fold)
            ) as checkpointer:
                best = _fit(context, engine, checkpointer, progress, batches)
        except UserError:  # it says already what to do
            raise
        except (RuntimeError, ValueError) as error:
            explained = explain(error, experiment.config.train, accelerator)
            if explained is None:
                raise
            raise explained from error
        predictions = _make_predictions(experiment, fold, best, accelerator.mixed_precision)
        on_main(accelerator, lambda: _finish(experiment.paths, fold, predictions, context.owner))
        log.line(f"[FOLD {fold}] done | best epoch={best.epoch} macro_f1={best.macro_f1:.5f}")


def _log_disk(engine: Engine, paths: RunPaths) -> None:
    if engine.accelerator.is_main_process:
        trained = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
        need = estimate_disk(engine.bare_model.state_dict().values(), trained, engine.ema is not None)
        for line in describe_disk(need, measure_free(paths.root), engine.plan.fold, paths.root):
            engine.log.line(line)


def _find_last_sign_s(heartbeat: Heartbeat, fold: int) -> float | None:
    """When the process that trained the fold before this one gave its last, in seconds since 1970."""
    earlier = heartbeat.earlier
    return earlier.time_s if earlier is not None and earlier.fold == fold else None


def _finish(paths: RunPaths, fold: int, predictions: FoldPredictions, owner: FoldOwner) -> None:
    owner.check(fold)
    write_predictions(paths.predictions(fold), predictions)
    remove_resume_checkpoints(paths, [fold])


def release_memory(accelerator: Accelerator) -> None:
    """Let go of a finished fold's model and optimizer, which Accelerate and its patched methods still hold."""
    accelerator.free_memory()
    gc.collect()


def _reset(accelerator: Accelerator) -> None:
    """Nothing of an earlier fold: its gradient scale, compiled code and peak memory are not this fold's."""
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
    batches: WaitingBatches,
) -> BestEpoch:
    """The rest of all epochs; each is validated, and the weights of an improvement are saved at once."""
    first = find_epoch(progress.step, engine.plan)
    for epoch in range(first, engine.config.epochs):
        began_s = time.perf_counter()
        trained, waited = _train(engine, batches, epoch, progress, checkpointer)
        if waited > _MUCH_WAITING and epoch > first:  # the first is also the loader's start
            advice = advise_on_waiting(
                waited, batches.workers, count_own_cores(os.environ), context.experiment.data.stored is not None
            )
            engine.log.line(f"[DATA] {advice}")
        try:
            found, valid_loss = _validate(context.experiment, engine, batches, epoch)
        except Interrupted:  # on all ranks at one place
            engine.heartbeat.beat(phase="stopping")
            checkpointer.save(progress, wait=True)
            raise
        batches.take_s()
        row = EpochMetrics(
            fold=engine.plan.fold,
            epoch=epoch + 1,
            train_loss=trained.loss,
            valid_loss=valid_loss,
            macro_f1=found.macro_f1,
            lr=trained.lr,
            time_s=time.perf_counter() - began_s,
            mem_MiB=measure_memory(engine.accelerator),
            selection_f1=found.selection_f1,
            weights=found.weights,
        )
        _log_validation(engine, row)
        progress.rows.append(row)
        progress.meter = LossMeter()
        is_better = progress.best is None or found.selection_f1 >= progress.best.selection_f1  # of equals the later
        if is_better:
            progress.best = found
        remarks = on_main(engine.accelerator, partial(_record, context, engine, checkpointer, progress, is_better))
        for remark in remarks if epoch == first else ():
            engine.log.line(f"[WARNING] {remark}")
    on_main(engine.accelerator, partial(checkpointer.check_best, wait=True))
    assert progress.best is not None
    return progress.best


def _log_validation(engine: Engine, row: EpochMetrics) -> None:
    notes = f"selection_f1={row.selection_f1:.5f} " if row.selection_f1 != row.macro_f1 else ""
    notes += "" if engine.ema is None else f"weights={row.weights} "
    engine.log.line(
        f"[EPOCH {row.epoch}] fold={row.fold} valid_loss={row.valid_loss:.5f} macro_f1={row.macro_f1:.5f} "
        f"{notes}time_s={row.time_s:.1f}"
    )
    assert row.selection_f1 is not None
    values = {"valid/loss": row.valid_loss, "valid/macro_f1": row.macro_f1, "valid/selection_f1": row.selection_f1}
    engine.tracker.log(values, row.epoch * engine.plan.steps_per_epoch)


def _train(
    engine: Engine, batches: WaitingBatches, epoch: int, progress: FoldProgress, checkpointer: Checkpointer
) -> tuple[TrainedEpoch, float]:
    """Train the rest of an epoch (0-based) and log it; with the share of its time that pages were waited for."""
    accelerator, plan = engine.accelerator, engine.plan
    began_s, steps = time.perf_counter(), plan.steps_per_epoch - len(progress.meter.losses)
    with engine.log.progress(f"fold {plan.fold} epoch {epoch + 1}/{engine.config.epochs}", plan.steps_per_epoch) as bar:
        trained = train_epoch(engine, batches, epoch, progress, checkpointer, bar)
    average_buffers(engine)
    time_s = time.perf_counter() - began_s
    waited = batches.take_s() / time_s
    engine.log.line(
        f"[EPOCH {epoch + 1}] fold={plan.fold} loss={trained.loss:.5f} lr={trained.lr:.3e} "
        f"{'' if trained.skipped_steps is None else f'skipped_steps={trained.skipped_steps} '}"
        f"mem_MiB={measure_memory(accelerator):.0f} images_per_s={steps * plan.size / time_s:.1f} "
        f"data_wait={waited:.0%}"
    )
    return trained, waited


def _validate(experiment: Experiment, engine: Engine, batches: WaitingBatches, epoch: int) -> tuple[BestEpoch, float]:
    """Validate the raw and the averaged weights; the better ones' result (of equals the averaged ones') and their loss.

    Raises:
        UserError: a logit is not finite.
        Interrupted: a signal asked for the end.
    """
    manifest, fold, modules = experiment.data.manifest, engine.plan.fold, engine.modules
    place = BatchPlace("validate", fold, epoch)
    requests = list_evaluation(
        place, experiment.data.list_valid(fold), engine.division, engine.accelerator.process_index
    )
    indices, logits_MNC = predict_logits(
        list(modules.values()),
        engine.heartbeat.watch(islice(batches, len(requests)), "validate"),
        engine.normalize,
        engine.num_classes,
        engine.accelerator,
    )
    is_finite_N = np.isfinite(logits_MNC).all(axis=(0, 2))
    if not is_finite_N.all():
        bad = [manifest.ids[index] for index in indices[~is_finite_N]]
        raise UserError(f"fold {fold} epoch {epoch + 1}: {len(bad)} logits are not finite, such as {bad[:5]}")
    targets = manifest.targets_N[indices]
    scores = [selection_f1(targets, logits) for logits in logits_MNC]
    number = int(np.argmax(scores))
    logits = logits_MNC[number]
    found = BestEpoch(epoch + 1, macro_f1(targets, logits), scores[number], list(modules)[number], indices, logits)
    return found, cross_entropy(targets, logits)


def _record(
    context: RunContext, engine: Engine, checkpointer: Checkpointer, progress: FoldProgress, is_better: bool
) -> list[str]:
    """Write the metrics and, of an improvement, have the weights saved; the main process calls."""
    experiment = context.experiment
    context.owner.check(engine.plan.fold)
    checkpointer.check_best()
    if is_better:
        assert progress.best is not None
        checkpointer.save_best(_gather_best(experiment, engine, progress.best))
        path = experiment.paths.best_checkpoint(engine.plan.fold).relative_to(experiment.paths.root)
        engine.log.line(f"NEW_BEST F1={progress.best.selection_f1:.5f} -> {path}")
    return write_fold_metrics(experiment.paths, progress.rows)


def _gather_best(experiment: Experiment, engine: Engine, best: BestEpoch) -> BestWeights:
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
        # Without which fold was asked for: the same bytes, trained alone or with the others.
        config=experiment.config.model_dump(mode="json", exclude={"provenance": True, "data": {"valid_fold"}}),
    )


def _make_predictions(experiment: Experiment, fold: int, best: BestEpoch, precision: str) -> FoldPredictions:
    """The best epoch's logits as the fold's part; rows without a usable image are in it, as NaN."""
    manifest, assignment = experiment.data.manifest, experiment.data.assignment
    rows = assignment.list_valid(fold)
    logits = np.full((len(rows), len(manifest.classes)), np.nan, dtype=np.float32)
    logits[np.searchsorted(rows, best.indices_N)] = best.logits_NC
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
    )
    return FoldPredictions(info, rows.astype(np.int64), logits, manifest.targets_N[rows])


def measure_memory(accelerator: Accelerator) -> float:
    """MiB: the peak on this process's GPU since the start, or what this process now holds of main memory."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device) / 2**20
    return float(psutil.Process().memory_info().rss / 2**20)
