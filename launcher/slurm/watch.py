"""The watch on submitted runs (`--wait`): it logs changes, and resubmits what a preemption has cancelled."""

import time
from collections.abc import Sequence
from contextlib import suppress

from doccls.reporting.log import RunLog
from doccls.system.lock import LockError
from doccls.system.signals import check_stop
from launcher.slurm.array_jobs import ArrayJob, list_active, list_clusters, list_preempted, read_array_jobs
from launcher.slurm.format import JobPhase, QueueEntry
from launcher.slurm.queue import POLL_S, next_interval, read_queue
from launcher.slurm.submit import Missing, SubmitOptions, SubmittedRun, submit_missing
from launcher.status_files import find_launchers, list_run_jobs

_FILES_POLL_S = 2.0
_TICK_S = 0.2


class Watch:
    """A watch on submitted runs.

    It polls the runs' files every two seconds, and the controller, which all users share, less often.
    """

    def __init__(self, runs: Sequence[SubmittedRun], options: SubmitOptions, log: RunLog) -> None:
        """Prepare to watch; `options` are those of a resubmission."""
        self._runs, self._options, self._log = runs, options, log
        self._reported: dict[str, str] = {}  # the state of each fold, by its name
        self._is_silent = False

    def run(self) -> None:
        """Watch until the wanted folds are finished, or the queue has no job of the runs any more.

        Raises:
            Interrupted: a signal arrived; submitted jobs continue.
        """
        last_files, polled_s, interval_s = None, time.monotonic(), POLL_S
        while True:
            finished = [set(run.experiment.find_finished()) for run in self._runs]
            launchers = [find_launchers(run.paths) for run in self._runs]
            for run, folds in zip(self._runs, finished, strict=True):
                self._report({run.name_fold(fold): "done" for fold in sorted(folds)})
            is_complete = all(
                set(run.experiment.config.data.list_wanted()) <= folds
                for run, folds in zip(self._runs, finished, strict=True)
            )
            if is_complete and not any(launchers):
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

    def _poll_queue(self, finished: Sequence[set[int]]) -> tuple[bool, bool]:
        """Return whether the queue has no job of the runs any more, and whether their jobs have changed."""
        array_jobs = [read_array_jobs(run.paths.array_jobs) for run in self._runs]
        queue = read_queue(list_clusters([job for jobs in array_jobs for job in jobs]))
        if queue is None:
            if not self._is_silent:
                self._log.line("[SLURM] squeue does not answer; the jobs continue")
            self._is_silent = True
            return False, False
        self._is_silent = False
        has_ended, changed = True, False
        for run, jobs, folds in zip(self._runs, array_jobs, finished, strict=True):
            data = run.experiment.config.data
            active = list_active(range(data.folds), list_run_jobs(run.paths), queue)
            states = {
                run.name_fold(fold): f"{_name_phase(entry)} as {entry.job} ({entry.state})"
                for fold, entry in active.items()
                if fold not in folds
            }
            preempted = [
                fold
                for fold in list_preempted(jobs, queue)
                if fold in data.list_wanted() and fold not in active and fold not in folds
            ]
            has_ended &= not active and not preempted
            changed |= self._report(states) or bool(preempted)
            if preempted:
                self._resubmit(run, preempted, jobs, queue)
        return has_ended, changed

    def _resubmit(
        self, run: SubmittedRun, folds: Sequence[int], array_jobs: tuple[ArrayJob, ...], queue: Sequence[QueueEntry]
    ) -> None:
        """Submit preempted folds, unless another process is submitting or has since `array_jobs` were read.

        In that case the next poll reads what the other process has submitted.
        """
        with suppress(LockError), run.hold_lock() as lock:
            if read_array_jobs(run.paths.array_jobs) == array_jobs:
                submit_missing([Missing(run, tuple(folds), lock, array_jobs)], queue, self._options, self._log)

    def _report(self, states: dict[str, str]) -> bool:
        """Log the folds' states that have changed; return whether any has."""
        new = {name: state for name, state in states.items() if self._reported.get(name) != state}
        for name, state in new.items():
            self._log.line(f"[SLURM] {name}: {state}")
        self._reported |= new
        return bool(new)


def _name_phase(entry: QueueEntry) -> str:
    return "waiting" if entry.phase is JobPhase.WAITING else "running"
