"""One fold's out-of-fold logits in several views, `oof/views/fold{n}*.safetensors`: computed once, then read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import log_softmax, logsumexp

from doccls.config.paths import is_file
from doccls.oof.predictions import FoldPredictions
from doccls.run.fingerprint import digest_file
from doccls.run.paths import RunPaths
from doccls.system.tensor_file import TensorFileError, read_tensor_file, write_tensor_file

_FORMAT = "doccls-fold-views-2"


@dataclass(frozen=True)
class ViewsInfo:
    """What the logits of a fold's views belong to."""

    fingerprint: str  # of the run
    fold: int
    checkpoint: str  # SHA-256 of the file of the weights
    pages: Literal["clean", "damaged"]  # which are shown: those whose score selected the epochs
    prior: int | None  # strength of the training's BatchNorm statistics beside those of the pages; None: no others
    views: tuple[str, ...]  # in the file, the first one is the page itself


@dataclass(frozen=True)
class FoldViews:
    """The logits of the usable validation pages of a fold, or of their damaged copies, in each view.

    With the training's BatchNorm statistics, those of the page itself are finite. Others may not be: an overflow there
    is no reason to compute all anew.
    """

    info: ViewsInfo
    indices_N: np.ndarray  # (n,) int64, ascending: rows of train.csv
    logits_VNC: np.ndarray  # (views, n, classes) float32

    def take(self, views: tuple[str, ...]) -> "FoldViews":
        """Return only these views, in this order."""
        places = [self.info.views.index(view) for view in views]
        return FoldViews(replace(self.info, views=views), self.indices_N, self.logits_VNC[places])

    def list_finite(self) -> tuple[str, ...]:
        """Return the views of which all logits are finite."""
        return tuple(
            view
            for view, logits_NC in zip(self.info.views, self.logits_VNC, strict=True)
            if np.isfinite(logits_NC).all()
        )


def write_views(path: Path, views: FoldViews) -> None:
    """Write the logits atomically; equal logits give equal bytes."""
    _check(views, f"views for {path}")
    arrays = {"indices": views.indices_N, "logits": views.logits_VNC}
    write_tensor_file(path, _FORMAT, asdict(views.info), arrays)


def read_views(path: Path) -> FoldViews:
    """Read and verify the logits.

    Raises:
        TensorFileError: the file is missing, truncated or of another format, or its content does not match its digest
            or its metadata.
    """
    return read_tensor_file(path, _FORMAT, lambda description, arrays: _parse(description, arrays, str(path)))


def describe_views(
    paths: RunPaths, predictions: FoldPredictions, views: tuple[str, ...], prior: int | None = None
) -> ViewsInfo:
    """Return the metadata of these views of the fold whose predictions these are.

    Raises:
        UserError: the fold's checkpoint can't be read.
    """
    info = predictions.info
    checkpoint = digest_file(paths.best_checkpoint(info.fold))
    return ViewsInfo(info.fingerprint, info.fold, checkpoint, info.selected_by, prior, views)


def find_views(
    paths: RunPaths, predictions: FoldPredictions, views: tuple[str, ...] | None, prior: int | None = None
) -> FoldViews | None:
    """Return the stored logits of these views, in that order, or of all, of the fold whose predictions these are.

    None if they are not those of the fold's present checkpoint and pages, lack a view, are damaged, or don't exist.

    Raises:
        UserError: the fold's checkpoint can't be read.
    """
    if not is_file(paths.best_checkpoint(predictions.info.fold)):
        return None
    try:
        stored = read_views(paths.views(predictions.info.fold, prior))
    except TensorFileError:
        return None
    views = stored.info.views if views is None else views
    if (
        replace(stored.info, views=views) != describe_views(paths, predictions, views, prior)
        or not set(views) <= set(stored.info.views)
        or not np.array_equal(stored.indices_N, list_usable(predictions))
    ):
        return None
    return stored.take(views)


def list_usable(predictions: FoldPredictions) -> np.ndarray:
    """Return the rows (n,) with a usable image, ascending."""
    indices = predictions.indices_N
    return indices[~np.isin(indices, predictions.info.skipped)]


def average_stored(
    paths: RunPaths, fold_predictions: Sequence[FoldPredictions], views: tuple[str, ...], prior: int | None = None
) -> tuple[list[FoldPredictions], list[int]]:
    """Return the predictions of the mean over these views, of the folds that have them stored, and the other folds.

    A view with logits that are not finite counts as not stored.

    Raises:
        UserError: a fold's checkpoint can't be read.
    """
    averaged, lacking = [], []
    for predictions in fold_predictions:
        stored = find_views(paths, predictions, views, prior)
        if stored is None or stored.list_finite() != views:
            lacking.append(predictions.info.fold)
        else:
            averaged.append(average_views(predictions, stored))
    return averaged, lacking


def average_views(predictions: FoldPredictions, views: FoldViews) -> FoldPredictions:
    """Return the predictions with the mean over all views: logits whose softmax is the mean of probabilities.

    Only the logits that selected the epochs are replaced: of the pages, or of their damaged copies. Rows without a
    usable image keep theirs, NaN.
    """
    averaged_NC = predictions.selecting_logits_NC.copy()
    averaged_NC[np.searchsorted(predictions.indices_N, views.indices_N)] = average_logits(views.logits_VNC)
    if views.info.pages == "clean":
        return replace(predictions, logits_NC=averaged_NC)
    return replace(predictions, damaged_logits_NC=averaged_NC)


def average_logits(logits_VNC: np.ndarray) -> np.ndarray:
    """Return the logarithm of the mean over views of the probabilities: (n, classes) float64, finite."""
    logs_VNC = log_softmax(logits_VNC.astype(np.float64), axis=2)
    mean_NC: np.ndarray = logsumexp(logs_VNC, axis=0) - np.log(len(logits_VNC))
    return mean_NC


def _parse(description: dict[str, Any], arrays: dict[str, np.ndarray], source: str) -> FoldViews:
    description["views"] = tuple(description["views"])
    views = FoldViews(ViewsInfo(**description), arrays["indices"], arrays["logits"])
    _check(views, source)
    return views


def _check(views: FoldViews, source: str) -> None:
    if (
        views.indices_N.dtype.name != "int64"
        or views.indices_N.ndim != 1
        or np.any(np.diff(views.indices_N) <= 0)
        or views.logits_VNC.dtype.name != "float32"
        or views.logits_VNC.ndim != 3
        or views.logits_VNC.shape[:2] != (len(views.info.views), len(views.indices_N))
    ):
        raise TensorFileError(f"{source}: arrays have the wrong dtype or shape, or rows are not ascending")
    if views.info.prior is None and not np.isfinite(views.logits_VNC[:1]).all():
        raise TensorFileError(f"{source}: logits of the page itself are not finite")
