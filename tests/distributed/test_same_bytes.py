"""The same config gives the same bytes, however images are loaded or IDs spelled, with all random numbers in use."""

import os
import subprocess
import sys

import numpy as np
import pytest
from rank_launcher import clean_environment
from tiny_runs import RICH, Run, Trainer


def test_another_seed_changes_the_result(trainer: Trainer, rich_run: Run) -> None:
    """So the recipe draws random numbers, and the equalities below mean something."""
    other = trainer.train(*RICH, "data.valid_fold=1", "project.seed=43")
    assert not np.array_equal(other.predictions(1).logits_NC[:, 0], rich_run.predictions(1).logits_NC[:, 0])


def test_command_line_gives_the_same_bytes(trainer: Trainer, rich_run: Run) -> None:
    """Run `python -m doccls.train` itself, in another folder, with another hash seed."""
    folder = trainer.new_folder()
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "doccls.train", *trainer.arguments(RICH, folder)],
        cwd=folder, env=clean_environment() | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    repeated = Run([], folder)
    assert repeated.read_oof() == rich_run.read_oof()
    for fold in range(3):
        name = f"oof/parts/fold{fold}.safetensors"
        assert repeated.list_files()[name] == rich_run.list_files()[name]


def test_repeated_training_gives_the_same_weights(trainer: Trainer, rich_run: Run) -> None:
    repeated = trainer.train(*RICH)
    for fold in range(3):
        assert repeated.read_weights(fold) == rich_run.read_weights(fold)


@pytest.mark.parametrize("workers", [1, 3])
def test_number_of_workers_changes_no_byte(trainer: Trainer, rich_run: Run, workers: int) -> None:
    assert trainer.train(*RICH, f"data.num_workers={workers}").read_oof() == rich_run.read_oof()


def test_page_store_changes_no_byte_with_and_without_workers(trainer: Trainer, rich_run: Run) -> None:
    """All other runs read decoded pages from the store."""
    (line,) = [line for line in rich_run.lines if line.startswith("[DATA] decoded pages: ")]
    assert line.endswith(" holds 48, of which 48 were decoded now")
    for workers in (0, 2):
        without = trainer.train(*RICH, "data.store=off", f"data.num_workers={workers}")
        assert without.read_oof() == rich_run.read_oof()
        assert not (without.folder / "page_store").exists()


def test_log_interval_changes_no_byte(trainer: Trainer, rich_run: Run) -> None:
    assert trainer.train(*RICH, "train.log_interval=1").read_oof() == rich_run.read_oof()


def test_number_of_workers_is_logged_and_changes_no_byte_of_a_fold(trainer: Trainer, rich_run: Run) -> None:
    other = trainer.train(*RICH, "data.valid_fold=2", "data.num_workers=2")
    assert "[CFG] data.num_workers=2" in other.lines
    assert other.predictions(2).logits_NC.tobytes() == rich_run.predictions(2).logits_NC.tobytes()


@pytest.mark.parametrize("fold", [1, 2])
def test_fold_trained_alone_equals_fold_of_all(trainer: Trainer, rich_run: Run, fold: int) -> None:
    alone = trainer.train(*RICH, f"data.valid_fold={fold}")
    predictions, expected = alone.predictions(fold), rich_run.predictions(fold)
    assert predictions.info == expected.info
    assert predictions.indices_N.tobytes() == expected.indices_N.tobytes()
    assert predictions.logits_NC.tobytes() == expected.logits_NC.tobytes()
    assert not (alone.root / "oof" / "oof_logits.npy").exists()


def test_ids_without_extension_give_the_same_bytes(trainer: Trainer, rich_run: Run) -> None:
    bare = trainer.train(*RICH, "data.train_csv=bare.csv")
    assert bare.read_oof() == rich_run.read_oof()
    assert bare.predictions(0).info.ids[0] + ".jpg" == rich_run.predictions(0).info.ids[0]


def test_two_processes_are_reproducible(trainer: Trainer, rich_run: Run) -> None:
    first, second = (trainer.train(*RICH, world_size=2) for _ in range(2))
    assert first.read_oof() == second.read_oof()
    assert first.read_weights(2) == second.read_weights(2)
    assert np.isfinite(np.load(first.root / "oof" / "oof_logits.npy")).all()


def test_expecting_one_process_changes_no_byte(trainer: Trainer, rich_run: Run) -> None:
    assert "RANK" not in os.environ
    alone = trainer.train(*RICH, "data.valid_fold=0", "train.num_processes=1")
    assert alone.predictions(0).logits_NC.tobytes() == rich_run.predictions(0).logits_NC.tobytes()
