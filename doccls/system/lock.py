"""A lock on a piece of work: one process on any machine holds it, and it is free again when that process is gone.

The lock is a file that names its holder. Only one process can create it (O_EXCL), on every shared file system; the
kernel's own locks (flock) are missing on some and local to a machine on others. Whoever wants to change the file of a
holder, to release it or to take it from one that is dead, first creates the file's successor, `<file>.<token>.next`,
with the token that the holder drew: again only one process can. A taker that dies before it has moved the successor
into place leaves it behind as the lock's last word. So the holder is the end of that chain.

A holder of this machine and PID namespace is alive while its process is. Of any other one, only the time of the file
is seen, which a holder renews every ten seconds: after two minutes of silence, half a minute of which a taker has
watched, it counts as dead. It may only be suspended, so it has to `check` before it writes what others read.
"""

import errno
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import psutil

from doccls.errors import UserError
from doccls.system.lifeline import LAUNCHED

_RENEW_S = 10.0
_LOOK_S = 0.5
_DEAD_S = 120.0
"""After so long a silence, a holder that can't be seen from here is dead. Much longer than `_RENEW_S`, since NFS
clients see a file's time up to a minute late, and a write to a slow disk may keep the holder's thread from running."""
_LONG_DEAD_S = 3600.0
"""After so long a silence nobody need watch it any more."""
_WATCH_S = 3 * _RENEW_S
"""How long a taker watches a silent holder: what is silent may be the file server, or wrong its clock."""
_PROOF_S = _DEAD_S + _WATCH_S
"""After that it has shown a sign of life, or is dead."""
_STALE_TRIES = 5
_TOKEN = re.compile("[0-9a-f]{16}")


class LockError(UserError):
    """The lock can't be taken, or was lost."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as it describes itself."""

    what: str
    """Such as `run v001-abc is being launched`."""
    pid: int
    host: str
    since: str
    boot: str
    """Of the machine, an ID that is new after each start; empty where the system has none."""
    namespace: str
    """In which the PID counts: each container has its own."""
    started: str
    """When the process did, by its machine: another process may have its PID later."""
    token: str
    """Of this acquisition, 16 hexadecimal digits."""
    launch: str = ""
    """The launch that started the process (`doccls.system.lifeline.LAUNCHED`); empty for one started by hand."""

    def __str__(self) -> str:
        return f"{self.what} by process {self.pid} on {self.host} since {self.since}"


@dataclass(frozen=True)
class _Claim:
    """What a file says of the lock `path`: that file itself, or a successor."""

    path: Path
    holder: Holder | None
    """None: the file was created this moment and not yet written, or its process died in between."""
    renewed_ns: int
    """When the file was, in nanoseconds since 1970."""

    @property
    def token(self) -> str:
        return self.holder.token if self.holder else f"{self.renewed_ns:x}"

    @property
    def successor(self) -> Path:
        """Whoever creates this file may change the claim."""
        return self.path.with_name(f"{self.path.name}.{self.token}.next")


