"""Assignment of the manifest's rows to folds: pure functions."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from doccls.data.manifest import Manifest, format_examples
from doccls.errors import UserError
from doccls.randomness import Purpose, derive_seed


@dataclass(frozen=True, eq=False)
class FoldAssignment:
    """The fold of each row: row i is validated in fold `fold_of_N[i]` and trained on in every other."""

    fold_of_N: np.ndarray  # (n,) int64
    num_folds: int

    def list_valid(self, fold: int) -> np.ndarray:
        """Return the rows validated in `fold`, ascending, int64."""
        return np.flatnonzero(self.fold_of_N == fold)

    def list_train(self, fold: int) -> np.ndarray:
        """Return the rows trained on in `fold`, ascending, int64."""
        return np.flatnonzero(self.fold_of_N != fold)

    def count(self) -> dict[int, int]:
        """Count the rows of each fold."""
        return {fold: len(self.list_valid(fold)) for fold in range(self.num_folds)}

    def digest(self) -> str:
        """Return the SHA-256 of the assignment."""
        return hashlib.sha256(self.fold_of_N.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Units:
    """The rows that must share a fold: those of the same image and those of the same group."""

    first_N: np.ndarray  # (n,) int64: the first row of the same image; the row itself where there is no image
    groups: Sequence[str] | None  # each row's group, merged where groups share an image; None without data.group_col


def find_units(manifest: Manifest, contents: Mapping[int, str] | None = None) -> Units:
    """Find the rows that name the same image or, where `contents` has a row's content digest, show the same page."""
    content_of = contents or {}
    first: dict[object, int] = {}
    first_N = np.arange(len(manifest))
    for row, path in enumerate(manifest.paths):
        if path is not None:
            first_N[row] = first.setdefault(content_of.get(row) or path, row)
    return Units(first_N, None if manifest.groups is None else _join_groups(manifest.groups, first_N))


def _join_groups(groups: Sequence[str], first_N: np.ndarray) -> list[str]:
    """Merge the groups that share images (union-find); return each row's merged group, named after one of them."""
    parent = {group: group for group in groups}

    def find(group: str) -> str:
        while parent[group] != group:
            parent[group] = group = parent[parent[group]]
        return group

    for row in np.flatnonzero(first_N != np.arange(len(first_N))).tolist():
        parent[find(groups[row])] = find(groups[int(first_N[row])])
    return [find(group) for group in groups]


def format_ids(manifest: Manifest, rows: Sequence[int]) -> str:
    """Format the rows' distinct IDs."""
    ids = dict.fromkeys(manifest.ids[row] for row in rows)
    return f"ID{'s' if len(ids) > 1 else ''} {', '.join(map(repr, ids))}"


def assign_folds(manifest: Manifest, units: Units, num_folds: int, stratify: bool, seed: int) -> FoldAssignment:
    """Assign folds by the CSV's `fold` column, else by scikit-learn's splitter for (stratify, groups).

    Rows of one unit share a fold: an image must not be both trained and validated on, under any name.

    Raises:
        UserError: the `fold` column is not exactly 0 to num_folds-1 or splits units, or there are too few units.
    """
    if manifest.folds is not None:
        return _read_fold_column(manifest, units, manifest.folds, num_folds)
    rows = np.flatnonzero(units.first_N == np.arange(len(manifest)))
    if len(rows) < num_folds:
        raise UserError(f"data.folds = {num_folds}: more folds than images ({len(rows)})")
    groups = None if units.groups is None else np.asarray([units.groups[row] for row in rows.tolist()])
    if groups is not None and len(set(groups)) < num_folds:
        raise UserError(
            f"data.folds = {num_folds}: more folds than groups in data.group_col ({len(set(groups))}; "
            "groups that share an image count as one)"
        )
    targets = manifest.targets_N[rows]
    if stratify and max(np.bincount(targets)) < num_folds:
        raise UserError(
            f"data.stratify: no class has the {num_folds} samples that data.folds needs (the largest has "
            f"{max(np.bincount(targets))}): use fewer folds, or data.stratify: false"
        )
    fold_of_row = np.full(len(rows), -1, dtype=np.int64)
    splitter = _choose_splitter(stratify, groups is not None, num_folds, derive_seed(seed, Purpose.FOLDS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # the manifest reports it, with the classes
        for fold, (_, valid) in enumerate(splitter.split(np.zeros(len(rows)), targets, groups)):
            fold_of_row[valid] = fold
    if groups is not None:
        _fill_empty(fold_of_row, groups, num_folds)
    fold_of_N = np.full(len(manifest), -1, dtype=np.int64)
    fold_of_N[rows] = fold_of_row
    return FoldAssignment(fold_of_N[units.first_N], num_folds)


def _fill_empty(fold_of_row: np.ndarray, groups: np.ndarray, num_folds: int) -> None:
    """Give each empty fold the smallest group of the largest fold that has more than one, in place.

    scikit-learn's StratifiedGroupKFold balances classes only and may leave folds empty.
    """
    while len(empty := np.setdiff1d(np.arange(num_folds), fold_of_row)):
        groups_of_fold = [np.unique(groups[fold_of_row == fold], return_counts=True) for fold in np.unique(fold_of_row)]
        names, sizes = max((found for found in groups_of_fold if len(found[0]) > 1), key=lambda found: found[1].sum())
        fold_of_row[groups == names[sizes.argmin()]] = empty[0]


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


def _read_fold_column(manifest: Manifest, units: Units, column: Sequence[str], num_folds: int) -> FoldAssignment:
    allowed = {str(fold) for fold in range(num_folds)}
    wrong = [f"line {row + 2}: {value!r}" for row, value in enumerate(column) if value.strip() not in allowed]
    if wrong:
        raise UserError(
            format_examples(f"rows whose `fold` is not one of 0 to {num_folds - 1} (data.folds = {num_folds})", wrong)
        )
    empty = sorted(allowed - {value.strip() for value in column}, key=int)
    if empty:
        raise UserError(f"column `fold`: no row is in fold {', '.join(empty)} (data.folds = {num_folds})")
    fold_of = tuple(int(value) for value in column)
    split = [
        f"lines {first + 2} and {row + 2}: {format_ids(manifest, (first, row))}"
        for row, first in enumerate(units.first_N.tolist())
        if fold_of[first] != fold_of[row]
    ]
    if split:
        raise UserError(format_examples("images in two folds of the `fold` column", split))
    _check_groups(manifest.groups or (), fold_of)
    return FoldAssignment(np.asarray(fold_of, dtype=np.int64), num_folds)


def _check_groups(groups: Sequence[str], fold_of: Sequence[int]) -> None:
    """Raise UserError if a group is in several folds."""
    folds_of_group: dict[str, set[int]] = {}
    for group, fold in zip(groups, fold_of, strict=False):
        folds_of_group.setdefault(group, set()).add(fold)
    split = [f"{group!r}: folds {sorted(folds)}" for group, folds in folds_of_group.items() if len(folds) > 1]
    if split:
        raise UserError(format_examples("groups of data.group_col in several folds of the `fold` column", split))
