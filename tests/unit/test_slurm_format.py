"""Parsing of Slurm's variables and output, and rendering of steps."""

from __future__ import annotations

import pytest

from launcher.slurm.format import (
    Allocation,
    JobPhase,
    JobRecord,
    QueueEntry,
    Submitted,
    count_gpus,
    parse_allocation,
    parse_job,
    parse_queue,
    parse_step_ends,
    parse_submitted,
    render_queue_format,
    render_step,
)

ALONE = {"SLURM_JOB_ID": "31", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "4"}


def test_allocation_is_parsed() -> None:
    assert parse_allocation(ALONE) == Allocation(nodes=2, gpus_per_node=4, cpus_per_node=8)
    assert parse_allocation({"SLURM_JOB_ID": "31"}) == Allocation(1, 0, 1)
    assert parse_allocation({"SLURM_CONF": "/etc/slurm.conf"}) is None


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2", 2),
        ("gpu:2", 2),
        ("gpu:h100:2", 2),
        ("gpu", 1),
        ("gpu:a100:1,gpu:h100:2,lscratch:10", 3),
        ("gres/gpu:2", 2),
        ("none", 0),
        ("", 0),
    ],
)
def test_gpus_are_counted_with_or_without_type(text: str, count: int) -> None:
    assert count_gpus(text) == count
    allocation = parse_allocation(ALONE | {"SLURM_GPUS_ON_NODE": text})
    assert allocation is not None and allocation.gpus_per_node == count


def test_gpus_stated_by_user_are_parsed() -> None:
    allocations = [parse_allocation(ALONE | {"SLURM_GPUS_PER_NODE": text}) for text in ("0", "h100:4", "")]
    assert [None if allocation is None else allocation.stated_gpus for allocation in allocations] == [0, 4, None]


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("JobState=RUNNING Reason=None\n PreemptEligibleTime=x PreemptTime=None", JobRecord(True, False)),
        ("JobState=RUNNING Reason=None\n PreemptTime=2026-01-02T03:04:05 Susp=0", JobRecord(True, True)),
        ("JobState=CANCELLED Reason=None\n PreemptTime=None", JobRecord(False, False)),
        ("JobState=RUNNING PreemptTime=None\n\nJobState=FAILED PreemptTime=2026-01-02", JobRecord(True, False)),
        ("", JobRecord(False, False)),
    ],
)
def test_job_record_is_parsed(text: str, record: JobRecord) -> None:
    assert parse_job(text) == record


SRUN_OUTPUT = """srun: error: node1: task 1: Killed
srun: error: node2: tasks 4-5,7: Exited with exit code 3
srun: First task exited 2s ago
slurmstepd: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed.
srun: error: node1: task 0: Segmentation fault (core dumped)
srun: error: node3: task 9: Out Of Memory
srun: Job step aborted: Waiting up to 5 seconds for job step to finish.
"""


def test_failed_ranks_are_parsed_from_srun_output() -> None:
    assert parse_step_ends(SRUN_OUTPUT) == {1: -9, 4: 3, 5: 3, 7: 3, 0: -11, 9: 1}
    assert parse_step_ends("") == {}


def test_step_command_is_rendered() -> None:
    command = ("py", "-m", "x", "--set", "a b'\n")
    argv = render_step("fold3", command, "/r u n/console/fold3_rank", 2, 4, 3)
    assert argv[0] == "srun" and argv[-6:] == ("/r u n/console/fold3_rank", *command)
    options = dict(word[2:].split("=") for word in argv if word.startswith("--") and "=" in word)
    assert (options["nodes"], options["ntasks"], options["ntasks-per-node"], options["cpus-per-task"]) == (
        "2",
        "8",
        "4",
        "3",
    )
    assert options["export"] == "ALL"  # otherwise srun passes nothing on under sbatch --export=NONE


# --- the queue --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "submitted"),
    [
        ("12\n", Submitted("12", None)),
        ("12;cluster\n", Submitted("12", "cluster")),
        ("", None),
        ("Submitted batch job 12\n", None),
        ("12 13\n", None),
    ],
)
def test_sbatch_output_is_parsed(output: str, submitted: Submitted | None) -> None:
    assert parse_submitted(output) == submitted


