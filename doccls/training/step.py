"""The training loop: an epoch and its steps, from batches to updated weights."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from timm.data.mixup import mixup_target

from doccls.data.dataset import Batch
from doccls.data.sampler import BatchPlace, BatchPlan
from doccls.errors import UserError
from doccls.randomness import Purpose, derive_seed
from doccls.reporting.progress import ProgressBar
from doccls.system.signals import Interrupted, agree_to_stop, stop_requested
from doccls.training.distributed import decode_stop, encode_stop, has_scaler
from doccls.training.engine import Engine, FoldProgress, LossMeter
from doccls.training.resume import Checkpointer

_MIN_SCALE = 1.0  # fp16's gradient scale below which scaling no longer explains an overflow
_EXCHANGE_INTERVAL_S = 2.0  # between two exchanges of requests to stop or to save


def group_gradients(engine: Engine) -> None:
    """Make DDP fix its gradient buckets, by one backward pass on blank images. All ranks must call.

    After the first backward pass DDP regroups gradients into buckets, in the order in which they became ready. Three or
    more ranks sum other buckets in another order, so without this pass the first step after a resume would differ in
    its last bits from that of an uninterrupted run. Weights, buffers and gradients are left unchanged.
    """
    accelerator, plan = engine.accelerator, engine.plan
    if accelerator.num_processes == 1:
        return
    size = len(engine.division.split(plan.list_batch(0), accelerator.process_index)[0])
    side_px = engine.config.img_size
    blank = torch.zeros(size, side_px, side_px, 3, dtype=torch.uint8, device=accelerator.device)
    buffers = [(buffer, buffer.clone()) for buffer in engine.bare_model.buffers()]
    engine.model.train()
    with accelerator.autocast():
        logits = engine.model(engine.normalize(blank))
    accelerator.backward(logits.float().sum())
    engine.optimizer.zero_grad()
    for buffer, before in buffers:
        buffer.copy_(before)


@dataclass(frozen=True)
class TrainedEpoch:
    """The result of training an epoch."""

    loss: float  # the mean over the epoch's samples
    lr: float  # of the last step
    skipped_steps: int | None = None  # steps skipped in fp16 because gradients overflowed; None in other precisions


def train_epoch(
    engine: Engine,
    batches: Iterator[Batch],
    epoch: int,
    progress: FoldProgress,
    checkpointer: Checkpointer,
    bar: ProgressBar,
) -> TrainedEpoch:
    """Train the remaining steps of an epoch (0-based), whose first steps are in `progress`. All ranks must call.

    A resume checkpoint is saved when one is due, and before a stop.

    Raises:
        UserError: a loss is not finite; the message names the step and the samples of its batch.
        Interrupted: a signal asked for a stop. All ranks raise it at the same step, within about two seconds or a step.
    """
    engine.model.train()
    plan, config, meter = engine.plan, engine.config, progress.meter
    requests = _Requests(engine, checkpointer)
    first = plan.list_steps(epoch).start
    for step in plan.list_steps(epoch)[len(meter.losses) :]:
        lr = _set_lr(engine, step)
        scale = _read_scale(engine.accelerator)
        meter.pending.append(_take_step(engine, batches, step))
        if scale is not None:
            meter.scale_drops.append(engine.accelerator.scaler._get_scale_async() < scale)
        engine.heartbeat.beat(phase="train", epoch=epoch + 1, step=step + 1)
        bar.advance()
        done = step + 1 - first
        is_logged = done == plan.steps_per_epoch or done % config.log_interval == 0
        if not is_logged and not requests.has_pending():
            continue
        stop, is_due = _reduce_losses(engine, meter, first, checkpointer.is_due())
        progress.step = step + 1
        requests.restart_count()
        if is_logged:
            _log_step(engine, meter, epoch, done, lr)
        if stop is not None:
            agree_to_stop(stop)
            engine.heartbeat.beat(phase="stopping")
        if is_due or stop is not None:
            checkpointer.save(progress, wait=stop is not None)
        if stop is not None:
            raise Interrupted(stop)
    lr = _set_lr(engine, plan.list_steps(epoch)[-1])  # also if no step remained
    return TrainedEpoch(_mean_of_finite(meter.losses), lr, meter.skipped if has_scaler(engine.accelerator) else None)


def _set_lr(engine: Engine, step: int) -> float:
    """Set the step's learning rate and return it: with layer decay, that of the classifier."""
    engine.scheduler.step_update(step)
    return max(float(group["lr"]) for group in engine.optimizer.param_groups)


