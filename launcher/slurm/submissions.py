"""submissions.json: the arrays that were submitted for a run, each written before Slurm is asked."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from doccls.errors import UserError
from doccls.system.atomic_files import write_text
from launcher.ledger import Ledger
from launcher.slurm.format import Going, QueueEntry, render_comment

_FORMAT = "doccls-submissions-1"


@dataclass(frozen=True)
class Submission:
    """One array, a task a fold."""

    token: str
    """By which it is found in the queue."""
    folds: tuple[int, ...]
    started: str
    """When Slurm was about to be asked, UTC."""
    again: str | None = None
    """The command that trains what is missing of the run; None in a file of an earlier version."""
    job: str | None = None
    """Slurm's number of the array; None as long as it is not known whether it arrived."""
    refused: str | None = None
    """Why Slurm did not take it."""


def read_submissions(path: Path) -> tuple[Submission, ...]:
    """Of the run, in order; none if nothing was ever submitted for it.

    Raises:
        UserError: the file is damaged, or of another version of doccls.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != _FORMAT:
            raise ValueError("another format")
        return tuple(Submission(**one | {"folds": tuple(one["folds"])}) for one in fields["submissions"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged, or of another version ({error}). Delete it to go on, once squeue shows no job of the run"
        ) from error


def write_submissions(path: Path, submissions: Sequence[Submission]) -> None:
    """Write them, whole; only the holder of the submission lock may call."""
    stated = {"format": _FORMAT, "submissions": [asdict(one) for one in submissions]}
    write_text(path, json.dumps(stated, indent=1) + "\n")


def settle(submissions: Sequence[Submission], run_id: str, queue: Sequence[QueueEntry]) -> tuple[Submission, ...]:
    """With the fate of those whose answer was lost: the queue knows them by their comment, or they never arrived."""
    jobs = {entry.comment: entry.array_job for entry in queue}
    settled = []
    for one in submissions:
        if one.job is None and one.refused is None:
            job = jobs.get(render_comment(run_id, one.token))
            one = replace(one, job=job, refused=None if job else "it is not in the queue")
        settled.append(one)
    return tuple(settled)


@dataclass(frozen=True)
class RunJob:
    """A Slurm job that was to train folds of the run."""

    number: str
    """Of the whole array."""
    array: bool
    sharing: int = 0
    """How many tasks of the array share all folds out; 0: each trains the fold of its number."""

    def name(self, fold: int) -> str:
        """Slurm's name of the task that was to train the fold."""
        if not self.array:
            return self.number
        return f"{self.number}_{fold % self.sharing if self.sharing else fold}"


def list_jobs(submissions: Sequence[Submission], ledgers: Sequence[Ledger]) -> list[RunJob]:
    """The jobs that were submitted for the run, by the launcher or by hand."""
    jobs = {RunJob(one.job, True) for one in submissions if one.job is not None}
    for ledger in ledgers:
        if ledger.job is not None:
            number, _, task = ledger.job.partition("_")
            jobs.add(RunJob(number, bool(task), ledger.sharing))
    return sorted(jobs, key=lambda job: int(job.number))


def find_newest(fold: int, jobs: Sequence[RunJob], queue: Sequence[QueueEntry]) -> QueueEntry | None:
    """The queue's entry of the newest job that was to train the fold."""
    entries = {entry.job: entry for entry in queue}
    found = [entries[job.name(fold)] for job in jobs if job.name(fold) in entries]
    return found[-1] if found else None


def list_going(folds: Sequence[int], jobs: Sequence[RunJob], queue: Sequence[QueueEntry]) -> dict[int, QueueEntry]:
    """The queue's entry for each of the folds that a job will train or trains."""
    newest = {fold: find_newest(fold, jobs, queue) for fold in folds}
    return {fold: entry for fold, entry in newest.items() if entry is not None and entry.going is not Going.ENDED}
