"""Which row is validated in which fold: pure, from a manifest."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from doccls.data.manifest import DataError, Manifest, tell
from doccls.randomness import Purpose, derive_seed


@dataclass(frozen=True, eq=False)
class FoldAssignment:
    """Row i is validated in fold `fold_of_N[i]` and trained on in every other."""

    fold_of_N: np.ndarray
    """(n,) int64."""
    num_folds: int

    def list_valid(self, fold: int) -> np.ndarray:
        """Rows validated in `fold`, ascending, int64."""
        return np.flatnonzero(self.fold_of_N == fold)

    def list_train(self, fold: int) -> np.ndarray:
        """Rows trained on in `fold`, ascending, int64."""
        return np.flatnonzero(self.fold_of_N != fold)

    def count(self) -> dict[int, int]:
        """Rows of each fold."""
        return {fold: len(self.list_valid(fold)) for fold in range(self.num_folds)}

    def digest(self) -> str:
        """SHA-256 of the assignment."""
        return hashlib.sha256(self.fold_of_N.astype("<i8").tobytes()).hexdigest()


def assign_folds(manifest: Manifest, num_folds: int, stratify: bool, seed: int) -> FoldAssignment:
    """Split by the CSV's `fold` column, else by scikit-learn's splitter for (stratify, groups).

    Rows that share an image share a fold: an image that is trained on must not be validated on.

    Raises:
        DataError: a `fold` column that is not exactly 0 to num_folds-1, or too few rows or groups for num_folds.
    """
    if manifest.folds is not None:
        return _read_fold_column(manifest, manifest.folds, num_folds)
    units = np.asarray(_first_row_of_each_image(manifest))
    rows = np.flatnonzero(units == np.arange(len(units)))
    if len(rows) < num_folds:
        raise DataError(f"data.folds = {num_folds}: more folds than images ({len(rows)})")
    groups = None if manifest.groups is None else np.asarray([manifest.groups[row] for row in rows.tolist()])
    if groups is not None and len(set(groups)) < num_folds:
        raise DataError(f"data.folds = {num_folds}: more folds than groups in data.group_col ({len(set(groups))})")
    targets = manifest.targets_N[rows]
    if stratify and max(np.bincount(targets)) < num_folds:
        raise DataError(
            f"data.stratify: no class has the {num_folds} samples that data.folds needs (the largest has "
            f"{max(np.bincount(targets))}): use fewer folds, or data.stratify: false"
        )
    fold_of_N = np.full(len(manifest), -1, dtype=np.int64)
    splitter = _choose_splitter(stratify, groups is not None, num_folds, derive_seed(seed, Purpose.FOLDS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # the manifest has told it, with the classes
        for fold, (_, valid) in enumerate(splitter.split(np.zeros(len(rows)), targets, groups)):
            fold_of_N[rows[valid]] = fold
    return FoldAssignment(fold_of_N[units], num_folds)


def _choose_splitter(
    stratify: bool, grouped: bool, num_folds: int, seed: int
) -> StratifiedGroupKFold | StratifiedKFold | GroupKFold | KFold:
    kind: type[StratifiedGroupKFold | StratifiedKFold | GroupKFold | KFold] = {
        (True, True): StratifiedGroupKFold,
        (True, False): StratifiedKFold,
        (False, True): GroupKFold,
        (False, False): KFold,
    }[stratify, grouped]
    return kind(n_splits=num_folds, shuffle=True, random_state=seed)


def _first_row_of_each_image(manifest: Manifest) -> list[int]:
    """For each row, the first row that names the same image (itself, almost always; also where there is no image)."""
    first: dict[object, int] = {}
    return [row if path is None else first.setdefault(path, row) for row, path in enumerate(manifest.paths)]


def _read_fold_column(manifest: Manifest, column: Sequence[str], num_folds: int) -> FoldAssignment:
    allowed = {str(fold) for fold in range(num_folds)}
    wrong = [f"line {row + 2}: {value!r}" for row, value in enumerate(column) if value.strip() not in allowed]
    if wrong:
        raise DataError(tell(f"rows whose `fold` is not one of 0 to {num_folds - 1} (data.folds = {num_folds})", wrong))
    empty = sorted(allowed - {value.strip() for value in column}, key=int)
    if empty:
        raise DataError(f"column `fold`: no row is in fold {', '.join(empty)} (data.folds = {num_folds})")
    fold_of = tuple(int(value) for value in column)
    split = [
        f"lines {first + 2} and {row + 2}: ID {manifest.ids[row]!r}"
        for row, first in enumerate(_first_row_of_each_image(manifest))
        if fold_of[first] != fold_of[row]
    ]
    if split:
        raise DataError(tell("images in two folds of the `fold` column", split))
    if manifest.groups is not None:
        folds_of_group: dict[str, set[int]] = {}
        for group, fold in zip(manifest.groups, fold_of, strict=True):
            folds_of_group.setdefault(group, set()).add(fold)
        torn = [f"{group!r}: folds {sorted(folds)}" for group, folds in folds_of_group.items() if len(folds) > 1]
        if torn:
            raise DataError(tell("groups of data.group_col in several folds of the `fold` column", torn))
    return FoldAssignment(np.asarray(fold_of, dtype=np.int64), num_folds)
