"""How sure the predictions are, and how often such predictions are right; pure."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from doccls.oof.bootstrap import encode_groups
from doccls.oof.calibrate import NUM_BINS, Calibration, OofRows, cross_fit
from doccls.oof.merge import MergedOof
from doccls.oof.metrics import iterate_blocks, probabilities
from doccls.oof.summary import Summary


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """How often the predictions of each confidence are right; empty bins are left out."""

    confidence_B: np.ndarray  # mean probability of the predicted class
    accuracy_B: np.ndarray
    count_B: np.ndarray


@dataclass(frozen=True)
class Reliability:
    """The reliability of probabilities before and after calibration."""

    name: str  # `clean` or `damaged` pages
    calibration: Calibration
    before: ReliabilityBins
    after: ReliabilityBins  # cross-fitted


@dataclass(frozen=True, eq=False)
class CalibratedRows:
    """The rows that have a prediction, and temperatures that were fitted without each row's own part (`cross_fit`)."""

    used_M: np.ndarray  # (m,) rows of the merged predictions
    rows: OofRows  # (m) rows
    temperature_M: np.ndarray  # (m,) float64


def calibrate_rows(merged: MergedOof, logits_NC: np.ndarray) -> CalibratedRows:
    """Fit the temperatures of logits (n, classes), one row for each of `merged`."""
    used_M = np.setdiff1d(np.arange(len(merged.ids)), merged.skipped)
    unit_M = None if merged.groups is None else encode_groups([merged.groups[row] for row in used_M.tolist()])
    rows = OofRows(merged.targets_N[used_M], logits_NC[used_M], merged.folds_N[used_M], unit_M)
    return CalibratedRows(used_M, rows, cross_fit(rows).temperature_N)


def find_top(calibrated: CalibratedRows, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the most probable classes of each row, (m, count) int64, and their calibrated probabilities.

    The most probable comes first; of equal ones, the class of the lower number.
    """
    classes, probs = [], []
    for probs_BC in _iterate_probabilities(calibrated.rows.logits_NC, calibrated.temperature_M):
        top_BK = _find_largest(probs_BC, min(count, probs_BC.shape[1]))
        classes.append(top_BK)
        probs.append(np.take_along_axis(probs_BC, top_BK, axis=1))
    return np.concatenate(classes), np.concatenate(probs)


def measure_reliability(name: str, calibrated: CalibratedRows, summary: Summary) -> Reliability:
    """Measure the reliability of `clean` pages or `damaged` copies, which `name` says."""
    logits_MC, ones_M = calibrated.rows.logits_NC, np.ones_like(calibrated.temperature_M)
    before, after = (
        bin_confidences(
            np.concatenate([probs_BC.max(axis=1) for probs_BC in _iterate_probabilities(logits_MC, temperature_M)]),
            logits_MC.argmax(axis=1) == calibrated.rows.targets_N,
        )
        for temperature_M in (ones_M, calibrated.temperature_M)
    )
    return Reliability(name, summary.calibration[name], before, after)


def bin_confidences(confidence_N: np.ndarray, is_hit_N: np.ndarray) -> ReliabilityBins:
    """Put rows into the bins of the expected calibration error, by the probability of the predicted class."""
    bin_N = np.clip(np.ceil(confidence_N * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    count_B = np.bincount(bin_N, minlength=NUM_BINS)
    filled_B = count_B > 0

    def average(values_N: np.ndarray) -> np.ndarray:
        total_B: np.ndarray = np.bincount(bin_N, values_N, NUM_BINS)[filled_B]
        return total_B / count_B[filled_B]

    return ReliabilityBins(average(confidence_N), average(is_hit_N.astype(np.float64)), count_B[filled_B])


def _iterate_probabilities(logits_NC: np.ndarray, temperature_N: np.ndarray) -> Iterator[np.ndarray]:
    for block in iterate_blocks(logits_NC.shape):
        yield probabilities(logits_NC[block] / temperature_N[block, None])


def _find_largest(values_BC: np.ndarray, count: int) -> np.ndarray:
    """Return the places of each row's largest values, the largest first, and of equal values the first."""
    kth_B1 = np.partition(values_BC, -count, axis=1)[:, -count, None]
    largest_BK = np.empty((len(values_BC), count), dtype=np.int64)
    # Usually `count` values are as large as the count-th largest; with ties there are more, and sorting decides.
    is_candidate_BC = values_BC >= kth_B1
    is_tied_B = is_candidate_BC.sum(axis=1) > count
    largest_BK[~is_tied_B] = np.nonzero(is_candidate_BC[~is_tied_B])[1].reshape(-1, count)
    order = np.argsort(-values_BC[is_tied_B], axis=1, kind="stable")
    largest_BK[is_tied_B] = order[:, :count]
    chosen_BK = np.take_along_axis(values_BC, largest_BK, axis=1)
    return np.take_along_axis(largest_BK, np.argsort(-chosen_BK, axis=1, kind="stable"), axis=1)
