"""Everything that is known of the data before training starts, found in one pass: `PreparedData`."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from doccls.config.schema import Config
from doccls.data.folds import FoldAssignment, assign_folds
from doccls.data.images import inspect_images
from doccls.data.manifest import DataError, Manifest, read_manifest, tell

_MAX_THREADS = 32


@dataclass(frozen=True)
class PreparedData:
    """The manifest, its folds, and which rows can be used."""

    manifest: Manifest
    assignment: FoldAssignment
    skipped: frozenset[int]
    """Rows without a usable image (only with data.on_bad_image: skip): never trained on, NaN in the OOF logits."""
    digest: str
    """SHA-256 over each row's image content, label and group: not over how IDs are spelled or where files lie."""
    warnings: tuple[str, ...]

    def list_train(self, fold: int) -> np.ndarray:
        """Usable rows trained on in `fold`, ascending, int64."""
        return self._usable(self.assignment.list_train(fold))

    def list_valid(self, fold: int) -> np.ndarray:
        """Usable rows validated in `fold`, ascending, int64."""
        return self._usable(self.assignment.list_valid(fold))

    def _usable(self, rows: np.ndarray) -> np.ndarray:
        return rows[~np.isin(rows, sorted(self.skipped))]


def prepare_data(config: Config) -> PreparedData:
    """Read the CSV, look at every image once, assign the folds.

    Raises:
        DataError: whatever is wrong with the CSV, the images or the folds; all of one stage in one message.
    """
    data = config.data
    manifest = read_manifest(data)
    assignment = assign_folds(manifest, data.folds, data.stratify, config.project.seed)
    digests, bad = _inspect(manifest, data.max_image_pixels)
    warnings = list(manifest.warnings)
    if bad:
        line = tell(
            "images that can't be used",
            [f"{_name(manifest, row)}: {problem}" for row, problem in bad.items()],
            shown=len(bad),
        )
        if data.on_bad_image == "error":
            raise DataError(f"{line}\n(data.on_bad_image: skip leaves such rows out)")
        warnings.append(line)
    skipped = frozenset(bad) | {row for row, path in enumerate(manifest.paths) if path is None}
    if skipped:
        warnings.append(f"{len(skipped)} rows are left out of training; their OOF logits will be NaN")
    rows = [
        (
            "" if row in skipped else digests[row],
            manifest.classes[target],
            manifest.groups[row] if manifest.groups else "",
        )
        for row, target in enumerate(manifest.targets)
    ]
    digest = hashlib.sha256(json.dumps([manifest.classes, rows]).encode()).hexdigest()
    prepared = PreparedData(manifest, assignment, skipped, digest, tuple(warnings))
    for fold in range(data.folds):
        for rows_of, what in ((prepared.list_train(fold), "train on"), (prepared.list_valid(fold), "validate on")):
            if len(rows_of) == 0:
                raise DataError(f"fold {fold}: no usable image is left to {what}")
    return prepared


def _inspect(manifest: Manifest, max_pixels: int) -> tuple[dict[int, str], dict[int, str]]:
    """(row -> digest, row -> problem); an image named by several rows is read once."""
    files: list[Path] = sorted({path for path in manifest.paths if path is not None})
    facts = dict(zip(files, inspect_images(files, max_pixels, min(_MAX_THREADS, os.cpu_count() or 1)), strict=True))
    digests, bad = {}, {}
    for row, path in enumerate(manifest.paths):
        if path is not None:
            digests[row] = facts[path].digest
            if facts[path].problem is not None:
                bad[row] = f"{path}: {facts[path].problem}"
    return digests, bad


def _name(manifest: Manifest, row: int) -> str:
    return f"line {row + 2}: ID {manifest.ids[row]!r}"
