"""`sbatch slurm/kfold.sh CONFIG` on a real Slurm: the folds as an array, merged, with the bytes of one machine."""

import shutil
import sys
import time

import pytest
from launches import assert_same_bytes
from slurm_cluster import CPUS, PAIR, ROOT, Cluster, read_outputs, submit_folds
from tiny_runs import PLAIN, Run, Trainer


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Run:
    """All folds in one process."""
    return trainer.train(*PLAIN)


@pytest.fixture(scope="module")
def undisturbed_pair(trainer: Trainer) -> Run:
    """Both folds in one process."""
    return trainer.train(*PAIR)


def list_logs(run: Run, task: int) -> list[str]:
    (log,) = run.folder.glob(f"logs/*_task{task}.log")
    return log.read_text().splitlines()


def test_an_array_trains_a_fold_a_task_and_who_comes_last_merges(
    cluster: Cluster, trainer: Trainer, undisturbed: Run
) -> None:
    folder = trainer.new_folder()
    _, config, *others = trainer.arguments(PLAIN, folder)
    job = cluster.submit(folder, *CPUS, "slurm/kfold.sh", config, *others, DOCCLS_PYTHON=sys.executable)
    assert cluster.wait(job, folder) == ["COMPLETED"] * 5, read_outputs(folder)
    run = Run([], folder)
    assert run.root.name == f"v001-j{job}"
    assert_same_bytes(undisturbed, run)
    for task in (3, 4):
        assert (folder / f"slurm-{task}.out").read_text() == (
            f"[LAUNCH] task {job}_{task} of 0 to 4: no fold is left for it (folds are numbered 0 to 2)\n"
        )
    logs = [list_logs(run, task) for task in range(3)]
    assert sum(any(line.startswith("[OOF] ->") for line in log) for log in logs) == 1, "one merges"
    endings = [log[-2] for log in logs]
    assert "[EXIT] TRAINING SUCCESS code=0" in endings
    assert all(ending.startswith(("[EXIT] TRAINING SUCCESS ", "[EXIT] INCOMPLETE missing=")) for ending in endings)
    merging = cluster.submit(
        folder / "merge", f"--dependency=afterany:{job}", "slurm/merge.sh", str(run.root), DOCCLS_PYTHON=sys.executable
    )
    assert cluster.wait(merging, folder / "merge") == ["COMPLETED"]
    assert "[OOF] all folds macro_f1=" in "".join(file.read_text() for file in (folder / "merge").glob("*.out"))
    assert_same_bytes(undisturbed, run)


def test_it_runs_from_any_folder_with_hostile_names_and_an_empty_environment(
    cluster: Cluster, trainer: Trainer, undisturbed_pair: Run
) -> None:
    hostile = trainer.new_folder() / 'it\'s "a" 100% $HOME\\n\nfolder'
    away = hostile / "away"
    away.mkdir(parents=True)
    shutil.copytree(ROOT / "slurm", hostile / "slurm")
    (hostile / "slurm" / "env.sh").write_text(f"export DOCCLS_PYTHON={sys.executable}\n")
    shutil.copytree(trainer.config.parent, away / "data")
    words = [word for text in PAIR for word in ("--set", text)]
    job = cluster.submit(
        hostile.parent, *CPUS, "--export=NONE", "--array=1-2", "../slurm/kfold.sh", "data/tiny.yaml", *words, cwd=away
    )
    assert cluster.wait(job, hostile.parent) == ["COMPLETED"] * 2, read_outputs(hostile.parent)
    (root,) = hostile.rglob(f"v001-j{job}")
    assert_same_bytes(undisturbed_pair, Run([], root.parents[2]), num_folds=2)


def test_a_failing_fold_fails_its_task_and_the_other_says_what_is_missing(
    cluster: Cluster, trainer: Trainer, undisturbed_pair: Run
) -> None:
    folder = trainer.new_folder()
    block = folder / "experiments" / time.strftime("%Y%m%d") / "tiny" / "ckpt" / "best_fold0.pth"
    block.mkdir(parents=True)  # what is to be a file is a folder
    job = submit_folds(cluster, trainer, folder, PAIR, "--array=0-1%1", last=("--max-restarts", "0"))  # task 0 first
    assert cluster.wait(job, folder) == ["FAILED", "COMPLETED"], read_outputs(folder)
    assert "1 fold failed\n- fold 0: " in read_outputs(folder) and "best_fold0.pth" in read_outputs(folder)
    (missing,) = {line for line in list_logs(Run([], folder), 1) if line.startswith("- fold 0: failed, ")}
    assert "best_fold0.pth" in missing and "_fold0.log" in missing
    block.rmdir()
    job = submit_folds(cluster, trainer, folder, PAIR, "--array=0")  # of the same run: that fold alone is missing
    assert cluster.wait(job, folder) == ["COMPLETED"], read_outputs(folder)
    assert_same_bytes(undisturbed_pair, Run([], folder), num_folds=2)


def test_two_nodes_with_a_rank_each_give_the_bytes_of_two_ranks_on_one(cluster: Cluster, trainer: Trainer) -> None:
    sets = (*PLAIN, "data.valid_fold=1", "train.num_processes=2")
    runs = []
    for words in (("--nodes=1", "--cpus-per-task=2"), ("--nodes=2",)):
        folder = trainer.new_folder()
        job = submit_folds(cluster, trainer, folder, sets, "--array=1", *words)
        assert cluster.wait(job, folder) == ["COMPLETED"], read_outputs(folder)
        runs.append(Run([], folder))
    one, two = runs
    part = "oof/parts/fold1.safetensors"
    assert (one.root / part).read_bytes() == (two.root / part).read_bytes()
    assert one.read_weights(1) == two.read_weights(1) == trainer.train(*sets, world_size=2).read_weights(1)


def test_gpus_that_the_driver_does_not_show_are_refused_in_words(cluster: Cluster, trainer: Trainer) -> None:
    folder = trainer.new_folder()
    job = submit_folds(cluster, trainer, folder, PLAIN, "--gres=gpu:fake:2", "--array=0")  # replaces the script's own
    assert cluster.wait(job, folder) == ["FAILED"]
    told = (folder / "slurm-0.out").read_text()
    assert "Slurm gave this job 1 nodes x 2 GPUs, but the NVIDIA driver of node1 shows none" in told
