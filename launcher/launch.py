"""`doccls-launch run`: the folds of one run, started side by side, watched, started again, and merged at the end."""

import os
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from doccls.config import Config
from doccls.data.sampler import BatchDivision
from doccls.errors import UserError
from doccls.experiment import Experiment, close_run, log_config, open_run
from doccls.oof.predictions import read_predictions
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths, locate_run
from doccls.system.lock import LockError, hold_lock
from doccls.system.signals import check_stop, on_immediate_exit, stop_requested, stopping_gracefully
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
    """How to launch, beside the config."""

    plan: LaunchPlan
    """What the log says of it."""
    slots: tuple[Slot, ...]
    workload: Workload
    policy: Policy
    hang_timeout_s: float
    """A process that makes no progress for so long is killed; 0 is never."""
    resume_command: str
    """The command that trains what is missing."""

    @property
    def ranks_per_fold(self) -> int:
        """Processes of each fold."""
        return len(self.slots[0].devices)


def launch(config: Config, run_id: str, now: datetime, options: LaunchOptions, log: RunLog) -> None:
    """Train the folds that the config asks for and are not finished, and merge them.

    Raises:
        UserError: config, data, devices or another launcher of the run stand in the way, or folds failed.
        Interrupted: a signal came; each fold has left at its next safe point.
    """
    log_config(config, log)
    log.line(render_plan(options.plan, commands=False))
    paths = locate_run(config.output.exp_dir, run_id, now)
    what = f"run {run_id} is being launched"
    if paths.launch_lock().exists():
        with hold_lock(paths.launch_lock(), what):
            pass  # another launcher is told of before the data is looked at
    with ExitStack() as held:
        take_lock = partial(held.enter_context, hold_lock(paths.launch_lock(), what))
        run = open_run(config, paths, now, describe_processes(options), log, take_lock)
        assert run.lock is not None
        log.line(f"[ARTIFACTS] {paths.root}")
        wanted = config.data.list_wanted()
        ledger = begin_launch(paths.ledger(), describe_launch(run.experiment, wanted, options, log, now))
        ledger_file, missing = LedgerFile(paths.ledger(), ledger, run.lock, log), run.list_missing(wanted)
        with tempfile.TemporaryDirectory(prefix="doccls-launch-") as folder, stopping_gracefully():
            backend = LocalBackend(Path(folder), min(len(missing), len(options.slots)) * options.ranks_per_fold)
            FoldLoop(run.experiment, options, backend, log, ledger_file, missing).run()
        close_run(run.experiment, log)


def describe_processes(options: LaunchOptions) -> dict[str, Any]:
    """What the run's snapshot says of its processes; they add themselves what they compute on."""
    return {"world_size": options.ranks_per_fold}


