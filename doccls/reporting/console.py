"""The closing lines on a console that may be closed or a full disk, and the exit code."""

import os
import signal
import sys
from contextlib import suppress
from typing import TextIO

from doccls.system.signals import Interrupted


def print_last(text: str, stream: TextIO | None) -> None:
    """Print a line once the log is closed; if it can't be written, it is lost and the exit code stays the same."""
    with suppress(OSError, ValueError):
        if stream is not None:
            print(text, file=stream, flush=True)


def close_console() -> None:
    """Flush or discard pending output at exit: with unwritten output, Python would exit with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # None: it was closed before Python started
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, stream.fileno())
                os.close(devnull)


def render_exit(code: int) -> str:
    """Return the exit marker of a run that did not succeed."""
    return f"[EXIT] TRAINING ERROR code={code}"


def exit_code(error: BaseException) -> int:
    """Return the process's exit code after `error`: 128 plus the signal number after a signal, else 1."""
    if isinstance(error, Interrupted):
        return error.exit_code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
