"""`doccls-launch cancel RUN`: stop the run's launcher and its Slurm jobs, and wait until they have."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from doccls.errors import UserError
from doccls.run.paths import RunPaths
from doccls.system.lock import Holder, LockError, find_holder, hold_lock, is_visible
from launcher.slurm.array_jobs import list_clusters, read_array_jobs, write_array_jobs
from launcher.slurm.format import JobPhase, QueueEntry, SlurmError
from launcher.slurm.queue import POLL_S, cancel_jobs, next_interval, read_queue
from launcher.status import find_launchers, list_run_jobs

_LOOK_S = 0.2
_SLURM_ENDS_S = 2.0
"""What Slurm takes to clear up after a job whose process has ended."""


def cancel_run(paths: RunPaths, tell: Callable[[str], None]) -> None:
    """As Ctrl-C does at its terminal: each fold leaves at its next safe point. Returns when the run is free again.

    Raises:
        UserError: nobody works on the run, or a launcher that can't be reached from here.
        SlurmError: the run has jobs, and Slurm does not answer.
    """
    going = _list_going(paths)
    if going is None:
        raise SlurmError("squeue does not answer: nothing was cancelled")
    if going:
        _stop_jobs(going, paths, tell)
    elif launchers := find_launchers(paths):
        _stop_launchers(launchers, paths, tell)
    else:
        raise UserError(f"no launcher works on run {paths.root}, and no job: there is nothing to cancel")
    tell("[CANCEL] stopped; what is finished stays")


def _list_going(paths: RunPaths) -> list[QueueEntry] | None:
    """The run's jobs and tasks that have not ended, these and no other job of the user; None if Slurm is silent."""
    own = {(job.cluster, job.number, job.array) for job in list_run_jobs(paths)}
    if not own:
        return []
    queue = read_queue(list_clusters(read_array_jobs(paths.array_jobs)))
    if queue is None:
        return None
    return [
        entry
        for entry in queue
        if (entry.cluster, entry.array_job, entry.number is not None) in own and entry.phase is not JobPhase.ENDED
    ]


def _stop_jobs(going: Sequence[QueueEntry], paths: RunPaths, tell: Callable[[str], None]) -> None:
    """Until none is in the queue any more; also those that a `run --wait` submitted meanwhile.

    The controller is asked once the run's files say that its tasks have left, which is mostly the end of it; where
    they stay, or Slurm is not through with them yet, as seldom as everywhere.
    """
    asked: dict[str, JobPhase] = {}
    interval_s, gone, silent = POLL_S, False, False
    while going:
        # One that ran when it was asked, and waits now, had just been requeued.
        requeued = {job for job, state in asked.items() if state is not JobPhase.WAITING}
        if new := [
            entry
            for entry in going
            if entry.job not in asked or (entry.phase is JobPhase.WAITING and entry.job in requeued)
        ]:
            cancel_jobs(new)
            names = [entry.job for entry in new]
            tell(f"[CANCEL] jobs {', '.join(names)}: asked to stop, folds leave at their next safe point")
            asked |= {entry.job: entry.phase for entry in new}
            _mark_cancelled(paths)
        gone = _await_tasks(paths, interval_s, gone)
        found = _list_going(paths)
        interval_s = next_interval(interval_s, changed=found not in (None, going))
        if found is None and not silent:
            tell("[CANCEL] squeue does not answer: waiting until it says that they have stopped")
        silent = found is None
        going = going if found is None else found


def _mark_cancelled(paths: RunPaths) -> None:
    """So that no `run --wait` submits again what was preempted; one that submits now is met in the queue."""
    with suppress(LockError), hold_lock(paths.submit_lock, f"run {paths.run_id} is being cancelled"):
        if array_jobs := read_array_jobs(paths.array_jobs):
            write_array_jobs(paths.array_jobs, [replace(one, cancelled=True) for one in array_jobs])


def _await_tasks(paths: RunPaths, limit_s: float, gone: bool) -> bool:
    """Until none of the run's tasks holds its lock, unless they were `gone` before, or so long; whether they have."""
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if not gone and not find_launchers(paths):
            time.sleep(_SLURM_ENDS_S)
            return True
        time.sleep(_LOOK_S)
    return gone


def _stop_launchers(holders: Sequence[Holder], paths: RunPaths, tell: Callable[[str], None]) -> None:
    """Stop the run's launcher, or its tasks of another batch system, on this machine."""
    if away := [str(holder) for holder in holders if not is_visible(holder)]:
        raise UserError(f"{'; '.join(away)}: cancel it there, on that machine and in the same container")
    launcher = find_holder(paths.launch_lock())
    for holder in holders:
        try:
            # A task that ends after SIGTERM says by its exit code that it is to be started again.
            os.kill(holder.pid, signal.SIGTERM if holder == launcher else signal.SIGINT)
        except ProcessLookupError:
            continue
        except PermissionError as error:
            raise UserError(f"{holder}: it is another user's, who alone can cancel it") from error
        tell(f"[CANCEL] {holder}: it is asked to stop, its folds leave at their next safe point")
    while set(holders) & set(find_launchers(paths)):
        time.sleep(_LOOK_S)
    if launcher is None:
        tell("[CANCEL] a batch system that starts its tasks again is to be told, too: kubectl delete job, qdel, bkill")
