"""One fold from end to end: build, train, validate, keep the best, write its part."""

import gc
import os
import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import islice

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from timm.utils import distribute_bn

from doccls.experiment import Experiment
from doccls.model.build import build_model, count_parameters, get_normalization, synchronize_batchnorm
from doccls.model.optim import build_ema, build_loss, build_mixup, build_optimizer, build_scheduler, scale_lr
from doccls.oof.metrics import cross_entropy, macro_f1
from doccls.oof.parts import OofPart, PartInfo, remove_states, write_part
from doccls.randomness import Purpose, derive_seed
from doccls.run.cores import count_own_cores
from doccls.run.disk import measure_free
from doccls.run.heartbeat import Heartbeat
from doccls.run.history import EpochMetrics, write_fold_metrics
from doccls.run.owner import FoldOwner
from doccls.run.paths import RunPaths
from doccls.run.runlog import RunLog
from doccls.run.signals import ending_at_once
from doccls.run.tracking import Tracker, track_fold
from doccls.training.batches import WaitingBatches, advise_on_waiting, find_epoch, list_validation_keys
from doccls.training.checkpoint import BestCheckpoint, write_best
from doccls.training.evaluate import Normalizer, predict_logits
from doccls.training.explain import advise_on_batchnorm, check_smallest_share, explain
from doccls.training.loop import Engine, LossMeter, TrainingError, group_gradients, train_epoch
from doccls.training.processes import agree_on_stop, await_all, on_main
from doccls.training.resume import StateKeeper, take_up
from doccls.training.space import describe_space, measure_space
from doccls.training.speed import describe_kernels, wants_compile
from doccls.training.starts import Start, describe_start
from doccls.training.state import BestSoFar, Progress

_MUCH_WAITING = 0.1
"""Share of an epoch's time, above which it is said what to do about it."""


def train_fold(
    experiment: Experiment,
    fold: int,
    start: Start | None,
    batches: WaitingBatches,
    accelerator: Accelerator,
    log: RunLog,
    heart: Heartbeat,
    owner: FoldOwner,
) -> None:
    """Train one fold and leave its checkpoint, its metrics and, last, its OOF part. All ranks must call.

    It takes its own of the batches of `load_folds`, which begin at `start`.

    Raises:
        UserError: the model, its weights or the optimizer can't be had, the numbers went bad, or another process has
            taken the fold meanwhile.
        Interrupted: a signal asked for the end, of this rank or another.
    """
    run_dir = experiment.paths.root if accelerator.is_main_process else None
    agree_on_stop(accelerator)
    _start_afresh(accelerator)
    with track_fold(experiment.config, run_dir, fold, log) as tracker:
        heart.beat(phase="start", fold=fold, epoch=0, step=0)
        try:
            keeper = StateKeeper(
                experiment.paths.last_states(fold),
                start,
                experiment.config.train.checkpoint_interval_s,
                accelerator,
                log,
                partial(owner.check, fold),
            )
            engine = _build_engine(experiment, fold, accelerator, log, tracker, heart, keeper)
            if run_dir is not None:
                for line in describe_space(measure_space(engine), measure_free(run_dir), fold, run_dir):
                    log.line(line)
            group_gradients(engine)
            progress = Progress()
            if start is not None:
                progress = take_up(engine, start)
                log.line(describe_start(start, fold, engine.plan.steps_per_epoch, _find_last_sign_s(heart, fold)))
            with keeper:
                best = _fit(experiment, engine, keeper, progress, batches, owner)
        except TrainingError:
            raise
        except (RuntimeError, ValueError) as error:
            explained = explain(error, experiment.config.train, accelerator)
            if explained is None:
                raise
            raise explained from error
        part = _make_part(experiment, fold, best, accelerator.mixed_precision)
        on_main(accelerator, lambda: _finish(experiment.paths, fold, part, owner))
        log.line(f"[FOLD {fold}] done | best epoch={best.epoch} macro_f1={best.macro_f1:.5f}")


def _find_last_sign_s(heart: Heartbeat, fold: int) -> float | None:
    """When the process that trained the fold before this one gave its last, in seconds since 1970."""
    earlier = heart.earlier
    return earlier.time_s if earlier is not None and earlier.fold == fold else None


def _finish(paths: RunPaths, fold: int, part: OofPart, owner: FoldOwner) -> None:
    owner.check(fold)
    write_part(paths.part(fold), part)
    remove_states(paths, [fold])


def release_memory(accelerator: Accelerator) -> None:
    """Let go of a finished fold's model and optimizer, which Accelerate and its patched methods still hold."""
    accelerator.free_memory()
    gc.collect()


def _start_afresh(accelerator: Accelerator) -> None:
    """Nothing of an earlier fold: its gradient scale, compiled code and peak memory are not this fold's."""
    if accelerator.scaler is not None and accelerator.scaler.is_enabled():
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    torch.compiler.reset()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)


