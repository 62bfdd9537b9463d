"""Bootstrap intervals of macro-F1 and of differences between two predictions of the same rows; pure."""

from collections.abc import Callable, Sequence

import numpy as np

from doccls.oof.metrics import count_accuracy, count_macro_f1

_Score = Callable[[np.ndarray, np.ndarray, np.ndarray], float]  # of targets and predictions that count so often

RESAMPLES = 1000
LEVEL = 0.95  # of intervals that are reported
# Of the interval of a cross-fitted gain, by which thresholds, the weights of a blend and views are used or not. Each
# part's rows score one choice and make the others, so the parts' gains are correlated, and the bootstrap, which keeps
# the choices, gives too narrow an interval. Where nothing is to be gained, one of level 0.95 should lie above 0 in
# 2.5 % of draws, and did in up to 4.8 % for views, 5.2 % for blends (one of two gains) and 0.6 % for thresholds, which
# lose where they don't gain. At 0.99 it was 2.0 %, 2.4 % and 0 %. These are the highest rates in 500 draws each of 600
# and of 1,353 rows, of 17 classes of unequal frequencies, in 5 folds.
GAIN_LEVEL = 0.99


def encode_groups(groups: Sequence[str]) -> np.ndarray:
    """Encode group names as (n,) int64, numbered from 0 in order of first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)


def bootstrap_macro_f1(
    targets_N: np.ndarray, predictions_N: np.ndarray, num_classes: int, unit_N: np.ndarray | None = None
) -> tuple[float, float]:
    """Return the bootstrap percentile interval of macro-F1, from a fixed seed.

    The units that are resampled with replacement are rows, or, with `unit_N` ((n,) int64 from 0), the groups of rows
    with equal numbers: pages of one document tend to be right or wrong together, so resampling single pages would give
    too narrow an interval (Davison & Hinkley, Bootstrap Methods and their Application, 1997, sec. 3.8).

    Resampling n of n rows is one multinomial draw over the cells of the confusion matrix (Efron & Tibshirani, An
    Introduction to the Bootstrap, ch. 6 and 13), so its cost does not grow with n.
    """
    (scores,) = _resample(_scoring_macro_f1(num_classes), targets_N, [predictions_N], num_classes, unit_N)
    return _find_interval(scores)


def bootstrap_gap(
    targets_N: np.ndarray,
    predictions_N: np.ndarray,
    others_N: np.ndarray,
    num_classes: int,
    unit_N: np.ndarray | None = None,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the bootstrap percentile interval of the macro-F1 of `predictions_N` minus that of `others_N`.

    Both are scored on the same resamples, since they predict the same rows: the interval of the difference is narrower
    than those of the two scores suggest. Units as in `bootstrap_macro_f1`.
    """
    score = _scoring_macro_f1(num_classes)
    scores, other_scores = _resample(score, targets_N, [predictions_N, others_N], num_classes, unit_N)
    return _find_interval(scores - other_scores, level)


def bootstrap_accuracy_gap(
    targets_N: np.ndarray,
    predictions_N: np.ndarray,
    others_N: np.ndarray,
    num_classes: int,
    unit_N: np.ndarray | None = None,
) -> tuple[float, float]:
    """Return the interval of level LEVEL of the accuracy of `predictions_N` minus that of `others_N`.

    Resamples as in `bootstrap_gap`.
    """
    scores, other_scores = _resample(count_accuracy, targets_N, [predictions_N, others_N], num_classes, unit_N)
    return _find_interval(scores - other_scores)


def _scoring_macro_f1(num_classes: int) -> _Score:
    return lambda targets_K, predictions_K, times_K: count_macro_f1(targets_K, predictions_K, num_classes, times_K)


def _resample(
    score: _Score,
    targets_N: np.ndarray,
    predictions: Sequence[np.ndarray],
    num_classes: int,
    unit_N: np.ndarray | None,
) -> list[np.ndarray]:
    """Return the score of each of `predictions` (n,) on each resample, as arrays (resamples,)."""
    # A cell holds the rows of one target and one prediction (of each kind); rows of a cell are interchangeable.
    code_N = targets_N
    for predictions_N in predictions:
        code_N = code_N * num_classes + predictions_N
    _, first_K, cell_N, rows_K = np.unique(code_N, return_index=True, return_inverse=True, return_counts=True)
    true_K, predicted = targets_N[first_K], [predictions_N[first_K] for predictions_N in predictions]
    count = 0 if unit_N is None else int(unit_N.max()) + 1
    rng = np.random.Generator(np.random.PCG64(0))
    scores = [np.empty(RESAMPLES) for _ in predictions]
    for number in range(RESAMPLES):
        if unit_N is None:
            drawn_K = rng.multinomial(rows_K.sum(), rows_K / rows_K.sum())
        else:
            times_U = np.bincount(rng.integers(0, count, count), minlength=count)
            drawn_K = np.bincount(cell_N, times_U[unit_N], len(rows_K))
        for own_scores, predicted_K in zip(scores, predicted, strict=True):
            own_scores[number] = score(true_K, predicted_K, drawn_K)
    return scores


def _find_interval(scores: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
