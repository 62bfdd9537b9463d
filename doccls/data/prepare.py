"""Everything that is known of the data before training starts, found in one pass: `PreparedData`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from doccls.config.schema import Config
from doccls.data.balance import count_classes, find_scarce, find_unseen, render_counts
from doccls.data.folds import FoldAssignment, assign_folds, find_units, tell_ids
from doccls.data.inspection import ImageLook
from doccls.data.look import look_at_images
from doccls.data.manifest import DataError, Manifest, read_manifest, tell
from doccls.data.store import StoreChoice, StoredPages, locate_pages
from doccls.run.progress import Teller
from doccls.run.runlog import RunLog

_SILENT = RunLog(None)


@dataclass(frozen=True, eq=False)
class PreparedData:
    """The manifest, its folds, and which rows can be used."""

    manifest: Manifest
    assignment: FoldAssignment
    counts_CF: np.ndarray
    """Usable rows of each class in each fold: (classes, folds) int64."""
    skipped: frozenset[int]
    """Rows without a usable image (only with data.on_bad_image: skip): never trained on, NaN in the OOF logits."""
    digest: str
    """SHA-256 over each row's image content, label and group: not over how IDs are spelled or where files lie."""
    warnings: tuple[str, ...]
    looks: Mapping[Path, ImageLook]
    """What was found in each image file."""
    stored: StoredPages | None = None
    """Their decoded pages, where there is a store."""

    def list_train(self, fold: int) -> np.ndarray:
        """Usable rows trained on in `fold`, ascending, int64."""
        return self._usable(self.assignment.list_train(fold))

    def list_valid(self, fold: int) -> np.ndarray:
        """Usable rows validated in `fold`, ascending, int64."""
        return self._usable(self.assignment.list_valid(fold))

    def _usable(self, rows: np.ndarray) -> np.ndarray:
        return rows[~np.isin(rows, sorted(self.skipped))]


def prepare_data(
    config: Config,
    known: Mapping[Path, ImageLook] | None = None,
    store: StoreChoice | None = None,
    teller: Teller = _SILENT,
) -> PreparedData:
    """Read the CSV, look at every image that is not `known` and unchanged, assign the folds.

    With a store, each usable page is in it then; what is not is decoded, by one of several that come at once.

    Raises:
        StoreError, WriteError, LockError: the store can't be filled, and was named.
        DataError: whatever is wrong with the CSV, the images or the folds; all of one stage in one message.
    """
    data = config.data
    manifest = read_manifest(data)
    split = partial(assign_folds, manifest, num_folds=data.folds, stratify=data.stratify, seed=config.project.seed)
    units = find_units(manifest)
    assignment = split(units)  # what is wrong without a look at the images is told before it
    files = sorted({path for path in manifest.paths if path is not None})
    looked = look_at_images(files, known or {}, config.page_px, data.max_image_pixels, store, teller)
    looks = looked.looks
    digests, bad = _sort_rows(manifest, looks)
    contents = _list_contents(manifest, looks)
    warnings = list(manifest.warnings)
    twins = _tell_twins(manifest, contents)
    if twins and data.on_duplicate == "error":
        raise DataError(f"{twins}\n(data.on_duplicate: keep puts them into one fold)")
    if twins:
        warnings.append(f"{twins}\n  (data.on_duplicate: keep | error)")
        units = find_units(manifest, contents)
        assignment = split(units)
    if bad:
        line = tell(
            "images that can't be used",
            [f"{_name(manifest, row)}: {problem}" for row, problem in bad.items()],
            shown=len(bad),
        )
        if data.on_bad_image == "error":
            raise DataError(f"{line}\n(data.on_bad_image: skip leaves such rows out)")
        warnings.append(line)
    several = [f"{path}: {look.fact.pages}" for path, look in looks.items() if look.fact.pages > 1]
    if several:
        warnings.append(tell("files of several pages, of which the first is used", several))
    skipped = frozenset(bad).union(manifest.paths.find_missing().tolist())
    if skipped:
        warnings.append(f"{len(skipped)} rows are left out of training; their OOF logits will be NaN")
    rows = [
        (
            "" if row in skipped else digests[row],
            manifest.classes[target],
            manifest.groups[row] if manifest.groups else "",
        )
        for row, target in enumerate(manifest.targets_N)
    ]
    digest = hashlib.sha256(json.dumps([manifest.classes, rows]).encode()).hexdigest()
    usable = np.setdiff1d(np.arange(len(manifest)), sorted(skipped))
    targets_N, fold_of_N = manifest.targets_N[usable], assignment.fold_of_N[usable]
    counts_CF = count_classes(targets_N, fold_of_N, len(manifest.classes), data.folds)
    warnings += find_unseen(manifest.classes, counts_CF)
    if units.groups is not None and data.group_col is not None:
        group_of_N = np.unique([units.groups[row] for row in usable.tolist()], return_inverse=True)[1]
        warnings += find_scarce(manifest.classes, targets_N, group_of_N, data.group_col, data.folds)
    found = [None if row in skipped else digests[row] for row in range(len(manifest))]
    stored = None if looked.index is None else locate_pages(looked.index, found)
    prepared = PreparedData(manifest, assignment, counts_CF, skipped, digest, tuple(warnings), looks, stored)
    for fold in range(data.folds):
        for rows_of, what in ((prepared.list_train(fold), "train on"), (prepared.list_valid(fold), "validate on")):
            if len(rows_of) == 0:
                raise DataError(f"fold {fold}: no usable image is left to {what}")
    return prepared


