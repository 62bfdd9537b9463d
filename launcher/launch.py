"""`doccls-launch run`: train the folds of a run side by side, restart failed ones, and merge the results."""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from doccls.config import Config
from doccls.config.paths import is_file
from doccls.data.sampler import BatchDivision
from doccls.errors import UserError
from doccls.experiment import Experiment, close_run, log_config, open_run
from doccls.oof.predictions import read_predictions
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths, locate_run
from doccls.system.lock import LockError, hold_lock
from doccls.system.signals import check_stop, on_immediate_exit, stop_requested, stopping_gracefully
from doccls.system.temporary import temporary_folder
from doccls.system.tensor_file import TensorFileError
from launcher.attempt import Limits, RunningFold
from launcher.ledger import Attempt, Ledger, LedgerFile, begin_launch, format_duration, format_time
from launcher.local import Backend, LocalBackend, Processes, StartError, kill_folds, kill_folds_and_wait
from launcher.plan import LaunchPlan, Slot, Workload, render_plan
from launcher.supervise import (
    MEMORY_OUTCOMES,
    Action,
    Ending,
    Finish,
    FoldState,
    LaunchState,
    Outcome,
    Policy,
    Start,
    Stop,
    Wait,
    choose_micro_batch_size,
    end_fold,
    next_action,
    start_fold,
    stop_launch,
)

_TICK_S = 0.05


@dataclass(frozen=True)
class LaunchOptions:
    """The options of a launch beside the config."""

    plan: LaunchPlan  # only logged
    slots: tuple[Slot, ...]
    workload: Workload
    policy: Policy
    hang_timeout_s: float  # a process without progress for this long is killed; 0 is no limit
    resume_command: str  # trains the missing folds

    @property
    def ranks_per_fold(self) -> int:
        """The number of processes of each fold."""
        return len(self.slots[0].devices)


def launch(config: Config, run_id: str, now: datetime, options: LaunchOptions, log: RunLog) -> None:
    """Train the requested folds that are not finished, and merge them.

    Raises:
        UserError: config, data or devices can't be used, another launcher has the run, or folds failed.
        Interrupted: a signal came; each fold has stopped at its next safe point.
    """
    log_config(config, log)
    log.line(render_plan(options.plan, commands=False))
    paths = locate_run(config.output.exp_dir, run_id, now)
    what = f"run {run_id} is being launched"
    if is_file(paths.launch_lock()):
        with hold_lock(paths.launch_lock(), what):
            pass  # report another launcher before the data is scanned
    with ExitStack() as held:
        take_lock = partial(held.enter_context, hold_lock(paths.launch_lock(), what))
        run = open_run(config, paths, now, describe_processes(options), log, take_lock)
        assert run.lock is not None
        log.line(f"[ARTIFACTS] {paths.root}")
        wanted = config.data.list_wanted()
        ledger = begin_launch(paths.ledger(), describe_launch(run.experiment, wanted, options, log, now))
        ledger_file, missing = LedgerFile(paths.ledger(), ledger, run.lock, log), run.list_missing(wanted)
        with temporary_folder("doccls-launch-") as folder, stopping_gracefully():
            backend = LocalBackend(folder, min(len(missing), len(options.slots)) * options.ranks_per_fold)
            FoldLoop(run.experiment, options, backend, log, ledger_file, missing).run()
        close_run(run.experiment, log)


def describe_processes(options: LaunchOptions) -> dict[str, Any]:
    """Return the provenance of the run's processes, which add their devices themselves."""
    return {"world_size": options.ranks_per_fold}


def describe_launch(
    experiment: Experiment, folds: Sequence[int], options: LaunchOptions, log: RunLog, now: datetime
) -> Ledger:
    """Return the ledger of a launch that has started no fold yet."""
    return Ledger(
        run_id=experiment.paths.run_id,
        fingerprint=experiment.fingerprint,
        num_folds=experiment.config.data.folds,
        folds=tuple(folds),
        ranks_per_fold=options.ranks_per_fold,
        host=socket.gethostname(),
        pid=os.getpid(),
        resume_command=options.resume_command,
        started=format_time(now),
        log=str(log.path),
    )


