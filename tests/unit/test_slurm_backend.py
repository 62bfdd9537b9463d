"""A fold as a step of a Slurm job, with a stub in place of srun; and what a job is taken to be."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from doccls.config import Config
from doccls.errors import UserError
from doccls.system.rank import MEETING_FILE
from launcher.arguments import build_parser, choose_slots, make_job_slot, make_request, render_again
from launcher.backend import LAUNCH, StartError
from launcher.plan import Assignment, RankCommand
from launcher.slurm.backend import SlurmBackend, StepProcesses
from launcher.slurm.format import JobRequest, SlurmTask

MakeConfig = Callable[..., Config]
TASK = SlurmTask("12_1", "12", 1, 5, nodes=1, gpus_per_node=0, cpus_per_node=4)
STUB = """#!/bin/bash
# Runs the command of each rank, one after the other, and says of it what srun does.
trap 'echo "srun: error: node1: task 0: Killed" >&2; exit 137' TERM
trap 'echo USR1 >>"$DOCCLS_TEST_FOLDER/heard"' USR1
trap 'echo USR2 >>"$DOCCLS_TEST_FOLDER/heard"' USR2
for word in "$@"; do case $word in --ntasks=*) tasks=${word#*=};; esac; done
while [ "$1" != bash ]; do shift; done
for ((rank = 0; rank < tasks; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=$tasks "$@"
  last=$?
  [ $last = 0 ] || { code=$last; echo "srun: error: node1: task $rank: Exited with exit code $last" >&2; }
done
echo ready >>"$DOCCLS_TEST_FOLDER/heard"
while [ -f "$DOCCLS_TEST_FOLDER/hold" ]; do sleep 0.02; done
exit ${code:-0}
"""

Start = Callable[..., tuple[StepProcesses, list[str]]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> Start:
    """`start(script, ranks)`: a fold whose ranks run a script of bash; its processes, and the consoles."""
    stub = tmp_path / "bin" / "srun"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCCLS_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "of another launcher")

    def begin(script: str, ranks: int = 1, task: SlurmTask = TASK) -> tuple[StepProcesses, list[Path]]:
        slot = make_job_slot(task, make_config(train={"num_processes": ranks}), 8, "node1")
        environment = {"OMP_NUM_THREADS": "3"} | ({"WORLD_SIZE": str(ranks)} if ranks > 1 else {})
        assignment = Assignment(1, slot, (RankCommand(("bash", "-c", script), environment),) * ranks)
        consoles = [tmp_path / "it's a\nrun" / "console" / f"fold1_rank{rank}.txt" for rank in range(ranks)]
        return SlurmBackend(task, ranks // task.nodes, tmp_path).start(assignment, consoles), consoles

    return begin  # type: ignore[return-value]


def await_ready(tmp_path: Path) -> None:
    deadline_s = time.monotonic() + 60
    while "ready" not in ((tmp_path / "heard").read_text() if (tmp_path / "heard").exists() else ""):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_each_rank_has_its_number_and_its_console(start: Start) -> None:
    told = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $OMP_NUM_THREADS ${MASTER_ADDR-none}"'
    processes, consoles = start(f'{told} "$DOCCLS_LAUNCHED" "${{{MEETING_FILE}##*/}}" >&2', ranks=2)
    processes.wait()
    assert processes.poll() == (0, 0) and processes.ended == []
    lines = [console.read_text().split() for console in map(Path, consoles)]
    assert [line[:6] for line in lines] == [["0", "0", "2", "2", "3", "none"], ["1", "1", "2", "2", "3", "none"]]
    assert all(line[6] == LAUNCH for line in lines)
    assert lines[0][7] == lines[1][7] and lines[0][7].startswith("fold1.")


def test_one_rank_is_no_group(start: Start) -> None:
    processes, consoles = start(f'echo "${{RANK-none}} ${{WORLD_SIZE-none}} ${{{MEETING_FILE}-none}}"')
    processes.wait()
    assert Path(consoles[0]).read_text() == "none none none\n"


def test_ranks_on_several_nodes_meet_at_a_free_port_of_the_first(start: Start) -> None:
    processes, consoles = start('echo "$MASTER_ADDR $MASTER_PORT $LOCAL_WORLD_SIZE"', 2, replace(TASK, nodes=2))
    processes.wait()
    (line,) = {Path(console).read_text() for console in consoles}
    host, port, local = line.split()
    assert host == os.uname().nodename and 1024 < int(port) < 65536 and local == "1"


def test_a_rank_that_ended_badly_is_known_while_others_run(start: Start, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    processes, _ = start("[ $RANK = 0 ] || exit 7", ranks=2)
    await_ready(tmp_path)
    assert processes.poll() == (None, 7)
    assert processes.ended == [1]
    (tmp_path / "hold").unlink()
    processes.wait()
    assert processes.poll() == (0, 7)
    assert "task 1: Exited with exit code 7" in processes.tell()


def test_a_stop_and_a_question_for_stacks_are_passed_on_and_a_strike_kills(start: Start, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    processes, _ = start("true")
    await_ready(tmp_path)
    processes.dump_stacks()
    processes.terminate()
    deadline_s = time.monotonic() + 60
    while (tmp_path / "heard").read_text().split() != ["ready", "USR2", "USR1"]:
        assert time.monotonic() < deadline_s, (tmp_path / "heard").read_text()
        time.sleep(0.02)
    assert processes.poll() == (None,)
    processes.strike()
    processes.wait()
    assert processes.poll() == (-9,)


def test_a_step_that_never_began_fails_all_its_ranks(start: Start, tmp_path: Path) -> None:
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\necho 'srun: error: Unable to create step' >&2; exit 1\n")
    processes, _ = start("true", ranks=2)
    processes.wait()
    assert processes.poll() == (1, 1)
    assert processes.tell() == "srun: error: Unable to create step\n"


def test_without_srun_the_fold_cannot_be_started(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(StartError, match="srun"):
        start("true")


# --- the job as a slot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "gpus", "stated", "places"),
    [
        (1, 0, None, ["node 0 cpu 0"]),
        (1, 0, 2, ["node 0 cpu 0", "node 0 cpu 1"]),
        (2, 0, None, ["node 0 cpu 0", "node 1 cpu 0"]),
        (2, 2, None, ["node 0 gpu 0", "node 0 gpu 1", "node 1 gpu 0", "node 1 gpu 1"]),
        (1, 2, 2, ["node 0 gpu 0", "node 0 gpu 1"]),
    ],
)
def test_a_job_is_one_slot(
    make_config: MakeConfig, nodes: int, gpus: int, stated: int | None, places: list[str]
) -> None:
    task = replace(TASK, nodes=nodes, gpus_per_node=gpus)
    slot = make_job_slot(task, make_config(train={"num_processes": stated}), gpus, "node1")
    assert [device.name for device in slot.devices] == places
    assert all(device.given == bool(gpus) and device.is_cpu != bool(gpus) for device in slot.devices)


@pytest.mark.parametrize(
    ("changes", "stated", "gpus_here", "told"),
    [
        ({"gpus_per_node": 2}, None, 0, "1 nodes x 2 GPUs, but the NVIDIA driver of node1 shows none"),
        ({"gpus_per_node": 2}, 4, 2, "train.num_processes = 4, but Slurm gave job 12_1 1 nodes x 2 GPUs"),
        ({"nodes": 2}, 3, 0, "train.num_processes = 3, but Slurm gave job 12_1 2 nodes x CPUs"),
        ({"cpus_per_node": 1}, 2, 0, "1 nodes x 1 CPUs for 2 processes on each: sbatch --cpus-per-task"),
        ({"gpus_per_node": 64, "cpus_per_node": 64}, None, 64, "train.batch_size = 32: 64 processes can't share"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    make_config: MakeConfig, changes: dict[str, int], stated: int | None, gpus_here: int, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_job_slot(replace(TASK, **changes), make_config(train={"num_processes": stated}), gpus_here, "node1")
    assert told in str(caught.value)


def test_what_trains_the_rest_is_the_users_own_command_again() -> None:
    words = ["task", "--share", "--config", "my c.yaml", "--set", "wandb.api_key=secret"]
    again = "sbatch slurm/kfold.sh 'my c.yaml' --set 'wandb.api_key=***' --run-id v1-j12"
    assert render_again(words, "v1-j12") == again
    assert render_again([*words, "--run-id", "v1-j12"], "v1-j12") == again


# --- what is asked of Slurm ------------------------------------------------------------------------------------------


def parse_run(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["run", "--config", "c.yaml", "--backend", "slurm", *words])


@pytest.mark.parametrize(
    ("words", "stated", "expected", "ranks"),
    [
        ([], None, JobRequest(1, 1, 3), 1),
        ([], 4, JobRequest(1, 4, 12), 4),
        (["--gpus-per-fold", "8", "--nodes", "2"], None, JobRequest(2, 4, 12), 8),
        (["--gpus-per-fold", "0"], 2, JobRequest(1, 0, 6), 2),
        (["--gpus-per-fold", "0", "--nodes", "2"], None, JobRequest(2, 0, 3), 2),
        (["--nodes", "2"], None, JobRequest(2, 1, 3), 2),
        (["--cpus-per-node", "16", "--partition", "p"], None, JobRequest(1, 1, 16, partition="p"), 1),
        (["--at-once", "2", "--sbatch-arg=--qos=x"], None, JobRequest(1, 1, 3, at_once=2, others=("--qos=x",)), 1),
    ],
)
def test_a_task_gets_what_its_fold_takes(
    make_config: MakeConfig, words: list[str], stated: int | None, expected: JobRequest, ranks: int
) -> None:
    config = make_config(train={"num_processes": stated})  # 2 threads and 2 loader workers a process
    assert make_request(parse_run(*words), config) == (expected, ranks)


@pytest.mark.parametrize(
    ("words", "stated", "told"),
    [
        (["--slots", "2", "--exclude-busy"], None, "--exclude-busy, --slots: only on this machine"),
        (["--gpus-per-fold", "2"], 4, "--gpus-per-fold 2, but train.num_processes = 4"),
        (["--nodes", "2"], 3, "3 processes of a fold do not divide by --nodes 2"),
        (["--gpus-per-fold", "64"], None, "train.batch_size = 32: 64 processes can't share"),
    ],
)
def test_what_cannot_be_asked_of_slurm_is_refused(
    make_config: MakeConfig, words: list[str], stated: int | None, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_request(parse_run(*words), make_config(train={"num_processes": stated}))
    assert told in str(caught.value)


@pytest.mark.parametrize("words", [["--partition", "p"], ["--wait"], ["--nodes", "2"], ["--sbatch-arg=--x"]])
def test_slurms_options_are_refused_on_this_machine(make_config: MakeConfig, words: list[str]) -> None:
    with pytest.raises(UserError, match="only with --backend slurm"):
        choose_slots(build_parser().parse_args(["run", "--config", "c.yaml", *words]), make_config())
