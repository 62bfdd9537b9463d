"""Parsing which array task this process is, for any batch system, and which folds it trains; pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from doccls.errors import UserError

REQUEUE_CODE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, to be tried again later
_TASK_OPTION = re.compile(r"(\d+)/(?:(\d+)-)?(\d+)")


@dataclass(frozen=True)
class ArrayTask:
    """A task of a job array, or a job without an array (`index` is None)."""

    name: str  # for messages and the ledger, such as `12_3`
    array: str | None  # the array's job ID; None where the environment does not state it (Kubernetes)
    index: int | None = None  # in the array, as the batch system counts
    first: int = 0  # index of the first task that shares the folds
    sharing: int = 0  # number of tasks among which all folds are divided; 0: the index is a fold number
    variable: str = "INDEX"  # where the index was read, such as `$PBS_ARRAY_INDEX`


def parse_array_task(
    environment: Mapping[str, str], num_folds: int, stated: str | None = None, index_is_fold: bool = False
) -> ArrayTask:
    """Parse the task that this process is from its environment; `stated` (--task) takes precedence.

    An array divides all folds among its tasks if it has no gaps and either counts from 0 and has at least two tasks, or
    counts from 1 and has at least as many tasks as there are folds. In any other array, and where the environment does
    not state the array's length (PBS, Kubernetes), the index is a fold number; with `index_is_fold` it always is.

    Raises:
        UserError: the environment has no task, or one of its variables is not a number.
    """
    task, first, last = _parse_environment(environment)
    if stated is not None:
        index, first, last = _parse_task_option(stated)
        sharing = 0 if index_is_fold else last - first + 1
        return replace(task, name=task.name or str(index), index=index, first=first, sharing=sharing)
    if not task.name:
        raise UserError(
            "not a task of a batch job: `doccls-launch task` runs within Slurm (sbatch slurm/kfold.sh CONFIG), PBS, "
            "LSF, SGE or a Kubernetes indexed Job; elsewhere pass --task INDEX/COUNT, such as --task 0/5"
        )
    if task.index is None or first is None or last is None or index_is_fold:
        return task
    tasks, least = last - first + 1, {0: 2, 1: max(2, num_folds)}
    return replace(task, first=first, sharing=tasks) if first in least and tasks >= least[first] else task


def _parse_task_option(stated: str) -> tuple[int, int, int]:
    """Parse index, first and last index of --task."""
    match = _TASK_OPTION.fullmatch(stated)
    if match is None:
        raise UserError(f"--task {stated}: must be INDEX/COUNT, such as 0/5, or INDEX/FIRST-LAST, such as 5/1-5")
    index, first = int(match[1]), int(match[2] or 0)
    last = int(match[3]) if match[2] else int(match[3]) - 1
    if not first <= index <= last:
        raise UserError(f"--task {stated}: the index must be from {first} to {last}; to count from 1: INDEX/1-COUNT")
    return index, first, last


def _parse_environment(environment: Mapping[str, str]) -> tuple[ArrayTask, int | None, int | None]:
    """Parse the task alone, and its array's first and last index: None if the array has gaps or does not state them."""
    array: str | None
    first = last = None
    if "SLURM_JOB_ID" in environment:
        array, variable = environment.get("SLURM_ARRAY_JOB_ID", environment["SLURM_JOB_ID"]), "SLURM_ARRAY_TASK_ID"
        first, last, count = (
            _parse_number(environment, f"SLURM_ARRAY_TASK_{word}") for word in ("MIN", "MAX", "COUNT")
        )
        if first is None or last is None or count != last - first + 1:
            first = last = None
    elif "PBS_JOBID" in environment:
        array = re.split(r"[.\[]", environment["PBS_JOBID"], maxsplit=1)[0]
        variable = "PBS_ARRAY_INDEX" if "PBS_ARRAY_INDEX" in environment else "PBS_ARRAYID"
    elif "LSB_JOBID" in environment:
        array, variable = environment["LSB_JOBID"], "LSB_JOBINDEX"
        if _parse_number(environment, "LSB_JOBINDEX_STEP") in (None, 1):
            first, last = 1, _parse_number(environment, "LSB_JOBINDEX_END")
    elif "SGE_TASK_ID" in environment:
        array, variable = environment.get("JOB_ID"), "SGE_TASK_ID"
        if _parse_number(environment, "SGE_TASK_STEPSIZE") in (None, 1):
            first, last = (_parse_number(environment, f"SGE_TASK_{word}") for word in ("FIRST", "LAST"))
    else:
        array, variable = None, "JOB_COMPLETION_INDEX"
    index = _parse_number(environment, variable)
    if variable == "LSB_JOBINDEX":
        index = index or None  # LSF counts from 1: 0 is a job without an array
    name = (array or "") if index is None else f"{array}_{index}" if array else f"index {index}"
    return ArrayTask(name, array, index, variable=f"${variable}"), first, last


def _parse_number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if text in ("", "undefined"):  # SGE sets "undefined" for a job without an array
        return None
    if not text.isdecimal():
        raise UserError(f"{name}={text!r}: not a number; the batch system sets it to the task's index")
    return int(text)


def pick_folds(task: ArrayTask, wanted: Sequence[int], num_folds: int, source: str | None = None) -> tuple[int, ...]:
    """Return those of the wanted folds that the task trains.

    Without an array that is all of them, in an array of T tasks that divide the folds every T-th, otherwise the fold
    whose number is the index.

    Raises:
        UserError: the index is a fold number, and no such fold exists.
    """
    if task.index is None:
        return tuple(wanted)
    if task.sharing:
        return tuple(fold for fold in wanted if fold % task.sharing == task.index - task.first)
    if task.index >= num_folds:
        raise UserError(
            f"task {task.name}: its index is the number of the fold to train, but folds are numbered 0 to "
            f"{num_folds - 1} ({source or f'data.folds = {num_folds}'}). Submit an array from 0 to {num_folds - 1}; "
            f"for one from 1 to {num_folds}, pass --task {task.variable}/1-{num_folds} in the job script"
        )
    return tuple(fold for fold in wanted if fold == task.index)


def describe_share(task: ArrayTask, folds: Sequence[int], num_folds: int) -> str:
    """Describe which folds the task trains, and why, as one line for the log."""
    numbering = f"folds are numbered 0 to {num_folds - 1}"
    share = f"fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}" if folds else "no fold is left for it"
    if task.index is None:
        return f"job {task.name}: {share}"
    if task.sharing:
        return f"task {task.name} of {task.first} to {task.first + task.sharing - 1}: {share} ({numbering})"
    return f"task {task.name}: {share} (the index is the fold's number; {numbering})"
