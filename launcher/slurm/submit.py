"""`doccls-launch run --backend slurm`: the missing folds of a run as one array, submitted exactly once."""

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
    list_clusters,
    list_going,
    list_preempted,
    read_array_jobs,
    settle,
    write_array_jobs,
)
from launcher.slurm.format import Going, LostAnswerError, QueueEntry, SlurmError, Submitted, render_comment
from launcher.slurm.queue import ASK_S, ask_queue, find_clusters, next_interval, submit_script
from launcher.slurm.script import JobRequest, render_output, render_sbatch
from launcher.status import find_launchers, list_run_jobs, list_unfinished, read_status
from launcher.task import close_share

_FIND_TRIES = 2
_LOOK_S = 2.0
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
    resume_command: str
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
        take_lock = partial(held.enter_context, _hold_submit_lock(paths))
        run = open_run(config, paths, now, {"world_size": options.world_size}, log, take_lock)
        assert run.lock is not None
        log.line(f"[ARTIFACTS] {paths.root}")
        array_jobs = read_array_jobs(paths.array_jobs)
        queue = ask_queue(list_clusters(array_jobs))
        if queue is None:
            raise SlurmError("squeue does not answer: nothing was submitted. Try again when Slurm is there")
        if run.list_missing(config.data.list_wanted()):
            _fetch_weights(config, log)
        submitter = _Submitter(run.experiment, options, log)
        submitter.submit_missing(run.lock, config.data.list_wanted(), array_jobs, queue)
    log.line(f"[SLURM] where it stands: doccls-launch status {paths.root}")
    log.line(f"[SLURM] to end it:       doccls-launch cancel {paths.root}")
    if not options.wait and run.list_missing(config.data.list_wanted()):
        log.end_as("SUBMITTED", "submitted")
    if options.wait:
        with stopping_gracefully():
            _Watch(submitter).run()
        if close_share(run.experiment, log):
            unfinished = "\n".join(list_unfinished(read_status(paths)))
            raise UserError(
                f"the run has ended, and folds are missing\n{unfinished}\nto train them: {options.resume_command}"
            )


def _fetch_weights(config: Config, log: RunLog) -> None:
    """Download the weights of the hub here: nodes that compute often reach no network, and the jobs are offline."""
    if config.model.pretrained or ":" in config.model.name:
        from doccls.model.build import fetch_pretrained  # imports torch

        if (cache := fetch_pretrained(config.model, config.train.img_size)) is not None:
            log.line(f"[MODEL] weights of {config.model.name} are in {cache}, which the nodes must see (HF_HOME)")


def _hold_submit_lock(paths: RunPaths) -> AbstractContextManager[Lock]:
    return hold_lock(paths.submit_lock, f"run {paths.run_id} is being submitted")


class _Submitter:
    """Submits folds of one run."""

    def __init__(self, experiment: Experiment, options: SubmitOptions, log: RunLog) -> None:
        self.experiment, self.paths = experiment, experiment.paths
        self._options, self.log = options, log

    def submit_missing(
        self, lock: Lock, folds: Iterable[int], array_jobs: Sequence[ArrayJob], queue: Sequence[QueueEntry]
    ) -> None:
        """Submit those of the folds that are neither finished nor on their way.

        `lock` is held since before `submissions` were read, and `queue` was asked after that.
        """
        paths, log = self.paths, self.log
        lock.check()
        settled = settle(array_jobs, paths.run_id, queue)
        if settled != array_jobs:
            write_array_jobs(paths.array_jobs, settled)
        finished = self.experiment.find_finished()
        wanted = [fold for fold in folds if fold not in finished]
        going = list_going(wanted, list_run_jobs(paths), queue)
        for fold, entry in going.items():
            log.line(f"[SLURM] fold {fold}: on its way as job {entry.job} ({entry.state})")
        missing = tuple(fold for fold in wanted if fold not in going)
        if not missing:
            log.line("[SLURM] nothing to submit")
            return
        preempted = {fold: entry for fold, entry in list_preempted(settled, queue).items() if fold in missing}
        array_jobs = self._submit(settled, missing, tuple(preempted))
        job = array_jobs[-1].job
        if others := [fold for fold in missing if fold not in preempted]:
            log.line(f"[SLURM] job {job}: folds {', '.join(map(str, others))} submitted, a task a fold")
        for fold, entry in preempted.items():
            count = sum(fold in one.preempted for one in array_jobs if one.refused is None)
            told = f"submitted again as job {job} (preemption {count})"
            log.line(f"[SLURM] fold {fold}: job {entry.job} was preempted; {told}")

    def _submit(
        self, array_jobs: Sequence[ArrayJob], folds: tuple[int, ...], preempted: tuple[int, ...]
    ) -> tuple[ArrayJob, ...]:
        """All submissions with the new one, which is written down before Slurm is asked."""
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
            self.log.line(f"[SLURM] {error}; the queue will show in {ASK_S:g} s whether the job arrived")
            found = _find(paths.run_id, new, str(error))
            new = replace(new, job=found.job, cluster=found.cluster) if found else replace(new, refused=str(error))
        except SlurmError as error:
            new = replace(new, refused=str(error))
        write_array_jobs(paths.array_jobs, (*array_jobs, new))
        if new.refused is not None:
            raise SlurmError(f"the folds are not submitted: {new.refused}")
        return (*array_jobs, new)