def _build_engine(
    experiment: Experiment,
    fold: int,
    accelerator: Accelerator,
    log: RunLog,
    tracker: Tracker,
    heart: Heartbeat,
    keeper: StateKeeper,
) -> Engine:
    config, manifest = experiment.config, experiment.data.manifest
    train = config.train
    samples = experiment.data.list_train(fold)
    valid = experiment.data.list_valid(fold)
    plan = experiment.plan(fold)
    if accelerator.num_processes > plan.size:
        raise TrainingError(f"fold {fold}: {plan.size} samples a step can't feed {accelerator.num_processes} processes")
    log.line(
        f"[DATA] dataset sizes | fold={fold} train={len(samples)} valid={len(valid)} classes={len(manifest.classes)}"
    )

    if config.model.pretrained and config.model.weights is None:
        log.line(f"[MODEL] weights of {config.model.name} from the hub or its cache (offline: model.weights)")
    torch.manual_seed(derive_seed(config.project.seed, Purpose.INITIAL_WEIGHTS, fold))
    with ending_at_once():  # the hub may be slow, and nothing of this fold is there to lose
        model = build_model(config.model, len(manifest.classes), train.img_size)
    await_all(accelerator)  # one machine's hub may be slower than collectives may take
    mean, std = get_normalization(config.model, model)
    if train.sync_bn and accelerator.num_processes > 1:
        if accelerator.device.type != "cuda":
            raise TrainingError("train.sync_bn: torch has SyncBatchNorm for GPUs alone; set it to false on CPUs")
        if plan.size % accelerator.num_processes:  # else ranks may split their shares into unequally many pieces
            raise TrainingError(
                f"train.sync_bn: a batch of {plan.size} images can't be shared equally by {accelerator.num_processes} "
                "processes: take a multiple as train.batch_size"
            )
        model = synchronize_batchnorm(model)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    check_smallest_share(model, plan, train, accelerator.num_processes)
    total, trainable = count_parameters(model)
    log.line(
        f"[MODEL] name={config.model.name} pooling={config.model.pooling or 'default'} "
        f"params(total/trainable)={total:,}/{trainable:,} "
        f"device={accelerator.device} precision={accelerator.mixed_precision}"
    )
    log.line(f"[MODEL] kernels: {describe_kernels(train, accelerator.device)}")
    at_a_time = train.count_images_at_a_time(accelerator.num_processes)
    advice = advise_on_batchnorm(model, train, accelerator)
    if advice is not None:
        log.line(f"[WARNING] {advice}")
    ema = build_ema(train, model)
    optimizer = build_optimizer(train, model, accelerator.device)
    scheduler = build_scheduler(train, optimizer, plan.steps_per_epoch)
    scaled = "" if train.lr_scaling == "none" else f" (train.lr={train.lr:g}, {train.lr_scaling} in train.batch_size)"
    log.line(
        f"[OPTIM] {train.optimizer} lr={train.lr * scale_lr(train):g}{scaled} weight_decay={train.weight_decay:g} "
        f"ema={train.ema_decay}"
    )
    log.line(
        f"[SCHED] {train.scheduler} warmup_epochs={train.warmup_epochs:g} min_lr={train.min_lr * scale_lr(train):g} "
        f"steps={plan.steps_per_epoch} epochs={train.epochs} batch={plan.size} processes={accelerator.num_processes} "
        f"images_at_a_time={at_a_time}"
    )
    if wants_compile(train, accelerator.device):
        model.compile()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*broadcast_buffers", FutureWarning
        )  # torch renames it; Accelerate has not yet
        wrapped, prepared_optimizer = accelerator.prepare(model, optimizer)
    return Engine(
        accelerator=accelerator,
        model=wrapped,
        bare_model=model,
        ema=ema,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        criterion=build_loss(train),
        mixup=build_mixup(train, len(manifest.classes)),
        normalize=Normalizer(mean, std, accelerator.device),
        mean=mean,
        std=std,
        num_classes=len(manifest.classes),
        plan=plan,
        config=train,
        ids=manifest.ids,
        log=log,
        tracker=tracker,
        heart=heart,
        is_save_due=keeper.is_due,
    )


