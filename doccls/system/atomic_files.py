"""Atomic file writes: write to a temporary file in the same folder, sync it, and rename it into place."""

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
    )
    if (number := getattr(errno, name, None)) is not None
}


class WriteError(UserError, OSError):
    """A file can't be written, as on a full or read-only disk; the message gives the path, the reason and the errno."""


@contextmanager
def replacing(path: Path, durable: bool = True, writer: str | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block succeeds; if the block fails, `path` is unchanged.

    Without `durable`, readers still see a complete file, but it may not survive a power cut. Where several processes
    write the same file, `writer` names this one, so that its leftovers can be told apart from writes in progress.

    Raises:
        WriteError: no disk space, no permission, ...; the partial file has been removed.
        OSError: another error of the file system; it names the path.
    """
    temporary = path.with_name(f".{path.name}.{f'{writer}.' if writer else ''}{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with on_immediate_exit(lambda reason, code: temporary.unlink(missing_ok=True)):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise _add_path(error, path) from error
        raise


def remove_leftovers(path: Path, writer: str | None = None) -> None:
    """Remove the temporary files of `path` that killed processes left behind.

    Nobody may be writing `path` during the call; with `writer`, only that writer may not.
    """
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.{f'{writer}.' if writer else ''}*.tmp"):
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, writer: str | None = None) -> None:
    """Write `content` to `path` atomically; `writer` as in `replacing`."""
    with replacing(path, writer=writer) as file:
        file.write(content)


def write_text(path: Path, text: str, writer: str | None = None) -> None:
    """Write `text` to `path` in UTF-8, atomically; `writer` as in `replacing`."""
    write_bytes(path, text.encode(), writer)


def write_once(path: Path, text: str) -> str:
    """Write `text` to `path` atomically unless the file exists; return its content. The first writer wins.

    Raises:
        OSError: no disk space, no permission, ...
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_text(temporary, text)
        with suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename, a link never replaces a file
    finally:
        temporary.unlink(missing_ok=True)
    return path.read_text(encoding="utf-8")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write `array` to the .npy file `path` atomically; equal arrays give equal bytes."""
    with replacing(path) as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)


def _add_path(error: OSError, path: Path) -> OSError:
    """Return the error with the path in its message, which the error of a write call lacks."""
    if error.errno in _USER_FIXABLE_ERRNOS:
        return WriteError(f"can't write {path}: {error.strerror} (errno {error.errno})")
    return OSError(error.errno, error.strerror, str(path))


def _sync_folder(folder: Path) -> None:
    """Sync the folder to disk: a rename is durable only after that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
