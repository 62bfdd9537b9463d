"""Per-class offsets of the log-probabilities that raise macro-F1, used only if their cross-fitted gain is real; pure.

The most probable class maximises accuracy, not macro-F1: there a rare class may deserve the label at a lower
probability, and a class that a model prefers at a higher one (Lipton et al., Optimal Thresholding of Classifiers to
Maximize F1 Measure, 2014).
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from doccls.oof.bootstrap import GAIN_LEVEL, bootstrap_gap
from doccls.oof.calibrate import CrossFit, OofRows
from doccls.oof.metrics import score_labels

MAX_OFFSET = 1.5  # in nats: the odds of a class change by a factor of 4.5 at most
MIN_STEP_GAIN = 5e-4  # of the macro-F1: smaller steps mostly fit noise
PENALTY = 0.05  # an offset of 1 has to raise the F1s of all classes together by this much, one of 0.5 by a quarter
MAX_ROUNDS = 5
MAX_LOGITS = 3_000_000  # rows times classes; they take about 10 s


@dataclass(frozen=True)
class Thresholds:
    """Offsets of each class's calibrated log-probability, and their cross-fitted gain in macro-F1 with its interval."""

    offsets: tuple[float, ...] | None  # one per class; None if they are not to be used
    gain: float | None  # None if it was not measured
    gain_low: float | None
    gain_high: float | None
    reason: str | None = None  # why they are not to be used
    gain_level: float = GAIN_LEVEL  # of the interval


def find_thresholds(rows: OofRows, fit: CrossFit) -> Thresholds:
    """Fit offsets to all rows; they are to be used if offsets fitted without a row's own part raise macro-F1.

    The gain must be beyond noise: its paired bootstrap interval must be above 0.
    """
    count, num_classes = rows.logits_NC.shape
    if rows.logits_NC.size > MAX_LOGITS:
        return Thresholds(None, None, None, None, f"not tried: {count} rows of {num_classes} classes take too long")
    plain_N, chosen_N = rows.logits_NC.argmax(axis=1), predict_crossfitted(rows, fit)
    gain = score_labels(rows.targets_N, chosen_N) - score_labels(rows.targets_N, plain_N)
    low, high = bootstrap_gap(rows.targets_N, chosen_N, plain_N, num_classes, rows.unit_N, GAIN_LEVEL)
    if low <= 0:
        return Thresholds(None, gain, low, high, "the gain may be noise: its interval is not above 0")
    offsets_C = fit_offsets(rows.targets_N, rows.logits_NC / fit.temperature)
    return Thresholds(tuple(offsets_C.tolist()), gain, low, high)


def predict_crossfitted(rows: OofRows, fit: CrossFit) -> np.ndarray:
    """Return the class (n,) of each row by offsets, and a temperature, that were fitted on the other parts' rows."""
    chosen_N = np.empty(len(rows.targets_N), dtype=np.int64)
    for part, temperature in enumerate(fit.temperatures):
        is_own = fit.parts_N == part
        targets_N, logits_NC = rows.take(~is_own)
        offsets_C = fit_offsets(targets_N, logits_NC / temperature)
        chosen_N[is_own] = (rows.logits_NC[is_own] / temperature + offsets_C).argmax(axis=1)
    return chosen_N


def shift(probs_NC: np.ndarray, offsets: tuple[float, ...]) -> np.ndarray:
    """Return the probabilities (n, classes) with offsets added to their logarithms, renormalised, as float64."""
    with np.errstate(divide="ignore"):  # the logarithm of 0 is -inf, whose softmax is 0 again
        shifted: np.ndarray = softmax(np.log(probs_NC.astype(np.float64)) + np.asarray(offsets), axis=1)
    return shifted


def fit_offsets(targets_N: np.ndarray, scores_NC: np.ndarray) -> np.ndarray:
    """Return offsets (classes,) that raise the macro-F1 of argmax(scores + offsets), found by coordinate ascent.

    Each round takes the classes in turn, and moves the offset of one to its best place within MAX_OFFSET, if that gains
    MIN_STEP_GAIN after a PENALTY on its square; it ends with a round that moves none. Only classes among the targets
    are moved and count in the mean.
    """
    num_classes = scores_NC.shape[1]
    offsets_C = np.zeros(num_classes)
    if not len(targets_N):
        return offsets_C
    shifted_CN = np.array(scores_NC.T, dtype=np.float64, order="C")
    in_target_C = np.bincount(targets_N, minlength=num_classes)
    leaders = _find_leaders(shifted_CN)
    for _ in range(MAX_ROUNDS):
        has_moved = False
        for label in np.flatnonzero(in_target_C).tolist():
            move = _find_move(label, targets_N, shifted_CN[label], leaders, in_target_C, offsets_C[label])
            if move is not None:
                offsets_C[label] += move
                shifted_CN[label] += move
                leaders = _find_leaders(shifted_CN)
                has_moved = True
        if not has_moved:
            break
    return offsets_C


