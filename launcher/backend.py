"""Where the processes of a fold run: what the launcher asks of this machine and of Slurm alike."""

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from doccls.errors import UserError
from launcher.plan import Assignment

LAUNCH = secrets.token_hex(8)
"""This launch, in the environment of the processes that it starts (`doccls.system.lifeline.LAUNCHED`)."""
KILL_LIMIT_S = 120.0
"""After SIGKILL, a process that is still there so much later can't be killed.

It stands in a system call that does not end: on a GPU that fell off the bus, or on a file server that is away. Slurm
takes 90 s by default before it gives up on one (KillWait and UnkillableStepTimeout).
"""


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

    def strike(self) -> None:
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


def strike_folds(folds: Iterable[Processes]) -> None:
    """Kill all ranks of all folds."""
    for fold in folds:
        fold.strike()


def kill_folds(folds: Sequence[Processes]) -> None:
    """The same, and wait until they are gone; for one that can't be killed not for ever."""
    strike_folds(folds)
    for fold in folds:
        fold.wait()
