"""The console's last lines, on a console that may be a closed one, or a full disk; and the exit code."""

import os
import signal
import sys
from contextlib import suppress
from typing import TextIO

from doccls.system.signals import Interrupted


def print_last(text: str, stream: TextIO | None) -> None:
    """A line to the console once the log is closed; one that can't be written is lost, and changes no exit code."""
    with suppress(OSError, ValueError):
        if stream is not None:
            print(text, file=stream, flush=True)


def close_console() -> None:
    """At the process's end: what a full disk does not take is let go, or Python would end with exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # it was closed before Python began
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)


def render_exit(code: int) -> str:
    """The exit marker of a run that did not succeed."""
    return f"[EXIT] TRAINING ERROR code={code}"


def exit_code(error: BaseException) -> int:
    """The process's exit code after `error`: 130 and 143 after signals, else 1."""
    if isinstance(error, Interrupted):
        return error.exit_code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
