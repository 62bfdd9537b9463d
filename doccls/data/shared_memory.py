"""How many processes load batches, and how many batches fit into shared memory on their way."""

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
_MOST_PREFETCH = 4
_USED = 0.9
"""Share of the free room that batches may take; NCCL and torch take a little too."""
_IN_USE = 2
"""Batches that the training holds: the one of its step, and the next."""
_BESIDE_BYTES = 3 * 4096
"""Of each batch: its targets and indices, and that all come in whole memory pages."""
_MOST_WORKERS, _MOST_WORKERS_ON_CPU = 8, 2
"""Of one process, where nobody says how many; on a CPU they take its time from the training."""
_IMAGES_PER_S = 1000.0
"""What a fast GPU takes of mid-sized networks: where pages take long, more than `_MOST_WORKERS` are to make so many."""
_MORE_ROOM = "more room: docker run --shm-size=2g or --ipc=host, or remount /dev/shm"


@dataclass(frozen=True)
class LoaderPlan:
    """How one process loads its batches, and what is to be reported about it."""

    workers: int
    prefetch: int
    """Batches that each worker makes ahead."""
    remarks: tuple[str, ...] = ()


def plan_loader(
    stated: int | Literal["auto"],
    batch_bytes: int,
    on_gpu: bool,
    stored: bool,
    page_s: float = 0.0,
    environment: Mapping[str, str] = os.environ,
) -> LoaderPlan:
    """As `data.num_workers` says, or as many workers as pay and have room; making a page takes one `page_s`.

    Raises:
        RankLocalError: there is no room for those that were stated.
    """
    shm, sharing = shutil.disk_usage(_SHM) if _SHM.is_dir() else None, count_sharing_processes(environment)
    own_bytes = sys.maxsize if shm is None else min(shm.free, shm.total / sharing)
    remarks = []
    if stated == "auto":
        cores = count_own_cores(environment)
        paying = range(choose_workers(cores, on_gpu, stored, page_s), -1, -1)
        workers = next(count for count in paying if fit_prefetch(own_bytes, batch_bytes, count))
        remarks.append(f"loader workers: {workers} (data.num_workers: auto, {cores} cores)")
    else:
        workers = stated
    prefetch = fit_prefetch(own_bytes, batch_bytes, workers)
    if prefetch < _MOST_PREFETCH:
        assert shm is not None
        room = f"/dev/shm has {_format_size(shm.free)} free of {_format_size(shm.total)}"
        if prefetch == 0:
            needed = _format_size((workers + _IN_USE) * (batch_bytes + _BESIDE_BYTES) / _USED * sharing)
            raise RankLocalError(
                f"{room}, and data.num_workers = {workers} with {_format_size(batch_bytes)} a batch need {needed}: "
                f"fewer data.num_workers (0 needs none), a smaller train.micro_batch_size, or {_MORE_ROOM}"
            )
        remarks.append(f"{room}: workers prefetch {prefetch} batches, not {_MOST_PREFETCH} ({_MORE_ROOM})")
    return LoaderPlan(workers, prefetch, tuple(remarks))


def choose_workers(cores: int, on_gpu: bool, stored: bool, page_s: float = 0.0) -> int:
    """How many pay: beside a GPU eight, or as many as slow pages need, and one core is left to the training.

    On a CPU none where pages come from the store, at 0.4 ms each.
    """
    if on_gpu:
        most = max(_MOST_WORKERS, math.ceil(page_s * _IMAGES_PER_S))
        return max(1, min(most, cores - 1))
    return 0 if stored else max(1, min(_MOST_WORKERS_ON_CPU, cores))


def expects_workers(stated: int | Literal["auto"], stored: bool) -> bool:
    """A guess, before torch says whether there is a GPU; a wrong one costs the start of a process, or a wait for it."""
    return (not stored or _GPU.exists()) if stated == "auto" else stated > 0


def fit_prefetch(free_bytes: float, batch_bytes: int, num_workers: int) -> int:
    """Batches that each worker may make ahead, at most 4; 0 if one and those in use have no room.

    Without workers nothing goes through shared memory, and any room will do.
    """
    if num_workers == 0:
        return _MOST_PREFETCH
    fitting = int(free_bytes * _USED / (batch_bytes + _BESIDE_BYTES)) - _IN_USE
    return max(0, min(_MOST_PREFETCH, fitting // num_workers))


def describe_shared_memory() -> str:
    """What a worker that ran out of it is to be told with."""
    if not _SHM.is_dir():
        return "fewer data.num_workers"
    found = shutil.disk_usage(_SHM)
    room = f"{_format_size(found.free)} free of {_format_size(found.total)}"
    return f"/dev/shm has {room}; {_MORE_ROOM}, or fewer data.num_workers"


def _format_size(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**10:.0f} KiB"
