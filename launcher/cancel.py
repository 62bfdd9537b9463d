"""`doccls-launch cancel RUN`: stop the run's launcher and its Slurm jobs, and wait until they have."""

import os
import signal
import time
from collections.abc import Callable

from doccls.errors import UserError
from doccls.run.paths import RunPaths
from doccls.system.lock import Holder, can_see, find_holder
from launcher.slurm.format import Going, SlurmError
from launcher.slurm.queue import ask_queue, cancel_jobs
from launcher.status import list_run_jobs

_LOOK_S = 0.2


def cancel_run(paths: RunPaths, tell: Callable[[str], None]) -> None:
    """As Ctrl-C does at its terminal: each fold leaves at its next safe point. Returns when the run is free again.

    Raises:
        UserError: nobody works on the run, or a launcher that can't be reached from here.
        SlurmError: the run has jobs, and Slurm does not answer.
    """
    jobs = _list_going(paths)
    holder = None if jobs else find_holder(paths.launch_lock())
    if holder is not None:
        _stop_launcher(holder, paths, tell)
    elif jobs:
        cancel_jobs(jobs)
        tell(f"[CANCEL] jobs {', '.join(jobs)}: asked to stop, folds leave at their next safe point")
        while _list_going(paths):
            time.sleep(_LOOK_S)
    else:
        raise UserError(f"no launcher works on run {paths.root}, and no job: there is nothing to cancel")
    tell("[CANCEL] stopped; what is finished stays")


def _list_going(paths: RunPaths) -> list[str]:
    """Slurm's names of the run's jobs and tasks that have not ended: these, and no other job of the user."""
    own = {(job.number, job.array) for job in list_run_jobs(paths)}
    if not own:
        return []
    queue = ask_queue()
    if queue is None:
        raise SlurmError("squeue does not answer: nothing was cancelled")
    return [
        entry.job
        for entry in queue
        if (entry.array_job, entry.number is not None) in own and entry.going is not Going.ENDED
    ]


def _stop_launcher(holder: Holder, paths: RunPaths, tell: Callable[[str], None]) -> None:
    if not can_see(holder):
        raise UserError(f"{holder}: cancel it there, on that machine and in the same container")
    try:
        os.kill(holder.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise UserError(f"{holder}: it is another user's, who alone can cancel it") from error
    tell(f"[CANCEL] {holder}: it is asked to stop, its folds leave at their next safe point")
    while find_holder(paths.launch_lock()) == holder:
        time.sleep(_LOOK_S)
