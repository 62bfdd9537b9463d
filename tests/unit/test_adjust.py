"""What predict learns from OOF predictions is what summary.json reports, also from some of the folds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from doccls.oof.adjust import Adjustment, adjust, learn_adjustment, read_own_predictions
from doccls.oof.calibrate import OofRows, cross_fit, fit_temperature
from doccls.oof.merge import load_merged
from doccls.oof.metrics import score_labels
from doccls.oof.predictions import FoldPredictions, PredictionsInfo, write_predictions
from doccls.oof.thresholds import Thresholds, find_thresholds, shift
from doccls.run.paths import RunPaths

COUNT, FOLDS, CLASSES = 90, 3, ("cat", "dog", "fish")
RNG = np.random.default_rng(0)
FOLD_OF, TARGETS = RNG.integers(0, FOLDS, COUNT), RNG.integers(0, 3, COUNT)
LOGITS = (RNG.normal(0, 1, (COUNT, 3)) + 2 * np.eye(3)[TARGETS]).astype(np.float32)
DAMAGED = (RNG.normal(0, 4, (COUNT, 3)) + 2 * np.eye(3)[TARGETS]).astype(np.float32)
GROUPS = [f"g{row // 4}" for row in range(COUNT)]
NOT_USED = Thresholds(None, 0.0, 0.0, 0.0, "why")


def make_predictions(fold: int, damaged: bool = False, **changes: Any) -> FoldPredictions:
    rows = np.flatnonzero(fold == FOLD_OF)
    info = PredictionsInfo("print", fold, FOLDS, COUNT, CLASSES, tuple(map(str, rows)), (), 1, 0.5)
    if damaged:
        info = dataclasses.replace(info, damage="scan", macro_f1_damaged=0.25, selected_by="damaged")
    predictions = FoldPredictions(
        dataclasses.replace(info, **changes),
        rows,
        LOGITS[rows].copy(),
        TARGETS[rows],
        DAMAGED[rows] if damaged else None,
    )
    predictions.logits_NC[np.isin(rows, predictions.info.skipped)] = np.nan
    return predictions


def read_adjustment(paths: RunPaths, fingerprint: str, num_folds: int) -> tuple[Adjustment | None, tuple[str, ...]]:
    fold_predictions, problems = read_own_predictions(paths, fingerprint, num_folds)
    return learn_adjustment(fold_predictions), problems


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "20260101" / "v001-abc")


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_all_folds_give_the_figures_of_the_summary(paths: RunPaths, damaged: bool, grouped: bool) -> None:
    for fold in range(FOLDS):
        rows = np.flatnonzero(fold == FOLD_OF)
        groups = tuple(GROUPS[row] for row in rows) if grouped else None
        skipped = tuple(rows[:2].tolist()) if fold == 1 else ()
        write_predictions(paths.predictions(fold), make_predictions(fold, damaged, groups=groups, skipped=skipped))
    summary = load_merged(paths)[1]
    adjustment, problems = read_adjustment(paths, "print", FOLDS)
    assert adjustment is not None and problems == ()
    learned_from = "damaged" if damaged else "clean"
    assert (adjustment.learned_from, adjustment.folds) == (learned_from, (0, 1, 2))
    assert adjustment.temperature == summary.calibration[learned_from].temperature
    assert adjustment.thresholds == summary.thresholds


def test_some_folds_are_enough(paths: RunPaths) -> None:
    for fold in (0, 2):
        write_predictions(paths.predictions(fold), make_predictions(fold))
    adjustment, problems = read_adjustment(paths, "print", FOLDS)
    assert adjustment is not None and problems == () and adjustment.folds == (0, 2)
    used = FOLD_OF != 1
    assert adjustment.temperature == fit_temperature(TARGETS[used], LOGITS[used])


def test_rows_of_a_single_fold_are_cross_fitted_by_parts() -> None:
    adjustment = learn_adjustment([make_predictions(1)])
    own = FOLD_OF == 1
    rows = OofRows(TARGETS[own], LOGITS[own], FOLD_OF[own])
    assert adjustment is not None and adjustment.thresholds == find_thresholds(rows, cross_fit(rows))
    assert adjustment.thresholds.gain is not None


def test_without_predictions_there_is_nothing_to_learn(paths: RunPaths) -> None:
    assert read_adjustment(paths, "print", FOLDS) == (None, ())
    every_row = tuple(np.flatnonzero(FOLD_OF == 0).tolist())
    assert learn_adjustment([make_predictions(0, skipped=every_row)]) is None


def test_files_that_can_not_be_used_are_named_and_left_out(paths: RunPaths) -> None:
    write_predictions(paths.predictions(0), make_predictions(0))
    write_predictions(paths.predictions(1), make_predictions(1, fingerprint="other"))
    paths.predictions(2).write_bytes(b"torn")
    adjustment, problems = read_adjustment(paths, "print", FOLDS)
    assert adjustment == learn_adjustment([make_predictions(0)])
    assert len(problems) == 2
    assert problems[0] == f"{paths.predictions(1)}: predictions of another run or fold than the checkpoints"
    assert str(paths.predictions(2)) in problems[1]
    paths.predictions(1).write_bytes(paths.predictions(0).read_bytes())
    adjustment, problems = read_adjustment(paths, "print", FOLDS)
    assert adjustment is not None and adjustment.folds == (0,) and str(paths.predictions(1)) in problems[0]


# --- what it does to probabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0, 20.0])
def test_temperature_changes_no_label(temperature: float) -> None:
    probs = softmax(np.random.default_rng(0).normal(0, 3, (2000, 5)), axis=1)
    probs[0] = [0.2, 0.2, 0.2, 0.2, np.nextafter(0.2, 1)]  # the power of these is the same number
    calibrated, chosen = adjust(probs, [probs], Adjustment(temperature, NOT_USED, (0,), "clean"))
    np.testing.assert_array_equal(chosen, probs.argmax(axis=1))
    np.testing.assert_allclose(calibrated.sum(axis=1), 1)
    expected = probs ** (1 / temperature)
    np.testing.assert_allclose(calibrated, expected / expected.sum(axis=1, keepdims=True), rtol=1e-9)


def test_without_adjustment_probabilities_are_the_same() -> None:
    probs = softmax(LOGITS.astype(float), axis=1)
    same, chosen = adjust(probs, [probs], None)
    np.testing.assert_array_equal(same, probs)
    np.testing.assert_array_equal(chosen, LOGITS.argmax(axis=1))


def test_thresholds_act_on_calibrated_probabilities_and_do_not_change_them() -> None:
    probs = np.array([[0.5, 0.4, 0.1], [0.8, 0.15, 0.05]])
    thresholds = Thresholds((0.0, 0.3, 0.0), 0.1, 0.05, 0.15)
    plain, _ = adjust(probs, [probs], Adjustment(2.0, NOT_USED, (0,), "clean"))
    calibrated, chosen = adjust(probs, [probs], Adjustment(2.0, thresholds, (0,), "clean"))
    np.testing.assert_array_equal(calibrated, plain)
    assert chosen.tolist() == [1, 0]  # log(0.5 / 0.4) / 2 is 0.11
    colder = Adjustment(0.5, thresholds, (0,), "clean")
    assert adjust(probs, [probs], colder)[1].tolist() == [0, 0]  # ... times 2: 0.45


def test_thresholds_do_not_override_what_folds_agree_on() -> None:
    """Folds that err in different ways have a mean of little certainty: offsets of the mean would make it worse."""
    rng = np.random.default_rng(1)
    classes, count, bias = 6, 3000, np.array([-1.5, -1.0, 0.0, 0.0, 1.0, 1.5])

    def draw(targets: np.ndarray) -> np.ndarray:
        return 2.5 * np.eye(classes)[targets] + bias + rng.normal(0, 2.2, (len(targets), classes))

    targets = rng.integers(0, classes, count)
    logits, folds = draw(targets).astype(np.float32), np.arange(count) % 5
    rows = OofRows(targets, logits, folds)
    fit = cross_fit(rows)
    thresholds = find_thresholds(rows, fit)
    assert thresholds.offsets is not None
    new = rng.integers(0, classes, 6000)
    fold_probs = [softmax(draw(new), axis=1) for _ in range(5)]
    mean = np.mean(fold_probs, axis=0)
    adjustment = Adjustment(fit.temperature, thresholds, (0, 1, 2, 3, 4), "clean")
    chosen = adjust(mean, fold_probs, adjustment)[1]
    of_mean = shift(adjust(mean, [], dataclasses.replace(adjustment, thresholds=NOT_USED))[0], thresholds.offsets)
    assert score_labels(new, chosen) > score_labels(new, mean.argmax(axis=1)) + 0.005
    assert score_labels(new, chosen) > score_labels(new, of_mean.argmax(axis=1))
