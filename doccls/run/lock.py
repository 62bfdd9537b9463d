"""A lock on a piece of work, held by one process on any machine, and gone with it however it ends."""

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
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
"""A holder that can't be seen from here and has not touched its file for so long is dead."""
_PROOF_S = _DEAD_S + 30.0
"""How long a takeover waits for the proof; clocks of servers are coarse."""


class LockError(UserError):
    """The lock can't be taken, or was lost."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, by its own words."""

    what: str
    """Such as `run v001-abc is being launched`."""
    pid: int
    host: str
    since: str
    boot: str = ""
    """Of the machine, an ID that is new after each start; empty where the system has none."""
    namespace: str = ""
    """In which the PID counts: each container has its own."""
    started: str = ""
    """When the process did, by its machine: another process may have its PID later."""
    token: str = ""
    """Of this one acquisition."""

    def __str__(self) -> str:
        return f"{self.what} by process {self.pid} on {self.host} since {self.since}"


class Lock:
    """A lock that is held."""

    def __init__(self, file: Path, path: Path, holder: Holder) -> None:
        """`file` holds the holder's words."""
        self._file, self._path, self._holder = file, path, holder

    def check(self) -> None:
        """Call before a write that only the holder may make.

        Raises:
            LockError: another process has taken the lock, as from one that was long suspended, or its file is gone.
        """
        holder = _read_holder(self._file)
        if holder is None and self._file.exists():
            return  # the file server did not answer well; that is no other holder
        if holder is None or holder.token != self._holder.token:
            taken = f"{holder} ({self._path})" if holder else f"{self._path} was removed"
            raise LockError(f"{taken}: this process held it, was suspended for long, and is no longer to write")


@contextmanager
def hold_lock(path: Path, what: str, wait_s: float = 0.0) -> Iterator[Lock]:
    """Hold `path` locked within the block; another's end is waited for so long.

    The kernel's lock (flock; on NFS the server's) is what counts: it ends with the process, a kill -9 included, and the
    file that stays behind means nothing. A server may keep the lock of a machine that is gone: it is taken from one
    that is provably dead. Where its process can't be seen from here, that proof is waited for, two and a half minutes
    at most. Where a file system has no locks, a second file, `<path>.owner`, which only one process can create, stands
    for it.

    Raises:
        LockError: another process holds it, or its file can't be made.
    """
    holder = _describe_self(what)
    file, words = _acquire(path, holder, time.monotonic() + wait_s)
    done = threading.Event()
    threading.Thread(target=_touch, args=(words, holder, done), name="doccls-lock", daemon=True).start()
    with file:
        try:
            yield Lock(words, path, holder)
        finally:
            done.set()
            with suppress(OSError):
                if words == path:
                    file.truncate(0)
                elif _holds(holder, words):
                    words.unlink()


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
                owner = _name_owner(path)
                holder = _read_holder(owner)
                return None if _is_dead(holder, owner) else holder
            return None
    except FileNotFoundError:
        return None


def _touch(file: Path, holder: Holder, done: threading.Event) -> None:
    """Other machines see by the file's time that its holder lives, and is not suspended."""
    while not done.wait(_KEEP_S):
        with suppress(OSError):
            if _holds(holder, file):  # it may be the file of one that has taken the lock
                os.utime(file)


# --- taking it -------------------------------------------------------------------------------------------------------


def _acquire(path: Path, holder: Holder, until_s: float) -> tuple[IO[str], Path]:
    """The open file of the lock, and the file with the holder's words."""
    file, began_s, seen = _open(path), time.monotonic(), None
    dead_before: Holder | None = None
    try:
        while (words := _try_lock_twice(file, path, holder)) is None:
            where = _find_words(path)
            other, touched = _read_holder(where), _read_time(where)
            seen = seen or touched
            unproven = not can_see(other) and touched == seen and time.monotonic() - began_s < _PROOF_S
            dead = other if where == path and _is_dead(other, path) else None
            if dead is not None and dead == dead_before:
                _replace(path, "")  # the dead one's lock stays with its file
            elif dead is None and time.monotonic() >= until_s and not unproven:
                who = str(other) if other else "another process has just begun to work on it"
                raise LockError(f"{who} ({path}), and it lives: end it there, or wait for it")
            else:
                time.sleep(_WAIT_LOOK_S)
            dead_before = (
                dead  # seen once, the words may be those before a living holder's, which is about to write its own
            )
            file.close()
            file = _open(path)  # it may be another one by now
    except BaseException:
        file.close()
        raise
    return file, words


