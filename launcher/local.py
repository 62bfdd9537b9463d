"""Processes on this machine: the ranks of a fold, each a fresh interpreter in a process group of its own."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from doccls.errors import UserError
from doccls.run.rank import MEETING_FILE
from launcher.plan import Assignment, RankCommand

_FROM_OTHER_LAUNCHERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU",
)  # fmt: skip


class StartError(UserError):
    """A process can't be started."""


@dataclass
class RunningFold:
    """The ranks of one fold."""

    assignment: Assignment
    ranks: tuple["subprocess.Popen[bytes]", ...]
    started_s: float = field(default_factory=time.monotonic)
    first_failure_s: float | None = None
    """When a rank was first seen to have failed."""

    @property
    def exit_codes(self) -> tuple[int | None, ...]:
        """By rank; minus a signal's number where one killed, None while alive."""
        return tuple(process.poll() for process in self.ranks)

    def terminate(self) -> None:
        """Ask each rank to leave at its next safe point."""
        for process in self.ranks:
            process.terminate()

    def strike(self) -> None:
        """SIGKILL each rank with all that it started."""
        for process in self.ranks:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def start_fold(assignment: Assignment, consoles: Sequence[Path], meeting_file: Path) -> RunningFold:
    """Start the ranks of a fold; what each prints goes to its console. They meet through `meeting_file`, a new one.

    Raises:
        StartError: a process or its output file can't be had; none of the fold's is left.
    """
    started: list[subprocess.Popen[bytes]] = []
    told = {MEETING_FILE: str(meeting_file)} if len(assignment.ranks) > 1 else {}
    try:
        for command, console in zip(assignment.ranks, consoles, strict=True):
            started.append(_start_rank(command, console, told))
    except OSError as error:
        RunningFold(assignment, tuple(started)).strike()
        for process in started:
            process.wait()
        raise StartError(f"fold {assignment.fold} can't be started: {error}") from error
    return RunningFold(assignment, tuple(started))


def _start_rank(command: RankCommand, console: Path, told: dict[str, str]) -> "subprocess.Popen[bytes]":
    own = {name: value for name, value in os.environ.items() if name not in _FROM_OTHER_LAUNCHERS}
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("wb") as out:
        return subprocess.Popen(
            command.argv,
            env=own | dict(command.environment) | told,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # a terminal's Ctrl-C is the launcher's to hear
        )


def strike_folds(folds: Sequence[RunningFold]) -> None:
    """SIGKILL all ranks of all folds."""
    for fold in folds:
        fold.strike()


def kill_folds(folds: Sequence[RunningFold]) -> None:
    """The same, and wait until they are gone."""
    strike_folds(folds)
    for fold in folds:
        for process in fold.ranks:
            process.wait()
