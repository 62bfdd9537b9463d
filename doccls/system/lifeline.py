"""A process that ends with its launcher, however that ends."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

PARENT = "DOCCLS_PARENT_PID"
"""Environment variable: the parent without which this process is not to live. `launcher` sets it."""
LAUNCHED = "DOCCLS_LAUNCHED"
"""Environment variable: names the launch that has started this process, by itself or through Slurm."""
_PR_SET_PDEATHSIG = 1
_LOOK_S = 1.0


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `launcher` has started this process."""
    return bool(environment.get(LAUNCHED))


def end_with_parent(environment: Mapping[str, str] = os.environ) -> None:
    """If a launcher has started this process, SIGKILL strikes it when the launcher is gone; else nothing.

    On Linux the kernel does it (prctl(2), PR_SET_PDEATHSIG), elsewhere a thread that looks every second.
    """
    if PARENT not in environment:
        return
    parent = int(environment[PARENT])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it was gone before anybody watched
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGKILL)
