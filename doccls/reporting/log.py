"""The run's log: tagged lines on console and file, everything printed teed into the file, the end always marked."""

import errno
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TextIO

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from doccls.errors import UserError
from doccls.reporting.console import exit_code, render_exit
from doccls.reporting.progress import ProgressBar, make_bar
from doccls.system.signals import Interrupted, at_sudden_end, ignore_signals, naming_one_cause, writing_last_lines

_LAST_LINE = ">> Stopping logger and restoring stdio"
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""What writing says to a terminal that was closed (SIGHUP stops the run in good order) and to a full disk."""


@contextmanager
def _allowing_loss() -> Iterator[None]:
    """A console that can't take any more ends nothing: the log file has it all."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LOST:
            raise


class _Tee:
    """A text stream to a log file and on to its console, which answers whatever else is asked of it."""

    def __init__(self, console: TextIO, log: "RunLog") -> None:
        self._console = console
        self._log = log

    def write(self, text: str) -> int:
        self._log.keep(text)
        with _allowing_loss():
            self._log.show(text, self._console)
            if text.endswith("\n"):  # a pipe's reader (a Slurm output file, say) sees each line when it is written
                self._console.flush()
        return len(text)

    def flush(self) -> None:
        with _allowing_loss():
            self._console.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._console, name)


class RunLog:
    """As a context manager: from `>> Logger started` to `>> Stopping logger`, and between them all that is printed.

    Only the main process has one that writes; the others get `RunLog(None)`, which is silent.
    An exception that leaves the block is written with its traceback, then the exit marker, and goes on.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.opened = False
        self.error: BaseException | None = None
        """What ended it, and is written in it."""
        self.ending, self.last_words = "TRAINING SUCCESS", "training finished successfully"
        """The exit marker of a good end, and what the console says of it."""
        self._file: IO[str] | None = None
        self._progress: Progress | None = None
        self._stdio: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)
        self._pending = ""
        self._failed = False
        """Whether the file could not be written, as on a full disk: the run goes on."""
        self._while_open = ExitStack()

    @contextmanager
    def writing_to(self, path: Path | None) -> Iterator[None]:
        """Open it there for the block; whatever breaks after a stop was asked for is written as that stop."""
        self.path = path
        with self, naming_one_cause():
            yield

    def __enter__(self) -> Self:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            except OSError as error:
                raise UserError(f"output.logs_dir: can't write {self.path}: {error.strerror}") from error
            self.opened = True
            self._stdio = (sys.stdout, sys.stderr)
            sys.stdout, sys.stderr = _Tee(sys.stdout, self), _Tee(sys.stderr, self)
            self.line(f">> Logger started: {self.path}")
            self._while_open.enter_context(at_sudden_end(self._end_suddenly))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            ignore_signals()  # the end is decided, and with it the exit code
        if self._file is None:
            return
        with writing_last_lines():
            self._write_end(kind, error, trace)
            self._while_open.close()
        sys.stdout, sys.stderr = self._stdio
        with suppress(OSError):  # a full disk
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
            # A stop that was asked for is no error to trace, unless something broke on the way out.
            traced = not isinstance(error, Interrupted) or error.__cause__ is not None
            text = "".join(traceback.format_exception(kind, error, trace)) if traced else f"{error}\n"
            if isinstance(error, UserError | Interrupted):  # the console gets the message alone, at its very end
                self.keep(text)
            else:
                sys.stderr.write(text)
            self.line(render_exit(exit_code(error)))
        self.line(_LAST_LINE)

    def _end_suddenly(self, reason: str, code: int) -> None:
        """The process is about to end, its main thread anywhere: past all buffers, the reason and the last lines."""
        assert self._file is not None
        marks = f"{render_exit(code)}\n{_LAST_LINE}\n"
        with suppress(OSError):
            os.write(self._file.fileno(), f"{reason}\n{marks}".encode())
        if self._progress is not None:
            marks = f"\x1b[?25h\n{marks}"  # the bar had hidden the cursor
        with suppress(ValueError):  # a stream without descriptor
            os.write(self._stdio[0].fileno(), marks.encode())

    def end_as(self, marker: str, last_words: str) -> None:
        """A good end that is not a trained run: its marker, such as `SUBMITTED`, and what the console says of it."""
        self.ending, self.last_words = marker, last_words

    def line(self, text: str) -> None:
        """One line (or block) to the console and the file."""
        if self._file is not None:
            print(text)

    def keep(self, text: str) -> None:
        """What `_Tee` passes on, to the file as it is."""
        if self._file is None:  # a library may keep the stream beyond the log's end
            return
        try:
            self._file.write(text)
        except OSError as error:
            if not self._failed:
                self._failed = True
                with suppress(OSError):
                    self._stdio[1].write(f"[WARNING] {self.path}: {error.strerror}: it goes on without its log\n")

    def show(self, text: str, console: TextIO) -> None:
        """The same to the console, above the progress bar, if there is one."""
        if self._progress is None:
            console.write(text)
            return
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._progress.console.print(Text(line), soft_wrap=True)

    def detail(self, text: str) -> None:
        """A line that a terminal's progress bar stands for: to the file always, to the console if it is no terminal."""
        if self._file is None:
            return
        if self._progress is not None:
            self.keep(text + "\n")
        else:
            print(text)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[ProgressBar]:
        """A bar while the block runs, if the console is a terminal; otherwise nothing."""
        if self._file is None or not self._stdio[1].isatty():
            yield ProgressBar(None)
            return
        with make_bar(Console(file=self._stdio[1]), what, total) as bar:
            self._progress = bar
            try:
                yield ProgressBar(bar)
            finally:
                self._progress = None
                if self._pending:
                    self._stdio[0].write(self._pending)
                    self._pending = ""