def _log_step(engine: Engine, meter: LossMeter, epoch: int, done: int, lr: float) -> None:
    """Log the mean loss since the last log line, after `done` steps of an epoch (0-based)."""
    plan, interval = engine.plan, engine.config.log_interval
    loss = _mean_of_finite(meter.losses[(done - 1) // interval * interval :])
    line = f"fold={plan.fold} epoch={epoch + 1} loss={loss:.5f} lr={lr:.3e}"
    if has_scaler(engine.accelerator):
        line += f" scale={engine.accelerator.scaler.get_scale():g} skipped_steps={meter.skipped}"
    engine.log.detail(f"[STEP {done}/{plan.steps_per_epoch}] {line}")
    engine.tracker.log({"train/loss": loss, "train/lr": lr}, plan.list_steps(epoch).start + done)


class _Requests:
    """Requests to stop or to save between two log lines, of which all ranks learn at the same step.

    The ranks exchange them about every two seconds: after a number of steps that they derive from their mean step time
    up to the last exchange. So slow steps don't delay a stop, and fast ones don't pay for an exchange each.
    """

    def __init__(self, engine: Engine, checkpointer: Checkpointer) -> None:
        self._engine, self._checkpointer = engine, checkpointer
        self._interval = self._steps_left = 1
        self._exchanged_s = time.monotonic()

    def restart_count(self) -> None:
        """Restart the step count, since the ranks have just exchanged requests. All ranks must call."""
        self._steps_left, self._exchanged_s = self._interval, time.monotonic()

    def has_pending(self) -> bool:
        """Return whether any rank has a request, as of the last exchange. All ranks must call, once per step."""
        own = stop_requested() is not None or self._checkpointer.is_due()
        accelerator = self._engine.accelerator
        if accelerator.num_processes == 1:
            return own
        self._steps_left -= 1
        if self._steps_left:
            return False
        step_s = (time.monotonic() - self._exchanged_s) / self._interval
        exchanged = torch.tensor([float(own), step_s], device=accelerator.device)
        requests, sum_step_s = accelerator.reduce(exchanged, reduction="sum").tolist()
        self._interval = max(1, int(_EXCHANGE_INTERVAL_S * accelerator.num_processes / max(sum_step_s, 1e-3)))
        self.restart_count()
        return bool(requests > 0)


def _read_scale(accelerator: Accelerator) -> torch.Tensor | None:
    """Return fp16's current gradient scale on the device, without waiting for it; None in other precisions."""
    if not has_scaler(accelerator):
        return None
    scale = accelerator.scaler._get_scale_async()
    return torch.tensor(accelerator.scaler.get_scale(), device=accelerator.device) if scale is None else scale.clone()


def _take_step(engine: Engine, batches: Iterator[Batch], step: int) -> torch.Tensor:
    """Take one optimizer step over a global batch; return this rank's part of its mean loss, on the device."""
    accelerator, plan = engine.accelerator, engine.plan
    rank_loss = torch.zeros((), device=accelerator.device)
    is_last = False
    while not is_last:
        batch = next(batches)
        place, is_last = batch.place, batch.place.is_last
        assert (place.phase, place.fold, place.step) == ("train", plan.fold, step)
        _seed_step(plan, place, accelerator.process_index)
        images = engine.normalize(batch.images_NHWC.to(accelerator.device, non_blocking=True))
        images, targets = _mix(engine, images, batch.targets_N.to(accelerator.device, non_blocking=True), place.epoch)
        with nullcontext() if is_last else accelerator.no_sync(engine.model):
            with accelerator.autocast():
                logits = engine.model(images)
            # Summed over samples and divided by the global batch: the same for any split into ranks and micro-batches.
            loss = engine.criterion(logits.float(), targets) * (len(images) / plan.size)
            accelerator.backward(loss * accelerator.num_processes)  # DDP divides by their number
        rank_loss += loss.detach()
    if engine.config.grad_clip_norm is not None:
        accelerator.clip_grad_norm_(engine.model.parameters(), engine.config.grad_clip_norm)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    if engine.ema is not None:
        engine.ema.update(engine.bare_model, step=step + 1)
    return rank_loss


def _seed_step(plan: BatchPlan, place: BatchPlace, rank: int) -> None:
    """Seed the generators for a micro-batch: dropout and drop-path draw from torch's, Mixup from NumPy's."""
    seed = derive_seed(plan.seed, Purpose.STEP, plan.fold, place.step, rank, place.number)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's Mixup uses no other)


def _mix(engine: Engine, images: torch.Tensor, targets: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply Mixup or CutMix. timm pairs a batch with its reverse, so an odd batch's last image stays unmixed."""
    if engine.mixup is None:
        return images, targets
    is_mixed = epoch < engine.config.epochs - engine.config.unmixed_epochs
    even = len(images) // 2 * 2 if is_mixed else 0
    if even == len(images):
        mixed: tuple[torch.Tensor, torch.Tensor] = engine.mixup(images, targets)
        return mixed
    odd_target = mixup_target(targets[even:], engine.num_classes, lam=1.0, smoothing=engine.config.label_smoothing)
    if even == 0:
        return images, odd_target
    mixed_images, mixed_targets = engine.mixup(images[:even], targets[:even])
    return torch.cat([mixed_images, images[even:]]), torch.cat([mixed_targets, odd_target])


def _have_finite_buffers(engine: Engine) -> torch.Tensor:
    """Return whether all ranks' buffers are finite. A scaler can't undo an overflow in BatchNorm's statistics."""
    buffers = [
        buffer for module in engine.modules.values() for buffer in module.buffers() if buffer.is_floating_point()
    ]
    has_bad = torch.tensor([float(not all(bool(buffer.isfinite().all()) for buffer in buffers))])
    total = engine.accelerator.reduce(has_bad.to(engine.accelerator.device), reduction="sum")
    return torch.tensor(float(total) == 0)


def _mean_of_finite(losses: Sequence[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.mean(finite)) if finite else math.nan


def _reduce_losses(engine: Engine, meter: LossMeter, first: int, is_due: bool) -> tuple[int | None, bool]:
    """Sum the pending losses over the ranks, fetch and check them; `first` is the epoch's first step.

    Returns:
        (the signal by which all ranks have to stop, whether `is_due` on any of them).
    """
    device, count = engine.accelerator.device, len(meter.pending)
    drops = torch.stack(meter.scale_drops).float() if meter.scale_drops else torch.zeros(count, device=device)
    due = torch.tensor([float(is_due)], device=device)
    own = torch.cat([torch.stack(meter.pending), drops, due, encode_stop(device)])
    # Summed here, in the order of ranks: a collective's order would depend on how many losses are pending.
    sums = engine.accelerator.gather(own[None]).cpu().double().sum(0)
    losses, dropped, due, stops = sums.tensor_split([count, 2 * count, 2 * count + 1])
    skipped = dropped > 0  # the scale is the same on all ranks
    bad = ~torch.isfinite(losses)
    if bad.any() and (scale := _read_scale(engine.accelerator)) is not None and float(scale) >= _MIN_SCALE:
        bad &= ~(skipped & _have_finite_buffers(engine))
    bad = bad.nonzero()
    if len(bad):
        step = first + len(meter.losses) + int(bad[0])
        ids = [engine.ids[index] for index in engine.plan.list_batch(step)]
        epoch = step // engine.plan.steps_per_epoch
        raise UserError(
            f"fold {engine.plan.fold}: the loss of step {step + 1} (epoch {epoch + 1}) is {float(losses[bad[0]])}; "
            "the step was not saved. Try a lower train.lr, train.grad_clip_norm or train.amp: false. "
            f"The batch held {len(ids)} samples: {', '.join(ids)}"
        )
    meter.losses += losses.tolist()
    meter.pending.clear()
    meter.skipped += int(skipped.sum())
    meter.scale_drops.clear()
    return decode_stop(stops), bool(due)