def _fit(
    experiment: Experiment,
    engine: Engine,
    keeper: StateKeeper,
    progress: Progress,
    batches: WaitingBatches,
    owner: FoldOwner,
) -> BestSoFar:
    """The rest of all epochs; each is validated, and an improvement is kept at once: weights and logits in one file."""
    accelerator, log, manifest = engine.accelerator, engine.log, experiment.data.manifest
    config, targets, fold = experiment.config, manifest.targets_N, engine.plan.fold
    num_valid = len(list_validation_keys(experiment, fold, accelerator))

    best, rows = progress.best, list(progress.rows)
    meter = LossMeter(list(progress.losses), progress.skipped_steps)

    def save(step: int, meter: LossMeter, wait: bool) -> None:
        reached = Progress(step, tuple(meter.losses), meter.skipped, best, tuple(rows))
        keeper.save(engine, experiment.identity, reached, wait)

    first = find_epoch(progress.step, engine.plan)
    for epoch in range(first, config.train.epochs):
        started_s, trained = time.perf_counter(), (engine.plan.steps_per_epoch - len(meter.losses)) * engine.plan.size
        with log.progress(f"fold {fold} epoch {epoch + 1}/{config.train.epochs}", engine.plan.steps_per_epoch) as bar:
            done = train_epoch(engine, batches, epoch, meter, save, bar)
        meter = LossMeter()
        if accelerator.num_processes > 1:
            distribute_bn(engine.best_of, accelerator.num_processes, reduce=True)
        trained_s = time.perf_counter() - started_s
        share = batches.take_s() / trained_s
        log.line(
            f"[EPOCH {epoch + 1}] fold={fold} loss={done.loss:.5f} lr={done.rate:.3e} "
            f"{'' if done.skipped_steps is None else f'skipped_steps={done.skipped_steps} '}"
            f"mem_MiB={measure_memory(accelerator):.0f} images_per_s={trained / trained_s:.1f} data_wait={share:.0%}"
        )
        if share > _MUCH_WAITING and epoch > first:  # the first is also the loader's start
            stored = experiment.data.stored is not None
            log.line(f"[DATA] {advise_on_waiting(share, batches.workers, count_own_cores(os.environ), stored)}")
        indices, logits = predict_logits(
            engine.best_of,
            engine.heart.watch(islice(batches, num_valid), "validate"),
            engine.normalize,
            engine.num_classes,
            accelerator,
        )
        if not np.isfinite(logits).all():
            bad = [manifest.ids[index] for index in indices[~np.isfinite(logits).all(axis=1)]]
            raise TrainingError(f"fold {fold} epoch {epoch + 1}: {len(bad)} logits are not finite, such as {bad[:5]}")
        score, valid_loss = macro_f1(targets[indices], logits), cross_entropy(targets[indices], logits)
        batches.take_s()
        row = EpochMetrics(
            fold,
            epoch + 1,
            done.loss,
            valid_loss,
            score,
            done.rate,
            time.perf_counter() - started_s,
            measure_memory(accelerator),
        )
        log.line(
            f"[EPOCH {row.epoch}] fold={fold} valid_loss={valid_loss:.5f} macro_f1={score:.5f} time_s={row.time_s:.1f}"
        )
        engine.tracker.log(
            {"valid/loss": valid_loss, "valid/macro_f1": score}, (epoch + 1) * engine.plan.steps_per_epoch
        )
        rows.append(row)
        if best is None or score > best.macro_f1:
            best = BestSoFar(epoch + 1, score, indices, logits)
            on_main(accelerator, partial(_keep_best, experiment, engine, best, owner))
        remarks = on_main(accelerator, partial(_write_metrics, experiment.paths, rows, owner))
        for remark in remarks if epoch == first else ():
            log.line(f"[WARNING] {remark}")
    assert best is not None
    return best


def _write_metrics(paths: RunPaths, rows: Sequence[EpochMetrics], owner: FoldOwner) -> list[str]:
    owner.check(rows[0].fold)
    return write_fold_metrics(paths, rows)


def _keep_best(experiment: Experiment, engine: Engine, best: BestSoFar, owner: FoldOwner) -> None:
    fold = engine.plan.fold
    owner.check(fold)
    path = experiment.paths.best_checkpoint(fold)
    write_best(
        path,
        BestCheckpoint(
            state_dict={name: value.detach().cpu() for name, value in engine.best_of.state_dict().items()},
            oof={"indices": torch.from_numpy(best.indices_N), "logits": torch.from_numpy(best.logits_NC)},
            identity=experiment.identity,
            fold=fold,
            epoch=best.epoch,
            macro_f1=best.macro_f1,
            classes=experiment.data.manifest.classes,
            mean=engine.mean,
            std=engine.std,
            precision=engine.accelerator.mixed_precision,
            # Without which fold was asked for: the same bytes, trained alone or with the others.
            config=experiment.config.model_dump(mode="json", exclude={"provenance": True, "data": {"valid_fold"}}),
        ),
    )
    engine.log.line(f"NEW_BEST F1={best.macro_f1:.5f} -> {path.relative_to(experiment.paths.root)}")


def _make_part(experiment: Experiment, fold: int, best: BestSoFar, precision: str) -> OofPart:
    """The best epoch's logits as the fold's part; rows without a usable image are in it, as NaN."""
    manifest, assignment = experiment.data.manifest, experiment.data.assignment
    rows = assignment.list_valid(fold)
    logits = np.full((len(rows), len(manifest.classes)), np.nan, dtype=np.float32)
    logits[np.searchsorted(rows, best.indices_N)] = best.logits_NC
    info = PartInfo(
        identity=experiment.identity,
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
    )
    return OofPart(info, rows.astype(np.int64), logits, manifest.targets_N[rows])


def measure_memory(accelerator: Accelerator) -> float:
    """MiB: the peak on this process's GPU since the start, or what this process now holds of main memory."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device) / 2**20
    return float(psutil.Process().memory_info().rss / 2**20)
