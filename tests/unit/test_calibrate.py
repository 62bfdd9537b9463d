"""A known temperature is recovered, and every figure of its benefit comes from other folds' rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import brier_score_loss, log_loss

from doccls.oof.calibrate import (
    NUM_PARTS,
    TEMPERATURES,
    OofRows,
    assign_parts,
    cross_fit,
    fit_temperature,
    measure_brier,
    measure_calibration,
    measure_ece,
    temper,
)


def draw_rows(count: int = 600, temperature: float = 2.0, seed: int = 0, num_classes: int = 5) -> OofRows:
    """Draw targets from softmax(logits / temperature): the logits claim too much by this factor."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, num_classes)) * temperature
    thresholds = softmax(logits / temperature, axis=1).cumsum(axis=1)
    targets = (rng.random(count)[:, None] > thresholds).sum(axis=1)
    return OofRows(targets, logits.astype(np.float32), rng.integers(0, 4, count))


# --- the temperature -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_known_temperature_is_recovered(temperature: float) -> None:
    rows = draw_rows(20_000, temperature)
    assert fit_temperature(rows.targets_N, rows.logits_NC) == pytest.approx(temperature, rel=0.03)


def test_temperature_minimizes_nll_of_the_rows_and_one_of_unknown_class() -> None:
    rows = draw_rows(50)

    def compute_nll(log_temperature: float) -> float:
        log_probs = log_softmax(rows.logits_NC.astype(float) / np.exp(log_temperature), axis=1)
        return float(-log_probs[np.arange(50), rows.targets_N].sum() - log_probs.mean())

    best = minimize_scalar(compute_nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8})
    assert fit_temperature(rows.targets_N, rows.logits_NC) == pytest.approx(np.exp(best.x), rel=1e-4)


def test_added_row_hardly_changes_the_temperature_of_many_rows() -> None:
    rows = draw_rows(1500, num_classes=17)
    log_loss_at = [
        log_loss(rows.targets_N, softmax(rows.logits_NC / temperature, axis=1), labels=range(17))
        for temperature in np.linspace(1.5, 2.5, 201)
    ]
    unsmoothed = np.linspace(1.5, 2.5, 201)[np.argmin(log_loss_at)]
    assert fit_temperature(rows.targets_N, rows.logits_NC) == pytest.approx(unsmoothed, rel=0.02)


def test_model_without_errors_does_not_claim_certainty() -> None:
    targets = np.arange(12) % 3
    temperatures = [fit_temperature(targets[:count], np.eye(3)[targets[:count]]) for count in (3, 6, 12)]
    assert temperatures == sorted(temperatures, reverse=True), "more rows without an error justify more confidence"
    assert TEMPERATURES[0] < temperatures[-1] < 1
    assert 0.9 < temper(softmax(np.eye(3), axis=1), temperatures[-1]).max() < 0.99


@pytest.mark.parametrize(
    ("targets", "logits", "expected"),
    [
        ([], np.zeros((0, 3)), 1.0),
        ([0, 1, 2], np.full((3, 3), 7.0), 1.0),  # constant: the same at every temperature
        ([0, 0], np.array([[3.0], [5.0]]), 1.0),  # a single class
        ([1, 2, 0], np.eye(3), TEMPERATURES[1]),  # wrong in every row
        ([0, 1, 2], np.eye(3) * 1e-3, TEMPERATURES[0]),  # right in every row, but by very little
    ],
)
def test_temperature_without_a_minimum_is_one_or_a_bound(
    targets: list[int], logits: np.ndarray, expected: float
) -> None:
    assert fit_temperature(np.array(targets, dtype=np.int64), logits.astype(np.float32)) == expected


