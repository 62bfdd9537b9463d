"""The descriptors of the standard streams: opened if missing, written to for a limited time, and discarded."""

import errno
import os
import select
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A pipe that is ready takes this many bytes without blocking, and does not mix them with those of other processes.
_CHUNK_BYTES = getattr(select, "PIPE_BUF", 512)
_RETRY_S = 0.01
_CLOSING_LIMIT_S = 1.0


def open_missing_descriptors() -> None:
    """Open the null device at each of the descriptors 0, 1 and 2 that is closed, as after `>&-`.

    Otherwise the next file or socket gets that number, and what C code prints lands in it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            discard_output(descriptor)


def discard_output(descriptor: int) -> None:
    """Connect the descriptor to the null device, also for the processes that this one starts.

    Raises:
        OSError: the null device can't be opened.
    """
    devnull = os.open(os.devnull, os.O_RDWR)
    if devnull == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(devnull, descriptor)
        os.close(devnull)


def write_within(descriptor: int, text: bytes, limit_s: float | None) -> float:
    """Write the text, and return how many seconds that had to wait until its reader took some; None is no limit.

    Raises:
        TimeoutError: the reader took nothing for too long; part of the text may be written.
        OSError: it can't be written.
    """
    waited_s, unwritten = 0.0, memoryview(text)
    with _opened_without_blocking(descriptor) as target:
        while unwritten:
            if not is_ready(target, 0.0):
                start_s = time.monotonic()
                if not is_ready(target, None if limit_s is None else max(0.0, limit_s - waited_s)):
                    raise TimeoutError(errno.ETIMEDOUT, "nobody reads it")
                waited_s += time.monotonic() - start_s
            try:
                unwritten = unwritten[os.write(target, unwritten[:_CHUNK_BYTES]) :]
            except BlockingIOError as error:  # too little room for a descriptor that does not block
                if limit_s is not None and waited_s >= limit_s:
                    raise TimeoutError(errno.ETIMEDOUT, "nobody reads it") from error
                time.sleep(_RETRY_S)
                waited_s += _RETRY_S
    return waited_s


@contextmanager
def _opened_without_blocking(descriptor: int) -> Iterator[int]:
    """Yield a descriptor of the same terminal or pipe that does not block; any other descriptor itself.

    A terminal can be ready and still block at a write, and so can a pipe that another process fills just then. The flag
    O_NONBLOCK must not be set on the descriptor itself: the shell and other processes share it.
    """
    own = None
    if os.name == "posix" and (os.isatty(descriptor) or stat.S_ISFIFO(os.fstat(descriptor).st_mode)):
        with suppress(OSError):  # closed at the other end, another user's, or a system without /proc
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        yield descriptor if own is None else own
    finally:
        if own is not None:
            os.close(own)


def write_closing(descriptor: int, text: str) -> None:
    """Write what a process has to say as it ends, as far as the descriptor takes it within a second."""
    with suppress(OSError):
        write_within(descriptor, text.encode(errors="backslashreplace"), _CLOSING_LIMIT_S)


def is_ready(descriptor: int, within_s: float | None) -> bool:
    """Return whether a write to the descriptor would not block, or would fail, within the time."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if within_s is None else within_s * 1000))
