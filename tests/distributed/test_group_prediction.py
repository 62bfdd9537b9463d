"""A prediction has the same bytes with any number of processes and workers, with its own BatchNorm statistics too."""

import shutil
from pathlib import Path

import pytest
from rank_launcher import launch_ranks
from tiny_runs import Run, Trainer

# Batches of 5 pages: no number of processes gets equal shares of the folds, or of all 48 pages.
_NORMALIZED = (
    "model.name=test_resnet", "train.batch_size=5", "train.epochs=1", "valid.damage=light", "data.num_workers=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def normalized_run(trainer: Trainer) -> Run:
    """Train a model with BatchNorm layers."""
    return trainer.train(*_NORMALIZED)


def _predict(trainer: Trainer, run: Run, folder: Path, world_size: int, workers: int) -> dict[str, bytes]:
    """Predict all training pages with a copy of the run; return its results and the OOF logits that chose the views."""
    shutil.copytree(run.folder, folder)
    copy = Run([], folder)
    argv = [
        "predict", str(copy.root), "--images", str(trainer.config.parent / "train"), "--probabilities",
        "--min-confidence", "0.5", "--views", "auto", "--adapt-bn", "8", "--num-workers", str(workers),
    ]  # fmt: skip
    ranks = launch_ranks("doccls.__main__:main", argv, trainer.new_folder(), world_size)
    assert [rank.code for rank in ranks] == [0] * world_size, [rank.stderr for rank in ranks]
    assert ", BatchNorm prior 8" in ranks[0].stdout
    assert not any(rank.stdout for rank in ranks[1:])
    files = [*copy.root.glob("oof/views/*"), *copy.root.glob("predictions/train/*.csv"), copy.root / "views.json"]
    return {str(path.relative_to(copy.root)): path.read_bytes() for path in files}


def test_processes_and_workers_change_no_byte(trainer: Trainer, normalized_run: Run, tmp_path: Path) -> None:
    expected = _predict(trainer, normalized_run, tmp_path / "alone", 1, 0)
    names = [f"oof/views/fold{fold}_bn8.safetensors" for fold in range(3)]
    assert sorted(expected) == sorted(
        [*names, "predictions/train/predictions.csv", "predictions/train/review.csv", "views.json"]
    )
    assert _predict(trainer, normalized_run, tmp_path / "workers", 1, 2) == expected
    assert _predict(trainer, normalized_run, tmp_path / "two", 2, 1) == expected
    assert _predict(trainer, normalized_run, tmp_path / "three", 3, 0) == expected