@dataclass(frozen=True)
class _Leaders:
    """The two classes with the largest scores of each row, and those scores; (n,) each."""

    first_N: np.ndarray
    first_score_N: np.ndarray
    second_N: np.ndarray
    second_score_N: np.ndarray


def _find_leaders(scores_CN: np.ndarray) -> _Leaders:
    count = scores_CN.shape[1]
    first_N, second_N = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    first_score_N, second_score_N = scores_CN[0].copy(), np.full(count, -np.inf)
    for label, score_N in enumerate(scores_CN[1:], start=1):
        is_first, is_second = score_N > first_score_N, score_N > second_score_N
        second_N = np.where(is_first, first_N, np.where(is_second, label, second_N))
        second_score_N = np.where(is_first, first_score_N, np.where(is_second, score_N, second_score_N))
        first_N[is_first] = label
        first_score_N = np.where(is_first, score_N, first_score_N)
    return _Leaders(first_N, first_score_N, second_N, second_score_N)


def _find_move(
    label: int,
    targets_N: np.ndarray,
    score_N: np.ndarray,
    leaders: _Leaders,
    in_target_C: np.ndarray,
    offset: float,
) -> float | None:
    """Return by how much to move a class's offset, from `offset`, for the best macro-F1; None if it is to stay.

    As the offset rises, rows go over to the class one by one, in the order of how far they are from it. So the F1 of
    every class at every offset comes from running sums over the rows in that order.
    """
    is_own = leaders.first_N == label
    rival_N = np.where(is_own, leaders.second_N, leaders.first_N)
    distance_N = np.where(is_own, leaders.second_score_N, leaders.first_score_N) - score_N
    # Rows beyond the reach of any allowed offset keep their class.
    is_always = distance_N <= -MAX_OFFSET - offset
    contested = np.flatnonzero(~is_always & (distance_N < MAX_OFFSET - offset))
    if not len(contested):
        return None
    contested = contested[np.argsort(distance_N[contested], kind="stable")]
    distance_K = distance_N[contested]
    total = _sum_f1s(label, targets_N, np.where(is_always, label, rival_N), contested, in_target_C)

    # Between two distances, all offsets give the same labels; the middle is the farthest from changing one.
    edges = np.concatenate([[-MAX_OFFSET - offset], distance_K, [MAX_OFFSET - offset]])
    places = (edges[:-1] + edges[1:]) / 2
    possible = np.flatnonzero(edges[1:] > edges[:-1])
    total -= PENALTY * (offset + places) ** 2
    best = possible[np.argmax(total[possible])]
    current = np.count_nonzero(is_own[contested])
    if total[best] - total[current] < MIN_STEP_GAIN * np.count_nonzero(in_target_C):
        return None
    return float(places[best])


def _sum_f1s(
    label: int, targets_N: np.ndarray, predictions_N: np.ndarray, moving: np.ndarray, in_target_C: np.ndarray
) -> np.ndarray:
    """Return the sum of all F1s, up to a constant, after 0, 1, ... of the rows `moving` (k,) went over to the class.

    The array is (k + 1,). `predictions_N` (n,) holds the classes before any has moved.
    """
    rival_K, target_K = predictions_N[moving], targets_N[moving]
    predicted_C = np.bincount(predictions_N, minlength=len(in_target_C))
    hits_C = np.bincount(predictions_N[predictions_N == targets_N], minlength=len(in_target_C))
    num_moved = np.arange(len(moving) + 1)
    own_hits = np.concatenate([[0], np.cumsum(target_K == label)]) + hits_C[label]
    own_f1 = 2 * own_hits / (predicted_C[label] + num_moved + in_target_C[label])
    losses = np.cumsum(_list_losses(rival_K, target_K, predicted_C, hits_C, in_target_C))
    total: np.ndarray = own_f1 - np.concatenate([[0], losses])
    return total


def _list_losses(
    rival_K: np.ndarray, target_K: np.ndarray, predicted_C: np.ndarray, hits_C: np.ndarray, in_target_C: np.ndarray
) -> np.ndarray:
    """Return how much F1 the rival of each row (k,) loses as the rows leave their rivals in this order."""
    by_rival = np.argsort(rival_K, kind="stable")
    rival, is_hit = rival_K[by_rival], (rival_K == target_K)[by_rival]
    starts = np.searchsorted(rival, rival)  # of each row, where the rows of its rival start
    hits_before = np.cumsum(is_hit) - is_hit
    left_before, hits_left_before = np.arange(len(rival)) - starts, hits_before - hits_before[starts]

    def compute_f1(left: np.ndarray, hits_left: np.ndarray) -> np.ndarray:
        f1: np.ndarray = 2 * (hits_C[rival] - hits_left) / np.maximum(predicted_C[rival] - left + in_target_C[rival], 1)
        return f1

    losses = np.empty(len(rival_K))
    f1_before = compute_f1(left_before, hits_left_before)
    losses[by_rival] = f1_before - compute_f1(left_before + 1, hits_left_before + is_hit)
    return losses
