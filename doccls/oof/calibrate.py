"""One temperature that makes probabilities say how often a label is right, learned from out-of-fold logits; pure.

Every figure of its benefit is cross-fitted: a row is scored with a temperature that was fitted without its own fold.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, softmax

from doccls.oof.metrics import iterate_blocks

NUM_BINS = 15
NUM_PARTS = 5
TEMPERATURES = (0.05, 20.0)  # the range that is searched
_NEAR = 0.05  # in the logarithm of T: how far off that of a part of many rows is
_FEW_BLOCKS = 50  # of rows, for which no faster search is needed


@dataclass(frozen=True)
class OofRows:
    """Rows with a prediction of a model that was not trained on them."""

    targets_N: np.ndarray  # (n,) int64
    logits_NC: np.ndarray  # (n, classes), finite
    folds_N: np.ndarray  # (n,) int64: of which fold a row is
    unit_N: np.ndarray | None = None  # (n,) int64 from 0: the group of a row, if there are groups

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the targets and logits of these rows (a mask or indices)."""
        return self.targets_N[rows], self.logits_NC[rows]


@dataclass(frozen=True)
class CrossFit:
    """Temperatures that were each fitted without the rows of one part."""

    parts_N: np.ndarray  # (n,) int64 from 0: the part of each row, its fold if there are several
    temperatures: tuple[float, ...]  # one per part, fitted on the rows of all other parts
    temperature: float  # fitted on all rows: for new pages

    @property
    def temperature_N(self) -> np.ndarray:
        """The temperature of each row (n,), fitted without it."""
        temperature_N: np.ndarray = np.asarray(self.temperatures)[self.parts_N]
        return temperature_N


@dataclass(frozen=True)
class Calibration:
    """How well probabilities say how often they are right, before and after calibration.

    The `_calibrated` figures are cross-fitted; `temperature` is fitted on all rows, for new pages.
    """

    temperature: float
    nll: float  # mean negative log-likelihood, in nats
    nll_calibrated: float
    ece: float  # expected calibration error, `measure_ece`
    ece_calibrated: float
    brier: float  # `measure_brier`
    brier_calibrated: float


