"""Translate torch errors that a user can fix into hints about config keys; test for one of them before training."""

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

_MIN_FOR_BATCHNORM = 16  # with fewer images, BatchNorm's estimates of mean and variance are noisy
_ONE_VALUE = "Expected more than 1 value per channel"  # the start of BatchNorm's error message


class GpuMemoryError(RuntimeError):
    """An error for a full GPU: it says how full, and which keys need less. Not a UserError: the launcher retries it."""


def check_smallest_micro_batch(model: nn.Module, plan: BatchPlan, train: TrainConfig, world_size: int) -> None:
    """Check that BatchNorm accepts the smallest micro-batch, before a single rank fails on it later.

    All ranks must call, with the same result on each.

    Raises:
        UserError: the smallest micro-batch is one image, and a trial with one image failed.
    """
    if BatchDivision.derive(train, world_size).find_smallest(plan.size) > 1:
        return
    model_copy = copy.deepcopy(model).train()
    image = torch.zeros(1, 3, train.img_size, train.img_size, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model_copy(image)
    except ValueError as error:
        if _ONE_VALUE not in str(error):
            raise
        raise UserError(_ask_for_more_images(train)) from error


def advise_on_batchnorm(model: nn.Module, train: TrainConfig, accelerator: Accelerator) -> str | None:
    """Return advice if the batch is split so that BatchNorm sees few images at a time, else None."""
    world_size = accelerator.num_processes
    division = BatchDivision.derive(train, world_size)
    at_a_time = division.images_at_a_time
    if at_a_time >= min(_MIN_FOR_BATCHNORM, train.batch_size) or not has_plain_batchnorm(model):
        return None
    options = ["fewer processes per fold, with folds side by side (doccls-launch run)"] if world_size > 1 else []
    if train.micro_batch_size is not None and train.micro_batch_size < division.per_rank:
        options.append(f"a larger train.micro_batch_size (now {train.micro_batch_size})")
    if world_size > 1:
        options.append(f"a larger train.batch_size (now {train.batch_size}) with train.lr_scaling")
        options += ["train.sync_bn"] if accelerator.device.type == "cuda" else []
    return f"BatchNorm normalises over {at_a_time} images at a time; consider {', '.join(options)}"


def translate_error(
    error: Exception, train: TrainConfig, accelerator: Accelerator
) -> RankLocalError | GpuMemoryError | None:
    """Return a torch error that a config change can fix as one that names the config keys; None for other errors."""
    if isinstance(error, RuntimeError) and is_full(str(error)):
        return GpuMemoryError(_suggest_less_memory(str(error), train, accelerator))
    if _ONE_VALUE in str(error):
        return RankLocalError(_ask_for_more_images(train))
    if "deterministic" in str(error) and train.is_deterministic:
        return RankLocalError(
            f"train.deterministic: this model has no deterministic implementation here; set it to false ({error})"
        )
    return None


def _suggest_less_memory(torch_message: str, train: TrainConfig, accelerator: Accelerator) -> str:
    """Format the message for a full GPU; `torch_message` tells how much was requested."""
    requested = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", torch_message)
    numbers = [f"requested {requested[1]}"] if requested else []
    if accelerator.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(accelerator.device)
        numbers.append(f"{free / 2**30:.2f} GiB free of {total / 2**30:.2f} GiB")
    others_gib = measure_others_gib(torch_message)
    if others_gib > SIGNIFICANT_GIB:
        numbers.append(f"{others_gib:.2f} GiB held by other processes")
    at_a_time = BatchDivision.derive(train, accelerator.num_processes).images_at_a_time
    return (
        f"CUDA out of memory on {accelerator.device}{': ' if numbers else ''}{', '.join(numbers)}. "
        f"To use less memory, set train.micro_batch_size below {at_a_time} (the batch size stays), "
        f"train.img_size below {train.img_size}, or train.amp (now {train.amp})"
    )


def _ask_for_more_images(train: TrainConfig) -> str:
    return (
        "BatchNorm needs more than one image at a time on each process: raise train.batch_size "
        f"(now {train.batch_size}, for all processes together) or train.micro_batch_size (now {train.micro_batch_size})"
    )
