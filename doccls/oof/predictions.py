"""One fold's out-of-fold predictions, as a self-describing safetensors file."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from doccls.config.paths import is_file
from doccls.errors import UserError
from doccls.run.paths import RunPaths
from doccls.system.atomic_files import remove_leftovers
from doccls.system.tensor_file import OtherVersionError, TensorFileError, read_tensor_file, write_tensor_file

_FORMAT = "doccls-fold-predictions-6"


@dataclass(frozen=True)
class PredictionsInfo:
    """The metadata stored with a fold's predictions."""

    fingerprint: str  # of the run; predictions with different fingerprints don't merge
    fold: int
    num_folds: int
    num_samples: int  # rows of train.csv, over all folds
    classes: tuple[str, ...]
    ids: tuple[str, ...]  # one per row of this file, as written in train.csv
    skipped: tuple[int, ...]  # indices of this fold's rows without a usable image: their logits are NaN
    best_epoch: int
    macro_f1: float
    precision: str = "no"  # in which the logits were computed: no (float32), fp16 or bf16
    micro_batch_size: int | None = None  # None: the entire per-rank batch
    groups: tuple[str, ...] | None = None  # one per row of this file, if data.group_col is set
    num_split: int = 0  # rows of this fold whose image is in another fold too (only with data.on_duplicate: allow)
    damage: Literal["none", "light", "scan"] = "none"  # the level of the damaged copies (valid.damage)
    macro_f1_damaged: float | None = None  # on damaged copies of the pages, if there are any
    selected_by: Literal["clean", "damaged"] = "clean"  # the pages or copies whose score selected the best epoch


@dataclass(frozen=True)
class FoldPredictions:
    """The validation logits of one fold's best epoch, keyed by sample index."""

    info: PredictionsInfo
    indices_N: np.ndarray  # (n,) int64, ascending: rows of train.csv
    logits_NC: np.ndarray  # (n, classes) float32
    targets_N: np.ndarray  # (n,) int64
    damaged_logits_NC: np.ndarray | None = None  # (n, classes) float32, of damaged copies of the pages (valid.damage)

    @property
    def selecting_logits_NC(self) -> np.ndarray:
        """The logits whose score selected the best epoch: of the pages, or of their damaged copies."""
        if self.info.selected_by == "clean":
            return self.logits_NC
        assert self.damaged_logits_NC is not None
        return self.damaged_logits_NC


def write_predictions(path: Path, predictions: FoldPredictions) -> None:
    """Write the predictions atomically; equal predictions give equal bytes."""
    _check(predictions, f"predictions for {path}")
    arrays = {"indices": predictions.indices_N, "logits": predictions.logits_NC, "targets": predictions.targets_N}
    if predictions.damaged_logits_NC is not None:
        arrays["damaged_logits"] = predictions.damaged_logits_NC
    write_tensor_file(path, _FORMAT, asdict(predictions.info), arrays)


def read_predictions(path: Path) -> FoldPredictions:
    """Read and verify a fold's predictions.

    Raises:
        TensorFileError: the file is missing, truncated or of another format, or its content does not match its digest
            or its metadata.
    """
    return read_tensor_file(path, _FORMAT, lambda description, arrays: _parse(description, arrays, str(path)))


def find_finished_folds(paths: RunPaths, fingerprint: str | None, num_folds: int) -> list[int]:
    """Return the folds with valid predictions of this fingerprint (None: any); only its own file shows a fold done.

    Raises:
        UserError: predictions have another fingerprint, since the run id was used for something else, or another
            version of doccls wrote them.
    """
    finished = []
    for fold in range(num_folds):
        path = paths.predictions(fold)
        if not is_file(path):
            continue
        try:
            info = read_predictions(path).info
        except OtherVersionError as error:
            raise UserError(
                f"run {paths.run_id} in {paths.root} has finished folds that this version can't read: {error}. "
                "Take another --run-id, or continue with that version"
            ) from error
        except TensorFileError:
            continue  # damaged: the fold is retrained and its predictions replaced
        if fingerprint is not None and info.fingerprint != fingerprint:
            raise UserError(
                f"run {paths.run_id} in {paths.root} was started with another config, data, folds or weights "
                f"(fingerprint {info.fingerprint[:12]}, now {fingerprint[:12]}): choose another --run-id"
            )
        if info.fold == fold:
            finished.append(fold)
    return finished


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a fold's predictions file; None if it is valid or does not exist."""
    if not is_file(path):
        return None
    try:
        read_predictions(path)
    except TensorFileError as error:
        return str(error)
    return None


