"""Metrics agree with scikit-learn's macro-F1 and torch's cross-entropy, and the softmax does not overflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from doccls.oof.metrics import (
    count_macro_f1,
    cross_entropy,
    macro_f1,
    mean_probabilities,
    probabilities,
    selection_f1,
)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_macro_f1_matches_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    targets, predictions = (np.asarray(column) for column in zip(*pairs, strict=True))
    expected = f1_score(targets, predictions, average="macro", zero_division=0)
    assert macro_f1(targets, np.eye(4, dtype=np.float32)[predictions]) == expected


def test_absent_class_is_ignored_and_class_without_hit_counts_zero() -> None:
    assert macro_f1(np.array([0, 1]), np.eye(5)[[0, 1]]) == 1.0
    assert macro_f1(np.array([0, 1]), np.eye(5)[[0, 2]]) == pytest.approx(1 / 3)


def test_predicting_a_class_that_the_fold_lacks_costs_as_much_as_any_error() -> None:
    """There are 17 classes; the fold holds 16 of them, four rows each."""
    targets = np.repeat(np.arange(16), 4)
    into_absent, into_present = targets.copy(), targets.copy()
    into_absent[0], into_present[0] = 16, 1
    scores = [selection_f1(targets, np.eye(17)[predictions]) for predictions in (targets, into_absent, into_present)]
    assert scores[0] == 1.0 and scores[0] > scores[1] > scores[2]
    assert macro_f1(targets, np.eye(17)[into_absent]) < scores[1] - 0.05


def test_selection_f1_equals_macro_f1_if_no_class_is_absent() -> None:
    rng = np.random.default_rng(0)
    targets, logits = np.r_[np.arange(5), rng.integers(0, 5, 60)], rng.random((65, 5))
    assert selection_f1(targets, logits) == macro_f1(targets, logits)


def test_cross_entropy_matches_torch() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 4, (50, 6)).astype(np.float32), rng.integers(0, 6, 50)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(targets))
    assert cross_entropy(targets, logits) == pytest.approx(float(expected), rel=1e-12)


def test_extreme_logits_give_finite_metrics() -> None:
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert cross_entropy(np.array([0, 1]), logits) == 0.0
    assert cross_entropy(np.array([1, 0]), logits) == pytest.approx(2e4)
    assert probabilities(logits).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_probabilities_sum_to_one_in_float64() -> None:
    probs = probabilities(np.random.default_rng(1).normal(0, 3, (20, 7)).astype(np.float32))
    assert probs.dtype == np.float64
    np.testing.assert_allclose(probs.sum(axis=1), 1.0, rtol=1e-12)


def test_score_from_counts_is_macro_f1_even_with_absent_classes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        targets, logits = rng.integers(0, 4, 12), rng.normal(size=(12, 6))
        assert count_macro_f1(targets, logits.argmax(axis=1), 6) == pytest.approx(macro_f1(targets, logits), rel=1e-12)
        times = rng.integers(0, 3, 12)
        expected = macro_f1(np.repeat(targets, times), np.repeat(logits, times, axis=0))
        assert count_macro_f1(targets, logits.argmax(axis=1), 6, times) == pytest.approx(expected, rel=1e-12)


def test_mean_over_views_is_of_probabilities_not_of_logits() -> None:
    logits = np.array([[[0.0, 2.0], [1.0, 1.0]], [[5.0, 0.0], [-3.0, 0.0]]], dtype=np.float32)
    expected = (np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(mean_probabilities(logits), expected, rtol=1e-6)
    assert np.array_equal(mean_probabilities(logits[:1]), probabilities(logits[0]))
