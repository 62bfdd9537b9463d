"""Processes that load batches. They come from a server, never from a fork of the process that trains.

A fork copies one thread and the locks of all: where torch, gloo, OpenMP or a queue's feeder had threads, a forked
worker was seen to hang for ever inside `os.fork()` (CPython gh-112275). The server is a fresh interpreter with one
thread that has imported what a worker needs.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from doccls.run.signals import STOP_SIGNALS

if TYPE_CHECKING:  # torch takes seconds to import: the server is started meanwhile
    from doccls.data.dataset import Batch, DocClsDataset, SampleKey

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT: BaseContext = multiprocessing.get_context(_METHOD)
_REPORT_S = 0.5
"""How long the server may take to report a worker's end."""
_SERVER_ENVIRONMENT = {
    # Libraries that start their threads when they are imported.
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    # multiprocessing's tracker speaks of semaphores that a sudden end left to it, while it does just its work.
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}  # fmt: skip


def start_worker_server() -> None:
    """Start the process that workers are forked from, if none runs; it imports what they need while we go on."""
    if sys.platform == "win32" or _METHOD != "forkserver":
        return
    _CONTEXT.set_forkserver_preload(["doccls.data.dataset"])
    earlier = {name: os.environ.get(name) for name in _SERVER_ENVIRONMENT}
    warned = [earlier["PYTHONWARNINGS"], _SERVER_ENVIRONMENT["PYTHONWARNINGS"]]
    os.environ.update(_SERVER_ENVIRONMENT | {"PYTHONWARNINGS": ",".join(filter(None, warned))})
    resource_tracker.ensure_running()  # it unblocks what is blocked below
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the server and its workers inherit that
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for name, value in earlier.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def loading(
    dataset: "DocClsDataset", batches: Iterable[list["SampleKey"]], num_workers: int, pin_memory: bool
) -> Iterator[Iterator["Batch"]]:
    """An iterator over exactly `batches`, in their order; the number of workers changes no bit of what it gives.

    The workers live as long as the block, however it ends.
    """
    import torch
    from torch.utils.data import DataLoader

    from doccls.data.dataset import collate_batch

    if num_workers:
        start_worker_server()
    loader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collate_batch,
        num_workers=num_workers,
        multiprocessing_context=_CONTEXT if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader draws a base seed: keep its hands off the global generator
    )
    before = multiprocessing.active_children()
    iterator = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    try:
        yield _name_death(iterator, workers)
    finally:
        if num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public word for it
        for worker in workers:  # one that does not listen: SIGTERM, which torch sends, is blocked
            worker.kill()
            worker.join()


def _name_death(batches: Iterator["Batch"], workers: Sequence[BaseProcess]) -> Iterator["Batch"]:
    """The batches; an error for want of a worker that was killed says so, whatever torch met first."""
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        for worker in workers:
            worker.join(_REPORT_S)
            if worker.exitcode is not None and worker.exitcode < 0:
                name = signal.Signals(-worker.exitcode).name
                raise RuntimeError(
                    f"loader worker {worker.pid} was killed by {name}: if the machine's memory was full, fewer "
                    "data.num_workers need less"
                ) from error
        raise


def _start_worker(worker_id: int) -> None:
    """A worker computes on one thread, leaves signals to its parent, and ends with it."""
    import cv2
    import torch

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # also where it was not the server that was told to
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """The server holds no parent's death against a worker, and torch's own watch looks at the server."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
