"""Stop signals that are recorded by the handler and raised only at safe points of our own code.

An exception raised at an arbitrary bytecode may surface inside a C++ write callback, a `__del__` or a library's
cleanup, which turn it into another error and another exit code. So the handlers never raise:

- while `stopping_gracefully`, the handler records the first signal, and `check_stop` raises it at a safe point;
- otherwise, and at a second signal, the process exits immediately: it removes its partial files, writes its closing
  lines and exits. A thread does that, since no Python handler runs while the main thread is inside a C call.
"""

import faulthandler
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from doccls.system.descriptors import discard_output, write_closing
from doccls.system.rank import rank_by_environment

# Signals that request a stop: Slurm can send SIGUSR1 ahead of a time limit. Windows has only the first two.
# SIGHUP arrives when the terminal is closed, and is ignored under nohup. SIGUSR2 requests a stop only after
# `stop_on_sigusr2`; before, it makes the process dump its stacks.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
_STACKS: signal.Signals | None = getattr(signal, "SIGUSR2", None)
# One request may arrive as several signals: from a terminal to the whole process group, and from a launcher that
# forwards it. A signal within this time after the first counts as its duplicate.
_DUPLICATE_S = 1.0

_requested: int | None = None
_requested_s: float | None = None
_graceful = False
_closing = False
_lock = threading.Lock()  # held while a thread writes the process's closing lines
_exit_callbacks: list[Callable[[str, int], None]] = []


class Interrupted(BaseException):
    """A signal requested a stop; not an `Exception`, so that no error handler on the way catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} received")
        self.signum = signum
        self.exit_code = 128 + signum


@contextmanager
def handling_signals() -> Iterator[None]:
    """Handle STOP_SIGNALS as this module describes within the block.

    After `ignore_signals` they stay ignored, since the process is exiting. Python lets only the main thread set
    handlers: in another thread, as of a notebook's widget or a service, signals stay with the caller, with a warning.
    """
    global _requested, _requested_s, _closing
    _requested, _requested_s, _closing = None, None, False
    if not _is_main_thread():
        _warn_of_thread()
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    earlier_fd = signal.set_wakeup_fd(write_end)
    ignored = [number for number in STOP_SIGNALS if number == _HANGUP and signal.getsignal(number) is signal.SIG_IGN]
    handled = [number for number in STOP_SIGNALS if number != _STACKS and number not in ignored]
    earlier = {number: signal.signal(number, _record) for number in handled}
    if _STACKS is not None:
        # `register` does nothing for a signal that is already registered, even if its handler was replaced since.
        faulthandler.unregister(_STACKS)
        earlier[_STACKS] = signal.getsignal(_STACKS)
        faulthandler.register(_STACKS, file=2)  # shows where a hanging process is
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
    """Make SIGUSR2 request a stop while `handling_signals`, as the others do."""
    if _STACKS is not None and _is_main_thread():
        signal.signal(_STACKS, _record)


@contextmanager
def stopping_gracefully() -> Iterator[None]:
    """Record a first signal within the block, whose code has to call `check_stop` or `stop_requested` often."""
    yield from _in_mode(True)


@contextmanager
def stopping_immediately() -> Iterator[None]:
    """Exit at the first signal within the block, a wait in third-party code inside `stopping_gracefully`."""
    yield from _in_mode(False)


def stop_requested() -> int | None:
    """Return the number of the signal that requested a stop; None if none did."""
    return _requested


def agree_to_stop(signum: int) -> None:
    """Stop together with another process of the run, which received the signal `signum`."""
    global _requested
    _requested = _requested or signum


def check_stop() -> None:
    """Raise if a stop was requested: this is a safe point.

    Raises:
        Interrupted: a signal requested a stop.
    """
    if _requested is not None:
        raise Interrupted(_requested)


@contextmanager
def attributing_errors_to_stop() -> Iterator[None]:
    """Raise `Interrupted` from any error in the block after a stop was requested: the stop has caused it."""
    try:
        yield
    except Exception as error:
        if _requested is not None:
            raise Interrupted(_requested) from error
        raise


@contextmanager
def on_immediate_exit(callback: Callable[[str, int], None]) -> Iterator[None]:
    """Call `callback(reason, exit_code)` if the process exits immediately within the block, newest callback first.

    It runs in another thread while the main thread may be anywhere, so it must not use locks or buffered streams.
    """
    _exit_callbacks.append(callback)
    try:
        yield
    finally:
        _exit_callbacks.remove(callback)


def exit_immediately(reason: str, code: int) -> None:
    """Run the callbacks of `on_immediate_exit` and exit, wherever the main thread is, unless already exiting.

    Any other thread may call.
    """
    with _lock:
        if not _closing:
            _exit(reason, code)


@contextmanager
def writing_closing_lines() -> Iterator[None]:
    """Delay an immediate exit until the block ends, which writes the same closing lines as such an exit."""
    with _lock:
        yield


def ignore_signals() -> None:
    """Ignore further signals, which must not interrupt the closing lines."""
    global _closing
    with _lock:
        _closing = True
    if not _is_main_thread():
        return
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _record:
            signal.signal(number, signal.SIG_IGN)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _warn_of_thread() -> None:
    if rank_by_environment() == 0:
        print(
            "[WARNING] not called from the main thread: signals stay with the caller, so Ctrl-C or SIGTERM does not "
            "stop this run at a safe point",
            file=sys.stderr,
            flush=True,
        )


def _in_mode(graceful: bool) -> Iterator[None]:
    global _graceful
    earlier, _graceful = _graceful, graceful
    try:
        yield
    finally:
        _graceful = earlier


def _record(signum: int, frame: FrameType | None) -> None:
    global _requested
    if _graceful and _requested is None:
        _requested = signum


def _watch(read_end: int) -> None:
    """Read each signal's number as a byte, which Python's C handler writes wherever the main thread is."""
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] in STOP_SIGNALS:
                _react(number[0])


def _react(signum: int) -> None:
    global _requested, _requested_s
    now_s = time.monotonic()
    if signum == _HANGUP:
        _detach_terminal()
    with _lock:
        if _closing:
            return
        if _requested_s is None and (_graceful or _requested is not None):
            # The handler may not have run yet: it needs the main thread.
            _requested, _requested_s = _requested or signum, now_s
            _report_once(signum)
        elif _requested_s is None or now_s - _requested_s >= _DUPLICATE_S:
            _exit(str(Interrupted(signum)), 128 + signum)


def _exit(reason: str, code: int) -> None:
    for callback in reversed(_exit_callbacks):
        with suppress(Exception):  # an error in a callback must not prevent the exit
            callback(reason, code)
    os._exit(code)


def _detach_terminal() -> None:
    """Redirect output from a closed terminal to the null device: an error of writing to it would end the process."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                discard_output(descriptor)


def _report_once(signum: int) -> None:
    """Confirm the signal in one process of several; straight to the descriptor, since this is another thread."""
    if rank_by_environment() == 0:
        text = f"{Interrupted(signum)}: stopping at the next safe point; a second signal exits immediately\n"
        write_closing(2, text)
