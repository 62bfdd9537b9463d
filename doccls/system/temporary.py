"""Temporary folders, and the folder of sockets, whatever TMPDIR says.

The path of a socket has at most 107 bytes (unix(7)), and batch systems set TMPDIR to paths that long.
"""

import functools
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import util
from pathlib import Path

from doccls.errors import RankLocalError

_COMPILER_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_UNQUOTABLE = re.compile(r"[\s'\"\\]")
_SHORT_FOLDERS = ("/tmp", "/dev/shm", "/var/tmp")
# What multiprocessing creates for its sockets, of the same length: `pymp-********/listener-********`.
_PREFIX, _SOCKET_NAME = "pymp-", "listener-12345678"


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield a new folder for files of this machine; it is removed with its content after the block.

    Raises:
        RankLocalError: no folder for temporary files can be written to.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as error:
        raise RankLocalError(
            f"no folder for temporary files can be written to ({_describe_tmpdir()}): {error.strerror}. "
            "Set TMPDIR to a folder on this machine that has space and that you may write to"
        ) from error
    with folder as path:
        yield Path(path)


@functools.cache
def place_sockets() -> None:
    """Have multiprocessing create its sockets, also those of processes started later, where a socket can be bound.

    Raises:
        RankLocalError: there is no such folder.
    """
    earlier = tempfile.tempdir
    tempfile.tempdir = str(choose_socket_folder())
    try:
        util.get_temp_dir()  # creates its folder once, for this process and those that it starts
    finally:
        tempfile.tempdir = earlier


def choose_socket_folder() -> Path:
    """Return the folder of temporary files or, if sockets can't be bound in it, another one.

    Raises:
        RankLocalError: there is none; says what is wrong with each.
    """
    problems = []
    try:
        usual = tempfile.gettempdir()
    except OSError:
        usual = None
        problems.append(f"{_describe_tmpdir()}: can't be written to")
    for folder in dict.fromkeys(filter(None, (usual, *_SHORT_FOLDERS))):
        problem = _try_socket(folder)
        if problem is None:
            return Path(folder)
        problems.append(f"{folder}: {problem}")
    raise RankLocalError(
        f"no folder can hold the sockets of loader workers ({'; '.join(problems)}). Set TMPDIR to a local folder with "
        "a short path that you may write to, or data.num_workers to 0"
    )


def avoid_spaces() -> None:
    """Use another folder for temporary files if the path of this one has spaces or quotes.

    Compilers need it: torch passes them file names without quoting. Without another folder, nothing changes.
    """
    earlier = tempfile.gettempdir()
    usable = [folder for folder in _SHORT_FOLDERS if _try_socket(folder) is None]
    if usable and _UNQUOTABLE.search(earlier):
        tempfile.tempdir = os.environ["TMPDIR"] = usable[0]
        if os.environ.get(_COMPILER_CACHE, "").startswith(earlier):  # torch sets it as it is imported
            del os.environ[_COMPILER_CACHE]


def _try_socket(folder: str) -> str | None:
    """Bind a socket as multiprocessing will; return why that is impossible."""
    if not hasattr(socket, "AF_UNIX"):  # Windows, where named pipes do without folders
        return None
    try:
        with (
            tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder) as trial,
            socket.socket(socket.AF_UNIX) as listener,
        ):
            listener.bind(os.path.join(trial, _SOCKET_NAME))  # noqa: PTH118 (as text, of which the length counts)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _describe_tmpdir() -> str:
    stated = os.environ.get("TMPDIR")
    return f"TMPDIR={stated}" if stated else "TMPDIR is not set"
