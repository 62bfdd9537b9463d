"""Validation on damaged copies of the pages: each row is its page's copy, and nothing else changes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from tiny_runs import COUNT, FOLD_SIZES, PLAIN, RICH, Run, Trainer

from doccls.data.damage import STRENGTHS, damage_page
from doccls.data.images import load_page
from doccls.model.build import build_model
from doccls.randomness import Purpose, derive_stream
from doccls.training.checkpoint import parse_config, read_best
from doccls.training.evaluate import Normalizer

FOLDS = range(len(FOLD_SIZES))


@pytest.fixture(scope="module")
def damaged_runs(trainer: Trainer) -> dict[int, Run]:
    """Train the plain recipe with damaged copies, and epochs selected by the pages, at world sizes 1 and 3."""
    return {size: trainer.train(*PLAIN, "valid.damage=scan", "valid.select=clean", world_size=size) for size in (1, 3)}


@pytest.fixture(scope="module")
def selecting_run(trainer: Trainer) -> Run:
    """Train with averaged weights, whose epochs and weights are selected by the damaged copies."""
    return trainer.train(*RICH, "valid.damage=light", "train.epochs=3", "train.lr=3e-3")


def read_damaged(run: Run) -> np.ndarray:
    logits: np.ndarray = np.load(run.root / "oof" / "oof_logits_damaged.npy")
    return logits


def macro_f1(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    return float(f1_score(targets_N, logits_NC.argmax(axis=1), average="macro", zero_division=0))


@pytest.mark.parametrize("world_size", [1, 3])
def test_damaged_copies_change_no_byte_of_the_clean_results(
    damaged_runs: dict[int, Run], plain_runs: dict[int, Run], world_size: int
) -> None:
    run, plain = damaged_runs[world_size], plain_runs[world_size]
    assert run.read_oof() == plain.read_oof()
    for name in ("oof.csv", "oof_targets.npy"):
        assert (run.root / "oof" / name).read_bytes() == (plain.root / "oof" / name).read_bytes()
    for fold in FOLDS:
        assert run.read_weights(fold) == plain.read_weights(fold)
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (run.root, plain.root))
    assert set(summary) - set(expected) == {"damaged"}
    assert set(summary["calibration"]) == {"clean", "damaged"}
    del summary["damaged"], summary["calibration"]["damaged"]
    assert summary == expected
    assert set(run.list_files()) - set(plain.list_files()) == {"oof/oof_logits_damaged.npy"}


def test_each_row_holds_the_logits_of_its_own_damaged_page(trainer: Trainer, damaged_runs: dict[int, Run]) -> None:
    run = damaged_runs[1]
    rows, logits = np.arange(COUNT), read_damaged(run)
    assert logits.shape == (COUNT, 4) and logits.dtype == np.float32
    for fold in FOLDS:
        best = read_best(run.root / "ckpt" / f"best_fold{fold}.pth")
        config = parse_config(best)
        model = build_model(config.model, len(best.classes), config.train.img_size, fetch=False).eval()
        model.load_state_dict(best.state_dict)
        own = rows[run.predictions(fold).indices_N]
        pages = [damage(trainer.config.parent / "train" / f"page_{row:03d}.jpg", row) for row in own]
        images = torch.from_numpy(np.stack(pages))
        with torch.no_grad():
            expected = model(Normalizer(best.mean, best.std, torch.device("cpu"))(images)).numpy()
        np.testing.assert_allclose(logits[own], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(logits[own], run.predictions(fold).damaged_logits_NC)


def damage(path: Path, row: int) -> np.ndarray:
    page = load_page(path.read_bytes(), 10**8, 64)
    return damage_page(page, 64, STRENGTHS["scan"], derive_stream(0, Purpose.DAMAGE, row))


def test_damaged_logits_agree_at_each_world_size(damaged_runs: dict[int, Run]) -> None:
    """Of three processes, one has no page of the smallest fold."""
    alone, grouped = damaged_runs[1], damaged_runs[3]
    best_epochs = [[run.predictions(fold).info.best_epoch for fold in FOLDS] for run in (alone, grouped)]
    assert best_epochs[0] == best_epochs[1]
    np.testing.assert_allclose(read_damaged(grouped), read_damaged(alone), rtol=1e-3, atol=1e-4)
    assert grouped.codes == [0, 0, 0]


def test_scores_match_scikit_learn_wherever_they_are_reported(damaged_runs: dict[int, Run]) -> None:
    run = damaged_runs[1]
    summary = json.loads((run.root / "summary.json").read_text())
    targets = np.load(run.root / "oof" / "oof_targets.npy")
    assert summary["damaged"]["macro_f1"] == macro_f1(targets, read_damaged(run))
    assert summary["damaged"]["gap"] == summary["macro_f1"] - summary["damaged"]["macro_f1"]
    logged = {(row["fold"], row["epoch"]): row["macro_f1_damaged"] for row in run.read_metrics()}
    for fold in FOLDS:
        predictions = run.predictions(fold)
        assert predictions.damaged_logits_NC is not None
        expected = macro_f1(predictions.targets_N, predictions.damaged_logits_NC)
        assert predictions.info.macro_f1_damaged == logged[fold, predictions.info.best_epoch] == expected
        assert summary["damaged"]["folds"][fold]["macro_f1"] == expected
        (done,) = [line for line in run.lines if line.startswith(f"[FOLD {fold}] done")]
        assert done.endswith(f" macro_f1={predictions.info.macro_f1:.5f} macro_f1_damaged={expected:.5f}")
    epochs = [line for line in run.lines if re.match(r"\[EPOCH \d+\] fold=\d+ valid_loss=", line)]
    assert [f" macro_f1_damaged={score:.5f} " in line for line, score in zip(epochs, logged.values(), strict=True)] == [
        True
    ] * len(epochs)
    assert any(line.startswith("[OOF] clean minus damaged macro_f1=") for line in run.lines)


def test_epochs_and_weights_are_selected_by_the_damaged_copies(selecting_run: Run) -> None:
    rows = selecting_run.read_metrics()
    for fold in FOLDS:
        info = selecting_run.predictions(fold).info
        own = [row for row in rows if row["fold"] == fold]
        best = max(own, key=lambda row: (row["selection_f1"], row["epoch"]))
        assert (info.best_epoch, info.macro_f1_damaged) == (best["epoch"], best["macro_f1_damaged"])
        assert (info.selected_by, info.damage) == ("damaged", "light")
    # All classes are in these folds, so that both scores average over the same ones.
    assert [row["selection_f1"] for row in rows] == [row["macro_f1_damaged"] for row in rows]
    assert [row["selection_f1"] for row in rows] != [row["macro_f1"] for row in rows]
    selection = json.loads((selecting_run.root / "summary.json").read_text())["selection"]
    assert "selected by its score on damaged copies" in selection


def test_store_and_workers_change_no_damaged_byte(trainer: Trainer, damaged_runs: dict[int, Run]) -> None:
    settings = ("data.store=off", "data.num_workers=2", "data.valid_fold=1", "valid.damage=scan", "valid.select=clean")
    other = trainer.train(*PLAIN, *settings).predictions(1)
    expected = damaged_runs[1].predictions(1)
    assert other.damaged_logits_NC is not None and expected.damaged_logits_NC is not None
    assert other.damaged_logits_NC.tobytes() == expected.damaged_logits_NC.tobytes()
