"""CSV + image folder -> `Manifest`: every row's ID, label and image, or one error that names everything wrong."""

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pandas as pd

from doccls.config.schema import IMAGE_EXTENSIONS, DataConfig
from doccls.data.packed import PackedPaths, PackedTexts
from doccls.errors import UserError

_MISSING_LABELS = {"", "nan", "none", "null", "na", "n/a", "<na>"}
_SHOWN = 10
RELATIVE_RULE = "paths in a config are relative to the config file"


class DataError(UserError):
    """The data as given can't be trained on; the message lists every problem, each with its count."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """All rows of train.csv, in its order. A sample's index is its row (0-based) and keys everything about it."""

    ids: PackedTexts
    """As written in the CSV."""
    targets_N: np.ndarray
    """(n,) int64 indices into `classes`."""
    classes: tuple[str, ...]
    """Labels as written, ordered by number if all are numbers, else by text."""
    paths: PackedPaths
    """Image file; None where there is none (and data.on_bad_image is `skip`)."""
    groups: PackedTexts | None
    """data.group_col, where it is set."""
    folds: PackedTexts | None
    """The CSV's own `fold` column, not yet validated."""
    warnings: tuple[str, ...]
    """What a user should know and training can live with."""

    def __len__(self) -> int:
        return len(self.ids)


def read_manifest(data: DataConfig) -> Manifest:
    """Read train.csv and find each row's image.

    Raises:
        DataError: anything wrong with the CSV, its columns, labels or IDs, or images that are missing.
    """
    check_paths({"data.train_csv": (data.train_csv, "file"), "data.image_dir_train": (data.image_dir_train, "folder")})
    table = read_table(data.train_csv, "data.train_csv")
    wanted = {"data.id_col": data.id_col, "data.target_col": data.target_col}
    if data.group_col:
        wanted["data.group_col"] = data.group_col
    _require_columns(table, wanted, data.train_csv)
    if table.empty:
        raise DataError(f"{data.train_csv}: no rows")

    ids = tuple(table[data.id_col])
    labels = [label.strip() for label in table[data.target_col]]
    problems: list[str] = []
    warnings: list[str] = []

    unlabelled = [row for row, label in enumerate(labels) if label.lower() in _MISSING_LABELS]
    if unlabelled:
        problems.append(
            tell(
                f"rows without a {data.target_col!r} (empty, nan, na, n/a, none, null)",
                [_row(ids, row) for row in unlabelled],
            )
        )
    classes = order_classes(label for label in labels if label.lower() not in _MISSING_LABELS)
    if not unlabelled and len(classes) < 2:
        problems.append(f"every row has the label {classes[0]!r}: at least two classes are needed")
    problems.extend(_find_double_spellings(classes))

    names, missing = resolve_images(ids, data.image_dir_train, data.image_ext, problems)
    if missing:
        line = tell(f"images missing in {data.image_dir_train} (data.image_dir_train)", missing)
        (warnings if data.on_bad_image == "skip" else problems).append(line)

    duplicates = _find_duplicates(names)
    if duplicates:
        line = tell("images named by more than one row", [_duplicate(ids, labels, rows) for rows in duplicates])
        (warnings if data.on_duplicate == "keep" else problems).append(f"{line}\n  (data.on_duplicate: keep | error)")
    if data.group_col and (empty := [row for row, group in enumerate(table[data.group_col]) if not group.strip()]):
        problems.append(tell(f"rows with an empty {data.group_col!r}", [_row(ids, row) for row in empty]))
    if problems:
        raise DataError(f"{data.train_csv}: the data can't be used\n" + "\n".join(f"- {line}" for line in problems))

    number_of = {label: number for number, label in enumerate(classes)}
    counts = Counter(labels)
    small = [f"{label} ({counts[label]})" for label in classes if counts[label] < data.folds]
    if small:
        warnings.append(
            tell(f"classes with fewer samples than the {data.folds} folds, which some folds will lack", small)
        )
    return Manifest(
        ids=PackedTexts(ids),
        targets_N=np.asarray([number_of[label] for label in labels], dtype=np.int64),
        classes=classes,
        paths=PackedPaths(data.image_dir_train, names),
        groups=PackedTexts(table[data.group_col]) if data.group_col else None,
        folds=PackedTexts(table["fold"]) if "fold" in table.columns else None,
        warnings=tuple(warnings),
    )


