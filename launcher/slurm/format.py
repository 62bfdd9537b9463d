"""Parsing of Slurm's variables and output, and rendering of its arguments; pure."""

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from doccls.errors import UserError
from doccls.system.variables import parse_whole_number

_STEP_END = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.*?)(?: \(core dumped\))?$", re.MULTILINE)
_EXITED = re.compile(r"Exited with exit code (\d+)")
_SIGNALS = {signal.strsignal(number): -number for number in signal.valid_signals()}
# The prologue of each rank of a step; its arguments are the prefix of its console's path and the command.
_BECOME_RANK = (
    'exec >>"$0$SLURM_PROCID.txt" 2>&1\n'
    '[ "$SLURM_STEP_NUM_TASKS" = 1 ] || export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"\n'
    'exec "$@"'
)


class SlurmError(UserError):
    """Slurm is unavailable, or refuses a request."""


class LostAnswerError(SlurmError):
    """Slurm's answer was lost: it may have accepted the job nevertheless."""


@dataclass(frozen=True)
class Allocation:
    """Resources that Slurm gave the job."""

    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    stated_gpus: int | None = None  # the user's --gpus-per-node, in addition to the --gres of slurm/kfold.sh


def parse_allocation(environment: Mapping[str, str]) -> Allocation | None:
    """Parse the allocation of this process's job; None outside Slurm."""
    if "SLURM_JOB_ID" not in environment:
        return None
    stated = environment.get("SLURM_GPUS_PER_NODE", "")
    return Allocation(
        nodes=parse_whole_number(environment, "SLURM_JOB_NUM_NODES", 1),
        gpus_per_node=count_gpus(environment.get("SLURM_GPUS_ON_NODE", "")),
        cpus_per_node=parse_whole_number(environment, "SLURM_CPUS_ON_NODE", 1),
        stated_gpus=count_gpus(stated) if stated else None,
    )


def count_gpus(gpus: str) -> int:
    """Count GPUs: `2`, `a100:2`, `gpu:2`, `gpu:h100:1,gpu:a100:1,lscratch:10` -> 2; `gpu` -> 1; `none` or `` -> 0."""
    parts = [part.strip().removeprefix("gres/") for part in gpus.split(",") if part not in ("", "none")]
    if any(part.startswith("gpu") for part in parts):
        parts = [part for part in parts if part.startswith("gpu")]
    counts = [re.split("[:=]", part)[-1] for part in parts]
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def render_step(
    name: str, command: Sequence[str], console: str, nodes: int, ranks_per_node: int, cpus_per_rank: int
) -> tuple[str, ...]:
    """Render the job step that runs `command` once per rank; a rank's output is appended to `<console><rank>.txt`.

    When a rank ends, the launcher decides about the other ranks, not srun.
    """
    return (
        "srun", f"--job-name={name}", "--export=ALL", "--input=none", "--wait=0", "--kill-on-bad-exit=0",
        f"--nodes={nodes}", f"--ntasks={nodes * ranks_per_node}", f"--ntasks-per-node={ranks_per_node}",
        f"--cpus-per-task={cpus_per_rank}", "bash", "-c", _BECOME_RANK, console, *command,
    )  # fmt: skip


def render_comment(run_id: str, token: str) -> str:
    """Render a job's comment, by which it is identified in the queue even if sbatch's answer was lost."""
    return f"doccls:{run_id}:{token}"


@dataclass(frozen=True)
class Submitted:
    """A submitted job, as sbatch reports it."""

    job: str  # its number
    cluster: str | None  # the one of a federation, or of several clusters, that has the job


def parse_submitted(output: str) -> Submitted | None:
    """Parse the output of `sbatch --parsable`; None if it is not a job number."""
    match = re.fullmatch(r"(\d+)(?:;(\S+))?\s*", output)
    return Submitted(match[1], match[2]) if match else None


