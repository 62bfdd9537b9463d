"""A real Slurm that requeues, preempts, loses a node or its controller: the undisturbed run's bytes all the same."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launches import ask, assert_same_bytes, trains
from slurm_cluster import JOBS_S, PAIR, ROOT, Cluster, await_event, read_outputs, submit_folds
from tiny_runs import PLAIN, Run, Trainer

ONE = (*PLAIN, "data.valid_fold=1", "train.epochs=20", "train.checkpoint_interval_s=0.001")
"""One fold, long enough to be met in its midst; a state after every step."""
PART = "oof/parts/fold1.safetensors"
FIRST_EPOCH = 2
"""Steps; each fault strikes after them."""


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Run:
    """The one fold."""
    return trainer.train(*ONE)


@pytest.fixture(scope="module")
def undisturbed_pair(trainer: Trainer) -> Run:
    """Both folds."""
    return trainer.train(*PAIR)


def await_training(folder: Path) -> None:
    await_event(lambda: trains(folder), "an epoch", folder)


def read_resume_points(run: Run) -> list[int]:
    """The steps that a fold has gone on from, as its logs tell, one a minute."""
    told = "".join(log.read_text() for log in sorted(run.folder.glob("logs/*_fold1.log")))
    return [int(step) for step in re.findall(r"^\[RESUME\] fold=1 from step (\d+) \(", told, re.MULTILINE)]


def assert_same_fold(cluster: Cluster, job: str, folder: Path, undisturbed: Run, restarted: bool) -> None:
    """It has ended well, at its first start or from a step at a later one, and left what an undisturbed run leaves."""
    assert cluster.wait(job, folder) == ["COMPLETED"], read_outputs(folder)
    run = Run([], folder)
    assert (run.root / PART).read_bytes() == (undisturbed.root / PART).read_bytes()
    assert run.read_weights(1) == undisturbed.read_weights(1)
    outcomes = [one["outcome"] for one in json.loads((run.root / "launch_task1.json").read_text())["attempts"]]
    assert (len(outcomes) > 1) == restarted and outcomes[-1] == "done", outcomes
    starts = read_resume_points(run)
    # More than one if the ranks were asked to leave some time before their job was killed: their launcher goes on.
    assert bool(starts) == restarted and starts == sorted(starts), starts
    assert all(step >= FIRST_EPOCH for step in starts), starts
    assert not list(folder.rglob("*.tmp"))


def test_a_fold_that_is_requeued_by_hand(cluster: Cluster, trainer: Trainer, undisturbed: Run) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, ONE, "--array=1")
    await_training(folder)
    cluster.ask("scontrol", "requeue", f"{job}_1")
    assert_same_fold(cluster, job, folder, undisturbed, restarted=True)


def test_a_fold_that_is_preempted(cluster: Cluster, trainer: Trainer) -> None:
    folder, sets = trainer.new_folder(), (*ONE, "train.epochs=120")  # more than its grace time is enough for
    job = submit_folds(cluster, trainer, folder, sets, "--array=1", "--partition=low")
    await_training(folder)
    cluster.ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert_same_fold(cluster, job, folder, trainer.train(*sets), restarted=True)
    assert f"job {job}_1 is being preempted: requeued, will resume from here" in read_outputs(folder)
    restarts = re.search(r" Restarts=(\d+) ", cluster.ask("scontrol", "show", "job", f"{job}_1"))
    assert restarts is not None and int(restarts[1]) > 0, "it ended in its grace time"


def test_a_fold_whose_node_is_killed(cluster: Cluster, trainer: Trainer, undisturbed: Run) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, ONE, "--array=1", "--nodelist=node2")
    await_training(folder)
    cluster.act("fail", "node2")
    try:
        await_event(lambda: cluster.list_states(job) != ["RUNNING"], "the end of the job on the node", folder)
    finally:
        cluster.act("heal", "node2")
    assert_same_fold(cluster, job, folder, undisturbed, restarted=True)


def test_a_controller_that_is_away_while_a_fold_trains(cluster: Cluster, trainer: Trainer, undisturbed: Run) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, ONE, "--array=1")
    await_training(folder)
    (root,) = folder.glob("experiments/*/tiny")
    cluster.act("ctld", "stop")
    try:
        status = json.loads(ask(folder, "status", "--json", str(root), **cluster.environment))
        assert status["folds"][1]["state"] in ("running", "done")
        assert (status["folds"][0]["state"], status["folds"][0]["remark"]) == (
            "unknown", "Slurm does not answer (squeue)"
        )  # fmt: skip
        await_event((root / PART).exists, "the fold's end", folder)
    finally:
        cluster.act("ctld", "start")
    assert_same_fold(cluster, job, folder, undisturbed, restarted=False)


def render_launch(trainer: Trainer, folder: Path, sets: tuple[str, ...], *words: str) -> list[str]:
    """`doccls-launch run --backend slurm`."""
    command = [sys.executable, "-m", "launcher", "run", "--backend", "slurm", *trainer.arguments(sets, folder)]
    return [*command, "--run-id", "tiny", "--gpus-per-fold", "0", "--cpus-per-node", "1", *words]


def launch(
    cluster: Cluster, trainer: Trainer, folder: Path, sets: tuple[str, ...], *words: str
) -> "subprocess.CompletedProcess[str]":
    command = render_launch(trainer, folder, sets, *words)
    return subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=JOBS_S, check=False
    )


def test_a_task_that_is_cancelled_is_all_that_the_next_launch_submits(
    cluster: Cluster, trainer: Trainer, undisturbed_pair: Run
) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, PAIR, "--array=0-1", "--begin=now+1hour")
    cluster.ask("scancel", f"{job}_1")
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    await_event(lambda: bool(list(folder.rglob("fold0.safetensors"))), "fold 0", folder)
    launched = launch(cluster, trainer, folder, PAIR, "--wait")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert "folds 1 submitted, one task per fold" in launched.stdout
    assert "[OOF] all folds macro_f1=" in launched.stdout
    assert_same_bytes(undisturbed_pair, Run([], folder), num_folds=2)


def test_a_fold_that_is_preempted_by_cancelling_is_submitted_again(cluster: Cluster, trainer: Trainer) -> None:
    folder, sets = trainer.new_folder(), (*PAIR, "train.epochs=20", "train.checkpoint_interval_s=0.001")
    command = render_launch(trainer, folder, sets, "--wait", "--partition=cancel")
    with (folder.parent / f"{folder.name}.txt").open("w+") as said:
        launched = subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=said, stderr=said)
        try:
            await_event(lambda: trains(folder), "an epoch", folder)
            cluster.ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
            assert launched.wait(JOBS_S) == 0, Path(said.name).read_text() + read_outputs(folder)
        finally:
            launched.kill()
            launched.wait()
        told = Path(said.name).read_text()
    assert re.search(
        r"fold \d: job (\d+)_\d was preempted; resubmitted as job (?!\1 )\d+ \(preemption 1\)", told
    ), told
    assert "[OOF] all folds macro_f1=" in told
    (root,) = folder.glob("experiments/*/tiny")
    first, *later = json.loads((root / "slurm_jobs.json").read_text())["jobs"]
    assert first["folds"] == [0, 1] and first["preempted"] == []
    assert later and all(one["folds"] == one["preempted"] for one in later), later
    again = [fold for one in later for fold in one["folds"]]
    assert len(again) == len(set(again)), "submitted twice"
    assert_same_bytes(trainer.train(*sets), Run([], folder), num_folds=2)


def test_a_submission_whose_answer_is_lost_is_found_and_not_sent_twice(
    cluster: Cluster, trainer: Trainer, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = shutil.which("sbatch"), trainer.new_folder()
    wrapper = tmp_path / "sbatch"
    wrapper.write_text(f'#!/bin/bash\n"{real}" "$@" >/dev/null\necho "Socket timed out" >&2\nexit 1\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    launched = launch(cluster, trainer, folder, ONE)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    (root,) = folder.glob("experiments/*/tiny")
    (sent,) = json.loads((root / "slurm_jobs.json").read_text())["jobs"]
    rows = cluster.ask("squeue", "--noheader", "--states=all", "--format=%F %k").splitlines()
    assert {job for job, comment in map(str.split, rows) if comment == f"doccls:tiny:{sent['token']}"} == {sent["job"]}
    again = launch(cluster, trainer, folder, ONE)
    assert again.returncode == 0 and "nothing to submit" in again.stdout, again.stdout + again.stderr
    assert cluster.wait(sent["job"], folder) == ["COMPLETED"], read_outputs(folder)
    assert (root / PART).read_bytes() == (undisturbed.root / PART).read_bytes()
    assert len(json.loads((root / "slurm_jobs.json").read_text())["jobs"]) == 1


def test_cancel_ends_the_runs_jobs_and_no_other(cluster: Cluster, trainer: Trainer) -> None:
    folder = trainer.new_folder()
    other = cluster.submit(folder / "other", "--wrap=sleep 600")
    job = submit_folds(cluster, trainer, folder, (*PLAIN, "train.epochs=500"), "--array=0-2%1")
    await_training(folder)
    (root,) = folder.glob("experiments/*/tiny")
    status = json.loads(ask(folder, "status", "--json", str(root), **cluster.environment))
    assert [fold["state"] for fold in status["folds"]] == ["running", "waiting", "waiting"]
    assert "[CANCEL] stopped" in ask(folder, "cancel", str(root), **cluster.environment)
    assert not {"RUNNING", "PENDING", "COMPLETING"} & set(cluster.list_states(job))
    assert cluster.ask("squeue", "--noheader", f"--jobs={other}", "--format=%T").strip() in ("RUNNING", "PENDING")
    cluster.ask("scancel", other)
    (log,) = folder.glob("logs/*_task0.log")
    assert log.read_text().splitlines()[-2] == "[EXIT] TRAINING ERROR code=75"


def test_a_second_array_is_refused_a_fold_that_the_first_trains(cluster: Cluster, trainer: Trainer) -> None:
    folder = trainer.new_folder()
    first = submit_folds(cluster, trainer, folder, (*ONE, "train.epochs=50000"), "--array=1")
    await_training(folder)
    longer = (*ONE, "train.epochs=50000")
    second = submit_folds(cluster, trainer, folder, longer, "--array=0", last=("--task", "0/1"))
    assert cluster.wait(second, folder) == ["FAILED"], read_outputs(folder)
    assert "fold 1 of run tiny is being trained by process " in (folder / "slurm-0.out").read_text()
    assert cluster.list_states(first) == ["RUNNING"]
    cluster.ask("scancel", first)
    cluster.wait(first, folder)


def test_a_time_limit_puts_the_rest_back_into_the_queue(
    cluster: Cluster, trainer: Trainer, undisturbed_pair: Run
) -> None:
    """One task trains all folds; the signal is the one that Slurm sends ahead of the limit."""
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, PAIR, "--array=0", last=("--task", "0/1"))
    await_event(lambda: bool(list(folder.rglob("fold0.safetensors"))), "the first fold", folder)
    cluster.ask("scancel", "--batch", "--signal=USR1", f"{job}_0")
    assert cluster.wait(job, folder) == ["COMPLETED"], read_outputs(folder)
    assert f"job {job}_0 nears its time limit: requeued, will resume" in read_outputs(folder)
    assert_same_bytes(undisturbed_pair, Run([], folder), num_folds=2)


def test_a_fold_that_meets_a_time_limit_goes_on_from_its_step(
    cluster: Cluster, trainer: Trainer, undisturbed: Run
) -> None:
    """The signal is the one that a site may send instead of the SIGUSR1 of the test above."""
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, (*ONE, "train.sigusr2=stop"), "--array=1")
    await_training(folder)
    cluster.ask("scancel", "--batch", "--signal=USR2", f"{job}_1")
    assert_same_fold(cluster, job, folder, undisturbed, restarted=True)
    assert "SIGUSR2 received" in read_outputs(folder)
    run = Run([], folder)
    (stopped, _) = json.loads((run.root / "launch_task1.json").read_text())["attempts"]
    assert (stopped["outcome"], stopped["then"]) == ("stopped", "stopped")


def test_a_job_whose_time_is_up_before_a_step_is_saved_is_not_tried_again(cluster: Cluster, trainer: Trainer) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, ONE, "--array=1")
    await_event(lambda: "[LAUNCH] fold 1 on " in read_outputs(folder), "the fold's start", folder)  # it imports
    cluster.ask("scancel", "--batch", "--signal=USR1", f"{job}_1")
    assert cluster.wait(job, folder) == ["FAILED"], read_outputs(folder)
    told = read_outputs(folder)
    assert f"job {job}_1 reached its time limit before a step was saved: request more time (sbatch --time=...)" in told
    assert told.rstrip().endswith("[EXIT][ERROR] training failed: SIGUSR1 received")
