"""slurm_jobs.json: the arrays that were submitted for a run, each written before Slurm is asked."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from doccls.errors import UserError
from doccls.system.atomic_files import write_text
from launcher.ledger import Ledger
from launcher.slurm.format import Going, QueueEntry, Submitted, render_comment

_FORMAT = "doccls-slurm-jobs-1"


@dataclass(frozen=True)
class ArrayJob:
    """One array, a task a fold."""

    token: str
    """By which it is found in the queue."""
    folds: tuple[int, ...]
    started: str
    """When Slurm was about to be asked, UTC."""
    resume_command: str | None = None
    """The command that trains what is missing of the run; None in a file of an earlier version."""
    job: str | None = None
    """Slurm's number of the array; None as long as it is not known whether it arrived."""
    refused: str | None = None
    """Why Slurm did not take it."""
    cluster: str | None = None
    """Where the job is; as long as that is not known, the clusters that were stated. None: where squeue looks."""
    preempted: tuple[int, ...] = ()
    """Of the folds, those that are submitted again since Slurm preempted their job for good."""
    cancelled: bool = False
    """Whether `doccls-launch cancel` ended it: nobody who waits for the run submits its folds again."""


def read_array_jobs(path: Path) -> tuple[ArrayJob, ...]:
    """Of the run, in order; none if nothing was ever submitted for it.

    Raises:
        UserError: the file is damaged, or of another version of doccls.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != _FORMAT:
            raise ValueError("another format")
        return tuple(_parse(one) for one in fields["jobs"])
    except FileNotFoundError:
        if (earlier := path.with_name("submissions.json")).exists():
            raise UserError(
                f"{earlier}: an earlier version of doccls submitted jobs for this run. Go on with that version, or "
                "choose another --run-id"
            ) from None
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged, or of another version ({error}). Delete it to go on, once squeue shows no job of the run"
        ) from error


def _parse(stated: dict[str, Any]) -> ArrayJob:
    folds = {name: tuple(stated.get(name, ())) for name in ("folds", "preempted")}
    return ArrayJob(**stated | folds)


def write_array_jobs(path: Path, array_jobs: Sequence[ArrayJob]) -> None:
    """Write them, whole; only the holder of the submission lock may call."""
    stated = {"format": _FORMAT, "jobs": [asdict(one) for one in array_jobs]}
    write_text(path, json.dumps(stated, indent=1) + "\n")


def settle(array_jobs: Sequence[ArrayJob], run_id: str, queue: Sequence[QueueEntry]) -> tuple[ArrayJob, ...]:
    """The submissions with the jobs of those whose answer was lost, or was taken for a refusal.

    The queue shows them by their comment. One that it does not show never arrived.
    """
    settled = []
    for submission in array_jobs:
        if submission.job is None:
            found = find_array_job(run_id, submission.token, queue)
            if found:
                submission = replace(submission, job=found.job, cluster=found.cluster, refused=None)
            elif submission.refused is None:
                submission = replace(submission, refused="it is not in the queue")
        settled.append(submission)
    return tuple(settled)


def find_array_job(run_id: str, token: str, queue: Sequence[QueueEntry]) -> Submitted | None:
    """The array that was submitted with the token; None if the queue does not show it."""
    comment = render_comment(run_id, token)
    found = [Submitted(entry.array_job, entry.cluster) for entry in queue if entry.comment == comment]
    return found[-1] if found else None  # of two queues that show it, the one with a cluster's name


def list_clusters(array_jobs: Sequence[ArrayJob]) -> list[str]:
    """All that have jobs of the run, beside the one whose queue `squeue` shows by itself."""
    return sorted({one.cluster for one in array_jobs if one.cluster is not None})


def list_preempted(array_jobs: Sequence[ArrayJob], queue: Sequence[QueueEntry]) -> dict[int, QueueEntry]:
    """The queue's entry for each fold whose newest submission Slurm preempted for good (`PreemptMode=CANCEL`).

    A job that is preempted and requeued waits again, and one that was submitted by hand is its user's to submit again.
    """
    newest = {fold: one for one in array_jobs if one.refused is None for fold in one.folds}
    entries = {(entry.cluster, entry.job): entry for entry in queue if entry.state == "PREEMPTED"}
    tasks = {fold: (one.cluster, f"{one.job}_{fold}") for fold, one in newest.items() if not one.cancelled}
    return {fold: entries[task] for fold, task in tasks.items() if task in entries}


@dataclass(frozen=True)
class RunJob:
    """A Slurm job that was to train folds of the run."""

    number: str
    """Of the whole array."""
    array: bool
    sharing: int = 0
    """How many tasks of the array share all folds out; 0: each trains the fold of its index."""
    first: int = 0
    """Index of the first of them."""
    cluster: str | None = None
    """None is the one whose queue `squeue` shows by itself."""

    def name(self, fold: int) -> str:
        """Slurm's name of the task that was to train the fold."""
        if not self.array:
            return self.number
        return f"{self.number}_{fold % self.sharing + self.first if self.sharing else fold}"


def list_jobs(array_jobs: Sequence[ArrayJob], ledgers: Sequence[Ledger]) -> list[RunJob]:
    """The jobs that were submitted for the run, by the launcher or by hand."""
    jobs = {RunJob(one.job, True, cluster=one.cluster) for one in array_jobs if one.job is not None}
    clusters = {job.number: job.cluster for job in jobs}
    for ledger in ledgers:
        if ledger.job is not None:
            number, _, task = ledger.job.partition("_")
            jobs.add(RunJob(number, bool(task), ledger.sharing, ledger.first_task, clusters.get(number)))
    return sorted(jobs, key=lambda job: int(job.number))


def find_newest(fold: int, jobs: Sequence[RunJob], queue: Sequence[QueueEntry]) -> QueueEntry | None:
    """The queue's entry of the newest job that was to train the fold."""
    entries = {(entry.cluster, entry.job): entry for entry in queue}
    tasks = [(job.cluster, job.name(fold)) for job in jobs]
    return next((entries[task] for task in reversed(tasks) if task in entries), None)


def list_going(folds: Sequence[int], jobs: Sequence[RunJob], queue: Sequence[QueueEntry]) -> dict[int, QueueEntry]:
    """The queue's entry for each of the folds that a job will train or trains."""
    newest = {fold: find_newest(fold, jobs, queue) for fold in folds}
    return {fold: entry for fold, entry in newest.items() if entry is not None and entry.going is not Going.ENDED}
