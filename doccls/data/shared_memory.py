"""The plan of a data loader: how many workers it has, and how many prefetched batches fit into shared memory."""

import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from doccls.errors import RankLocalError
from doccls.system.cores import count_own_cores, count_sharing_processes

_SHM, _GPU = Path("/dev/shm"), Path("/dev/nvidia0")
_MAX_PREFETCH = 4
_USABLE_FRACTION = 0.9  # of the free shared memory; NCCL and torch take a little too
_BATCHES_IN_USE = 2  # held by the training: the current step's batch and the next
_BATCH_OVERHEAD_BYTES = 3 * 4096  # targets, indices, and rounding up to memory pages
_MAX_WORKERS, _MAX_WORKERS_ON_CPU = 8, 2  # per process, for `auto`; on a CPU they compete with the training
_IMAGES_PER_S = 1000.0  # throughput of mid-sized networks on a fast GPU; slow pages get more workers to reach it
_PROVIDE = "provide it: docker run --shm-size=2g, or mount -t tmpfs tmpfs /dev/shm"
_ENLARGE = "enlarge /dev/shm: docker run --shm-size=2g or --ipc=host, or remount it"


@dataclass(frozen=True)
class LoaderPlan:
    """The loader workers of one process, and the remarks to report about them."""

    workers: int
    prefetch: int  # batches that each worker prepares ahead
    remarks: tuple[str, ...] = ()


def plan_loader(
    stated: int | Literal["auto"],
    batch_bytes: int,
    on_gpu: bool,
    stored: bool,
    page_s: float = 0.0,
    environment: Mapping[str, str] = os.environ,
) -> LoaderPlan:
    """Plan the stated number of workers or, for `auto`, as many as are useful and fit into shared memory.

    `page_s` is the time that one worker needs per page.

    Raises:
        RankLocalError: there is no shared memory, or too little for the stated number of workers.
    """
    shm, sharing = shutil.disk_usage(_SHM) if _SHM.is_dir() else None, count_sharing_processes(environment)
    own_bytes = sys.maxsize if shm is None else min(shm.free, shm.total / sharing)
    remarks, obstacle = [], _find_obstacle()
    if obstacle is not None and stated == "auto":
        return LoaderPlan(0, _MAX_PREFETCH, (f"loader workers: 0, since {obstacle} ({_PROVIDE})",))
    if obstacle is not None and stated:
        raise RankLocalError(f"{obstacle}, but data.num_workers = {stated}: set it to 0 or auto, or {_PROVIDE}")
    if stated == "auto":
        cores = count_own_cores(environment)
        candidates = range(choose_workers(cores, on_gpu, stored, page_s), -1, -1)
        workers = next(count for count in candidates if fit_prefetch(own_bytes, batch_bytes, count))
        remarks.append(f"loader workers: {workers} (data.num_workers: auto, {cores} cores)")
    else:
        workers = stated
    prefetch = fit_prefetch(own_bytes, batch_bytes, workers)
    if prefetch < _MAX_PREFETCH:
        assert shm is not None
        usage = f"/dev/shm has {_format_size(shm.free)} free of {_format_size(shm.total)}"
        if prefetch == 0:
            needed_bytes = (workers + _BATCHES_IN_USE) * (batch_bytes + _BATCH_OVERHEAD_BYTES) / _USABLE_FRACTION
            raise RankLocalError(
                f"{usage}, but data.num_workers = {workers} with {_format_size(batch_bytes)} per batch needs "
                f"{_format_size(needed_bytes * sharing)}: lower data.num_workers (0 needs none) or "
                f"train.micro_batch_size, or {_ENLARGE}"
            )
        remarks.append(f"{usage}: workers prefetch {prefetch} batches instead of {_MAX_PREFETCH} ({_ENLARGE})")
    return LoaderPlan(workers, prefetch, tuple(remarks))


def choose_workers(cores: int, on_gpu: bool, stored: bool, page_s: float = 0.0) -> int:
    """Return how many workers are useful.

    With a GPU eight, or as many as slow pages need, leaving one core to the training. On a CPU at most two, and none
    if pages come from the store, at 0.4 ms each.
    """
    if on_gpu:
        limit = max(_MAX_WORKERS, math.ceil(page_s * _IMAGES_PER_S))
        return max(1, min(limit, cores - 1))
    return 0 if stored else max(1, min(_MAX_WORKERS_ON_CPU, cores))


def expects_workers(stated: int | Literal["auto"], stored: bool) -> bool:
    """Guess whether there will be workers, before torch is imported and knows of GPUs.

    A wrong guess costs the start of a process, or a wait for it.
    """
    return (not stored or _GPU.exists()) if stated == "auto" else stated > 0


def fit_prefetch(free_bytes: float, batch_bytes: int, num_workers: int) -> int:
    """Return how many batches each worker may prefetch, at most 4; 0 if not even one fits beside those in use.

    Without workers nothing goes through shared memory, so any size will do.
    """
    if num_workers == 0:
        return _MAX_PREFETCH
    fitting = int(free_bytes * _USABLE_FRACTION / (batch_bytes + _BATCH_OVERHEAD_BYTES)) - _BATCHES_IN_USE
    return max(0, min(_MAX_PREFETCH, fitting // num_workers))


def _find_obstacle() -> str | None:
    """Return why nothing can be put into shared memory; macOS and Windows have it without a folder."""
    if sys.platform != "linux":
        return None
    if not _SHM.is_dir():
        return "this machine has no /dev/shm"
    return None if os.access(_SHM, os.W_OK | os.X_OK) else "/dev/shm can't be written to"


def describe_shared_memory() -> str:
    """Describe the usage of shared memory and how to avoid running out of it."""
    if not _SHM.is_dir():
        return "lower data.num_workers"
    shm = shutil.disk_usage(_SHM)
    usage = f"{_format_size(shm.free)} free of {_format_size(shm.total)}"
    return f"/dev/shm has {usage}; lower data.num_workers, or {_ENLARGE}"


def _format_size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 10 * 2**20 else f"{num_bytes / 2**10:.0f} KiB"
