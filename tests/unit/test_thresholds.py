"""Thresholds are used where they raise macro-F1 beyond noise, and not on noise: both with logits of known truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from doccls.oof import bootstrap as bootstrap_module
from doccls.oof import thresholds as thresholds_module
from doccls.oof.bootstrap import bootstrap_gap
from doccls.oof.calibrate import OofRows, cross_fit
from doccls.oof.metrics import score_labels
from doccls.oof.thresholds import (
    MAX_OFFSET,
    MIN_STEP_GAIN,
    PENALTY,
    find_thresholds,
    fit_offsets,
    predict_crossfitted,
    shift,
)


def draw_rows(count: int, num_classes: int, seed: int, bias: np.ndarray | float = 0.0) -> OofRows:
    """Draw normal features, whose exact log-posteriors are the logits; a bias prefers some classes without reason.

    Classes are equally frequent and equally hard: without a bias no thresholds are better than none.
    """
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, num_classes, count)
    features = rng.normal(0, 1, (count, num_classes))
    features[np.arange(count), targets] += 2.0
    return OofRows(targets, (2.0 * features + bias).astype(np.float32), rng.integers(0, 5, count))


def score_fixed(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Return the macro-F1 over the classes among the targets, class by class."""
    f1s = []
    for label in np.unique(targets):
        hits = np.sum((targets == label) & (predictions == label))
        f1s.append(2 * hits / (np.sum(targets == label) + np.sum(predictions == label)))
    return float(np.mean(f1s))


# --- the offsets -----------------------------------------------------------------------------------------------------


