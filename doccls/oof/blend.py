"""Weights for averaging the probabilities of several runs: selected, equal, or all on the best run; pure.

The weights of a fold's rows are chosen on the rows of the other folds, so no score has seen its own rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from doccls.oof.bootstrap import GAIN_LEVEL, bootstrap_gap, bootstrap_macro_f1
from doccls.oof.metrics import count_macro_f1

CandidateName = Literal["single", "equal", "selection"]
ROUNDS = 25  # of the greedy selection; more would only refine the weights beyond what OOF scores can tell apart
_TINIEST = np.finfo(np.float64).tiny  # stands for a probability of 0 in logarithms


@dataclass(frozen=True)
class CandidateScore:
    """The macro-F1 over all rows, each blended with weights chosen on other folds, with intervals by bootstrap."""

    macro_f1: float
    macro_f1_low: float  # the interval of level LEVEL
    macro_f1_high: float
    gain: float  # minus the macro-F1 of equal weights, on the same resamples; its interval is of level GAIN_LEVEL
    gain_low: float
    gain_high: float


@dataclass(frozen=True)
class Candidate:
    """One way to weight the runs."""

    name: CandidateName
    weights: tuple[float, ...]  # of each run, chosen on all rows; they sum to 1
    part_weights: tuple[tuple[float, ...], ...]  # of each part of the rows, chosen on the other parts
    clean: CandidateScore
    damaged: CandidateScore | None  # on damaged copies of the pages, with the same weights


@dataclass(frozen=True)
class BlendResult:
    """All candidates, and the one to use."""

    single: Candidate
    equal: Candidate
    selection: Candidate
    used: CandidateName
    decided_by: Literal["clean", "damaged"]  # the pages or copies that chose the weights and `used`

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All candidates, the simplest first."""
        return (self.single, self.equal, self.selection)

    @property
    def best(self) -> Candidate:
        """The candidate to use."""
        return next(candidate for candidate in self.candidates if candidate.name == self.used)

    def find_deciding_score(self, candidate: Candidate) -> CandidateScore:
        """Return the candidate's score on the pages or copies that decide."""
        if self.decided_by == "clean":
            return candidate.clean
        assert candidate.damaged is not None
        return candidate.damaged


def compare_blends(
    targets_N: np.ndarray,
    part_N: np.ndarray,
    probs_RNC: np.ndarray,
    damaged_RNC: np.ndarray | None = None,
    unit_N: np.ndarray | None = None,
) -> BlendResult:
    """Choose the weights of each candidate, score it, and decide which one to use.

    `probs_RNC` (runs, n, classes) float64 are the out-of-fold probabilities; `damaged_RNC` are those of damaged copies
    of the pages, which decide if they are given. `part_N` (n,) is from `calibrate.assign_parts`, `unit_N`
    (n,) from `bootstrap.encode_groups`: with groups, the intervals come from resampling groups.

    Selection is used only where its gain over equal weights exceeds chance: the interval of the gain lies above 0. The
    best single run is used only if that is so for it and not for selection.
    """
    deciding_RNC = probs_RNC if damaged_RNC is None else damaged_RNC
    choices = {
        name: (choose(targets_N, deciding_RNC), _choose_by_part(targets_N, deciding_RNC, part_N, choose))
        for name, choose in _CHOICES.items()
    }

    def score(values_RNC: np.ndarray) -> dict[CandidateName, CandidateScore]:
        predictions = {
            name: blend_parts(values_RNC, part_N, part_weights).argmax(axis=1)
            for name, (_, part_weights) in choices.items()
        }
        return _score_candidates(targets_N, predictions, values_RNC.shape[2], unit_N)

    clean = score(probs_RNC)
    damaged = None if damaged_RNC is None else score(damaged_RNC)
    deciding = clean if damaged is None else damaged
    single, equal, selection = (
        Candidate(name, weights, part_weights, clean[name], None if damaged is None else damaged[name])
        for name, (weights, part_weights) in choices.items()
    )
    return BlendResult(single, equal, selection, _decide(deciding), "clean" if damaged is None else "damaged")


def _decide(scores: dict[CandidateName, CandidateScore]) -> CandidateName:
    order: tuple[CandidateName, ...] = ("selection", "single")
    return next((name for name in order if scores[name].gain_low > 0), "equal")


