"""Which images of a batch Mixup and CutMix can mix: they pair the images that pass the model together."""

import numpy as np

from doccls.config.schema import TrainConfig
from doccls.data.sampler import BatchDivision
from doccls.errors import UserError


def check_mixing(train: TrainConfig, batch_size: int, world_size: int) -> str | None:
    """Check that every rank can mix images; return a warning if some images of a global batch stay unmixed.

    Pairs are not drawn from a rank's whole batch, since all its images would have to be in memory before the first
    micro-batch.

    Args:
        batch_size: samples of the global batch.

    Raises:
        UserError: a rank passes its images through the model one by one, so that it would mix none.
    """
    if not train.has_mixing:
        return None
    division, samples = BatchDivision.derive(train, world_size), np.arange(batch_size)
    sizes_of_rank = [[len(micro) for micro in division.split(samples, rank)] for rank in range(world_size)]
    stated = f"train.mixup_alpha = {train.mixup_alpha:g} and train.cutmix_alpha = {train.cutmix_alpha:g}"
    if any(max(sizes) == 1 for sizes in sizes_of_rank):
        raise UserError(
            f"{stated} mix pairs of images that pass the model together, but a process gets them one by one: set "
            f"train.micro_batch_size (now {_format(train.micro_batch_size)}) to at least 2 or null, give each process "
            f"at least 2 of the train.batch_size images (now {batch_size} for {world_size} "
            f"process{'es' if world_size > 1 else ''}), or set both alphas to 0"
        )
    unmixed = sum(size % 2 for sizes in sizes_of_rank for size in sizes)
    if unmixed == 0:
        return None
    return (
        f"{stated} mix pairs of images that pass the model together: {unmixed} of the {batch_size} images of each "
        f"batch stay unmixed, since they pass in odd numbers; choose train.batch_size and train.micro_batch_size (now "
        f"{_format(train.micro_batch_size)}) so that a process gets even ones"
    )


def _format(size: int | None) -> str:
    return "null" if size is None else str(size)