def read_table(path: Path, key: str) -> pd.DataFrame:
    """The CSV at `path`, every cell as the text that stands there (an ID `NA` or `007` stays one).

    Raises:
        DataError: not readable as CSV; `key` is named.
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
        raise DataError(f"{key}: can't read {path}: {error}") from error


def check_paths(paths: Mapping[str, tuple[Path | None, str]]) -> None:
    """Each config key's file or folder must exist.

    Raises:
        DataError: some don't; each is named with its key and absolute path.
    """
    problems = []
    for key, (path, kind) in paths.items():
        if path is None:
            problems.append(f"{key}: not set")
        elif not path.exists():
            problems.append(f"{key}: no such {kind}: {path}")
        elif (kind == "folder") != path.is_dir():
            problems.append(f"{key}: not a {kind}: {path}")
    if problems:
        raise DataError("\n".join([*problems, f"({RELATIVE_RULE})"]))


def order_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in class order: by number if every one is a number, else by text."""
    distinct = set(labels)
    try:
        return tuple(sorted(distinct, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(distinct))


def resolve_images(
    ids: Iterable[str], folder: Path, image_ext: str, problems: list[str]
) -> tuple[list[str | None], list[str]]:
    """Each ID's image file, relative to `folder`, and a line for each missing one (None) that says what was tried.

    An ID that is absolute, climbs with `..` or is empty never becomes a path: those go to `problems`.
    """
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
            name = next((found for one in candidates if (found := folders.find(one))), None)
            if name is None:
                tried = ", ".join(str(folder / one) for one in candidates)
                missing.append(f"line {row + 2}: ID {sample_id!r}: tried {tried}")
        names.append(name)
    if escaping:
        problems.append(tell("IDs that are empty or leave the image folder (absolute, or with `..`)", escaping))
    return names, missing


def list_candidates(sample_id: str, image_ext: str) -> tuple[str, ...]:
    """File names to try, in order. With a known extension nothing is added: never `x.jpg.jpg`."""
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
    """Listings of folders in one, each read once: name -> name, and lower-case name -> first such name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listings: dict[str, dict[str, str]] = {}

    def find(self, path: str) -> str | None:
        """`path`, relative to the root, if that file is there, else the file whose name differs only in case."""
        path = os.path.normpath(path)  # of `./x.jpg` and `x.jpg` one file, and one name
        folder, name = os.path.split(path)
        names = self._listings.get(folder)
        if names is None:
            names = self._listings[folder] = self._read(self._root / folder)
        found = names.get(name) or names.get(name.lower())
        return f"{folder}/{found}" if found and folder else found

    @staticmethod
    def _read(folder: Path) -> dict[str, str]:
        try:
            files = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {name.lower(): name for name in reversed(files)} | {name: name for name in files}


def _find_duplicates(names: Sequence[str | None]) -> list[list[int]]:
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            rows.setdefault(name, []).append(row)
    return [found for found in rows.values() if len(found) > 1]


def _find_double_spellings(classes: tuple[str, ...]) -> list[str]:
    spellings: dict[float, list[str]] = {}
    for label in classes:
        try:
            spellings.setdefault(float(label), []).append(label)
        except ValueError:
            return []
    return [
        f"labels {', '.join(map(repr, same))} are one number spelled twice"
        for same in spellings.values()
        if len(same) > 1
    ]


def _require_columns(table: pd.DataFrame, wanted: Mapping[str, str], path: Path) -> None:
    absent = [f"{key} = {column!r}" for key, column in wanted.items() if column not in table.columns]
    if absent:
        raise DataError(f"{path}: no such column: {', '.join(absent)}; it has: {', '.join(map(repr, table.columns))}")


def _row(ids: tuple[str, ...], row: int) -> str:
    return f"line {row + 2}: ID {ids[row]!r}"


def _duplicate(ids: tuple[str, ...], labels: list[str], rows: list[int]) -> str:
    lines = " and ".join(str(row + 2) for row in rows)
    found = [labels[row] for row in rows]
    return f"lines {lines}: ID {ids[rows[0]]!r}" + (f", labels differ: {found}" if len(set(found)) > 1 else "")


def tell(what: str, examples: list[str], shown: int = _SHOWN) -> str:
    """What was counted, how many, and the first of them."""
    lines = "\n".join(f"    {line}" for line in examples[:shown])
    more = f"\n    ... and {len(examples) - shown} more" if len(examples) > shown else ""
    return f"{what}: {len(examples)}\n{lines}{more}"
