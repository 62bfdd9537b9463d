"""Faults of a real Slurm: requeues, preemptions, a lost node or controller; runs stay identical to undisturbed ones."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launches import ask, assert_same_bytes, trains
from slurm_cluster import JOBS_S, ROOT, TWO_FOLDS, Cluster, await_event, read_outputs, submit_folds
from tiny_runs import PLAIN, Run, Trainer

ONE_FOLD = (*PLAIN, "data.valid_fold=1", "train.epochs=20", "train.checkpoint_interval_s=0.001")
"""One fold, long enough to be interrupted while it trains, with a resume checkpoint after every step."""
PREDICTIONS = "oof/parts/fold1.safetensors"
FIRST_EPOCH_STEPS = 2  # each fault strikes after them


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Run:
    """Undisturbed run of the one fold."""
    return trainer.train(*ONE_FOLD)


@pytest.fixture(scope="module")
def undisturbed_pair(trainer: Trainer) -> Run:
    """Undisturbed run of both folds."""
    return trainer.train(*TWO_FOLDS)


def await_training(folder: Path) -> None:
    await_event(lambda: trains(folder), "an epoch", folder)


def read_resume_points(run: Run) -> list[int]:
    """Read the steps that the fold has resumed from; its logs are in order, and starts in the same minute share one."""
    text = "".join(log.read_text() for log in sorted(run.folder.glob("logs/*_fold1.log")))
    return [int(step) for step in re.findall(r"^\[RESUME\] fold=1 from step (\d+) \(", text, re.MULTILINE)]


def assert_same_fold(cluster: Cluster, job: str, folder: Path, undisturbed: Run, restarted: bool) -> None:
    """Check that the job succeeds, resumed if and only if `restarted`, with the files of an undisturbed run."""
    assert cluster.wait(job, folder) == ["COMPLETED"], read_outputs(folder)
    run = Run([], folder)
    assert (run.root / PREDICTIONS).read_bytes() == (undisturbed.root / PREDICTIONS).read_bytes()
    assert run.read_weights(1) == undisturbed.read_weights(1)
    attempts = json.loads((run.root / "launch_task1.json").read_text())["attempts"]
    outcomes = [attempt["outcome"] for attempt in attempts]
    assert (len(outcomes) > 1) == restarted and outcomes[-1] == "done", outcomes
    resume_points = read_resume_points(run)
    # There are several if the ranks were asked to stop well before their job was killed: the launcher restarts them.
    assert bool(resume_points) == restarted and resume_points == sorted(resume_points), resume_points
    assert all(step >= FIRST_EPOCH_STEPS for step in resume_points), resume_points
    assert not list(folder.rglob("*.tmp"))


def test_fold_resumes_after_manual_requeue(cluster: Cluster, trainer: Trainer, undisturbed: Run) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, ONE_FOLD, "--array=1")
    await_training(folder)
    cluster.run("scontrol", "requeue", f"{job}_1")
    assert_same_fold(cluster, job, folder, undisturbed, restarted=True)


def test_fold_resumes_after_preemption(cluster: Cluster, trainer: Trainer) -> None:
    folder, overrides = trainer.new_folder(), (*ONE_FOLD, "train.epochs=120")  # too long for the grace time
    job = submit_folds(cluster, trainer, folder, overrides, "--array=1", "--partition=low")
    await_training(folder)
    cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert_same_fold(cluster, job, folder, trainer.train(*overrides), restarted=True)
    assert f"job {job}_1 is being preempted: requeued, will resume from here" in read_outputs(folder)
    restarts = re.search(r" Restarts=(\d+) ", cluster.run("scontrol", "show", "job", f"{job}_1"))
    assert restarts is not None and int(restarts[1]) > 0, "it finished in its grace time"


def test_fold_resumes_after_node_failure(cluster: Cluster, trainer: Trainer, undisturbed: Run) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, ONE_FOLD, "--array=1", "--nodelist=node2")
    await_training(folder)
    cluster.act("fail", "node2")
    try:
        await_event(lambda: cluster.list_states(job) != ["RUNNING"], "the end of the job on the node", folder)
    finally:
        cluster.act("heal", "node2")
    assert_same_fold(cluster, job, folder, undisturbed, restarted=True)


def test_fold_trains_while_controller_is_down(cluster: Cluster, trainer: Trainer, undisturbed: Run) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, ONE_FOLD, "--array=1")
    await_training(folder)
    (root,) = folder.glob("experiments/*/tiny")
    cluster.act("ctld", "stop")
    try:
        status = json.loads(ask(folder, "status", "--json", str(root), **cluster.environment))
        assert status["folds"][1]["state"] in ("running", "done")
        assert (status["folds"][0]["state"], status["folds"][0]["remark"]) == (
            "unknown", "Slurm does not answer (squeue)"
        )  # fmt: skip
        await_event((root / PREDICTIONS).exists, "the fold's end", folder)
    finally:
        cluster.act("ctld", "start")
    assert_same_fold(cluster, job, folder, undisturbed, restarted=False)


def render_launch(trainer: Trainer, folder: Path, overrides: tuple[str, ...], *args: str) -> list[str]:
    """Return the command line of `doccls-launch run --backend slurm`."""
    command = [sys.executable, "-m", "launcher", "run", "--backend", "slurm", *trainer.arguments(overrides, folder)]
    return [*command, "--run-id", "tiny", "--gpus-per-fold", "0", "--cpus-per-node", "1", *args]


def launch(
    cluster: Cluster, trainer: Trainer, folder: Path, overrides: tuple[str, ...], *args: str
) -> "subprocess.CompletedProcess[str]":
    command = render_launch(trainer, folder, overrides, *args)
    return subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=JOBS_S, check=False
    )


def test_next_launch_submits_only_cancelled_task(cluster: Cluster, trainer: Trainer, undisturbed_pair: Run) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, TWO_FOLDS, "--array=0-1", "--begin=now+1hour")
    cluster.run("scancel", f"{job}_1")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    await_event(lambda: bool(list(folder.rglob("fold0.safetensors"))), "fold 0", folder)
    launched = launch(cluster, trainer, folder, TWO_FOLDS, "--wait")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert "folds 1 submitted, one task per fold" in launched.stdout
    assert "[OOF] all folds macro_f1=" in launched.stdout
    assert_same_bytes(undisturbed_pair, Run([], folder), num_folds=2)


def test_fold_cancelled_by_preemption_is_resubmitted(cluster: Cluster, trainer: Trainer) -> None:
    folder, overrides = trainer.new_folder(), (*TWO_FOLDS, "train.epochs=20", "train.checkpoint_interval_s=0.001")
    command = render_launch(trainer, folder, overrides, "--wait", "--partition=cancel")
    with (folder.parent / f"{folder.name}.txt").open("w+") as output:
        launched = subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=output, stderr=output)
        try:
            await_event(lambda: trains(folder), "an epoch", folder)
            cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
            assert launched.wait(JOBS_S) == 0, Path(output.name).read_text() + read_outputs(folder)
        finally:
            launched.kill()
            launched.wait()
        text = Path(output.name).read_text()
    assert re.search(r"fold \d: job (\d+)_\d was preempted; resubmitted as job (?!\1 )\d+ \(preemption 1\)", text), text
    assert "[OOF] all folds macro_f1=" in text
    (root,) = folder.glob("experiments/*/tiny")
    first, *later = json.loads((root / "slurm_jobs.json").read_text())["jobs"]
    assert first["folds"] == [0, 1] and first["preempted"] == []
    assert later and all(job["folds"] == job["preempted"] for job in later), later
    resubmitted = [fold for job in later for fold in job["folds"]]
    assert len(resubmitted) == len(set(resubmitted)), "submitted twice"
    assert_same_bytes(trainer.train(*overrides), Run([], folder), num_folds=2)


def test_submission_with_lost_answer_is_found_and_not_repeated(
    cluster: Cluster, trainer: Trainer, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch, folder = shutil.which("sbatch"), trainer.new_folder()
    wrapper = tmp_path / "sbatch"
    wrapper.write_text(f'#!/bin/bash\n"{sbatch}" "$@" >/dev/null\necho "Socket timed out" >&2\nexit 1\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    launched = launch(cluster, trainer, folder, ONE_FOLD)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    (root,) = folder.glob("experiments/*/tiny")
    (submitted,) = json.loads((root / "slurm_jobs.json").read_text())["jobs"]
    rows = cluster.run("squeue", "--noheader", "--states=all", "--format=%F %k").splitlines()
    comment = f"doccls:tiny:{submitted['token']}"
    assert {job for job, job_comment in map(str.split, rows) if job_comment == comment} == {submitted["job"]}
    second = launch(cluster, trainer, folder, ONE_FOLD)
    assert second.returncode == 0 and "nothing to submit" in second.stdout, second.stdout + second.stderr
    assert cluster.wait(submitted["job"], folder) == ["COMPLETED"], read_outputs(folder)
    assert (root / PREDICTIONS).read_bytes() == (undisturbed.root / PREDICTIONS).read_bytes()
    assert len(json.loads((root / "slurm_jobs.json").read_text())["jobs"]) == 1


def test_cancel_ends_only_the_jobs_of_the_run(cluster: Cluster, trainer: Trainer) -> None:
    folder = trainer.new_folder()
    other = cluster.submit(folder / "other", "--wrap=sleep 600")
    job = submit_folds(cluster, trainer, folder, (*PLAIN, "train.epochs=500"), "--array=0-2%1")
    await_training(folder)
    (root,) = folder.glob("experiments/*/tiny")
    status = json.loads(ask(folder, "status", "--json", str(root), **cluster.environment))
    assert [fold["state"] for fold in status["folds"]] == ["running", "waiting", "waiting"]
    assert "[CANCEL] stopped" in ask(folder, "cancel", str(root), **cluster.environment)
    assert not {"RUNNING", "PENDING", "COMPLETING"} & set(cluster.list_states(job))
    assert cluster.run("squeue", "--noheader", f"--jobs={other}", "--format=%T").strip() in ("RUNNING", "PENDING")
    cluster.run("scancel", other)
    (log,) = folder.glob("logs/*_task0.log")
    assert log.read_text().splitlines()[-2] == "[EXIT] TRAINING ERROR code=75"


def test_second_array_cannot_train_fold_of_the_first(cluster: Cluster, trainer: Trainer) -> None:
    folder = trainer.new_folder()
    first = submit_folds(cluster, trainer, folder, (*ONE_FOLD, "train.epochs=50000"), "--array=1")
    await_training(folder)
    longer = (*ONE_FOLD, "train.epochs=50000")
    second = submit_folds(cluster, trainer, folder, longer, "--array=0", task_options=("--task", "0/1"))
    assert cluster.wait(second, folder) == ["FAILED"], read_outputs(folder)
    assert "fold 1 of run tiny is being trained by process " in (folder / "slurm-0.out").read_text()
    assert cluster.list_states(first) == ["RUNNING"]
    cluster.run("scancel", first)
    cluster.wait(first, folder)


def test_time_limit_requeues_unfinished_folds(cluster: Cluster, trainer: Trainer, undisturbed_pair: Run) -> None:
    """One task trains all folds, and gets the signal that Slurm sends ahead of the limit."""
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, TWO_FOLDS, "--array=0", task_options=("--task", "0/1"))
    await_event(lambda: bool(list(folder.rglob("fold0.safetensors"))), "the first fold", folder)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    assert cluster.wait(job, folder) == ["COMPLETED"], read_outputs(folder)
    assert f"job {job}_0 nears its time limit: requeued, will resume" in read_outputs(folder)
    assert_same_bytes(undisturbed_pair, Run([], folder), num_folds=2)


def test_fold_resumes_from_its_step_after_time_limit(cluster: Cluster, trainer: Trainer, undisturbed: Run) -> None:
    """The signal is the one that a site may send instead of SIGUSR1."""
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, (*ONE_FOLD, "train.sigusr2=stop"), "--array=1")
    await_training(folder)
    cluster.run("scancel", "--batch", "--signal=USR2", f"{job}_1")
    assert_same_fold(cluster, job, folder, undisturbed, restarted=True)
    assert "SIGUSR2 received" in read_outputs(folder)
    run = Run([], folder)
    (stopped, _) = json.loads((run.root / "launch_task1.json").read_text())["attempts"]
    assert (stopped["outcome"], stopped["then"]) == ("stopped", "stopped")


def test_time_limit_before_a_saved_step_does_not_requeue(cluster: Cluster, trainer: Trainer) -> None:
    folder = trainer.new_folder()
    fresh = ("--start", "fresh")  # its imports take seconds; a fork saves its first step at once
    job = submit_folds(cluster, trainer, folder, ONE_FOLD, "--array=1", task_options=fresh)
    await_event(lambda: "[LAUNCH] fold 1 on " in read_outputs(folder), "the fold's start", folder)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    assert cluster.wait(job, folder) == ["FAILED"], read_outputs(folder)
    text = read_outputs(folder)
    assert f"job {job}_1 reached its time limit before a step was saved: request more time (sbatch --time=...)" in text
    assert text.rstrip().endswith("[EXIT][ERROR] training failed: SIGUSR1 received")
