"""`doccls-launch task`: trains an array task's share of a run's folds; the task that finishes last merges them."""

import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from doccls.config import Config
from doccls.experiment import Experiment, describe_unmerged, log_config, log_done, merge, open_run, report
from doccls.oof.merge import load_merged, lock_merge
from doccls.oof.predictions import is_merged
from doccls.oof.summary import list_scores
from doccls.reporting.log import RunLog
from doccls.run.paths import locate_run
from doccls.system.lock import hold_lock
from doccls.system.signals import Interrupted, stopping_gracefully
from doccls.system.temporary import temporary_folder
from launcher.array import ArrayTask
from launcher.forking import RankServer
from launcher.launch import FoldLoop, serve_launch
from launcher.ledger import LedgerFile, begin_launch
from launcher.local import Backend, LocalBackend
from launcher.plan import render_plan
from launcher.queued_run import Job, LaunchOptions, describe_launch, describe_processes, make_queued_run
from launcher.slurm.format import Allocation
from launcher.slurm.queue import read_job, requeue_job
from launcher.slurm.steps import SlurmBackend, watching_for_preemption
from launcher.status import list_unfinished
from launcher.status_files import read_status

_OPEN_LIMIT_S = 7200.0  # how long another task may take to scan the data
_EXIT_LIMIT_S = 60.0  # how long an earlier start of this task may survive after the batch system reports it gone
# Sent by Slurm ahead of the job's time limit: slurm/kfold.sh asks for the first, a site may ask for the second.
_TIME_LIMIT_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class TaskOptions:
    """Options of an array task, besides those of every launch."""

    task: ArrayTask
    folds: tuple[int, ...]
    allocation: Allocation | None  # None outside Slurm
    requeue_code: int  # exit code of a task that was stopped and can resume
    offset: int = 0  # number of the run's fold 0 among the folds of all runs of its study


@dataclass
class TaskProgress:
    """What a task has done since it started, over all its runs, also those that failed."""

    has_advanced: bool = False  # it has finished a fold or saved a resume checkpoint


def serve_task(share: TaskOptions, options: LaunchOptions, log: RunLog) -> AbstractContextManager[RankServer | None]:
    """Start the server of the task's ranks in the background, for all its runs; None: they start fresh, or by srun."""
    return nullcontext() if _spans_nodes(share) else serve_launch(options, log)


def run_task(
    config: Config,
    run_id: str,
    now: datetime,
    share: TaskOptions,
    options: LaunchOptions,
    server: RankServer | None,
    progress: TaskProgress,
    log: RunLog,
) -> tuple[int, ...]:
    """Train the unfinished folds of the share, merge the run if all its folds are finished then, or return the missing.

    `server` forks the ranks; None: they start fresh.

    Raises:
        UserError: config, data or another launcher of the run prevent it, or folds failed.
        Interrupted: a signal arrived; the fold has stopped at its next safe point.
    """
    log_config(config, log)
    log.line(render_plan(options.plan, commands=False))
    paths, task = locate_run(config.output.exp_dir, run_id, now), share.task
    owner = f"run {run_id}, task {task.name},"
    # One task of the array scans the images; the others wait for it.
    with hold_lock(paths.opening_lock, f"{owner} is being opened", _OPEN_LIMIT_S) as opening:
        run = open_run(config, paths, now, describe_processes(options), log, opening.check)
    experiment = run.experiment
    log.line(f"[ARTIFACTS] {paths.root}")
    with hold_lock(paths.launch_lock(task.index), f"{owner} is being launched", _EXIT_LIMIT_S) as lock:
        ledger = describe_launch(experiment, share.folds, options, log, now)
        if share.allocation is not None:
            ledger = replace(ledger, job=task.name, first_task=task.first, sharing=task.sharing, offset=share.offset)
        ledger_path = paths.ledger(task.index)
        ledger = begin_launch(ledger_path, ledger)
        watching = nullcontext() if share.allocation is None else watching_for_preemption()
        with temporary_folder("doccls-task-") as folder, stopping_gracefully(), watching:
            ledger_file = LedgerFile(ledger_path, ledger, lock, log)
            queued = make_queued_run(run, share.folds, ledger_file, lock, options, log)
            jobs = [Job(queued, fold) for fold in queued.missing]
            if server is not None and jobs:
                server.await_ready()
            loop = FoldLoop([queued], jobs, options, _make_backend(share, options, folder, server), log)
            try:
                loop.run()
            except Interrupted as stop:
                if _handle_stop(stop, progress.has_advanced or loop.has_advanced, share, options, log):
                    stop.exit_code = share.requeue_code
                raise
            finally:
                progress.has_advanced |= loop.has_advanced
    return close_share(experiment, log)


