"""`doccls-launch task`: an array task's share of a run's folds; whoever finishes last merges."""

import signal
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from doccls.config import Config
from doccls.experiment import Experiment, close_run, log_config, log_done, open_run
from doccls.oof.merge import load_merged
from doccls.oof.predictions import is_merged
from doccls.oof.summary import list_scores
from doccls.reporting.log import RunLog
from doccls.run.paths import locate_run
from doccls.system.lock import hold_lock
from doccls.system.signals import Interrupted, stopping_gracefully
from launcher.array import ArrayTask
from launcher.launch import FoldLoop, LaunchOptions, describe_launch, describe_processes
from launcher.ledger import LedgerFile, begin_launch
from launcher.local import Backend, LocalBackend
from launcher.plan import render_plan
from launcher.slurm.format import Allocation
from launcher.slurm.queue import read_job, requeue_job
from launcher.slurm.steps import SlurmBackend, watching_for_preemption
from launcher.status import list_unfinished, read_status

_OPENING_S = 7200.0
"""How long another task may take to scan the data."""
_OUTLIVING_S = 60.0
"""How long an earlier start of this very task may outlive the batch system's word that it is gone."""
_MERGING_S = 600.0
"""How long another task's merge may take."""
_TIME_IS_UP = (signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm sends ahead of the job's time limit: slurm/kfold.sh asks for the first, a site may for the second."""


@dataclass(frozen=True)
class TaskOptions:
    """How an array task trains its share, beside what every launch is told."""

    task: ArrayTask
    folds: tuple[int, ...]
    allocation: Allocation | None
    """What Slurm gave the job; None outside Slurm."""
    requeue_code: int
    """Exit code of a task that was asked to stop and can resume."""


def run_task(
    config: Config, run_id: str, now: datetime, share: TaskOptions, options: LaunchOptions, log: RunLog
) -> None:
    """Train the share's folds that are not finished, and merge the run if all are finished then.

    Raises:
        UserError: config, data or another launcher of the run stand in the way, or folds failed.
        Interrupted: a signal came; the fold has stopped at its next safe point.
    """
    log_config(config, log)
    log.line(render_plan(options.plan, commands=False))
    paths, task = locate_run(config.output.exp_dir, run_id, now), share.task
    what = f"run {run_id}, task {task.name},"
    # One task of the array scans the images; the others wait for it.
    with hold_lock(paths.opening_lock, f"{what} is being opened", _OPENING_S) as opening:
        run = open_run(config, paths, now, describe_processes(options), log, opening.check)
    experiment = run.experiment
    log.line(f"[ARTIFACTS] {paths.root}")
    with hold_lock(paths.launch_lock(task.index), f"{what} is being launched", _OUTLIVING_S) as lock:
        described = describe_launch(experiment, share.folds, options, log, now)
        if share.allocation is not None:
            described = replace(described, job=task.name, first_task=task.first, sharing=task.sharing)
        ledger_path = paths.ledger(task.index)
        ledger = begin_launch(ledger_path, described)
        watching = nullcontext() if share.allocation is None else watching_for_preemption()
        with tempfile.TemporaryDirectory(prefix="doccls-task-") as folder, stopping_gracefully(), watching:
            ledger_file, missing = LedgerFile(ledger_path, ledger, lock, log), run.list_missing(share.folds)
            loop = FoldLoop(experiment, options, _make_backend(share, options, folder), log, ledger_file, missing)
            try:
                loop.run()
            except Interrupted as stop:
                if _ask_for_requeue(stop, loop.has_advanced, share, options, log):
                    stop.exit_code = share.requeue_code
                raise
    close_share(experiment, log)


def _make_backend(share: TaskOptions, options: LaunchOptions, folder: str) -> Backend:
    """On one node the ranks are started as on any machine; several nodes take a job step of Slurm."""
    allocation = share.allocation
    if allocation is not None and allocation.nodes > 1:
        return SlurmBackend(allocation, options.ranks_per_fold // allocation.nodes, Path(folder))
    return LocalBackend(Path(folder), options.ranks_per_fold)


def _ask_for_requeue(
    stop: Interrupted, advanced: bool, share: TaskOptions, options: LaunchOptions, log: RunLog
) -> bool:
    """Ask Slurm to run a stopped task again, where it would not by itself; whether the exit code is to ask, too.

    At a time limit within which no step was saved nobody is asked: the next start would come no further.
    """
    name, limit = share.task.name, stop.signum in _TIME_IS_UP
    if stop.signum == signal.SIGINT:  # a person at a terminal, or `doccls-launch cancel`
        return False
    if limit and not advanced:
        log.line(
            f"[LAUNCH] the time limit of job {name} came before a step was saved: ask for more (sbatch --time=...), "
            f"then: {options.resume_command}"
        )
        return False
    if share.allocation is not None:
        _requeue(name, limit, options, log)
    if advanced:
        reason = signal.Signals(stop.signum).name
        log.line(f"[LAUNCH] stopped by {reason}; exit code {share.requeue_code} says that it can resume")
    return advanced


def _requeue(name: str, limit: bool, options: LaunchOptions, log: RunLog) -> None:
    """Requeue a job whose time limit or preemption is near. One that is cancelled is over, and must not come back."""
    job = read_job(name)
    if job is None:
        log.line(
            f"[WARNING] scontrol does not answer: job {name} may not be requeued; "
            f"to train the rest: {options.resume_command}"
        )
    elif job.runs and (limit or job.preempted):
        what = f"the time limit of job {name} comes" if limit else f"job {name} is preempted"
        refusal = requeue_job(name)
        if refusal is None:
            log.line(f"[LAUNCH] {what}: it is requeued, and will resume from here")
        else:
            log.line(f"[WARNING] {what}, and it is not requeued ({refusal}): {options.resume_command}")


def close_share(experiment: Experiment, log: RunLog) -> tuple[int, ...]:
    """Merge the run if all its folds are finished and nobody has merged it; else log what is missing, and return it.

    Two that come at once do it in turn, and the second finds it done.
    """
    paths = experiment.paths
    finished = experiment.find_finished()
    if len(finished) == experiment.config.data.folds:
        with hold_lock(paths.merge_lock, f"run {paths.run_id} is being merged", wait_s=_MERGING_S):
            if not is_merged(paths):
                close_run(experiment, log)
                return ()
        log.line(f"[OOF] merged before: {paths.oof_logits}")
        for line in list_scores(load_merged(paths)[1]):
            log.line(line)
    else:
        log.line("[OOF] not merged: whoever finishes last merges; what is not done now:")
        for line in list_unfinished(read_status(paths)):
            log.line(line)
    log_done(paths, log)
    missing = tuple(fold for fold in experiment.config.data.list_wanted() if fold not in finished)
    if missing:
        log.end_as(
            f"INCOMPLETE missing={','.join(map(str, missing))}",
            f"this command's share is finished, folds {', '.join(map(str, missing))} of the run are not",
        )
    return missing
