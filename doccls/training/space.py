"""Room on the disk for what a fold will write: told before it trains, since it may take hours to find out."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from doccls.run.disk import tell_size
from doccls.training.loop import Engine

_STATES = 2
_MOMENTS = 2
"""Of each trained weight, with most optimizers; how many there are shows at the first step."""
_MARGIN = 2


@dataclass(frozen=True)
class FoldSpace:
    """What a fold's files take, in bytes, while it trains."""

    best: int
    """Its best weights."""
    states: int
    """What it goes on from after a kill; gone when it is done."""


def measure_space(engine: Engine) -> FoldSpace:
    """Of the fold that the engine will train."""
    weights = _count_bytes(engine.bare_model.state_dict().values())
    trained = _count_bytes(one for group in engine.optimizer.param_groups for one in group["params"])
    kept = weights if engine.ema is None else 2 * weights
    return FoldSpace(weights, _STATES * (kept + _MOMENTS * trained))


def describe_space(space: FoldSpace, free_bytes: int, fold: int, folder: Path) -> list[str]:
    """What the log says of it; a warning if less is free than twice what will be written."""
    needed = space.best + space.states
    lines = [
        f"[DISK] fold={fold} writes about {tell_size(needed)} (best weights {tell_size(space.best)}, two states to go "
        f"on from {tell_size(space.states)}); {tell_size(free_bytes)} are free"
    ]
    if free_bytes < _MARGIN * needed:
        lines.append(
            f"[WARNING] {folder}: {tell_size(free_bytes)} are free, less than twice the {tell_size(needed)} that fold "
            f"{fold} writes. States that find no room are left out, best weights that find none end the fold: make "
            "room, or set output.exp_dir to another disk"
        )
    return lines


def _count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
