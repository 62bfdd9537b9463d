"""`--on-end CMD`: run the user's command when a launch ends, to notify by mail or chat."""

import shlex
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from doccls.reporting.log import RunLog
from doccls.system.signals import Interrupted

_TIMEOUT_S = 60.0


class EndCommand:
    """A context manager that runs the command, without a shell, after its block.

    The command gets two more arguments: the run's folder (empty if it is not known), and the outcome, which is
    `success`, `incomplete`, `submitted`, `stopped` (by a signal) or `failed`. Its output goes to the console; its
    failure changes no exit code.
    """

    def __init__(self, command: str | None, log: RunLog) -> None:
        """Store the command; `log` is the launch's log, whose ending is the outcome of a launch without an error."""
        self._command, self._log = command, log
        self.run_folder: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._command is None or (error is None and not self._log.opened):
            return  # an array task with nothing to do opens no log
        if error is None:
            marker = self._log.ending.split()[0].lower()
            outcome = marker if marker in ("incomplete", "submitted") else "success"
        else:
            outcome = "stopped" if isinstance(error, Interrupted) else "failed"
        try:
            argv = [*shlex.split(self._command), str(self.run_folder or ""), outcome]
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S, check=False)
            problem = f"exit code {done.returncode}" if done.returncode else None
        except (OSError, subprocess.TimeoutExpired) as failure:
            problem = str(failure)
        if problem is not None:
            print(f"[WARNING] --on-end {self._command}: {problem}", file=sys.stderr)
