"""The figures of a set of predictions; scikit-learn's, on NumPy arrays."""

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score


def macro_f1(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    """Macro-F1 of the arg-max predictions: `sklearn.metrics.f1_score(targets, predictions, average="macro")`.

    A class that is neither a target nor a prediction does not count; one without a true positive counts 0.
    """
    return float(f1_score(targets_N, logits_NC.argmax(axis=1), average="macro", zero_division=0))


def cross_entropy(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    """Mean negative log-likelihood in nats, in float64: summed once over all samples, then divided once."""
    log_probabilities = log_softmax(logits_NC.astype(np.float64), axis=1)
    return float(-log_probabilities[np.arange(len(targets_N)), targets_N].sum() / len(targets_N))


def probabilities(logits_NC: np.ndarray) -> np.ndarray:
    """Softmax, in float64."""
    result: np.ndarray = softmax(logits_NC.astype(np.float64), axis=1)
    return result