def test_huge_logits_and_shifted_rows_are_no_problem() -> None:
    rows = draw_rows(300)
    expected = fit_temperature(rows.targets_N, rows.logits_NC)
    shifts = np.random.default_rng(0).normal(0, 100, (300, 1))
    assert fit_temperature(rows.targets_N, rows.logits_NC.astype(float) + shifts) == pytest.approx(expected, rel=1e-6)
    assert TEMPERATURES[0] <= fit_temperature(rows.targets_N, rows.logits_NC * np.float32(1e30)) <= TEMPERATURES[1]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_tempered_softmax_is_softmax_of_divided_logits(temperature: float) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (50, 6))
    tempered = temper(softmax(logits, axis=1), temperature)
    np.testing.assert_allclose(tempered, softmax(logits / temperature, axis=1), rtol=1e-10)


def test_probability_of_zero_stays_zero() -> None:
    assert temper(np.array([[0.0, 1.0], [0.2, 0.8]]), 2.0).tolist() == [
        [0.0, 1.0],
        [pytest.approx(1 / 3), pytest.approx(2 / 3)],
    ]


# --- the figures -----------------------------------------------------------------------------------------------------


def score_ece(targets: np.ndarray, probs: np.ndarray) -> float:
    return measure_ece(probs.max(axis=1), probs.argmax(axis=1) == targets)


def compute_slow_ece(targets: np.ndarray, probs: np.ndarray) -> float:
    """Compute the ECE bin by bin and row by row, with exact bounds m / 15."""
    total = 0.0
    for low in range(15):
        rows = [row for row in range(len(targets)) if low < probs[row].max() * 15 <= low + 1]
        if rows:
            accuracy = sum(probs[row].argmax() == targets[row] for row in rows) / len(rows)
            confidence = sum(probs[row].max() for row in rows) / len(rows)
            total += len(rows) / len(targets) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_ece_matches_bin_by_bin_reference(temperature: float) -> None:
    rows = draw_rows(400, temperature)
    probs = softmax(rows.logits_NC.astype(float), axis=1)
    assert score_ece(rows.targets_N, probs) == pytest.approx(compute_slow_ece(rows.targets_N, probs), rel=1e-12)


def test_ece_of_simple_cases() -> None:
    sure, even = np.array([[1.0, 0.0]] * 4), np.array([[0.5, 0.5]] * 4)
    assert score_ece(np.array([0, 0, 0, 0]), sure) == 0
    assert score_ece(np.array([0, 0, 0, 1]), sure) == 0.25
    assert score_ece(np.array([0, 1, 0, 1]), even) == 0
    # 0.2 is the upper end of bin 3 and belongs to it: with the right row of 0.19, their errors cancel there.
    both = np.array([[0.2] * 5, [0.19, 0.19, 0.19, 0.19, 0.24 - 0.05]])
    assert score_ece(np.array([1, 0]), both) == pytest.approx(abs(0.2 + 0.19 - 1) / 2)


def test_brier_and_nll_match_scikit_learn() -> None:
    rows = draw_rows(300)
    probs = softmax(rows.logits_NC.astype(float), axis=1)
    assert measure_brier(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]])).tolist() == [0.0, 2.0]
    by_class = [brier_score_loss(rows.targets_N == label, probs[:, label]) for label in range(5)]
    assert measure_brier(rows.targets_N, probs).mean() == pytest.approx(sum(by_class), rel=1e-12)
    calibration = measure_calibration(rows, cross_fit(rows))
    assert calibration.nll == pytest.approx(log_loss(rows.targets_N, probs, labels=range(5)), rel=1e-6)
    assert (calibration.ece, calibration.brier) == (
        score_ece(rows.targets_N, probs),
        measure_brier(rows.targets_N, probs).mean(),
    )


@pytest.mark.parametrize("temperature", [0.4, 3.0])
def test_calibration_improves_every_figure_of_a_model_that_claims_too_much_or_too_little(temperature: float) -> None:
    rows = draw_rows(2000, temperature)
    calibration = measure_calibration(rows, cross_fit(rows))
    assert calibration.temperature == fit_temperature(rows.targets_N, rows.logits_NC)
    assert calibration.nll_calibrated < calibration.nll and calibration.brier_calibrated < calibration.brier
    assert calibration.ece_calibrated < 0.05 < calibration.ece