def _find(run_id: str, submission: ArrayJob, said: str) -> Submitted | None:
    """The job whose answer was lost; None if it is not in the queue. The controller may need a moment.

    Raises:
        SlurmError: the queue can't be asked; the next launch of the run asks again before it submits anything.
    """
    answered = False
    for _ in range(_FIND_TRIES):
        time.sleep(ASK_S)
        queue = ask_queue(list_clusters([submission]))
        answered = answered or queue is not None
        if found := find_array_job(run_id, submission.token, queue or []):
            return found
    if not answered:
        raise SlurmError(
            f"{said}; and squeue does not answer: whether the folds are submitted is not known. The same command with "
            f"--run-id {run_id} finds out, and submits nothing twice"
        )
    return None


class _Watch:
    """Reports what changes in a run that was just submitted, and submits again what Slurm has preempted for good.

    The run's own files may be looked at every other second; the controller, which all users share, may not.
    """

    def __init__(self, submitter: _Submitter) -> None:
        self._submitter, self._log = submitter, submitter.log
        self._experiment, self._paths = submitter.experiment, submitter.paths
        self._reported: dict[int, str] = {}
        self._silent = False

    def run(self) -> None:
        """Return once the wanted folds are finished, or nothing of the run is in the queue any more."""
        wanted = set(self._experiment.config.data.list_wanted())
        seen, asked_s, interval_s = None, time.monotonic(), ASK_S
        while True:
            finished, launchers = self._experiment.find_finished(), find_launchers(self._paths)
            self._report(dict.fromkeys(finished, "done"))
            if wanted <= set(finished) and not launchers:
                return
            if seen != (finished, launchers):
                seen, interval_s = (finished, launchers), ASK_S
            if time.monotonic() - asked_s >= interval_s:
                over, changed = self._ask(finished)
                if over:
                    return
                asked_s, interval_s = time.monotonic(), next_interval(interval_s, changed)
            for _ in range(round(_LOOK_S / _TICK_S)):
                check_stop()
                time.sleep(_TICK_S)

    def _ask(self, finished: Sequence[int]) -> tuple[bool, bool]:
        """Whether nothing of the run is in the queue any more, and whether anything has changed there."""
        array_jobs = read_array_jobs(self._paths.array_jobs)
        queue = ask_queue(list_clusters(array_jobs))
        if queue is None:
            if not self._silent:
                self._log.line("[SLURM] squeue does not answer; the jobs go on")
            self._silent = True
            return False, False
        self._silent = False
        going = list_going(range(self._experiment.config.data.folds), list_run_jobs(self._paths), queue)
        words = {
            fold: f"{'waits' if entry.going is Going.WAITS else 'runs'} as {entry.job} ({entry.state})"
            for fold, entry in going.items()
            if fold not in finished
        }
        changed = self._report(words)
        wanted = self._experiment.config.data.list_wanted()
        preempted = [
            fold
            for fold in list_preempted(array_jobs, queue)
            if fold in wanted and fold not in going and fold not in finished
        ]
        if preempted:
            self._submit_again(preempted, array_jobs, queue)
        return not going and not preempted, changed or bool(preempted)

    def _submit_again(self, folds: Sequence[int], array_jobs: Sequence[ArrayJob], queue: Sequence[QueueEntry]) -> None:
        """Unless another process submits, or has since `submissions` were read; the next look finds what came of it."""
        with suppress(LockError), _hold_submit_lock(self._paths) as lock:
            if read_array_jobs(self._paths.array_jobs) == array_jobs:
                self._submitter.submit_missing(lock, folds, array_jobs, queue)

    def _report(self, words: dict[int, str]) -> bool:
        """Log what is new of each fold; whether there was any."""
        new = {fold: word for fold, word in words.items() if self._reported.get(fold) != word}
        for fold, word in new.items():
            self._log.line(f"[SLURM] fold {fold}: {word}")
        self._reported |= new
        return bool(new)
