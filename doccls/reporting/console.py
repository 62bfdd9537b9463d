"""The console: whether it is closed, broken, full, stuck or lacks a character, it never ends or delays a run."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from doccls.system.descriptors import discard_output, is_ready, open_missing_descriptors, write_within
from doccls.system.signals import Interrupted

# How long all writes to a console may wait for its reader, in total. Afterwards, what does not fit at once is skipped.
PATIENCE_S = 5.0
# The exit code of a program that is killed since the reader of its output is gone, as most programs are.
_BROKEN_PIPE = 128 + getattr(signal, "SIGPIPE", 13)
_BUFFER_CHARACTERS = 8192  # of an unfinished line
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.ETIMEDOUT)  # after other errors a console never takes output again


class ConsoleStream:
    """A text stream on a console. Output that the console does not take is skipped, whatever the reason.

    It writes complete lines, or what there is when it is flushed, straight to the descriptor; those of a notebook's or
    a logger's stream, whose descriptor may be another console, through that stream. Characters that the encoding lacks
    are escaped. All other attributes are those of the original stream.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        """Write to `stream`; `name` is that of the console in messages."""
        self.name = name
        self.patience_s: float | None = PATIENCE_S  # what is left of it; None waits for the reader without a limit
        self.error: Exception | None = None  # of the first write that failed
        self._stream = stream
        self._reported = False
        self._unwritten, self._skipped_lines = "", 0
        self._lock = threading.RLock()  # reentrant: a finalizer may print anywhere
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()

    def write(self, text: str) -> int:
        """Write the text once its line is complete."""
        with self._lock:
            self._unwritten += text
            if "\n" in text or len(self._unwritten) > _BUFFER_CHARACTERS:
                self.flush()
        return len(text)

    def flush(self) -> None:
        """Write what was not written yet."""
        with self._lock:
            text, self._unwritten = self._unwritten, ""
            if not text:
                return
            notice = f"\n[WARNING] {self._skipped_lines} lines are missing here\n" if self._skipped_lines else ""
            try:
                self._write(notice + text)
            except Exception as error:  # noqa: BLE001 (the stream may be of any class)
                self._skipped_lines += text.count("\n")
                self._lose(error)
            else:
                self._skipped_lines = 0

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """Return whether the console is a terminal; one that is lost is none."""
        with suppress(OSError, ValueError, AttributeError):
            return self._stream.isatty()
        return False

    def is_ready(self) -> bool:
        """Return whether the console takes output now; nobody knows that of a stream without a descriptor."""
        with suppress(OSError, ValueError):
            descriptor = self._find_descriptor()
            return descriptor is None or is_ready(descriptor, 0.0)
        return False

    def close(self) -> None:
        """Flush: a closed descriptor would be reused by the next file."""
        self.flush()

    def take_problem(self) -> str | None:
        """Return why output was skipped, the first time that this is called after it happened."""
        if self.error is None or self._reported:
            return None
        self._reported = True
        return str(getattr(self.error, "strerror", None) or self.error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        encoded = text.encode(encoding, "backslashreplace")
        descriptor = self._find_descriptor()
        if descriptor is None:
            self._stream.write(encoded.decode(encoding))
            with suppress(AttributeError):
                self._stream.flush()
        elif self.patience_s is None:
            write_within(descriptor, encoded, None)
        else:
            self.patience_s = max(0.0, self.patience_s - write_within(descriptor, encoded, self.patience_s))

    def _find_descriptor(self) -> int | None:
        """Return the stream's descriptor, asked for each time: a closed stream's may be that of another file by now."""
        if getattr(self._stream, "closed", False):
            raise ValueError("it was closed")
        if type(self._stream) is not io.TextIOWrapper or os.name == "nt":  # Windows: the stream translates line ends
            return None
        with suppress(OSError, ValueError):
            return self._stream.fileno()
        return None

    def _lose(self, error: Exception) -> None:
        self.error = self.error or error
        if isinstance(error, TimeoutError):
            self.patience_s = 0.0
        elif isinstance(error, OSError) and error.errno not in _PASSING:
            # So that C code and the processes that this one starts don't fail, or end by SIGPIPE, there either.
            with suppress(OSError, ValueError):
                descriptor = self._find_descriptor()
                if descriptor is not None:
                    discard_output(descriptor)


def wrap_stream(stream: TextIO | None, name: str) -> ConsoleStream:
    """Return a `ConsoleStream` on the stream, which is None if it was closed before Python started."""
    if isinstance(stream, ConsoleStream):
        return stream
    return ConsoleStream(open(os.devnull, "w") if stream is None else stream, name)  # noqa: PTH123


def wrap_console() -> None:
    """Replace stdout and stderr by streams that never fail, and open missing descriptors."""
    open_missing_descriptors()
    sys.stdout, sys.stderr = wrap_stream(sys.stdout, "stdout"), wrap_stream(sys.stderr, "stderr")


@contextmanager
def guarding_console() -> Iterator[None]:
    """Let no console fail a command, which is the block: each command starts with it, before it parses its arguments.

    The original streams are empty afterwards: with unwritten output, Python would exit with code 120.
    """
    earlier = sys.stdout, sys.stderr
    wrap_console()
    try:
        yield
    except SystemExit as end:  # of argparse, which has printed the help or what is wrong with the arguments
        console = sys.stdout
        if not end.code and isinstance(console, ConsoleStream) and (code := report_lost_output("doccls", console)):
            raise SystemExit(code) from end
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = earlier


def report_lost_output(name: str, console: ConsoleStream) -> int:
    """Return the exit code of a command that only prints, 0 if it has printed everything, and say what prevented it."""
    console.flush()
    if console.error is None:
        return 0
    if isinstance(console.error, BrokenPipeError):
        return _BROKEN_PIPE
    print(f"{name}: {console.name}: {console.take_problem()}", file=sys.stderr)
    return 1


def render_exit(code: int) -> str:
    """Return the exit marker of a run that did not succeed."""
    return f"[EXIT] TRAINING ERROR code={code}"


def exit_code(error: BaseException) -> int:
    """Return the process's exit code after `error`: 128 plus the signal number after a signal, else 1."""
    if isinstance(error, Interrupted):
        return error.exit_code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
