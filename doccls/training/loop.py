"""The epoch and the step: straight down, from batches to updated weights."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from doccls.config.schema import TrainConfig
from doccls.data.dataset import Batch, Drawing, SampleKey
from doccls.data.order import BatchPlan
from doccls.errors import UserError
from doccls.randomness import Purpose, derive_seed
from doccls.run.heartbeat import Heartbeat
from doccls.run.runlog import ProgressBar, RunLog
from doccls.run.signals import check_stop
from doccls.run.tracking import Tracker
from doccls.training.evaluate import Normalizer
from doccls.training.processes import raise_stop, render_stop


class TrainingError(UserError):
    """Training can't go on: the numbers went bad."""


@dataclass(frozen=True)
class Engine:
    """What one fold trains with."""

    accelerator: Accelerator
    model: nn.Module
    """As prepared: DDP around it, if there are several processes."""
    bare_model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    criterion: nn.Module
    mixup: Mixup | None
    normalize: Normalizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    plan: BatchPlan
    config: TrainConfig
    ids: Sequence[str]
    """Of all samples, to name those of a bad batch."""
    log: RunLog
    tracker: Tracker
    heart: Heartbeat

    @property
    def best_of(self) -> nn.Module:
        """The module that is validated and kept: the EMA's, if there is one."""
        module: nn.Module = self.bare_model if self.ema is None else self.ema.module
        return module


@dataclass
class LossMeter:
    """Losses of steps, kept on the device until they are asked for."""

    pending: list[torch.Tensor] = field(default_factory=list)
    falls: list[torch.Tensor] = field(default_factory=list)
    """In fp16, of the same steps: whether the gradient scale fell, which is to say that the step was skipped."""
    first_step: int = 0
    total: float = 0.0
    count: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class TrainedEpoch:
    """What training an epoch came to."""

    loss: float
    """Mean over the epoch's samples."""
    rate: float
    """The last learning rate."""
    skipped_steps: int | None = None
    """In fp16: steps whose gradients overflowed and were not taken; None in other precisions."""


def list_training_keys(
    plan: BatchPlan, epoch: int, micro_batch_size: int | None, rank: int, world_size: int
) -> Iterator[list[SampleKey]]:
    """One rank's micro-batches of an epoch (0-based)."""
    drawing = Drawing(plan.fold, epoch)
    for step in plan.list_steps(epoch):
        for micro_batch in plan.split_batch(step, rank, world_size, micro_batch_size):
            yield [SampleKey(index, drawing) for index in micro_batch.tolist()]


def train_epoch(engine: Engine, batches: Iterator[Batch], epoch: int, bar: ProgressBar) -> TrainedEpoch:
    """Train one epoch (0-based). All ranks must call.

    Raises:
        TrainingError: a loss was not finite; the step and the samples of its batch are named.
        Interrupted: a signal asked for the end; several ranks leave where they exchange losses, all at one step.
    """
    engine.model.train()
    plan, config = engine.plan, engine.config
    first = plan.list_steps(epoch).start
    meter = LossMeter(first_step=first)
    rate = 0.0
    for step in plan.list_steps(epoch):
        if engine.accelerator.num_processes == 1:
            check_stop()
        engine.scheduler.step_update(step)
        rate = float(engine.optimizer.param_groups[0]["lr"])
        scale = _read_scale(engine.accelerator)
        meter.pending.append(_take_step(engine, batches, step))
        if scale is not None:
            meter.falls.append(engine.accelerator.scaler._get_scale_async() < scale)
        engine.heart.beat(phase="train", epoch=epoch + 1, step=step + 1)
        bar.advance()
        done = step + 1 - first
        if done % config.log_interval == 0 or done == plan.steps_per_epoch:
            loss = _settle(engine, meter)
            told = f"fold={plan.fold} epoch={epoch + 1} loss={loss:.5f} lr={rate:.3e}"
            if scale is not None:
                told += f" scale={engine.accelerator.scaler.get_scale():g} skipped_steps={meter.skipped}"
            engine.log.detail(f"[STEP {done}/{plan.steps_per_epoch}] {told}")
            engine.tracker.log({"train/loss": loss, "train/lr": rate}, step + 1)
    return TrainedEpoch(meter.total / meter.count, rate, None if scale is None else meter.skipped)


