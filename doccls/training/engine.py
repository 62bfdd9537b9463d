"""The objects that train one fold, how they are built, and the fold's progress."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from doccls.config.local_model import find_local_folder
from doccls.config.schema import TrainConfig
from doccls.data.mixing import check_mixing
from doccls.data.sampler import BatchDivision, BatchPlan
from doccls.errors import UserError
from doccls.experiment import Experiment
from doccls.model.build import (
    build_model,
    count_parameters,
    get_normalization,
    has_synchronized_batchnorm,
    synchronize_batchnorm,
)
from doccls.model.optim import (
    build_ema,
    build_loss,
    build_mixup,
    build_optimizer,
    build_scheduler,
    choose_ema_decay,
    describe_unreached_ema,
    scale_lr,
)
from doccls.randomness import Purpose, derive_seed
from doccls.reporting.log import RunLog
from doccls.reporting.tracking import Tracker
from doccls.run.heartbeat import Heartbeat
from doccls.run.metrics_log import EpochMetrics
from doccls.run.owner import FoldOwner
from doccls.system.temporary import avoid_spaces
from doccls.training.checkpoint import BestEpoch
from doccls.training.distributed import await_all
from doccls.training.error_hints import advise_on_batchnorm, check_smallest_micro_batch
from doccls.training.evaluate import Normalizer
from doccls.training.speed import describe_kernels, wants_compile


@dataclass(frozen=True)
class RunContext:
    """What this process needs to train any fold of a run."""

    experiment: Experiment
    accelerator: Accelerator
    log: RunLog
    heartbeat: Heartbeat
    owner: FoldOwner


@dataclass(frozen=True)
class Engine:
    """The model, the optimizer and everything else that trains one fold."""

    accelerator: Accelerator
    model: nn.Module  # as prepared by Accelerate: wrapped in DDP if there are several processes
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
    ids: Sequence[str]  # of all samples, to name those of a batch whose loss is not finite
    log: RunLog
    tracker: Tracker
    heartbeat: Heartbeat

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules to validate, by the name of their weights: the EMA first, if there is one, then the raw ones."""
        raw = {"raw": self.bare_model}
        return raw if self.ema is None else {"ema": self.ema.module} | raw


@dataclass
class LossMeter:
    """The losses of an epoch's steps, which stay on the device until they are reduced over the ranks.

    `losses` and `skipped` (a count, fp16 only) cover the reduced steps. Losses are finite, except those of fp16 steps
    that overflowed and were skipped. `scale_drops` (fp16 only) says of each pending step whether the gradient scale
    dropped, that is, whether the step was skipped.
    """

    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    pending: list[torch.Tensor] = field(default_factory=list)
    scale_drops: list[torch.Tensor] = field(default_factory=list)


@dataclass
class FoldProgress:
    """The progress of a fold, which a resume checkpoint stores."""

    step: int = 0  # optimizer steps done, over all epochs, when the losses were last reduced
    meter: LossMeter = field(default_factory=LossMeter)  # of the epoch that `step` is in or has just ended
    best: BestEpoch | None = None
    rows: list[EpochMetrics] = field(default_factory=list)  # of the validated epochs


def build_engine(context: RunContext, fold: int, tracker: Tracker) -> Engine:
    """Build everything that trains the fold, and log it. All ranks must call.

    Raises:
        UserError: the model, its weights or the optimizer can't be built, or a batch can't be split among the ranks.
        DownloadError: the network failed while the weights were being downloaded.
    """
    experiment, accelerator, log = context.experiment, context.accelerator, context.log
    manifest, train, plan = experiment.data.manifest, experiment.config.train, experiment.plan(fold)
    num_classes, device = len(manifest.classes), accelerator.device
    division = BatchDivision.derive(train, accelerator.num_processes)
    if accelerator.num_processes > plan.size:
        raise UserError(
            f"fold {fold}: a batch of {plan.size} samples can't be split among {accelerator.num_processes} processes"
        )
    mixing = check_mixing(train, plan.size, accelerator.num_processes)
    sizes = f"train={len(plan.samples)} valid={len(experiment.data.list_valid(fold))} classes={num_classes}"
    log.line(f"[DATA] dataset sizes | fold={fold} {sizes}")
    model, mean, std = _build_model(context, fold)
    idle_here = _list_idle_here(train, model, accelerator)
    ema = build_ema(train, model, plan.total_steps)
    optimizer = build_optimizer(train, model, device)
    scheduler = build_scheduler(train, optimizer, plan.steps_per_epoch)
    for line in _describe_optimization(train, plan, division):
        log.line(line)
    for warning in filter(None, (mixing, describe_unreached_ema(train, plan.total_steps), *idle_here)):
        log.line(f"[WARNING] {warning}")
    if wants_compile(train, device):
        avoid_spaces()
        model.compile()
    with warnings.catch_warnings():  # torch renamed the argument; Accelerate has not yet
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        wrapped, prepared_optimizer = accelerator.prepare(model, optimizer)
    return Engine(
        accelerator=accelerator,
        model=wrapped,
        bare_model=model,
        ema=ema,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        criterion=build_loss(train),
        mixup=build_mixup(train, num_classes),
        normalize=Normalizer(mean, std, device),
        num_classes=num_classes,
        plan=plan,
        division=division,
        config=train,
        ids=manifest.ids,
        log=log,
        tracker=tracker,
        heartbeat=context.heartbeat,
    )


