"""Files that are whole whenever they exist: written beside, synced, and renamed into place."""

import errno
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from doccls.errors import UserError
from doccls.system.signals import at_sudden_end

_MENDABLE = {
    number
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG", "EISDIR", "ENOTDIR", "ENAMETOOLONG")
    if (number := getattr(errno, name, None)) is not None
}
"""What a user has to see to; other errors, such as a network file system's, may be gone the next time."""


class WriteError(UserError, OSError):
    """A file can't be written: the disk is full, read-only, ...; the message says which, why, and the errno."""


@contextmanager
def replacing(path: Path, durable: bool = True, by: str | None = None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well; if it does not, `path` stays as it was.

    Not `durable`, it is whole for whoever reads it, but a power cut may take it. `by` names the writer of a file that
    several write, so that its own leftovers can be told from what others are writing now.

    Raises:
        WriteError: no room, no right, ...; what was half written is gone.
        OSError: another error of the file system; it names the path.
    """
    beside = path.with_name(f".{path.name}.{f'{by}.' if by else ''}{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with at_sudden_end(lambda reason, code: beside.unlink(missing_ok=True)):
            with beside.open("wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            beside.replace(path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise _name_path(error, path) from error
        raise


def remove_leftovers(path: Path, by: str | None = None) -> None:
    """What processes that were killed had written beside `path`; nobody, or not that writer, may be writing it now."""
    for beside in path.parent.glob(f".{glob.escape(path.name)}.{f'{by}.' if by else ''}*.tmp"):
        beside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, by: str | None = None) -> None:
    """`content` as `path`, whole; `by` as for `replacing`."""
    with replacing(path, by=by) as file:
        file.write(content)


def write_text(path: Path, text: str, by: str | None = None) -> None:
    """`text` in UTF-8 as `path`, whole; `by` as for `replacing`."""
    write_bytes(path, text.encode(), by)


def write_once(path: Path, text: str) -> str:
    """`text` as `path`, whole, if nothing is there yet; of several that come at once, one writes. What stands there.

    Raises:
        OSError: no room, no right, ...
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_text(beside, text)
        with suppress(FileExistsError):
            os.link(beside, path)  # unlike a rename it replaces nothing
    finally:
        beside.unlink(missing_ok=True)
    return path.read_text(encoding="utf-8")


def write_array(path: Path, array: np.ndarray) -> None:
    """`array` as the .npy file `path`, whole; the same array gives the same bytes."""
    with replacing(path) as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)


def _name_path(error: OSError, path: Path) -> OSError:
    """A write call's own error does not say of which file."""
    if error.errno in _MENDABLE:
        return WriteError(f"can't write {path}: {error.strerror} (errno {error.errno})")
    return OSError(error.errno, error.strerror, str(path))


def _sync_folder(folder: Path) -> None:
    """A rename lasts only once the folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
