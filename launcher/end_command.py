"""`--on-end CMD`: a command of the user's that is told how a launch ended, for mail or chat."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from doccls.reporting.console import say_last
from doccls.reporting.log import RunLog
from doccls.system.signals import Interrupted

_TAKES_S = 60.0
"""A command that hangs holds up no launch for longer."""


@contextmanager
def running_at_end(command: str | None, run_folder: Path, log: RunLog) -> Iterator[None]:
    """After the block run `command`, without a shell, with the run's folder and the outcome as two more arguments.

    The outcome is `success`, `incomplete`, `submitted`, `stopped` (by a signal) or `failed`. What the command prints
    goes to the console; that it fails changes no exit code.
    """
    outcome = "failed"
    try:
        yield
        word = log.ending.split()[0].lower()
        outcome = word if word in ("incomplete", "submitted") else "success"
    except Interrupted:
        outcome = "stopped"
        raise
    finally:
        if command is not None:
            _run(command, str(run_folder), outcome)


def _run(command: str, *arguments: str) -> None:
    try:
        words = [*shlex.split(command), *arguments]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, timeout=_TAKES_S, check=False)
        problem = f"exit code {done.returncode}" if done.returncode else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is not None:
        say_last(f"[WARNING] --on-end {command}: {problem}", sys.stderr)
