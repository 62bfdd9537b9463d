"""Weights of a blend: chosen on other rows than those that score them, and used only if the gain exceeds chance."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from doccls.oof import blend as blend_module
from doccls.oof.blend import (
    BlendResult,
    blend_parts,
    choose_single,
    compare_blends,
    select_greedily,
    weight_equally,
)
from doccls.oof.bootstrap import bootstrap_gap, bootstrap_macro_f1, encode_groups
from doccls.oof.calibrate import assign_parts
from doccls.oof.metrics import cross_entropy, macro_f1, probabilities

CLASSES, FOLDS = 5, 3


def draw_runs(noises: tuple[float, ...], count: int = 180, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw (targets (n,), folds (n,), probabilities (runs, n, classes)).

    All runs see the same signal, which misleads in some rows, each with normal noise of its own.
    """
    rng = np.random.default_rng(seed)
    targets = rng.choice(CLASSES, count, p=(0.35, 0.25, 0.2, 0.12, 0.08))
    signal = rng.normal(0, 0.7, (count, CLASSES))
    signal[np.arange(count), targets] += 1.5
    logits = np.stack([signal + rng.normal(0, noise, signal.shape) for noise in noises])
    return targets, rng.integers(0, FOLDS, count), np.stack([probabilities(own) for own in logits])


def compare(targets: np.ndarray, folds: np.ndarray, probs: np.ndarray) -> BlendResult:
    return compare_blends(targets, assign_parts(folds), probs)


def draw_guessing_runs(seed: int, count: int = 180) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw, as above, runs that all know two thirds of the rows and guess the others: no weights are better or worse.

    So chance alone decides whether chosen weights seem to gain, where equal weights are the best of all above.
    """
    rng = np.random.default_rng(seed)
    targets = rng.choice(CLASSES, count, p=(0.35, 0.25, 0.2, 0.12, 0.08))
    logits = rng.normal(0, 1, (6, count, CLASSES))
    is_easy = rng.random(count) < 2 / 3
    logits[:, is_easy] += 9 * np.eye(CLASSES)[targets[is_easy]]
    return targets, rng.integers(0, FOLDS, count), np.stack([probabilities(own) for own in logits])


def draw_equal_runs(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw six runs of equal skill, whose errors have little or much in common, or that guess."""
    if seed % 3 == 2:
        return draw_guessing_runs(seed)
    return draw_runs(((1.2, 0.3)[seed % 3],) * 6, seed=seed)


def find_false_gains(draws: int) -> list[int]:
    """Return the draws in which another blend than equal weights is used, although none is better."""
    return [seed for seed in range(draws) if compare(*draw_equal_runs(seed)).used != "equal"]


