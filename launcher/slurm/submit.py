"""`doccls-launch run --backend slurm`: submits the missing folds of a run as one array, exactly once."""

import os
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from doccls.config import Config
from doccls.errors import UserError
from doccls.experiment import Experiment, log_config, open_run
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths, locate_run
from doccls.system.lock import Lock, LockError, find_holder, hold_lock
from doccls.system.signals import check_stop, stopping_gracefully
from launcher.ledger import format_time
from launcher.slurm.array_jobs import (
    ArrayJob,
    find_array_job,
    list_active,
    list_clusters,
    list_preempted,
    read_array_jobs,
    resolve_lost_answers,
    write_array_jobs,
)
from launcher.slurm.format import JobPhase, LostAnswerError, QueueEntry, SlurmError, Submitted, render_comment
from launcher.slurm.queue import POLL_S, find_clusters, next_interval, read_queue, submit_script
from launcher.slurm.script import JobRequest, render_output, render_sbatch
from launcher.status import find_launchers, list_run_jobs, list_unfinished, read_status
from launcher.task import close_share

_FIND_TRIES = 2
_FILES_POLL_S = 2.0
_TICK_S = 0.2


@dataclass(frozen=True)
class SubmitOptions:
    """Options of a submission, besides the config."""

    request: JobRequest
    script: str  # of each task
    world_size: int  # processes per fold
    wait: bool  # return when the run has ended, not when it is submitted
    resume_command: str  # trains the missing folds


def submit(config: Config, run_id: str, now: datetime, options: SubmitOptions, log: RunLog) -> None:
    """Check config and data, open the run, and submit its folds that are neither finished nor pending or running.

    Raises:
        UserError: config, data, Slurm or a launcher of the run prevent it; with `wait` also if folds failed.
        Interrupted: a signal arrived; submitted jobs continue.
    """
    log_config(config, log)
    paths = locate_run(config.output.exp_dir, run_id, now)
    if (launcher := find_holder(paths.launch_lock())) is not None:
        raise LockError(f"{launcher} ({paths.launch_lock()}): stop it first, or wait for it")
    with ExitStack() as held:
        take_lock = partial(held.enter_context, _hold_submit_lock(paths))
        run = open_run(config, paths, now, {"world_size": options.world_size}, log, take_lock)
        assert run.lock is not None
        log.line(f"[ARTIFACTS] {paths.root}")
        array_jobs = read_array_jobs(paths.array_jobs)
        queue = read_queue(list_clusters(array_jobs))
        if queue is None:
            raise SlurmError("squeue does not answer: nothing was submitted. Try again when Slurm is available")
        if run.list_missing(config.data.list_wanted()):
            _fetch_weights(config, log)
        submitter = _Submitter(run.experiment, options, log)
        submitter.submit_missing(run.lock, config.data.list_wanted(), array_jobs, queue)
    log.line(f"[SLURM] show status: doccls-launch status {paths.root}")
    log.line(f"[SLURM] cancel:      doccls-launch cancel {paths.root}")
    if not options.wait and run.list_missing(config.data.list_wanted()):
        log.end_as("SUBMITTED", "submitted")
    if options.wait:
        with stopping_gracefully():
            _Watch(submitter).run()
        if close_share(run.experiment, log):
            unfinished = "\n".join(list_unfinished(read_status(paths)))
            raise UserError(
                f"the run has ended, but folds are missing\n{unfinished}\nto train them: {options.resume_command}"
            )


def _fetch_weights(config: Config, log: RunLog) -> None:
    """Download the hub's weights on this machine: compute nodes often lack a network, and the jobs run offline."""
    if config.model.pretrained or ":" in config.model.name:
        from doccls.model.build import fetch_pretrained  # imports torch

        if (cache := fetch_pretrained(config.model, config.train.img_size)) is not None:
            log.line(f"[MODEL] weights of {config.model.name} are in {cache} (HF_HOME); the nodes must have access")


