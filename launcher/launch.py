"""`doccls-launch run`: train the folds of a run side by side, restart failed ones, and merge the results."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from doccls.config import Config
from doccls.data.sampler import BatchDivision
from doccls.errors import UserError
from doccls.experiment import close_run, log_config
from doccls.oof.predictions import read_predictions
from doccls.reporting.log import RunLog
from doccls.system.lock import LockError
from doccls.system.signals import check_stop, on_immediate_exit, stop_requested, stopping_gracefully
from doccls.system.temporary import temporary_folder
from doccls.system.tensor_file import TensorFileError
from launcher.attempt import Limits, RunningFold
from launcher.forking import RankServer, serve_ranks
from launcher.ledger import Attempt, Ledger, format_duration, format_time
from launcher.live_view import showing_progress
from launcher.local import Backend, LocalBackend, Processes, StartError, kill_folds, kill_folds_and_wait
from launcher.plan import Slot, render_plan
from launcher.queued_run import Job, LaunchOptions, QueuedRun, queue_run
from launcher.supervise import (
    MEMORY_OUTCOMES,
    Action,
    Ending,
    Finish,
    FoldState,
    LaunchState,
    Outcome,
    Start,
    Stop,
    Wait,
    choose_micro_batch_size,
    end_fold,
    next_action,
    start_fold,
    stop_folds,
    stop_launch,
)

_TICK_S = 0.05
_CANCEL_POLL_S = 0.5


def launch(config: Config, run_id: str, now: datetime, options: LaunchOptions, log: RunLog) -> None:
    """Train the requested folds that are not finished, and merge them.

    Raises:
        UserError: config, data or devices can't be used, another launcher has the run, or folds failed.
        Interrupted: a signal came; each fold has stopped at its next safe point.
    """
    log_config(config, log)
    log.line(render_plan(options.plan, commands=False))
    with ExitStack() as held, serve_launch(options, log) as server:
        run = queue_run(config, run_id, now, options, log, held)
        jobs = [Job(run, fold) for fold in run.missing]
        train_queue([run], jobs, options, log, server=server)
        close_run(run.experiment, log)


def train_queue(
    runs: Sequence[QueuedRun],
    jobs: Sequence[Job],
    options: LaunchOptions,
    log: RunLog,
    on_finished: Callable[[QueuedRun], None] = lambda run: None,
    on_tick: Callable[[], None] = lambda: None,
    server: RankServer | None = None,
) -> None:
    """Train folds of the runs on this machine, in this order, in ranks from the server; see `FoldLoop`."""
    shown = showing_progress([run.paths for run in runs], options.study, log)
    with temporary_folder("doccls-launch-") as folder, stopping_gracefully(), shown:
        if server is not None and jobs:
            server.await_ready()
        backend = LocalBackend(folder, min(len(jobs), len(options.slots)) * options.ranks_per_fold, server)
        FoldLoop(runs, jobs, options, backend, log, on_finished, on_tick).run()


def serve_launch(options: LaunchOptions, log: RunLog) -> AbstractContextManager[RankServer | None]:
    """Start the server of the launch's ranks in the background; it ends with the block. None if they start fresh."""
    if options.start == "fresh":
        return nullcontext()
    return serve_ranks(options.workload.assign(0, options.slots[0]), log.line)


