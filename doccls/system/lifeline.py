"""The end of a process together with its launcher, however the launcher ends."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

PARENT = "DOCCLS_PARENT_PID"  # environment variable: the parent with which this process has to end; set by `launcher`
LAUNCHED = "DOCCLS_LAUNCHED"  # environment variable: ID of the launch that started this process, directly or by Slurm
_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether `launcher` started this process."""
    return bool(environment.get(LAUNCHED))


def end_with_parent(environment: Mapping[str, str] = os.environ) -> None:
    """Arrange for SIGKILL when the launcher that started this process exits; do nothing without a launcher.

    On Linux the kernel sends the signal (prctl(2), PR_SET_PDEATHSIG), elsewhere a thread that polls every second.
    """
    if PARENT not in environment:
        return
    parent = int(environment[PARENT])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it exited before this process watched it
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
