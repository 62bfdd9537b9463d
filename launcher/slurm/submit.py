"""`doccls-launch run --backend slurm`: the missing folds of a run as one array, submitted exactly once."""

import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from doccls.config import Config
from doccls.errors import UserError
from doccls.experiment import Experiment, OpenRun, log_config, open_run
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths, locate_run
from doccls.system.lock import LockError, find_holder, hold_lock
from doccls.system.signals import check_stop, stopping_gracefully
from launcher.ledger import tell_time
from launcher.slurm.format import (
    Going,
    JobRequest,
    QueueEntry,
    SlurmError,
    render_comment,
    render_sbatch,
)
from launcher.slurm.queue import ask_queue, submit_script
from launcher.slurm.submissions import Submission, list_going, read_submissions, settle, write_submissions
from launcher.status import list_run_jobs, list_unfinished, read_status
from launcher.task import close_share

_FIND_TRIES = 5
_FIND_WAIT_S = 1.0
_WATCH_S = 2.0
_TICK_S = 0.2


@dataclass(frozen=True)
class SubmitOptions:
    """How to submit, beside the config."""

    request: JobRequest
    script: str
    """Of each task."""
    world_size: int
    """Processes of each fold."""
    wait: bool
    """Return when the run has ended, not when it is submitted."""
    again: str
    """The command that trains what is missing."""


def submit(config: Config, run_id: str, now: datetime, options: SubmitOptions, log: RunLog) -> None:
    """Check config and data, make the run, and submit the folds that are neither finished nor on their way.

    Raises:
        UserError: config, data, Slurm or a launcher of the run stand in the way; with `wait` also folds that failed.
        Interrupted: a signal came; what is submitted goes on.
    """
    log_config(config, log)
    paths = locate_run(config.output.exp_dir, run_id, now)
    if (launcher := find_holder(paths.launch_lock())) is not None:
        raise LockError(f"{launcher} ({paths.launch_lock()}): end it first, or wait for it")
    with ExitStack() as held:
        take_lock = partial(held.enter_context, hold_lock(paths.submission_lock, f"run {run_id} is being submitted"))
        run = open_run(config, paths, now, {"world_size": options.world_size}, log, take_lock)
        log.line(f"[ARTIFACTS] {paths.root}")
        _submit_missing(run, options, log)
    log.line(f"[SLURM] where it stands: doccls-launch status {paths.root}")
    log.line(f"[SLURM] to end it:       doccls-launch cancel {paths.root}")
    if options.wait:
        with stopping_gracefully():
            _watch(run.experiment, log)
        if not close_share(run.experiment, log) and config.data.valid_fold == "all":
            unfinished = "\n".join(list_unfinished(read_status(paths)))
            raise UserError(f"the run has ended, and folds are missing\n{unfinished}\nto train them: {options.again}")


def _submit_missing(run: OpenRun, options: SubmitOptions, log: RunLog) -> None:
    paths, run_id = run.experiment.paths, run.experiment.paths.run_id
    submissions, queue = read_submissions(paths.submissions), ask_queue()
    if queue is None:
        raise SlurmError("squeue does not answer: nothing was submitted. Try again when Slurm is there")
    assert run.lock is not None
    run.lock.check()
    settled = settle(submissions, run_id, queue)
    if settled != submissions:
        submissions = settled
        write_submissions(paths.submissions, submissions)
    wanted = run.list_missing(run.experiment.config.data.list_wanted())
    going = list_going(wanted, list_run_jobs(paths), queue)
    for fold, entry in going.items():
        log.line(f"[SLURM] fold {fold}: on its way as job {entry.job} ({entry.state})")
    missing = tuple(fold for fold in wanted if fold not in going)
    if not missing:
        log.line("[SLURM] nothing to submit")
        return
    token = secrets.token_hex(8)
    submissions = (*submissions, Submission(token, missing, tell_time(datetime.now()), options.again))
    write_submissions(paths.submissions, submissions)
    refused = None
    try:
        job: str | None = _submit(paths, token, missing, options)
    except SlurmError as error:
        job = _find(run_id, token, str(error))
        refused = None if job else str(error)
    write_submissions(paths.submissions, (*submissions[:-1], replace(submissions[-1], job=job, refused=refused)))
    if job is None:
        raise SlurmError(f"the folds are not submitted: {refused}")
    log.line(f"[SLURM] job {job}: folds {', '.join(map(str, missing))} submitted, a task a fold")


def _submit(paths: RunPaths, token: str, folds: Sequence[int], options: SubmitOptions) -> str:
    paths.consoles.mkdir(parents=True, exist_ok=True)
    command = render_sbatch(options.request, folds, paths.run_id, token, str(paths.consoles))
    return submit_script(command, options.script)


def _find(run_id: str, token: str, said: str) -> str | None:
    """The job whose answer was lost; None if it is not in the queue. The controller may need a moment.

    Raises:
        SlurmError: the queue can't be asked; the next launch of the run asks again before it submits anything.
    """
    comment, answered = render_comment(run_id, token), False
    for _ in range(_FIND_TRIES):
        queue = ask_queue()
        answered = answered or queue is not None
        for entry in queue or []:
            if entry.comment == comment:
                return entry.array_job
        time.sleep(_FIND_WAIT_S)
    if not answered:
        raise SlurmError(
            f"{said}; and squeue does not answer: whether the folds are submitted is not known. The same command with "
            f"--run-id {run_id} finds out, and submits nothing twice"
        )
    return None


def _watch(experiment: Experiment, log: RunLog) -> None:
    """Tell what changes until nothing of the run is in the queue any more."""
    paths = experiment.paths
    told: dict[int, str] = {}
    silent = False
    while True:
        queue = ask_queue()
        if queue is None:
            if not silent:
                log.line("[SLURM] squeue does not answer; the jobs go on")
            silent = True
        else:
            silent = False
            going = list_going(range(experiment.config.data.folds), list_run_jobs(paths), queue)
            for fold, word in _describe(experiment, going).items():
                if told.get(fold) != word:
                    told[fold] = word
                    log.line(f"[SLURM] fold {fold}: {word}")
            if not going:
                return
        for _ in range(round(_WATCH_S / _TICK_S)):
            check_stop()
            time.sleep(_TICK_S)


def _describe(experiment: Experiment, going: dict[int, QueueEntry]) -> dict[int, str]:
    words = {
        fold: f"{'waits' if entry.going is Going.WAITS else 'runs'} as {entry.job} ({entry.state})"
        for fold, entry in going.items()
    }
    return words | {fold: "done" for fold in experiment.find_finished()}
