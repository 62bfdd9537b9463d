"""Preparation of the data before training: manifest, scan, folds and class counts, in one pass."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from doccls.config.schema import Config, DataConfig
from doccls.data.class_counts import count_classes, find_scarce, find_unseen, render_counts
from doccls.data.folds import FoldAssignment, assign_folds, find_units, format_ids
from doccls.data.image_scan import ImageScan
from doccls.data.images import PIXEL_RULE
from doccls.data.manifest import Manifest, read_manifest
from doccls.data.messages import format_conflict, format_examples
from doccls.data.scan import ScannedRows, scan_rows
from doccls.data.store import StoreChoice, StoredPages
from doccls.errors import UserError
from doccls.reporting.log import RunLog
from doccls.reporting.progress import Reporter

_SILENT = RunLog(None)


@dataclass(frozen=True, eq=False)
class PreparedData:
    """The manifest, its folds, the usable rows and the scans of their images."""

    manifest: Manifest
    assignment: FoldAssignment
    counts_CF: np.ndarray  # usable rows of each class in each fold: (classes, folds) int64
    # Rows without a usable image (only with data.on_bad_image: skip): never trained on, NaN in the OOF logits.
    skipped: frozenset[int]
    digest: str  # SHA-256 of each row's file digest, label and group; independent of ID spelling and file locations
    warnings: tuple[str, ...]
    scans: Mapping[Path, ImageScan]
    scans_in_store: bool = False  # whether the store holds `scans` for the next process
    stored: StoredPages | None = None  # decoded pages, if there is a store

    def list_train(self, fold: int) -> np.ndarray:
        """Return the usable rows trained on in `fold`, ascending, int64."""
        return self._usable(self.assignment.list_train(fold))

    def list_valid(self, fold: int) -> np.ndarray:
        """Return the usable rows validated in `fold`, ascending, int64."""
        return self._usable(self.assignment.list_valid(fold))

    def _usable(self, rows: np.ndarray) -> np.ndarray:
        return rows[~np.isin(rows, sorted(self.skipped))]


def prepare_data(
    config: Config,
    cache: Mapping[Path, ImageScan] | None = None,
    store: StoreChoice | None = None,
    reporter: Reporter = _SILENT,
) -> PreparedData:
    """Read the CSV, scan every image that is new or changed since it was cached, and assign the folds.

    A store holds each usable page afterwards; of several processes that start at once, one decodes.

    Raises:
        StoreError, WriteError, LockError: the store can't be filled, and data.store names it.
        UserError: the CSV, the images or the folds are invalid; lists all problems of one stage.
    """
    data = config.data
    manifest = read_manifest(data)
    split = partial(
        assign_folds,
        manifest,
        num_folds=data.folds,
        stratify=data.stratify,
        seed=config.project.seed if data.fold_seed is None else data.fold_seed,
        allow_split=data.on_duplicate == "allow",
    )
    units = find_units(manifest)
    assignment = split(units)  # before the images are read, so that invalid folds are reported early
    rows = scan_rows(manifest.paths, config, cache or {}, store, reporter)
    warnings = [*manifest.warnings, *_list_idle_keys(manifest, data)]
    contents = {row: fact.content for row, fact in enumerate(rows.usable) if fact is not None}
    duplicates = _describe_duplicates(manifest, contents)
    if duplicates is not None:
        if data.on_duplicate == "error":
            raise UserError(f"{duplicates}\n(data.on_duplicate: keep puts them in one fold)")
        is_split = data.on_duplicate == "allow" and manifest.folds is not None
        kept = "kept in the folds of the `fold` column" if is_split else "kept in one fold"
        warnings.append(f"{duplicates}\n  ({kept}; data.on_duplicate: keep | error | allow)")
        units = find_units(manifest, contents)
        assignment = split(units)
    if assignment.split:
        examples = [manifest.describe(row) for row in sorted(assignment.split)]
        heading = "rows validated by a model that trained on their image (data.on_duplicate: allow)"
        warnings.append(format_examples(heading, examples))
    warnings += _check_images(manifest, rows, data.on_bad_image == "skip")
    usable = np.flatnonzero([fact is not None for fact in rows.usable])
    counts_CF = count_classes(
        manifest.targets_N[usable], assignment.fold_of_N[usable], len(manifest.classes), data.folds
    )
    warnings += find_unseen(manifest.classes, counts_CF)
    if units.groups is not None and data.group_col is not None:
        number_of: dict[str, int] = {}
        groups = (units.groups[row] for row in usable.tolist())
        group_of_N = np.asarray([number_of.setdefault(group, len(number_of)) for group in groups], dtype=np.int64)
        warnings += find_scarce(manifest.classes, manifest.targets_N[usable], group_of_N, data.group_col, data.folds)
    prepared = PreparedData(
        manifest, assignment, counts_CF, rows.skipped, _derive_digest(manifest, rows), tuple(warnings),
        rows.files.scans, rows.files.in_store, rows.stored,
    )  # fmt: skip
    _check_folds(prepared)
    return prepared


def _list_idle_keys(manifest: Manifest, data: DataConfig) -> list[str]:
    """Return a warning for each key whose work the CSV's `fold` column does."""
    if manifest.folds is None:
        allow = "data.on_duplicate = allow acts like keep, since the CSV has no column `fold`"
        return [allow] if data.on_duplicate == "allow" else []
    idle = [] if data.stratify else ["data.stratify = false has no effect, since the CSV's column `fold` assigns folds"]
    if data.group_col is not None:
        idle.append(
            f"data.group_col = {data.group_col!r} assigns no folds, since the CSV's column `fold` does; it is only "
            "checked that no group spans two"
        )
    return idle


