"""What a run's out-of-fold predictions teach about its probabilities for new pages: a temperature, and thresholds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from doccls.config.paths import is_file
from doccls.oof.bootstrap import encode_groups
from doccls.oof.calibrate import OofRows, cross_fit, temper
from doccls.oof.predictions import FoldPredictions, read_predictions
from doccls.oof.thresholds import Thresholds, find_thresholds, shift
from doccls.run.paths import RunPaths
from doccls.system.tensor_file import TensorFileError


@dataclass(frozen=True)
class Adjustment:
    """How probabilities of new pages are to be calibrated, and which class is to be their label."""

    temperature: float
    thresholds: Thresholds
    folds: tuple[int, ...]  # whose predictions it was learned from
    learned_from: str  # `clean` or `damaged`: the logits that selected the epochs


def adjust(
    probs_NC: np.ndarray, fold_probs: Sequence[np.ndarray], adjustment: Adjustment | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return calibrated probabilities (n, classes), and the class (n,) of each row, by thresholds if they are used.

    `probs_NC` is the mean of `fold_probs`, the probabilities (n, classes) of each fold, which only thresholds need.
    Thresholds act on each fold's probabilities, by which they were learned: the mean of several folds is less certain,
    and the same offsets would override clear decisions. Without thresholds the class is the most probable one before
    calibration, so that not even rounding changes it.
    """
    if adjustment is None:
        return probs_NC, probs_NC.argmax(axis=1)
    calibrated_NC = temper(probs_NC, adjustment.temperature)
    offsets = adjustment.thresholds.offsets
    if offsets is None:
        return calibrated_NC, probs_NC.argmax(axis=1)
    total_NC = np.zeros_like(probs_NC)
    for own_NC in fold_probs:
        total_NC += shift(temper(own_NC, adjustment.temperature), offsets)
    return calibrated_NC, total_NC.argmax(axis=1)


def read_own_predictions(
    paths: RunPaths, fingerprint: str, num_folds: int
) -> tuple[list[FoldPredictions], tuple[str, ...]]:
    """Read the predictions of all folds that have any; also return what is wrong with files that can't be used."""
    fold_predictions, problems = [], []
    for fold in range(num_folds):
        path = paths.predictions(fold)
        if not is_file(path):
            continue
        try:
            predictions = read_predictions(path)
        except TensorFileError as error:
            problems.append(str(error))
            continue
        if (predictions.info.fingerprint, predictions.info.fold) == (fingerprint, fold):
            fold_predictions.append(predictions)
        else:
            problems.append(f"{path}: predictions of another run or fold than the checkpoints")
    return fold_predictions, tuple(problems)


def learn_adjustment(fold_predictions: Sequence[FoldPredictions]) -> Adjustment | None:
    """Learn from the fold predictions of one run, of some folds or all; None if they have no usable row; pure.

    With those of all folds, the figures are those of summary.json.
    """
    rows = _gather_rows(fold_predictions) if fold_predictions else None
    if rows is None or not len(rows.targets_N):
        return None
    fit = cross_fit(rows)
    return Adjustment(
        temperature=fit.temperature,
        thresholds=find_thresholds(rows, fit),
        folds=tuple(np.unique(rows.folds_N).tolist()),
        learned_from=fold_predictions[0].info.selected_by,
    )


def _gather_rows(fold_predictions: Sequence[FoldPredictions]) -> OofRows:
    """Return the usable rows of all folds, in the order of train.csv, with the logits that selected the epochs."""
    indices = np.concatenate([predictions.indices_N for predictions in fold_predictions])
    skipped = [row for predictions in fold_predictions for row in predictions.info.skipped]
    order = np.argsort(indices)
    order = order[~np.isin(indices[order], skipped)]
    groups = [group for predictions in fold_predictions for group in predictions.info.groups or ()]
    return OofRows(
        targets_N=np.concatenate([predictions.targets_N for predictions in fold_predictions])[order],
        logits_NC=np.concatenate([predictions.selecting_logits_NC for predictions in fold_predictions])[order],
        folds_N=np.repeat(
            [predictions.info.fold for predictions in fold_predictions],
            [len(predictions.indices_N) for predictions in fold_predictions],
        )[order],
        unit_N=encode_groups([groups[place] for place in order.tolist()]) if groups else None,
    )