def leak(part_N: np.ndarray, part: int) -> np.ndarray:
    """Return all rows, those of the part as well."""
    return np.arange(len(part_N))


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resample 200 times: enough for an interval, in a fifth of the time."""
    monkeypatch.setattr(f"{bootstrap_macro_f1.__module__}.RESAMPLES", 200)


# --- false and real gains --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_resamples")
def test_false_gains_are_rare() -> None:
    assert len(find_false_gains(200)) <= 10


@pytest.mark.slow
@pytest.mark.usefixtures("fewer_resamples")
def test_weights_chosen_on_the_rows_that_score_them_would_give_false_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_module, "_list_other_rows", leak)
    assert len(find_false_gains(40)) > 8, "the test above must be able to fail"


@pytest.mark.usefixtures("fewer_resamples")
def test_real_gain_over_equal_weights_is_found() -> None:
    result = compare(*draw_runs((0.4, 0.4, 6, 6, 6), 400))
    assert result.used == "selection" and result.selection.clean.gain_low > 0.02
    assert sum(result.selection.weights[:2]) > 0.8 and min(result.selection.weights[:2]) > 0


@pytest.mark.usefixtures("fewer_resamples")
def test_single_run_is_used_if_only_its_gain_exceeds_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, folds, probs = draw_runs((0.4, 6, 6, 6), 400)
    monkeypatch.setitem(blend_module._CHOICES, "selection", weight_equally)
    result = compare(targets, folds, probs)
    assert result.used == "single" and result.best is result.single and result.single.weights == (1, 0, 0, 0)


@pytest.mark.usefixtures("fewer_resamples")
def test_gain_within_its_interval_is_not_used() -> None:
    result = compare(*draw_runs((0.8, 0.8, 1.6), 90, seed=4))
    gain = result.selection.clean
    assert gain.gain_low < 0 < gain.gain < gain.gain_high and result.used == "equal" and result.best is result.equal


# --- the scores ------------------------------------------------------------------------------------------------------


def test_each_part_is_scored_with_weights_chosen_on_the_others() -> None:
    targets, folds, probs = draw_runs((0.8, 1.2, 2.5))
    result = compare(targets, folds, probs)
    for candidate, choose in (
        (result.single, choose_single), (result.equal, weight_equally), (result.selection, select_greedily),
    ):  # fmt: skip
        assert candidate.weights == choose(targets, probs)
        blended = np.empty((len(targets), CLASSES))
        for fold in range(FOLDS):
            weights = choose(targets[folds != fold], probs[:, folds != fold])
            assert candidate.part_weights[fold] == weights and sum(weights) == pytest.approx(1)
            blended[folds == fold] = np.tensordot(weights, probs[:, folds == fold], axes=1)
        np.testing.assert_allclose(blend_parts(probs, folds, candidate.part_weights), blended, rtol=1e-12)
        score = candidate.clean
        assert score.macro_f1 == macro_f1(targets, blended) and candidate.damaged is None
        predictions = blended.argmax(axis=1)
        assert (score.macro_f1_low, score.macro_f1_high) == bootstrap_macro_f1(targets, predictions, CLASSES)
        equal = probs.mean(axis=0)
        assert score.gain == score.macro_f1 - macro_f1(targets, equal)
        interval = bootstrap_gap(targets, predictions, equal.argmax(axis=1), CLASSES, level=0.99)
        assert (score.gain_low, score.gain_high) == interval
    assert result.equal.clean.gain == result.equal.clean.gain_low == result.equal.clean.gain_high == 0


def test_damaged_copies_decide_and_both_are_scored_with_their_weights() -> None:
    targets, folds, probs = draw_runs((0.4, 6, 6), 300)
    damaged = probs[::-1]  # on damaged copies, the last run is the good one
    plain, result = compare(targets, folds, damaged), compare_blends(targets, folds, probs, damaged)
    assert (plain.decided_by, result.decided_by) == ("clean", "damaged")
    assert result.single.weights == (0, 0, 1) and result.used == plain.used
    for own, other in zip(result.candidates, plain.candidates, strict=True):
        assert (own.weights, own.part_weights, own.damaged) == (other.weights, other.part_weights, other.clean)
        assert own.clean.macro_f1 == macro_f1(targets, blend_parts(probs, folds, own.part_weights))
        assert result.find_deciding_score(own) == own.damaged


@pytest.mark.usefixtures("fewer_resamples")
def test_intervals_come_from_groups_if_there_are_any() -> None:
    targets, folds, probs = draw_runs((0.8, 2.5))
    unit = encode_groups([f"g{row // 6}" for row in range(len(targets))])
    by_row, by_group = (compare_blends(targets, folds, probs, None, own) for own in (None, unit))
    assert by_group.single.weights == by_row.single.weights and by_group.single.clean.gain == by_row.single.clean.gain
    predictions = blend_parts(probs, folds, by_group.equal.part_weights).argmax(axis=1)
    interval = (by_group.equal.clean.macro_f1_low, by_group.equal.clean.macro_f1_high)
    assert interval == bootstrap_macro_f1(targets, predictions, CLASSES, unit)
    assert by_group.single.clean.gain_low != by_row.single.clean.gain_low


@pytest.mark.usefixtures("fewer_resamples")
def test_order_of_runs_does_not_matter() -> None:
    targets, folds, probs = draw_runs((0.6, 1.2, 0.9))
    first = compare(targets, folds, probs)
    for order in permutations(range(3)):
        other = compare(targets, folds, probs[list(order)])
        assert other.used == first.used
        for own, expected in zip(other.candidates, first.candidates, strict=True):
            assert own.clean == expected.clean
            assert own.weights == tuple(expected.weights[run] for run in order)


# --- the weights -----------------------------------------------------------------------------------------------------


def rate(targets: np.ndarray, probs: np.ndarray) -> tuple[float, float]:
    return macro_f1(targets, probs), -cross_entropy(targets, np.log(probs))


def test_selection_is_the_best_prefix_of_greedy_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_module, "ROUNDS", 8)
    for seed in range(10):
        targets, _, probs = draw_runs((0.8, 1.2, 1.2, 2.5), 20, seed)  # few rows, so that scores are often equal
        chosen: list[int] = []
        prefixes = []
        for _ in range(8):
            chosen.append(max(range(4), key=lambda run: rate(targets, probs[[*chosen, run]].mean(axis=0))))
            prefixes.append(list(chosen))
        best = max(prefixes, key=lambda runs: rate(targets, probs[runs].mean(axis=0)))
        expected = np.bincount(best, minlength=4) / len(best)
        assert select_greedily(targets, probs) == pytest.approx(expected.tolist())
        assert choose_single(targets, probs)[chosen[0]] == 1


def test_equal_scores_are_decided_by_cross_entropy_and_then_by_order() -> None:
    targets, _, probs = draw_runs((0.8,))
    flat = 0.5 * probs + 0.5 / CLASSES  # the same predictions, with less confidence
    entropies = [-rate(targets, own[0])[1] for own in (probs, flat)]
    better = int(np.argmin(entropies))
    assert choose_single(targets, np.concatenate([probs, flat])) == ((1, 0), (0, 1))[better]
    assert choose_single(targets, np.concatenate([flat, probs])) == ((0, 1), (1, 0))[better]
    assert choose_single(targets, np.concatenate([probs, probs])) == (1, 0)


def test_probability_of_zero_is_no_infinite_loss() -> None:
    targets, probs = np.array([0, 1]), np.array([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], [0.4, 0.6]]])
    with np.errstate(all="raise"):
        assert choose_single(targets, probs) == (1, 0)
        assert sum(select_greedily(targets, probs)) == 1


def test_rows_of_a_single_fold_are_split() -> None:
    targets, _, probs = draw_runs((0.8, 1.2))
    result = compare(targets, np.zeros(len(targets), dtype=np.int64), probs)
    assert len(result.selection.part_weights) == 5
