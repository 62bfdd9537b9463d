"""Slurm's commands: reading the queue, submitting, cancelling and requeueing jobs."""

import argparse
import os
import re
import secrets
import subprocess
from collections.abc import Iterable, Mapping, Sequence

from launcher.plan import drop_job_variables
from launcher.slurm.format import (
    JobRecord,
    LostAnswerError,
    QueueEntry,
    SlurmError,
    Submitted,
    parse_job,
    parse_queue,
    parse_submitted,
    render_queue_format,
)

_ANSWER_S = 60.0
_REQUEUE_S = 20.0  # shorter, because a task requeues in the last minutes before its time limit
# Words of Slurm's errors (`slurm_errno.c`) that leave the fate of a request open. All other errors are refusals.
_LOST = re.compile(
    "communication|contact|connect|timed? ?out|message (send|receive)|unexpected message|bytes were|data received", re.I
)
POLL_S = 15.0
_MAX_POLL_S = 60.0


def next_interval(interval_s: float, changed: bool) -> float:
    """Return the seconds until `squeue` may be called again, more while nothing changes: all users share Slurm."""
    return POLL_S if changed else min(2 * interval_s, _MAX_POLL_S)


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of Slurm's commands, without enclosing job and user's filters; SBATCH_* defaults stay."""
    outside = drop_job_variables(environment)
    return {name: value for name, value in outside.items() if not name.startswith(("SQUEUE_", "SCANCEL_"))}


def read_queue(clusters: Iterable[str] = ()) -> list[QueueEntry] | None:
    """Read this user's jobs, including recently ended ones, on this cluster and the named ones.

    Return None if one of the clusters does not answer, which implies nothing about the jobs.
    """
    entries = []
    for cluster in (None, *clusters):
        cluster_entries = _read_cluster(cluster)
        if cluster_entries is None:
            return None
        entries += cluster_entries
    return entries


def _read_cluster(clusters: str | None) -> list[QueueEntry] | None:
    mark, uid = secrets.token_hex(8), os.geteuid()
    command = ["squeue", "--array", "--states=all", f"--format={render_queue_format(mark)}"]
    command += [f"--clusters={clusters}"] if clusters else []
    # --me needs Slurm 20.02. For a user without a passwd entry (in a container), squeue rejects both --me and --user,
    # but prints an empty queue, as if nothing were submitted. Then read all rows, and keep those of the uid.
    for user in (["--me"], [f"--user={uid}"], []):
        try:
            done = _run([*command, *user], _ANSWER_S)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if "unrecognized option" not in done.stderr and "Invalid user" not in done.stderr:
            return parse_queue(done.stdout, mark, uid) if done.returncode == 0 else None
    return None


def find_clusters(command: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Find the clusters that `sbatch` may choose from, such as `a,b`; None if none are stated."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-M", "--clusters", default=environment.get("SBATCH_CLUSTERS"))
    clusters: str | None = parser.parse_known_args(command[1:])[0].clusters
    return clusters


def submit_script(command: Sequence[str], script: str) -> Submitted:
    """Submit a script once.

    Raises:
        LostAnswerError: sbatch gave no answer, or none that can be parsed; the job may be in the queue nevertheless.
        SlurmError: Slurm refused the job, or sbatch can't be run on this machine.
    """
    try:
        done = _run(command, _ANSWER_S, script)
    except OSError as error:
        raise SlurmError(f"sbatch can't be run: {error} (submit from a machine of the cluster)") from error
    except subprocess.TimeoutExpired as error:
        raise LostAnswerError(f"sbatch has not answered for {_ANSWER_S:g} s") from error
    submitted = parse_submitted(done.stdout) if done.returncode == 0 else None
    if submitted is None:
        is_lost = done.returncode == 0 or _LOST.search(done.stderr) is not None
        message = f"sbatch failed (exit code {done.returncode}): {(done.stderr or done.stdout).strip()}"
        raise LostAnswerError(message) if is_lost else SlurmError(message)
    return submitted


def cancel_jobs(entries: Sequence[QueueEntry]) -> None:
    """Ask Slurm to cancel exactly these jobs.

    Raises:
        SlurmError: Slurm refuses or does not answer.
    """
    for cluster in dict.fromkeys(entry.cluster for entry in entries):
        jobs = [entry.job for entry in entries if entry.cluster == cluster]
        if failure := _try_command(["scancel", *([f"--clusters={cluster}"] if cluster else []), *jobs], _ANSWER_S):
            raise SlurmError(failure)


def read_job(job: str) -> JobRecord | None:
    """Read the controller's record of a job; None if it does not answer."""
    try:
        done = _run(["scontrol", "show", "job", job], _REQUEUE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_job(done.stdout) if done.returncode == 0 else None


def requeue_job(job: str) -> str | None:
    """Ask Slurm to put a running job back into the queue; return why it did not, or None if it did."""
    return _try_command(["scontrol", "requeue", job], _REQUEUE_S)


def _try_command(command: Sequence[str], answer_s: float) -> str | None:
    """Run a command of Slurm; return why it failed, or None if it succeeded."""
    try:
        done = _run(command, answer_s)
    except OSError as error:
        return f"{' '.join(command)}: {error}"
    except subprocess.TimeoutExpired:
        return f"{' '.join(command)}: no answer for {answer_s:g} s"
    return f"{' '.join(command)}: {done.stderr.strip()}" if done.returncode else None


def _run(command: Sequence[str], answer_s: float, script: str = "") -> "subprocess.CompletedProcess[str]":
    environment = slurm_environment(os.environ)
    if command[0] != "sbatch":  # sbatch passes its environment on to the job
        environment["LC_ALL"] = "C"
    return subprocess.run(
        command,
        env=environment,
        input=script,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # comments, and paths in the script, may have any encoding
        timeout=answer_s,
        check=False,
    )
