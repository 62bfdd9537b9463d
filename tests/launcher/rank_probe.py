"""A program in place of `doccls.train` that prints what it finds of its process after the same imports, in JSON."""

import atexit
import faulthandler
import gc
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import doccls.train
import doccls.training.trainer  # noqa: F401
from launcher import rank_server

PROGRAM = "rank_probe"
# What the fork server has imported for itself.
OF_SERVER = ("launcher", "runpy", "pkgutil", "rank_probe", "doccls.train", "threadpoolctl")


def describe() -> dict[str, Any]:
    """Return what has to be the same in a forked rank and in a fresh interpreter."""
    import numpy as np
    import threadpoolctl
    import torch

    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    main_module = sys.modules["__main__"]
    modules = {name for name in sys.modules if name.split(".")[0] not in OF_SERVER and name not in OF_SERVER}
    return {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": list(sys.flags),
        "xoptions": sys._xoptions, "environment": dict(os.environ), "cwd": str(Path.cwd()),
        "modules": sorted(modules - {"__mp_main__"}),
        "main": [main_module.__name__, main_module.__spec__.name, main_module.__file__],  # type: ignore[union-attr]
        "status": {name: status[name] for name in ("Umask", "SigBlk", "SigIgn", "SigCgt", "Threads", "NoNewPrivs")},
        "python handlers": {str(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT_" in name},
        "oom": Path("/proc/self/oom_score_adj").read_text(), "nice": os.nice(0),
        "cores": sorted(os.sched_getaffinity(0)), "parent": os.getppid(),
        "leads session and group": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "files": sorted((int(file.name), str(file.readlink())) for file in Path("/proc/self/fd").iterdir()
                        if file.is_symlink()),
        "streams": [
            [stream.encoding, stream.errors, stream.line_buffering, stream.isatty(), stream.mode, stream.seekable()]
            for stream in (sys.stdin, sys.stdout, sys.stderr)
        ],
        "input": sys.stdin.read(),
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "torch": [torch.is_grad_enabled(), str(torch.get_default_dtype())],
        "pools": sorted([pool["filepath"], pool["num_threads"]] for pool in threadpoolctl.threadpool_info()),
        "threads": [threading.active_count(), threading.current_thread() is threading.main_thread()],
        "start method": multiprocessing.get_start_method(allow_none=True),
        "process": multiprocessing.current_process().name,
        "warnings": [str(one) for one in warnings.filters],
        "logging": [str(logging.root.handlers), logging.root.level],
        "faulthandler": faulthandler.is_enabled(),
        "exit callbacks": atexit._ncallbacks(),
        "collector": [gc.isenabled(), gc.get_threshold()],
        "hooks": [sys.excepthook is sys.__excepthook__, sys.gettrace() is None, sys.getrecursionlimit()],
        # Not equal, but never twice the same either.
        "random": [
            random.random(), np.random.random(), torch.initial_seed(),  # noqa: NPY002
            multiprocessing.current_process().authkey.hex(),
        ],
    }  # fmt: skip


class Kept(types.ModuleType):
    """A module that tells when Python takes it apart."""

    def __del__(self, write: Callable[[int, bytes], int] = os.write) -> None:
        write(1, b"taken apart\n")


def finish_after_main() -> None:
    """Print a line once the main thread has ended."""
    threading.main_thread().join()
    print("thread finished")


def serve() -> None:
    """Be a rank server whose ranks run this program."""
    rank_server.PROGRAM = PROGRAM
    sys.argv = sys.argv[1:]
    rank_server.main()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    elif sys.argv[1] == "describe":
        print(json.dumps(describe()))
        atexit.register(print, "exited normally")
        threading.Thread(target=finish_after_main).start()
        sys.exit(3)
    elif sys.argv[1] in ("keep", "fail"):
        sys.modules["kept"] = Kept("kept")
        if sys.argv[1] == "fail":
            raise ValueError("it fails")
        sys.exit(0)
    elif sys.argv[1] == "sleep":
        print("sleeps", flush=True)
        time.sleep(600)
