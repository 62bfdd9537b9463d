"""What Slurm's variables and messages say, and the commands and scripts for it; pure."""

import re
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from doccls.errors import UserError

_STEP_END = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.*?)(?: \(core dumped\))?$", re.MULTILINE)
_EXITED = re.compile(r"Exited with exit code (\d+)")
_SIGNALS = {signal.strsignal(number): -number for number in signal.valid_signals()}
_BECOME_RANK = (
    'exec >>"$0$SLURM_PROCID.txt" 2>&1\n'
    '[ "$SLURM_STEP_NUM_TASKS" = 1 ] || export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"\n'
    'exec "$@"'
)
"""What each process of a step does first; its arguments are the beginning of its console's path and the command."""


class SlurmError(UserError):
    """Slurm is not there, or does not give what is asked for."""


@dataclass(frozen=True)
class SlurmTask:
    """A task of a job array, or a job without one, as Slurm's variables tell it."""

    job: str
    """Slurm's name for it, such as `12_3`."""
    array_job: str
    """Of the whole array, such as `12`; without an array the job's own."""
    number: int | None
    """In the array; None without one."""
    count: int
    """Of the array's tasks if they are numbered 0 to count - 1, else 0."""
    nodes: int
    gpus_per_node: int
    cpus_per_node: int


def parse_task(environment: Mapping[str, str]) -> SlurmTask:
    """Of the job that runs.

    Raises:
        SlurmError: there is none.
    """
    if "SLURM_JOB_ID" not in environment:
        raise SlurmError("no Slurm job: slurm/kfold.sh runs this command in one (sbatch slurm/kfold.sh CONFIG)")
    job, count, number = environment["SLURM_JOB_ID"], 1, None
    array_job = environment.get("SLURM_ARRAY_JOB_ID", job)
    if "SLURM_ARRAY_TASK_ID" in environment:
        number = int(environment["SLURM_ARRAY_TASK_ID"])
        first, last = (int(environment[f"SLURM_ARRAY_TASK_{which}"]) for which in ("MIN", "MAX"))
        count = int(environment["SLURM_ARRAY_TASK_COUNT"])
        job = f"{array_job}_{number}"
        if first != 0 or last != count - 1:
            count = 0
    return SlurmTask(
        job=job,
        array_job=array_job,
        number=number,
        count=count,
        nodes=int(environment.get("SLURM_JOB_NUM_NODES", "1")),
        gpus_per_node=int(environment.get("SLURM_GPUS_ON_NODE", "0").rpartition(":")[2]),
        cpus_per_node=int(environment.get("SLURM_CPUS_ON_NODE", "1")),
    )


def pick_folds(task: SlurmTask, wanted: Sequence[int], share: bool) -> tuple[int, ...]:
    """The folds that the task trains: without an array all, of one its number's.

    With `share`, T tasks numbered from 0 share all folds out: each trains every T-th.
    """
    if task.number is None:
        return tuple(wanted)
    if share and task.count:
        return tuple(fold for fold in wanted if fold % task.count == task.number)
    return tuple(fold for fold in wanted if fold == task.number)


def render_step(
    name: str, command: Sequence[str], console: str, nodes: int, ranks_per_node: int, cpus_per_rank: int
) -> tuple[str, ...]:
    """The job step that runs `command` once a rank; what a rank prints is added to `console`, its number and `.txt`.

    Who stays when one rank has ended is the launcher's to decide, not srun's.
    """
    return (
        "srun", f"--job-name={name}", "--export=ALL", "--input=none", "--wait=0", "--kill-on-bad-exit=0",
        f"--nodes={nodes}", f"--ntasks={nodes * ranks_per_node}", f"--ntasks-per-node={ranks_per_node}",
        f"--cpus-per-task={cpus_per_rank}", "bash", "-c", _BECOME_RANK, console, *command,
    )  # fmt: skip


@dataclass(frozen=True)
class JobRequest:
    """What a task of a submitted array gets; None leaves it to the cluster."""

    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    at_once: int | None = None
    """Most tasks that run at a time."""
    others: tuple[str, ...] = ()
    """Further arguments of sbatch, which win."""


