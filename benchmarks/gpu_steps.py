"""Measure doccls's training loop and a bare one, alternating in one process, on images in memory."""

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from doccls.config.schema import ModelConfig, TrainConfig
from doccls.data.dataset import Batch
from doccls.data.sampler import BatchDivision, BatchPlace, BatchPlan
from doccls.model.build import build_model, get_normalization
from doccls.model.optim import build_loss, build_optimizer, build_scheduler
from doccls.reporting.log import RunLog
from doccls.reporting.progress import ProgressBar
from doccls.run.heartbeat import Heartbeat
from doccls.run.paths import RunPaths
from doccls.training.engine import Engine, FoldProgress
from doccls.training.evaluate import Normalizer
from doccls.training.resume import Checkpointer
from doccls.training.speed import choose_kernels, wants_compile
from doccls.training.step import train_epoch

_CLASSES = 17
_BATCHES = 4


@dataclass(frozen=True)
class Network:
    """A network to train in bf16."""

    name: str
    size_px: int


@dataclass(frozen=True)
class StepFigures:
    """Images/s of both loops, by round, for one network with one choice of kernels."""

    network: str
    kernels: str  # such as `fast, compiled`
    ours: tuple[float, ...]
    bare: tuple[float, ...]
    memory_mib: float  # peak GPU memory of doccls's loop


class _Untracked:
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Discard the values."""


def measure_steps(network: Network, train: TrainConfig, device: torch.device, steps: int, rounds: int) -> StepFigures:
    """Measure both loops alternately, `rounds` times `steps` steps each, after a warm-up round."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    gc.collect()  # of the previous network
    train = train.model_copy(update={"checkpoint_interval_s": math.inf})  # no resume checkpoints
    choose_kernels(train)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ours = _prepare_ours(network, train, accelerator, steps)
    ours()
    memory_mib = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    bare = _prepare_bare(network, train, device, steps)
    bare()
    images = steps * train.batch_size
    rates = [(images / _time(ours, device), images / _time(bare, device)) for _ in range(rounds)]
    kernels = train.speed + (", compiled" if wants_compile(train, device) else "")
    return StepFigures(
        network.name, kernels, tuple(rate for rate, _ in rates), tuple(rate for _, rate in rates), memory_mib
    )


def _time(train_steps: Callable[[], None], device: torch.device) -> float:
    started_s = time.perf_counter()
    train_steps()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s


def _build(network: Network) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=network.name, pretrained=False), _CLASSES, network.size_px)


def _draw_batches(network: Network, train: TrainConfig) -> list[torch.Tensor]:
    shape = (train.batch_size, network.size_px, network.size_px, 3)
    return [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(_BATCHES)]


def _prepare_ours(network: Network, train: TrainConfig, accelerator: Accelerator, steps: int) -> Callable[[], None]:
    """Prepare an epoch of doccls's loop on batches in pinned memory, as the loader yields them."""
    device, model = accelerator.device, _build(network)
    mean, std = get_normalization(ModelConfig(name=network.name, pretrained=False), model)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(train, model, device)
    plan = BatchPlan(0, 0, np.arange(steps * train.batch_size), train.batch_size, train.epochs)
    scheduler = build_scheduler(train, optimizer, plan.steps_per_epoch)
    if wants_compile(train, device):
        model.compile()
    wrapped, prepared = accelerator.prepare(model, optimizer)
    targets = torch.randint(0, _CLASSES, (train.batch_size,))
    batch_images = _draw_batches(network, train)
    if device.type == "cuda":
        batch_images, targets = [images.pin_memory() for images in batch_images], targets.pin_memory()
    rows = torch.arange(train.batch_size)
    batches = (
        Batch(batch_images[step % _BATCHES], targets, rows, BatchPlace("train", 0, step=step, is_last=True))
        for step in itertools.count()
    )
    engine = Engine(
        accelerator=accelerator, model=wrapped, bare_model=model, ema=None, optimizer=prepared, scheduler=scheduler,
        criterion=build_loss(train), mixup=None, normalize=Normalizer(mean, std, device),
        num_classes=_CLASSES, plan=plan, division=BatchDivision.derive(train, 1), config=train,
        ids=[""] * len(plan.samples), log=RunLog(None), tracker=_Untracked(), heartbeat=Heartbeat(),
    )  # fmt: skip
    checkpointer = Checkpointer(engine, RunPaths(Path("unused")), "", None)
    epochs = itertools.count()

    def train_steps() -> None:
        train_epoch(engine, batches, next(epochs), FoldProgress(), checkpointer, ProgressBar(None))

    return train_steps


def _prepare_bare(network: Network, train: TrainConfig, device: torch.device, steps: int) -> Callable[[], None]:
    """Prepare what any trainer must do, on images on the device: normalize, forward, loss, backward, clip, step."""
    model = _build(network)
    mean, std = get_normalization(ModelConfig(name=network.name, pretrained=False), model)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer, normalize = build_optimizer(train, model, device), Normalizer(mean, std, device)
    if wants_compile(train, device):
        model.compile()
    images = [batch.to(device) for batch in _draw_batches(network, train)]
    targets, criterion = torch.zeros(train.batch_size, device=device).long(), nn.CrossEntropyLoss()

    def train_steps() -> None:
        for step in range(steps):
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(normalize(images[step % _BATCHES]))
            criterion(logits.float(), targets).backward()
            if train.grad_clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    return train_steps
