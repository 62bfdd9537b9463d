"""Optimizer, schedule, losses, Mixup and EMA, built from the config with timm's factories."""

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
_LR_BATCH_SIZE = 32  # train.lr is for this batch size, under train.lr_scaling
_EMA_FRACTION = 0.05  # of a run's steps, spanned by the EMA under train.ema_decay: auto
_MIN_EMA_STEPS = 2.0
_EMA_WARMUP_POWER = 0.75
_FUSED = ("adam", "adamw", "sgd")


def check_optimizer_name(name: str) -> None:
    """Check that timm knows the optimizer (case-insensitive) and that it needs no second derivatives.

    Raises:
        UserError: the optimizer is unknown or unsupported; the message lists the closest names.
    """
    known = [str(other) for other in list_optimizers() if other != "adahessian"]  # needs backward(create_graph=True)
    if name.lower() not in known:
        near = get_close_matches(name.lower(), known, n=3, cutoff=0.4) or ["adam", "adamw", "sgd"]
        raise UserError(f"train.optimizer = {name!r}: no such optimizer; the closest are {', '.join(near)}")


def scale_lr(config: TrainConfig) -> float:
    """Return the factor that train.lr_scaling applies to train.lr and train.min_lr.

    Source: Goyal et al., "Accurate, Large Minibatch SGD", 2017 (linear); Krizhevsky, "One weird trick for parallelizing
    convolutional neural networks", 2014 (sqrt).
    """
    growth = config.batch_size / _LR_BATCH_SIZE
    return {"none": 1.0, "linear": growth, "sqrt": math.sqrt(growth)}[config.lr_scaling]


def has_fused_kernel(name: str) -> bool:
    """Return whether torch has a fused GPU kernel for the optimizer (case-insensitive)."""
    return name.lower() in _FUSED


def build_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Build timm's optimizer, without weight decay on biases and norms, with fused kernels on CUDA if torch has them.

    With train.layer_decay, layer l of L learns at layer_decay ** (L - l) times the learning rate, and the classifier at
    the full one. Source: Clark et al., "ELECTRA", 2020; Bao et al., "BEiT", 2021.

    Raises:
        UserError: timm has no such optimizer.
    """
    check_optimizer_name(config.optimizer)
    name = config.optimizer.lower()
    decay = config.layer_decay if config.layer_decay < 1 else None
    fused = {"fused": True} if device.type == "cuda" and has_fused_kernel(name) else {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=name,
            lr=config.lr * scale_lr(config),
            weight_decay=config.weight_decay,
            layer_decay=decay,
            **fused,
        )
    except (TypeError, ImportError, AssertionError, RuntimeError) as error:
        raise UserError(f"train.optimizer = {config.optimizer!r} can't be built here: {error}") from error
    return optimizer


def build_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """Build timm's schedule, whose `step_update(step)` sets the learning rate as a pure function of the step."""
    factor = scale_lr(config)
    is_constant = config.scheduler == "constant"  # built as steps that change nothing: new in timm 1.0.31
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if is_constant else config.scheduler,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_rate=1.0 if is_constant else config.decay_rate,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=factor * max(config.min_lr, config.lr * _WARMUP_FLOOR),
        min_lr=factor * config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    assert scheduler is not None
    return scheduler


def build_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """Build timm's Mixup/CutMix, or None if both are off. It draws from NumPy's global generator: seed it each step."""
    if not config.has_mixing:
        return None
    return Mixup(
        mixup_alpha=config.mixup_alpha,
        cutmix_alpha=config.cutmix_alpha,
        prob=config.mix_prob,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )


def build_loss(config: TrainConfig) -> nn.Module:
    """Build the mean loss over a batch of (logits_NC, targets): soft targets with Mixup, otherwise class indices."""
    if config.has_mixing:
        soft: nn.Module = SoftTargetCrossEntropy()
        return soft
    hard: nn.Module = LabelSmoothingCrossEntropy(smoothing=config.label_smoothing)
    return hard


def choose_ema_decay(config: TrainConfig, total_steps: int) -> float | None:
    """Return the decay of the weights' exponential moving average, or None if it is off.

    An average with decay d spans about 1 / (1 - d) steps; `auto` sets that to 5 % of `total_steps`.
    """
    if config.ema_decay == "auto":
        return 1.0 - 1.0 / max(_MIN_EMA_STEPS, _EMA_FRACTION * total_steps)
    return config.ema_decay


def describe_unreached_ema(config: TrainConfig, total_steps: int) -> str | None:
    """Return a warning if training ends before the EMA's warm-up reaches the decay that the config states."""
    if not isinstance(config.ema_decay, float) or total_steps < 1:
        return None
    reached = 1.0 - total_steps**-_EMA_WARMUP_POWER  # timm's formula, at the last step
    if reached >= config.ema_decay:
        return None
    return (
        f"train.ema_decay = {config.ema_decay:g} is not reached: the EMA's decay grows from step to step, and ends at "
        f"{reached:.3g} after {total_steps} steps; `auto` fits the decay to their number"
    )


def build_ema(config: TrainConfig, model: nn.Module, total_steps: int) -> ModelEmaV3 | None:
    """Build timm's EMA of the weights, or None if it is off. Its decay is warmed up, so short runs forget the start."""
    decay = choose_ema_decay(config, total_steps)
    return None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=_EMA_WARMUP_POWER)
