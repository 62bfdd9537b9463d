"""Asking Slurm's controller: what is in the queue, to take an array, to cancel, to requeue."""

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
_REQUEUE_S = 20.0
"""A task asks for this in the minutes before its time limit."""
_LOST = re.compile(
    "communication|contact|connect|timed? ?out|message (send|receive)|unexpected message|bytes were|data received", re.I
)
"""Words of Slurm's errors (`slurm_errno.c`) that say nothing of what became of a request. All others are a refusal."""
ASK_S = 15.0
_ASK_MOST_S = 60.0


def next_interval(interval_s: float, changed: bool) -> float:
    """Seconds until `squeue` may be asked again: the controller is everybody's, and what rests is asked about less."""
    return ASK_S if changed else min(2 * interval_s, _ASK_MOST_S)


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """For Slurm's commands: no enclosing job and no filter of the user's changes an answer; SBATCH_* are defaults."""
    outside = drop_job_variables(environment)
    return {name: value for name, value in outside.items() if not name.startswith(("SQUEUE_", "SCANCEL_"))}


def ask_queue(clusters: Iterable[str] = ()) -> list[QueueEntry] | None:
    """This user's jobs, also those that ended a short while ago, here and on the named clusters.

    None if one of them does not answer, which says nothing of the jobs.
    """
    entries = []
    for cluster in (None, *clusters):
        found = _ask_cluster(cluster)
        if found is None:
            return None
        entries += found
    return entries


def _ask_cluster(clusters: str | None) -> list[QueueEntry] | None:
    mark, uid = secrets.token_hex(8), os.geteuid()
    command = ["squeue", "--array", "--states=all", f"--format={render_queue_format(mark)}"]
    command += [f"--clusters={clusters}"] if clusters else []
    # --me came with 20.02, and squeue takes neither for a user whom this machine (a container) has no entry of: it
    # complains and shows an empty queue, as if nothing were submitted. Then all rows are read, for those of the uid.
    for whose in (["--me"], [f"--user={uid}"], []):
        try:
            done = _run([*command, *whose], _ANSWER_S)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if "unrecognized option" not in done.stderr and "Invalid user" not in done.stderr:
            return parse_queue(done.stdout, mark, uid) if done.returncode == 0 else None
    return None


def find_clusters(command: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """The clusters among which `sbatch` is to choose, such as `a,b`; None if that is left to Slurm."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-M", "--clusters", default=environment.get("SBATCH_CLUSTERS"))
    clusters: str | None = parser.parse_known_args(command[1:])[0].clusters
    return clusters


def submit_script(command: Sequence[str], script: str) -> Submitted:
    """Submit once.

    Raises:
        LostAnswerError: there is no answer, or none that can be read; the job may be in the queue all the same.
        SlurmError: Slurm refuses the job, or can't be asked from this machine.
    """
    try:
        done = _run(command, _ANSWER_S, script)
    except OSError as error:
        raise SlurmError(f"sbatch can't be run: {error} (a machine of the cluster submits)") from error
    except subprocess.TimeoutExpired as error:
        raise LostAnswerError(f"sbatch has not answered for {_ANSWER_S:g} s") from error
    submitted = parse_submitted(done.stdout) if done.returncode == 0 else None
    if submitted is None:
        is_lost = done.returncode == 0 or _LOST.search(done.stderr) is not None
        message = f"sbatch failed (exit code {done.returncode}): {(done.stderr or done.stdout).strip()}"
        raise LostAnswerError(message) if is_lost else SlurmError(message)
    return submitted


def cancel_jobs(entries: Sequence[QueueEntry]) -> None:
    """Ask Slurm to end just these.

    Raises:
        SlurmError: it does not answer.
    """
    for cluster in dict.fromkeys(entry.cluster for entry in entries):
        jobs = [entry.job for entry in entries if entry.cluster == cluster]
        if refused := _order(["scancel", *([f"--clusters={cluster}"] if cluster else []), *jobs], _ANSWER_S):
            raise SlurmError(refused)


def read_job(job: str) -> JobRecord | None:
    """What the controller knows of a job that runs; None if it does not answer."""
    try:
        done = _run(["scontrol", "show", "job", job], _REQUEUE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_job(done.stdout) if done.returncode == 0 else None


def requeue_job(job: str) -> str | None:
    """Ask Slurm to put a job that runs back into the queue; why it did not, or None if it did."""
    return _order(["scontrol", "requeue", job], _REQUEUE_S)


def _order(command: Sequence[str], answer_s: float) -> str | None:
    """Why the command was not carried out, or None if it was."""
    try:
        done = _run(command, answer_s)
    except OSError as error:
        return f"{' '.join(command)}: {error}"
    except subprocess.TimeoutExpired:
        return f"{' '.join(command)}: no answer for {answer_s:g} s"
    return f"{' '.join(command)}: {done.stderr.strip()}" if done.returncode else None


def _run(command: Sequence[str], answer_s: float, script: str = "") -> "subprocess.CompletedProcess[str]":
    environment = slurm_environment(os.environ)
    if command[0] != "sbatch":  # which hands its environment on to the job
        environment["LC_ALL"] = "C"
    return subprocess.run(
        command,
        env=environment,
        input=script,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # a comment may be in any encoding, as a path in the script
        timeout=answer_s,
        check=False,
    )
