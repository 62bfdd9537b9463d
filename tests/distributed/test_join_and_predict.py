"""Folds trained separately under one run id: merge, resume, rejection of a different recipe, test predictions."""

import csv
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rank_launcher import Rank, clean_environment, launch_ranks
from tiny_runs import LABELS, RICH, TEST_COUNT, Run, Trainer

from doccls.run.paths import RunPaths


@dataclass(frozen=True)
class Joined:
    """Three folds trained separately as run `x`, then merged."""

    run: Run
    before_merge: dict[str, str]
    merge_output: str


@pytest.fixture(scope="module")
def joined(trainer: Trainer) -> Joined:
    folder = trainer.new_folder()
    for fold in (0, 1, 2):
        trainer.train(*RICH, f"data.valid_fold={fold}", run_id="x", folder=folder)
    run = Run([], folder)
    before = run.list_files()
    done = _merge(run.root)
    assert done.returncode == 0, done.stderr
    return Joined(run, before, done.stdout)


def _merge(root: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launcher", "merge", str(root)]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120)


def _predict(trainer: Trainer, run: Run, *options: str, world_size: int = 1) -> list[Rank]:
    argv = ["predict", str(run.root), "--num-workers", "0", *options]
    return launch_ranks("doccls.__main__:main", argv, trainer.new_folder(), world_size)


def _read_submission(run: Run) -> list[list[str]]:
    with (run.root / "submission.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _copy(run: Run, folder: Path) -> Run:
    shutil.copytree(run.folder, folder)
    return Run([], folder)


def test_folds_trained_separately_merge_to_the_same_bytes(joined: Joined, rich_run: Run) -> None:
    together = rich_run.list_files()
    assert "oof/oof_logits.npy" not in joined.before_merge
    names = [name for name in together if name.startswith("oof/")]
    assert len(names) == 3 + 3
    separate = joined.run.list_files()
    assert {name: separate[name] for name in names} == {name: together[name] for name in names}
    assert list(separate) == list(together)
    for fold in range(3):
        assert joined.run.read_weights(fold) == rich_run.read_weights(fold)
    rows = [(row["fold"], row["epoch"]) for row in joined.run.read_metrics()]
    assert rows == [(fold, epoch) for fold in range(3) for epoch in (1, 2)]
    assert joined.merge_output.splitlines()[-1].startswith("[OOF] all folds macro_f1=")


def test_merge_names_missing_folds(joined: Joined, tmp_path: Path) -> None:
    run = _copy(joined.run, tmp_path / "copy")
    (run.root / "oof" / "parts" / "fold1.safetensors").unlink()
    before = run.list_files()
    done = _merge(run.root)
    assert done.returncode == 1
    assert "1 of 3 folds have no predictions: 1" in done.stderr
    assert run.list_files() == before


def test_fold_killed_after_its_predictions_is_kept_without_resume_checkpoints(
    trainer: Trainer, joined: Joined, tmp_path: Path
) -> None:
    run = _copy(joined.run, tmp_path / "copy")
    before = run.list_files()
    for checkpoint in RunPaths(run.root).resume_checkpoints(1):
        checkpoint.touch()
    trainer.train(*RICH, "data.valid_fold=1", run_id="x", folder=run.folder)
    assert run.list_files() == before


def test_training_all_folds_keeps_finished_folds(trainer: Trainer, joined: Joined, tmp_path: Path) -> None:
    run = _copy(joined.run, tmp_path / "copy")
    before = run.list_files()
    trainer.train(*RICH, run_id="x", folder=run.folder)
    assert [line.partition("finished before")[0] for line in run.lines if "finished before" in line] == [
        f"[FOLD {fold}] " for fold in range(3)
    ]
    assert not any(line.startswith("[EPOCH") for line in run.lines)
    assert run.list_files() == before


def test_fold_without_predictions_retrains_to_same_bytes(trainer: Trainer, joined: Joined, tmp_path: Path) -> None:
    run = _copy(joined.run, tmp_path / "copy")
    before = run.list_files()
    (run.root / "oof" / "parts" / "fold1.safetensors").unlink()
    trainer.train(*RICH, run_id="x", folder=run.folder)
    after = run.list_files()
    assert sum("finished before" in line for line in run.lines) == 2
    for name in ("oof/parts/fold1.safetensors", "oof/oof_logits.npy", "oof/oof.csv"):
        assert after[name] == before[name]
    assert run.read_weights(1) == joined.run.read_weights(1)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("change", ["project.seed=43", "train.lr=2e-3", "data.folds=2"])
def test_different_recipe_under_same_run_id_is_rejected_and_changes_nothing(
    trainer: Trainer, joined: Joined, tmp_path: Path, world_size: int, change: str
) -> None:
    run = _copy(joined.run, tmp_path / "copy")
    before = run.list_files()
    rejected = trainer.run(*RICH, change, run_id="x", folder=run.folder, world_size=world_size)
    assert rejected.codes == [1] * world_size
    assert rejected.stderr.count("choose another --run-id") == 1
    assert run.list_files() == before


def test_predict_writes_rows_in_order_of_sample_csv(trainer: Trainer, joined: Joined, tmp_path: Path) -> None:
    run = _copy(joined.run, tmp_path / "copy")
    (rank,) = _predict(trainer, run)
    assert rank.code == 0, rank.stderr
    with (trainer.config.parent / "sample.csv").open(newline="") as file:
        sample = list(csv.reader(file))
    written = _read_submission(run)
    assert written[0] == sample[0] == ["ID", "target"]
    assert [row[0] for row in written] == [row[0] for row in sample]
    probs = np.load(run.root / "test_probabilities.npy")
    assert probs.shape == (TEST_COUNT, 4)
    assert probs.dtype == np.float32
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    assert [row[1] for row in written[1:]] == [LABELS[best] for best in probs.argmax(axis=1)]
    assert len(np.unique(probs, axis=0)) == TEST_COUNT


def test_predict_uses_the_image_of_each_row(trainer: Trainer, joined: Joined, tmp_path: Path) -> None:
    """A reversed sample CSV reverses the rows and changes nothing else."""
    header, *rows = (trainer.config.parent / "sample.csv").read_text().splitlines()
    reversed_csv = tmp_path / "reversed.csv"
    reversed_csv.write_text("\n".join([header, *reversed(rows)]) + "\n")
    run, other = _copy(joined.run, tmp_path / "first"), _copy(joined.run, tmp_path / "other")
    assert _predict(trainer, run)[0].code == 0
    assert _predict(trainer, other, "--sample-csv", str(reversed_csv))[0].code == 0
    expected = np.load(run.root / "test_probabilities.npy")
    np.testing.assert_allclose(np.load(other.root / "test_probabilities.npy")[::-1], expected, rtol=1e-4, atol=1e-6)


def test_predict_with_two_processes_gives_the_same_bytes(trainer: Trainer, joined: Joined, tmp_path: Path) -> None:
    run, other = _copy(joined.run, tmp_path / "first"), _copy(joined.run, tmp_path / "other")
    assert _predict(trainer, run)[0].code == 0
    ranks = _predict(trainer, other, world_size=2)
    assert [rank.code for rank in ranks] == [0, 0], [rank.stderr for rank in ranks]
    assert "".join(rank.stdout for rank in ranks).count("submission.csv") == 1
    assert ranks[1].stdout == ""
    expected = np.load(run.root / "test_probabilities.npy")
    np.testing.assert_array_equal(np.load(other.root / "test_probabilities.npy"), expected)
    assert _read_submission(other) == _read_submission(run)


def test_missing_test_image_is_rejected_by_name(trainer: Trainer, joined: Joined, tmp_path: Path) -> None:
    run, pages, name = _copy(joined.run, tmp_path / "copy"), *_remove_test_image(trainer, tmp_path)
    (rank,) = _predict(trainer, run, "--image-dir", str(pages))
    assert rank.code == 1
    assert f"ID '{name}'" in rank.stderr
    assert str(pages / name) in rank.stderr
    assert not (run.root / "submission.csv").exists()


def test_predict_with_two_processes_reports_an_error_once(trainer: Trainer, joined: Joined, tmp_path: Path) -> None:
    run, pages, name = _copy(joined.run, tmp_path / "copy"), *_remove_test_image(trainer, tmp_path)
    ranks = _predict(trainer, run, "--image-dir", str(pages), world_size=2)
    assert [rank.code for rank in ranks] == [1, 1]
    assert ranks[0].stderr.count(f"ID '{name}'") == 1
    assert ranks[1].stderr == "" and ranks[1].stdout == ""
    best = run.root / "ckpt" / "best_fold1.pth"
    best.write_bytes(best.read_bytes()[:-100])
    ranks = _predict(trainer, run, world_size=2)
    assert [rank.code for rank in ranks] == [1, 1]
    assert "".join(rank.stderr for rank in ranks).count("best_fold1.pth is truncated") == 1


def test_skipped_test_image_keeps_its_row_with_class_priors(trainer: Trainer, joined: Joined, tmp_path: Path) -> None:
    complete, run = _copy(joined.run, tmp_path / "complete"), _copy(joined.run, tmp_path / "copy")
    pages, name = _remove_test_image(trainer, tmp_path)
    assert _predict(trainer, complete)[0].code == 0
    (rank,) = _predict(trainer, run, "--image-dir", str(pages), "--on-bad-image", "skip")
    assert rank.code == 0, rank.stderr
    assert f"ID '{name}'" in rank.stdout
    ids = [row[0] for row in _read_submission(run)[1:]]
    assert ids == [row[0] for row in _read_submission(complete)[1:]]
    probs, expected = (np.load(each.root / "test_probabilities.npy") for each in (run, complete))
    lost = ids.index(name)
    np.testing.assert_allclose(probs[lost], 0.25)
    others = np.arange(TEST_COUNT) != lost
    np.testing.assert_allclose(probs[others], expected[others], rtol=1e-4, atol=1e-6)


def _remove_test_image(trainer: Trainer, folder: Path) -> tuple[Path, str]:
    """Copy the test folder without the image of the sample's third row; return the copy and the image's name."""
    pages = folder / "pages"
    shutil.copytree(trainer.config.parent / "test", pages)
    name = (trainer.config.parent / "sample.csv").read_text().splitlines()[3].split(",")[0]
    (pages / name).unlink()
    return pages, name
