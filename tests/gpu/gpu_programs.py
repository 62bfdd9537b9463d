"""`doccls.train` under conditions of a GPU, simulated on machines without one."""

import functools
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState

from doccls.run.heartbeat import Heartbeat
from doccls.system.rank import MEETING_FILE, rank_by_environment
from doccls.train import main
from doccls.training import distributed, resume, step

FITTING = 6  # largest micro-batch that fits in memory in `with_little_memory`
SAVED_STEP, KILLED_STEP = 4, 5  # in the second epoch, so that the resume checkpoint has a best epoch
_CHECKPOINT_LIMIT_S = 60.0
_MEMORY_BYTES = 96 * 2**20


def kill_in_step(argv: list[str]) -> int:
    """Train; save a resume checkpoint after SAVED_STEP, and kill the process after KILLED_STEP, once it is on disk."""
    beat, write_resume, is_written = Heartbeat.beat, resume.write_resume, threading.Event()

    def is_due(checkpointer: resume.Checkpointer) -> bool:
        return checkpointer._engine.heartbeat.last.step == SAVED_STEP

    def write_resume_and_report(*arguments: Any) -> None:
        write_resume(*arguments)
        is_written.set()

    def kill_or_beat(heartbeat: Heartbeat, **changes: Any) -> None:
        if changes.get("phase") == "train" and changes.get("step") == KILLED_STEP:
            assert is_written.wait(_CHECKPOINT_LIMIT_S), "no resume checkpoint was written"
            os.kill(os.getpid(), signal.SIGKILL)
        beat(heartbeat, **changes)

    resume.Checkpointer.is_due = is_due  # type: ignore[method-assign]
    resume.write_resume = write_resume_and_report
    Heartbeat.beat = kill_or_beat  # type: ignore[method-assign]
    return main(argv)


def refuse_synchronization(argv: list[str]) -> int:
    """Train; fail in a step that waits for the GPU."""
    take_step = step._take_step

    def take_step_without_wait(*arguments: Any) -> torch.Tensor:
        if not torch.cuda.is_available():
            return take_step(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return take_step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step._take_step = take_step_without_wait
    return main(argv)


def with_little_memory(argv: list[str]) -> int:
    """Train on a GPU whose memory fits FITTING images at a time; on a CPU, raise torch's error instead."""
    sizes = [argument.partition("=")[2] for argument in argv if argument.startswith("train.micro_batch_size=")]
    fits = bool(sizes) and int(sizes[-1]) <= FITTING
    if not fits and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(_MEMORY_BYTES / torch.cuda.get_device_properties(0).total_memory)
    elif not fits:
        step._take_step = functools.partial(_run_out_of_memory)
    return main(argv)


def _run_out_of_memory(*arguments: Any) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def with_large_scale(argv: list[str]) -> int:
    """Train with a loss scale at which fp16 gradients overflow in the first steps."""
    torch.amp.GradScaler.__init__ = _with_initial_scale(torch.amp.GradScaler.__init__)  # type: ignore[method-assign]
    return main(argv)


def _with_initial_scale(init: Callable[..., None]) -> Callable[..., None]:
    def init_with_scale(scaler: torch.amp.GradScaler, device: str = "cuda", *arguments: Any, **options: Any) -> None:
        init(scaler, device, *arguments, **options | {"init_scale": 2.0**20})

    return init_with_scale


def train_over_gloo(argv: list[str]) -> int:
    """Train over gloo, so that several ranks can share one GPU, which NCCL does not allow."""

    def form_group(world_size: int, limit: timedelta) -> None:
        store, rank = distributed.FileStore(os.environ[MEETING_FILE], world_size), rank_by_environment()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)

    distributed._form_group = form_group
    distributed.PartialState = functools.partial(PartialState, backend="gloo")  # type: ignore[misc, assignment]
    return main(argv)