def describe_folds(data: PreparedData) -> list[str]:
    """Lines for the log: rows of each fold, and the usable ones of each class in fold 0, 1, ..."""
    counts = render_counts(data.manifest.classes, data.counts_CF)
    return [f"distribution={data.assignment.count()}", *(f"class {line}" for line in counts)]


def _list_contents(manifest: Manifest, looks: Mapping[Path, ImageLook]) -> dict[int, str]:
    """Row -> digest of what its image shows, of those rows that have a usable one."""
    found = {row: looks[path].fact.content for row, path in enumerate(manifest.paths) if path is not None}
    return {row: content for row, content in found.items() if content}


def _tell_twins(manifest: Manifest, contents: Mapping[int, str]) -> str | None:
    """Images that are there under several names; one name in several rows is told by the manifest."""
    rows_of: dict[str, list[int]] = {}
    for row, content in contents.items():
        rows_of.setdefault(content, []).append(row)
    twins = []
    for rows in rows_of.values():
        if len(rows) > 1 and len({manifest.paths[row] for row in rows}) > 1:
            labels = [manifest.classes[manifest.targets_N[row]] for row in rows]
            differ = f", labels differ: {labels}" if len(set(labels)) > 1 else ""
            twins.append(
                (not differ, f"lines {' and '.join(str(row + 2) for row in rows)}: {tell_ids(manifest, rows)}{differ}")
            )
    conflicts = sum(not agree for agree, _ in twins)
    what = f"images that lie under several names and share a fold ({conflicts} of them with labels that differ)"
    return tell(what, [line for _, line in sorted(twins, key=lambda one: one[0])]) if twins else None


def _sort_rows(manifest: Manifest, looks: Mapping[Path, ImageLook]) -> tuple[dict[int, str], dict[int, str]]:
    """(row -> digest, row -> problem) of the rows that name a file."""
    digests, bad = {}, {}
    for row, path in enumerate(manifest.paths):
        if path is not None:
            fact = looks[path].fact
            digests[row] = fact.digest
            if fact.problem is not None:
                bad[row] = f"{path}: {fact.problem}"
    return digests, bad


def _name(manifest: Manifest, row: int) -> str:
    return f"line {row + 2}: ID {manifest.ids[row]!r}"
