"""The manifest of a CSV and an image folder: each row's ID, label and image, or one error that lists all problems."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pandas as pd

from doccls.config.paths import check_paths, list_files
from doccls.config.schema import IMAGE_EXTENSIONS, DataConfig
from doccls.data.packed import PackedPaths, PackedTexts
from doccls.errors import UserError

_MISSING_LABELS = {"", "nan", "none", "null", "na", "n/a", "<na>"}
_MAX_EXAMPLES = 10


@dataclass(frozen=True, eq=False)
class Manifest:
    """All rows of train.csv, in order. A sample's index is its row (0-based) and keys all data about it."""

    ids: PackedTexts  # as written in the CSV
    targets_N: np.ndarray  # (n,) int64 indices into `classes`
    classes: tuple[str, ...]  # labels as written, sorted by number if all are numbers, else by text
    paths: PackedPaths  # image files; None where missing (only with data.on_bad_image: skip)
    groups: PackedTexts | None  # the column data.group_col, if set
    folds: PackedTexts | None  # the CSV's own `fold` column, not yet validated
    warnings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ResolvedImages:
    """The image file of each ID, and the IDs without one."""

    names: tuple[str | None, ...]  # file name per ID, relative to the image folder; None where there is no file
    missing: tuple[str, ...]  # a line per ID without a file, with the paths that were tried
    refused: str | None  # a message about IDs that are empty or leave the folder; None if there are none


@dataclass(frozen=True)
class Finding:
    """A problem, with which training can't start, or a warning about the data."""

    message: str
    is_problem: bool = True


def read_manifest(data: DataConfig) -> Manifest:
    """Read train.csv and find each row's image.

    Raises:
        UserError: the CSV, its columns, labels or IDs are invalid, or images are missing; lists all problems.
    """
    table = _read_train_table(data)
    ids, labels = tuple(table[data.id_col]), [label.strip() for label in table[data.target_col]]
    classes = order_classes(label for label in labels if not _is_missing(label))
    images = resolve_images(ids, data.image_dir_train, data.image_ext)
    findings = [
        *_check_labels(ids, labels, classes, data.target_col),
        *_check_images(images, data),
        *_check_repeated_images(ids, labels, images.names, data),
        *_check_groups(ids, table, data.group_col),
    ]
    problems = [finding.message for finding in findings if finding.is_problem]
    if problems:
        raise UserError(f"{data.train_csv}: the data can't be used\n" + "\n".join(f"- {line}" for line in problems))
    findings += _check_class_sizes(labels, classes, data.folds)
    number_of = {label: number for number, label in enumerate(classes)}
    return Manifest(
        ids=PackedTexts(ids),
        targets_N=np.asarray([number_of[label] for label in labels], dtype=np.int64),
        classes=classes,
        paths=PackedPaths(data.image_dir_train, images.names),
        groups=PackedTexts(table[data.group_col]) if data.group_col else None,
        folds=PackedTexts(table["fold"]) if "fold" in table.columns else None,
        warnings=tuple(finding.message for finding in findings),
    )


def _read_train_table(data: DataConfig) -> pd.DataFrame:
    """Read train.csv and check that it has the columns that the config names and at least one row."""
    check_paths({"data.train_csv": (data.train_csv, "file"), "data.image_dir_train": (data.image_dir_train, "folder")})
    table = read_table(data.train_csv, "data.train_csv")
    required = {"data.id_col": data.id_col, "data.target_col": data.target_col}
    if data.group_col:
        required["data.group_col"] = data.group_col
    missing = [f"{key} = {column!r}" for key, column in required.items() if column not in table.columns]
    if missing:
        present = ", ".join(map(repr, table.columns))
        raise UserError(f"{data.train_csv}: no such column: {', '.join(missing)}; it has: {present}")
    if table.empty:
        raise UserError(f"{data.train_csv}: no rows")
    return table


def _check_labels(ids: Sequence[str], labels: Sequence[str], classes: Sequence[str], column: str) -> list[Finding]:
    """Check for rows without a label, fewer than two classes, and labels that spell one number differently."""
    findings = []
    unlabelled = [format_row(ids, row) for row, label in enumerate(labels) if _is_missing(label)]
    if unlabelled:
        heading = f"rows without a {column!r} (empty, nan, na, n/a, none, null)"
        findings.append(Finding(format_examples(heading, unlabelled)))
    elif len(classes) < 2:
        findings.append(Finding(f"every row has the label {classes[0]!r}: at least two classes are needed"))
    return findings + [
        Finding(f"labels {', '.join(map(repr, spellings))} are the same number, spelled differently")
        for spellings in _find_alternative_spellings(classes)
    ]


def _check_images(images: ResolvedImages, data: DataConfig) -> list[Finding]:
    """Check for IDs that leave the image folder and for missing images."""
    findings = [] if images.refused is None else [Finding(images.refused)]
    if images.missing:
        heading = f"images missing in {data.image_dir_train} (data.image_dir_train)"
        findings.append(Finding(format_examples(heading, images.missing), data.on_bad_image != "skip"))
    return findings


def _check_repeated_images(
    ids: Sequence[str], labels: Sequence[str], names: Sequence[str | None], data: DataConfig
) -> list[Finding]:
    """Check for images that several rows name."""
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            rows_of.setdefault(name, []).append(row)
    repeated = [
        f"lines {format_lines(rows)}: ID {ids[rows[0]]!r}{format_conflict([labels[row] for row in rows])}"
        for rows in rows_of.values()
        if len(rows) > 1
    ]
    if not repeated:
        return []
    message = format_examples("images named by more than one row", repeated)
    return [Finding(f"{message}\n  (data.on_duplicate: keep | error)", data.on_duplicate != "keep")]


