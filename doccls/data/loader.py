"""Loader worker processes. They are forked from a fork server, never from the training process.

A fork copies one thread but the locks of all threads: with threads of torch, gloo, OpenMP or a queue's feeder running,
a forked worker was seen to hang forever inside `os.fork()` (CPython gh-112275). The server is a fresh, single-threaded
interpreter that has imported what a worker needs.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from doccls.data.sampler import BatchRequest
from doccls.data.shared_memory import describe_shared_memory
from doccls.errors import RankLocalError
from doccls.reporting.console import wrap_console
from doccls.system.signals import STOP_SIGNALS
from doccls.system.temporary import place_sockets

if TYPE_CHECKING:  # torch takes seconds to import; meanwhile the server starts
    from doccls.data.dataset import Batch, DocClsDataset

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_CONTEXT: BaseContext = multiprocessing.get_context(_METHOD)
_EXIT_REPORT_S = 0.5  # how long the server may take to report that a worker exited
_SERVER_ENVIRONMENT = {
    # These libraries start their threads on import.
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    # multiprocessing's resource tracker warns about semaphores that a killed process left, and then cleans them up.
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",
}  # fmt: skip


class WorkerError(RuntimeError):
    """A loader worker was killed. The message says by which signal and at which sample; a launcher may retry."""


def start_worker_server() -> None:
    """Start the fork server unless it runs; it imports what workers need in the background.

    Raises:
        RankLocalError: no folder can hold its socket.
    """
    if sys.platform == "win32" or _METHOD != "forkserver":
        return
    place_sockets()
    _CONTEXT.set_forkserver_preload(["doccls.data.dataset"])
    previous = {name: os.environ.get(name) for name in _SERVER_ENVIRONMENT}
    filters = [previous["PYTHONWARNINGS"], _SERVER_ENVIRONMENT["PYTHONWARNINGS"]]
    os.environ.update(_SERVER_ENVIRONMENT | {"PYTHONWARNINGS": ",".join(filter(None, filters))})
    resource_tracker.ensure_running()  # first, because it unblocks the signals that are blocked below
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the server and its workers inherit the new one
    try:
        forkserver.ensure_running()
    except OSError as error:
        raise RankLocalError(
            f"loader workers can't be started with sockets in {tempfile.gettempdir()} ({error.strerror}): set the "
            "environment variable TMPDIR to a folder on a local disk, or data.num_workers to 0"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in previous.items():
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
    """Iterate over the batches of `requests`, in order; they are identical for any number of workers.

    The workers exit with the block, even after an exception. Each prefetches `prefetch` batches.

    Raises:
        RankLocalError: an image can no longer be read, or shared memory is too small for a batch.
        WorkerError: a worker was killed.
    """
    import torch
    from torch.utils.data import DataLoader

    from doccls.data.dataset import TrackedDataset, collate_batch

    in_progress: MutableSequence[int] = []
    if num_workers:
        start_worker_server()
        in_progress = _share_progress(num_workers)
    loader: DataLoader[Batch] = DataLoader(
        TrackedDataset(dataset, in_progress) if num_workers else dataset,  # type: ignore[arg-type]
        batch_sampler=requests,  # type: ignore[arg-type]  # the sampler may yield whatever `__getitems__` takes
        collate_fn=collate_batch,  # type: ignore[arg-type]
        num_workers=num_workers,
        multiprocessing_context=_CONTEXT if num_workers else None,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader draws a base seed, which must not advance the global generator
    )
    iterator = iter(loader)
    workers: list[BaseProcess] = iterator._workers if num_workers else []  # type: ignore[attr-defined]

    def describe_work(worker_id: int) -> str:
        sample = in_progress[worker_id]
        return "idle" if sample < 0 else f"loading {dataset.describe(sample)}"

    try:
        yield _translate_errors(iterator, workers, describe_work)
    finally:
        if num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public method for it
        for worker in workers:  # SIGTERM, which torch sends to a stuck worker, is blocked there
            worker.kill()
            worker.join()


def _share_progress(num_workers: int) -> MutableSequence[int]:
    """Return an array in shared memory for the sample that each worker loads; -1 is none."""
    try:
        samples: MutableSequence[int] = _CONTEXT.RawArray("q", [-1] * num_workers)
    except OSError as error:
        raise RankLocalError(
            f"loader workers need shared memory, which can't be used here ({error.strerror}): set data.num_workers to 0"
        ) from error
    return samples


def _translate_errors(
    batches: Iterator["Batch"], workers: Sequence[BaseProcess], describe_work: Callable[[int], str]
) -> Iterator["Batch"]:
    """Yield the batches; raise WorkerError if a worker was killed, whatever error torch raised for it."""
    try:
        yield from batches
    except RankLocalError as error:  # torch prepends the worker's traceback to the message
        name = f"{RankLocalError.__module__}.{RankLocalError.__qualname__}: "
        raise RankLocalError(str(error).rpartition(name)[2].strip()) from error
    except (RuntimeError, OSError, EOFError) as error:
        wait([worker.sentinel for worker in workers], _EXIT_REPORT_S)
        for worker_id, worker in enumerate(workers):
            if worker.exitcode is not None and worker.exitcode < 0:
                signum = signal.Signals(-worker.exitcode)
                raise WorkerError(
                    f"loader worker {worker.pid} was killed by {signum.name} while {describe_work(worker_id)}. "
                    f"{_suggest(signum)}"
                ) from error
        raise


def _suggest(signum: signal.Signals) -> str:
    match signum:
        case signal.SIGKILL:
            # Not "out of memory", by which `is_full` recognizes torch's GPU errors.
            return "If the machine's memory was full, lower data.num_workers"
        case signal.SIGBUS:
            return f"If shared memory was full: {describe_shared_memory()}"
    return "If it happens at the same image again, its decoder crashes: remove it from the CSV or save it again"


def _start_worker(worker_id: int) -> None:
    """Set up a worker: it computes on one thread, leaves signals to its parent, and exits with it."""
    import torch

    torch.set_num_threads(1)
    wrap_console()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # also where the worker does not inherit it from the server
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    """Exit when the parent does: neither the server nor torch's own check, which watches the server, does that."""
    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