class FoldLoop:
    """The loop that executes the actions of `launcher.supervise` and feeds back the endings of folds."""

    def __init__(
        self,
        runs: Sequence[QueuedRun],
        jobs: Sequence[Job],
        options: LaunchOptions,
        backend: Backend,
        log: RunLog,
        on_finished: Callable[[QueuedRun], None] = lambda run: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to train folds of the runs, in the order of `jobs`.

        `on_finished` is called when the last fold of a run is done, and `on_tick` many times a second; both must return
        at once.
        """
        self._runs, self._jobs, self._options, self._backend, self._log = runs, jobs, options, backend, log
        self._on_finished, self._on_tick = on_finished, on_tick
        self._running: dict[int, RunningFold] = {}
        self._advanced = False
        self._begun: set[str] = set()  # runs of which a fold was seen to train
        self._dropped: dict[str, str] = {}  # by run id, why the folds of this run alone have been stopped
        self._cancel_polled_s = time.monotonic()
        self._reasons: dict[int, str] = {}
        self._started_s: dict[int, float] = {}
        self._state = LaunchState(tuple(map(self._make_fold_state, range(len(jobs)))), options.slots)

    def run(self) -> None:
        """Train until no fold runs and none may start.

        Raises:
            UserError: folds failed.
            Interrupted: a signal came.
        """
        try:
            with on_immediate_exit(lambda reason, code: kill_folds(self._list_processes())):
                while not isinstance(action := self._decide(), Finish):
                    self._act(action)
                    self._settle_ended()
                    self._stop_cancelled()
                    self._on_tick()
        finally:
            kill_folds_and_wait(self._list_processes())
            for run in self._runs:
                with suppress(LockError):  # the reason for the end matters more
                    run.ledger.retry_write(0.0)
        check_stop()
        failed = [fold_state.job for fold_state in self._state.list_by_status("failed")]
        unfinished = [fold_state.job for fold_state in self._state.folds if fold_state.status != "done"]
        missing = [job for job in unfinished if _read_score(self._jobs[job]) is None]
        if (failed or self._dropped) and missing:  # another owner of a failed fold may have finished it since
            raise UserError(self._format_failure([job for job in failed if job in missing], missing))

    @property
    def has_advanced(self) -> bool:
        """Whether this launch finished a fold or saved a resume checkpoint."""
        return self._advanced

    def _decide(self) -> Action:
        if stop_requested() and not self._state.stopping:
            return Stop()
        return next_action(self._state, self._options.policy, time.monotonic())

    def _act(self, action: Action) -> None:
        match action:
            case Start(job, slot):
                self._start(job, slot)
            case Stop():
                self._stop()
            case Wait(until_s):
                time.sleep(_TICK_S if until_s is None else min(_TICK_S, max(0.0, until_s - time.monotonic())))

    def _settle_ended(self) -> None:
        """Settle the folds that have ended, and retry failed writes of ledgers."""
        for run in self._runs:
            self._guard(run, run.ledger.retry_write)
        for job, running in list(self._running.items()):
            run_id = self._jobs[job].run.paths.run_id
            if running.has_begun:
                self._begun.add(run_id)
            if running.has_ended(run_id in self._begun):
                self._settle(job, running)

    def _stop_cancelled(self) -> None:
        """Stop the folds of runs that `doccls-launch cancel RUN` asks for."""
        now_s = time.monotonic()
        if now_s - self._cancel_polled_s < _CANCEL_POLL_S:
            return
        self._cancel_polled_s = now_s
        for run in self._runs:
            if run.paths.run_id not in self._dropped and run.is_cancelled():
                self._drop(run, "was cancelled (doccls-launch cancel)")
                self._write(run, replace(run.ledger.content, cancelled=True))

    def _drop(self, run: QueuedRun, reason: str) -> None:
        """Stop the folds of this run alone."""
        self._dropped[run.paths.run_id] = reason
        self._log.line(f"[LAUNCH] run {run.paths.run_id} {reason}: only its folds stop")
        jobs = [job for job, queued in enumerate(self._jobs) if queued.run is run]
        self._state = stop_folds(self._state, jobs)
        for job in jobs:
            if job in self._running:
                self._running[job].request_stop()

    def _write(self, run: QueuedRun, ledger: Ledger) -> None:
        """Write the ledger of the run."""
        self._guard(run, lambda: run.ledger.write(ledger))

    def _guard(self, run: QueuedRun, write: Callable[[], None]) -> None:
        """Write to the ledger of the run; if another process has taken a run of a study, only its folds stop.

        Raises:
            LockError: that happened to a run that is no part of a study.
        """
        try:
            write()
        except LockError as error:
            if run.study is None:
                raise
            if run.paths.run_id not in self._dropped:
                self._drop(run, f"is lost ({error})")

    def _start(self, job: int, slot: Slot) -> None:
        run, fold = self._jobs[job].run, self._jobs[job].fold
        ledger, micro_batch_size = run.ledger, self._state.find(job).micro_batch_size
        number = len(ledger.content.list_attempts(fold)) + 1
        devices = tuple(device.uuid or device.name for device in slot.devices)
        attempt = Attempt(fold, number, slot.name, devices, micro_batch_size, format_time(datetime.now()))
        self._write(run, ledger.content.add(attempt))
        if self._state.find(job).status != "waiting":
            return
        smaller = micro_batch_size if micro_batch_size < self._find_max_micro_batch_size(run) else None
        assignment = run.workload.assign(fold, slot, smaller)
        self._state = start_fold(self._state, job, slot)
        self._started_s[job] = time.monotonic()
        try:
            limits = Limits(self._options.hang_timeout_s, run.experiment.config.train.stop_timeout_s)
            running = RunningFold(assignment, run.paths, self._backend, limits)
        except StartError as error:
            self._end(job, Ending(Outcome.CRASHED, str(error)), str(error), ())
            return
        self._running[job] = running
        self._write(run, ledger.content.amend(fold, pids=running.processes.pids))
        self._log.line(f"[LAUNCH] {self._jobs[job].name} on {slot.name}: started")

    def _stop(self) -> None:
        self._state = stop_launch(self._state)
        if self._running:
            self._log.line(f"[LAUNCH] stopping {', '.join(self._jobs[job].name for job in self._running)}")
        for running in self._running.values():
            running.request_stop()

    def _settle(self, job: int, running: RunningFold) -> None:
        """Settle a fold: done if its predictions are valid, else by the reports and exit codes of its processes."""
        score = _read_score(self._jobs[job])
        is_stopping = self._state.stopping or self._state.find(job).stopping or stop_requested() is not None
        ending, reason = running.conclude(score is not None, is_stopping)
        self._advanced |= score is not None or running.has_advanced
        del self._running[job]
        message = reason if score is None else f"done macro_f1={score:.5f}"
        self._end(job, ending, message, running.processes.poll(), running.find_log())

    def _end(
        self, job: int, ending: Ending, message: str, codes: tuple[int | None, ...], log: Path | None = None
    ) -> None:
        ledger, fold, name = self._jobs[job].run.ledger, self._jobs[job].fold, self._jobs[job].name
        slot = self._state.find(job).slot
        assert slot is not None
        now_s = time.monotonic()
        self._state = end_fold(self._state, job, ending, self._options.policy, now_s)
        after = self._state.find(job)
        done = ending.outcome is Outcome.DONE
        self._write(
            self._jobs[job].run,
            ledger.content.amend(
                fold,
                ended=format_time(datetime.now()),
                outcome=str(ending.outcome),
                then=after.status,
                exit_codes=codes,
                message=None if done else message,
                log=None if log is None else str(log),
            ),
        )
        if ending.is_stuck:
            self._log.line(f"[WARNING] {slot.name} is not used again: a process of {name} could not be killed")
        label, duration = f"[LAUNCH] {name} on {slot.name}", format_duration(now_s - self._started_s[job])
        if done:
            self._log.line(f"{label}: {message} in {duration}")
            run = self._jobs[job].run
            if all(state.status == "done" for state in self._state.folds if self._jobs[state.job].run is run):
                self._on_finished(run)
        elif ending.outcome is Outcome.STOPPED:
            self._log.line(f"{label}: stopped after {duration}")
        elif ending.outcome is Outcome.PREEMPTED:
            self._log.line(f"{label}: preempted after {duration}; will resume: {message}")
        else:
            separator = "\n  " if "\n" in message else ", "
            self._reasons[job] = message if log is None else f"{message}{separator}log: {log}"
            self._log.line(f"{label}: failed: {self._reasons[job]}")
            if after.status == "waiting":
                self._log.line(f"[LAUNCH] {name}: {self._format_next_step(after, ending, now_s)}")

    def _format_next_step(self, after: FoldState, ending: Ending, now_s: float) -> str:
        if ending.outcome in MEMORY_OUTCOMES:
            return (
                f"restarts with train.micro_batch_size={after.micro_batch_size}, the same batch in smaller pieces: "
                "BatchNorm sees fewer images at a time, and dropout, stochastic depth and Mixup draw other numbers"
            )
        wait_s = max(0.0, after.ready_s - now_s)
        if ending.outcome is Outcome.PORT_TAKEN:
            return f"restarts in {wait_s:.0f} s on another port"
        return f"restarts in {wait_s:.0f} s, restart {after.restarts} of {self._options.policy.max_restarts}"

    # --- state of the folds ------------------------------------------------------------------------------------------

    def _find_max_micro_batch_size(self, run: QueuedRun) -> int:
        return BatchDivision.derive(run.experiment.config.train, self._options.ranks_per_fold).images_at_a_time

    def _make_fold_state(self, job: int) -> FoldState:
        """Return the initial state; skip micro-batch sizes that ran out of memory, unless others held that memory."""
        run, fold = self._jobs[job].run, self._jobs[job].fold
        ranks, largest, too_large = self._options.ranks_per_fold, self._find_max_micro_batch_size(run), list[int]()
        if self._options.policy.shrink:
            too_large = run.ledger.content.list_sizes(fold, Outcome.OUT_OF_MEMORY, ranks)
        smallest = 2 if run.experiment.config.train.has_mixing else 1
        micro_batch_size = max(min(largest, smallest), choose_micro_batch_size(largest, too_large))
        if micro_batch_size < largest:
            self._log.line(
                f"[LAUNCH] {self._jobs[job].name}: train.micro_batch_size={micro_batch_size}, since an earlier launch "
                f"ran out of memory with more ({run.ledger.path})"
            )
        return FoldState(job, micro_batch_size=micro_batch_size, min_micro_batch_size=smallest)

    def _format_failure(self, failed: list[int], missing: list[int]) -> str:
        heading = f"{len(failed)} fold{'s' if len(failed) > 1 else ''} failed" if failed else "folds are missing"
        lines = [heading, *(f"- {self._jobs[job].name}: {self._reasons[job]}" for job in failed)]
        lines += [f"- run {run_id} {reason}" for run_id, reason in self._dropped.items()]
        command = f"to train just them: {self._runs[0].resume_command}"  # the same for all runs of a study
        for run in self._runs:
            folds = ", ".join(str(self._jobs[job].fold) for job in missing if self._jobs[job].run is run)
            if folds and run.study is None:
                lines.append(f"missing: folds {folds}; {command}")
            elif folds:
                lines.append(f"missing: folds {folds} of run {run.paths.run_id}")
        return "\n".join(lines if self._runs[0].study is None else [*lines, command])

    def _list_processes(self) -> list[Processes]:
        return [running.processes for running in self._running.values()]


def _read_score(job: Job) -> float | None:
    """Return the macro F1 of the fold's predictions, or None unless they are valid and belong to its run."""
    with suppress(TensorFileError):
        info = read_predictions(job.run.paths.predictions(job.fold)).info
        if (info.fingerprint, info.fold) == (job.run.experiment.fingerprint, job.fold):
            return info.macro_f1
    return None
