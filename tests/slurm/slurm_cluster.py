"""A real Slurm cluster of two nodes on this machine, and the operations that tests need."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rank_launcher import clean_environment
from tiny_runs import PLAIN, Trainer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CPU_OPTIONS = ("--gres=none", "--cpus-per-task=1")
TWO_FOLDS = (*PLAIN, "data.train_csv=train.csv", "data.folds=2")
JOBS_S = 110  # time limit for a test's jobs, including their time in the queue
_ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}


@dataclass(frozen=True)
class Cluster:
    """The Slurm cluster under test."""

    folder: Path

    def act(self, *args: str) -> None:
        """Run `cluster.sh` with up, down, fail node2, heal node2, ctld stop or ctld start."""
        command = ["bash", str(HERE / "cluster.sh"), args[0], str(self.folder), *args[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            pytest.fail(f"{args}: {done.stdout}{done.stderr}")

    @property
    def environment(self) -> dict[str, str]:
        """Environment of Slurm's commands."""
        kept = {name: value for name, value in clean_environment().items() if not name.startswith(("SLURM", "SBATCH"))}
        return kept | {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def run(self, *command: str, cwd: Path = ROOT, **variables: str) -> str:
        """Run one of Slurm's commands and return its output."""
        done = subprocess.run(
            command, env=self.environment | variables, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            pytest.fail(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, folder: Path, *args: str, cwd: Path = ROOT, **variables: str) -> str:
        """Submit a job whose tasks write their output to `folder`, and return its number."""
        folder.mkdir(parents=True, exist_ok=True)
        output = f"--output={folder}/slurm-%a.out"
        return self.run("sbatch", "--parsable", output, *args, cwd=cwd, **variables).strip()

    def list_states(self, job: str) -> list[str]:
        """List the states of the job's tasks in the order of their indices."""
        output = self.run("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%K %T")
        rows = [row.split() for row in output.splitlines()]
        numbered = [(int(number) if number.isdecimal() else -1, state) for number, state in rows]
        return [state for _, state in sorted(numbered)]

    def wait(self, job: str, folder: Path) -> list[str]:
        """Wait until all tasks of the job have ended, and return their states."""
        deadline_s = time.monotonic() + JOBS_S
        while _ACTIVE & set(states := self.list_states(job)):
            if time.monotonic() > deadline_s:
                pytest.fail(f"job {job} has not ended: {states}\n{read_outputs(folder)}")
            time.sleep(0.2)
        return states


def read_outputs(folder: Path) -> str:
    """Read the output of all tasks."""
    files = sorted(folder.glob("slurm-*.out"))
    return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-6000:]}" for file in files)


def submit_folds(
    cluster: Cluster,
    trainer: Trainer,
    folder: Path,
    overrides: tuple[str, ...],
    *sbatch_options: str,
    task_options: tuple[str, ...] = (),
    python: str = sys.executable,
) -> str:
    """Submit slurm/kfold.sh with the tiny pages, on CPUs, and return the job's number."""
    _, config, *options = trainer.arguments(overrides, folder, run_id="tiny")
    command = [*CPU_OPTIONS, *sbatch_options, "slurm/kfold.sh", config, *options, *task_options]
    return cluster.submit(folder, *command, DOCCLS_PYTHON=python)


def await_event(has_happened: Callable[[], bool], event: str, folder: Path) -> None:
    """Wait until the event has happened, at most JOBS_S."""
    deadline_s = time.monotonic() + JOBS_S
    while not has_happened():
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {JOBS_S} s: {event}\n{read_outputs(folder)}")
        time.sleep(0.1)