def _hold_submit_lock(paths: RunPaths) -> AbstractContextManager[Lock]:
    return hold_lock(paths.submit_lock, f"run {paths.run_id} is being submitted")


class _Submitter:
    """Submitter of the folds of one run."""

    def __init__(self, experiment: Experiment, options: SubmitOptions, log: RunLog) -> None:
        self.experiment, self.paths = experiment, experiment.paths
        self._options, self.log = options, log

    def submit_missing(
        self, lock: Lock, folds: Iterable[int], array_jobs: Sequence[ArrayJob], queue: Sequence[QueueEntry]
    ) -> None:
        """Submit those of the folds that are neither finished nor pending or running.

        The caller must take `lock` before it reads `array_jobs`, and read `queue` after that.
        """
        paths, log = self.paths, self.log
        lock.check()
        resolved = resolve_lost_answers(array_jobs, paths.run_id, queue)
        if resolved != array_jobs:
            write_array_jobs(paths.array_jobs, resolved)
        finished = self.experiment.find_finished()
        unfinished = [fold for fold in folds if fold not in finished]
        active = list_active(unfinished, list_run_jobs(paths), queue)
        for fold, entry in active.items():
            log.line(f"[SLURM] fold {fold}: already submitted as job {entry.job} ({entry.state})")
        missing = tuple(fold for fold in unfinished if fold not in active)
        if not missing:
            log.line("[SLURM] nothing to submit")
            return
        preempted = {fold: entry for fold, entry in list_preempted(resolved, queue).items() if fold in missing}
        array_jobs = self._submit(resolved, missing, tuple(preempted))
        number = array_jobs[-1].job
        if new := [fold for fold in missing if fold not in preempted]:
            log.line(f"[SLURM] job {number}: folds {', '.join(map(str, new))} submitted, one task per fold")
        for fold, entry in preempted.items():
            count = sum(fold in array_job.preempted for array_job in array_jobs if array_job.refused is None)
            resubmission = f"resubmitted as job {number} (preemption {count})"
            log.line(f"[SLURM] fold {fold}: job {entry.job} was preempted; {resubmission}")

    def _submit(
        self, array_jobs: Sequence[ArrayJob], folds: tuple[int, ...], preempted: tuple[int, ...]
    ) -> tuple[ArrayJob, ...]:
        """Submit the folds, recorded before sbatch is called, and return all array jobs with the new one."""
        paths, options, token = self.paths, self._options, secrets.token_hex(8)
        paths.consoles.mkdir(parents=True, exist_ok=True)
        comment, output = render_comment(paths.run_id, token), render_output(str(paths.consoles))
        command = render_sbatch(options.request, folds, comment, output)
        new = ArrayJob(
            token,
            folds,
            format_time(datetime.now()),
            options.resume_command,
            cluster=find_clusters(command, os.environ),
            preempted=preempted,
        )
        write_array_jobs(paths.array_jobs, (*array_jobs, new))
        try:
            submitted = submit_script(command, options.script)
            new = replace(new, job=submitted.job, cluster=submitted.cluster or new.cluster)
        except LostAnswerError as error:
            self.log.line(f"[SLURM] {error}; checking the queue in {POLL_S:g} s whether the job arrived")
            found = _find_lost_job(paths.run_id, new, str(error))
            new = replace(new, job=found.job, cluster=found.cluster) if found else replace(new, refused=str(error))
        except SlurmError as error:
            new = replace(new, refused=str(error))
        write_array_jobs(paths.array_jobs, (*array_jobs, new))
        if new.refused is not None:
            raise SlurmError(f"the folds were not submitted: {new.refused}")
        return (*array_jobs, new)


