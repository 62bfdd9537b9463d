"""A signal that asks for the end is a note, not an exception: our own code asks for it where it can stop.

Raised at any bytecode, an exception may end inside a write callback of C++, a `__del__` or a library's cleanup, which
make another error of it, and another exit code. So nothing here raises by itself:

- while `stopping_gracefully`, the handler notes the first signal, and `check_stop` raises it at a safe point;
- otherwise, and at a second signal, the process ends at once: it removes its half-written files, writes the last lines
  and is gone. A thread does that, since no Python handler runs while the main thread stands in a C call.
"""

import faulthandler
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from doccls.system.rank import rank_by_environment

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""What asks for the end: Slurm sends SIGUSR1 ahead of a time limit, if asked to. Windows has only the first two.

SIGHUP comes when the terminal is closed, and does nothing under nohup. SIGUSR2 asks for the end only after
`stop_on_sigusr2`; before, it has the process write its stacks.
"""
_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
_STACKS: signal.Signals | None = getattr(signal, "SIGUSR2", None)
_ECHO_S = 1.0
"""One request may come as several signals: to the whole group by a terminal, and again from a launcher that forwards
it. What comes so soon after the first is taken for its echo."""

_requested: int | None = None
_requested_s: float | None = None
_graceful = False
_closing = False
_lock = threading.Lock()
"""Held by whoever writes a process's last lines."""
_last_acts: list[Callable[[str, int], None]] = []


class Interrupted(BaseException):
    """A signal asked for the end; not an Exception, so that nothing on the way takes it for an error to handle."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} received")
        self.signum = signum
        self.exit_code = 128 + signum


@contextmanager
def handling_signals() -> Iterator[None]:
    """STOP_SIGNALS as this module says, until the block ends well; the main thread calls.

    After `ignore_signals` they stay ignored: the process is at its end.
    """
    global _requested, _requested_s, _closing
    _requested, _requested_s, _closing = None, None, False
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    earlier_fd = signal.set_wakeup_fd(write_end)
    ignored = [number for number in STOP_SIGNALS if number == _HANGUP and signal.getsignal(number) is signal.SIG_IGN]
    heard = [number for number in STOP_SIGNALS if number != _STACKS and number not in ignored]
    earlier = {number: signal.signal(number, _note) for number in heard}
    if _STACKS is not None:
        earlier[_STACKS] = signal.getsignal(_STACKS)
        faulthandler.register(_STACKS, file=2)  # a process that stands still says where
    watcher = threading.Thread(target=_watch, args=(read_end,), name="doccls-signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier_fd)
        if not _closing:
            if _STACKS is not None:
                faulthandler.unregister(_STACKS)
            for number, handler in earlier.items():
                signal.signal(number, handler)
        os.close(write_end)
        watcher.join()
        _requested = None


def stop_on_sigusr2() -> None:
    """From now on, while `handling_signals`, it asks for the end as the others do; the main thread calls."""
    if _STACKS is not None:
        signal.signal(_STACKS, _note)


@contextmanager
def stopping_gracefully() -> Iterator[None]:
    """Within the block a first signal is noted: the code in it asks `check_stop` or `stop_requested` often."""
    yield from _in_mode(True)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within the block, inside `stopping_gracefully`: a wait in another's code, which a signal may end anywhere."""
    yield from _in_mode(False)


def stop_requested() -> int | None:
    """Number of the signal that asked for the end; None if none did."""
    return _requested


def agree_to_stop(signum: int) -> None:
    """Another process of the run was asked for the end by that signal, and this one leaves with it."""
    global _requested
    _requested = _requested or signum


def check_stop() -> None:
    """A safe point.

    Raises:
        Interrupted: a signal came.
    """
    if _requested is not None:
        raise Interrupted(_requested)


@contextmanager
def naming_one_cause() -> Iterator[None]:
    """Whatever breaks in the block after a stop was asked for breaks because of it: `Interrupted`, from that error."""
    try:
        yield
    except Exception as error:
        if _requested is not None:
            raise Interrupted(_requested) from error
        raise


@contextmanager
def at_sudden_end(act: Callable[[str, int], None]) -> Iterator[None]:
    """While the block runs, an `end_now` calls `act` with its reason and exit code, the newest act first.

    `act` is called from another thread, with the main thread anywhere: no locks, no buffered streams.
    """
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


def end_now(reason: str, code: int) -> None:
    """End the process, its main thread anywhere, with all that is to be done `at_sudden_end`; unless it is at its end.

    Any other thread may call.
    """
    with _lock:
        if not _closing:
            _end(reason, code)


@contextmanager
def writing_last_lines() -> Iterator[None]:
    """No sudden end falls into the block, which writes what such an end would write; it waits."""
    with _lock:
        yield


def ignore_signals() -> None:
    """The end has begun: a further signal must not tear the last lines. The main thread calls."""
    global _closing
    with _lock:
        _closing = True
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _note:
            signal.signal(number, signal.SIG_IGN)


def _in_mode(graceful: bool) -> Iterator[None]:
    global _graceful
    earlier, _graceful = _graceful, graceful
    try:
        yield
    finally:
        _graceful = earlier


def _note(signum: int, frame: FrameType | None) -> None:
    global _requested
    if _graceful and _requested is None:
        _requested = signum


def _watch(read_end: int) -> None:
    """Each signal's number comes as a byte, written by Python's C handler wherever the main thread stands."""
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] in STOP_SIGNALS:
                _weigh(number[0])


def _weigh(signum: int) -> None:
    global _requested, _requested_s
    now_s = time.monotonic()
    if signum == _HANGUP:
        _leave_terminal()
    with _lock:
        if _closing:
            return
        if _requested_s is None and (_graceful or _requested is not None):
            _requested, _requested_s = _requested or signum, now_s  # the handler may still wait for the main thread
            _report_once(signum)
        elif _requested_s is None or now_s - _requested_s >= _ECHO_S:
            _end(str(Interrupted(signum)), 128 + signum)


def _end(reason: str, code: int) -> None:
    for act in reversed(_last_acts):
        with suppress(Exception):  # whatever a last act meets, the end comes
            act(reason, code)
    os._exit(code)


def _leave_terminal() -> None:
    """A terminal that was closed takes no more output, and an error of writing to it would end the process."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, descriptor)
                os.close(nothing)


def _report_once(signum: int) -> None:
    """One process of several says that it has heard; straight to the descriptor, since this is another thread."""
    if rank_by_environment() == 0:
        text = f"{signal.Signals(signum).name} received: stopping at the next safe point; once more ends at once\n"
        with suppress(OSError):
            os.write(2, text.encode())