def _spans_nodes(share: TaskOptions) -> bool:
    return share.allocation is not None and share.allocation.nodes > 1


def _make_backend(share: TaskOptions, options: LaunchOptions, folder: Path, server: RankServer | None) -> Backend:
    """Return the backend: ranks on one node start as on any machine, those on several nodes as a Slurm job step."""
    allocation = share.allocation
    if allocation is not None and allocation.nodes > 1:
        return SlurmBackend(allocation, options.ranks_per_fold // allocation.nodes, folder)
    return LocalBackend(folder, options.ranks_per_fold, server)


def _handle_stop(
    stop: Interrupted, has_advanced: bool, share: TaskOptions, options: LaunchOptions, log: RunLog
) -> bool:
    """Requeue a stopped task if Slurm would not; return whether to exit with the requeue code.

    A task that hit its time limit before a step was saved is not requeued: its next start would get no further.
    """
    name, is_time_limit = share.task.name, stop.signum in _TIME_LIMIT_SIGNALS
    if stop.signum == signal.SIGINT:  # a person at a terminal, or `doccls-launch cancel`
        return False
    if is_time_limit and not has_advanced:
        log.line(
            f"[LAUNCH] job {name} reached its time limit before a step was saved: request more time "
            f"(sbatch --time=...), then run: {options.resume_command}"
        )
        return False
    if share.allocation is not None:
        _requeue(name, is_time_limit, options, log)
    if has_advanced:
        reason = signal.Signals(stop.signum).name
        log.line(f"[LAUNCH] stopped by {reason}; exit code {share.requeue_code}: the task can resume")
    return has_advanced


def _requeue(name: str, is_time_limit: bool, options: LaunchOptions, log: RunLog) -> None:
    """Requeue a job that is being preempted or nears its time limit; a cancelled job must stay cancelled."""
    job = read_job(name)
    if job is None:
        log.line(
            f"[WARNING] scontrol does not answer: job {name} may not be requeued; "
            f"to train the missing folds: {options.resume_command}"
        )
    elif job.is_running and (is_time_limit or job.is_preempted):
        event = f"job {name} nears its time limit" if is_time_limit else f"job {name} is being preempted"
        refusal = requeue_job(name)
        if refusal is None:
            log.line(f"[LAUNCH] {event}: requeued, will resume from here")
        else:
            log.line(f"[WARNING] {event}, but was not requeued ({refusal}); to resume: {options.resume_command}")


def close_share(experiment: Experiment, log: RunLog) -> tuple[int, ...]:
    """Merge the run if all its folds are finished and it is not merged yet; otherwise log and return the missing folds.

    With a single fold as `valid_fold` it never merges, like `close_run`. Processes that call this at the same time take
    turns, and the second finds the run merged.
    """
    paths, data = experiment.paths, experiment.config.data
    finished = experiment.find_finished()
    missing = tuple(fold for fold in data.list_wanted() if fold not in finished)
    if data.valid_fold != "all":
        log.line(describe_unmerged(experiment))
        if not missing:
            report(experiment, log)
    elif not missing:
        with lock_merge(paths) as lock:
            is_new = not is_merged(paths)
            if is_new:
                merge(experiment, lock, log)
        if not is_new:
            log.line(f"[OOF] already merged: {paths.oof_logits}")
            for line in list_scores(load_merged(paths)[1]):
                log.line(line)
        report(experiment, log)  # without the lock, for which other tasks wait only so long
    else:
        log.line("[OOF] not merged: the task that finishes last merges; unfinished folds:")
        for line in list_unfinished(read_status(paths)):
            log.line(line)
    log_done(paths, log)
    if missing:
        log.end_as(
            f"INCOMPLETE missing={','.join(map(str, missing))}",
            f"this command's share is finished, but folds {', '.join(map(str, missing))} of the run are not",
        )
    return missing
