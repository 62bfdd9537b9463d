"""A clock for processes that watch other processes."""

import time

_MAX_GAP_S = 10.0  # watchers poll at least every two seconds; after a longer gap, this process was suspended


class RunningClock:
    """A clock that counts only the seconds during which this process ran; it has to be read often.

    While this process is suspended (SIGSTOP, a job suspended by Slurm, a sleeping virtual machine), the processes it
    watches may be suspended too, and their progress goes unseen. So such gaps do not count.
    """

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self._suspended_s = 0.0

    def read(self) -> float:
        """Return the running time in seconds since an arbitrary fixed moment."""
        now_s = time.monotonic()
        gap_s, self._last_s = now_s - self._last_s, now_s
        if gap_s > _MAX_GAP_S:
            self._suspended_s += gap_s
        return now_s - self._suspended_s
