"""What one fold trains with, and how far it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from doccls.config.schema import TrainConfig
from doccls.data.sampler import BatchDivision, BatchPlan
from doccls.experiment import Experiment
from doccls.reporting.log import RunLog
from doccls.reporting.tracking import Tracker
from doccls.run.heartbeat import Heartbeat
from doccls.run.metrics_log import EpochMetrics
from doccls.run.owner import FoldOwner
from doccls.training.checkpoint import BestEpoch
from doccls.training.evaluate import Normalizer


@dataclass(frozen=True)
class RunContext:
    """What all folds of a run are trained with, in this process."""

    experiment: Experiment
    accelerator: Accelerator
    log: RunLog
    heart: Heartbeat
    owner: FoldOwner


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
    num_classes: int
    plan: BatchPlan
    division: BatchDivision
    config: TrainConfig
    ids: Sequence[str]
    """Of all samples, to name those of a bad batch."""
    log: RunLog
    tracker: Tracker
    heart: Heartbeat

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that are validated and may be kept: the EMA's first, if there is one, and the trained one."""
        own = {"raw": self.bare_model}
        return own if self.ema is None else {"ema": self.ema.module} | own


@dataclass
class LossMeter:
    """Losses of an epoch's steps, kept on the device until they are asked for."""

    losses: list[float] = field(default_factory=list)
    """Of the steps that are settled: fetched and summed over ranks. Finite, but for fp16 steps that overflowed and were
    skipped."""
    skipped: int = 0
    """Of those, in fp16."""
    pending: list[torch.Tensor] = field(default_factory=list)
    scale_drops: list[torch.Tensor] = field(default_factory=list)
    """In fp16, of the pending steps: whether the gradient scale fell, which is to say that the step was skipped."""


@dataclass
class FoldProgress:
    """How far a fold is; a resume checkpoint holds it."""

    step: int = 0
    """Optimizer steps done, over all epochs; brought up to date when one is saved."""
    meter: LossMeter = field(default_factory=LossMeter)
    """Of the epoch that `step` lies in, or has just ended."""
    best: BestEpoch | None = None
    rows: list[EpochMetrics] = field(default_factory=list)
    """Of the epochs that are validated."""
