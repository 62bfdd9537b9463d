"""Classification metrics on NumPy arrays, computed with scikit-learn and SciPy.

Scikit-learn takes a second to import, which commands that only show scores must not: functions import it.
"""

from collections.abc import Iterator

import numpy as np
from scipy.special import log_softmax, softmax

_BLOCK_VALUES = 2**17  # a megabyte of float64


def macro_f1(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    """Return the macro-F1 of the arg-max predictions, as `sklearn.metrics.f1_score(..., average="macro")`.

    A class that is neither a target nor a prediction is ignored; one without a true positive counts as 0.
    """
    return score_labels(targets_N, logits_NC.argmax(axis=1))


def score_labels(targets_N: np.ndarray, predictions_N: np.ndarray) -> float:
    """Return the macro-F1 of predicted classes (n,), as `macro_f1`."""
    from sklearn.metrics import f1_score

    return float(f1_score(targets_N, predictions_N, average="macro", zero_division=0))


def selection_f1(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    """Return the macro-F1 over the classes among the targets, by which the epochs of a fold are compared.

    A small fold may lack classes. In `macro_f1` one wrong prediction of such a class adds a class with an F1 of 0, and
    so costs as much as getting an entire class wrong (0.06 of 17); here it costs as much as any other error.
    """
    from sklearn.metrics import f1_score

    labels = np.unique(targets_N)
    return float(f1_score(targets_N, logits_NC.argmax(axis=1), labels=labels, average="macro", zero_division=0))


def iterate_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of the rows of an array (n, classes), each small enough for its float64 copy to stay in the cache.

    Copies of all rows may be larger than the memory, and are slower.
    """
    num_rows, num_classes = shape
    step = max(1, _BLOCK_VALUES // num_classes)
    return (slice(first, first + step) for first in range(0, num_rows, step))


def cross_entropy(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    """Return the mean negative log-likelihood in nats, in float64: one sum over all samples, divided once."""
    log_probabilities = log_softmax(logits_NC.astype(np.float64), axis=1)
    return float(-log_probabilities[np.arange(len(targets_N)), targets_N].sum() / len(targets_N))


def probabilities(logits_NC: np.ndarray) -> np.ndarray:
    """Return the softmax over classes, in float64."""
    probs: np.ndarray = softmax(logits_NC.astype(np.float64), axis=1)
    return probs


def mean_probabilities(logits_VNC: np.ndarray) -> np.ndarray:
    """Return the mean over views of the softmax over classes: (n, classes) float64."""
    total_NC = np.zeros(logits_VNC.shape[1:])
    for logits_NC in logits_VNC:  # one view at a time, which bounds the memory
        total_NC += probabilities(logits_NC)
    return total_NC / len(logits_VNC)


def count_macro_f1(
    targets_N: np.ndarray, predictions_N: np.ndarray, num_classes: int, times_N: np.ndarray | None = None
) -> float:
    """Return macro-F1 as `score_labels` does, from counts: for callers that compute it thousands of times.

    Each row counts once, or as often as `times_N` (n,) says.
    """
    is_hit = targets_N == predictions_N
    hits_C = np.bincount(targets_N[is_hit], None if times_N is None else times_N[is_hit], num_classes)
    occurrences_C = np.bincount(targets_N, times_N, num_classes) + np.bincount(predictions_N, times_N, num_classes)
    present_C = occurrences_C > 0
    return float(np.mean(2 * hits_C[present_C] / occurrences_C[present_C]))


def count_accuracy(targets_N: np.ndarray, predictions_N: np.ndarray, times_N: np.ndarray) -> float:
    """Return the share of predictions that are right; each row counts as often as `times_N` (n,) says."""
    return float(times_N[targets_N == predictions_N].sum() / times_N.sum())
