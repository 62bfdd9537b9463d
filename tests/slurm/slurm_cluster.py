"""A real Slurm of two nodes on this machine, and what tests ask of it."""

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
CPUS = ("--gres=none", "--cpus-per-task=1")
PAIR = (*PLAIN, "data.train_csv=train.csv", "data.folds=2")
"""Two folds, where a third would only take time."""
JOBS_S = 110
"""No job of these tests takes so long, with all that waits before it."""
_GOING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"}


@dataclass(frozen=True)
class Cluster:
    """The Slurm, and what the tests do to it."""

    folder: Path

    def act(self, *words: str) -> None:
        """What `cluster.sh` can do: up, down, fail node2, heal node2, ctld stop, ctld start."""
        command = ["bash", str(HERE / "cluster.sh"), words[0], str(self.folder), *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            pytest.fail(f"{words}: {done.stdout}{done.stderr}")

    @property
    def environment(self) -> dict[str, str]:
        """For Slurm's commands."""
        own = {name: value for name, value in clean_environment().items() if not name.startswith(("SLURM", "SBATCH"))}
        return own | {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    def ask(self, *command: str, cwd: Path = ROOT, **told: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.environment | told, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            pytest.fail(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, folder: Path, *words: str, cwd: Path = ROOT, **told: str) -> str:
        """sbatch; what its tasks print comes into `folder`. The job's number."""
        folder.mkdir(parents=True, exist_ok=True)
        output = f"--output={folder}/slurm-%a.out"
        return self.ask("sbatch", "--parsable", output, *words, cwd=cwd, **told).strip()

    def list_states(self, job: str) -> list[str]:
        """Of its tasks, in their order."""
        told = self.ask("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%K %T")
        rows = [row.split() for row in told.splitlines()]
        numbered = [(int(number) if number.isdecimal() else -1, state) for number, state in rows]
        return [state for _, state in sorted(numbered)]

    def wait(self, job: str, folder: Path) -> list[str]:
        """Until all its tasks have ended; how they did."""
        deadline_s = time.monotonic() + JOBS_S
        while _GOING & set(states := self.list_states(job)):
            if time.monotonic() > deadline_s:
                pytest.fail(f"job {job} does not end: {states}\n{read_outputs(folder)}")
            time.sleep(0.2)
        return states


def read_outputs(folder: Path) -> str:
    """What the tasks printed."""
    files = sorted(folder.glob("slurm-*.out"))
    return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-6000:]}" for file in files)


def submit_folds(
    cluster: Cluster,
    trainer: Trainer,
    folder: Path,
    sets: tuple[str, ...],
    *words: str,
    last: tuple[str, ...] = (),
    python: str = sys.executable,
) -> str:
    """slurm/kfold.sh on the tiny pages, on CPUs; `words` are for sbatch, `last` for the tasks."""
    _, config, *others = trainer.arguments(sets, folder, run_id="tiny")
    return cluster.submit(folder, *CPUS, *words, "slurm/kfold.sh", config, *others, *last, DOCCLS_PYTHON=python)


def await_event(happened: Callable[[], bool], what: str, folder: Path) -> None:
    """Until it has happened, within the bound of a test's jobs."""
    deadline_s = time.monotonic() + JOBS_S
    while not happened():
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {JOBS_S} s: {what}\n{read_outputs(folder)}")
        time.sleep(0.1)
