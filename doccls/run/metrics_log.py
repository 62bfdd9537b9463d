"""The metrics log of a run: metrics.jsonl, with one line per epoch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from doccls.run.paths import RunPaths
from doccls.system.atomic_files import read_bytes, remove_leftovers, write_text


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl."""

    fold: int
    epoch: int  # 1-based
    train_loss: float | None  # None, or NaN before it is written, if all steps of the epoch overflowed in fp16
    valid_loss: float
    macro_f1: float
    lr: float
    time_s: float
    mem_MiB: float
    # None in files of earlier versions:
    selection_f1: float | None = None  # the score that selects the best epoch (`doccls.oof.metrics.selection_f1`)
    weights: str | None = None  # the weights that were validated: `raw` or `ema`
    macro_f1_damaged: float | None = None  # on damaged copies of the pages; without them, the line lacks the key
    images_per_s: float | None = None  # training images of all processes, in the steps since the epoch's last start
    resumed_step: int | None = None  # the step from which a restart resumed the epoch; if none did, the key is missing


_EPOCH = TypeAdapter(EpochMetrics)


def write_fold_metrics(paths: RunPaths, rows: Sequence[EpochMetrics]) -> list[str]:
    """Write one fold's epochs so far and rewrite metrics.jsonl from all folds; only the main process may call.

    Returns:
        The warnings of `write_metrics`.
    """
    assert rows
    fold = rows[0].fold
    write_text(paths.fold_metrics(fold), _render_rows(rows))
    return write_metrics(paths, _name_writer(fold))


def remove_metrics_leftovers(paths: RunPaths, fold: int) -> None:
    """Remove partial files of a killed process that trained the fold; others may be writing metrics.jsonl meanwhile."""
    remove_leftovers(paths.fold_metrics(fold))
    remove_leftovers(paths.metrics, _name_writer(fold))


def _name_writer(fold: int) -> str:
    return f"fold{fold}"


def write_metrics(paths: RunPaths, writer: str = "merge") -> list[str]:
    """Write metrics.jsonl from all folds' files, sorted by (fold, epoch); `writer` as in `replacing`.

    Returns:
        A warning for each damaged line, which is left out: nothing else depends on this log.
    """
    rows, warnings = read_metrics(paths)
    write_text(paths.metrics, _render_rows(rows), writer)
    return warnings


def read_metrics(paths: RunPaths) -> tuple[list[EpochMetrics], list[str]]:
    """Read the epochs of all folds' files, sorted by (fold, epoch).

    Returns:
        The epochs, and a warning for each damaged line, which is left out.
    """
    rows, warnings = [], []
    for file in paths.list_fold_metrics():
        lines = read_bytes(file).decode(errors="replace").splitlines()
        parsed = [_parse_row(line) for line in lines]
        rows += [row for row in parsed if row is not None]
        name = file.relative_to(paths.root)
        if not lines:
            warnings.append(f"{name}: empty")
        warnings += [
            f"{name}:{number}: damaged, left out of {paths.metrics.name}"
            for number, row in enumerate(parsed, 1)
            if row is None
        ]
    return sorted(rows, key=lambda row: (row.fold, row.epoch)), warnings


def read_fold_metrics(file: Path) -> list[EpochMetrics]:
    """Read the epochs of one fold's file, without damaged lines; none if there is no such file."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [row for row in map(_parse_row, lines) if row is not None]


def _render_rows(rows: Sequence[EpochMetrics]) -> str:
    """Return the rows as JSON lines, with null for NaN, which JSON lacks."""
    return "".join(json.dumps(_describe_row(row)) + "\n" for row in rows)


def _describe_row(row: EpochMetrics) -> dict[str, Any]:
    values = {name: None if value != value else value for name, value in asdict(row).items()}
    missing = [name for name in ("macro_f1_damaged", "resumed_step") if values[name] is None]
    return {name: value for name, value in values.items() if name not in missing}


def _parse_row(line: str) -> EpochMetrics | None:
    try:
        return _EPOCH.validate_json(line, strict=True)
    except ValueError:
        return None