# --- cross-fitting ---------------------------------------------------------------------------------------------------


def test_each_row_is_scored_with_the_temperature_of_the_other_folds() -> None:
    rows = draw_rows()
    fit = cross_fit(rows)
    calibrated = np.empty((600, 5))
    for fold in range(4):
        own = rows.folds_N == fold
        temperature = fit_temperature(rows.targets_N[~own], rows.logits_NC[~own])
        calibrated[own] = softmax(rows.logits_NC[own].astype(float) / temperature, axis=1)
        assert set(fit.temperature_N[own]) == {temperature}
    calibration = measure_calibration(rows, fit)
    assert calibration.nll_calibrated == pytest.approx(log_loss(rows.targets_N, calibrated, labels=range(5)), rel=1e-9)
    assert calibration.ece_calibrated == pytest.approx(compute_slow_ece(rows.targets_N, calibrated), rel=1e-9)
    assert calibration.brier_calibrated == pytest.approx(measure_brier(rows.targets_N, calibrated).mean(), rel=1e-9)


@pytest.mark.parametrize("one_fold", [False, True])
def test_own_rows_have_no_influence_on_their_temperature(one_fold: bool) -> None:
    """A leak is caught: temperatures of other parts do change with these rows."""
    rows = draw_rows()
    if one_fold:
        rows = replace(rows, folds_N=np.full(600, 3))
    before = cross_fit(rows)
    own = before.parts_N == 1
    changed = replace(rows, targets_N=np.where(own, 4 - rows.targets_N, rows.targets_N))
    after = cross_fit(changed)
    same = [left == right for left, right in zip(before.temperatures, after.temperatures, strict=True)]
    assert same == [part == 1 for part in range(len(same))]
    assert before.temperature != after.temperature


def test_calibrated_figures_of_one_bad_fold_are_honest() -> None:
    """A fold that is wrong where all others are right can't repair itself: its figures get worse by calibration."""
    rows = draw_rows(400, 0.5)
    own = rows.folds_N == 0
    rows = replace(rows, targets_N=np.where(own, rows.logits_NC.argmin(axis=1), rows.targets_N))
    fit = cross_fit(rows)
    leaking = replace(fit, temperatures=(fit_temperature(*rows.take(own)), *fit.temperatures[1:]))
    assert measure_calibration(rows, leaking).nll_calibrated < measure_calibration(rows, fit).nll_calibrated - 0.1


def test_parts_are_folds_whatever_their_numbers() -> None:
    assert assign_parts(np.array([7, 2, 2, 7, 5])).tolist() == [2, 0, 0, 2, 1]


def test_rows_of_a_single_fold_are_split_into_parts_in_turn() -> None:
    parts = assign_parts(np.full(12, 3))
    assert parts.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1] and len(set(parts)) == NUM_PARTS


def test_groups_of_a_single_fold_stay_together() -> None:
    unit_N = np.array([0, 9, 0, 3, 9, 12, 13, 14, 15])
    parts = assign_parts(np.zeros(9, dtype=np.int64), unit_N)
    assert parts.tolist() == [0, 2, 0, 1, 2, 3, 4, 0, 1]


def test_single_row_and_single_group_are_left_as_they_are() -> None:
    for unit_N in (None, np.zeros(3, dtype=np.int64)):
        count = 1 if unit_N is None else 3
        rows = OofRows(np.zeros(count, dtype=np.int64), np.eye(3)[:count], np.zeros(count, dtype=np.int64), unit_N)
        fit = cross_fit(rows)
        calibration = measure_calibration(rows, fit)
        assert fit.temperatures == (1.0,)
        assert calibration.nll_calibrated == calibration.nll and calibration.ece_calibrated == calibration.ece