def _find_words(path: Path) -> Path:
    """The file with the words of whoever holds the lock."""
    owner = _name_owner(path)
    return owner if owner.exists() else path


def _open(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+", encoding="utf-8")
    except OSError as error:
        raise LockError(f"{path}: can't be made: {error.strerror} (runs lie in output.exp_dir)") from error


def _try_lock_twice(file: IO[str], path: Path, holder: Holder) -> Path | None:
    """Whoever looks for the holder (`find_holder`) is in the way for an instant."""
    if (words := _try_lock(file, path, holder)) is None:
        time.sleep(_LOOK_S)
        words = _try_lock(file, path, holder)
    return words


def _try_lock(file: IO[str], path: Path, holder: Holder) -> Path | None:
    """The file with the holder's words, if the lock is ours now; None if it is another's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        owner = _name_owner(path)
        return owner if _try_own(owner, holder) else None
    try:
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return None
    except FileNotFoundError:  # whoever held it has removed it
        return None
    file.truncate(0)
    os.write(file.fileno(), _render(holder))  # no buffer that closing would write again
    return path


def _try_own(owner: Path, holder: Holder) -> bool:
    """Without flock: create the file that only one can create, or take the place of one that is provably dead."""
    try:
        descriptor = os.open(owner, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        earlier = _read_holder(owner)
        with suppress(FileNotFoundError):  # it was given back this moment: the next look finds it free
            if not (_is_dead(earlier, owner) if earlier else _tell_age_s(owner) > _DEAD_S):
                return False
        if not owner.exists():
            return False
        _replace(owner, _render(holder).decode())
        time.sleep(_LOOK_S)  # another may have seen the same dead one, and have come after us
        return _holds(holder, owner)
    try:
        os.write(descriptor, _render(holder))
    finally:
        os.close(descriptor)
    return True


def _replace(path: Path, text: str) -> None:
    beside = _name_beside(path)
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _name_owner(path: Path) -> Path:
    return path.with_name(f"{path.name}.owner")


def _name_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


# --- who holds it ----------------------------------------------------------------------------------------------------


def _describe_self(what: str) -> Holder:
    return Holder(
        what=what,
        pid=os.getpid(),
        host=socket.gethostname(),
        since=datetime.now().isoformat(timespec="seconds"),
        boot=_read_boot(),
        namespace=_read_namespace(),
        started=_read_start(os.getpid()) or "",
        token=secrets.token_hex(8),
    )


def _render(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _read_holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # it has just got the lock and not yet said who it is
        return None


def _holds(holder: Holder, path: Path) -> bool:
    found = _read_holder(path)
    return found is not None and found.token == holder.token


def _is_dead(holder: Holder | None, path: Path) -> bool:
    """Proven: its process is not there; or it can't be seen from here, and has long ceased to touch its file."""
    if holder is None:
        return False
    if can_see(holder):
        started = _read_start(holder.pid)
        return started is None or (started != "" and started != holder.started)
    return _tell_age_s(path) > _DEAD_S


def can_see(holder: Holder | None) -> bool:
    """Whether its process would be seen from here, under its PID: it is of this machine and of this PID namespace."""
    here = (socket.gethostname(), _read_boot(), _read_namespace())
    return holder is not None and (holder.host, holder.boot, holder.namespace) == here


def _read_boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _read_namespace() -> str:
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _read_start(pid: int) -> str | None:
    """When a process of this machine started, in a text that stays the same; None if there is no such process."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        # In ticks since the boot, which no change of the clock moves: proc(5). A zombie holds nothing.
        return None if fields[0] in "ZX" else fields[19]
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return ""  # it lives


def _read_time(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _tell_age_s(path: Path) -> float:
    """Since the file was touched, by the clock of whoever keeps the files."""
    beside = _name_beside(path)
    try:
        beside.touch()
        return beside.stat().st_mtime - path.stat().st_mtime
    finally:
        beside.unlink(missing_ok=True)
