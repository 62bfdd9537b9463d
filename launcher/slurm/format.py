"""What Slurm's variables and messages say, and the commands and scripts for it; pure."""

import re
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


class LostAnswerError(SlurmError):
    """Slurm's answer was lost on the way: it may have accepted the job all the same."""


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave the job."""

    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    stated_gpus: int | None = None
    """What the user has said with --gpus-per-node, to which the --gres of slurm/kfold.sh was added; None is nothing."""


def parse_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """What the job of this process has; None outside Slurm."""
    if "SLURM_JOB_ID" not in environment:
        return None
    stated = environment.get("SLURM_GPUS_PER_NODE", "")
    return Allocation(
        nodes=int(environment.get("SLURM_JOB_NUM_NODES", "1")),
        gpus_per_node=count_gpus(environment.get("SLURM_GPUS_ON_NODE", "")),
        cpus_per_node=int(environment.get("SLURM_CPUS_ON_NODE", "1")),
        stated_gpus=count_gpus(stated) if stated else None,
    )


def count_gpus(gpus: str) -> int:
    """`2`, `a100:2`, `gpu:2`, `gpu:h100:1,gpu:a100:1,lscratch:10` -> 2; `gpu` -> 1; `none` or nothing -> 0."""
    parts = [part.strip().removeprefix("gres/") for part in gpus.split(",") if part not in ("", "none")]
    if any(part.startswith("gpu") for part in parts):
        parts = [part for part in parts if part.startswith("gpu")]
    counts = [re.split("[:=]", part)[-1] for part in parts]
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


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


def render_comment(run_id: str, token: str) -> str:
    """What a submitted job says of itself in the queue; a submission is known by it, also if its answer was lost."""
    return f"doccls:{run_id}:{token}"


@dataclass(frozen=True)
class Submitted:
    """sbatch's answer."""

    job: str
    """The job's number."""
    cluster: str | None
    """Of a federation, or of several clusters, the one that has the job."""


def parse_submitted(said: str) -> Submitted | None:
    """What `sbatch --parsable` printed; None if that is no job's number."""
    found = re.fullmatch(r"(\d+)(?:;(\S+))?\s*", said)
    return Submitted(found[1], found[2]) if found else None


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
    cluster: str | None = None
    """Whose queue it is in; None is the one of this machine."""

    @property
    def job(self) -> str:
        """Slurm's name for it, such as `12_3`."""
        return self.array_job if self.number is None else f"{self.array_job}_{self.number}"

    @property
    def going(self) -> Going:
        """What its state means."""
        return _MEANING.get(self.state, Going.UNKNOWN)


def render_queue_format(mark: str) -> str:
    """For `squeue --format`: plain text is the same in all of Slurm's versions and needs no plugin, unlike its JSON.

    Reason and comment are free text, with newlines or whole rows in it: `mark`, drawn anew for each question and so in
    nobody's text, says where a row's fields begin and end.
    """
    return f"{mark}%F|%K|%T|%U|%r{mark}%k{mark}"


def parse_queue(said: str, mark: str, uid: int) -> list[QueueEntry]:
    """The user's rows of what `squeue --array --format` printed, with or without headers and the names of clusters."""
    row = re.compile(
        rf"^CLUSTER: (?P<cluster>\S+)$|{mark}(\d+)\|([^|]*)\|([^|]*)\|(\d+)\|(.*?){mark}(.*?){mark}",
        re.DOTALL | re.MULTILINE,
    )
    entries, cluster = [], None
    for found in row.finditer(said):
        if found["cluster"]:
            cluster = found["cluster"]
            continue
        _, job, number, state, owner, reason, comment = found.groups()
        if int(owner) == uid:
            place = int(number) if number.isdecimal() else None
            entries.append(QueueEntry(job, place, state, comment, reason, cluster))
    return entries


@dataclass(frozen=True)
class JobRecord:
    """What `scontrol show job` says of a job."""

    runs: bool
    """Not so once it is cancelled, or Slurm itself requeues it."""
    preempted: bool
    """Its grace time has begun."""


def parse_job(text: str) -> JobRecord:
    """The first record of `scontrol show job`."""
    fields = dict(re.findall(r"(\bJobState|\bPreemptTime)=(\S+)", text)[::-1])  # of several the first
    return JobRecord(fields.get("JobState") == "RUNNING", fields.get("PreemptTime", "None") != "None")


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
