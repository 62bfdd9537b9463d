"""A lock on a piece of work, held by one process on any machine, and gone with it however it ends."""

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

import psutil

from doccls.errors import UserError

_NO_LOCKS_HERE = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
_KEEP_S = 10.0
_LOOK_S = 0.1
_WAIT_LOOK_S = 0.5
_DEAD_S = 120.0
"""A holder on another machine that has not touched its file for so long is dead."""


class LockError(UserError):
    """The lock can't be taken."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, by its own words."""

    what: str
    """Such as `run v001-abc is being launched`."""
    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"{self.what} by process {self.pid} on {self.host} since {self.since}"


class Lock:
    """A lock that is held."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept_s = time.monotonic()

    def keep(self) -> None:
        """Call often: other machines see by the file's time that its holder lives."""
        if time.monotonic() - self._kept_s >= _KEEP_S:
            self._kept_s = time.monotonic()
            with suppress(OSError):
                os.utime(self._path)


@contextmanager
def hold_lock(path: Path, what: str, takeover: bool = False, wait_s: float = 0.0) -> Iterator[Lock]:
    """Hold `path` locked within the block; another's end is waited for so long.

    The kernel's lock (flock; on NFS the server's) is what counts: it ends with the process, a kill -9 included, and the
    file that stays behind means nothing. Where a file system knows no locks, or a server keeps that of a machine that
    is gone, the file's words count: who is provably dead holds nothing, and `takeover` takes the server's lock from it.

    Raises:
        LockError: another process holds it, or its file can't be made.
    """
    file = _acquire(path, takeover, time.monotonic() + wait_s)
    with file:
        holder = Holder(what, os.getpid(), socket.gethostname(), datetime.now().isoformat(timespec="seconds"))
        file.truncate(0)
        os.write(file.fileno(), json.dumps(asdict(holder)).encode())  # no buffer that closing would write again
        try:
            yield Lock(path)
        finally:
            with suppress(OSError):
                file.truncate(0)


def find_holder(path: Path) -> Holder | None:
    """Who holds the lock; None if nobody does, or has not yet said so.

    To know, it shares in the lock for an instant if that is free.
    """
    try:
        with path.open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read_holder(path)
            except OSError as error:
                if error.errno not in _NO_LOCKS_HERE:
                    raise
                holder = _read_holder(path)
                return None if _is_dead(holder, path) else holder
            return None
    except FileNotFoundError:
        return None


def _acquire(path: Path, takeover: bool, until_s: float) -> IO[str]:
    file = _open(path)
    try:
        while not _try_lock_twice(file, path):
            holder = _read_holder(path)
            if not (takeover and _is_dead(holder, path)):
                if time.monotonic() >= until_s:
                    raise LockError(_refuse(holder, path, takeover))
                time.sleep(_WAIT_LOOK_S)
                file.close()
                file = _open(path)  # it may be another one by now
                continue
            beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            beside.touch()
            beside.replace(path)  # the dead one's lock stays with its file
            file.close()
            file = _open(path)
    except BaseException:
        file.close()
        raise
    return file


def _open(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise LockError(f"{path}: can't be made: {error.strerror} (runs lie in output.exp_dir)") from error


def _try_lock_twice(file: IO[str], path: Path) -> bool:
    """Whoever looks for the holder (`find_holder`) is in the way for an instant."""
    if _try_lock(file, path):
        return True
    time.sleep(_LOOK_S)
    return _try_lock(file, path)


def _try_lock(file: IO[str], path: Path) -> bool:
    """Whether it is ours now, and the file is still the one that others will look at."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        holder = _read_holder(path)
        return holder is None or _is_dead(holder, path)
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:  # whoever held it has removed it
        return False


def _read_holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # it has just got the lock and not yet said who it is
        return None


def _is_dead(holder: Holder | None, path: Path) -> bool:
    """Proven: its process is not there, or, on another machine, it has long ceased to touch its file."""
    if holder is None:
        return False
    if holder.host == socket.gethostname():
        return not psutil.pid_exists(holder.pid)
    return _tell_age_s(path) > _DEAD_S


def _tell_age_s(path: Path) -> float:
    """Since the file was touched, by the clock of whoever keeps the files."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        beside.touch()
        return beside.stat().st_mtime - path.stat().st_mtime
    finally:
        beside.unlink(missing_ok=True)


def _refuse(holder: Holder | None, path: Path, takeover: bool) -> str:
    who = str(holder) if holder else "another process has just begun to work on it"
    if takeover:
        return f"{who} ({path}), and it is not proven dead: end it there"
    return f"{who} ({path}): end it first. If that machine is gone, and its lock is not, add --takeover"
