"""Hearing of a preemption when its grace time begins: Slurm tells job steps of it, and not the batch script."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from doccls.system.signals import agree_to_stop
from launcher.plan import drop_job_variables

_HEEDED = {
    code: number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) for code in (128 + number, -number)
}
"""Exit codes of the step -> the signal that ended it: a preemption's, or one ahead of a time limit (--signal)."""
_ENDS_S = 10.0
_STEP = (
    "srun", "--overlap", "--nodes=1", "--ntasks=1", "--mem=0", "--gres=none", "--input=none", "--quiet",
    "sleep", "infinity",
)  # fmt: skip
"""A step that takes nothing from the job, and ends when Slurm sends SIGTERM to the job's steps."""


class PreemptionWatch:
    """Asks this process to stop when Slurm sends a signal to its job's steps."""

    def __init__(self, srun: "subprocess.Popen[bytes]") -> None:
        self._srun, self._over = srun, False
        self._waiter = threading.Thread(target=self._wait, name="doccls-preemption", daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        number = _HEEDED.get(self._srun.wait())
        if number is not None and not self._over:
            agree_to_stop(number)  # no signal to this process: one that follows would be the second, and end it at once

    def join(self) -> None:
        """Wait until the step has ended."""
        self._waiter.join()

    def end(self) -> None:
        """End the step; what it says from now on is no news."""
        self._over = True
        self._srun.terminate()
        try:
            self._srun.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            self._srun.kill()


@contextmanager
def watching_for_preemption() -> Iterator[PreemptionWatch | None]:
    """Within the block, in a job of Slurm; None where there is no srun (in a container, say).

    A step that can't be had is no error: the task hears of the preemption at the end of its grace time.
    """
    environment = drop_job_variables(os.environ) | {"SLURM_JOB_ID": os.environ["SLURM_JOB_ID"]}
    try:
        srun = subprocess.Popen(
            _STEP, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the job's batch script is not its to hear
        )  # fmt: skip
    except OSError:  # there is none, or it can't be run here
        yield None
        return
    watch = PreemptionWatch(srun)
    try:
        yield watch
    finally:
        watch.end()