def render_queue(*rows: tuple[str, ...]) -> str:
    """Render the output of squeue for rows of job, number, state, reason and comment."""
    lines = [("ARRAY_JOB_ID", "ARRAY_TASK_ID", "STATE", "REASON", "COMMENT"), *rows]
    keys = ("%F", "%K", "%T", "%r", "%k")
    output = ""
    for line in lines:
        text = render_queue_format("MARK").replace("%U", "7" if line[0].isdecimal() else "UID")
        for key, field in zip(keys, line, strict=True):
            text = text.replace(key, field)
        output += f"{text}\n"
    return output


def test_queue_is_parsed() -> None:
    output = render_queue(
        ("12", "2", "PENDING", "Resources", "doccls:r:abc"),
        ("12", "0", "RUNNING", "None", "doccls:r:abc"),
        ("13", "N/A", "COMPLETING", "None", "(null)"),
        ("14", "1", "NODE_FAIL", "ReqNodeNotAvail, UnavailableNodes:node2", "mine | and yours"),
        ("15", "N/A", "LEVITATING", "None", "(null)"),
    )
    entries = parse_queue(output, "MARK", 7)
    assert [entry.job for entry in entries] == ["12_2", "12_0", "13", "14_1", "15"]
    phases = [entry.phase for entry in entries]
    assert phases == [JobPhase.WAITING, JobPhase.RUNNING, JobPhase.RUNNING, JobPhase.ENDED, JobPhase.UNKNOWN]
    assert entries[3].comment == "mine | and yours" and entries[3].reason.startswith("ReqNodeNotAvail, ")
    assert parse_queue("", "MARK", 7) == []
    assert parse_queue(output, "MARK", 8) == [], "another user's"


@pytest.mark.parametrize(
    "text",
    [
        "", "|", "a\nb", "x\n\n99|0|RUNNING|7|None", "\nCLUSTER: evil\n", "12|2|PREEMPTED|7|NoneMAR",
        "\r\f\v\x1c\u2028", "TOKEN12|2|PREEMPTED|7|NoneTOKENTOKEN",
    ],
)  # fmt: skip
def test_free_text_in_a_row_is_not_parsed_as_a_row(text: str) -> None:
    output = render_queue(("9", "N/A", "RUNNING", text, text), ("12", "2", "PENDING", "Resources", "doccls:r:abc"))
    assert parse_queue(output, "MARK", 7) == [
        QueueEntry("9", None, "RUNNING", text, text), QueueEntry("12", 2, "PENDING", "doccls:r:abc", "Resources")
    ]  # fmt: skip


def test_rows_belong_to_the_cluster_named_before_them() -> None:
    row = render_queue(("12", "2", "PENDING", "Resources", "(null)"))
    assert [entry.cluster for entry in parse_queue(f"{row}CLUSTER: a\n{row}\nCLUSTER: b\n{row}", "MARK", 7)] == [
        None, "a", "b",
    ]  # fmt: skip


def test_each_state_of_slurm_has_a_phase() -> None:
    """The states are those of squeue(1), JOB STATE CODES, of Slurm 22.05 to 25.05."""
    states = [
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "CONFIGURING", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL",
        "OUT_OF_MEMORY", "PENDING", "PREEMPTED", "RUNNING", "RESV_DEL_HOLD", "REQUEUE_FED", "REQUEUE_HOLD", "REQUEUED",
        "RESIZING", "REVOKED", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED", "TIMEOUT",
        "LAUNCH_FAILED", "RECONFIG_FAIL", "POWER_UP_NODE", "EXPEDITING", "UPDATE_DB",
    ]  # fmt: skip
    entries = parse_queue(render_queue(*(("1", "0", state, "None", "x") for state in states)), "MARK", 7)
    assert len(entries) == len(states)
    assert [entry.state for entry in entries if entry.phase is JobPhase.UNKNOWN] == []
    assert {entry.state for entry in entries if entry.phase is JobPhase.RUNNING} >= {
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
    }
