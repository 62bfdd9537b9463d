"""Bootstrap intervals match resampling row by row, or group by group."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from doccls.oof import bootstrap as bootstrap_module
from doccls.oof.bootstrap import bootstrap_accuracy_gap, bootstrap_gap, bootstrap_macro_f1, encode_groups


def draw_run(count: int = 120, skill: float = 0.8, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw (targets, logits, folds) of a classifier that is right in about `skill` of the rows."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(3, count, p=(0.6, 0.3, 0.1))
    predictions = np.where(rng.random(count) < skill, targets, rng.integers(0, 3, count))
    logits = rng.random((count, 4)).astype(np.float32)
    logits[:, 3] = 0
    logits[np.arange(count), predictions] += 2
    return targets, logits, rng.integers(0, 3, count)


def score(targets: np.ndarray, predictions: np.ndarray) -> float:
    return float(f1_score(targets, predictions, average="macro", zero_division=0))


def count_score(targets: np.ndarray, predictions: np.ndarray) -> float:
    """Return the same as `score`, thirty times faster."""
    counts = np.zeros((4, 4))
    np.add.at(counts, (targets, predictions), 1)
    sizes = counts.sum(axis=0) + counts.sum(axis=1)
    return float((2 * np.diag(counts)[sizes > 0] / sizes[sizes > 0]).mean())


def test_both_scores_are_the_same() -> None:
    for seed in range(5):
        targets, logits, _ = draw_run(9, 0.5, seed)  # also without some of the classes
        assert count_score(targets, logits.argmax(axis=1)) == pytest.approx(score(targets, logits.argmax(axis=1)))


class FixedGenerator:
    """A random generator that returns given draws."""

    def __init__(self, draws: list[list[int]]) -> None:
        self._draws = iter(draws)

    def multinomial(self, count: int, shares: np.ndarray) -> np.ndarray:
        drawn = np.array(next(self._draws))
        assert drawn.sum() == count and drawn.shape == shares.shape and shares.sum() == pytest.approx(1)
        return drawn


def damage(logits: np.ndarray, share: float = 0.4) -> np.ndarray:
    """Return logits that predict another class in some of the rows."""
    is_wrong = np.random.default_rng(2).random(len(logits)) < share
    damaged = logits.copy()
    damaged[is_wrong] = np.roll(damaged[is_wrong][:, :3], 1, axis=1)[:, [0, 1, 2, 2]] * [1, 1, 1, 0]
    return damaged


@pytest.mark.slow
@pytest.mark.parametrize(("count", "skill"), [(60, 0.6), (300, 0.8), (300, 0.97)])
def test_interval_matches_resampling_row_by_row(count: int, skill: float) -> None:
    targets, logits, _ = draw_run(count, skill)
    predictions, rng = logits.argmax(axis=1), np.random.default_rng(1)
    scores = []
    for _ in range(2000):
        rows = rng.integers(0, count, count)
        scores.append(count_score(targets[rows], predictions[rows]))
    low, high = np.quantile(scores, [0.025, 0.975])
    interval_low, interval_high = bootstrap_macro_f1(targets, predictions, 4)
    # A 2.5 % quantile of 1000 (and 2000) draws errs by about a tenth (and less) of their standard deviation.
    tolerance = 0.4 * np.std(scores)
    assert interval_low == pytest.approx(low, abs=tolerance)
    assert interval_high == pytest.approx(high, abs=tolerance)
    assert interval_high - interval_low == pytest.approx(high - low, rel=0.2)


CELLS = [[5, 2, 0], [1, 7, 3], [0, 0, 4]]


@pytest.mark.parametrize(
    "drawn",
    [
        [5, 2, 1, 7, 3, 4], [22, 0, 0, 0, 0, 0], [0, 22, 0, 0, 0, 0], [0, 11, 11, 0, 0, 0], [0, 0, 0, 0, 22, 0],
        [1, 1, 1, 1, 9, 9], [0, 3, 3, 0, 16, 0],
    ],
)  # fmt: skip
def test_resample_score_matches_scikit_learn_even_with_absent_classes(
    monkeypatch: pytest.MonkeyPatch, drawn: list[int]
) -> None:
    true, predicted = np.nonzero(CELLS)
    targets, predictions = (np.repeat(axis, np.array(CELLS)[true, predicted]) for axis in (true, predicted))
    monkeypatch.setattr(bootstrap_module, "RESAMPLES", 1)
    with monkeypatch.context() as patched:
        patched.setattr(np.random, "Generator", lambda _: FixedGenerator([drawn]))
        low, high = bootstrap_macro_f1(targets, predictions, 3)
    expected = score(np.repeat(true, drawn), np.repeat(predicted, drawn))
    assert low == high == pytest.approx(expected, rel=1e-12)


def test_interval_holds_the_middle_95_of_100_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    hits = list(range(1, 101))
    monkeypatch.setattr(bootstrap_module, "RESAMPLES", len(hits))
    targets, predictions = np.array([0] * 200), np.array([0, 1] * 100)  # macro-F1 rises with the hits drawn
    with monkeypatch.context() as patched:
        patched.setattr(np.random, "Generator", lambda _: FixedGenerator([[hit, 200 - hit] for hit in reversed(hits)]))
        interval = bootstrap_macro_f1(targets, predictions, 2)
    scores = [score(np.zeros(200), np.arange(200) >= hit) for hit in hits]
    assert interval == pytest.approx(np.quantile(scores, [0.025, 0.975]).tolist())


@pytest.mark.slow
def test_group_interval_matches_resampling_groups_and_is_wider() -> None:
    """Pages of a document are right or wrong together."""
    rng = np.random.default_rng(0)
    group_N = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    targets = rng.integers(0, 3, 60)[group_N]
    predictions = np.where((rng.random(60) < 0.7)[group_N], targets, (targets + 1) % 3)
    scores = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(group_N == group) for group in rng.integers(0, 60, 60)])
        scores.append(count_score(targets[rows], predictions[rows]))
    low, high = bootstrap_macro_f1(targets, predictions, 3, group_N)
    assert [low, high] == pytest.approx(np.quantile(scores, [0.025, 0.975]).tolist(), abs=0.4 * float(np.std(scores)))
    by_row = bootstrap_macro_f1(targets, predictions, 3)
    assert high - low > 1.5 * (by_row[1] - by_row[0])


@pytest.mark.parametrize("right", [True, False])
def test_interval_of_identical_rows_is_a_point(right: bool) -> None:
    targets = np.zeros(9, dtype=np.int64)
    assert bootstrap_macro_f1(targets, targets if right else targets + 1, 3) == ((1.0, 1.0) if right else (0.0, 0.0))


def test_single_row_has_an_interval() -> None:
    assert bootstrap_macro_f1(np.array([1]), np.array([1]), 3) == (1.0, 1.0)


def test_interval_does_not_depend_on_global_random_state_or_row_order() -> None:
    targets, logits, _ = draw_run()
    first = bootstrap_macro_f1(targets, logits.argmax(axis=1), 4)
    np.random.default_rng().random(3)
    np.random.seed(5)  # noqa: NPY002 (the global generator)
    assert bootstrap_macro_f1(targets, logits.argmax(axis=1), 4) == first
    order = np.random.default_rng(1).permutation(len(targets))
    assert bootstrap_macro_f1(targets[order], logits.argmax(axis=1)[order], 4) == first


@pytest.mark.slow
def test_gap_interval_matches_resampling_pairs_row_by_row() -> None:
    targets, logits, _ = draw_run(300)
    predictions, damaged = logits.argmax(axis=1), damage(logits, 0.1).argmax(axis=1)
    rng, gaps = np.random.default_rng(1), []
    for _ in range(2000):
        rows = rng.integers(0, 300, 300)
        gaps.append(count_score(targets[rows], predictions[rows]) - count_score(targets[rows], damaged[rows]))
    interval = bootstrap_gap(targets, predictions, damaged, 4)
    assert interval == pytest.approx(np.quantile(gaps, [0.025, 0.975]).tolist(), abs=0.4 * float(np.std(gaps)))
    clean_low, clean_high = bootstrap_macro_f1(targets, predictions, 4)
    assert interval[1] - interval[0] < clean_high - clean_low, "paired: rows that are hard in both cancel"


@pytest.mark.parametrize("grouped", [False, True])
def test_gap_of_equal_predictions_is_zero_in_every_resample(grouped: bool) -> None:
    targets, logits, _ = draw_run()
    unit_N = np.arange(120) // 6 if grouped else None
    predictions = logits.argmax(axis=1)
    assert bootstrap_gap(targets, predictions, predictions, 4, unit_N) == (0.0, 0.0)


def test_groups_are_numbered_in_order_of_appearance() -> None:
    numbers = encode_groups(["b", "a", "b", "", "a"])
    assert numbers.tolist() == [0, 1, 0, 2, 1] and numbers.dtype == np.int64


def test_accuracy_gap_is_that_of_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    # Cells by (target, prediction, other): (0, 0, 1) one row, (1, 1, 1) two rows, (1, 0, 1) one row.
    targets, predictions, others = np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0]), np.array([1, 1, 1, 1])
    draws = [[4, 0, 0], [2, 1, 1], [1, 1, 2]]  # in the order of the codes: (0, 0, 1), (1, 0, 1), (1, 1, 1)
    monkeypatch.setattr(bootstrap_module, "RESAMPLES", len(draws))
    monkeypatch.setattr(np.random, "Generator", lambda _: FixedGenerator(draws))
    low, high = bootstrap_accuracy_gap(targets, predictions, others, 2)
    assert [low, high] == pytest.approx(np.quantile([1, 0.25, 0], [0.025, 0.975]).tolist())


def test_gaps_of_equal_predictions_are_exactly_0() -> None:
    targets, logits, _ = draw_run()
    predictions = logits.argmax(axis=1)
    assert bootstrap_gap(targets, predictions, predictions.copy(), 4) == (0, 0)
    assert bootstrap_accuracy_gap(targets, predictions, predictions.copy(), 4) == (0, 0)
