"""What Slurm's variables and messages are read as, and how a step is asked for."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.slurm.format import (
    Going,
    JobRequest,
    SlurmError,
    SlurmTask,
    parse_queue,
    parse_step_ends,
    parse_submitted,
    parse_task,
    pick_folds,
    render_output,
    render_sbatch,
    render_script,
    render_step,
)

ALONE = {"SLURM_JOB_ID": "31", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_ON_NODE": "4"}


def make_array(first: int, last: int, count: int, number: int, step: int = 1) -> dict[str, str]:
    told = {"ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": number, "ARRAY_TASK_MIN": first, "ARRAY_TASK_MAX": last}
    told |= {"ARRAY_TASK_COUNT": count, "ARRAY_TASK_STEP": step}
    return {"SLURM_JOB_ID": "17"} | {f"SLURM_{name}": str(value) for name, value in told.items()}


def test_a_job_without_an_array_is_all_there_is() -> None:
    assert parse_task(ALONE) == SlurmTask("31", "31", None, 1, nodes=2, gpus_per_node=4, cpus_per_node=8)
    assert pick_folds(parse_task(ALONE), range(5), share=True) == (0, 1, 2, 3, 4)


def test_a_task_of_an_array_is_known_by_the_arrays_number() -> None:
    task = parse_task(make_array(0, 4, 5, number=3))
    assert (task.job, task.array_job, task.number, task.count) == ("12_3", "12", 3, 5)
    assert (task.nodes, task.gpus_per_node, task.cpus_per_node) == (1, 0, 1)


@pytest.mark.parametrize("told", ["2", "gpu:2", "gpu:h100:2"])
def test_gpus_are_counted_with_or_without_their_type(told: str) -> None:
    assert parse_task(ALONE | {"SLURM_GPUS_ON_NODE": told}).gpus_per_node == 2


def test_without_a_job_the_user_is_told_what_runs_this_command() -> None:
    with pytest.raises(SlurmError, match=r"sbatch slurm/kfold\.sh CONFIG"):
        parse_task({"SLURM_CONF": "/etc/slurm.conf"})


@pytest.mark.parametrize("tasks", range(1, 9))
@pytest.mark.parametrize("folds", [1, 3, 5, 8])
def test_tasks_that_share_train_each_fold_once(tasks: int, folds: int) -> None:
    shares = [
        pick_folds(parse_task(make_array(0, tasks - 1, tasks, number)), range(folds), share=True)
        for number in range(tasks)
    ]
    assert sorted(fold for share in shares for fold in share) == list(range(folds))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("first", "last", "count", "number"), [(2, 2, 1, 2), (1, 3, 2, 3), (0, 4, 3, 4), (0, 2, 2, 2)])
def test_tasks_of_any_other_array_name_their_folds(first: int, last: int, count: int, number: int) -> None:
    task = parse_task(make_array(first, last, count, number))
    assert pick_folds(task, range(5), share=True) == (number,)
    assert pick_folds(task, [number + 1], share=True) == ()


def test_without_sharing_a_task_trains_its_number_alone() -> None:
    assert pick_folds(parse_task(make_array(0, 1, 2, 1)), range(5), share=False) == (1,)
    assert pick_folds(parse_task(make_array(0, 1, 2, 1)), [0], share=False) == ()


SAID = """srun: error: node1: task 1: Killed
srun: error: node2: tasks 4-5,7: Exited with exit code 3
srun: First task exited 2s ago
slurmstepd: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed.
srun: error: node1: task 0: Segmentation fault (core dumped)
srun: error: node3: task 9: Out Of Memory
srun: Job step aborted: Waiting up to 5 seconds for job step to finish.
"""


def test_what_srun_says_of_ranks_that_ended_is_read() -> None:
    assert parse_step_ends(SAID) == {1: -9, 4: 3, 5: 3, 7: 3, 0: -11, 9: 1}
    assert parse_step_ends("") == {}


def test_a_step_is_asked_for_as_a_list_of_words() -> None:
    command = ("py", "-m", "x", "--set", "a b'\n")
    words = render_step("fold3", command, "/r u n/console/fold3_rank", 2, 4, 3)
    assert words[0] == "srun" and words[-6:] == ("/r u n/console/fold3_rank", *command)
    told = dict(word[2:].split("=") for word in words if word.startswith("--") and "=" in word)
    assert (told["nodes"], told["ntasks"], told["ntasks-per-node"], told["cpus-per-task"]) == ("2", "8", "4", "3")
    assert told["export"] == "ALL"  # under sbatch --export=NONE srun would pass nothing on


# --- submitting ------------------------------------------------------------------------------------------------------

REQUEST = JobRequest(nodes=2, gpus_per_node=4, cpus_per_node=16, partition="gpu", at_once=3, others=("--qos=high",))


def test_an_array_is_submitted_with_a_task_a_fold() -> None:
    words = render_sbatch(REQUEST, (1, 3, 4), "r", "abc", "/a run")
    assert words[0] == "sbatch" and words[-1] == "--qos=high"
    told = dict(word[2:].split("=", 1) for word in words[1:] if "=" in word)
    assert (told["array"], told["nodes"], told["gpus-per-node"], told["cpus-per-task"]) == ("1,3,4%3", "2", "4", "16")
    assert (told["comment"], told["output"], told["partition"]) == ("doccls:r:abc", "/a run/task%a.txt", "gpu")
    assert "account" not in told and "time" not in told
    alone = render_sbatch(replace(REQUEST, gpus_per_node=0, at_once=None), (0,), "r", "abc", "o")
    assert "--array=0" in alone and not any(word.startswith("--gpus") for word in alone)


def test_the_script_is_one_command_whatever_is_in_it(tmp_path: Path) -> None:
    stub = tmp_path / "my python"
    stub.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    stub.chmod(0o755)
    words = ("--config", "it's $HOME/\nc.yaml", "--set", 'a="b"')
    script = tmp_path / "script"
    script.write_text(render_script(str(stub), words))
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\0")[:-1] == ["-m", "launcher", "task", *words]


def test_a_tasks_output_is_a_pattern_of_slurm() -> None:
    assert render_output("/a/100%/x") == "/a/100%%/x/task%a.txt"
    assert render_output("/a\\b") == "slurm-%A_%a.out"


@pytest.mark.parametrize(
    ("said", "job"),
    [("12\n", "12"), ("12;cluster\n", "12"), ("", None), ("Submitted batch job 12\n", None), ("12 13\n", None)],
)
def test_the_number_of_a_submitted_job(said: str, job: str | None) -> None:
    assert parse_submitted(said) == job


QUEUE = """12|2|PENDING|Resources|doccls:r:abc
12|0|RUNNING|None|doccls:r:abc
13|N/A|COMPLETING|None|(null)
14|1|NODE_FAIL|ReqNodeNotAvail, UnavailableNodes:node2|mine | and yours
15|N/A|LEVITATING|None|(null)
"""


def test_the_queue_is_read() -> None:
    entries = parse_queue(QUEUE)
    assert [entry.job for entry in entries] == ["12_2", "12_0", "13", "14_1", "15"]
    going = [entry.going for entry in entries]
    assert going == [Going.WAITS, Going.RUNS, Going.RUNS, Going.ENDED, Going.UNKNOWN]
    assert entries[3].comment == "mine | and yours" and entries[3].reason.startswith("ReqNodeNotAvail, ")
    assert parse_queue("") == []


def test_each_state_of_slurm_has_one_meaning() -> None:
    """squeue(1), JOB STATE CODES, of Slurm 22.05 to 25.05."""
    known = [
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "CONFIGURING", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL",
        "OUT_OF_MEMORY", "PENDING", "PREEMPTED", "RUNNING", "RESV_DEL_HOLD", "REQUEUE_FED", "REQUEUE_HOLD", "REQUEUED",
        "RESIZING", "REVOKED", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "SUSPENDED", "TIMEOUT",
        "LAUNCH_FAILED", "RECONFIG_FAIL", "POWER_UP_NODE", "EXPEDITING", "UPDATE_DB",
    ]  # fmt: skip
    entries = parse_queue("".join(f"1|0|{state}|None|x\n" for state in known))
    assert [entry.state for entry in entries if entry.going is Going.UNKNOWN] == []
    assert {entry.state for entry in entries if entry.going is Going.RUNS} >= {"RUNNING", "COMPLETING", "SUSPENDED"}