def _describe_optimization(train: TrainConfig, plan: BatchPlan, division: BatchDivision) -> list[str]:
    """Return log lines about the optimizer and the learning rate schedule."""
    scaled = "" if train.lr_scaling == "none" else f" (train.lr={train.lr:g}, {train.lr_scaling} in train.batch_size)"
    decay = choose_ema_decay(train, plan.total_steps)
    return [
        f"[OPTIM] {train.optimizer} lr={train.lr * scale_lr(train):g}{scaled} weight_decay={train.weight_decay:g} "
        f"ema={decay if decay is None else f'{decay:g}'}",
        f"[SCHED] {train.scheduler} warmup_epochs={train.warmup_epochs:g} min_lr={train.min_lr * scale_lr(train):g} "
        f"steps={plan.steps_per_epoch} epochs={train.epochs} batch={plan.size} processes={division.world_size} "
        f"images_at_a_time={division.images_at_a_time}",
    ]


def _build_model(context: RunContext, fold: int) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """Build the fold's model on the device; also return the mean and standard deviation of its expected input."""
    experiment, accelerator, log = context.experiment, context.accelerator, context.log
    config, train, plan, device = experiment.config, experiment.config.train, experiment.plan(fold), accelerator.device
    if config.model.pretrained and config.model.weights is None and find_local_folder(config.model.name) is None:
        log.line(f"[MODEL] weights of {config.model.name} from the hub or its cache (offline: model.weights)")
    torch.manual_seed(derive_seed(config.project.seed, Purpose.INITIAL_WEIGHTS, fold))
    model = build_model(config.model, len(experiment.data.manifest.classes), train.img_size)
    await_all(accelerator)  # downloads may differ by more than a collective's timeout
    mean, std = get_normalization(config.model, model)
    if train.sync_bn and accelerator.num_processes > 1:
        _check_sync_bn(plan.size, accelerator)
        model = synchronize_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    check_smallest_micro_batch(model, plan, train, accelerator.num_processes)
    total, trainable = count_parameters(model)
    log.line(
        f"[MODEL] name={config.model.name} pooling={config.model.pooling or 'default'} "
        f"params(total/trainable)={total:,}/{trainable:,} device={device} precision={accelerator.mixed_precision}"
    )
    log.line(f"[MODEL] kernels: {describe_kernels(train, device)}")
    advice = advise_on_batchnorm(model, train, accelerator)
    if advice is not None:
        log.line(f"[WARNING] {advice}")
    return model, mean, std


def _list_idle_here(train: TrainConfig, model: nn.Module, accelerator: Accelerator) -> list[str]:
    """Return a line for each key that has no effect with this model, these devices and this number of processes."""
    idle = []
    if train.sync_bn and accelerator.num_processes == 1:
        idle.append("train.sync_bn has no effect, since a single process holds the whole batch")
    elif train.sync_bn and not has_synchronized_batchnorm(model):
        idle.append("train.sync_bn has no effect, since the model has no BatchNorm")
    if train.speed == "fast" and accelerator.device.type != "cuda":
        idle.append("train.speed = fast compiles the model and chooses faster kernels only on GPUs")
    return idle


def _check_sync_bn(batch_size: int, accelerator: Accelerator) -> None:
    if accelerator.device.type != "cuda":
        raise UserError("train.sync_bn: torch supports SyncBatchNorm only on GPUs; set it to false on CPUs")
    if batch_size % accelerator.num_processes:  # else ranks may have different numbers of micro-batches
        raise UserError(
            f"train.sync_bn: a batch of {batch_size} images can't be split equally among {accelerator.num_processes} "
            "processes: set train.batch_size to a multiple"
        )
