"""`doccls.train` under conditions that a GPU alone can meet, or a stand-in of them on a machine without one."""

import functools
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState

from doccls.run.heartbeat import Heartbeat
from doccls.train import main
from doccls.training import distributed, step

FITTING = 6
"""Most images at a time that have room under `with_little_memory`."""
KILLED_STEP = 4
_FEW_BYTES = 96 * 2**20


def kill_in_step(argv: list[str]) -> int:
    """The process is killed as it has taken step KILLED_STEP."""
    beat = Heartbeat.beat

    def watched(heartbeat: Heartbeat, **changes: Any) -> None:
        if changes.get("phase") == "train" and changes.get("step") == KILLED_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        beat(heartbeat, **changes)

    Heartbeat.beat = watched  # type: ignore[method-assign]
    return main(argv)


def refuse_synchronization(argv: list[str]) -> int:
    """A step that waits for the GPU fails."""
    take_step = step._take_step

    def watched(*arguments: Any) -> torch.Tensor:
        if not torch.cuda.is_available():
            return take_step(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return take_step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step._take_step = watched
    return main(argv)


def with_little_memory(argv: list[str]) -> int:
    """The GPU is full while more than FITTING images are taken at a time; on a CPU torch's error stands for that."""
    stated = [word.partition("=")[2] for word in argv if word.startswith("train.micro_batch_size=")]
    fits = bool(stated) and int(stated[-1]) <= FITTING
    if not fits and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(_FEW_BYTES / torch.cuda.get_device_properties(0).total_memory)
    elif not fits:
        step._take_step = functools.partial(_run_out_of_memory)
    return main(argv)


def _run_out_of_memory(*arguments: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def with_large_scale(argv: list[str]) -> int:
    """fp16's gradients overflow in the first steps."""
    torch.amp.GradScaler.__init__ = _begin_at_once(torch.amp.GradScaler.__init__)  # type: ignore[method-assign]
    return main(argv)


def _begin_at_once(make: Callable[..., None]) -> Callable[..., None]:
    def made(scaler: torch.amp.GradScaler, device: str = "cuda", *arguments: Any, **keys: Any) -> None:
        make(scaler, device, *arguments, **keys | {"init_scale": 2.0**20})

    return made


def meet_over_gloo(argv: list[str]) -> int:
    """Several ranks share one GPU, which NCCL does not allow."""

    def meet(file: Path, rank: int, world_size: int, limit: timedelta) -> None:
        store = distributed.FileStore(str(file), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)

    distributed._init_from_file = meet
    distributed.PartialState = functools.partial(PartialState, backend="gloo")  # type: ignore[misc, assignment]
    return main(argv)
