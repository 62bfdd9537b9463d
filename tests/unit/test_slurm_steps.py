"""Slurm job steps, with a stub for srun: folds on several nodes, preemption, and the resources of a task."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from doccls.config import Config
from doccls.errors import UserError
from launcher.arguments import render_resume_command
from launcher.devices import Device
from launcher.local import LAUNCH, StartError
from launcher.parser import build_parser
from launcher.placement import choose_slots, choose_task_slots, make_request
from launcher.plan import Assignment, RankCommand, Slot
from launcher.slurm import steps
from launcher.slurm.format import Allocation
from launcher.slurm.script import JobRequest
from launcher.slurm.steps import SlurmBackend, StepProcesses, watching_for_preemption

MakeConfig = Callable[..., Config]
TWO_NODES = Allocation(nodes=2, gpus_per_node=0, cpus_per_node=4)
STUB = """#!/bin/bash
# Runs the command of each rank, one after the other, and reports failures as srun does.
trap 'echo "srun: error: node1: task 0: Killed" >&2; exit 137' TERM
trap 'echo USR1 >>"$DOCCLS_TEST_FOLDER/signals"' USR1
trap 'echo USR2 >>"$DOCCLS_TEST_FOLDER/signals"' USR2
for word in "$@"; do case $word in --ntasks=*) tasks=${word#*=};; esac; done
while [ "$1" != bash ]; do shift; done
for ((rank = 0; rank < tasks; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=$tasks "$@"
  last=$?
  [ $last = 0 ] || { code=$last; echo "srun: error: node1: task $rank: Exited with exit code $last" >&2; }
done
echo ready >>"$DOCCLS_TEST_FOLDER/signals"
while [ -f "$DOCCLS_TEST_FOLDER/hold" ]; do sleep 0.02; done
exit ${code:-0}
"""

Start = Callable[..., tuple[StepProcesses, list[str]]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> Start:
    """`start(script, ranks)` starts a fold whose ranks run a bash script, and returns its processes and consoles."""
    stub = tmp_path / "bin" / "srun"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCCLS_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    for name in ("MASTER_ADDR", "SLURM_CPU_BIND", "SLURM_MEM_PER_CPU", "SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "of a shell in another job")

    def start_fold(script: str, ranks: int = 2) -> tuple[StepProcesses, list[Path]]:
        devices = tuple(Device(f"node {rank} cpu 0") for rank in range(ranks))
        command = RankCommand(("bash", "-c", script), {"OMP_NUM_THREADS": "3", "WORLD_SIZE": str(ranks)})
        assignment = Assignment(1, Slot(0, devices), (command,) * ranks)
        consoles = [tmp_path / "it's a\nrun" / "console" / f"fold1_rank{rank}.txt" for rank in range(ranks)]
        return SlurmBackend(TWO_NODES, ranks // 2, tmp_path).start(assignment, consoles), consoles

    return start_fold  # type: ignore[return-value]


def await_ready(tmp_path: Path) -> None:
    deadline_s = time.monotonic() + 60
    while "ready" not in ((tmp_path / "signals").read_text() if (tmp_path / "signals").exists() else ""):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_each_rank_has_its_rank_variables_and_console(start: Start) -> None:
    script = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $OMP_NUM_THREADS $DOCCLS_LAUNCHED" >&2'
    processes, consoles = start(script, ranks=4)
    processes.wait()
    assert processes.poll() == (0, 0, 0, 0) and processes.ended == []
    lines = [Path(console).read_text().split() for console in consoles]
    assert lines == [[str(rank), str(rank), "4", "2", "3", LAUNCH] for rank in range(4)]


def test_ranks_meet_at_free_port_of_first_node(start: Start) -> None:
    processes, consoles = start('echo "$MASTER_ADDR $MASTER_PORT"')
    processes.wait()
    (line,) = {Path(console).read_text() for console in consoles}
    host, port = line.split()
    assert host == socket.gethostname() and 1024 < int(port) < 65536


def test_step_does_not_inherit_variables_of_enclosing_job(start: Start) -> None:
    processes, consoles = start("env")
    processes.wait()
    assert "of a shell in another job" not in Path(consoles[0]).read_text()
    assert "SLURM_JOB_ID=12\n" in Path(consoles[0]).read_text()


def test_failed_rank_is_reported_while_others_run(start: Start, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    processes, _ = start("[ $RANK = 0 ] || exit 7")
    await_ready(tmp_path)
    assert processes.poll() == (None, 7)
    assert processes.ended == [1]
    (tmp_path / "hold").unlink()
    processes.wait()
    assert processes.poll() == (0, 7)
    assert "task 1: Exited with exit code 7" in processes.read_messages()


def test_terminate_and_dump_stacks_signal_the_ranks_and_kill_kills_them(start: Start, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    processes, _ = start("true")
    await_ready(tmp_path)
    processes.dump_stacks()
    processes.terminate()
    deadline_s = time.monotonic() + 60
    while (tmp_path / "signals").read_text().split() != ["ready", "USR2", "USR1"]:
        assert time.monotonic() < deadline_s, (tmp_path / "signals").read_text()
        time.sleep(0.02)
    assert processes.poll() == (None, None)
    processes.kill()
    processes.wait()
    assert processes.poll()[0] == -9


def test_step_that_never_started_fails_all_ranks(start: Start, tmp_path: Path) -> None:
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\necho 'srun: error: Unable to create step' >&2; exit 1\n")
    processes, _ = start("true")
    processes.wait()
    assert processes.poll() == (1, 1)
    assert processes.read_messages() == "srun: error: Unable to create step\n"


def test_fold_cannot_be_started_without_srun(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(StartError, match="srun"):
        start("true")


# --- slot of a task ---------------------------------------------------------------------------------------------------

GPUS = [Device(f"gpu {number}", f"GPU-{number}") for number in range(8)]


def choose(config: Config, allocation: Allocation | None) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of the slot's devices, and the warnings."""
    chosen = choose_task_slots(config, allocation, "12_1")
    (slot,) = chosen.slots
    return [device.name for device in slot.devices], chosen.warnings


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """`visible("0,1")` sets CUDA_VISIBLE_DEVICES on a node of eight GPUs; None unsets it."""
    monkeypatch.setattr("launcher.placement.find_gpus", lambda: GPUS)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda text: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text) if text is not None else None


@pytest.mark.parametrize(
    ("nodes", "gpus", "stated", "visible_gpus", "names"),
    [
        (1, 0, None, None, ["cpu 0"]),  # the GPUs of the node belong to other jobs
        (1, 0, 2, None, ["cpu 0", "cpu 1"]),
        (1, 2, None, "0,1", ["gpu 0", "gpu 1"]),
        (1, 2, 2, "6,7", ["gpu 6", "gpu 7"]),
        (2, 0, None, None, ["node 0 cpu 0", "node 1 cpu 0"]),
        (2, 2, None, "0,1", ["node 0 gpu 0", "node 0 gpu 1", "node 1 gpu 0", "node 1 gpu 1"]),
    ],
)
def test_slurm_job_is_one_slot(
    make_config: MakeConfig, visible: Callable[[str | None], None], nodes: int, gpus: int, stated: int | None,
    visible_gpus: str | None, names: list[str],
) -> None:  # fmt: skip
    visible(visible_gpus)
    config = make_config(train={"num_processes": stated})
    devices, warnings = choose(config, Allocation(nodes, gpus, cpus_per_node=4))
    assert devices == names
    unused = nodes == 1 and not gpus
    assert warnings == (("the 8 GPUs of this machine are not used: this Slurm job has none",) if unused else ())


def test_gpus_that_the_user_did_not_request_are_not_used(
    make_config: MakeConfig, visible: Callable[[str | None], None]
) -> None:
    visible("0")  # by the --gres=gpu:1 of slurm/kfold.sh, to which the user's --gpus-per-node=0 was added
    assert choose(make_config(), Allocation(1, 1, 4, stated_gpus=0)) == (["cpu 0"], ())


def test_job_without_gpus_ignores_broken_driver(
    make_config: MakeConfig, visible: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[Device]:
        raise UserError("the NVIDIA driver does not answer")

    visible(None)
    monkeypatch.setattr("launcher.placement.find_gpus", fail)
    assert choose(make_config(), Allocation(1, 0, 4)) == (["cpu 0"], ())


@pytest.mark.parametrize("visible_gpus", [None, "", "0"])
def test_visible_gpus_that_differ_from_the_jobs_are_rejected(
    make_config: MakeConfig, visible: Callable[[str | None], None], visible_gpus: str | None
) -> None:
    visible(visible_gpus)
    with pytest.raises(UserError, match=r"gave this job 2 GPUs, but \d are visible on .* \(CUDA_VISIBLE_DEVICES="):
        choose(make_config(), Allocation(1, 2, 4))


def test_launch_in_slurm_shell_uses_gpus_of_the_job(
    make_config: MakeConfig, visible: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def list_slots(*args: str) -> list[str]:
        chosen = choose_slots(build_parser().parse_args(["run", "--config", "c.yaml", *args]), make_config())
        return [slot.name for slot in chosen.slots]

    monkeypatch.setattr("launcher.placement.count_cores", lambda: 2)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert list_slots() == ["cpu 0"]
    assert list_slots("--gpus", "5") == ["gpu 5"]
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    visible("2,3")
    assert list_slots() == ["gpu 2", "gpu 3"]


def test_task_outside_slurm_uses_visible_gpus(make_config: MakeConfig, visible: Callable[[str | None], None]) -> None:
    assert choose(make_config(), None)[0] == [gpu.name for gpu in GPUS]
    visible("3")
    assert choose(make_config(), None)[0] == ["gpu 3"]
    visible("")
    assert choose(make_config(), None)[0] == ["cpu 0"]


@pytest.mark.parametrize(
    ("allocation", "stated", "gpus_here", "message"),
    [
        (Allocation(1, 2, 4), None, 0, "1 nodes x 2 GPUs, but the NVIDIA driver of "),
        (Allocation(2, 2, 4), None, 0, "2 nodes x 2 GPUs, but the NVIDIA driver of "),
        (Allocation(1, 1, 4, stated_gpus=2), None, 1, "--gpus-per-node=2, but the job has 1 GPUs per node"),
        (Allocation(1, 2, 4), 4, 2, "train.num_processes = 4, but 12_1 has 2 GPUs"),
        (Allocation(2, 0, 4), 3, 0, "train.num_processes = 3, but Slurm gave job 12_1 2 nodes x CPUs"),
        (Allocation(2, 0, 1), 4, 0, "2 nodes x 1 CPUs for 2 processes on each: pass sbatch --cpus-per-task"),
        (Allocation(2, 32, 64), None, 8, "train.batch_size = 32 is too small for 64 processes"),
    ],
)
def test_allocation_that_does_not_fit_is_rejected(
    make_config: MakeConfig, visible: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch,
    allocation: Allocation, stated: int | None, gpus_here: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("launcher.placement.find_gpus", lambda: GPUS[:gpus_here])
    with pytest.raises(UserError) as caught:
        choose(make_config(train={"num_processes": stated}), allocation)
    assert message in str(caught.value)


def test_resume_command_is_the_command_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    args = ["task", "--config", "my c.yaml", "--set", "wandb.api_key=secret"]
    resume_command = "sbatch slurm/kfold.sh 'my c.yaml' --set 'wandb.api_key=***' --run-id v1-j12"
    assert render_resume_command(args, "v1-j12") == resume_command
    assert render_resume_command([*args, "--run-id", "v1-j12"], "v1-j12") == resume_command
    monkeypatch.delenv("SLURM_JOB_ID")
    assert render_resume_command(["task", "--config", "c.yaml"], "r") == "doccls-launch task --config c.yaml --run-id r"


# --- resource request -------------------------------------------------------------------------------------------------


def parse_run(*args: str) -> argparse.Namespace:
    return build_parser().parse_args(["run", "--config", "c.yaml", "--backend", "slurm", *args])


@pytest.mark.parametrize(
    ("args", "stated", "expected", "ranks"),
    [
        ([], None, JobRequest(1, 1, 3), 1),
        ([], 4, JobRequest(1, 4, 12), 4),
        (["--gpus-per-fold", "8", "--nodes", "2"], None, JobRequest(2, 4, 12), 8),
        (["--gpus-per-fold", "0"], 2, JobRequest(1, 0, 6), 2),
        (["--gpus-per-fold", "0", "--nodes", "2"], None, JobRequest(2, 0, 3), 2),
        (["--nodes", "2"], None, JobRequest(2, 1, 3), 2),
        (["--cpus-per-node", "16", "--partition", "p"], None, JobRequest(1, 1, 16, partition="p"), 1),
        (["--at-once", "2", "--sbatch-arg=--x"], None, JobRequest(1, 1, 3, at_once=2, others=("--x",)), 1),
        (["--gres", "gpu:a100:2", "--nodes", "2"], None, JobRequest(2, 2, 6, gres="gpu:a100:2"), 4),
        (["--sbatch-arg=--gpus=4", "--nodes", "2"], None, JobRequest(2, 2, 6, others=("--gpus=4",)), 4),
        (["--gres", "lscratch:10", "--nodes", "2"], 4, JobRequest(2, 2, 6, gres="gpu:2,lscratch:10"), 4),
        (["--gres", "gpu:1,lscratch:10"], None, JobRequest(1, 1, 3, gres="gpu:1,lscratch:10"), 1),
        (["--sbatch-arg=-G2"], None, JobRequest(1, 2, 6, others=("-G2",)), 2),
        (["--gres", "none"], None, JobRequest(1, 0, 3, gres="none"), 1),
    ],
)
def test_request_fits_the_fold(
    make_config: MakeConfig, args: list[str], stated: int | None, expected: JobRequest, ranks: int
) -> None:
    config = make_config(train={"num_processes": stated})  # 2 threads and 2 loader workers per process
    assert make_request(parse_run(*args), config) == (expected, ranks)


@pytest.mark.parametrize(
    ("args", "stated", "message"),
    [
        (["--slots", "2", "--exclude-busy"], None, "--exclude-busy, --slots: only with --backend local"),
        (["--gpus-per-fold", "2"], 4, "2 GPUs per fold (--gpus-per-fold, --gres), but train.num_processes = 4"),
        (["--gpus-per-fold", "2", "--gres", "gpu:4"], None, "--gpus-per-fold 2, but --gres=gpu:4 requests 4"),
        (["--nodes", "2"], 3, "3 processes per fold are not divisible by --nodes 2"),
        (["--gpus-per-fold", "64"], None, "train.batch_size = 32 is too small for 64 processes"),
    ],
)
def test_contradictory_request_is_rejected(
    make_config: MakeConfig, args: list[str], stated: int | None, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_request(parse_run(*args), make_config(train={"num_processes": stated}))
    assert message in str(caught.value)


@pytest.mark.parametrize("args", [["--partition", "p"], ["--wait"], ["--nodes", "2"], ["--sbatch-arg=--x"]])
def test_slurm_options_are_rejected_by_local_backend(make_config: MakeConfig, args: list[str]) -> None:
    with pytest.raises(UserError, match="only with --backend slurm"):
        choose_slots(build_parser().parse_args(["run", "--config", "c.yaml", *args]), make_config())


# --- preemption: the stub's exit represents Slurm's SIGTERM -----------------------------------------------------------


@pytest.fixture
def stop_signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that asked this process to stop."""
    signals: list[int] = []
    monkeypatch.setattr(steps, "agree_to_stop", signals.append)
    return signals


@pytest.fixture
def set_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`set_srun(script)` replaces srun by a bash script."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CPU_BIND", "of a shell in another job")

    def write(script: str) -> None:
        srun = tmp_path / "bin" / "srun"
        srun.parent.mkdir()
        srun.write_text(f"#!/bin/bash\n{script}\n")
        srun.chmod(0o755)
        monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")

    return write


@pytest.mark.parametrize(
    ("end", "number"),
    [("exit 143", signal.SIGTERM), ("kill -TERM $$", signal.SIGTERM), ("exit 138", signal.SIGUSR1)],
)
def test_step_ended_by_slurm_requests_a_stop(
    end: str, number: int, stop_signals: list[int], set_srun: Callable[[str], None]
) -> None:
    set_srun(f'[ "$SLURM_JOB_ID" = 12 ] && [ -z "$SLURM_CPU_BIND" ] || exit 1\n{end}')
    with watching_for_preemption() as watch:
        assert watch is not None
        watch.join()
    assert stop_signals == [number]


def test_step_that_cannot_start_requests_no_stop(stop_signals: list[int], set_srun: Callable[[str], None]) -> None:
    set_srun("echo 'srun: unrecognized option --overlap' >&2; exit 1")
    with watching_for_preemption() as watch:
        assert watch is not None
        watch.join()
    assert stop_signals == []


def test_end_of_task_ends_step_without_requesting_a_stop(
    stop_signals: list[int], set_srun: Callable[[str], None]
) -> None:
    set_srun("exec sleep 1000")
    with watching_for_preemption() as watch:
        assert watch is not None
    watch.join()
    assert stop_signals == []


@pytest.mark.parametrize("exists", [False, True])
def test_no_watch_without_working_srun(
    exists: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, set_srun: Callable[[str], None]
) -> None:
    if exists:
        set_srun("")
        (tmp_path / "bin" / "srun").write_bytes(b"\x7fELF of another machine")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    else:
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        monkeypatch.setenv("PATH", str(tmp_path))
    with watching_for_preemption() as watch:
        assert watch is None