class FoldLoop:
    """The loop that executes the actions of `launcher.supervise` and feeds back the endings of folds."""

    def __init__(
        self,
        experiment: Experiment,
        options: LaunchOptions,
        backend: Backend,
        log: RunLog,
        ledger: LedgerFile,
        missing: list[int],
    ) -> None:
        """Prepare to train the `missing` folds."""
        self._experiment, self._options, self._backend, self._log = experiment, options, backend, log
        self._ledger = ledger
        self._running: dict[int, RunningFold] = {}
        self._advanced = self._any_has_begun = False
        self._reasons: dict[int, str] = {}
        self._started_s: dict[int, float] = {}
        self._max_micro_batch_size = BatchDivision.derive(
            experiment.config.train, options.ranks_per_fold
        ).images_at_a_time
        self._state = LaunchState(tuple(self._make_fold_state(fold) for fold in missing), options.slots)

    @property
    def _paths(self) -> RunPaths:
        return self._experiment.paths

    def run(self) -> None:
        """Train until no fold runs and none may start.

        Raises:
            UserError: folds failed.
            Interrupted: a signal came.
        """
        self._close_lost_attempts()
        try:
            with on_immediate_exit(lambda reason, code: kill_folds(self._list_processes())):
                while not isinstance(action := self._decide(), Finish):
                    self._act(action)
                    self._settle_ended()
        finally:
            kill_folds_and_wait(self._list_processes())
            with suppress(LockError):  # the reason for the end matters more
                self._ledger.retry_write(0.0)
        check_stop()
        failed = [fold_state.fold for fold_state in self._state.list_by_status("failed")]
        unfinished = [fold_state.fold for fold_state in self._state.folds if fold_state.status != "done"]
        missing = [fold for fold in unfinished if self._read_score(fold) is None]
        if failed and missing:  # another owner of a failed fold may have finished it since
            raise UserError(self._format_failure([fold for fold in failed if fold in missing], missing))

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
            case Start(fold, slot):
                self._start(fold, slot)
            case Stop():
                self._stop()
            case Wait(until_s):
                time.sleep(_TICK_S if until_s is None else min(_TICK_S, max(0.0, until_s - time.monotonic())))

    def _settle_ended(self) -> None:
        """Settle the folds that have ended, and retry a failed write of the ledger."""
        self._ledger.retry_write()
        for fold, running in list(self._running.items()):
            self._any_has_begun |= running.has_begun
            if running.has_ended(self._any_has_begun):
                self._settle(fold, running)

    def _start(self, fold: int, slot: Slot) -> None:
        micro_batch_size = self._state.find(fold).micro_batch_size
        number = len(self._ledger.content.list_attempts(fold)) + 1
        devices = tuple(device.uuid or device.name for device in slot.devices)
        attempt = Attempt(fold, number, slot.name, devices, micro_batch_size, format_time(datetime.now()))
        self._ledger.write(self._ledger.content.add(attempt))
        smaller = micro_batch_size if micro_batch_size < self._max_micro_batch_size else None
        assignment = self._options.workload.assign(fold, slot, smaller)
        self._state = start_fold(self._state, fold, slot)
        self._started_s[fold] = time.monotonic()
        try:
            limits = Limits(self._options.hang_timeout_s, self._experiment.config.train.stop_timeout_s)
            running = RunningFold(assignment, self._paths, self._backend, limits)
        except StartError as error:
            self._end(fold, Ending(Outcome.CRASHED, str(error)), str(error), ())
            return
        self._running[fold] = running
        self._ledger.write(self._ledger.content.amend(fold, pids=running.processes.pids))
        self._log.line(f"[LAUNCH] fold {fold} on {slot.name}: started")

    def _stop(self) -> None:
        self._state = stop_launch(self._state)
        if self._running:
            self._log.line(f"[LAUNCH] stopping folds {', '.join(map(str, self._running))}")
        for running in self._running.values():
            running.request_stop()

    def _settle(self, fold: int, running: RunningFold) -> None:
        """Settle a fold: done if its predictions are valid, else by the reports and exit codes of its processes."""
        score = self._read_score(fold)
        stopping = self._state.stopping or stop_requested() is not None
        ending, reason = running.conclude(score is not None, stopping)
        self._advanced |= score is not None or running.has_advanced
        del self._running[fold]
        message = reason if score is None else f"done macro_f1={score:.5f}"
        self._end(fold, ending, message, running.processes.poll(), running.find_log())

    def _end(
        self, fold: int, ending: Ending, message: str, codes: tuple[int | None, ...], log: Path | None = None
    ) -> None:
        slot = self._state.find(fold).slot
        assert slot is not None
        now_s = time.monotonic()
        self._state = end_fold(self._state, fold, ending, self._options.policy, now_s)
        after = self._state.find(fold)
        done = ending.outcome is Outcome.DONE
        self._ledger.write(
            self._ledger.content.amend(
                fold,
                ended=format_time(datetime.now()),
                outcome=str(ending.outcome),
                then=after.status,
                exit_codes=codes,
                message=None if done else message,
                log=None if log is None else str(log),
            )
        )
        if ending.is_stuck:
            self._log.line(f"[WARNING] {slot.name} is not used again: a process of fold {fold} could not be killed")
        label, duration = f"[LAUNCH] fold {fold} on {slot.name}", format_duration(now_s - self._started_s[fold])
        if done:
            self._log.line(f"{label}: {message} in {duration}")
        elif ending.outcome is Outcome.STOPPED:
            self._log.line(f"{label}: stopped after {duration}")
        elif ending.outcome is Outcome.PREEMPTED:
            self._log.line(f"{label}: preempted after {duration}; will resume: {message}")
        else:
            separator = "\n  " if "\n" in message else ", "
            self._reasons[fold] = message if log is None else f"{message}{separator}log: {log}"
            self._log.line(f"{label}: failed: {self._reasons[fold]}")
            if after.status == "waiting":
                self._log.line(f"[LAUNCH] fold {fold}: {self._format_next_step(after, ending, now_s)}")

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

    def _close_lost_attempts(self) -> None:
        """Close the attempts that a killed launcher left open in the ledger; its processes ended with it."""
        for attempt in self._ledger.content.attempts:
            if attempt.outcome is None:
                self._log.line(
                    f"[LAUNCH] fold {attempt.fold}: attempt {attempt.number}, started {attempt.started}, ended when "
                    "its launcher was killed"
                )
        self._ledger.write(self._ledger.content.close_open(format_time(datetime.now())))

    def _make_fold_state(self, fold: int) -> FoldState:
        """Return the initial state; skip micro-batch sizes that ran out of memory, unless others held that memory."""
        ranks, too_large = self._options.ranks_per_fold, list[int]()
        if self._options.policy.shrink:
            too_large = self._ledger.content.list_sizes(fold, Outcome.OUT_OF_MEMORY, ranks)
        smallest = min(self._max_micro_batch_size, self._options.policy.min_micro_batch_size)
        micro_batch_size = max(smallest, choose_micro_batch_size(self._max_micro_batch_size, too_large))
        if micro_batch_size < self._max_micro_batch_size:
            self._log.line(
                f"[LAUNCH] fold {fold}: train.micro_batch_size={micro_batch_size}, since an earlier launch ran out "
                f"of memory with more ({self._ledger.path})"
            )
        return FoldState(fold, micro_batch_size=micro_batch_size)

    def _read_score(self, fold: int) -> float | None:
        """Return the macro F1 of the fold's predictions, or None unless they are valid and belong to this run."""
        with suppress(TensorFileError):
            info = read_predictions(self._paths.predictions(fold)).info
            if (info.fingerprint, info.fold) == (self._experiment.fingerprint, fold):
                return info.macro_f1
        return None

    def _format_failure(self, failed: list[int], missing: list[int]) -> str:
        heading = f"{len(failed)} fold{'s' if len(failed) > 1 else ''} failed" if failed else "folds are missing"
        lines = [heading, *(f"- fold {fold}: {self._reasons[fold]}" for fold in failed)]
        lines.append(
            f"missing: folds {', '.join(map(str, missing))}; to train just them: {self._options.resume_command}"
        )
        return "\n".join(lines)

    def _list_processes(self) -> list[Processes]:
        return [running.processes for running in self._running.values()]