def fit_temperature(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    """Return the T within TEMPERATURES whose probabilities softmax(logits / T) have the smallest NLL; 1 without rows.

    One temperature for all classes changes no label (Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
    section 4.2). One row is added to those given: an average page whose class is unknown. Without it, a model that is
    right in every row would claim certainty: its NLL falls for ever as T goes to 0 (Platt, Probabilistic Outputs for
    Support Vector Machines, 1999, section 2.2, smooths the targets to the same end). Constant logits have no best T,
    and give 1.
    """
    from scipy.optimize import brentq  # slow to import, and read_summary needs this module

    if not len(targets_N):
        return 1.0
    top_N = logits_NC.max(axis=1).astype(np.float64)
    blocks = list(iterate_blocks(logits_NC.shape))

    def shift(block: slice) -> np.ndarray:
        shifted_BC: np.ndarray = logits_NC[block] - top_N[block, None]
        return shifted_BC

    mean_N = np.concatenate([shift(block).mean(axis=1) for block in blocks])
    target_sum = (logits_NC[np.arange(len(targets_N)), targets_N] - top_N).sum() + mean_N.mean()

    def compute_slope(log_temperature: float) -> float:
        """Return the derivative of the NLL, summed over rows, by 1 / T."""
        expected_N = np.empty(len(targets_N))
        for block in blocks:
            shifted_BC = shift(block)
            weights_BC = np.exp(shifted_BC * np.exp(-log_temperature))
            expected_N[block] = (weights_BC * shifted_BC).sum(axis=1) / weights_BC.sum(axis=1)
        return float(expected_N.sum() + expected_N.mean() - target_sum)

    # The NLL is convex in 1 / T, so its slope only falls as T rises, and has one root at most.
    low, high = np.log(TEMPERATURES)
    if len(blocks) > _FEW_BLOCKS:  # a sixteenth of the rows says where to search
        near = np.log(fit_temperature(targets_N[::16], logits_NC[::16]))
        bounds = max(low, near - _NEAR), min(high, near + _NEAR)
        if compute_slope(bounds[0]) > 0 > compute_slope(bounds[1]):
            return float(np.exp(brentq(compute_slope, *bounds, xtol=1e-9)))
    slope_low, slope_high = compute_slope(low), compute_slope(high)
    if slope_low == slope_high:
        return 1.0
    if slope_low <= 0:
        return TEMPERATURES[0]
    if slope_high >= 0:
        return TEMPERATURES[1]
    return float(np.exp(brentq(compute_slope, low, high, xtol=1e-9)))


def assign_parts(folds_N: np.ndarray, unit_N: np.ndarray | None = None) -> np.ndarray:
    """Return the part (n,) of each row, from 0: its fold or, if all rows are of one fold, one of NUM_PARTS.

    The parts of a single fold take its rows, or entire groups of rows, in turn.
    """
    folds, parts_N = np.unique(folds_N, return_inverse=True)
    if len(folds) > 1:
        return parts_N.astype(np.int64)
    units = np.arange(len(folds_N)) if unit_N is None else np.unique(unit_N, return_inverse=True)[1]
    return units.astype(np.int64) % NUM_PARTS


def cross_fit(rows: OofRows) -> CrossFit:
    """Fit one temperature on all rows, and for each part of the rows one on all others."""
    parts_N = assign_parts(rows.folds_N, rows.unit_N)
    others = (parts_N != part for part in range(int(parts_N.max()) + 1))
    temperatures = tuple(fit_temperature(*rows.take(other_N)) for other_N in others)
    return CrossFit(parts_N, temperatures, fit_temperature(rows.targets_N, rows.logits_NC))


def measure_calibration(rows: OofRows, fit: CrossFit) -> Calibration:
    """Measure probabilities as they are, and with each row's cross-fitted temperature."""
    before = _score(rows.targets_N, rows.logits_NC, np.ones(len(rows.targets_N)))
    after = _score(rows.targets_N, rows.logits_NC, fit.temperature_N)
    return Calibration(fit.temperature, before.nll, after.nll, before.ece, after.ece, before.brier, after.brier)


@dataclass(frozen=True)
class _Scores:
    nll: float
    ece: float
    brier: float


def _score(targets_N: np.ndarray, logits_NC: np.ndarray, temperature_N: np.ndarray) -> _Scores:
    nll_N, top_N, brier_N = (np.empty(len(targets_N)) for _ in range(3))
    for block in iterate_blocks(logits_NC.shape):
        log_probs_BC = log_softmax(logits_NC[block] / temperature_N[block, None], axis=1)
        targets_B, probs_BC = targets_N[block], np.exp(log_probs_BC)
        nll_N[block] = -log_probs_BC[np.arange(len(targets_B)), targets_B]
        top_N[block], brier_N[block] = probs_BC.max(axis=1), measure_brier(targets_B, probs_BC)
    is_hit_N = logits_NC.argmax(axis=1) == targets_N
    return _Scores(float(nll_N.mean()), measure_ece(top_N, is_hit_N), float(brier_N.mean()))


def measure_ece(top_N: np.ndarray, is_hit_N: np.ndarray) -> float:
    """Return the expected calibration error: the mean over rows of their bin's |accuracy - mean top probability|.

    Bin m of M = NUM_BINS holds the rows whose top probability is in ((m - 1) / M, m / M] (Guo et al. 2017, equation 3;
    Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015).
    """
    bins_N = np.clip(np.ceil(top_N * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    return float(np.abs(np.bincount(bins_N, is_hit_N - top_N, NUM_BINS)).sum() / len(top_N))


def measure_brier(targets_N: np.ndarray, probs_NC: np.ndarray) -> np.ndarray:
    """Return for each row the sum over classes of (probability - 1 if it is the target, else 0) squared, as (n,).

    From 0 to 2 (Brier, Verification of Forecasts Expressed in Terms of Probability, Monthly Weather Review, 1950).
    """
    errors_NC = probs_NC.copy()
    errors_NC[np.arange(len(targets_N)), targets_N] -= 1
    scores_N: np.ndarray = (errors_NC**2).sum(axis=1)
    return scores_N


def temper(probs_NC: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probabilities (n, classes), raised to 1 / temperature and renormalised, as float64.

    For softmax(logits) that is softmax(logits / temperature). Each row must have a positive probability.
    """
    with np.errstate(divide="ignore"):  # the logarithm of 0 is -inf, whose softmax is 0 again
        tempered: np.ndarray = softmax(np.log(probs_NC.astype(np.float64)) / temperature, axis=1)
    return tempered
