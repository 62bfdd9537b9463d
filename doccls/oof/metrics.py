"""The figures of a set of predictions; scikit-learn's, on NumPy arrays."""

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn.metrics import f1_score


def macro_f1(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    """Macro-F1 of the arg-max predictions: `sklearn.metrics.f1_score(targets, predictions, average="macro")`.

    A class that is neither a target nor a prediction does not count; one without a true positive counts 0.
    """
    return float(f1_score(targets_N, logits_NC.argmax(axis=1), average="macro", zero_division=0))


def selection_f1(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    """Macro-F1 over the classes that are among the targets: what the epochs of a fold are compared by.

    A small fold lacks classes. In `macro_f1` one wrong prediction of such a class adds a class that counts 0 and so
    costs as much as a whole class (0.06 of 17), whatever it says about the model; here it costs what any error does.
    """
    labels = np.unique(targets_N)
    return float(f1_score(targets_N, logits_NC.argmax(axis=1), labels=labels, average="macro", zero_division=0))


def cross_entropy(targets_N: np.ndarray, logits_NC: np.ndarray) -> float:
    """Mean negative log-likelihood in nats, in float64: summed once over all samples, then divided once."""
    log_probabilities = log_softmax(logits_NC.astype(np.float64), axis=1)
    return float(-log_probabilities[np.arange(len(targets_N)), targets_N].sum() / len(targets_N))


def probabilities(logits_NC: np.ndarray) -> np.ndarray:
    """Softmax, in float64."""
    result: np.ndarray = softmax(logits_NC.astype(np.float64), axis=1)
    return result