def render_sbatch(request: JobRequest, folds: Sequence[int], run_id: str, token: str, consoles: str) -> tuple[str, ...]:
    """The command that submits an array, a task a fold; it reads the script from its input.

    A task's own words go into a file in the folder `consoles`.
    """
    limit = "" if request.at_once is None else f"%{request.at_once}"
    stated = {
        "gpus-per-node": request.gpus_per_node or None,  # a cluster without GPUs knows no such word
        "partition": request.partition,
        "account": request.account,
        "time": request.time,
    }
    return (
        "sbatch", "--parsable", f"--job-name=doccls-{run_id}", f"--comment={render_comment(run_id, token)}",
        f"--array={','.join(map(str, folds))}{limit}", f"--nodes={request.nodes}", "--ntasks-per-node=1",
        f"--cpus-per-task={request.cpus_per_node}", "--requeue",
        "--open-mode=append", "--signal=B:USR1@120", f"--output={render_output(consoles)}",
        *(f"--{option}={value}" for option, value in stated.items() if value is not None), *request.others,
    )  # fmt: skip


def render_script(python: str, words: Sequence[str]) -> str:
    """The script of a submitted task; `words` are those of `doccls.train`."""
    return f"#!/bin/bash\nexec {shlex.join([python, '-m', 'launcher', 'task', *words])}\n"


def render_comment(run_id: str, token: str) -> str:
    """What a submitted job says of itself in the queue; a submission is known by it, also if its answer was lost."""
    return f"doccls:{run_id}:{token}"


def render_output(folder: str) -> str:
    """Slurm's pattern for a file a task in the folder; Slurm reads no pattern in a path with a backslash."""
    return "slurm-%A_%a.out" if "\\" in folder else f"{folder.replace('%', '%%')}/task%a.txt"


def parse_submitted(said: str) -> str | None:
    """The job's number in what `sbatch --parsable` printed; None if it is not there."""
    found = re.fullmatch(r"(\d+)(;\S+)?\s*", said)
    return found[1] if found else None


class Going(StrEnum):
    """What a job's state means for who waits for it."""

    WAITS = "waits"
    RUNS = "runs"
    ENDED = "ended"
    UNKNOWN = "unknown"
    """A state that this version of doccls does not know; nothing is concluded from it."""


_GOING = {
    Going.WAITS: (
        "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
        "POWER_UP_NODE", "UPDATE_DB",
    ),
    Going.RUNS: (
        "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "EXPEDITING",
    ),
    Going.ENDED: (
        "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
        "OUT_OF_MEMORY", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL",
    ),
}  # fmt: skip
"""Of Slurm's states and flags, `squeue` names one (squeue(1), JOB STATE CODES)."""
_MEANING = {state: going for going, states in _GOING.items() for state in states}


@dataclass(frozen=True)
class QueueEntry:
    """A job, or a task of an array, in Slurm's queue."""

    array_job: str
    number: int | None
    """In the array; None for a job without one."""
    state: str
    """Slurm's word for it, such as `PENDING`."""
    comment: str
    reason: str
    """Why it waits, such as `Resources`."""

    @property
    def job(self) -> str:
        """Slurm's name for it, such as `12_3`."""
        return self.array_job if self.number is None else f"{self.array_job}_{self.number}"

    @property
    def going(self) -> Going:
        """What its state means."""
        return _MEANING.get(self.state, Going.UNKNOWN)


QUEUE_FORMAT = "%F|%K|%T|%r|%k"
"""For `squeue --format`: plain text is the same in all of Slurm's versions and needs no plugin, unlike its JSON."""


def parse_queue(said: str) -> list[QueueEntry]:
    """What `squeue --noheader --array --format=QUEUE_FORMAT` printed."""
    entries = []
    for line in said.splitlines():
        job, number, state, reason, comment = line.split("|", 4)
        entries.append(QueueEntry(job, int(number) if number.isdecimal() else None, state, comment, reason))
    return entries


def parse_step_ends(said: str) -> dict[int, int]:
    """What srun has said of ranks that ended badly -> exit codes by rank, minus a signal's number where one killed."""
    ends: dict[int, int] = {}
    for ranks, how in _STEP_END.findall(said):
        exited = _EXITED.fullmatch(how)
        code = int(exited[1]) if exited else _SIGNALS.get(how, 1)
        ends |= {rank: code for rank in _parse_numbers(ranks)}
    return ends


def _parse_numbers(text: str) -> list[int]:
    """`0,2-4` -> 0, 2, 3, 4."""
    numbers: list[int] = []
    for word in text.split(","):
        first, _, last = word.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