def _check_groups(ids: Sequence[str], table: pd.DataFrame, column: str | None) -> list[Finding]:
    """Check for rows with an empty group."""
    groups = table[column] if column else ()
    empty = [format_row(ids, row) for row, group in enumerate(groups) if not group.strip()]
    return [Finding(format_examples(f"rows with an empty {column!r}", empty))] if empty else []


def _check_class_sizes(labels: Sequence[str], classes: Sequence[str], num_folds: int) -> list[Finding]:
    """Warn of classes with fewer samples than there are folds."""
    counts = Counter(labels)
    small = [f"{label} ({counts[label]})" for label in classes if counts[label] < num_folds]
    heading = f"classes with fewer samples than the {num_folds} folds (missing from some folds)"
    return [Finding(format_examples(heading, small), is_problem=False)] if small else []


def read_table(path: Path, key: str) -> pd.DataFrame:
    """Read the CSV at `path` with every cell as text, so that an ID `NA` or `007` stays as written.

    Raises:
        UserError: the file is not readable as CSV; names `key`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with more cells than the header
            return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False)
    except (
        OSError,
        UnicodeDecodeError,
        pd.errors.ParserError,
        pd.errors.ParserWarning,
        pd.errors.EmptyDataError,
    ) as error:
        raise UserError(f"{key}: can't read {path}: {error}") from error


def order_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort the distinct labels, by number if all are numbers, else by text."""
    distinct = set(labels)
    try:
        return tuple(sorted(distinct, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(distinct))


def resolve_images(ids: Iterable[str], folder: Path, image_ext: str) -> ResolvedImages:
    """Find each ID's image file in `folder`; reject IDs that are absolute, contain `..` or are empty."""
    folders = _Folders(folder)
    names: list[str | None] = []
    missing: list[str] = []
    escaping: list[str] = []
    for row, sample_id in enumerate(ids):
        name = None
        if _leaves_folder(sample_id):
            escaping.append(f"line {row + 2}: ID {sample_id!r}")
        else:
            candidates = list_candidates(sample_id, image_ext)
            name = next((match for candidate in candidates if (match := folders.find(candidate))), None)
            if name is None:
                tried = ", ".join(str(folder / candidate) for candidate in candidates)
                missing.append(f"line {row + 2}: ID {sample_id!r}: tried {tried}")
        names.append(name)
    heading = "IDs that are empty or leave the image folder (absolute, or with `..`)"
    return ResolvedImages(tuple(names), tuple(missing), format_examples(heading, escaping) if escaping else None)


def list_candidates(sample_id: str, image_ext: str) -> tuple[str, ...]:
    """Return the file names to try, in order. Nothing is appended to a known extension: never `x.jpg.jpg`."""
    if PurePosixPath(sample_id).suffix.lower() in IMAGE_EXTENSIONS:
        return (sample_id,)
    others = (extension for extension in IMAGE_EXTENSIONS if extension != image_ext)
    return tuple(f"{sample_id}{extension}" for extension in (image_ext, *others))


def _leaves_folder(sample_id: str) -> bool:
    posix, windows = PurePosixPath(sample_id), PureWindowsPath(sample_id)
    return (
        not sample_id.strip()
        or "\0" in sample_id
        or posix.is_absolute()
        or bool(windows.drive or windows.root)
        or ".." in windows.parts
    )


class _Folders:
    """Cached listings of a folder and its subfolders: name -> name, and lower-case name -> first such name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listings: dict[str, dict[str, str] | None] = {}

    def find(self, path: str) -> str | None:
        """Return `path`, relative to the root, if that file exists, else the file whose name differs only in case."""
        path = os.path.normpath(path)  # so that `./x.jpg` and `x.jpg` give one name
        folder, name = os.path.split(path)
        if folder not in self._listings:
            self._listings[folder] = self._read(self._root / folder)
        names = self._listings[folder]
        if names is None:
            return path
        match = names.get(name) or names.get(name.lower())
        return f"{folder}/{match}" if match and folder else match

    @staticmethod
    def _read(folder: Path) -> dict[str, str] | None:
        """Return the listing; None for a folder that can't be listed, whose files the scan reports."""
        try:
            files = sorted(list_files(folder))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError):
            return None
        return {name.lower(): name for name in reversed(files)} | {name: name for name in files}


def _is_missing(label: str) -> bool:
    return label.lower() in _MISSING_LABELS


def _find_alternative_spellings(classes: Sequence[str]) -> list[list[str]]:
    """Find labels that are the same number, if all labels are numbers."""
    spellings: dict[float, list[str]] = {}
    for label in classes:
        try:
            spellings.setdefault(float(label), []).append(label)
        except ValueError:
            return []
    return [same for same in spellings.values() if len(same) > 1]


def format_row(ids: Sequence[str], row: int) -> str:
    """Format a row by its line in the CSV and its ID."""
    return f"line {row + 2}: ID {ids[row]!r}"


def format_lines(rows: Iterable[int]) -> str:
    """Format the rows' line numbers in the CSV."""
    return " and ".join(str(row + 2) for row in rows)


def format_conflict(labels: list[str]) -> str:
    """Format a note about rows of one image whose labels differ; empty if they agree."""
    return f", labels differ: {labels}" if len(set(labels)) > 1 else ""


def format_examples(heading: str, examples: Sequence[str], shown: int = _MAX_EXAMPLES) -> str:
    """Format a heading with the number of examples, followed by the first `shown` of them."""
    lines = "\n".join(f"    {line}" for line in examples[:shown])
    more = f"\n    ... and {len(examples) - shown} more" if len(examples) > shown else ""
    return f"{heading}: {len(examples)}\n{lines}{more}"
