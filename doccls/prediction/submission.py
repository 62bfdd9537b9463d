"""The submission: its text, and the record by which a partial one never replaces a complete one."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from doccls.config.paths import is_file
from doccls.config.schema import IMAGE_EXTENSIONS
from doccls.data.table import read_table
from doccls.errors import UserError
from doccls.run.paths import ResultPaths
from doccls.system.atomic_files import write_array, write_text

_FORMAT = "doccls-submission-1"


@dataclass(frozen=True)
class Coverage:
    """What pages were predicted from."""

    folds: tuple[int, ...]  # whose models were averaged
    num_rows: int  # of the sample submission, or images of a folder
    num_predicted: int  # rows with a usable image
    views: tuple[str, ...] = ("id",)  # whose probabilities were averaged
    adapt_bn: int | None = None  # strength of the training's BatchNorm statistics beside those of the pages


def check_columns(columns: Sequence[str], id_col: str, classes: Sequence[str]) -> list[str]:
    """Return the sample's columns besides the ID: one for the label, or one per class.

    Raises:
        UserError: the columns fit neither form.
    """
    others = [column for column in columns if column != id_col]
    if len(others) != 1 and sorted(others) != sorted(classes):
        raise UserError(
            f"data.sample_csv has the columns {list(columns)}: besides {id_col!r} it needs either one column for "
            f"the label or exactly one column per class: {', '.join(classes)}"
        )
    return others


def render_submission(
    columns: Sequence[str],
    id_col: str,
    ids: Sequence[str],
    classes: Sequence[str],
    probs_NC: np.ndarray,
    chosen_N: np.ndarray,
) -> str:
    """Render a CSV with the sample's columns, IDs and order, and either one label column or one probability per class.

    The labels are the classes of `chosen_N` (n,).

    Raises:
        UserError: the sample's columns fit neither form.
    """
    others = check_columns(columns, id_col, classes)
    if len(others) == 1:
        cells = {others[0]: [classes[chosen] for chosen in chosen_N.tolist()]}
    else:
        cells = {label: [f"{prob:.8f}" for prob in probs_NC[:, column]] for column, label in enumerate(classes)}
    cells[id_col] = list(ids)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(cells[column] for column in columns), strict=True))
    return text.getvalue()


def check_replacement(paths: ResultPaths, coverage: Coverage, id_col: str, ids: Sequence[str]) -> None:
    """Check that a new submission would not replace a more complete one that shares IDs with it.

    Raises:
        UserError: the existing submission has more rows or, by its record, was predicted
            from more folds or more images; or it is not readable.
    """
    if not is_file(paths.submission) or not paths.submission.stat().st_size:
        return
    try:
        existing_ids = read_table(paths.submission, "submission", [id_col]).cells.get(id_col, ())
    except UserError as error:
        raise UserError(f"{error}\n(rename or delete it, so that it is not replaced)") from error
    if set(map(_find_stem, ids)).isdisjoint(map(_find_stem, existing_ids)):
        return  # of other test images
    existing = _read_coverage(paths) or Coverage((), len(existing_ids), 0)
    pairs = (
        (coverage.num_rows, len(existing_ids), "rows"),
        (len(set(ids)), len(set(existing_ids)), "distinct IDs"),
        (len(coverage.folds), len(existing.folds), "folds"),
        (coverage.num_predicted, existing.num_predicted, "usable images"),
    )
    lacking = [f"{what}: {new} instead of {old}" for new, old, what in pairs if new < old]
    if lacking:
        raise UserError(
            f"{paths.submission} is more complete than the new submission would be ({'; '.join(lacking)}): rename or "
            "delete it to predict nevertheless"
        )


def _find_stem(sample_id: str) -> str:
    """Return the ID's file name without folder and image extension, in lower case."""
    path = PurePosixPath(sample_id)
    return (path.stem if path.suffix.lower() in IMAGE_EXTENSIONS else path.name).lower()


def write_submission(paths: ResultPaths, text: str, probs_NC: np.ndarray, coverage: Coverage) -> None:
    """Write the probabilities (n, classes) as float32, the submission, and last its record."""
    write_array(paths.test_probabilities, probs_NC.astype(np.float32))
    write_text(paths.submission, text)
    write_text(paths.submission_record, json.dumps({"format": _FORMAT, **list_values(coverage)}, indent=2) + "\n")


def list_values(coverage: Coverage) -> dict[str, Any]:
    """Return the coverage as JSON values, without options that were not used."""
    values = asdict(coverage)
    if coverage.views == ("id",):
        del values["views"]
    if coverage.adapt_bn is None:
        del values["adapt_bn"]
    return values


def _read_coverage(paths: ResultPaths) -> Coverage | None:
    """Return the existing submission's record; None if there is none, or it is not readable."""
    try:
        content = json.loads(paths.submission_record.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return None
        return Coverage(tuple(map(int, content["folds"])), int(content["num_rows"]), int(content["num_predicted"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