class Lock:
    """A lock that is held."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path, self._holder = path, holder

    def check(self) -> None:
        """Call before a write that only the holder may make.

        Raises:
            LockError: another process has taken the lock, as from one that was long suspended, or its file is gone.
        """
        try:
            claim = _find_claim(self._path)
        except OSError:
            return  # the file server does not answer well: that is no other holder
        if claim is None:
            raise LockError(f"{self._path} was removed while this process held it: it is no longer to write")
        if claim.token != self._holder.token:
            raise LockError(
                f"{_name_holder(claim)} ({self._path}): this process held it, was suspended for long, and is no longer "
                "to write"
            )


@contextmanager
def hold_lock(path: Path, what: str, wait_s: float = 0.0) -> Iterator[Lock]:
    """Hold the lock `path` within the block; wait up to `wait_s` seconds for its holder to end.

    The lock of a dead process is taken over. If the holder can't be seen from here, this waits up to two and a half
    minutes for a sign of life, and says so.

    Raises:
        LockError: another process holds it, or its file can't be had.
    """
    holder = _describe_self(what)
    try:
        _acquire(path, holder, wait_s)
    except OSError as error:
        raise LockError(f"{path}: can't be taken: {error.strerror}") from error
    done = threading.Event()
    threading.Thread(target=_renew, args=(path, holder, done), name="doccls-lock", daemon=True).start()
    try:
        yield Lock(path, holder)
    finally:
        done.set()
        with suppress(OSError):
            _release(path, holder)


def find_holder(path: Path) -> Holder | None:
    """Who holds the lock; None if nobody does, its holder is dead, or it has not yet described itself.

    Raises:
        LockError: its file can't be read.
    """
    try:
        claim = _find_claim(path)
    except OSError as error:
        raise LockError(f"{path}: can't be read: {error.strerror}") from error
    return None if claim is None or _is_dead(claim) else claim.holder


def can_see(holder: Holder) -> bool:
    """Whether its process would be seen from here, under its PID: it is of this machine and of this PID namespace."""
    here = (socket.gethostname(), _read_boot(), _read_namespace())
    return (holder.host, holder.boot, holder.namespace) == here


# --- taking, renewing and releasing it -------------------------------------------------------------------------------


def _acquire(path: Path, holder: Holder, wait_s: float) -> None:
    began_s, warned = time.monotonic(), False
    first_seen: _Claim | None = None
    watched: _Claim | None = None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # `doccls store clear` removes it
        chain, now_s = _read_chain(path), time.monotonic()
        claim = chain[-1] if chain else None
        if claim != watched:
            watched, watched_from_s = claim, now_s
        dead = claim is not None and _is_dead(claim, watched_s=now_s - watched_from_s)
        if (claim is None and _create(path, holder)) or (dead and _take_over(path, chain, holder)):
            return
        waited_s = now_s - began_s
        if claim is not None:
            first_seen = first_seen or claim
            visible = claim.holder is not None and can_see(claim.holder)
            unproven = dead or (not visible and claim == first_seen)
            if waited_s >= (max(wait_s, _PROOF_S + _LOOK_S) if unproven else wait_s):
                lives = "it lives" if visible else "it seems to live"
                raise LockError(f"{_name_holder(claim)} ({path}), and {lives}: end it there, or wait for it")
            if unproven and waited_s >= _LOOK_S and not warned:
                warned = True
                message = f"{_name_holder(claim)} ({path}): waiting for a sign of life, at most {_PROOF_S:g} s"
                print(f"[WARNING] {message}", file=sys.stderr)
        time.sleep(_LOOK_S)


def _create(file: Path, holder: Holder) -> bool:
    """Create the file, with the holder's description; False if it is there."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    text = json.dumps(asdict(holder)).encode()
    try:
        try:
            written = os.write(descriptor, text)
        finally:
            os.close(descriptor)
        if written < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.unlink(missing_ok=True)
        raise
    return True


def _take_over(path: Path, chain: list[_Claim], holder: Holder) -> bool:
    """Take the lock from a holder that is dead, the last of the chain, unless another process does."""
    last = chain[-1]
    if not _create(last.successor, holder):
        return False
    try:
        # What was read may be long past: another process took the lock, and has removed its own successor since.
        now = _find_claim(path)
        taken = now is not None and now.token == holder.token
        if taken:
            last.successor.replace(path)
    except FileNotFoundError:  # this process was suspended, and the next taker has removed its successor
        return False
    except BaseException:
        with suppress(OSError):
            last.successor.unlink(missing_ok=True)
        raise
    for file in _list_leftovers(path) if taken else [last.successor]:
        file.unlink(missing_ok=True)
    return taken


