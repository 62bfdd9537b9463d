"""Atomic file writes: write to a temporary file in the same folder, sync it, and rename it into place.

Some file systems lack a part of this. Where a folder can't be synced, renames are as durable as the file system makes
them. Where a file that exists or is open can't be replaced, it is moved aside first. Hard links are not used at all.
"""

import errno
import glob
import os
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from doccls.errors import UserError
from doccls.system.disk import describe_shortage
from doccls.system.signals import on_immediate_exit

# Errors that the user has to fix; others, such as those of a network file system, may be transient.
_USER_FIXABLE_ERRNOS = {
    number
    for name in (
        "ENOSPC",
        "EDQUOT",
        "EROFS",
        "EACCES",
        "EPERM",
        "EFBIG",
        "EISDIR",
        "ENOTDIR",
        "ENAMETOOLONG",
        "EEXIST",
        "ELOOP",
        "EBUSY",
        "ETXTBSY",
        "ENOSYS",
        "ENOTSUP",
    )
    if (number := getattr(errno, name, None)) is not None
}
# The answers of file systems on which a file that exists or is open can't be replaced: Windows shares, some FUSE.
REPLACE_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EBUSY, errno.ETXTBSY, errno.EEXIST})
# The answers of file systems that can't sync a folder, such as CIFS, 9p and some FUSE.
_FOLDER_SYNC_REFUSED = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}
)
_READER_S = 0.3  # time for the readers of a file to close it
_IN_USE_S = 10.0  # after this time, a file that can't be replaced is an error
_POLL_S = 0.05
_GAP_S = 1.0  # how long readers wait for a file that is moved aside: the gap is between two renames
_ASIDE = ".old.tmp"  # how the name of a file ends that was moved aside
_END_OF_TEMPORARY = re.compile(r"[^.]+(?:\.old)?\.tmp")  # after the name of the file, a dot and the writer's name
_ASIDE_NAME = re.compile(rf"\.(?P<name>.+)\.[^.]+{re.escape(_ASIDE)}", re.DOTALL)


class WriteError(UserError, OSError):
    """A file can't be written, as on a full or read-only disk; the message gives the path, the reason and the errno."""


@contextmanager
def replacing(
    path: Path, size_bytes: int | None = None, durable: bool = True, writer: str | None = None
) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block succeeds; if the block fails, `path` is unchanged.

    `size_bytes` is how much will be written, if it is known: a message about a full disk states it. Without `durable`,
    readers still see a complete file, but it may not survive a power cut. Where several processes write the same file,
    `writer` names this one, so that its leftovers can be told apart from writes in progress.

    Raises:
        WriteError: no disk space, no permission, ...; the partial file has been removed.
        OSError: another error of the file system; it names the path.
    """
    temporary = path.with_name(f".{path.name}.{f'{writer}-' if writer else ''}{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with on_immediate_exit(lambda reason, code: _abandon(temporary, path)):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            _move_into_place(temporary, path, waits=durable)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise _add_path(error, path, size_bytes) from error
        raise


def remove_leftovers(path: Path, writer: str | None = None) -> None:
    """Remove the temporary files of `path` that killed processes left behind; one that was moved aside is moved back.

    Nobody may be writing `path` during the call; with `writer`, only that writer may not.
    """
    start = f".{path.name}.{f'{writer}-' if writer else ''}"
    try:
        names = [name for name in os.listdir(path.parent) if name.startswith(start)]  # noqa: PTH208 (names, not paths)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    found = [path.with_name(name) for name in names if _END_OF_TEMPORARY.fullmatch(name.removeprefix(start))]
    asides = [file for file in found if file.name.endswith(_ASIDE)]
    _move_back(path, asides)
    for temporary in found:
        if temporary not in asides:
            temporary.unlink(missing_ok=True)


def restore_files(root: Path) -> None:
    """Move back each file in the folder or a subfolder that a process killed in `replacing` had moved aside.

    Others may be writing these files: a writer whose file is moved back tries again.
    """
    asides = defaultdict[Path, list[Path]](list)
    for folder, _, files in os.walk(root):  # leaves out folders that vanish meanwhile
        for file in files:
            if (name := _ASIDE_NAME.fullmatch(file)) is not None:
                asides[Path(folder) / name["name"]].append(Path(folder) / file)
    for path, found in asides.items():
        _move_back(path, found)


def read_text(path: Path) -> str:
    """Return the UTF-8 text of a file that another process may be replacing; waits while that has moved it aside.

    Raises:
        FileNotFoundError: there is no such file.
        OSError, UnicodeDecodeError: it can't be read.
    """
    return read_bytes(path).decode()


def read_bytes(path: Path) -> bytes:
    """Return the content of a file; waits as `read_text` does.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it can't be read.
    """
    start_s = time.monotonic()
    while True:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            is_aside = any(path.parent.glob(f".{glob.escape(path.name)}.*{_ASIDE}"))
            # Between the two calls, the file may have come back.
            if not path.exists() and (not is_aside or time.monotonic() - start_s >= _GAP_S):
                raise
        time.sleep(_POLL_S)


def write_bytes(path: Path, content: bytes, writer: str | None = None) -> None:
    """Write `content` to `path` atomically; `writer` as in `replacing`."""
    with replacing(path, len(content), writer=writer) as file:
        file.write(content)


def write_text(path: Path, text: str, writer: str | None = None) -> None:
    """Write `text` to `path` in UTF-8, atomically; `writer` as in `replacing`."""
    write_bytes(path, text.encode(), writer)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write `array` to the .npy file `path` atomically; equal arrays give equal bytes."""
    with replacing(path, array.nbytes) as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)


