"""Asking Slurm's controller: what is in the queue, to take an array, to cancel."""

import getpass
import subprocess
from collections.abc import Sequence

from launcher.slurm.format import QUEUE_FORMAT, QueueEntry, SlurmError, parse_queue, parse_submitted

_ANSWER_S = 60.0


def ask_queue() -> list[QueueEntry] | None:
    """This user's jobs, also those that ended a short while ago; None if nobody answers, which says nothing of them."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}"]
    try:
        done = _run([*command, f"--format={QUEUE_FORMAT}"])
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_queue(done.stdout) if done.returncode == 0 else None


def submit_script(command: Sequence[str], script: str) -> str:
    """Submit once. The job's number.

    Raises:
        SlurmError: no answer, or none that is a number; the job may be in the queue all the same.
    """
    try:
        done = _run(command, script)
    except OSError as error:
        raise SlurmError(f"sbatch can't be run: {error} (a machine of the cluster submits)") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"sbatch has not answered for {_ANSWER_S:g} s") from error
    job = parse_submitted(done.stdout) if done.returncode == 0 else None
    if job is None:
        raise SlurmError(f"sbatch failed (exit code {done.returncode}): {(done.stderr or done.stdout).strip()}")
    return job


def cancel_jobs(jobs: Sequence[str]) -> None:
    """Ask Slurm to end just these.

    Raises:
        SlurmError: it does not answer.
    """
    try:
        done = _run(["scancel", *jobs])
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"scancel {' '.join(jobs)}: {error}") from error
    if done.returncode:
        raise SlurmError(f"scancel {' '.join(jobs)}: {done.stderr.strip()}")


def _run(command: Sequence[str], told: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, input=told, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