def ascend_slowly(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return offsets by the same ascent, where each step scores the labels of every offset that changes one."""
    num_classes, labels = scores.shape[1], np.unique(targets)
    offsets = np.zeros(num_classes)

    def rate(label: int, offset: float) -> float:
        tried = np.where(np.arange(num_classes) == label, offset, offsets)
        return score_fixed(targets, (scores + tried).argmax(axis=1)) * len(labels) - PENALTY * offset**2

    for _ in range(thresholds_module.MAX_ROUNDS):
        for label in labels:
            rivals = np.delete(scores + offsets, label, axis=1).max(axis=1) - scores[:, label]
            edges = np.sort([-MAX_OFFSET, *rivals[np.abs(rivals) < MAX_OFFSET], MAX_OFFSET])
            best, offset = max((rate(label, offset), offset) for offset in (edges[1:] + edges[:-1]) / 2)
            current = np.searchsorted(edges, offsets[label])
            if best - rate(label, (edges[current - 1] + edges[current]) / 2) >= MIN_STEP_GAIN * len(labels):
                offsets[label] = offset
    return offsets


@pytest.mark.parametrize("num_classes", [2, 3, 6])
def test_steps_are_those_of_trying_every_offset(num_classes: int) -> None:
    moved = 0
    for seed in range(20):
        rows = draw_rows(40, num_classes, seed, np.linspace(0, 2, num_classes))
        scores, targets = rows.logits_NC.astype(float), rows.targets_N % max(2, num_classes - 1)
        expected = ascend_slowly(targets, scores)
        np.testing.assert_allclose(fit_offsets(targets, scores), expected, atol=1e-9)
        moved += np.count_nonzero(expected)
    assert moved > 5


def test_steps_never_lower_the_score_of_the_rows_they_are_fitted_to() -> None:
    for seed in range(10):
        rows = draw_rows(120, 5, seed, np.linspace(-1, 1, 5))
        scores = rows.logits_NC.astype(float)
        offsets = fit_offsets(rows.targets_N, scores)
        plain, moved = (score_fixed(rows.targets_N, each.argmax(axis=1)) for each in (scores, scores + offsets))
        assert moved >= plain + MIN_STEP_GAIN and np.abs(offsets).max() <= MAX_OFFSET


def test_planted_bias_is_undone() -> None:
    bias = np.array([1.0, -1.0, 0.5, -0.5, 0.0, 0.0])
    offsets = fit_offsets(*draw_rows(20_000, 6, 0, bias).take(np.arange(20_000)))
    undone = offsets + bias
    np.testing.assert_allclose(undone - undone.mean(), 0, atol=0.5)


def test_classes_without_targets_are_not_moved() -> None:
    rows = draw_rows(200, 4, 0, np.array([1.0, 0, 0, 0]))
    targets = np.where(rows.targets_N == 2, 1, rows.targets_N)
    assert fit_offsets(targets, rows.logits_NC)[2] == 0


@pytest.mark.parametrize(("count", "num_classes"), [(0, 3), (1, 3), (5, 1)])
def test_few_rows_and_a_single_class_need_no_offsets(count: int, num_classes: int) -> None:
    logits = np.random.default_rng(0).normal(size=(count, num_classes))
    assert not fit_offsets(np.zeros(count, dtype=np.int64), -logits if num_classes == 1 else logits * 0).any()


def test_constant_scores_get_no_offsets() -> None:
    targets = np.array([0, 0, 1, 1, 2, 2])
    for row in ([0.0, 0.0, 0.0], [0.3, 0.2, 0.1]):
        assert not fit_offsets(targets, np.tile(row, (6, 1))).any(), "one class or another: all score the same"


# --- the cross-fitted gain -------------------------------------------------------------------------------------------


def test_labels_come_from_offsets_of_the_other_folds() -> None:
    rows = draw_rows(400, 5, 0, np.linspace(-1, 1, 5))
    fit = cross_fit(rows)
    chosen = predict_crossfitted(rows, fit)
    for fold in range(5):
        own = rows.folds_N == fold
        temperature = fit.temperatures[fold]
        offsets = fit_offsets(rows.targets_N[~own], rows.logits_NC[~own] / temperature)
        np.testing.assert_array_equal(chosen[own], (rows.logits_NC[own] / temperature + offsets).argmax(axis=1))
    found = find_thresholds(rows, fit)
    plain = rows.logits_NC.argmax(axis=1)
    assert found.gain == score_labels(rows.targets_N, chosen) - score_labels(rows.targets_N, plain)
    assert (found.gain_low, found.gain_high) == bootstrap_gap(rows.targets_N, chosen, plain, 5, level=0.99)


def test_own_targets_have_no_influence_on_labels() -> None:
    rows = draw_rows(400, 5, 0, np.linspace(-1, 1, 5))
    own = rows.folds_N == 2
    changed = replace(rows, targets_N=np.where(own, 4 - rows.targets_N, rows.targets_N))
    before, after = (predict_crossfitted(each, cross_fit(each)) for each in (rows, changed))
    np.testing.assert_array_equal(before[own], after[own])
    assert (before[~own] != after[~own]).any()


def test_planted_gain_is_found_and_used() -> None:
    bias = np.random.default_rng(5).normal(0, 1, 17)
    rows = draw_rows(1500, 17, 0, bias)
    found = find_thresholds(rows, cross_fit(rows))
    assert found.offsets is not None and found.reason is None
    assert found.gain is not None and found.gain_low is not None and found.gain_high is not None
    assert 0 < found.gain_low < found.gain < found.gain_high
    fresh = draw_rows(5000, 17, 1, bias)
    offsets = np.array(found.offsets) * cross_fit(rows).temperature
    scores = [
        score_labels(fresh.targets_N, each.argmax(axis=1)) for each in (fresh.logits_NC, fresh.logits_NC + offsets)
    ]
    assert scores[1] > scores[0] + 0.02, "as on rows that played no part"


def count_false_gains(draws: int) -> int:
    """Count the draws on which thresholds are used, although none can be better than none."""
    used = 0
    for seed in range(draws):
        rows = draw_rows(200, 6, 1000 + seed)
        used += find_thresholds(rows, cross_fit(rows)).offsets is not None
    return used


@pytest.mark.slow
def test_noise_is_mistaken_for_a_gain_in_at_most_5_of_100_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap_module, "RESAMPLES", 200)
    assert count_false_gains(200) <= 10


@pytest.mark.slow
def test_leak_into_own_fold_is_mistaken_for_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would catch offsets that are fitted on the rows that they are scored on."""
    monkeypatch.setattr(bootstrap_module, "RESAMPLES", 200)
    take = OofRows.take
    monkeypatch.setattr(OofRows, "take", lambda rows, _: take(rows, np.arange(len(rows.targets_N))))
    assert count_false_gains(50) > 5


def test_groups_widen_the_interval() -> None:
    """Each page of a document repeats the same evidence."""
    rows = draw_rows(150, 5, 0, np.linspace(-1, 1, 5))
    unit_N = np.repeat(np.arange(150), 6)
    repeated = OofRows(rows.targets_N[unit_N], rows.logits_NC[unit_N], rows.folds_N[unit_N])
    by_row = find_thresholds(repeated, cross_fit(repeated))
    grouped = replace(repeated, unit_N=unit_N)
    by_group = find_thresholds(grouped, cross_fit(grouped))
    assert by_row.gain == by_group.gain
    widths = [each.gain_high - each.gain_low for each in (by_row, by_group) if each.gain_high and each.gain_low]
    assert widths[1] > 1.5 * widths[0]


def test_gain_within_noise_is_reported_but_not_used() -> None:
    rows = draw_rows(200, 6, 0)
    found = find_thresholds(rows, cross_fit(rows))
    assert found.offsets is None and found.gain is not None and found.gain_low is not None and found.gain_low <= 0
    assert found.reason == "the gain may be noise: its interval is not above 0"


def test_too_many_rows_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds_module, "MAX_LOGITS", 200 * 6 - 1)
    rows = draw_rows(200, 6, 0)
    found = find_thresholds(rows, cross_fit(rows))
    assert (found.offsets, found.gain, found.gain_low, found.gain_high) == (None, None, None, None)
    assert found.reason == "not tried: 200 rows of 6 classes take too long"
    monkeypatch.setattr(thresholds_module, "MAX_LOGITS", 200 * 6)
    assert find_thresholds(rows, cross_fit(rows)).gain is not None


def test_class_with_largest_log_probability_plus_offset_is_chosen() -> None:
    probs = np.array([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assert shift(probs, (0.0, 0.0, 0.0)).argmax(axis=1).tolist() == [0, 0, 2]
    assert shift(probs, (0.0, float(np.log(2)), 0.0)).argmax(axis=1).tolist() == [1, 0, 2]
