"""`doccls-launch cancel RUN`: ask the launcher of a run to stop, and wait until it has."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from doccls.run.lock import find_holder
from doccls.run.paths import RunError, RunPaths

_LOOK_S = 0.2


def cancel_run(paths: RunPaths, tell: Callable[[str], None]) -> None:
    """As Ctrl-C does at its terminal: each fold leaves at its next safe point. Returns when the run is free again.

    Raises:
        RunError: nobody launches the run, or somebody on another machine.
    """
    holder = find_holder(paths.launch_lock)
    if holder is None:
        raise RunError(f"no launcher works on run {paths.root}: there is nothing to cancel")
    if holder.host != socket.gethostname():
        raise RunError(f"{holder}: cancel it there")
    with suppress(ProcessLookupError):
        os.kill(holder.pid, signal.SIGTERM)
    tell(f"[CANCEL] {holder}: it is asked to stop, its folds leave at their next safe point")
    while find_holder(paths.launch_lock) == holder:
        time.sleep(_LOOK_S)
    tell("[CANCEL] stopped; what is finished stays")
