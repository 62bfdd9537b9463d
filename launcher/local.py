"""Starting the ranks of a fold: what the launcher asks of any backend, and the backend of this machine."""

import itertools
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from doccls.errors import UserError
from doccls.system.cores import PROCESSES_HERE
from doccls.system.lifeline import LAUNCHED, PARENT
from doccls.system.rank import MEETING_FILE
from launcher.plan import Assignment, RankCommand, drop_job_variables

LAUNCH = secrets.token_hex(8)
"""This launch, in the environment of the processes that it starts (`doccls.system.lifeline.LAUNCHED`)."""
KILL_LIMIT_S = 120.0
"""After SIGKILL, a process that is still there so much later can't be killed.

It stands in a system call that does not end: on a GPU that fell off the bus, or on a file server that is away. Slurm
takes 90 s by default before it gives up on one (KillWait and UnkillableStepTimeout).
"""
_DUMP_S = 0.5
"""How long a process gets to write its stacks."""


class StartError(UserError):
    """A fold's processes can't be started."""


class Processes(Protocol):
    """The ranks of one attempt at a fold."""

    ended: list[int]
    """Ranks in the order in which they were seen to have ended."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that this one has started."""
        ...

    def poll(self) -> tuple[int | None, ...]:
        """Exit codes by rank: minus a signal's number where one killed, None while alive."""
        ...

    def terminate(self) -> None:
        """Ask each rank to leave at its next safe point."""
        ...

    def dump_stacks(self) -> None:
        """Have each rank write its Python stacks to its console."""
        ...

    def kill(self) -> None:
        """Kill each rank with all that it started."""
        ...

    def wait(self, within_s: float = KILL_LIMIT_S) -> None:
        """Until all are gone, or so long."""
        ...

    def tell(self) -> str:
        """What was said of them by whoever runs them; empty if nothing."""
        ...


class Backend(Protocol):
    """Starts folds."""

    def start(self, assignment: Assignment, consoles: Sequence[Path]) -> Processes:
        """Start the ranks of a fold; what each prints is added to its console.

        Raises:
            StartError: they can't be had; none of them is left.
        """
        ...


def kill_folds(folds: Iterable[Processes]) -> None:
    """Kill all ranks of all folds."""
    for fold in folds:
        fold.kill()


def kill_folds_and_wait(folds: Sequence[Processes]) -> None:
    """The same, and wait until they are gone; for one that can't be killed not for ever."""
    kill_folds(folds)
    for fold in folds:
        fold.wait()


@dataclass
class LocalProcesses:
    """The ranks of one fold, each a fresh interpreter in a process group of its own."""

    ranks: tuple["subprocess.Popen[bytes]", ...]
    ended: list[int] = field(default_factory=list)
    """Ranks in the order in which they were seen to have ended."""

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self.ranks)

    def poll(self) -> tuple[int | None, ...]:
        """Exit codes by rank: minus a signal's number where one killed, None while alive."""
        codes = tuple(process.poll() for process in self.ranks)
        new = [(code >= 0, rank) for rank, code in enumerate(codes) if code is not None and rank not in self.ended]
        self.ended += [rank for _, rank in sorted(new)]  # of those seen at once, who was killed is the cause
        return codes

    def terminate(self) -> None:
        """Ask each rank to leave at its next safe point."""
        for process in self.ranks:
            process.terminate()

    def dump_stacks(self) -> None:
        """Have each rank write its Python stacks to its console, a stopped one too; one after the other."""
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR2)
                process.send_signal(signal.SIGCONT)
                time.sleep(_DUMP_S)

    def kill(self) -> None:
        """SIGKILL each rank with all that it started."""
        for process in self.ranks:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def wait(self, within_s: float = KILL_LIMIT_S) -> None:
        """Until all are gone, or so long."""
        end_s = time.monotonic() + within_s
        with suppress(subprocess.TimeoutExpired):
            for process in self.ranks:
                process.wait(max(0.0, end_s - time.monotonic()))

    def tell(self) -> str:
        """Nobody stands between them and their launcher."""
        return ""


class LocalBackend:
    """Starts folds on this machine."""

    def __init__(self, meetings: Path, processes: int) -> None:
        """`meetings` is a folder of this machine's, for the files through which the ranks of a fold find each other.

        So many `processes` at once share this machine.
        """
        self._meetings, self._processes = meetings, processes
        self._numbers = itertools.count()

    def start(self, assignment: Assignment, consoles: Sequence[Path]) -> LocalProcesses:
        """Start the ranks of a fold; what each prints is added to its console.

        Raises:
            StartError: a process or its output file can't be had; none of the fold's is left.
        """
        started: list[subprocess.Popen[bytes]] = []
        told = {LAUNCHED: LAUNCH, PARENT: str(os.getpid()), PROCESSES_HERE: str(self._processes)}
        if len(assignment.ranks) > 1:
            told[MEETING_FILE] = str(self._meetings / f"fold{assignment.fold}.{next(self._numbers)}")
        try:
            for command, console in zip(assignment.ranks, consoles, strict=True):
                started.append(_start_rank(command, console, told))
        except OSError as error:
            kill_folds_and_wait([LocalProcesses(tuple(started))])
            raise StartError(f"fold {assignment.fold} can't be started: {error}") from error
        return LocalProcesses(tuple(started))


def _start_rank(command: RankCommand, console: Path, told: dict[str, str]) -> "subprocess.Popen[bytes]":
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("ab") as out:
        return subprocess.Popen(
            command.argv,
            env=drop_job_variables(os.environ) | dict(command.environment) | told,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # a terminal's Ctrl-C is the launcher's to hear
        )
