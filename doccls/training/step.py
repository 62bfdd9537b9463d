"""The epoch and the step: straight down, from batches to updated weights."""

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
from doccls.training.distributed import has_scaler, read_stop, render_stop
from doccls.training.engine import Engine, FoldProgress, LossMeter
from doccls.training.resume import Checkpointer

_LEAST_SCALE = 1.0
"""fp16's gradient scale, below which an overflow is no matter of scaling."""
_ASK_S = 2.0
"""Between two times that ranks ask each other whether to stop or to save."""


def group_gradients(engine: Engine) -> None:
    """Let DDP group its gradients for good, by one backward pass on blank images. All ranks must call.

    DDP groups gradients into buckets anew after the first backward pass, in the order in which they came. Three or more
    ranks sum another grouping in another order: without this pass the first step after a resume would differ in its
    last bits from that of an undisturbed run. Gradients and buffers are as before.
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
    """What training an epoch came to."""

    loss: float
    """Mean over the epoch's samples."""
    lr: float
    """The last learning rate."""
    skipped_steps: int | None = None
    """In fp16: steps whose gradients overflowed and were not taken; None in other precisions."""


def train_epoch(
    engine: Engine,
    batches: Iterator[Batch],
    epoch: int,
    progress: FoldProgress,
    checkpointer: Checkpointer,
    bar: ProgressBar,
) -> TrainedEpoch:
    """Train the rest of an epoch (0-based), whose first steps are in `progress`. All ranks must call.

    A resume checkpoint is saved when one is due, and before a stop.

    Raises:
        UserError: a loss was not finite; the step and the samples of its batch are named.
        Interrupted: a signal asked for the end; several ranks leave at one step, within some two seconds or a step.
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
        if not is_logged and not requests.any_pending():
            continue
        stop, is_due = _settle(engine, meter, first, checkpointer.is_due())
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
    lr = _set_lr(engine, plan.list_steps(epoch)[-1])  # where no step was left to do
    return TrainedEpoch(_mean_of_finite(meter.losses), lr, meter.skipped if has_scaler(engine.accelerator) else None)


def _set_lr(engine: Engine, step: int) -> float:
    """The learning rate of the step, which is in force from now on."""
    engine.scheduler.step_update(step)
    return float(engine.optimizer.param_groups[0]["lr"])


def _log_step(engine: Engine, meter: LossMeter, epoch: int, done: int, lr: float) -> None:
    """The mean loss since the last line, of an epoch (0-based) of which `done` steps are done."""
    plan, interval = engine.plan, engine.config.log_interval
    loss = _mean_of_finite(meter.losses[(done - 1) // interval * interval :])
    line = f"fold={plan.fold} epoch={epoch + 1} loss={loss:.5f} lr={lr:.3e}"
    if has_scaler(engine.accelerator):
        line += f" scale={engine.accelerator.scaler.get_scale():g} skipped_steps={meter.skipped}"
    engine.log.detail(f"[STEP {done}/{plan.steps_per_epoch}] {line}")
    engine.tracker.log({"train/loss": loss, "train/lr": lr}, plan.list_steps(epoch).start + done)


class _Requests:
    """Requests to stop or to save between two log lines, which several ranks learn at the same step.

    The ranks ask each other about every two seconds: after a number of steps that they derive from their mean step time
    when they last asked. So slow steps don't delay a stop, and fast ones don't pay for the question.
    """

    def __init__(self, engine: Engine, checkpointer: Checkpointer) -> None:
        self._engine, self._checkpointer = engine, checkpointer
        self._pause = self._left = 1
        self._asked_s = time.monotonic()

    def restart_count(self) -> None:
        """Count steps anew: the ranks have just exchanged requests. All ranks must call."""
        self._left, self._asked_s = self._pause, time.monotonic()

    def any_pending(self) -> bool:
        """Whether any rank has a request, as far as the ranks have asked. All ranks must call, once a step."""
        own = stop_requested() is not None or self._checkpointer.is_due()
        accelerator = self._engine.accelerator
        if accelerator.num_processes == 1:
            return own
        self._left -= 1
        if self._left:
            return False
        step_s = (time.monotonic() - self._asked_s) / self._pause
        exchanged = torch.tensor([float(own), step_s], device=accelerator.device)
        requests, sum_step_s = accelerator.reduce(exchanged, reduction="sum").tolist()
        self._pause = max(1, int(_ASK_S * accelerator.num_processes / max(sum_step_s, 1e-3)))
        self.restart_count()
        return bool(requests > 0)


def _read_scale(accelerator: Accelerator) -> torch.Tensor | None:
    """fp16's gradient scale as it is now, on the device, so that nothing waits for it; None in other precisions."""
    if not has_scaler(accelerator):
        return None
    scale = accelerator.scaler._get_scale_async()
    return torch.tensor(accelerator.scaler.get_scale(), device=accelerator.device) if scale is None else scale.clone()


