"""slurm_jobs.json: the arrays that were submitted for a run, each recorded before sbatch is called."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from doccls.errors import UserError
from doccls.system.atomic_files import read_text, write_text
from doccls.system.tensor_file import OtherVersionError, TensorFileError, refuse_format
from launcher.ledger import Ledger
from launcher.slurm.format import JobPhase, QueueEntry, Submitted, render_comment

_FORMAT = "doccls-slurm-jobs-1"


@dataclass(frozen=True)
class ArrayJob:
    """One submitted array with one task per fold."""

    token: str  # identifies the array in the queue, as part of the job's comment
    folds: tuple[int, ...]
    started: str  # just before sbatch was called, UTC
    resume_command: str  # trains the run's missing folds
    job: str | None = None  # Slurm's number of the array; None until it is known to have arrived
    refused: str | None = None  # why Slurm refused it
    # The cluster that has the job or, until that is known, those sbatch may choose from. None: squeue's default.
    cluster: str | None = None
    preempted: tuple[int, ...] = ()  # the folds that are resubmitted because Slurm's preemption cancelled their job
    study: str | None = None  # the study whose array it is: its tasks train folds of other runs too
    offset: int = 0  # index of the task that trains the run's fold 0
    cancelled: bool = False  # by `doccls-launch cancel`: a launcher that waits for the run does not resubmit its folds


def read_array_jobs(path: Path) -> tuple[ArrayJob, ...]:
    """Read the run's array jobs, in order; empty if nothing was ever submitted for the run.

    Raises:
        UserError: the file is damaged, or was written by another version of doccls.
    """
    try:
        fields = json.loads(read_text(path))
        refuse_format(path, fields["format"], _FORMAT)
        return tuple(_parse(job) for job in fields["jobs"])
    except FileNotFoundError:
        if (earlier := path.with_name("submissions.json")).exists():
            raise UserError(
                f"{earlier}: an earlier version of doccls submitted jobs for this run. Continue with that version, or "
                "choose another --run-id"
            ) from None
        return ()
    except OtherVersionError as error:
        raise UserError(f"{error}. Continue the run with that version, or choose another --run-id") from error
    except (TensorFileError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}). Once squeue shows no job of the run, delete the file") from error


def _parse(fields: dict[str, Any]) -> ArrayJob:
    folds = {name: tuple(fields[name]) for name in ("folds", "preempted")}
    return ArrayJob(**fields | folds)


def write_array_jobs(path: Path, array_jobs: Sequence[ArrayJob]) -> None:
    """Write the run's array jobs atomically; only the holder of the submission lock may call."""
    fields = {"format": _FORMAT, "jobs": [asdict(array_job) for array_job in array_jobs]}
    write_text(path, json.dumps(fields, indent=1) + "\n")


def resolve_lost_answers(
    array_jobs: Sequence[ArrayJob], run_id: str, queue: Sequence[QueueEntry]
) -> tuple[ArrayJob, ...]:
    """Look up the array jobs whose answer from sbatch was lost, or was taken for a refusal, in the queue.

    They are identified by their comment. One that the queue does not show never arrived, and is marked refused.
    """
    resolved = []
    for array_job in array_jobs:
        if array_job.job is None:
            found = find_array_job(array_job.study or run_id, array_job.token, queue)
            if found:
                array_job = replace(array_job, job=found.job, cluster=found.cluster, refused=None)
            elif array_job.refused is None:
                array_job = replace(array_job, refused="it is not in the queue")
        resolved.append(array_job)
    return tuple(resolved)


def find_array_job(owner: str, token: str, queue: Sequence[QueueEntry]) -> Submitted | None:
    """Find the array that was submitted for a run or study with the token; None if the queue does not show it."""
    comment = render_comment(owner, token)
    matches = [Submitted(entry.array_job, entry.cluster) for entry in queue if entry.comment == comment]
    return matches[-1] if matches else None  # if two queues show it, the one with a cluster's name


def list_clusters(array_jobs: Sequence[ArrayJob]) -> list[str]:
    """List the clusters that have jobs of the run, besides the one that `squeue` shows by default."""
    return sorted({array_job.cluster for array_job in array_jobs if array_job.cluster is not None})


def list_preempted(array_jobs: Sequence[ArrayJob], queue: Sequence[QueueEntry]) -> dict[int, QueueEntry]:
    """Map each fold whose newest array job was cancelled by a preemption (`PreemptMode=CANCEL`) to its queue entry.

    A job that is preempted and requeued is pending again, and a job submitted by hand is left to its user to resubmit.
    """
    newest = {fold: array_job for array_job in array_jobs if array_job.refused is None for fold in array_job.folds}
    entries = {(entry.cluster, entry.job): entry for entry in queue if entry.state == "PREEMPTED"}
    tasks = {fold: (job.cluster, f"{job.job}_{job.offset + fold}") for fold, job in newest.items() if not job.cancelled}
    return {fold: entries[task] for fold, task in tasks.items() if task in entries}


@dataclass(frozen=True)
class RunJob:
    """A Slurm job that was submitted to train folds of the run."""

    number: str  # of the array, if it is one
    array: bool
    sharing: int = 0  # number of the array's tasks that divide all folds; 0: each trains the fold of its index
    first: int = 0  # index of the first of these tasks
    offset: int = 0  # number of the run's fold 0 among the folds that the array trains
    cluster: str | None = None  # None: the one that `squeue` shows by default
    of_study: bool = False  # other tasks of the array train folds of other runs

    def name(self, fold: int) -> str:
        """Return Slurm's name of the task that trains the fold."""
        if not self.array:
            return self.number
        number = fold + self.offset
        return f"{self.number}_{number % self.sharing + self.first if self.sharing else number}"


def list_jobs(array_jobs: Sequence[ArrayJob], ledgers: Sequence[Ledger]) -> list[RunJob]:
    """List the jobs that were submitted for the run, by the launcher or by hand, in order of their numbers."""
    jobs = {_make_job(job) for job in array_jobs if job.job is not None}
    clusters = {job.number: job.cluster for job in jobs}
    for ledger in ledgers:
        if ledger.job is not None:
            number, _, task = ledger.job.partition("_")
            share = ledger.sharing, ledger.first_task, ledger.offset
            jobs.add(RunJob(number, bool(task), *share, clusters.get(number), ledger.study is not None))
    return sorted(jobs, key=lambda job: int(job.number))


def _make_job(array_job: ArrayJob) -> RunJob:
    assert array_job.job is not None
    of_study = array_job.study is not None
    return RunJob(array_job.job, True, offset=array_job.offset, cluster=array_job.cluster, of_study=of_study)


def find_newest(fold: int, jobs: Sequence[RunJob], queue: Sequence[QueueEntry]) -> QueueEntry | None:
    """Find the queue entry of the fold's newest job; None if the queue shows none of its jobs."""
    entries = {(entry.cluster, entry.job): entry for entry in queue}
    tasks = [(job.cluster, job.name(fold)) for job in jobs]
    return next((entries[task] for task in reversed(tasks) if task in entries), None)


def list_active(folds: Sequence[int], jobs: Sequence[RunJob], queue: Sequence[QueueEntry]) -> dict[int, QueueEntry]:
    """Map each of the folds whose newest job is pending or running to its queue entry."""
    newest = {fold: find_newest(fold, jobs, queue) for fold in folds}
    return {fold: entry for fold, entry in newest.items() if entry is not None and entry.phase is not JobPhase.ENDED}
