"""`--on-end CMD`: a command of the user's that is told how a launch ended, for mail or chat."""

import shlex
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from doccls.reporting.console import print_last
from doccls.reporting.log import RunLog
from doccls.system.signals import Interrupted

_TAKES_S = 60.0
"""A command that hangs holds up no launch for longer."""


class EndCommand:
    """As a context manager: after the block it runs the command, without a shell.

    The command gets two more arguments: the run's folder, and the outcome, which is `success`, `incomplete`,
    `submitted`, `stopped` (by a signal) or `failed`. What it prints goes to the console; that it fails changes no exit
    code.
    """

    def __init__(self, command: str | None, log: RunLog) -> None:
        """`log` is the launch's; its ending says what came of a launch that ended well."""
        self._command, self._log = command, log
        self.run_folder: Path | None = None
        """None until it is known: the command is given an empty argument then."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._command is None or (error is None and not self._log.opened):
            return  # the latter is a task that had nothing to do
        if error is None:
            word = self._log.ending.split()[0].lower()
            outcome = word if word in ("incomplete", "submitted") else "success"
        else:
            outcome = "stopped" if isinstance(error, Interrupted) else "failed"
        try:
            words = [*shlex.split(self._command), str(self.run_folder or ""), outcome]
            done = subprocess.run(words, stdin=subprocess.DEVNULL, timeout=_TAKES_S, check=False)
            problem = f"exit code {done.returncode}" if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as failure:
            problem = str(failure)
        if problem is not None:
            print_last(f"[WARNING] --on-end {self._command}: {problem}", sys.stderr)