def _list_leftovers(path: Path) -> list[Path]:
    """What processes that were killed as they took the lock, or looked at it, have left beside it."""
    return [*path.parent.glob(f"{path.name}.*.next"), *path.parent.glob(f".{path.name}.*.tmp")]


def _release(path: Path, holder: Holder) -> None:
    """Remove the file, unless the lock was taken from this process."""
    claim = _read_claim(path, path)
    if claim is None or claim.token != holder.token:
        return
    try:
        if not _create(claim.successor, replace(holder, token=secrets.token_hex(8))):
            return
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    now = _read_claim(path, path)  # this process may have been suspended since it looked
    if now is not None and now.token == holder.token:
        path.unlink(missing_ok=True)
    claim.successor.unlink(missing_ok=True)


def _renew(path: Path, holder: Holder, done: threading.Event) -> None:
    """Other machines see by the file's time that its holder is alive and not suspended."""
    while not done.wait(_RENEW_S):
        with suppress(OSError), path.open("rb") as file:
            found = _parse(file.read())
            if found is not None and found.token == holder.token:
                os.utime(file.fileno())  # not by its path, which may be another holder's by now


# --- who holds it ----------------------------------------------------------------------------------------------------


def _read_chain(path: Path) -> list[_Claim]:
    """The lock's file and the successors that were left behind; empty if it is free."""
    chain, claim = list[_Claim](), _read_claim(path, path)
    while claim is not None:
        chain.append(claim)
        claim = _read_claim(claim.successor, path)
    return chain


def _find_claim(path: Path) -> _Claim | None:
    """The one that counts; None if the lock is free."""
    chain = _read_chain(path)
    return chain[-1] if chain else None


def _read_claim(file: Path, path: Path) -> _Claim | None:
    tries = 0
    while True:
        try:
            with file.open("rb") as opened:  # opening has an NFS client ask the server for the file's time
                return _Claim(path, _parse(opened.read()), os.fstat(opened.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None
        except OSError as error:  # ESTALE: another machine replaced the file while it was read
            tries += 1
            if error.errno != errno.ESTALE or tries == _STALE_TRIES:
                raise


def _parse(text: bytes) -> Holder | None:
    with suppress(ValueError, TypeError):
        holder = Holder(**json.loads(text))
        if _TOKEN.fullmatch(holder.token):  # it becomes part of a file's name
            return holder
    return None


def _name_holder(claim: _Claim) -> str:
    return str(claim.holder) if claim.holder else "another process has just begun to work on it"


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
        launch=os.environ.get(LAUNCHED, ""),
    )


def _is_dead(claim: _Claim, watched_s: float = _WATCH_S) -> bool:
    """`watched_s` is how long this process has seen the claim as it is."""
    if claim.holder is not None and can_see(claim.holder):
        started = _read_start(claim.holder.pid)
        return started is None or (started != "" and started != claim.holder.started)
    return _measure_silence_s(claim) > (_DEAD_S if watched_s >= _WATCH_S else _LONG_DEAD_S)


def _measure_silence_s(claim: _Claim) -> float:
    """Since its file was renewed, by the clock of whoever keeps the files; by this machine's in a read-only folder."""
    beside = claim.path.with_name(f".{claim.path.name}.{secrets.token_hex(4)}.tmp")
    now_s = time.time()
    with suppress(OSError):
        try:
            beside.touch()
            now_s = beside.stat().st_mtime
        finally:
            beside.unlink(missing_ok=True)
    return now_s - claim.renewed_ns / 1e9


def _read_boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _read_namespace() -> str:
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _read_start(pid: int) -> str | None:
    """When a process of this machine started, in a text that stays the same; None if there is no such process.

    Empty where that is not told, as of another user's process under /proc's hidepid.
    """
    try:
        if os.name == "posix":
            os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        # In ticks since the boot, which no change of the clock moves: proc(5). A zombie holds nothing.
        return None if fields[0] in "ZX" else fields[19]
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return "" if os.name == "posix" else None
