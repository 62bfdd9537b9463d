"""A clock for whoever watches others."""

import time

_GAP_S = 10.0
"""Watchers look at least once a second or two; a longer time between two looks is one in which they did not run."""


class RunningClock:
    """Seconds in which this process ran, if it reads the clock often.

    While it is stopped (SIGSTOP, a job suspended by Slurm, a sleeping virtual machine), those whom it watches may be
    stopped too, and what they do meanwhile is not seen: such gaps are left out.
    """

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self._left_out_s = 0.0

    def read(self) -> float:
        """Seconds since a fixed moment."""
        now_s = time.monotonic()
        gap_s, self._last_s = now_s - self._last_s, now_s
        if gap_s > _GAP_S:
            self._left_out_s += gap_s
        return now_s - self._left_out_s
