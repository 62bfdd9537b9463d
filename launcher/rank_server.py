"""The process from which ranks are forked: it has imported what a rank imports, and otherwise done nothing.

`launcher.forking` starts it as `python -m launcher.rank_server DESCRIPTOR`, where the descriptor is a socket to the
launcher. A rank is the launcher's own child, not this process's: its first parent exits at once, and the launcher
adopts it (prctl(2), PR_SET_CHILD_SUBREAPER). So a rank survives this process, and ends with the launcher.
"""

import atexit
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import re
import runpy
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from doccls.system.lifeline import PARENT, end_with_parent

PROGRAM = "doccls.train"
# Messages on the launcher's socket: once this process can fork, and why it can't.
READY, REFUSAL = b"ready\n", b"refused: "
# What the launcher answers when it has read a rank's process ID: without it, the rank ends before it does anything.
GO = b"go\n"
# What the imports would start threads for, and a rank restores (`_restore_threads`).
SERVER_VARIABLES = {"OPENBLAS_NUM_THREADS": "1"}
_PRELOADED = (PROGRAM, "doccls.training.trainer", "threadpoolctl")
_ADOPTION_POLL_S = 0.001


@dataclass(frozen=True)
class RankRequest:
    """What distinguishes a rank from this process."""

    words: tuple[str, ...]  # arguments of the program
    changes: Mapping[str, str | None]  # environment variables; None for one that the rank does not have

    def render(self) -> bytes:
        """Return the request as one line."""
        return json.dumps([self.words, dict(self.changes)]).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> "RankRequest":
        """Return the request of a line of `render`."""
        words, changes = json.loads(line)
        return cls(tuple(words), changes)


def main() -> None:
    """Import the stack, fork a rank for each request, and run the program in each of them."""
    end_with_parent()
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    for name in _PRELOADED:
        importlib.import_module(name)
    # The first check of an array makes a library of scikit-learn's search all installed packages for plugins, once.
    importlib.import_module("sklearn.utils.validation").check_array([[0.0]])
    run_rank(serve(control))


def serve(control: socket.socket) -> RankRequest:
    """Fork a rank for each request until the launcher has closed the socket; return only in ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    _list_openblas()
    gc.collect()
    gc.freeze()  # a collection in a rank would otherwise copy all the memory that it shares with this process
    _check(control)
    control.sendall(READY)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 2)  # the rank's socket, and its console
        if not message:
            os._exit(0)
        _check(control)
        try:
            intermediate = os.fork()
        except OSError as error:
            _refuse(control, f"can't fork: {error.strerror}")
        if intermediate == 0:
            intermediate = os.getpid()
            if os.fork():
                os._exit(0)
            control.close()
            return _meet_launcher(descriptors[0], descriptors[1], intermediate)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(intermediate, 0)


def find_fork_problem() -> str | None:
    """Return why a fork of this process would not be like a fresh process; None if nothing prevents it."""
    threads = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    if len(threads) > 1:
        return f"has {len(threads)} threads after its imports ({', '.join(sorted(set(threads)))})"
    files = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    if sys.modules["torch"].cuda.is_initialized() or any(file.startswith("/dev/nvidia") for file in files):
        return "uses a GPU after its imports"
    return None


def _check(control: socket.socket) -> None:
    problem = find_fork_problem()
    if problem is not None:
        _refuse(control, problem)


def _refuse(control: socket.socket, problem: str) -> NoReturn:
    control.sendall(REFUSAL + problem.encode())
    os._exit(1)


def _meet_launcher(descriptor: int, console: int, intermediate: int) -> RankRequest:
    """Give the new process its session and console, and report its ID once the launcher has adopted it.

    Exits if the launcher has ended, or has given up waiting: then it starts the rank in another way.
    """
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for source, targets in ((null, (0,)), (console, (1, 2))):
        for target in targets:
            os.dup2(source, target)
        os.close(source)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        line = stream.readline()
        while os.getppid() == intermediate:
            time.sleep(_ADOPTION_POLL_S)
        if not line or os.getppid() != int(os.environ[PARENT]):
            os._exit(1)
        stream.write(f"{os.getpid()}\n".encode())
        stream.flush()
        if stream.readline() != GO:
            os._exit(1)
    return RankRequest.parse(line)


def run_rank(request: RankRequest, run: Callable[[], object] | None = None) -> None:
    """Turn this fork into what `python -m doccls.train` is after the same imports, and run the program.

    The environment keeps what the imports have set. `run` replaces the program.
    """
    for name, value in request.changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _restore_threads()
    multiprocessing.current_process().authkey = os.urandom(32)
    sys.modules["numpy"].random.seed()  # Python's own generator is seeded anew in each fork
    sys.modules["torch"].default_generator.seed()
    sys.argv = ["-m", *request.words]  # as Python sets them, and then `runpy` the first
    sys.orig_argv = [sys.orig_argv[0], "-m", PROGRAM, *request.words]
    try:
        if run is not None:
            run()
        else:
            sys.modules.pop(PROGRAM, None)  # it becomes `__main__`, whose name its loader workers import
            runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        _end(end.code)


def _end(code: int) -> NoReturn:
    """End this rank as Python ends a program, but leave its memory to the kernel.

    Python would take apart each object and library that the rank shares with the server, and so copy most of that
    memory at the very end, while the next fold waits for the slot.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as multiprocessing does in its children
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)  # what libraries such as NCCL have printed
    os._exit(code)


def _restore_threads() -> None:
    """Give each OpenBLAS the number of threads that it would have given itself as it was imported."""
    names = ("OPENBLAS_NUM_THREADS", "OPENBLAS_DEFAULT_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
    stated = [int(match[0]) for name in names if (match := re.match(r"\s*0*[1-9]\d*", os.environ.get(name, "")))]
    threads = min([*stated[:1], len(os.sched_getaffinity(0))])
    for library in _list_openblas():
        if library.num_threads != threads:
            library.set_num_threads(threads)


@cache
def _list_openblas() -> list[Any]:
    """Return the controllers of all OpenBLAS libraries in this process; the server finds them once, for all forks."""
    from threadpoolctl import ThreadpoolController

    return [library for library in ThreadpoolController().lib_controllers if library.internal_api == "openblas"]


if __name__ == "__main__":
    main()
