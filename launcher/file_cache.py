"""What files say, read again only once a file has changed: watchers look at many files every second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")
_State = tuple[int, int, int] | None


class FileCache:
    """The values that were read from files, by path and reader."""

    def __init__(self) -> None:
        self._values: dict[tuple[Path, Callable[[Path], Any]], tuple[_State, Any]] = {}

    def read(self, path: Path, reader: Callable[[Path], _T]) -> _T:
        """Return `reader(path)`, or what it returned before if the file's time, size and inode are the same.

        Files are replaced, never changed in place, so an equal state is an equal file.
        """
        state = _read_state(path)
        kept = self._values.get((path, reader))
        if kept is not None and kept[0] == state:
            value: _T = kept[1]
            return value
        value = reader(path)
        self._values[(path, reader)] = (state, value)
        return value


def _read_state(path: Path) -> _State:
    """Return what changes with the file; None if there is none."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino
