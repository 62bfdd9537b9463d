"""A lock across machines: one process holds it at a time, and it becomes free when that process ends.

The lock is a file that names its holder. Only one process can create it (O_EXCL), on every shared file system; the
kernel's own locks (flock) are missing on some and local to a machine on others. A process that wants to change a
holder's file, to release it or to take it over from a dead holder, first creates the file's successor,
`<file>.<token>.next`, with the token of that holder: again only one process can. If it dies before it has moved the
successor into place, or if the file system refuses that, the successor remains as the newest claim. So the holder is
the end of this chain.

A holder on this machine and in this PID namespace is alive while its process is. Any other holder is known only by the
time of the file, which it renews every ten seconds: after two minutes of silence, half a minute of which the waiting
process has watched, it counts as dead. It may only be suspended, so it has to `check` before it writes shared files.
"""

import errno
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from doccls.errors import UserError
from doccls.system.atomic_files import REPLACE_REFUSED
from doccls.system.disk import describe_shortage
from doccls.system.holder import Holder, describe_self, is_visible, parse_holder, read_start, render_holder

_RENEW_S = 10.0
_POLL_S = 0.5
# After this silence, a holder that is not visible from here is dead. Much longer than `_RENEW_S`, since NFS clients see
# a file's time up to a minute late, and a write to a slow disk may keep the holder's thread from running.
_DEAD_S = 120.0
_LONG_DEAD_S = 3600.0  # after this silence, a holder is dead without being watched
_WATCH_S = 3 * _RENEW_S  # how long to watch a silent holder: the file server may be down, or its clock wrong
_PROOF_S = _DEAD_S + _WATCH_S  # after this time, a holder has shown a sign of life or is dead
_STALE_TRIES = 5
_IN_USE_S = 2.0  # how long to retry the removal of a file that another process may be reading
_IN_USE_POLL_S = 0.05
_RELEASED = "released"  # the start time in a claim that could not be removed: no process has it, so its holder is dead


class LockError(UserError):
    """The lock can't be taken, or was lost."""


@dataclass(frozen=True)
class _Claim:
    """A claim to the lock `path`, read from `file`: that file or a successor."""

    path: Path
    file: Path
    holder: Holder | None  # None: the process has not written the file yet, or died before
    renewed_ns: int  # in nanoseconds since 1970

    @property
    def token(self) -> str:
        return self.holder.token if self.holder else f"{self.renewed_ns:x}"

    @property
    def successor(self) -> Path:
        """The file whose creator may change the claim."""
        return self.path.with_name(f"{self.path.name}.{self.token}.next")


class Lock:
    """A lock that this process holds."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path, self._holder = path, holder

    @property
    def token(self) -> str:
        """The ID of this acquisition, as in `Holder`."""
        return self._holder.token

    def check(self) -> None:
        """Check that this process still holds the lock; call it before each write that only the holder may make.

        Raises:
            LockError: another process has taken the lock, since this one was suspended for long, or its file is gone.
        """
        try:
            claim = _find_claim(self._path)
        except OSError:
            return  # the file server fails, which says nothing about the holder
        if claim is None:
            raise LockError(
                f"{self._path} was removed while this process held it: this process must not write any more"
            )
        if claim.token != self._holder.token:
            raise LockError(
                f"{_format_holder(claim)} ({self._path}): this process lost the lock while it was suspended, and must "
                "not write any more"
            )


@contextmanager
def hold_lock(path: Path, what: str, wait_s: float = 0.0) -> Iterator[Lock]:
    """Hold the lock `path` within the block; wait up to `wait_s` seconds for another holder to release it.

    The lock of a dead process is taken over. If the holder is not visible from here, this waits up to two and a half
    minutes for a sign of life, with a warning.

    Raises:
        LockError: another process holds it, or its file can't be created.
    """
    holder = describe_self(what)
    try:
        _acquire(path, holder, wait_s)
    except OSError as error:
        shortage = describe_shortage(error, path.parent, len(render_holder(holder)))
        raise LockError(f"{path}: can't be taken: {error.strerror}{shortage}") from error
    done = threading.Event()
    threading.Thread(target=_renew, args=(path, holder, done), name="doccls-lock", daemon=True).start()
    try:
        yield Lock(path, holder)
    finally:
        done.set()
        with suppress(OSError):
            _release(path, holder)


def find_holder(path: Path, read_only: bool = False) -> Holder | None:
    """Return the holder of the lock; None if it is free, its holder is dead, or has not yet described itself.

    The silence of a holder on another machine is measured by the file server's clock, which takes a temporary file
    beside the lock; with `read_only` nothing is written, and this machine's clock is used.

    Raises:
        LockError: its file can't be read.
    """
    try:
        claim = _find_claim(path)
    except OSError as error:
        raise LockError(f"{path}: can't be read: {error.strerror}") from error
    return None if claim is None or _is_dead(claim, read_only=read_only) else claim.holder


# --- taking, renewing and releasing it -------------------------------------------------------------------------------


def _acquire(path: Path, holder: Holder, wait_s: float) -> None:
    start_s, warned = time.monotonic(), False
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
        waited_s = now_s - start_s
        if claim is not None:
            first_seen = first_seen or claim
            visible = claim.holder is not None and is_visible(claim.holder)
            unproven = dead or (not visible and claim == first_seen)
            if waited_s >= (max(wait_s, _PROOF_S + _POLL_S) if unproven else wait_s):
                status = "is alive" if visible else "seems to be alive"
                raise LockError(f"{_format_holder(claim)} ({path}); that process {status}: stop it there, or wait")
            if unproven and waited_s >= _POLL_S and not warned:
                warned = True
                message = f"{_format_holder(claim)} ({path}): waiting for a sign of life, at most {_PROOF_S:g} s"
                print(f"[WARNING] {message}", file=sys.stderr)
        time.sleep(_POLL_S)


def _create(file: Path, holder: Holder) -> bool:
    """Create the file with the holder's description; return False if it exists."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    text = render_holder(holder)
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
    """Take the lock from the dead holder at the end of the chain; return False if another process has done so."""
    last = chain[-1]
    if not _create(last.successor, holder):
        return False
    leftovers = list[Path]()
    try:
        # The chain may be outdated: another process may have taken the lock since and removed its own successor.
        tokens = _list_tokens(path)
        taken = tokens[-1:] == [holder.token]
        if taken and _move(last.successor, path):
            leftovers = _list_leftovers(path)
        elif holder.token not in tokens:
            leftovers = [last.successor]
        # This process may have been suspended for long, and another one may have taken the lock from it.
        taken = taken and _list_tokens(path)[-1:] == [holder.token]
    except FileNotFoundError:  # and the next taker has removed its successor
        return False
    except BaseException:
        try:
            _unlink(last.successor)
        except OSError:
            _mark_released(last.successor, holder.token)
        raise
    for file in leftovers:
        with suppress(OSError):  # it belongs to no chain
            file.unlink(missing_ok=True)
    return taken


def _move(successor: Path, path: Path) -> bool:
    """Move the successor into place, and return whether the file system allows it; if not, it remains a successor.

    Copying it is no way: this process may be suspended at any time, and overwrite the claim of a later holder.
    """
    try:
        successor.replace(path)
    except OSError as error:
        if error.errno not in REPLACE_REFUSED:
            raise
        return False
    return True


def _unlink(file: Path) -> None:
    """Remove the file; retry for a short time while another process has it open, where that prevents it.

    Raises:
        OSError: it can't be removed.
    """
    start_s = time.monotonic()
    while True:
        try:
            file.unlink(missing_ok=True)
            return
        except OSError as error:
            if error.errno not in REPLACE_REFUSED or time.monotonic() - start_s >= _IN_USE_S:
                raise
        time.sleep(_IN_USE_POLL_S)


def _mark_released(file: Path, token: str) -> None:
    """Mark a claim of this process, which can't be removed, such that others take its holder for dead."""
    with suppress(OSError), file.open("r+b") as opened:  # never the file of another process that takes its place
        holder = parse_holder(opened.read())
        if holder is not None and holder.token == token:
            opened.seek(0)
            opened.write(render_holder(replace(holder, started=_RELEASED)))
            opened.truncate()


def _list_leftovers(path: Path) -> list[Path]:
    """Return the files beside the lock of processes that were killed while they took or inspected it."""
    return [*path.parent.glob(f"{path.name}.*.next"), *path.parent.glob(f".{path.name}.*.tmp")]


def _release(path: Path, holder: Holder) -> None:
    """Remove the files of the chain, unless the lock was taken from this process."""
    chain = _read_chain(path)
    if not chain or chain[-1].token != holder.token:
        return
    claim, closing = chain[-1], replace(holder, token=secrets.token_hex(8))
    try:
        if not _create(claim.successor, closing):
            return
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _mark_released(claim.file, holder.token)
            raise
    newest = _find_claim(path)  # this process may have been suspended since the first read
    if newest is not None and newest.token in (holder.token, closing.token):
        try:
            _unlink(path)
        except OSError:
            _mark_released(newest.file, newest.token)
            raise
    for file in (*(earlier.file for earlier in chain[1:]), claim.successor):
        with suppress(OSError):  # without the first file, they belong to no chain
            file.unlink(missing_ok=True)


def _renew(path: Path, holder: Holder, done: threading.Event) -> None:
    """Update the file's time regularly: it shows other machines that the holder is alive and not suspended."""
    while not done.wait(_RENEW_S):
        with suppress(OSError):
            claim = _find_claim(path)
            if claim is None or claim.token != holder.token:
                continue
            with claim.file.open("r+b") as file:
                current = parse_holder(file.read())
                if current is not None and current.token == holder.token:
                    _touch(file)


def _touch(file: BinaryIO) -> None:
    """Update the time of an open lock file; not by its path, which may belong to another holder by now."""
    try:
        os.utime(file.fileno())
    except OSError:  # where that is not allowed, writing has the same effect; every holder's file begins like this
        os.pwrite(file.fileno(), b"{", 0)


# --- who holds it ----------------------------------------------------------------------------------------------------


def _read_chain(path: Path) -> list[_Claim]:
    """Return the claims of the lock's file and of the successors left behind; empty if the lock is free."""
    chain, claim = list[_Claim](), _read_claim(path, path)
    while claim is not None:
        chain.append(claim)
        claim = _read_claim(claim.successor, path)
    return chain


def _list_tokens(path: Path) -> list[str]:
    return [claim.token for claim in _read_chain(path)]


def _find_claim(path: Path) -> _Claim | None:
    """Return the newest claim; None if the lock is free."""
    chain = _read_chain(path)
    return chain[-1] if chain else None


def _read_claim(file: Path, path: Path) -> _Claim | None:
    tries = 0
    while True:
        try:
            with file.open("rb") as opened:  # opening has an NFS client ask the server for the file's time
                return _Claim(path, file, parse_holder(opened.read()), os.fstat(opened.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None
        except OSError as error:  # ESTALE: another machine replaced the file while it was read
            tries += 1
            if error.errno != errno.ESTALE or tries == _STALE_TRIES:
                raise


def _format_holder(claim: _Claim) -> str:
    return str(claim.holder) if claim.holder else "another process has just taken the lock"


def _is_dead(claim: _Claim, watched_s: float = _WATCH_S, read_only: bool = False) -> bool:
    """Return whether the holder is dead; `watched_s` is how long this process has seen the claim unchanged."""
    if claim.holder is not None and is_visible(claim.holder):
        started = read_start(claim.holder.pid)
        return started is None or (started != "" and started != claim.holder.started)
    silence_s = time.time() - claim.renewed_ns / 1e9 if read_only else _measure_silence_s(claim)
    return silence_s > (_DEAD_S if watched_s >= _WATCH_S else _LONG_DEAD_S)


def _measure_silence_s(claim: _Claim) -> float:
    """Return the seconds since the renewal, by the file server's clock; by this machine's in a read-only folder."""
    probe = claim.path.with_name(f".{claim.path.name}.{secrets.token_hex(4)}.tmp")
    now_s = time.time()
    with suppress(OSError):
        try:
            probe.touch()
            now_s = probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
    return now_s - claim.renewed_ns / 1e9
