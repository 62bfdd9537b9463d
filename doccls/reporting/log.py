"""The run's log: everything printed goes to the console and a file, which always ends with an exit marker."""

import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TextIO, cast

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from doccls.config.paths import describe_error, find_output_problem
from doccls.errors import UserError
from doccls.reporting.console import ConsoleStream, exit_code, render_exit, wrap_stream
from doccls.reporting.footer import Footer, can_redraw
from doccls.reporting.progress import ProgressBar, make_bar
from doccls.system.descriptors import write_closing
from doccls.system.signals import (
    Interrupted,
    attributing_errors_to_stop,
    ignore_signals,
    on_immediate_exit,
    writing_closing_lines,
)

_CLOSING_LINE = ">> Stopping logger and restoring stdio"


def open_log(path: Path) -> IO[str]:
    """Open the log file to append to it, and create its folder.

    Raises:
        UserError: that is impossible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except (OSError, ValueError) as error:
        problem = find_output_problem(path.parent) or describe_error(error, path, "file")
        raise UserError(f"output.logs_dir: can't write {path}: {problem}") from error


class _Tee:
    """A text stream that writes to a log file and its console, and delegates everything else to the console."""

    def __init__(self, console: ConsoleStream, log: "RunLog") -> None:
        self._console = console
        self._log = log

    def write(self, text: str) -> int:
        self._log.write_file(text)
        self._log.write_console(text, self._console)
        if text.endswith("\n"):
            self._log.report_lost_console()
        return len(text)

    def flush(self) -> None:
        self._console.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)


class RunLog:
    """Context manager that logs everything printed, between `>> Logger started` and `>> Stopping logger`.

    Only the main process has a log that writes; the others use `RunLog(None)`, which is silent.
    An exception in the block is logged with its traceback and the exit marker, and then propagates.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.opened = False
        self.error: BaseException | None = None  # the error that ended the block, as logged
        self.ending, self.closing_message = "TRAINING SUCCESS", "training finished successfully"
        self._file: IO[str] | None = None
        self._progress: Progress | None = None
        self._footer: Footer | None = None
        self._stdio: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)  # before the log was opened
        self._consoles: tuple[ConsoleStream, ConsoleStream]  # while it is open
        self._pending = ""
        self._failed = False  # whether the file could not be written, as on a full disk; the run continues
        self._while_open = ExitStack()

    @contextmanager
    def writing_to(self, path: Path | None) -> Iterator[None]:
        """Write the log to `path` within the block; errors after a stop request are logged as that stop."""
        self.path = path
        with self, attributing_errors_to_stop():
            yield

    def __enter__(self) -> Self:
        if self.path is not None:
            self._file = open_log(self.path)
            self.opened = True
            self._stdio = (sys.stdout, sys.stderr)
            self._consoles = wrap_stream(sys.stdout, "stdout"), wrap_stream(sys.stderr, "stderr")
            sys.stdout, sys.stderr = (_Tee(console, self) for console in self._consoles)
            self.line(f">> Logger started: {self.path}")
            self._while_open.enter_context(on_immediate_exit(self._end_immediately))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            ignore_signals()  # a later signal can no longer change the exit code
        if self._file is None:
            return
        with writing_closing_lines():
            self._write_end(kind, error, trace)
            self._while_open.close()
        sys.stdout, sys.stderr = self._stdio
        with suppress(OSError):  # full disk
            self._file.close()
        self._file = None

    def _write_end(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self.error = error
        if error is None:
            self.line(f"[EXIT] {self.ending} code=0")
        else:
            # A requested stop needs no traceback, unless it led to an error.
            has_traceback = not isinstance(error, Interrupted) or error.__cause__ is not None
            text = "".join(traceback.format_exception(kind, error, trace)) if has_traceback else f"{error}\n"
            if isinstance(error, UserError | Interrupted):  # the console gets only the message, as its closing line
                self.write_file(text)
            else:
                sys.stderr.write(text)
            self.line(render_exit(exit_code(error)))
        self.line(_CLOSING_LINE)

    def _end_immediately(self, reason: str, code: int) -> None:
        """Write the reason and the closing lines past all buffers: the process exits with its main thread anywhere."""
        assert self._file is not None
        closing = f"{render_exit(code)}\n{_CLOSING_LINE}\n"
        with suppress(OSError):
            os.write(self._file.fileno(), f"{reason}\n{closing}".encode())
        if self._progress is not None:
            closing = f"\x1b[?25h\n{closing}"  # the bar has hidden the cursor
        with suppress(OSError, ValueError):  # a stream without a descriptor
            write_closing(self._consoles[0].fileno(), closing)

    def end_as(self, marker: str, message: str) -> None:
        """Set the exit marker, such as `SUBMITTED`, and the closing message of a success other than a trained run."""
        self.ending, self.closing_message = marker, message

    def line(self, text: str) -> None:
        """Write one line (or block) to the console and the file."""
        if self._file is not None:
            print(text)

    def write_file(self, text: str) -> None:
        """Write text from a `_Tee` to the file unchanged."""
        if self._file is None:  # a library may use the stream after the log has ended
            return
        try:
            self._file.write(text)
        except OSError as error:
            if not self._failed:
                self._failed = True
                self._consoles[1].write(f"[WARNING] {self.path}: {error.strerror}; continuing without this log file\n")

    def report_lost_console(self) -> None:
        """Write to the file, once, that stdout or stderr takes no output."""
        for console in self._consoles:
            problem = console.take_problem()
            if problem is not None:
                self.write_file(f"[WARNING] {console.name}: {problem}; continuing: this file has everything\n")

    def write_console(self, text: str, console: ConsoleStream) -> None:
        """Write text from a `_Tee` to the console, above the progress bar or the footer if there is one."""
        if self._progress is None:
            if self._footer is not None and console.isatty():
                self._footer.write(text)
            else:
                console.write(text)
            return
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._progress.console.print(Text(line), soft_wrap=True)

    def detail(self, text: str) -> None:
        """Write a line to the file, and to the console unless a progress bar shows the same there."""
        if self._file is None:
            return
        if self._progress is not None:
            self.write_file(text + "\n")
        else:
            print(text)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[ProgressBar]:
        """Show a progress bar while the block runs, if the console is a terminal."""
        if self._file is None or not self._consoles[1].isatty():
            yield ProgressBar(None)
            return
        with ExitStack() as shown:
            if self._footer is not None:
                shown.enter_context(self._footer.hidden())
            bar = shown.enter_context(make_bar(Console(file=cast(TextIO, self._consoles[1])), what, total))
            self._progress = bar
            try:
                yield ProgressBar(bar)
            finally:
                self._progress = None
                if self._pending:
                    self._consoles[0].write(self._pending)
                    self._pending = ""

    @contextmanager
    def footer(self) -> Iterator[Footer | None]:
        """Keep lines at the bottom of the console while the block runs; None if no terminal can show them."""
        if self._file is None or not can_redraw(self._consoles[0], os.environ):
            yield None
            return
        self._footer = footer = Footer(self._consoles[0])
        try:
            yield footer
        finally:
            self._footer = None
            footer.close()
