"""`doccls-launch cancel`: stop a run or a study, its launcher and its Slurm jobs, and wait until they have stopped."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from doccls.errors import UserError
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import write_text
from doccls.system.holder import Holder, is_visible
from doccls.system.lock import LockError, find_holder, hold_lock
from launcher.ledger import read_ledger, read_ledgers
from launcher.slurm.array_jobs import list_clusters, read_array_jobs, write_array_jobs
from launcher.slurm.format import JobPhase, QueueEntry, SlurmError
from launcher.slurm.queue import POLL_S, cancel_jobs, next_interval, read_queue
from launcher.status_files import count_folds, find_launchers, list_run_jobs
from launcher.study_file import locate_member, locate_study_lock, read_study

_POLL_S = 0.2
_SLURM_CLEANUP_S = 2.0  # time for Slurm to clean up after a job whose process has ended


def cancel_run(paths: RunPaths, report: Callable[[str], None]) -> None:
    """Stop the run as Ctrl-C at its terminal does, each fold at its next safe point; return once all have stopped.

    Raises:
        UserError: no launcher or job is active, or a launcher can't be reached from here.
        SlurmError: the run has jobs, and Slurm does not answer.
    """
    active = _list_active_jobs([paths])
    if active is None:
        raise SlurmError("squeue does not answer: nothing was cancelled")
    if active:
        _stop_jobs(active, [paths], report)
    elif study := _find_study(paths):
        _stop_member(study, paths, report)
    elif launchers := find_launchers(paths):
        _stop_launchers(launchers, [paths], report)
    else:
        raise UserError(f"no launcher or job of run {paths.root} is active: there is nothing to cancel")
    report("[CANCEL] stopped; finished folds are kept")


def cancel_study(folder: Path, report: Callable[[str], None]) -> None:
    """Stop all runs of a study, whose folder this is, as `cancel_run` does for one.

    Raises:
        UserError: nothing of it is active, or a launcher can't be reached from here.
        SlurmError: its runs have jobs, and Slurm does not answer.
    """
    lock = locate_study_lock(folder)
    holder = find_holder(lock)
    if holder is not None:  # the launcher of all runs on this machine
        _ask_to_stop(holder, signal.SIGTERM, report)
        while find_holder(lock) == holder:
            time.sleep(_POLL_S)
    study = read_study(folder)
    runs = [] if study is None else [locate_member(folder, member) for member in study.members]
    active = _list_active_jobs(runs)
    if active is None:
        raise SlurmError(f"squeue does not answer: no job of study {folder} was cancelled")
    launchers = [launcher for paths in runs for launcher in find_launchers(paths)]
    if active:
        _stop_jobs(active, runs, report)
    elif launchers:
        _stop_launchers(launchers, runs, report)
    elif holder is None:
        raise UserError(f"no launcher or job of study {folder} is active: there is nothing to cancel")
    report("[CANCEL] stopped; finished folds are kept")


def _list_active_jobs(runs: Sequence[RunPaths]) -> list[QueueEntry] | None:
    """Return the runs' own jobs and tasks that have not ended, or None if Slurm does not answer."""
    own, tasks, clusters = set(), set(), set[str]()
    for paths in runs:
        jobs = list_run_jobs(paths)
        own |= {(job.cluster, job.number, job.array) for job in jobs if not job.of_study}
        if any(job.of_study for job in jobs):
            ledgers = read_ledgers(paths)
            folds = range(count_folds(paths, ledgers[0] if ledgers else None))
            tasks |= {(job.cluster, job.name(fold)) for job in jobs if job.of_study for fold in folds}
        clusters.update(list_clusters(read_array_jobs(paths.array_jobs)))
    if not own and not tasks:
        return []
    queue = read_queue(sorted(clusters))
    if queue is None:
        return None
    return [
        entry
        for entry in queue
        if entry.phase is not JobPhase.ENDED
        and ((entry.cluster, entry.array_job, entry.number is not None) in own or (entry.cluster, entry.job) in tasks)
    ]


def _stop_jobs(active: Sequence[QueueEntry], runs: Sequence[RunPaths], report: Callable[[str], None]) -> None:
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
            for paths in runs:
                _mark_cancelled(paths)
        tasks_ended = _await_tasks(runs, interval_s, tasks_ended)
        found = _list_active_jobs(runs)
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


def _await_tasks(runs: Sequence[RunPaths], limit_s: float, ended: bool) -> bool:
    """Wait until no task of the runs holds its lock or the limit has passed; return whether all tasks have ended.

    If they had `ended` before, wait for the whole limit, for Slurm to catch up.
    """
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if not ended and not any(find_launchers(paths) for paths in runs):
            time.sleep(_SLURM_CLEANUP_S)
            return True
        time.sleep(_POLL_S)
    return ended


def _find_study(paths: RunPaths) -> Holder | None:
    """Return the launcher that trains the run as part of a study; None if there is none."""
    holder = find_holder(paths.launch_lock())
    ledger = None if holder is None else read_ledger(paths.ledger())
    return holder if ledger is not None and ledger.study is not None else None


def _stop_member(launcher: Holder, paths: RunPaths, report: Callable[[str], None]) -> None:
    """Ask the launcher of a study, on any machine, to stop the folds of this run, and wait until none is trained."""
    write_text(paths.cancel_request, launcher.token)
    report(f"[CANCEL] {launcher}: asked to stop the folds of this run at their next safe point; its study goes on")
    while find_holder(paths.launch_lock()) == launcher and not _has_stopped(paths):
        time.sleep(_POLL_S)
    with suppress(OSError):
        paths.cancel_request.unlink()


def _has_stopped(paths: RunPaths) -> bool:
    """Return whether the launcher has answered the request by stopping every fold."""
    ledger = read_ledger(paths.ledger())
    assert ledger is not None
    return ledger.cancelled and all(attempt.outcome is not None for attempt in ledger.attempts)


def _ask_to_stop(holder: Holder, signum: int, report: Callable[[str], None]) -> None:
    """Send the signal to a process on this machine.

    Raises:
        UserError: it is on another machine, or belongs to another user.
    """
    if not is_visible(holder):
        raise UserError(f"{holder}: cancel it there, on that machine and in the same container")
    try:
        os.kill(holder.pid, signum)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise UserError(f"{holder}: it belongs to another user; only that user can cancel it") from error
    report(f"[CANCEL] {holder}: asked to stop; its folds stop at their next safe point")


def _stop_launchers(holders: Sequence[Holder], runs: Sequence[RunPaths], report: Callable[[str], None]) -> None:
    """Stop launchers of the runs, or their tasks in another batch system, on this machine."""
    if unreachable := [str(holder) for holder in holders if not is_visible(holder)]:
        raise UserError(f"{'; '.join(unreachable)}: cancel it there, on that machine and in the same container")
    launchers = [find_holder(paths.launch_lock()) for paths in runs]
    for holder in {(holder.host, holder.pid): holder for holder in holders}.values():
        # After SIGTERM, a task would ask by its exit code to be restarted.
        _ask_to_stop(holder, signal.SIGTERM if holder in launchers else signal.SIGINT, report)
    while set(holders) & {holder for paths in runs for holder in find_launchers(paths)}:
        time.sleep(_POLL_S)
    if not any(launchers):
        report(
            "[CANCEL] if a batch system restarts these tasks, delete their job there: kubectl delete job, qdel, bkill"
        )