def describe_folds(data: PreparedData) -> list[str]:
    """Render log lines: the rows of each fold, and the usable rows of each class in fold 0, 1, ..."""
    counts = render_counts(data.manifest.classes, data.counts_CF)
    return [f"distribution={data.assignment.count()}", *(f"class {line}" for line in counts)]


def _describe_duplicates(manifest: Manifest, contents: Mapping[int, str]) -> str | None:
    """Format the duplicate images under different names, if any; the manifest reports one name in several rows."""
    names = list(manifest.paths.names)
    rows_of: dict[str, list[int]] = {}
    for row, content in contents.items():
        rows_of.setdefault(content, []).append(row)
    agreeing: list[str] = []
    conflicting: list[str] = []
    for rows in rows_of.values():
        if len(rows) > 1 and len({names[row] for row in rows}) > 1:
            conflict = format_conflict([manifest.classes[manifest.targets_N[row]] for row in rows])
            line = f"lines {manifest.format_lines(rows)}: {format_ids(manifest, rows)}{conflict}"
            (conflicting if conflict else agreeing).append(line)
    heading = f"duplicate images under different file names ({len(conflicting)} with conflicting labels)"
    return format_examples(heading, conflicting + agreeing) if conflicting or agreeing else None


def _check_images(manifest: Manifest, rows: ScannedRows, skip_bad: bool) -> list[str]:
    """Return the warnings about the image files.

    Raises:
        UserError: some can't be used, and data.on_bad_image is not `skip`.
    """
    warnings = []
    if rows.bad:
        bad = [f"{manifest.describe(row)}: {manifest.paths[row]}: {why}" for row, why in rows.bad.items()]
        message = format_examples("images that can't be used", bad, shown=len(bad))
        if not skip_bad:
            raise UserError(f"{message}\n(data.on_bad_image: skip leaves these rows out)")
        warnings.append(message)
    multi_page = [f"{path}: {scan.fact.pages}" for path, scan in rows.files.scans.items() if scan.fact.pages > 1]
    if multi_page:
        warnings.append(format_examples("multi-page files (only the first page is used)", multi_page))
    if rows.skipped:
        warnings.append(f"{len(rows.skipped)} rows are left out of training; their OOF logits will be NaN")
    return warnings


def _derive_digest(manifest: Manifest, rows: ScannedRows) -> str:
    """Return the SHA-256 of each row's file digest, label and group, and of the rule that makes pixels of files."""
    groups = manifest.groups or [""] * len(manifest)
    row_keys = [
        ("" if fact is None else fact.digest, manifest.classes[target], group)
        for fact, target, group in zip(rows.usable, manifest.targets_N, groups, strict=True)
    ]
    return hashlib.sha256(json.dumps([PIXEL_RULE, manifest.classes, row_keys]).encode()).hexdigest()


def _check_folds(data: PreparedData) -> None:
    """Raise UserError if a fold has nothing to train or validate on."""
    for fold in range(data.assignment.num_folds):
        for rows, purpose in ((data.list_train(fold), "train on"), (data.list_valid(fold), "validate on")):
            if len(rows) == 0:
                raise UserError(f"fold {fold}: no usable image is left to {purpose}")
