"""Optimizer, schedule, losses, Mixup and EMA: timm's factories, told by the config."""

import math
from difflib import get_close_matches

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from doccls.config.schema import TrainConfig
from doccls.errors import UserError

_WARMUP_FLOOR = 1e-3
_LR_BATCH_SIZE = 32
"""The batch for which train.lr is stated, under train.lr_scaling."""
_EMA_SHARE = 0.05
"""Of a run's steps, which the average spans under train.ema_decay: auto."""
_LEAST_EMA_STEPS = 2.0
_FUSED = ("adam", "adamw", "sgd")


def check_optimizer_name(name: str) -> None:
    """timm knows the optimizer, in any case of letters, and it needs no second derivatives.

    Raises:
        UserError: it does not; the closest names are told.
    """
    known = [str(other) for other in list_optimizers() if other != "adahessian"]  # wants backward(create_graph=True)
    if name.lower() not in known:
        near = get_close_matches(name.lower(), known, n=3, cutoff=0.4) or ["adam", "adamw", "sgd"]
        raise UserError(f"train.optimizer = {name!r}: no such optimizer here; near: {', '.join(near)}")


def scale_lr(config: TrainConfig) -> float:
    """The factor of train.lr_scaling on train.lr and train.min_lr.

    Source: Goyal et al., "Accurate, Large Minibatch SGD", 2017 (linear); Krizhevsky, "One weird trick for parallelizing
    convolutional neural networks", 2014 (sqrt).
    """
    growth = config.batch_size / _LR_BATCH_SIZE
    return {"none": 1.0, "linear": growth, "sqrt": math.sqrt(growth)}[config.lr_scaling]


def has_fused_kernel(name: str) -> bool:
    """Whether torch has one, on GPUs, for an optimizer in any case of letters."""
    return name.lower() in _FUSED


def build_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """timm's optimizer with weight decay off for biases and norms; fused kernels on CUDA where torch has them.

    Raises:
        UserError: timm has no such optimizer.
    """
    check_optimizer_name(config.optimizer)
    name = config.optimizer.lower()
    fused = {"fused": True} if device.type == "cuda" and has_fused_kernel(name) else {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, opt=name, lr=config.lr * scale_lr(config), weight_decay=config.weight_decay, **fused
        )
    except (TypeError, ImportError, AssertionError, RuntimeError) as error:
        raise UserError(f"train.optimizer = {config.optimizer!r} can't be built here: {error}") from error
    return optimizer


def build_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule. `scheduler.step_update(step)` sets the rate: a pure function of the step, never counted up."""
    factor = scale_lr(config)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.scheduler,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_rate=config.decay_rate,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=factor * max(config.min_lr, config.lr * _WARMUP_FLOOR),
        min_lr=factor * config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None
    return scheduler


def build_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """timm's Mixup/CutMix, None if both are off. It draws from NumPy's global generator: seed that each step."""
    if config.mixup_alpha == 0 and config.cutmix_alpha == 0:
        return None
    return Mixup(
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        prob=config.mix_prob,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )


def build_loss(config: TrainConfig) -> nn.Module:
    """Mean loss over a batch, of (logits_NC, targets): soft targets under Mixup, else class indices."""
    if config.mixup_alpha > 0 or config.cutmix_alpha > 0:
        soft: nn.Module = SoftTargetCrossEntropy()
        return soft
    hard: nn.Module = LabelSmoothingCrossEntropy(smoothing=config.label_smoothing)
    return hard


def choose_ema_decay(config: TrainConfig, total_steps: int) -> float | None:
    """The decay of the weights' exponential moving average, None if it is off.

    An average with decay d spans about 1 / (1 - d) steps; `auto` makes that a twentieth of a run of `total_steps`.
    """
    if config.ema_decay == "auto":
        return 1.0 - 1.0 / max(_LEAST_EMA_STEPS, _EMA_SHARE * total_steps)
    return config.ema_decay


def build_ema(config: TrainConfig, model: nn.Module, total_steps: int) -> ModelEmaV3 | None:
    """timm's EMA of the weights, None if off. Its decay is warmed up, so that a short run forgets its start."""
    decay = choose_ema_decay(config, total_steps)
    return None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=0.75)