def describe_launch(
    experiment: Experiment, folds: Sequence[int], options: LaunchOptions, log: RunLog, now: datetime
) -> Ledger:
    """The ledger of a launch that has not started anything yet."""
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
    """The effects around `launcher.supervise`: it does what that says, and tells it what ended."""

    def __init__(
        self,
        experiment: Experiment,
        options: LaunchOptions,
        backend: Backend,
        log: RunLog,
        ledger: LedgerFile,
        missing: list[int],
    ) -> None:
        """`missing` are the folds to train."""
        self._experiment, self._options, self._backend, self._log = experiment, options, backend, log
        self._ledger = ledger
        self._running: dict[int, RunningFold] = {}
        self._advanced = self._any_has_begun = False
        self._reasons: dict[int, str] = {}
        self._started_s: dict[int, float] = {}
        self._most_images = BatchDivision.derive(experiment.config.train, options.ranks_per_fold).images_at_a_time
        self._state = LaunchState(tuple(self._make_state(fold) for fold in missing), options.slots)

    @property
    def _paths(self) -> RunPaths:
        return self._experiment.paths

    def run(self) -> None:
        """Until nothing runs and nothing may start.

        Raises:
            UserError: folds failed.
            Interrupted: a signal came.
        """
        self._take_stock()
        try:
            with on_immediate_exit(lambda reason, code: kill_folds(self._list_processes())):
                while not isinstance(action := self._decide(), Finish):
                    self._act(action)
                    self._look()
        finally:
            kill_folds_and_wait(self._list_processes())
            with suppress(LockError):  # what ended the folds is to be told
                self._ledger.try_again(0.0)
        check_stop()
        failed = [one.fold for one in self._state.list_in("failed")]
        missing = [one.fold for one in self._state.folds if one.status != "done" and self._read_score(one.fold) is None]
        if failed and missing:  # a fold that was refused may have been finished by its owner since
            raise UserError(self._format_failure([fold for fold in failed if fold in missing], missing))

    @property
    def has_advanced(self) -> bool:
        """Whether this launch has come further: a fold is done, or a state was saved from which it goes on."""
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

    def _look(self) -> None:
        """Settle what ended."""
        self._ledger.try_again()
        for fold, running in list(self._running.items()):
            self._any_has_begun |= running.has_begun
            if running.has_ended(self._any_has_begun):
                self._settle(fold, running)

    def _start(self, fold: int, slot: Slot) -> None:
        state = self._state.find(fold)
        number = len(self._ledger.content.list_attempts(fold)) + 1
        devices = tuple(device.uuid or device.name for device in slot.devices)
        now = format_time(datetime.now())
        self._ledger.write(
            self._ledger.content.add(Attempt(fold, number, slot.name, devices, state.micro_batch_size, now))
        )
        smaller = state.micro_batch_size if state.micro_batch_size < self._most_images else None
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
            self._log.line(f"[LAUNCH] stopping: folds {', '.join(map(str, self._running))} are asked to leave")
        for running in self._running.values():
            running.ask_to_leave()

    def _settle(self, fold: int, running: RunningFold) -> None:
        """Done by its part; else by what its processes said and how they ended."""
        score = self._read_score(fold)
        stopping = self._state.stopping or stop_requested() is not None
        ending, reason = running.conclude(score is not None, stopping)
        self._advanced |= score is not None or running.has_advanced
        del self._running[fold]
        told = reason if score is None else f"done macro_f1={score:.5f}"
        self._end(fold, ending, told, running.processes.poll(), running.find_log())

    def _end(
        self, fold: int, ending: Ending, told: str, codes: tuple[int | None, ...], log: Path | None = None
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
                message=None if done else told,
                log=None if log is None else str(log),
            )
        )
        if ending.stays:
            self._log.line(f"[WARNING] {slot.name} is used no more: a process of fold {fold} can't be killed")
        where, took = f"[LAUNCH] fold {fold} on {slot.name}", format_duration(now_s - self._started_s[fold])
        if done:
            self._log.line(f"{where}: {told} in {took}")
        elif ending.outcome is Outcome.STOPPED:
            self._log.line(f"{where}: stopped after {took}")
        elif ending.outcome is Outcome.LEFT:
            self._log.line(f"{where}: left after {took}, asked by another; it goes on from where it was: {told}")
        else:
            self._reasons[fold] = told if log is None else f"{told}{_separate(told)}log: {log}"
            self._log.line(f"{where}: failed: {self._reasons[fold]}")
            if after.status == "waiting":
                self._log.line(f"[LAUNCH] fold {fold}: {self._format_next_step(after, ending, now_s)}")

    def _format_next_step(self, after: FoldState, ending: Ending, now_s: float) -> str:
        if ending.outcome in MEMORY_OUTCOMES:
            return (
                f"starts again with train.micro_batch_size={after.micro_batch_size}, the same batch in smaller pieces: "
                "BatchNorm sees fewer images at a time, dropout and Mixup draw anew, all else stays"
            )
        wait_s = max(0.0, after.ready_s - now_s)
        if ending.outcome is Outcome.PORT_TAKEN:
            return f"starts again in {wait_s:.0f} s with another port"
        return f"starts again in {wait_s:.0f} s, restart {after.restarts} of {self._options.policy.max_restarts}"

    # --- what is known of a fold -------------------------------------------------------------------------------------

    def _take_stock(self) -> None:
        """What a launcher that was killed left open in the ledger is closed; its processes went with it."""
        for attempt in self._ledger.content.attempts:
            if attempt.outcome is None:
                self._log.line(
                    f"[LAUNCH] fold {attempt.fold}: its attempt {attempt.number} of {attempt.started} ended with its "
                    "launcher, which was killed"
                )
        self._ledger.write(self._ledger.content.close_open(format_time(datetime.now())))

    def _make_state(self, fold: int) -> FoldState:
        """What did not fit an earlier launch's devices is not tried again, unless others held their memory."""
        ranks, too_large = self._options.ranks_per_fold, list[int]()
        if self._options.policy.shrink:
            too_large = self._ledger.content.list_sizes(fold, Outcome.OUT_OF_MEMORY, ranks)
        chosen = choose_micro_batch_size(self._most_images, too_large)
        if chosen < self._most_images:
            self._log.line(
                f"[LAUNCH] fold {fold}: train.micro_batch_size={chosen}, since an earlier launch ran out of memory "
                f"with more ({self._ledger.path})"
            )
        return FoldState(fold, micro_batch_size=chosen)

    def _read_score(self, fold: int) -> float | None:
        """Of its part, if that is valid and this run's."""
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


def _separate(told: str) -> str:
    return "\n  " if "\n" in told else ", "