def _score_candidates(
    targets_N: np.ndarray, predictions: dict[CandidateName, np.ndarray], num_classes: int, unit_N: np.ndarray | None
) -> dict[CandidateName, CandidateScore]:
    equal_N = predictions["equal"]
    equal_score = count_macro_f1(targets_N, equal_N, num_classes)
    scores = {}
    for name, own_N in predictions.items():
        score = count_macro_f1(targets_N, own_N, num_classes)
        interval = bootstrap_macro_f1(targets_N, own_N, num_classes, unit_N)
        is_equal = np.array_equal(own_N, equal_N)
        gain = (0.0, 0.0) if is_equal else bootstrap_gap(targets_N, own_N, equal_N, num_classes, unit_N, GAIN_LEVEL)
        scores[name] = CandidateScore(score, *interval, score - equal_score, *gain)
    return scores


# --- parts of the rows -----------------------------------------------------------------------------------------------


def blend_parts(probs_RNC: np.ndarray, part_N: np.ndarray, part_weights: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the weighted mean (n, classes) float64 of the runs' probabilities, with each part's own weights."""
    weights_NR = np.asarray(part_weights)[part_N]
    total_NC = np.zeros(probs_RNC.shape[1:])
    for run, probs_NC in enumerate(probs_RNC):  # in a fixed order of sums, unlike BLAS
        total_NC += weights_NR[:, run, None] * probs_NC
    return total_NC


def _choose_by_part(
    targets_N: np.ndarray,
    probs_RNC: np.ndarray,
    part_N: np.ndarray,
    choose: Callable[[np.ndarray, np.ndarray], tuple[float, ...]],
) -> tuple[tuple[float, ...], ...]:
    weights = []
    for part in range(int(part_N.max()) + 1):
        rows = _list_other_rows(part_N, part)
        weights.append(choose(targets_N[rows], probs_RNC[:, rows]))
    return tuple(weights)


def _list_other_rows(part_N: np.ndarray, part: int) -> np.ndarray:
    return np.flatnonzero(part_N != part)


# --- weights ---------------------------------------------------------------------------------------------------------


def choose_single(targets_N: np.ndarray, probs_RNC: np.ndarray) -> tuple[float, ...]:
    """Return all weight on the run with the highest macro-F1; of equals, on the one with the lower cross-entropy."""
    run, _ = _find_best_addition(targets_N, probs_RNC, np.zeros(probs_RNC.shape[1:]), 1)
    return tuple(float(other == run) for other in range(len(probs_RNC)))


def weight_equally(targets_N: np.ndarray, probs_RNC: np.ndarray) -> tuple[float, ...]:
    """Return equal weights."""
    return (1 / len(probs_RNC),) * len(probs_RNC)


def select_greedily(targets_N: np.ndarray, probs_RNC: np.ndarray) -> tuple[float, ...]:
    """Return weights by greedy selection with replacement (Caruana et al., Ensemble Selection from Libraries, 2004).

    It starts from the best run, adds in each round the run that makes the mean's macro-F1 highest, and keeps the best
    of all rounds. Equals are compared by cross-entropy; then the first run, and the earliest round, wins.
    """
    counts_R = np.zeros(len(probs_RNC), dtype=np.int64)
    total_NC = np.zeros(probs_RNC.shape[1:])
    best_rating, best_counts_R = (-1.0, 0.0), counts_R
    for size in range(1, ROUNDS + 1):
        run, rating = _find_best_addition(targets_N, probs_RNC, total_NC, size)
        counts_R[run] += 1
        total_NC += probs_RNC[run]
        if rating > best_rating:
            best_rating, best_counts_R = rating, counts_R.copy()
    return tuple((best_counts_R / best_counts_R.sum()).tolist())


def _find_best_addition(
    targets_N: np.ndarray, probs_RNC: np.ndarray, total_NC: np.ndarray, size: int
) -> tuple[int, tuple[float, float]]:
    """Return the run whose probabilities, added to a total, give the best mean of `size` runs, and the mean's rating.

    A rating is the macro-F1 and, to be compared where that is equal, minus the cross-entropy. Of equals, the first.
    """
    num_classes, target_N = total_NC.shape[1], targets_N[:, None]
    ratings = []
    for probs_NC in probs_RNC:
        sums_NC = total_NC + probs_NC
        of_target_N = np.take_along_axis(sums_NC, target_N, axis=1)[:, 0] / size
        score = count_macro_f1(targets_N, sums_NC.argmax(axis=1), num_classes)
        ratings.append((score, float(np.log(np.maximum(of_target_N, _TINIEST)).mean())))
    best = max(range(len(ratings)), key=ratings.__getitem__)
    return best, ratings[best]


_CHOICES: dict[CandidateName, Callable[[np.ndarray, np.ndarray], tuple[float, ...]]] = {
    "single": choose_single,
    "equal": weight_equally,
    "selection": select_greedily,
}
