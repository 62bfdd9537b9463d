"""Lines at the bottom of a terminal that are redrawn in place, while other output scrolls by above them."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from doccls.reporting.console import ConsoleStream
from doccls.system.signals import stop_requested

_NO_CURSOR = ("dumb", "unknown")  # terminals that can't move it
_FALLBACK_SIZE = (80, 24)
_CONFIRMATION_S = 0.5  # how long the message that confirms a signal may take to be written


def can_redraw(console: ConsoleStream, environment: Mapping[str, str]) -> bool:
    """Return whether the console is a terminal on which earlier lines can be replaced."""
    return console.isatty() and environment.get("TERM", "dumb") not in _NO_CURSOR


def render_redraw(before: int, lines: Sequence[str]) -> str:
    """Return the text that replaces the `before` lines above the cursor by these; pure."""
    drawn = "".join(f"{line}\x1b[K\n" for line in lines)
    return f"{_move_up(before)}{drawn}\x1b[J"


def _move_up(lines: int) -> str:
    return f"\r\x1b[{lines}A" if lines else "\r"


class Footer:
    """Lines at the bottom of a terminal; any thread may draw them.

    A terminal that takes no output at the moment, as after Ctrl-S, is left alone; one that loses output gets no lines
    any more. So the lines delay other output no longer than its console allows.
    """

    def __init__(self, console: ConsoleStream) -> None:
        self._console = console
        self._lines: list[str] = []
        self._drawn = 0  # lines of the footer above the cursor
        self._hidden = self._closed = self._stopping = False
        self._quiet_until_s = float("-inf")  # draw nothing before this time
        self._pending = ""  # of an unfinished line of other output
        self._lock = threading.RLock()

    def measure(self) -> tuple[int, int]:
        """Return the columns and lines of the terminal."""
        with suppress(OSError, ValueError, AttributeError):
            columns, lines = os.get_terminal_size(self._console.fileno())
            if columns > 0 and lines > 0:  # a terminal that nobody has sized has 0
                return columns, lines
        return _FALLBACK_SIZE

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines, none of which is wider than the terminal, in place of the last ones."""
        with self._lock:
            self._lines = list(lines)
            self._make_room_for_confirmation()
            if self._can_draw() and self._console.is_ready():
                self._redraw()

    def write(self, text: str) -> None:
        """Write other output above the lines, once its line is complete."""
        with self._lock:
            complete, newline, self._pending = (self._pending + text).rpartition("\n")
            if not newline:
                return
            self._make_room_for_confirmation()
            if not self._drawn:
                self._console.write(complete + newline)
                return
            self._console.write(f"{_move_up(self._drawn)}\x1b[J{complete}{newline}")
            self._drawn = 0
            if self._can_draw():
                self._redraw()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Show nothing within the block, such as while a progress bar is shown."""
        with self._lock:
            self._erase()
            self._hidden = True
        try:
            yield
        finally:
            with self._lock:
                self._hidden = False

    def close(self, erase: bool = True) -> None:
        """End the lines, which stay if they are not erased; a thread that still draws draws nothing."""
        with self._lock:
            if erase:
                self._erase()
            self._closed = True
            if self._pending:
                self._console.write(self._pending)
                self._pending = ""

    def _make_room_for_confirmation(self) -> None:
        """Leave the lines where they are once a stop is requested, and draw new ones a moment later.

        Another thread confirms the signal below them, past this class and at any time around the request.
        """
        if not self._stopping and stop_requested() is not None:
            self._stopping, self._drawn = True, 0
            self._quiet_until_s = time.monotonic() + _CONFIRMATION_S

    def _can_draw(self) -> bool:
        if self._hidden or self._closed or self._console.error is not None:
            return False
        return time.monotonic() >= self._quiet_until_s

    def _redraw(self) -> None:
        self._console.write(render_redraw(self._drawn, self._lines))
        self._console.flush()
        self._drawn = len(self._lines)

    def _erase(self) -> None:
        if self._drawn and self._console.error is None:
            self._console.write(render_redraw(self._drawn, ()))
            self._console.flush()
        self._drawn = 0
