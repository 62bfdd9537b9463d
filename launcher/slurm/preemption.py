"""Hearing of a preemption when its grace time begins: Slurm tells job steps of it, and not the batch script."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import which

from launcher.plan import drop_job_variables

_TERMINATED = (128 + signal.SIGTERM, -signal.SIGTERM)
_ENDS_S = 10.0
_STEP = (
    "srun", "--overlap", "--nodes=1", "--ntasks=1", "--mem=0", "--gres=none", "--input=none", "--quiet",
    "sleep", "infinity",
)  # fmt: skip
"""A step that takes nothing from the job, and ends when Slurm sends SIGTERM to the job's steps."""


class PreemptionWatch:
    """Sends this process the SIGTERM that Slurm sends to its job's steps."""

    def __init__(self, srun: "subprocess.Popen[bytes]") -> None:
        self._srun, self._over = srun, False
        self.heard = False
        """Whether Slurm has told the steps to end: the job is preempted, or cancelled."""
        self._waiter = threading.Thread(target=self._wait, name="doccls-preemption", daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        if self._srun.wait() in _TERMINATED and not self._over:
            self.heard = True
            os.kill(os.getpid(), signal.SIGTERM)

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
    if which("srun") is None:
        yield None
        return
    environment = drop_job_variables(os.environ) | {"SLURM_JOB_ID": os.environ["SLURM_JOB_ID"]}
    watch = PreemptionWatch(
        subprocess.Popen(
            _STEP, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the job's batch script is not its to hear
        )
    )  # fmt: skip
    try:
        yield watch
    finally:
        watch.end()
