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

_POLL_S = 0.2
_SLURM_CLEANUP_S = 2.0  # time for Slurm to clean up after a job whose process has ended


def cancel_run(paths: RunPaths, report: Callable[[str], None]) -> None:
    """Stop the run as Ctrl-C at its terminal does, each fold at its next safe point; return once all have stopped.

    Raises:
        UserError: no launcher or job is active, or a launcher can't be reached from here.
        SlurmError: the run has jobs, and Slurm does not answer.
    """
    active = _list_active_jobs(paths)
    if active is None:
        raise SlurmError("squeue does not answer: nothing was cancelled")
    if active:
        _stop_jobs(active, paths, report)
    elif launchers := find_launchers(paths):
        _stop_launchers(launchers, paths, report)
    else:
        raise UserError(f"no launcher or job of run {paths.root} is active: there is nothing to cancel")
    report("[CANCEL] stopped; finished folds are kept")


def _list_active_jobs(paths: RunPaths) -> list[QueueEntry] | None:
    """Return the run's own jobs and tasks that have not ended, or None if Slurm does not answer."""
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


def _stop_jobs(active: Sequence[QueueEntry], paths: RunPaths, report: Callable[[str], None]) -> None:
    """Cancel jobs until none is in the queue, including those that a `run --wait` submits meanwhile.

    The controller is polled once the run's files show that its tasks have stopped, which usually suffices; if tasks
    run on, or Slurm has not cleaned up yet, it is polled at the usual intervals.
    """
    cancelled: dict[str, JobPhase] = {}
    interval_s, tasks_ended, is_silent = POLL_S, False, False
    while active:
        # A job that ran when it was cancelled and waits now had just been requeued.
        requeued = {job for job, phase in cancelled.items() if phase is not JobPhase.WAITING}
        if new := [
            entry
            for entry in active
            if entry.job not in cancelled or (entry.phase is JobPhase.WAITING and entry.job in requeued)
        ]:
            cancel_jobs(new)
            names = [entry.job for entry in new]
            report(f"[CANCEL] jobs {', '.join(names)}: asked to stop; folds stop at their next safe point")
            cancelled |= {entry.job: entry.phase for entry in new}
            _mark_cancelled(paths)
        tasks_ended = _await_tasks(paths, interval_s, tasks_ended)
        found = _list_active_jobs(paths)
        interval_s = next_interval(interval_s, changed=found not in (None, active))
        if found is None and not is_silent:
            report("[CANCEL] squeue does not answer: waiting for it to confirm the stop")
        is_silent = found is None
        active = active if found is None else found


def _mark_cancelled(paths: RunPaths) -> None:
    """Keep `run --wait` from resubmitting preempted jobs; what it submits right now is found in the queue."""
    with suppress(LockError), hold_lock(paths.submit_lock, f"run {paths.run_id} is being cancelled"):
        if array_jobs := read_array_jobs(paths.array_jobs):
            write_array_jobs(paths.array_jobs, [replace(job, cancelled=True) for job in array_jobs])


def _await_tasks(paths: RunPaths, limit_s: float, ended: bool) -> bool:
    """Wait until no task of the run holds its lock or the limit has passed; return whether all tasks have ended.

    If they had `ended` before, wait for the whole limit, for Slurm to catch up.
    """
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if not ended and not find_launchers(paths):
            time.sleep(_SLURM_CLEANUP_S)
            return True
        time.sleep(_POLL_S)
    return ended


def _stop_launchers(holders: Sequence[Holder], paths: RunPaths, report: Callable[[str], None]) -> None:
    """Stop the run's launcher, or its tasks in another batch system, on this machine."""
    if unreachable := [str(holder) for holder in holders if not is_visible(holder)]:
        raise UserError(f"{'; '.join(unreachable)}: cancel it there, on that machine and in the same container")
    launcher = find_holder(paths.launch_lock())
    for holder in holders:
        try:
            # After SIGTERM, a task would ask by its exit code to be restarted.
            os.kill(holder.pid, signal.SIGTERM if holder == launcher else signal.SIGINT)
        except ProcessLookupError:
            continue
        except PermissionError as error:
            raise UserError(f"{holder}: it belongs to another user; only that user can cancel it") from error
        report(f"[CANCEL] {holder}: asked to stop; its folds stop at their next safe point")
    while set(holders) & set(find_launchers(paths)):
        time.sleep(_POLL_S)
    if launcher is None:
        report(
            "[CANCEL] if a batch system restarts these tasks, delete their job there: kubectl delete job, qdel, bkill"
        )
