"""Which task of which array this process is, in the words of any batch system, and which folds it trains; pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    """Index of the first of the tasks that share."""
    sharing: int = 0
    """How many tasks share all folds out; 0: the index is the number of a fold."""
    variable: str = "INDEX"
    """Where the index was read, such as `$PBS_ARRAY_INDEX`."""


def parse_array_task(
    environment: Mapping[str, str], num_folds: int, stated: str | None = None, index_is_fold: bool = False
) -> ArrayTask:
    """The task that runs, by its environment; `stated` (--task) wins.

    All folds are shared out by an array without gaps that counts from 0 and has two tasks or more, or counts from 1 and
    has as many tasks as folds or more. The index of any other array, and of one whose length the environment does not
    say (PBS, Kubernetes), is the number of a fold; so it is of every array with `index_is_fold`.

    Raises:
        UserError: there is no task, or a variable of it is no number.
    """
    task, first, last = _read_task(environment)
    if stated is not None:
        index, first, last = _parse_stated(stated)
        sharing = 0 if index_is_fold else last - first + 1
        return replace(task, name=task.name or f"task {index}", index=index, first=first, sharing=sharing)
    if not task.name:
        raise UserError(
            "no task of a batch job: `doccls-launch task` runs within Slurm (sbatch slurm/kfold.sh CONFIG), PBS, LSF, "
            "SGE or a Kubernetes indexed Job; anywhere else say --task INDEX/COUNT, such as --task 0/5"
        )
    if task.index is None or first is None or last is None or index_is_fold:
        return task
    tasks, least = last - first + 1, {0: 2, 1: max(2, num_folds)}
    return replace(task, first=first, sharing=tasks) if first in least and tasks >= least[first] else task


def _parse_stated(stated: str) -> tuple[int, int, int]:
    """Index, first and last of --task."""
    found = _STATED.fullmatch(stated)
    if found is None:
        raise UserError(f"--task {stated}: write INDEX/COUNT, such as 0/5 to 4/5, or INDEX/FIRST-LAST, such as 5/1-5")
    index, first = int(found[1]), int(found[2] or 0)
    last = int(found[3]) if found[2] else int(found[3]) - 1
    if not first <= index <= last:
        raise UserError(f"--task {stated}: the index goes from {first} to {last}; one that starts at 1: INDEX/1-COUNT")
    return index, first, last


def _read_task(environment: Mapping[str, str]) -> tuple[ArrayTask, int | None, int | None]:
    """The task as one of its own, and first and last index of its array: None where there are gaps or no word."""
    array: str | None
    first = last = None
    if "SLURM_JOB_ID" in environment:
        array, variable = environment.get("SLURM_ARRAY_JOB_ID", environment["SLURM_JOB_ID"]), "SLURM_ARRAY_TASK_ID"
        first, last, count = (_read_number(environment, f"SLURM_ARRAY_TASK_{word}") for word in ("MIN", "MAX", "COUNT"))
        if first is None or last is None or count != last - first + 1:
            first = last = None
    elif "PBS_JOBID" in environment:
        array = re.split(r"[.\[]", environment["PBS_JOBID"], maxsplit=1)[0]
        variable = "PBS_ARRAY_INDEX" if "PBS_ARRAY_INDEX" in environment else "PBS_ARRAYID"
    elif "LSB_JOBID" in environment:
        array, variable = environment["LSB_JOBID"], "LSB_JOBINDEX"
        if _read_number(environment, "LSB_JOBINDEX_STEP") in (None, 1):
            first, last = 1, _read_number(environment, "LSB_JOBINDEX_END")
    elif "SGE_TASK_ID" in environment:
        array, variable = environment.get("JOB_ID"), "SGE_TASK_ID"
        if _read_number(environment, "SGE_TASK_STEPSIZE") in (None, 1):
            first, last = (_read_number(environment, f"SGE_TASK_{word}") for word in ("FIRST", "LAST"))
    else:
        array, variable = None, "JOB_COMPLETION_INDEX"
    index = _read_number(environment, variable)
    if variable == "LSB_JOBINDEX":
        index = index or None  # 0 without an array: LSF counts from 1
    name = (array or "") if index is None else f"{array}_{index}" if array else f"index {index}"
    return ArrayTask(name, array, index, variable=f"${variable}"), first, last


def _read_number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if text in ("", "undefined"):  # the latter is SGE's word for a job without an array
        return None
    if not text.isdecimal():
        raise UserError(f"{name}={text!r}: not a number; the batch system sets it to the task's index")
    return int(text)


def pick_folds(task: ArrayTask, wanted: Sequence[int], num_folds: int) -> tuple[int, ...]:
    """The wanted folds that the task trains: without an array all, of T tasks that share every T-th, else its index's.

    Raises:
        UserError: the index is taken for the number of a fold, and there is no such fold.
    """
    if task.index is None:
        return tuple(wanted)
    if task.sharing:
        return tuple(fold for fold in wanted if fold % task.sharing == task.index - task.first)
    if task.index >= num_folds:
        raise UserError(
            f"task {task.name}: its index is the number of the fold to train, and folds are numbered 0 to "
            f"{num_folds - 1} (data.folds = {num_folds}). Let the array count from 0 to {num_folds - 1}; or, in the "
            f"job's script, --task {task.variable}/1-{num_folds} for one from 1 to {num_folds}"
        )
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
