"""torch's words for what a user can mend, in the config's words; and a trial for one such thing before training."""

import copy
import re

import torch
from accelerate import Accelerator
from torch import nn

from doccls.config.schema import TrainConfig
from doccls.data.sampler import BatchDivision, BatchPlan
from doccls.errors import RankLocalError, UserError
from doccls.model.build import has_plain_batchnorm
from doccls.system.gpu_memory import SIGNIFICANT_GIB, is_full, measure_others_gib

_FEW_FOR_BATCHNORM = 16
"""Images below which BatchNorm's estimates of mean and variance are noisy."""
_ONE_VALUE = "Expected more than 1 value per channel"
"""How torch's BatchNorm begins."""


class GpuMemoryError(RuntimeError):
    """The GPU is full: the message says how full, and which keys need less. No UserError: the launcher mends it."""


def check_smallest_micro_batch(model: nn.Module, plan: BatchPlan, train: TrainConfig, world_size: int) -> None:
    """One image at a time may be too few for BatchNorm: no process is to meet that alone, later.

    All ranks must call; each comes to the same.

    Raises:
        UserError: the smallest micro-batch is one image, and a trial with one image failed.
    """
    if BatchDivision.derive(train, world_size).find_smallest(plan.size) > 1:
        return
    trial = copy.deepcopy(model).train()
    image = torch.zeros(1, 3, train.img_size, train.img_size, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            trial(image)
    except ValueError as error:
        if _ONE_VALUE not in str(error):
            raise
        raise UserError(_ask_for_more_images(train)) from error


def advise_on_batchnorm(model: nn.Module, train: TrainConfig, accelerator: Accelerator) -> str | None:
    """What the log says where BatchNorm sees few images of a batch at a time, since the batch is split; else None."""
    world_size = accelerator.num_processes
    division = BatchDivision.derive(train, world_size)
    at_a_time = division.images_at_a_time
    if at_a_time >= min(_FEW_FOR_BATCHNORM, train.batch_size) or not has_plain_batchnorm(model):
        return None
    cures = ["fewer processes a fold, and folds side by side (doccls-launch run)"] if world_size > 1 else []
    if train.micro_batch_size is not None and train.micro_batch_size < division.per_rank:
        cures.append(f"a larger train.micro_batch_size (now {train.micro_batch_size})")
    if world_size > 1:
        cures.append(f"a larger train.batch_size (now {train.batch_size}) with train.lr_scaling")
        cures += ["train.sync_bn"] if accelerator.device.type == "cuda" else []
    return f"BatchNorm normalises over {at_a_time} images at a time; what helps: {', '.join(cures)}"


def explain(
    error: RuntimeError | ValueError, train: TrainConfig, accelerator: Accelerator
) -> RankLocalError | GpuMemoryError | None:
    """torch's words for three things that a config can mend, in the config's words; None for anything else."""
    if isinstance(error, RuntimeError) and is_full(str(error)):
        return GpuMemoryError(_hint_at_memory(str(error), train, accelerator))
    if _ONE_VALUE in str(error):
        return RankLocalError(_ask_for_more_images(train))
    if "deterministic" in str(error) and train.is_deterministic:
        return RankLocalError(f"train.deterministic: this model can't be that here; set it to false ({error})")
    return None


def _hint_at_memory(said: str, train: TrainConfig, accelerator: Accelerator) -> str:
    """`said` is torch's: how much was asked for stands in it."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", said)
    numbers = [f"asked for {asked[1]}"] if asked else []
    if accelerator.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(accelerator.device)
        numbers.append(f"{free / 2**30:.2f} GiB free of {total / 2**30:.2f} GiB")
    others_gib = measure_others_gib(said)
    if others_gib > SIGNIFICANT_GIB:
        numbers.append(f"{others_gib:.2f} GiB held by other processes")
    at_a_time = BatchDivision.derive(train, accelerator.num_processes).images_at_a_time
    return (
        f"CUDA out of memory on {accelerator.device}{': ' if numbers else ''}{', '.join(numbers)}. "
        f"Less is needed with train.micro_batch_size below {at_a_time} (the batch stays), "
        f"train.img_size below {train.img_size}, or train.amp (now {train.amp})"
    )


def _ask_for_more_images(train: TrainConfig) -> str:
    return (
        "BatchNorm needs more than one image at a time on each process: raise train.batch_size "
        f"(now {train.batch_size}, for all processes together) or train.micro_batch_size (now {train.micro_batch_size})"
    )
