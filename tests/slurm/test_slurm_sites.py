"""Site-specific environments of a job: a shell in a job step, and a container without Slurm's commands."""

import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launches import trains
from slurm_cluster import JOBS_S, ROOT, Cluster, await_event, read_outputs, submit_folds
from tiny_runs import PLAIN, Run, Trainer

ONE_FOLD = (*PLAIN, "data.valid_fold=1", "train.epochs=60", "train.checkpoint_interval_s=0.001")
PREDICTIONS = "oof/parts/fold1.safetensors"
COMMANDS = ("srun", "sbatch", "squeue", "scontrol", "scancel")


def run_in_job_shell(cluster: Cluster, folder: Path, *command: str) -> str:
    """Run the command as a user would in `srun -n2 --cpus-per-task=1 --pty bash`, and return its output."""
    folder.mkdir(parents=True, exist_ok=True)
    printed = folder / "printed"  # a file, because the terminal's output may contain echoes between the lines
    typed = f"test -t 0 && {shlex.join(command)} >{shlex.quote(str(printed))} 2>&1"
    typed = f'if [ "$SLURM_PROCID" = 0 ]; then {typed}; fi'  # the other task has no terminal
    shell = ["srun", "--ntasks=2", "--nodes=1", "--pty", "bash", "-c", typed]
    screen, terminal = pty.openpty()
    try:
        done = subprocess.run(
            shell, env=cluster.environment | {"DOCCLS_PYTHON": sys.executable}, cwd=ROOT, stdin=terminal,
            stdout=terminal, stderr=terminal, timeout=JOBS_S, check=False,
        )  # fmt: skip
    finally:
        os.close(terminal)
        os.close(screen)
    assert done.returncode == 0, printed.read_text() if printed.exists() else "the shell has no terminal"
    return printed.read_text()


def test_shell_in_job_step_submits_and_launches(cluster: Cluster, trainer: Trainer) -> None:
    """The shell's ranks, CPU binding and limits affect neither a job on two nodes nor the folds that it launches."""
    overrides = (*PLAIN, "data.valid_fold=1", "train.num_processes=2")
    away, here = trainer.new_folder(), trainer.new_folder()
    options = [
        "--parsable",
        f"--output={away}/slurm-%a.out",
        "--gres=none",
        "--cpus-per-task=1",
        "--nodes=2",
        "--array=1",
    ]
    _, config, *others = trainer.arguments(overrides, away, run_id="tiny")
    printed = run_in_job_shell(cluster, away, "sbatch", *options, "slurm/kfold.sh", config, *others)
    job = printed.split()[-1]
    arguments = trainer.arguments(overrides, here, run_id="tiny")
    run_in_job_shell(cluster, here, sys.executable, "-m", "launcher", "run", *arguments, "--slots", "2")
    assert cluster.wait(job, away) == ["COMPLETED"], read_outputs(away)
    assert (Run([], away).root / PREDICTIONS).read_bytes() == (Run([], here).root / PREDICTIONS).read_bytes()


def make_container(folder: Path) -> Path:
    """Write an executable that runs Python in a mount namespace without Slurm's commands."""
    privilege = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    paths = [path for name in COMMANDS if (path := shutil.which(name)) is not None]
    assert len(paths) == len(COMMANDS)
    hide = "; ".join(f"mount --bind /dev/null {path}" for path in paths)
    args = ["unshare", *privilege, "--mount", "bash", "-c", f'set -e; {hide}; exec "$@"', "container", sys.executable]
    container = folder / "python in a container"
    container.write_text(f'#!/bin/bash\nexec {shlex.join(args)} "$@"\n')
    container.chmod(0o755)
    return container


def test_task_in_container_without_slurm_trains_and_exits_with_requeue_code(
    cluster: Cluster, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trainer.new_folder()
    folder.mkdir(parents=True)
    python = str(make_container(folder))
    job = submit_folds(cluster, trainer, folder, ONE_FOLD, "--array=1", python=python)
    await_event(lambda: trains(folder), "an epoch", folder)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")  # ahead of a time limit
    assert cluster.wait(job, folder) == ["FAILED"], read_outputs(folder)
    text = read_outputs(folder)
    assert f"scontrol does not answer: job {job}_1 may not be requeued" in text
    assert "exit code 75: the task can resume" in text
    assert "ExitCode=75:0" in cluster.run("scontrol", "show", "job", f"{job}_1")
    job = submit_folds(cluster, trainer, folder, ONE_FOLD, "--array=1", python=python)
    assert cluster.wait(job, folder) == ["COMPLETED"], read_outputs(folder)
    run = Run([], folder)
    (stopped, done) = json.loads((run.root / "launch_task1.json").read_text())["attempts"]
    assert (stopped["outcome"], done["outcome"]) == ("stopped", "done")
    assert (run.root / PREDICTIONS).read_bytes() == (trainer.train(*ONE_FOLD).root / PREDICTIONS).read_bytes()
