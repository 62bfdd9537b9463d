"""Files that are whole whenever they exist: written beside, synced, and renamed into place."""

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from doccls.run.signals import at_sudden_end


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well; if it does not, `path` stays as it was.

    Not `durable`, it is whole for whoever reads it, but a power cut may take it.

    Raises:
        OSError: no room, no right, ...; what was half written is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with at_sudden_end(lambda reason, code: beside.unlink(missing_ok=True)):
            with beside.open("wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """What processes that were killed had written beside `path`; nobody may be writing it now."""
    for beside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        beside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """`content` as `path`, whole."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8 as `path`, whole."""
    write_bytes(path, text.encode())


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


def _sync_folder(folder: Path) -> None:
    """A rename lasts only once the folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