def _find_lost_job(run_id: str, array_job: ArrayJob, message: str) -> Submitted | None:
    """Find the job whose answer was lost, which may take a moment to appear; None if it is not in the queue.

    Raises:
        SlurmError: squeue does not answer; the next launch of the run checks the queue before it submits anything.
    """
    has_answered = False
    for _ in range(_FIND_TRIES):
        time.sleep(POLL_S)
        queue = read_queue(list_clusters([array_job]))
        has_answered = has_answered or queue is not None
        if found := find_array_job(run_id, array_job.token, queue or []):
            return found
    if not has_answered:
        raise SlurmError(
            f"{message}; squeue does not answer either: it is not known whether the folds are submitted. Run the same "
            f"command with --run-id {run_id} to find out; it submits nothing twice"
        )
    return None


class _Watch:
    """Watch on a submitted run: logs the changes, and resubmits folds whose job was cancelled by a preemption.

    It polls the run's files every two seconds, and the controller, which all users share, less often.
    """

    def __init__(self, submitter: _Submitter) -> None:
        self._submitter, self._log = submitter, submitter.log
        self._experiment, self._paths = submitter.experiment, submitter.paths
        self._reported: dict[int, str] = {}
        self._is_silent = False

    def run(self) -> None:
        """Watch until the wanted folds are finished, or the queue has no job of the run any more."""
        wanted = set(self._experiment.config.data.list_wanted())
        last_files, polled_s, interval_s = None, time.monotonic(), POLL_S
        while True:
            finished, launchers = self._experiment.find_finished(), find_launchers(self._paths)
            self._report(dict.fromkeys(finished, "done"))
            if wanted <= set(finished) and not launchers:
                return
            if last_files != (finished, launchers):
                last_files, interval_s = (finished, launchers), POLL_S
            if time.monotonic() - polled_s >= interval_s:
                has_ended, changed = self._poll_queue(finished)
                if has_ended:
                    return
                polled_s, interval_s = time.monotonic(), next_interval(interval_s, changed)
            for _ in range(round(_FILES_POLL_S / _TICK_S)):
                check_stop()
                time.sleep(_TICK_S)

    def _poll_queue(self, finished: Sequence[int]) -> tuple[bool, bool]:
        """Return whether the queue has no job of the run any more, and whether the run's jobs have changed."""
        array_jobs = read_array_jobs(self._paths.array_jobs)
        queue = read_queue(list_clusters(array_jobs))
        if queue is None:
            if not self._is_silent:
                self._log.line("[SLURM] squeue does not answer; the jobs continue")
            self._is_silent = True
            return False, False
        self._is_silent = False
        active = list_active(range(self._experiment.config.data.folds), list_run_jobs(self._paths), queue)
        states = {
            fold: f"{'waiting' if entry.phase is JobPhase.WAITING else 'running'} as {entry.job} ({entry.state})"
            for fold, entry in active.items()
            if fold not in finished
        }
        changed = self._report(states)
        wanted = self._experiment.config.data.list_wanted()
        preempted = [
            fold
            for fold in list_preempted(array_jobs, queue)
            if fold in wanted and fold not in active and fold not in finished
        ]
        if preempted:
            self._resubmit(preempted, array_jobs, queue)
        return not active and not preempted, changed or bool(preempted)

    def _resubmit(self, folds: Sequence[int], array_jobs: Sequence[ArrayJob], queue: Sequence[QueueEntry]) -> None:
        """Submit preempted folds, unless another process is submitting or has since `array_jobs` were read.

        In that case the next poll reads what the other process has submitted.
        """
        with suppress(LockError), _hold_submit_lock(self._paths) as lock:
            if read_array_jobs(self._paths.array_jobs) == array_jobs:
                self._submitter.submit_missing(lock, folds, array_jobs, queue)

    def _report(self, states: dict[int, str]) -> bool:
        """Log the folds' states that have changed; return whether any has."""
        new = {fold: state for fold, state in states.items() if self._reported.get(fold) != state}
        for fold, state in new.items():
            self._log.line(f"[SLURM] fold {fold}: {state}")
        self._reported |= new
        return bool(new)
