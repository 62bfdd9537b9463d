"""File systems that lack a call, imitated in Python: it fails in the launcher and in all ranks forked from it."""

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

REFUSED = "refused.txt"
# The calls, and what file systems without them answer.
ANSWERS = {
    "hard link": ("EPERM", "EOPNOTSUPP", "ENOSYS", "EMLINK", "EXDEV"),
    "sync of a folder": ("EINVAL", "ENOTSUP", "EACCES", "EBADF", "ENOSYS"),
    "rename over a file": ("EACCES", "EBUSY", "ETXTBSY", "EPERM"),
    "flock": ("ENOLCK", "ENOSYS"),
    "mmap": ("ENODEV", "EINVAL"),
    "setting times": ("EPERM",),
    "setting permissions": ("EPERM",),
}


def refuse(refusal: str) -> None:
    """Let a call of ANSWERS fail in this process and its forks from now on; `refusal` is such as `mmap: ENODEV`.

    Each failure is noted in the file REFUSED of the folder DOCCLS_TEST_FOLDER.
    """
    refused, name = refusal.split(": ")
    number = getattr(errno, name)
    match refused:
        case "hard link":
            _replace(os, "link", number, _always)
        case "sync of a folder":
            _replace(os, "fsync", number, lambda descriptor: stat.S_ISDIR(os.fstat(descriptor).st_mode))
        case "rename over a file":  # also over one that is not open
            _replace(os, "replace", number, _exists)
            _replace(os, "rename", number, _exists)
        case "flock":
            _replace(fcntl, "flock", number, _always)
        case "mmap":
            _replace(mmap, "mmap", number, lambda descriptor, *others: descriptor != -1)
        case "setting times":
            _replace(os, "utime", number, _always)
        case "setting permissions":
            _replace(os, "chmod", number, _always)
            _replace(os, "fchmod", number, _always)
        case _:
            raise AssertionError(refused)


def _exists(source: Any, target: Any) -> bool:
    return Path(target).exists()


def _always(*arguments: Any) -> bool:
    return True


def _replace(module: Any, name: str, number: int, applies: Callable[..., bool]) -> None:
    setattr(module, name, partial(_call_or_fail, getattr(module, name), number, applies))


def _call_or_fail(
    call: Callable[..., Any], number: int, applies: Callable[..., bool], *arguments: Any, **options: Any
) -> Any:
    if applies(*arguments):
        with (Path(os.environ["DOCCLS_TEST_FOLDER"]) / REFUSED).open("a") as file:
            file.write(f"{arguments[:2]}\n")
        raise OSError(number, os.strerror(number), *map(str, arguments[:1]))
    return call(*arguments, **options)
