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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from doccls.data.sampler import BatchRequest
from doccls.data.shared_memory import describe_shared_memory
from doccls.errors import RankLocalError
from doccls.system.signals import STOP_SIGNALS

if TYPE_CHECKING:  # torch takes seconds to import: the server is started meanwhile
    from doccls.data.dataset import Batch, DocClsDataset

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


class WorkerError(RuntimeError):
    """A loader worker was killed; the message says by what, and which sample it held. A launcher may try again."""


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
    dataset: "DocClsDataset",
    requests: Iterable[BatchRequest],
    num_workers: int,
    pin_memory: bool,
    prefetch: int = 1,
) -> Iterator[Iterator["Batch"]]:
    """An iterator over exactly the batches of `requests`, in their order; the number of workers changes no bit of them.

    The workers live as long as the block, however it ends. Each makes `prefetch` batches ahead.

    Raises:
        UserError: an image turned bad, or there is no room for a batch.
        WorkerError: a worker was killed.
    """
    import torch
    from torch.utils.data import DataLoader

    from doccls.data.dataset import NotedDataset, collate_batch

    held = _CONTEXT.RawArray("q", [-1] * num_workers)
    if num_workers:
        start_worker_server()
    loader: DataLoader[Batch] = DataLoader(
        NotedDataset(dataset, held) if num_workers else dataset,  # type: ignore[arg-type]
        batch_sampler=requests,  # type: ignore[arg-type]  # it may yield what `__getitems__` takes
        collate_fn=collate_batch,  # type: ignore[arg-type]
        num_workers=num_workers,
        multiprocessing_context=_CONTEXT if num_workers else None,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader draws a base seed: keep its hands off the global generator
    )
    iterator = iter(loader)
    workers: list[BaseProcess] = iterator._workers if num_workers else []  # type: ignore[attr-defined]
    try:
        yield _name_errors(
            iterator, workers, lambda number: "no image" if held[number] < 0 else dataset.describe(held[number])
        )
    finally:
        if num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public word for it
        for worker in workers:  # one that does not listen: SIGTERM, which torch sends, is blocked
            worker.kill()
            worker.join()


def _name_errors(
    batches: Iterator["Batch"], workers: Sequence[BaseProcess], describe_held: Callable[[int], str]
) -> Iterator["Batch"]:
    """The batches; an error for want of a worker that was killed says so, whatever torch met first."""
    try:
        yield from batches
    except RankLocalError as error:  # torch has put the worker's stack before its words
        name = f"{RankLocalError.__module__}.{RankLocalError.__qualname__}: "
        raise RankLocalError(str(error).rpartition(name)[2].strip()) from error
    except (RuntimeError, OSError, EOFError) as error:
        wait([worker.sentinel for worker in workers], _REPORT_S)
        for number, worker in enumerate(workers):
            if worker.exitcode is not None and worker.exitcode < 0:
                signum = signal.Signals(-worker.exitcode)
                raise WorkerError(
                    f"loader worker {worker.pid} was killed by {signum.name} while it held {describe_held(number)}. "
                    f"{_suggest(signum)}"
                ) from error
        raise


def _suggest(signum: signal.Signals) -> str:
    match signum:
        case signal.SIGKILL:
            return "If the machine's memory was full, fewer data.num_workers need less"
        case signal.SIGBUS:
            return f"If shared memory was full: {describe_shared_memory()}"
    return "If it is that image again, its decoder crashes: take it out of the CSV, or write it anew"


def _start_worker(worker_id: int) -> None:
    """A worker computes on one thread, leaves signals to its parent, and ends with it."""
    import torch

    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # also where it was not the server that was told to
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """The server holds no parent's death against a worker, and torch's own watch looks at the server."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
