"""The interface of all launcher backends, and the backend that starts ranks on this machine."""

import fcntl
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
from typing import Protocol, TypeAlias

from doccls.errors import UserError
from doccls.system.cores import PROCESSES_HERE
from doccls.system.lifeline import LAUNCHED, PARENT
from doccls.system.rank import MEETING_FILE
from launcher.forking import ForkedRank, RankServer
from launcher.plan import Assignment, RankCommand, drop_job_variables

# ID of this launch, in the environment of the processes that it starts (`doccls.system.lifeline.LAUNCHED`).
LAUNCH = secrets.token_hex(8)
# A process that still exists this long after SIGKILL can't be killed: it hangs in a system call, on a GPU that fell off
# the bus or on a lost file server. Slurm gives up after 90 s by default (KillWait and UnkillableStepTimeout).
KILL_LIMIT_S = 120.0
_DUMP_S = 0.5  # time for a process to write its stacks


Rank: TypeAlias = "subprocess.Popen[bytes] | ForkedRank"


class StartError(UserError):
    """An error that keeps a fold's processes from starting."""


class Processes(Protocol):
    """The ranks of one attempt at a fold."""

    ended: list[int]  # ranks, in the order in which their ends were seen

    @property
    def pids(self) -> tuple[int, ...]:
        """The process IDs that this launcher has started."""
        ...

    def poll(self) -> tuple[int | None, ...]:
        """Return exit codes by rank: minus the number of the signal that killed it, None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask each rank to stop at its next safe point."""
        ...

    def dump_stacks(self) -> None:
        """Have each rank write its Python stacks to its console."""
        ...

    def kill(self) -> None:
        """Kill each rank and everything it started."""
        ...

    def wait(self, within_s: float = KILL_LIMIT_S) -> None:
        """Wait until all ranks have exited or the limit has passed."""
        ...

    def read_messages(self) -> str:
        """Return the messages of the program that runs the ranks, such as srun."""
        ...


class Backend(Protocol):
    """A way to start folds."""

    def start(self, assignment: Assignment, consoles: Sequence[Path]) -> Processes:
        """Start the ranks of a fold; the output of each is appended to its console.

        Raises:
            StartError: a rank can't be started; none of them still runs.
        """
        ...


def kill_folds(folds: Iterable[Processes]) -> None:
    """Kill all ranks of all folds."""
    for fold in folds:
        fold.kill()


def kill_folds_and_wait(folds: Sequence[Processes]) -> None:
    """Kill all ranks of all folds, and wait until each has exited or its limit has passed."""
    kill_folds(folds)
    for fold in folds:
        fold.wait()


@dataclass
class LocalProcesses:
    """The ranks of one fold, each in a process group of its own."""

    ranks: tuple[Rank, ...]
    ended: list[int] = field(default_factory=list)  # ranks, in the order in which their ends were seen

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self.ranks)

    def poll(self) -> tuple[int | None, ...]:
        """Return exit codes by rank: minus the number of the signal that killed it, None while it runs."""
        codes = tuple(process.poll() for process in self.ranks)
        new = [(code >= 0, rank) for rank, code in enumerate(codes) if code is not None and rank not in self.ended]
        self.ended += [rank for _, rank in sorted(new)]  # killed ranks first: a kill is the cause of ends seen at once
        return codes

    def terminate(self) -> None:
        """Ask each rank to stop at its next safe point."""
        for process in self.ranks:
            process.terminate()

    def dump_stacks(self) -> None:
        """Have each rank, even a suspended one, write its Python stacks to its console, one rank after the other."""
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR2)
                process.send_signal(signal.SIGCONT)
                time.sleep(_DUMP_S)

    def kill(self) -> None:
        """Send SIGKILL to each rank and everything it started."""
        for process in self.ranks:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def wait(self, within_s: float = KILL_LIMIT_S) -> None:
        """Wait until all ranks have exited or the limit has passed."""
        end_s = time.monotonic() + within_s
        with suppress(subprocess.TimeoutExpired):
            for process in self.ranks:
                process.wait(max(0.0, end_s - time.monotonic()))

    def read_messages(self) -> str:
        """Return nothing: no other program runs the ranks."""
        return ""


class LocalBackend:
    """A backend that starts folds on this machine."""

    def __init__(self, meetings: Path, processes: int, server: RankServer | None = None) -> None:
        """Prepare to start folds; at most `processes` ranks share this machine at once.

        `meetings` is a local folder for the files through which the ranks of a fold find each other. `server` forks
        ranks; without it, or when it can't, each is a fresh interpreter.
        """
        self._meetings, self._processes, self._server = meetings, processes, server
        self._numbers = itertools.count()

    def start(self, assignment: Assignment, consoles: Sequence[Path]) -> LocalProcesses:
        """Start the ranks of a fold; the output of each is appended to its console.

        Raises:
            StartError: a process or its output file can't be created; no rank of the fold still runs.
            UserError: the ranks of a fold can't meet, since the folder for that has no file locks.
        """
        started: list[Rank] = []
        variables = {LAUNCHED: LAUNCH, PARENT: str(os.getpid()), PROCESSES_HERE: str(self._processes)}
        if len(assignment.ranks) > 1:
            variables[MEETING_FILE] = str(self._meetings / f"fold{assignment.fold}.{next(self._numbers)}")
        try:
            if MEETING_FILE in variables:
                _check_locks(self._meetings)
            for command, console in zip(assignment.ranks, consoles, strict=True):
                started.append(_start_rank(command, console, variables, self._server))
        except OSError as error:
            kill_folds_and_wait([LocalProcesses(tuple(started))])
            raise StartError(f"fold {assignment.fold} can't be started: {error}") from error
        return LocalProcesses(tuple(started))


def _check_locks(folder: Path) -> None:
    """Check that files in the folder can be locked by flock(2), as torch does where ranks meet.

    Raises:
        UserError: they can't, as on NFS without a lock daemon and on some FUSE file systems.
    """
    with (folder / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"the processes of a fold can't meet in {folder}, whose file system has no file locks "
                f"({error.strerror}): set the environment variable TMPDIR to a folder on a local disk"
            ) from error


def _start_rank(
    command: RankCommand, console: Path, variables: dict[str, str], server: RankServer | None = None
) -> Rank:
    inherited = drop_job_variables(os.environ) if server is None else server.environment
    environment = {**inherited, **command.environment, **variables}
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("ab") as out:
        forked = None if server is None else server.fork(command.argv, environment, out.fileno())
        return forked or subprocess.Popen(
            command.argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # only the launcher handles a terminal's Ctrl-C
        )
