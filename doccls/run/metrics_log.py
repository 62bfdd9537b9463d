"""metrics.jsonl: a line an epoch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from doccls.run.paths import RunPaths
from doccls.system.atomic_files import remove_leftovers, write_text


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl."""

    fold: int
    epoch: int
    """1-based."""
    train_loss: float | None
    """None, or NaN before it is written, if all steps of the epoch overflowed in fp16."""
    valid_loss: float
    macro_f1: float
    lr: float
    time_s: float
    mem_MiB: float
    selection_f1: float | None = None
    """What the epoch is compared by (`doccls.oof.metrics.selection_f1`); None in files of earlier versions."""
    weights: str | None = None
    """Which were validated and would be kept: `raw`, or `ema`; None in files of earlier versions."""


def write_fold_metrics(paths: RunPaths, rows: Sequence[EpochMetrics]) -> list[str]:
    """Write one fold's epochs so far, and metrics.jsonl anew from all folds. The main process calls.

    Returns:
        What `write_metrics` does.
    """
    assert rows
    fold = rows[0].fold
    write_text(paths.fold_metrics(fold), _render_rows(rows))
    return write_metrics(paths, _name_writer(fold))


def remove_metrics_leftovers(paths: RunPaths, fold: int) -> None:
    """What a killed process that trained the fold had half-written; others may be writing metrics.jsonl now."""
    remove_leftovers(paths.fold_metrics(fold))
    remove_leftovers(paths.metrics, _name_writer(fold))


def _name_writer(fold: int) -> str:
    return f"fold{fold}"


def write_metrics(paths: RunPaths, by: str = "merge") -> list[str]:
    """metrics.jsonl from every fold's file, sorted by (fold, epoch); `by` whom, of several processes.

    Returns:
        A remark on each line of them that is damaged, and left out: it is a record, on which nothing depends.
    """
    rows, remarks = [], []
    for file in sorted(paths.metrics_dir.glob("fold*.jsonl")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [_parse_row(line) for line in lines]
        rows += [row for row in found if row is not None]
        name = file.relative_to(paths.root)
        if not lines:
            remarks.append(f"{name}: empty")
        remarks += [
            f"{name}:{number}: damaged, and left out of {paths.metrics.name}"
            for number, row in enumerate(found, 1)
            if row is None
        ]
    rows.sort(key=lambda row: (row.fold, row.epoch))
    write_text(paths.metrics, _render_rows(rows), by)
    return remarks


def _render_rows(rows: Sequence[EpochMetrics]) -> str:
    """JSON has no NaN: null stands for it."""
    values = [{name: None if value != value else value for name, value in asdict(row).items()} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in values)


def _parse_row(line: str) -> EpochMetrics | None:
    try:
        row = EpochMetrics(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return row if isinstance(row.fold, int) and isinstance(row.epoch, int) else None
