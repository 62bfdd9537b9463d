"""Assignment of the manifest's rows to folds: pure functions."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from doccls.data.labels import parse_decimal
from doccls.data.manifest import Manifest
from doccls.data.messages import format_examples
from doccls.errors import UserError
from doccls.randomness import Purpose, derive_seed


@dataclass(frozen=True, eq=False)
class FoldAssignment:
    """The fold of each row: row i is validated in fold `fold_of_N[i]` and trained on in every other."""

    fold_of_N: np.ndarray  # (n,) int64
    num_folds: int
    split: frozenset[int] = frozenset()  # rows whose image is in several folds (only with data.on_duplicate: allow)

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
    first: dict[tuple[str, bool], int] = {}
    first_N = np.arange(len(manifest))
    for row, name in enumerate(manifest.paths.names):
        if name:
            content = content_of.get(row)
            first_N[row] = first.setdefault((content or name, bool(content)), row)
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


def assign_folds(
    manifest: Manifest, units: Units, num_folds: int, stratify: bool, seed: int, allow_split: bool = False
) -> FoldAssignment:
    """Assign folds by the CSV's `fold` column, else by scikit-learn's splitter for (stratify, groups).

    Rows of one unit share a fold: an image must not be both trained and validated on, under any name. With
    `allow_split`, a `fold` column may split the rows of an image.

    Raises:
        UserError: the `fold` column is not exactly 0 to num_folds-1 or splits units, or there are too few units.
    """
    if manifest.folds is not None:
        return _read_fold_column(manifest, units, manifest.folds, num_folds, allow_split)
    rows = np.flatnonzero(units.first_N == np.arange(len(manifest)))
    if len(rows) < num_folds:
        raise UserError(f"data.folds = {num_folds}: more folds than images ({len(rows)})")
    groups = None if units.groups is None else _number_by_order([units.groups[row] for row in rows.tolist()])
    if groups is not None and groups.max() + 1 < num_folds:
        raise UserError(
            f"data.folds = {num_folds}: more folds than groups in data.group_col ({groups.max() + 1}; "
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


def _number_by_order(names: Sequence[str]) -> np.ndarray:
    """Return each name's number among the sorted distinct ones: (n,) int64, smaller than an array of long names."""
    number_of = {name: number for number, name in enumerate(sorted(set(names)))}
    return np.asarray([number_of[name] for name in names], dtype=np.int64)


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


def _read_fold_column(
    manifest: Manifest, units: Units, column: Sequence[str], num_folds: int, allow_split: bool
) -> FoldAssignment:
    number_of = {value: parse_decimal(value.strip()) for value in set(column)}
    allowed = frozenset(range(num_folds))
    fold_of = [number_of[value] for value in column]
    wrong = [
        f"line {manifest.lines_N[row]}: {column[row]!r}" for row, number in enumerate(fold_of) if number not in allowed
    ]
    if wrong:
        raise UserError(
            format_examples(f"rows whose `fold` is not one of 0 to {num_folds - 1} (data.folds = {num_folds})", wrong)
        )
    fold_of_N = np.asarray([int(number) for number in fold_of if number is not None], dtype=np.int64)
    empty = sorted(allowed - set(fold_of_N.tolist()))
    if empty:
        raise UserError(f"column `fold`: no row is in fold {', '.join(map(str, empty))} (data.folds = {num_folds})")
    is_split = np.isin(units.first_N, units.first_N[fold_of_N != fold_of_N[units.first_N]])
    rows_of: dict[int, list[int]] = {}
    for row in np.flatnonzero(is_split).tolist():
        rows_of.setdefault(int(units.first_N[row]), []).append(row)
    if rows_of and not allow_split:
        examples = [
            f"lines {manifest.format_lines(rows)}: {format_ids(manifest, rows)}, folds {fold_of_N[rows].tolist()}"
            for rows in rows_of.values()
        ]
        raise UserError(
            f"{format_examples('images in two folds of the `fold` column', examples)}\n"
            "(correct the column, or remove it so that doccls assigns the folds; data.on_duplicate: allow keeps it as "
            "it is, with scores that are too high)"
        )
    _check_groups(manifest.groups or (), fold_of_N.tolist())
    return FoldAssignment(fold_of_N, num_folds, frozenset(np.flatnonzero(is_split).tolist()))


def _check_groups(groups: Sequence[str], fold_of: Sequence[int]) -> None:
    """Raise UserError if a group is in several folds."""
    folds_of_group: dict[str, set[int]] = {}
    for group, fold in zip(groups, fold_of, strict=False):
        folds_of_group.setdefault(group, set()).add(fold)
    split = [f"{group!r}: folds {sorted(folds)}" for group, folds in folds_of_group.items() if len(folds) > 1]
    if split:
        message = format_examples("groups of data.group_col in several folds of the `fold` column", split)
        raise UserError(f"{message}\n(correct or remove the column, or remove data.group_col)")
