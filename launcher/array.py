"""Which task of which array this process is, in the words of any batch system, and which folds it trains; pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from doccls.errors import UserError

REQUEUE_CODE = 75
"""EX_TEMPFAIL of sysexits.h: what was begun is to be tried again later."""
_STATED = re.compile(r"(\d+)/(?:(\d+)-)?(\d+)")


@dataclass(frozen=True)
class ArrayTask:
    """A task of a job array, or a job without one (`index` is None)."""

    name: str
    """For people and the ledger, such as `12_3`."""
    array: str | None
    """The batch system's number of the whole array; None where the environment does not say it (Kubernetes)."""
    index: int | None = None
    """In the array, as the batch system counts."""
    first: int = 0
    """Index of the array's first task."""
    sharing: int = 0
    """How many tasks share all folds out, the first at index `first`; 0: the index is the number of a fold."""


def parse_array_task(
    environment: Mapping[str, str], stated: str | None = None, index_is_fold: bool = False
) -> ArrayTask:
    """The task that runs, by its environment; `stated` (--task) wins.

    An array of two or more tasks that counts from 0 or 1 without gaps shares all folds out. The index of any other, and
    of one whose length the environment does not say (PBS, Kubernetes), is the number of a fold; so it is of every array
    with `index_is_fold`.

    Raises:
        UserError: there is no task, or a variable of it is no number.
    """
    name, array, index, first, last = _read_task(environment)
    if stated is not None:
        found = _STATED.fullmatch(stated)
        if found is None:
            raise UserError(
                f"--task {stated}: write INDEX/COUNT, such as 0/5 to 4/5, or INDEX/FIRST-LAST, such as 5/1-5"
            )
        index, first = int(found[1]), int(found[2] or 0)
        last = int(found[3]) if found[2] else int(found[3]) - 1
        if not first <= index <= last:
            raise UserError(
                f"--task {stated}: the index goes from {first} to {last}; one that starts at 1: INDEX/1-COUNT"
            )
        return ArrayTask(name or f"task {index}", array, index, first, last - first + 1)
    if not name:
        raise UserError(
            "no task of a batch job: `doccls-launch task` runs within Slurm (sbatch slurm/kfold.sh CONFIG), PBS, LSF, "
            "SGE or a Kubernetes indexed Job; anywhere else say --task INDEX/COUNT, such as --task 0/5"
        )
    if index is None or first not in (0, 1) or last is None or last == first or index_is_fold:
        return ArrayTask(name, array, index)
    return ArrayTask(name, array, index, first, last - first + 1)


def _read_task(environment: Mapping[str, str]) -> tuple[str, str | None, int | None, int | None, int | None]:
    """Name, array, index, and first and last index of the array, which are None where there are gaps or no word."""
    if "SLURM_JOB_ID" in environment:
        array = environment.get("SLURM_ARRAY_JOB_ID", environment["SLURM_JOB_ID"])
        index, first, last, count = (
            _read_number(environment, f"SLURM_ARRAY_TASK_{word}") for word in ("ID", "MIN", "MAX", "COUNT")
        )
        if first is None or last is None or count != last - first + 1:
            first = last = None
    elif "PBS_JOBID" in environment:
        array = re.split(r"[.\[]", environment["PBS_JOBID"], maxsplit=1)[0]
        index = _read_number(environment, "PBS_ARRAY_INDEX", "PBS_ARRAYID")
        first = last = None
    elif "LSB_JOBID" in environment:
        array = environment["LSB_JOBID"]
        index = _read_number(environment, "LSB_JOBINDEX") or None  # 0 without an array: LSF counts from 1
        has_gaps = _read_number(environment, "LSB_JOBINDEX_STEP") not in (None, 1)
        first, last = (None, None) if has_gaps else (1, _read_number(environment, "LSB_JOBINDEX_END"))
    elif "SGE_TASK_ID" in environment:
        array = environment["JOB_ID"]
        index, first, last, step = (
            _read_number(environment, f"SGE_TASK_{word}") for word in ("ID", "FIRST", "LAST", "STEPSIZE")
        )
        if step not in (None, 1):
            first = last = None
    else:
        index = _read_number(environment, "JOB_COMPLETION_INDEX")
        return ("" if index is None else f"index {index}"), None, index, None, None
    return array if index is None else f"{array}_{index}", array, index, first, last


def _read_number(environment: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        text = environment.get(name, "")
        if text and text != "undefined":  # SGE's word for a job without an array
            if not text.isdecimal():
                raise UserError(f"{name}={text!r}: not a number; the batch system sets it to the task's index")
            return int(text)
    return None


def pick_folds(task: ArrayTask, wanted: Sequence[int], num_folds: int) -> tuple[int, ...]:
    """Which of the wanted folds the task trains: without an array all, a share of T tasks every T-th, else its index's.

    Raises:
        UserError: the index is taken for the number of a fold, and there is no such fold.
    """
    if task.index is not None and not task.sharing and task.index >= num_folds:
        raise UserError(
            f"task {task.name}: its index is the number of the fold to train, and folds are numbered 0 to "
            f"{num_folds - 1} (data.folds = {num_folds}). In an array that starts at 1 say so: "
            f"--task {task.index}/1-{num_folds}"
        )
    if task.index is None:
        return tuple(wanted)
    if task.sharing:
        return tuple(fold for fold in wanted if fold % task.sharing == task.index - task.first)
    return tuple(fold for fold in wanted if fold == task.index)


def describe_share(task: ArrayTask, folds: Sequence[int], num_folds: int) -> str:
    """What the task trains, and why, for people."""
    counted = f"folds are numbered 0 to {num_folds - 1}"
    mine = f"fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}" if folds else "no fold is left for it"
    if task.index is None:
        return f"job {task.name}: {mine}"
    if task.sharing:
        return f"task {task.name} of {task.first} to {task.first + task.sharing - 1}: {mine} ({counted})"
    return f"task {task.name}: {mine} (the index is the fold's number; {counted})"
