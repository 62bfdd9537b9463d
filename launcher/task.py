"""`doccls-launch task`: an array task's share of a run's folds; whoever finishes last merges."""

import signal
import subprocess
import tempfile
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
from launcher.launch import FoldLoop, LaunchOptions, describe_launch, describe_processes
from launcher.ledger import LedgerFile, begin_launch
from launcher.plan import render_plan
from launcher.slurm.backend import SlurmBackend
from launcher.slurm.format import SlurmTask
from launcher.status import list_unfinished, read_status

_OPENING_S = 7200.0
"""How long a look at the data by another task may take."""
_OUTLIVING_S = 60.0
"""How long an earlier start of this very task may outlive Slurm's word that it is gone."""
_TIME_IS_UP = (signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm sends ahead of the job's time limit: slurm/kfold.sh asks for the first, a site may for the second."""


@dataclass(frozen=True)
class TaskShare:
    """What a task of an array trains."""

    task: SlurmTask
    folds: tuple[int, ...]
    sharing: int
    """How many tasks of the array share all folds out; 0: each trains the fold of its number."""


def run_task(config: Config, run_id: str, now: datetime, share: TaskShare, options: LaunchOptions, log: RunLog) -> None:
    """Train the share's folds that are not finished, and merge the run if it is whole then.

    Raises:
        UserError: config, data or another launcher of the run stand in the way, or folds failed.
        Interrupted: a signal came; the fold has left at its next safe point.
    """
    log_config(config, log)
    log.line(render_plan(options.plan, commands=False))
    paths, task = locate_run(config.output.exp_dir, run_id, now), share.task
    what = f"run {run_id}, task {task.job} of Slurm,"
    # One task of the array scans the images; the others wait for it.
    with hold_lock(paths.opening_lock, f"{what} is being opened", _OPENING_S) as opening:
        run = open_run(config, paths, now, describe_processes(options), log, opening.check)
    experiment = run.experiment
    log.line(f"[ARTIFACTS] {paths.root}")
    with hold_lock(paths.launch_lock(task.number), f"{what} is being launched", _OUTLIVING_S) as lock:
        described = describe_launch(experiment, share.folds, options, log, now)
        ledger_path = paths.ledger(task.number)
        ledger = begin_launch(ledger_path, replace(described, job=task.job, sharing=share.sharing))
        with tempfile.TemporaryDirectory(prefix="doccls-task-") as folder, stopping_gracefully():
            backend = SlurmBackend(task, options.ranks_per_fold // task.nodes, Path(folder))
            ledger_file, missing = LedgerFile(ledger_path, ledger, lock, log), run.list_missing(share.folds)
            loop = FoldLoop(experiment, options, backend, log, ledger_file, missing)
            try:
                loop.run()
            except Interrupted as stop:
                if stop.signum in _TIME_IS_UP:
                    _come_again(loop.has_advanced, task, options, log)
                raise
    close_share(experiment, log)


def _come_again(advanced: bool, task: SlurmTask, options: LaunchOptions, log: RunLog) -> None:
    """The job's time is nearly up: put it back into the queue, unless it would come no further the next time either."""
    if not advanced:
        log.line(
            f"[LAUNCH] the time limit of job {task.job} came before a step was saved: ask for more "
            f"(sbatch --time=...), then: {options.again}"
        )
        return
    log.line(f"[LAUNCH] the time limit of job {task.job} comes: it goes back into the queue, and goes on from here")
    done_by_slurm = subprocess.run(["scontrol", "requeue", task.job], capture_output=True, text=True, check=False)
    if done_by_slurm.returncode:
        log.line(f"[WARNING] Slurm did not take it ({done_by_slurm.stderr.strip()}): {options.again}")


_MERGING_S = 600.0
"""How long another one's merge may take."""


def close_share(experiment: Experiment, log: RunLog) -> bool:
    """Merge the run if it is whole, and nobody has; else say what is missing. Whether it is whole.

    Two that come at once do it in turn, and the second finds it done.
    """
    paths = experiment.paths
    whole = len(experiment.find_finished()) == experiment.config.data.folds
    if whole:
        with hold_lock(paths.merge_lock, f"run {paths.run_id} is being merged", wait_s=_MERGING_S):
            if not is_merged(paths):
                close_run(experiment, log)
                return True
        log.line(f"[OOF] merged before: {paths.oof_logits}")
        for line in list_scores(load_merged(paths)[1]):
            log.line(line)
    else:
        log.line("[OOF] not merged: whoever finishes last merges; what is not done now:")
        for line in list_unfinished(read_status(paths)):
            log.line(line)
    log_done(paths, log)
    return whole
