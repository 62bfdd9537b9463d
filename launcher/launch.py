"""`doccls-launch run`: the folds of one run, started side by side, waited for, told, and merged at the end."""

import re
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from doccls.config import Config
from doccls.errors import UserError
from doccls.experiment import Experiment, close_run, identify, list_wanted, open_run, prepare, tell_config
from doccls.oof.parts import PartError, find_finished_folds, read_part
from doccls.run.paths import locate_run
from doccls.run.runlog import RunLog
from doccls.run.signals import at_sudden_end, check_stop, stop_requested, stopping_gracefully
from launcher.local import RunningFold, StartError, kill_folds, start_fold, strike_folds
from launcher.plan import LaunchPlan, Workload, render_plan
from launcher.slots import Slot, list_starts

_TICK_S = 0.05
_SIBLING_GRACE_S = 30.0
"""How long the other ranks may outlive one that failed: the collective that they stand in mostly ends them at once."""
_LEFT = {128 + signal.SIGTERM, -signal.SIGTERM}
"""Exit codes of a process that was asked to leave; the second before it hears signals."""
_LOG_STARTED = ">> Logger started: "
_FAILED = re.compile(r"\[EXIT\]\[ERROR\] (?:training failed: |rank \d+ failed: )?(.*)")


class LaunchError(UserError):
    """Folds failed; the message says which, why, where their logs are and how to train just them."""


@dataclass(frozen=True)
class LaunchOptions:
    """How to launch, beside the config."""

    slots: tuple[Slot, ...]
    workload: Workload
    fail_fast: bool
    again: str
    """The command that trains what is missing."""


def launch(config: Config, run_id: str, now: datetime, plan: LaunchPlan, options: LaunchOptions, log: RunLog) -> None:
    """Train the folds that the config asks for and are not finished, and merge them.

    Raises:
        UserError: config, data or devices stand in the way, or folds failed.
        Interrupted: a signal came; each fold has left at its next safe point.
    """
    tell_config(config, log)
    log.line(render_plan(plan, commands=False))
    paths = locate_run(config.output.exp_dir, run_id, now)
    experiment = identify(config, prepare(config, paths, log), paths)
    devices = [device.model or device.name for slot in options.slots for device in slot.devices]
    finished = open_run(experiment, now, {"world_size": len(options.slots[0].devices), "device": devices})
    log.line(f"[ARTIFACTS] {paths.root}")
    missing = [fold for fold in list_wanted(config) if fold not in finished]
    with tempfile.TemporaryDirectory(prefix="doccls-launch-") as folder, stopping_gracefully():
        _Launch(experiment, options, log, Path(folder), missing).run()
    close_run(experiment, log)


@dataclass
class _Launch:
    experiment: Experiment
    options: LaunchOptions
    log: RunLog
    meetings: Path
    """A folder of this machine's, for the files through which ranks meet."""
    waiting: list[int]
    running: list[RunningFold] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    stopping: bool = False

    def run(self) -> None:
        """Until nothing runs and nothing may start."""
        try:
            with at_sudden_end(lambda signum: strike_folds(self.running)):
                while self._advance():
                    time.sleep(_TICK_S)
        finally:
            kill_folds(self.running)
        check_stop()
        if self.failed:
            raise LaunchError(self._tell_failure())

    def _advance(self) -> bool:
        """Settle what ended, stop what must, start what may; whether there is more to wait for."""
        for fold in list(self.running):
            if None not in fold.exit_codes:
                self.running.remove(fold)
                self._settle(fold)
            else:
                self._watch_siblings(fold)
        if not self.stopping and (stop_requested() or (self.failed and self.options.fail_fast)):
            self._stop()
        if not self.stopping:
            self._start()
        return bool(self.running)

    def _start(self) -> None:
        busy = [fold.assignment.slot for fold in self.running]
        for fold, slot in list_starts(self.waiting, busy, self.options.slots):
            self.waiting.remove(fold)
            try:
                one = start_fold(
                    self.options.workload.assign(fold, slot),
                    [self.experiment.paths.console(fold, rank) for rank in range(len(slot.devices))],
                    self.meetings / f"fold{fold}",
                )
            except StartError as error:
                self.failed[fold] = str(error)
                self.log.line(f"[LAUNCH] fold {fold} on {slot.name}: failed: {error}")
                continue
            self.running.append(one)
            self.log.line(f"[LAUNCH] fold {fold} on {slot.name}: started")

    def _stop(self) -> None:
        self.stopping = True
        if self.running:
            told = ", ".join(str(fold.assignment.fold) for fold in self.running)
            self.log.line(f"[LAUNCH] stopping: folds {told} are asked to leave")
        for fold in self.running:
            fold.terminate()

    def _watch_siblings(self, fold: RunningFold) -> None:
        if any(fold.exit_codes):
            now_s = time.monotonic()
            fold.first_failure_s = fold.first_failure_s or now_s
            if now_s - fold.first_failure_s > _SIBLING_GRACE_S:
                fold.strike()

    def _settle(self, one: RunningFold) -> None:
        """Done by its part; else failed, with what it said last."""
        fold, where = one.assignment.fold, f"[LAUNCH] fold {one.assignment.fold} on {one.assignment.slot.name}"
        took = tell_duration(time.monotonic() - one.started_s)
        score = self._read_score(fold)
        if score is not None:
            self.log.line(f"{where}: done macro_f1={score:.5f} in {took}")
            return
        consoles = [self.experiment.paths.console(fold, rank) for rank in range(len(one.ranks))]
        if self.stopping and _LEFT.intersection(one.exit_codes):
            self.log.line(f"{where}: stopped after {took}")
            return
        reason = find_reason([_read(console) for console in consoles], one.exit_codes)
        self.failed[fold] = f"{reason}, log: {find_log(_read(consoles[0])) or consoles[0]}"
        self.log.line(f"{where}: failed: {self.failed[fold]}")

    def _read_score(self, fold: int) -> float | None:
        paths, num_folds = self.experiment.paths, self.experiment.config.data.folds
        if fold not in find_finished_folds(paths, self.experiment.identity, num_folds):
            return None
        with suppress(PartError):
            return read_part(paths.part(fold)).info.macro_f1
        return None

    def _tell_failure(self) -> str:
        num_folds, paths = self.experiment.config.data.folds, self.experiment.paths
        finished = find_finished_folds(paths, self.experiment.identity, num_folds)
        missing = [fold for fold in list_wanted(self.experiment.config) if fold not in finished]
        lines = [f"{len(self.failed)} folds failed"]
        lines += [f"- fold {fold}: {told}" for fold, told in sorted(self.failed.items())]
        lines.append(f"missing: folds {', '.join(map(str, missing))}; to train just them: {self.options.again}")
        return "\n".join(lines)


def find_reason(consoles: Sequence[str], codes: Sequence[int | None]) -> str:
    """What the ranks of a fold said last of why they failed, the first rank's word first; else how they ended."""
    for text in consoles:
        said = _FAILED.findall(text)
        if said:
            return str(said[-1])
    return "; ".join(f"rank {rank} {_tell_code(code)}" for rank, code in enumerate(codes))


def find_log(console: str) -> str | None:
    """The log that a process said it writes."""
    found = [line.removeprefix(_LOG_STARTED) for line in console.splitlines() if line.startswith(_LOG_STARTED)]
    return found[0] if found else None


def tell_duration(seconds: float) -> str:
    """Such as `45 s`, `12 min` or `3 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _tell_code(code: int | None) -> str:
    assert code is not None
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