def remove_resume_checkpoints(paths: RunPaths, folds: Iterable[int]) -> None:
    """Remove the resume checkpoints of folds that have predictions, with the temporary files of interrupted writes.

    Raises:
        UserError: one can't be removed.
    """
    for fold in folds:
        for path in paths.resume_checkpoints(fold):
            try:
                remove_leftovers(path)
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"can't remove {path}, which its fold no longer needs: {error.strerror}") from error


def is_merged(paths: RunPaths) -> bool:
    """Return whether the merged files exist and are up to date with the fold predictions."""
    try:
        merged_ns = paths.summary.stat().st_mtime_ns  # the merge writes it last
        return all(file.stat().st_mtime_ns <= merged_ns for file in paths.list_predictions())
    except FileNotFoundError:
        return False


def _parse(description: dict[str, Any], arrays: dict[str, np.ndarray], source: str) -> FoldPredictions:
    for name in ("classes", "ids", "skipped", "groups"):
        description[name] = None if description[name] is None else tuple(description[name])
    predictions = FoldPredictions(
        PredictionsInfo(**description),
        arrays["indices"],
        arrays["logits"],
        arrays["targets"],
        arrays.get("damaged_logits"),
    )
    _check(predictions, source)
    return predictions


def _check(predictions: FoldPredictions, source: str) -> None:
    info, rows = predictions.info, len(predictions.indices_N)
    logits = {"logits": predictions.logits_NC}
    if predictions.damaged_logits_NC is not None:
        logits["damaged logits"] = predictions.damaged_logits_NC
    if (
        [array.dtype.name for array in (predictions.indices_N, predictions.targets_N)] != ["int64", "int64"]
        or any(array.dtype.name != "float32" for array in logits.values())
        or any(array.shape != (rows, len(info.classes)) for array in logits.values())
        or (predictions.indices_N.ndim != 1 or predictions.targets_N.ndim != 1)
    ):
        raise TensorFileError(f"{source}: arrays have the wrong dtype or shape")
    if {len(predictions.targets_N), len(info.ids), rows if info.groups is None else len(info.groups)} != {rows}:
        raise TensorFileError(f"{source}: indices, targets, IDs and groups differ in number")
    if rows and (
        np.any(np.diff(predictions.indices_N) <= 0)
        or predictions.indices_N[0] < 0
        or predictions.indices_N[-1] >= info.num_samples
    ):
        raise TensorFileError(f"{source}: indices are not ascending within 0 to {info.num_samples - 1}")
    if not 0 <= info.fold < info.num_folds:
        raise TensorFileError(f"{source}: fold {info.fold} is outside 0 to {info.num_folds - 1}")
    if np.any((predictions.targets_N < 0) | (predictions.targets_N >= len(info.classes))):
        raise TensorFileError(f"{source}: targets outside 0 to {len(info.classes) - 1}")
    if len({"damaged logits" in logits, info.damage != "none", info.macro_f1_damaged is not None}) > 1:
        raise TensorFileError(f"{source}: the damaged logits, their score and their level don't belong together")
    for name, logits_NC in logits.items():
        non_finite = set(predictions.indices_N[~np.isfinite(logits_NC).all(axis=1)].tolist()) - set(info.skipped)
        if non_finite:
            raise TensorFileError(
                f"{source}: {len(non_finite)} rows have non-finite {name}, such as row {min(non_finite)}"
            )
