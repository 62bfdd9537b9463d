"""The manifest of a CSV and an image folder: each row's ID, label and image, or one error that lists all problems."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from doccls.config.paths import check_paths
from doccls.config.schema import DataConfig
from doccls.data.image_names import ResolvedImages, resolve_images
from doccls.data.labels import find_ambiguous_labels, find_missing_labels, find_suspect_numbers, order_classes
from doccls.data.messages import format_conflict, format_examples, format_lines, format_row
from doccls.data.packed import PackedPaths, PackedTexts
from doccls.data.table import Table, read_table, require_columns
from doccls.errors import UserError


@dataclass(frozen=True, eq=False)
class Manifest:
    """All rows of train.csv, in order. A sample's index is its row (0-based) and keys all data about it."""

    ids: PackedTexts  # as written in the CSV
    lines_N: np.ndarray  # (n,) int64: the line of the CSV on which each row begins
    targets_N: np.ndarray  # (n,) int64 indices into `classes`
    classes: tuple[str, ...]  # labels as written, sorted by number if all are plain decimals, else by text
    paths: PackedPaths  # image files; None where missing (only with data.on_bad_image: skip)
    groups: PackedTexts | None  # the column data.group_col, if set
    folds: PackedTexts | None  # the CSV's own `fold` column, not yet validated
    warnings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self, row: int) -> str:
        """Return the row's line and ID, for messages."""
        return format_row(int(self.lines_N[row]), self.ids[row])

    def format_lines(self, rows: Sequence[int]) -> str:
        """Return the line numbers of the rows, for messages."""
        return format_lines(self.lines_N[list(rows)].tolist())


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
    ids, labels = table.cells[data.id_col], [label.strip() for label in table.cells[data.target_col]]
    groups = table.cells[data.group_col] if data.group_col else None
    missing = find_missing_labels(labels, data.missing_labels)
    counts = Counter(label for label in labels if label not in missing)
    classes = order_classes(counts)
    images = resolve_images(ids, table.lines_N.tolist(), data.image_dir_train, data.image_ext)

    def describe(row: int) -> str:
        return format_row(int(table.lines_N[row]), ids[row])

    findings = [
        *(Finding(warning, is_problem=False) for warning in table.warnings),
        *_check_fold_name(table.columns),
        *_check_labels(describe, labels, missing, classes, data.target_col),
        *_check_images(images, data),
        *_check_repeated_images(table, labels, images.names, data),
        *_check_groups(describe, groups, data),
    ]
    problems = [finding.message for finding in findings if finding.is_problem]
    if problems:
        raise UserError(f"{data.train_csv}: the data can't be used\n" + "\n".join(f"- {line}" for line in problems))
    findings += _check_class_counts(counts, classes, data.folds)
    number_of = {label: number for number, label in enumerate(classes)}
    return Manifest(
        ids=PackedTexts(ids),
        lines_N=table.lines_N,
        targets_N=np.asarray([number_of[label] for label in labels], dtype=np.int64),
        classes=classes,
        paths=PackedPaths(data.image_dir_train, images.names),
        groups=None if groups is None else PackedTexts(groups),
        folds=PackedTexts(table.cells["fold"]) if "fold" in table.cells else None,
        warnings=tuple(finding.message for finding in findings),
    )


def _read_train_table(data: DataConfig) -> Table:
    """Read train.csv and check that it has the columns that the config names and at least one row."""
    check_paths({"data.train_csv": (data.train_csv, "file"), "data.image_dir_train": (data.image_dir_train, "folder")})
    required = {"data.id_col": data.id_col, "data.target_col": data.target_col}
    if data.group_col:
        required["data.group_col"] = data.group_col
    table = read_table(data.train_csv, "data.train_csv", [*required.values(), "fold"])
    require_columns(table, data.train_csv, required)
    return table


def _check_fold_name(columns: Sequence[str]) -> list[Finding]:
    """Warn of columns whose name is nearly `fold`, which are not used."""
    near = [name for name in columns if name != "fold" and name.strip().lower() in ("fold", "folds")]
    message = f"columns {', '.join(map(repr, near))} don't assign the folds: the name must be `fold`"
    return [Finding(message, is_problem=False)] if near and "fold" not in columns else []


def _check_labels(
    describe: Callable[[int], str],
    labels: Sequence[str],
    missing: frozenset[str],
    classes: Sequence[str],
    column: str,
) -> list[Finding]:
    """Check for rows without a label, fewer than two classes, and classes that a reader would take for one."""
    findings = []
    if missing:
        unlabelled = [f"{describe(row)}: {label!r}" for row, label in enumerate(labels) if label in missing]
        heading = f"rows without a {column!r} (data.missing_labels lists the texts that count as missing)"
        findings.append(Finding(format_examples(heading, unlabelled)))
    elif len(classes) < 2:
        findings.append(Finding(f"every row has the label {classes[0]!r}: at least two classes are needed"))
    return findings + [Finding(message) for message in find_ambiguous_labels(classes)]


def _check_images(images: ResolvedImages, data: DataConfig) -> list[Finding]:
    """Check for IDs that leave the image folder and for missing images."""
    findings = [] if images.refused is None else [Finding(images.refused)]
    if images.missing:
        heading = f"images missing in {data.image_dir_train} (data.image_dir_train)"
        findings.append(Finding(format_examples(heading, images.missing), data.on_bad_image != "skip"))
    return findings


def _check_repeated_images(
    table: Table, labels: Sequence[str], names: Sequence[str | None], data: DataConfig
) -> list[Finding]:
    """Check for images that several rows name."""
    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            rows_of.setdefault(name, []).append(row)
    ids, lines = table.cells[data.id_col], table.lines_N
    repeated = [
        f"lines {format_lines(lines[rows].tolist())}: ID {ids[rows[0]]!r}"
        f"{format_conflict([labels[row] for row in rows])}"
        for rows in rows_of.values()
        if len(rows) > 1
    ]
    if not repeated:
        return []
    message = format_examples("images named by more than one row", repeated)
    return [Finding(f"{message}\n  (data.on_duplicate: keep | error | allow)", data.on_duplicate == "error")]


def _check_groups(describe: Callable[[int], str], groups: Sequence[str] | None, data: DataConfig) -> list[Finding]:
    """Check for rows with an empty group, and warn of groups that read like a missing value: they form one group."""
    if groups is None:
        return []
    missing = find_missing_labels((group.strip() for group in groups), data.missing_labels)
    empty = [describe(row) for row, group in enumerate(groups) if not group.strip()]
    suspect = [f"{describe(row)}: {group!r}" for row, group in enumerate(groups) if group.strip() in missing]
    if empty:
        return [Finding(format_examples(f"rows with an empty {data.group_col!r}", empty))]
    heading = f"rows whose {data.group_col!r} reads like a missing value, which makes one group of them"
    return [Finding(format_examples(heading, suspect), is_problem=False)] if suspect else []


def _check_class_counts(counts: Mapping[str, int], classes: Sequence[str], num_folds: int) -> list[Finding]:
    """Warn of classes with fewer samples than there are folds, and of one number in two classes."""
    small = [f"{label} ({counts[label]})" for label in classes if counts[label] < num_folds]
    heading = f"classes with fewer samples than the {num_folds} folds (missing from some folds)"
    findings = [format_examples(heading, small)] if small else []
    if same := find_suspect_numbers(classes):
        findings.append(format_examples("classes that are the same number, spelled differently", same))
    return [Finding(message, is_problem=False) for message in findings]
