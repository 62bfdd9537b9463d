"""The end of each run of a study: its folds are merged, and its report written, while other runs train."""

import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from doccls.experiment import Experiment
from doccls.oof.predictions import is_merged
from doccls.report.make import is_reported
from doccls.reporting.log import RunLog
from doccls.system.signals import check_stop, on_immediate_exit

_TICK_S = 0.05
_STOP_S = 10.0  # for a merge to end after a stop was requested; what it has not finished is repeated later


@dataclass(frozen=True)
class Command:
    """A command about a run."""

    argv: Sequence[str]
    is_report: bool = False  # it only writes the report: if it fails, the run is complete all the same


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    run_id: str
    code: int
    output: str
    is_report: bool = False


def find_command(experiment: Experiment) -> Command | None:
    """Return the command that merges the run, or else writes its report; None if both are done, or not wanted.

    It is a process of its own, so that neither its time nor its memory, nor an error in it, affects folds that train.
    """
    paths, config = experiment.paths, experiment.config
    if config.data.valid_fold == "all" and not is_merged(paths):
        return Command([sys.executable, "-m", "launcher", "merge", str(paths.root)])
    if config.output.report and not is_reported(paths):
        return Command([sys.executable, "-m", "doccls", "report", str(paths.root)], is_report=True)
    return None


def log_closed(what: str, ended: Ended, log: RunLog) -> None:
    """Log the output of a command that has succeeded."""
    log.line("\n  ".join([f"[STUDY] {what}:", *ended.output.splitlines()]))


class Closings:
    """Commands that close runs, one after the other."""

    def __init__(self, on_end: Callable[[Ended], None]) -> None:
        """`on_end` is called by `poll` and `finish` when a command has ended."""
        self._on_end = on_end
        self._waiting: deque[tuple[str, Command]] = deque()
        self._current: tuple[str, Command, subprocess.Popen[bytes], IO[bytes]] | None = None

    def add(self, run_id: str, command: Command) -> None:
        """Add a command about the run to the queue."""
        self._waiting.append((run_id, command))

    def poll(self) -> None:
        """Start the next command if none runs, and report one that has ended; return at once."""
        if self._current is not None:
            run_id, command, process, output = self._current
            code = process.poll()
            if code is None:
                return
            self._current = None
            output.seek(0)
            with output:
                text = output.read().decode("utf-8", "replace").strip()
            self._on_end(Ended(run_id, code, text or f"ended with code {code}", command.is_report))
        if self._waiting and self._current is None:
            run_id, command = self._waiting.popleft()
            try:
                self._current = (run_id, command, *_start(command.argv))
            except OSError as error:  # no process, or no temporary file; folds that train go on
                self._on_end(Ended(run_id, 1, f"can't be started: {error}", command.is_report))

    def finish(self) -> None:
        """Wait until all commands have ended.

        Raises:
            Interrupted: a signal came.
        """
        self.poll()
        while self._current is not None or self._waiting:
            check_stop()
            time.sleep(_TICK_S)
            self.poll()

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """End the command that runs at the end of the block, however that ends."""
        try:
            with on_immediate_exit(lambda reason, code: self._kill()):
                yield
        finally:
            self._waiting.clear()
            if self._current is not None:
                process = self._current[2]
                process.terminate()
                try:
                    process.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _kill(self) -> None:
        if self._current is not None:
            self._current[2].kill()


def _start(argv: Sequence[str]) -> "tuple[subprocess.Popen[bytes], IO[bytes]]":
    output = tempfile.TemporaryFile()  # noqa: SIM115 (closed once the process has ended)
    try:
        # In a session of its own, a terminal's Ctrl-C does not reach it.
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError:
        output.close()
        raise
    return process, output
