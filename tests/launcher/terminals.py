"""A terminal for tests: what programs write to it, and what it shows then."""

import fcntl
import os
import re
import select
import struct
import termios
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

_TOKENS = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


def show(output: str) -> list[str]:
    """Return the lines that a terminal of any width shows after the output, without styles."""
    lines, row, column = [""], 0, 0
    for token in _TOKENS.finditer(output):
        count, code = token.groups()
        if code == "A":
            row = max(0, row - int(count or 1))
        elif code == "K":
            lines[row] = "" if count == "2" else lines[row][:column]
        elif code == "J":
            lines[row:] = [lines[row][:column]]
        elif token[0] == "\r":
            column = 0
        elif token[0] == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif code is None:
            lines[row] = lines[row].ljust(column)[:column] + token[0] + lines[row][column + len(token[0]) :]
            column += len(token[0])
    return lines


class Terminal:
    """A terminal that programs open by its name, and that records what they write."""

    def __init__(self, columns: int = 160, lines: int = 40) -> None:
        self._reader, self._writer = os.openpty()
        fcntl.ioctl(self._writer, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.name = os.ttyname(self._writer)
        self._output, self._lost = b"", threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lost.set()
        self.finish()

    @property
    def output(self) -> str:
        """What was written so far."""
        return self._output.decode()

    def stop(self) -> None:
        """Take no more output, as after Ctrl-S."""
        termios.tcflow(self._writer, termios.TCOOFF)

    def hang_up(self) -> None:
        """Go away, while programs still write."""
        self._lost.set()
        self._thread.join()

    def finish(self) -> None:
        """Read what is left, once no program has the terminal open any more."""
        with suppress(OSError):  # it was closed before
            os.close(self._writer)
        self._thread.join(10)

    def _record(self) -> None:
        with suppress(OSError):  # the last program has closed it
            while not self._lost.is_set():
                if select.select([self._reader], [], [], 0.05)[0]:
                    self._output += os.read(self._reader, 65536)
        os.close(self._reader)
