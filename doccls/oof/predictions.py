"""One fold's out-of-fold part: a safetensors file that says by itself what it belongs to."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from doccls.errors import UserError
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import remove_leftovers
from doccls.system.tensor_file import OtherVersionError, TensorFileError, read_tensor_file, write_tensor_file

_FORMAT = "doccls-fold-predictions-4"


@dataclass(frozen=True)
class PredictionsInfo:
    """What a part says of itself."""

    fingerprint: str
    """The run's fingerprint; parts of different fingerprints don't merge."""
    fold: int
    num_folds: int
    num_samples: int
    """Rows of train.csv, over all folds."""
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    """ID of each row of the part, as written in train.csv."""
    skipped: tuple[int, ...]
    """Indices of rows of this fold without a usable image: their logits are NaN."""
    best_epoch: int
    macro_f1: float
    precision: str = "no"
    """In which the logits were computed: no (float32), fp16 or bf16."""
    micro_batch_size: int | None = None
    """Most images that a process took at a time; None is its whole share of the batch."""
    groups: tuple[str, ...] | None = None
    """Group of each row of the part, where data.group_col is set."""


@dataclass(frozen=True)
class FoldPredictions:
    """The validation logits of one fold's best epoch, keyed by sample index."""

    info: PredictionsInfo
    indices_N: np.ndarray
    """(n,) int64, ascending: rows of train.csv."""
    logits_NC: np.ndarray
    """(n, classes) float32."""
    targets_N: np.ndarray
    """(n,) int64."""


def write_predictions(path: Path, predictions: FoldPredictions) -> None:
    """Write the part, whole; the same part gives the same bytes."""
    _check(predictions, "a part about to be written")
    arrays = {"indices": predictions.indices_N, "logits": predictions.logits_NC, "targets": predictions.targets_N}
    write_tensor_file(path, _FORMAT, asdict(predictions.info), arrays)


def read_predictions(path: Path) -> FoldPredictions:
    """Read and verify a part.

    Raises:
        TensorFileError: missing, torn, of another format, or its content does not match its digest or its own words.
    """
    return read_tensor_file(path, _FORMAT, lambda description, arrays: _parse(description, arrays, str(path)))


def find_finished_folds(paths: RunPaths, fingerprint: str | None, num_folds: int) -> list[int]:
    """Folds whose part is there, valid and of this fingerprint: a fold is done by its result, nobody's word.

    Raises:
        UserError: a part belongs to another fingerprint (None takes any): the run id was used for something else.
    """
    finished = []
    for fold in range(num_folds):
        path = paths.predictions(fold)
        if not path.exists():
            continue
        try:
            info = read_predictions(path).info
        except OtherVersionError as error:
            raise UserError(
                f"run {paths.run_id} in {paths.root} has finished folds that this version can't read: {error}. "
                "Take another --run-id, or go on with that version"
            ) from error
        except TensorFileError:
            continue  # damaged: the fold is trained again and its part replaced
        if fingerprint is not None and info.fingerprint != fingerprint:
            raise UserError(
                f"run {paths.run_id} in {paths.root} was made with another config, data, folds or weights "
                f"(fingerprint {info.fingerprint[:12]}, now {fingerprint[:12]}): take another --run-id"
            )
        if info.fold == fold:
            finished.append(fold)
    return finished


def find_damage(path: Path) -> str | None:
    """What is wrong with a part that is there; None of a valid one, or where there is none."""
    if not path.exists():
        return None
    try:
        read_predictions(path)
    except TensorFileError as error:
        return str(error)
    return None


def remove_resume_checkpoints(paths: RunPaths, folds: Iterable[int]) -> None:
    """Of folds whose part stands: nothing goes on from their states, nor from what a kill left half-written of them."""
    for fold in folds:
        for path in paths.resume_checkpoints(fold):
            remove_leftovers(path)
            path.unlink(missing_ok=True)


def is_merged(paths: RunPaths) -> bool:
    """Whether the merged files are there, and of the parts as they are."""
    try:
        merged_ns = paths.summary.stat().st_mtime_ns  # written last
        return all(file.stat().st_mtime_ns <= merged_ns for file in paths.predictions_dir.glob("fold*.safetensors"))
    except FileNotFoundError:
        return False


def _parse(description: dict[str, Any], arrays: dict[str, np.ndarray], where: str) -> FoldPredictions:
    for name in ("classes", "ids", "skipped", "groups"):
        description[name] = None if description[name] is None else tuple(description[name])
    predictions = FoldPredictions(
        PredictionsInfo(**description), arrays["indices"], arrays["logits"], arrays["targets"]
    )
    _check(predictions, where)
    return predictions


def _check(predictions: FoldPredictions, where: str) -> None:
    info, rows = predictions.info, len(predictions.indices_N)
    kinds = [array.dtype.name for array in (predictions.indices_N, predictions.logits_NC, predictions.targets_N)]
    if (
        kinds != ["int64", "float32", "int64"]
        or predictions.logits_NC.shape != (rows, len(info.classes))
        or (predictions.indices_N.ndim != 1 or predictions.targets_N.ndim != 1)
    ):
        raise TensorFileError(f"{where}: arrays of the wrong kind or shape")
    if {len(predictions.targets_N), len(info.ids), rows if info.groups is None else len(info.groups)} != {rows}:
        raise TensorFileError(f"{where}: indices, targets, IDs and groups differ in number")
    if rows and (
        np.any(np.diff(predictions.indices_N) <= 0)
        or predictions.indices_N[0] < 0
        or predictions.indices_N[-1] >= info.num_samples
    ):
        raise TensorFileError(f"{where}: indices are not ascending within 0 to {info.num_samples - 1}")
    if not 0 <= info.fold < info.num_folds:
        raise TensorFileError(f"{where}: fold {info.fold} of {info.num_folds} folds")
    if np.any((predictions.targets_N < 0) | (predictions.targets_N >= len(info.classes))):
        raise TensorFileError(f"{where}: targets outside the {len(info.classes)} classes")
    bad = set(predictions.indices_N[~np.isfinite(predictions.logits_NC).all(axis=1)].tolist()) - set(info.skipped)
    if bad:
        raise TensorFileError(f"{where}: {len(bad)} rows have non-finite logits, such as row {min(bad)}")