def _move_into_place(temporary: Path, path: Path, waits: bool) -> None:
    """Rename the file to `path`, also where a file that exists or is open can't be replaced.

    There it waits a little for readers to close the file (unless `waits` is false), and then moves the file aside: for
    a moment there is none.

    Raises:
        OSError: that is impossible too; an earlier file is unchanged.
    """
    start_s = time.monotonic()
    while True:
        try:
            temporary.replace(path)
            return
        except OSError as error:
            if error.errno not in REPLACE_REFUSED:
                raise
            waited_s = time.monotonic() - start_s
            if (waited_s >= _READER_S or not waits) and _exchange(temporary, path):
                return
            if waited_s >= _IN_USE_S or not waits:
                note = "; is the file open in another program?" if path.exists() else ""
                raise OSError(error.errno, f"{error.strerror}{note}") from error
        time.sleep(_POLL_S)


def _exchange(temporary: Path, path: Path) -> bool:
    """Move the file at `path` aside, rename the temporary file to `path`, and return whether both was possible.

    If the process is killed in between, `remove_leftovers` and `restore_files` move the file back. Each try has another
    name for it, since a file that can't be moved back or removed keeps its name.
    """
    aside = temporary.with_name(f"{temporary.stem}-{secrets.token_hex(2)}{_ASIDE}")
    try:
        path.rename(aside)
    except OSError:
        return False
    try:
        temporary.rename(path)
    except OSError:
        _move_back(path, [aside])
        return False
    with suppress(OSError):
        aside.unlink()
    return True


def _abandon(temporary: Path, path: Path) -> None:
    """Remove the temporary file as the process exits, and move the earlier file back if it is moved aside."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    _move_back(path, temporary.parent.glob(f"{glob.escape(temporary.stem)}-*{_ASIDE}"))


def _move_back(path: Path, asides: Iterable[Path]) -> None:
    """Move the newest of the files that were moved aside to `path` if there is none, and remove the others.

    Another process may have put its file at `path`, which is newer than all of them. If the newest can't be moved, they
    all stay.
    """
    for aside in sorted(asides, key=_read_mtime_ns, reverse=True):
        try:
            if not path.exists():
                aside.rename(path)
        except OSError:
            if not path.exists():
                return
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def _read_mtime_ns(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:  # another process has just moved it back or removed it
        return 0


def _add_path(error: OSError, path: Path, size_bytes: int | None) -> OSError:
    """Return the error with the path in its message, which the error of a write call lacks."""
    if error.errno in _USER_FIXABLE_ERRNOS:
        shortage = describe_shortage(error, path.parent, size_bytes)
        return WriteError(f"can't write {path}: {error.strerror} (errno {error.errno}){shortage}")
    return OSError(error.errno, error.strerror, str(path))


def _sync_folder(folder: Path) -> None:
    """Sync the folder to disk, where that is possible: a rename is durable only after that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _FOLDER_SYNC_REFUSED:
            raise
