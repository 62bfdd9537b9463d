"""A run in the queue of a launch: opened, locked, with its ledger and its missing folds."""

import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from doccls.config import Config
from doccls.config.paths import is_file
from doccls.experiment import Experiment, OpenRun, open_run
from doccls.reporting.log import RunLog
from doccls.run.paths import RunPaths, locate_run
from doccls.system.lock import Lock, hold_lock
from launcher.ledger import Ledger, LedgerFile, begin_launch, format_time
from launcher.plan import LaunchPlan, Slot, Workload
from launcher.study import name_fold
from launcher.supervise import Policy


@dataclass(frozen=True)
class LaunchOptions:
    """The options of a launch beside the config."""

    plan: LaunchPlan  # only logged
    slots: tuple[Slot, ...]
    workload: Workload
    policy: Policy
    hang_timeout_s: float  # a process without progress for this long is killed; 0 is no limit
    resume_command: str  # trains the missing folds
    start: str  # how ranks start, `server` or `fresh`
    study: str | None = None  # the study that the run belongs to

    @property
    def ranks_per_fold(self) -> int:
        """The number of processes of each fold."""
        return len(self.slots[0].devices)


@dataclass(frozen=True)
class QueuedRun:
    """A run whose missing folds are in the queue of a launch."""

    experiment: Experiment
    workload: Workload
    ledger: LedgerFile
    missing: tuple[int, ...]  # folds
    resume_command: str  # trains the missing folds
    lock: Lock  # of this launch of the run
    study: str | None = None  # the study that the run belongs to

    @property
    def paths(self) -> RunPaths:
        """The files of the run."""
        return self.experiment.paths

    def name_fold(self, fold: int) -> str:
        """Return the name of a fold in log lines."""
        return name_fold(fold, self.paths.run_id, self.study)

    def is_cancelled(self) -> bool:
        """Return whether `doccls-launch cancel RUN` asks this launch to stop the run, and no other run of its study."""
        with suppress(OSError):
            return self.study is not None and self.paths.cancel_request.read_text(encoding="ascii") == self.lock.token
        return False


@dataclass(frozen=True)
class Job:
    """A fold in the queue of a launch."""

    run: QueuedRun
    fold: int

    @property
    def name(self) -> str:
        """Its name in log lines."""
        return self.run.name_fold(self.fold)


def queue_run(
    config: Config, run_id: str, now: datetime, options: LaunchOptions, log: RunLog, held: ExitStack
) -> QueuedRun:
    """Open or join the run, lock it until `held` is closed, and return it with its missing folds.

    Raises:
        UserError: its config or data can't be used, or another launcher has the run.
    """
    paths = locate_run(config.output.exp_dir, run_id, now)
    what = f"run {run_id} is being launched"
    if is_file(paths.launch_lock()):
        with hold_lock(paths.launch_lock(), what):
            pass  # report another launcher before the data is scanned
    take_lock = partial(held.enter_context, hold_lock(paths.launch_lock(), what))
    run = open_run(config, paths, now, describe_processes(options), log, take_lock)
    assert run.lock is not None
    log.line(f"[ARTIFACTS] {paths.root}")
    wanted = config.data.list_wanted()
    ledger = begin_launch(paths.ledger(), describe_launch(run.experiment, wanted, options, log, now))
    ledger_file = LedgerFile(paths.ledger(), ledger, run.lock, log)
    return make_queued_run(run, wanted, ledger_file, run.lock, options, log)


def make_queued_run(
    run: OpenRun, wanted: Sequence[int], ledger: LedgerFile, lock: Lock, options: LaunchOptions, log: RunLog
) -> QueuedRun:
    """Return a run that is open and locked, with those of the wanted folds that are missing; write its ledger.

    The attempts that a killed launcher left open are closed: its processes ended with it.
    """
    missing = tuple(run.list_missing(wanted))
    for attempt in ledger.content.attempts:
        if attempt.outcome is None:
            name = name_fold(attempt.fold, run.experiment.paths.run_id, options.study)
            start = f"attempt {attempt.number}, started {attempt.started}"
            log.line(f"[LAUNCH] {name}: {start}, ended when its launcher was killed")
    ledger.write(ledger.content.close_open(format_time(datetime.now())))
    return QueuedRun(run.experiment, options.workload, ledger, missing, options.resume_command, lock, options.study)


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
        study=options.study,
    )