class JobPhase(StrEnum):
    """Phase of a job, to which each of Slurm's job states belongs."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"
    UNKNOWN = "unknown"  # a state that this version of doccls does not know: neither running nor ended


# Slurm's states and flags, of which `squeue` shows one (squeue(1), JOB STATE CODES).
_STATES = {
    JobPhase.WAITING: (
        "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
        "POWER_UP_NODE", "UPDATE_DB",
    ),
    JobPhase.RUNNING: (
        "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "EXPEDITING",
    ),
    JobPhase.ENDED: (
        "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
        "OUT_OF_MEMORY", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL",
    ),
}  # fmt: skip
_PHASES = {state: phase for phase, states in _STATES.items() for state in states}


@dataclass(frozen=True)
class QueueEntry:
    """A job, or a task of an array, in Slurm's queue."""

    array_job: str
    number: int | None  # index in the array; None for a job without an array
    state: str  # Slurm's, such as `PENDING`
    comment: str
    reason: str  # why it is pending, such as `Resources`
    cluster: str | None = None  # None: this machine's

    @property
    def job(self) -> str:
        """Slurm's name of the job or task, such as `12_3`."""
        return self.array_job if self.number is None else f"{self.array_job}_{self.number}"

    @property
    def phase(self) -> JobPhase:
        """Phase that the job's state belongs to."""
        return _PHASES.get(self.state, JobPhase.UNKNOWN)


def render_queue_format(mark: str) -> str:
    """Render the argument of `squeue --format`.

    Plain text is the same in all versions of Slurm and needs no plugin, unlike its JSON. Reason and comment are free
    text that may contain newlines or complete rows, so `mark`, which is random and therefore in nobody's text,
    delimits the fields.
    """
    return f"{mark}%F|%K|%T|%U|%r{mark}%k{mark}"


def parse_queue(output: str, mark: str, uid: int) -> list[QueueEntry]:
    """Parse the user's rows of `squeue --array --format`, with or without headers and cluster names."""
    row = re.compile(
        rf"^CLUSTER: (?P<cluster>\S+)$|{mark}(\d+)\|([^|]*)\|([^|]*)\|(\d+)\|(.*?){mark}(.*?){mark}",
        re.DOTALL | re.MULTILINE,
    )
    entries, cluster = [], None
    for match in row.finditer(output):
        if match["cluster"]:
            cluster = match["cluster"]
            continue
        _, job, number, state, owner, reason, comment = match.groups()
        if int(owner) == uid:
            index = int(number) if number.isdecimal() else None
            entries.append(QueueEntry(job, index, state, comment, reason, cluster))
    return entries


@dataclass(frozen=True)
class JobRecord:
    """State of a job, as `scontrol show job` reports it."""

    is_running: bool  # False once it is cancelled, or Slurm itself requeues it
    is_preempted: bool  # its grace time has begun


def parse_job(text: str) -> JobRecord:
    """Parse the first record of `scontrol show job`."""
    fields = dict(re.findall(r"(\bJobState|\bPreemptTime)=(\S+)", text)[::-1])  # reversed: the first record wins
    return JobRecord(fields.get("JobState") == "RUNNING", fields.get("PreemptTime", "None") != "None")


def parse_step_ends(output: str) -> dict[int, int]:
    """Parse srun's reports of failed ranks into exit codes by rank: -N for a rank killed by signal N."""
    codes: dict[int, int] = {}
    for ranks, reason in _STEP_END.findall(output):
        exited = _EXITED.fullmatch(reason)
        code = int(exited[1]) if exited else _SIGNALS.get(reason, 1)
        codes |= {rank: code for rank in _parse_numbers(ranks)}
    return codes


def _parse_numbers(text: str) -> list[int]:
    """Parse ranges of numbers: `0,2-4` -> 0, 2, 3, 4."""
    numbers: list[int] = []
    for word in text.split(","):
        first, _, last = word.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
