"""`sbatch slurm/kfold.sh CONFIG` on a real Slurm: the array's merged results are identical to those of one process."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from launches import assert_same_bytes
from slurm_cluster import CPU_OPTIONS, JOBS_S, ROOT, TWO_FOLDS, Cluster, read_outputs, submit_folds
from tiny_runs import PLAIN, Run, Trainer


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Run:
    """Run of all folds in one process."""
    return trainer.train(*PLAIN)


@pytest.fixture(scope="module")
def undisturbed_pair(trainer: Trainer) -> Run:
    """Run of both folds in one process."""
    return trainer.train(*TWO_FOLDS)


def read_log(run: Run, task: int) -> list[str]:
    (log,) = run.folder.glob(f"logs/*_task{task}.log")
    return log.read_text().splitlines()


def test_array_trains_one_fold_per_task_and_last_task_merges(
    cluster: Cluster, trainer: Trainer, undisturbed: Run
) -> None:
    folder = trainer.new_folder()
    _, config, *others = trainer.arguments(PLAIN, folder)
    job = cluster.submit(folder, *CPU_OPTIONS, "slurm/kfold.sh", config, *others, DOCCLS_PYTHON=sys.executable)
    assert cluster.wait(job, folder) == ["COMPLETED"] * 5, read_outputs(folder)
    run = Run([], folder)
    assert run.root.name == f"v001-j{job}"
    assert_same_bytes(undisturbed, run)
    for task in (3, 4):
        assert (folder / f"slurm-{task}.out").read_text() == (
            f"[LAUNCH] task {job}_{task} of 0 to 4: no fold is left for it (folds are numbered 0 to 2)\n"
        )
    logs = [read_log(run, task) for task in range(3)]
    assert sum(any(line.startswith("[OOF] ->") for line in log) for log in logs) == 1, "only one task merges"
    endings = [log[-2] for log in logs]
    assert "[EXIT] TRAINING SUCCESS code=0" in endings
    assert all(ending.startswith(("[EXIT] TRAINING SUCCESS ", "[EXIT] INCOMPLETE missing=")) for ending in endings)
    merge_job = cluster.submit(
        folder / "merge", f"--dependency=afterany:{job}", "slurm/merge.sh", str(run.root), DOCCLS_PYTHON=sys.executable
    )
    assert cluster.wait(merge_job, folder / "merge") == ["COMPLETED"]
    assert "[OOF] all folds macro_f1=" in "".join(file.read_text() for file in (folder / "merge").glob("*.out"))
    assert_same_bytes(undisturbed, run)


def test_script_runs_from_any_folder_with_hostile_names_and_empty_environment(
    cluster: Cluster, trainer: Trainer, undisturbed_pair: Run
) -> None:
    hostile = trainer.new_folder() / 'it\'s "a" 100% $HOME\\n\nfolder'
    away = hostile / "away"
    away.mkdir(parents=True)
    shutil.copytree(ROOT / "slurm", hostile / "slurm")
    (hostile / "slurm" / "env.sh").write_text(f"export DOCCLS_PYTHON={sys.executable}\n")
    shutil.copytree(trainer.config.parent, away / "data")
    args = [word for text in TWO_FOLDS for word in ("--set", text)]
    command = [*CPU_OPTIONS, "--export=NONE", "--array=1-2", "../slurm/kfold.sh", "data/tiny.yaml", *args]
    job = cluster.submit(hostile.parent, *command, cwd=away)
    assert cluster.wait(job, hostile.parent) == ["COMPLETED"] * 2, read_outputs(hostile.parent)
    (root,) = hostile.rglob(f"v001-j{job}")
    assert_same_bytes(undisturbed_pair, Run([], root.parents[2]), num_folds=2)


def test_failing_fold_fails_its_task_and_other_task_reports_it(
    cluster: Cluster, trainer: Trainer, undisturbed_pair: Run
) -> None:
    folder = trainer.new_folder()
    blocker = folder / "experiments" / time.strftime("%Y%m%d") / "tiny" / "ckpt" / "best_fold0.pth"
    blocker.mkdir(parents=True)  # a folder at the path of a file
    # %1 runs task 0 first.
    job = submit_folds(cluster, trainer, folder, TWO_FOLDS, "--array=0-1%1", task_options=("--max-restarts", "0"))
    assert cluster.wait(job, folder) == ["FAILED", "COMPLETED"], read_outputs(folder)
    assert "1 fold failed\n- fold 0: " in read_outputs(folder) and "best_fold0.pth" in read_outputs(folder)
    (missing,) = {line for line in read_log(Run([], folder), 1) if line.startswith("- fold 0: failed, ")}
    assert "best_fold0.pth" in missing and "_fold0.log" in missing
    blocker.rmdir()
    job = submit_folds(cluster, trainer, folder, TWO_FOLDS, "--array=0")  # in the same run, only that fold is missing
    assert cluster.wait(job, folder) == ["COMPLETED"], read_outputs(folder)
    assert_same_bytes(undisturbed_pair, Run([], folder), num_folds=2)


def test_two_nodes_are_identical_to_two_ranks_on_one_node(cluster: Cluster, trainer: Trainer) -> None:
    overrides = (*PLAIN, "data.valid_fold=1", "train.num_processes=2")
    runs = []
    for args in (("--nodes=1", "--cpus-per-task=2"), ("--nodes=2",)):
        folder = trainer.new_folder()
        job = submit_folds(cluster, trainer, folder, overrides, "--array=1", *args)
        assert cluster.wait(job, folder) == ["COMPLETED"], read_outputs(folder)
        runs.append(Run([], folder))
    one_node, two_nodes = runs
    predictions = "oof/parts/fold1.safetensors"
    assert (one_node.root / predictions).read_bytes() == (two_nodes.root / predictions).read_bytes()
    local = trainer.train(*overrides, world_size=2)
    assert one_node.read_weights(1) == two_nodes.read_weights(1) == local.read_weights(1)


def test_gpus_hidden_from_the_driver_are_rejected(cluster: Cluster, trainer: Trainer) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, PLAIN, "--gres=gpu:fake:2", "--array=0")
    assert cluster.wait(job, folder) == ["FAILED"]
    output = (folder / "slurm-0.out").read_text()
    assert "Slurm gave this job 1 nodes x 2 GPUs, but the NVIDIA driver of node1 shows none" in output


def test_study_is_one_array(cluster: Cluster, trainer: Trainer) -> None:
    folder = trainer.new_folder()
    options = ("--backend", "slurm", "--gpus-per-fold", "0", "--cpus-per-node", "1", "--wait")
    overrides = (*TWO_FOLDS, "data.valid_fold=1")
    words = [*trainer.arguments(overrides, folder), "--seeds", "1,2", "--study", "s", *options]
    launched = subprocess.run(
        [sys.executable, "-m", "launcher", "run", *words],
        cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=JOBS_S, check=False,
    )  # fmt: skip
    study = folder / "experiments" / "studies" / "s"
    outputs = "".join(file.read_text() for file in study.glob("console/*.out"))
    assert launched.returncode == 0, launched.stdout + launched.stderr + outputs
    jobs = {}
    for seed in (1, 2):
        (root,) = folder.glob(f"experiments/*/s-tiny-s{seed}")
        ((jobs[seed],)) = json.loads((root / "slurm_jobs.json").read_text())["jobs"]
        alone = trainer.train(*overrides, f"project.seed={seed}", "data.fold_seed=42")
        predictions = "oof/parts/fold1.safetensors"
        assert (root / predictions).read_bytes() == (alone.root / predictions).read_bytes()
    assert jobs[1]["job"] == jobs[2]["job"] and [jobs[seed]["offset"] for seed in (1, 2)] == [0, 2]
    assert cluster.list_states(jobs[1]["job"]) == ["COMPLETED"] * 2
    assert "[STUDY]  1  s-tiny-s" in launched.stdout
    assert {run["finished_folds"] for run in json.loads((study / "study.json").read_text())["runs"]} == {1}