def _read_scale(accelerator: Accelerator) -> torch.Tensor | None:
    """fp16's gradient scale as it is now, on the device, so that nothing waits for it; None in other precisions."""
    scaler = accelerator.scaler
    if scaler is None or not scaler.is_enabled():
        return None
    scale = scaler._get_scale_async()
    return torch.tensor(scaler.get_scale(), device=accelerator.device) if scale is None else scale.clone()


def _take_step(engine: Engine, batches: Iterator[Batch], step: int) -> torch.Tensor:
    """One optimizer step over one global batch; this rank's share of its mean loss, on the device."""
    accelerator, plan = engine.accelerator, engine.plan
    rank, world_size = accelerator.process_index, accelerator.num_processes
    sizes = [len(part) for part in plan.split_batch(step, rank, world_size, engine.config.micro_batch_size)]
    share = torch.zeros((), device=accelerator.device)
    for number, size in enumerate(sizes):
        batch = next(batches)
        assert len(batch.indices_N) == size
        _seed_step(plan, step, rank, number)
        images = engine.normalize(batch.images_NHWC.to(accelerator.device, non_blocking=True))
        images, targets = _mix(engine, images, batch.targets_N.to(accelerator.device, non_blocking=True))
        last = number + 1 == len(sizes)
        with nullcontext() if last else accelerator.no_sync(engine.model):
            with accelerator.autocast():
                logits = engine.model(images)
            # Sum over samples, divided once by the global batch: the same at any split into ranks and micro-batches.
            loss = engine.criterion(logits.float(), targets) * (size / plan.size)
            accelerator.backward(loss * world_size)  # DDP divides by it
        share += loss.detach()
    if engine.config.grad_clip_norm is not None:
        accelerator.clip_grad_norm_(engine.model.parameters(), engine.config.grad_clip_norm)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
    if engine.ema is not None:
        engine.ema.update(engine.bare_model, step=step + 1)
    return share


def _seed_step(plan: BatchPlan, step: int, rank: int, micro_batch: int) -> None:
    """Dropout and drop-path draw from torch's generator, Mixup from NumPy's: both start anew at each micro-batch."""
    seed = derive_seed(plan.seed, Purpose.STEP, plan.fold, step, rank, micro_batch)
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


def _settle(engine: Engine, meter: LossMeter) -> float:
    """Fetch the pending losses, sum them over ranks, check them; the mean of those steps. Stops all ranks together."""
    device, count = engine.accelerator.device, len(meter.pending)
    falls = torch.stack(meter.falls).sum()[None].float() if meter.falls else torch.zeros(1, device=device)
    own = torch.cat([torch.stack(meter.pending), falls, render_stop(device)])
    sums = engine.accelerator.reduce(own, reduction="sum").cpu().double()
    losses, fallen, stops = sums.tensor_split([count, count + 1])
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step = meter.first_step + int(bad[0])
        ids = [engine.ids[index] for index in engine.plan.list_batch(step)]
        epoch = step // engine.plan.steps_per_epoch
        raise TrainingError(
            f"fold {engine.plan.fold}: the loss of step {step + 1} (epoch {epoch + 1}) is {float(losses[bad[0]])}; "
            "nothing of it was saved. A lower train.lr, train.grad_clip_norm or train.amp: false may help. "
            f"The batch held {len(ids)} samples: {', '.join(ids)}"
        )
    meter.total += float(losses.sum())
    meter.count += len(losses)
    meter.first_step += len(losses)
    meter.pending.clear()
    meter.skipped += round(float(fallen) / engine.accelerator.num_processes)  # the scale is the same on all ranks
    meter.falls.clear()
    raise_stop(stops)
    return float(losses.mean())