def _take_step(engine: Engine, batches: Iterator[Batch], step: int) -> torch.Tensor:
    """One optimizer step over one global batch; this rank's share of its mean loss, on the device."""
    accelerator, plan = engine.accelerator, engine.plan
    share = torch.zeros((), device=accelerator.device)
    is_last = False
    while not is_last:
        batch = next(batches)
        place, is_last = batch.place, batch.place.is_last
        assert (place.phase, place.fold, place.step) == ("train", plan.fold, step)
        _seed_step(plan, place, accelerator.process_index)
        images = engine.normalize(batch.images_NHWC.to(accelerator.device, non_blocking=True))
        images, targets = _mix(engine, images, batch.targets_N.to(accelerator.device, non_blocking=True))
        with nullcontext() if is_last else accelerator.no_sync(engine.model):
            with accelerator.autocast():
                logits = engine.model(images)
            # Sum over samples, divided once by the global batch: the same at any split into ranks and micro-batches.
            loss = engine.criterion(logits.float(), targets) * (len(images) / plan.size)
            accelerator.backward(loss * accelerator.num_processes)  # DDP divides by it
        share += loss.detach()
    if engine.config.grad_clip_norm is not None:
        accelerator.clip_grad_norm_(engine.model.parameters(), engine.config.grad_clip_norm)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    if engine.ema is not None:
        engine.ema.update(engine.bare_model, step=step + 1)
    return share


def _seed_step(plan: BatchPlan, place: BatchPlace, rank: int) -> None:
    """Dropout and drop-path draw from torch's generator, Mixup from NumPy's: both start anew at each micro-batch."""
    seed = derive_seed(plan.seed, Purpose.STEP, plan.fold, place.step, rank, place.number)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's Mixup knows no other)


def _mix(engine: Engine, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup/CutMix; timm's pairs a batch with itself reversed and so needs an even one: an odd last stays unmixed."""
    if engine.mixup is None:
        return images, targets
    even = len(images) // 2 * 2
    if even == len(images):
        mixed: tuple[torch.Tensor, torch.Tensor] = engine.mixup(images, targets)
        return mixed
    rest = mixup_target(targets[even:], engine.num_classes, lam=1.0, smoothing=engine.config.label_smoothing)
    if even == 0:
        return images, rest
    mixed_images, mixed_targets = engine.mixup(images[:even], targets[:even])
    return torch.cat([mixed_images, images[even:]]), torch.cat([mixed_targets, rest])


def _have_finite_buffers(engine: Engine) -> torch.Tensor:
    """Whether the model's are on all ranks: an overflow within it spoils BatchNorm's, which no scaler takes back."""
    buffers = [
        buffer for module in engine.modules.values() for buffer in module.buffers() if buffer.is_floating_point()
    ]
    spoiled = torch.tensor([float(not all(bool(buffer.isfinite().all()) for buffer in buffers))])
    total = engine.accelerator.reduce(spoiled.to(engine.accelerator.device), reduction="sum")
    return torch.tensor(float(total) == 0)


def _mean_of_finite(losses: Sequence[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.mean(finite)) if finite else math.nan


def _settle(engine: Engine, meter: LossMeter, first: int, is_due: bool) -> tuple[int | None, bool]:
    """Fetch the pending losses, sum them over ranks, check them; `first` is the epoch's first step.

    Returns:
        (the signal by which all ranks are to stop, whether `is_due` on any of them).
    """
    device, count = engine.accelerator.device, len(meter.pending)
    drops = torch.stack(meter.scale_drops).float() if meter.scale_drops else torch.zeros(count, device=device)
    due = torch.tensor([float(is_due)], device=device)
    own = torch.cat([torch.stack(meter.pending), drops, due, render_stop(device)])
    # Summed here, by rank: a reduction's order of sums would depend on how many losses are pending.
    sums = engine.accelerator.gather(own[None]).cpu().double().sum(0)
    losses, dropped, due, stops = sums.tensor_split([count, 2 * count, 2 * count + 1])
    skipped = dropped > 0  # the scale is the same on all ranks
    bad = ~torch.isfinite(losses)
    if bad.any() and (scale := _read_scale(engine.accelerator)) is not None and float(scale) >= _LEAST_SCALE:
        bad &= ~(skipped & _have_finite_buffers(engine))
    bad = bad.nonzero()
    if len(bad):
        step = first + len(meter.losses) + int(bad[0])
        ids = [engine.ids[index] for index in engine.plan.list_batch(step)]
        epoch = step // engine.plan.steps_per_epoch
        raise UserError(
            f"fold {engine.plan.fold}: the loss of step {step + 1} (epoch {epoch + 1}) is {float(losses[bad[0]])}; "
            "nothing of it was saved. A lower train.lr, train.grad_clip_norm or train.amp: false may help. "
            f"The batch held {len(ids)} samples: {', '.join(ids)}"
        )
    meter.losses += losses.tolist()
    meter.pending.clear()
    meter.skipped += int(skipped.sum())
    meter.scale_drops.clear()
    return read_stop(stops), bool(due)
